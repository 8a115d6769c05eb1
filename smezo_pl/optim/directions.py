r"""Noise scheme 2: directions of low rank and sign flips, one for the whole batch or one for each of its rows.

Scheme 2 draws nothing new: its numbers are those of scheme 1 (`smezo_pl.optim.noise`) at samples from ``2^23`` on,
where no sample of n-SPSA is. A direction of a tensor is a sum of outer products of *factors*.

**Shape.** A tensor of two or more dimensions counts as a matrix of ``n`` rows and ``m`` columns, where ``m`` is its
last dimension; one of fewer dimensions as ``m`` numbers.

**Low rank.** Row ``r`` of the global batch has, for sample ``q`` and a matrix, the direction::

    Z_r = k^(-1/2) * sum over j < k of a_rj b_rj^T

with rank ``k``. ``a_rj``, of ``n`` numbers, and ``b_rj``, of ``m``, come from the stream of the tensor at sample
``q + 2^23``; with ``N`` and ``M``, which are ``n`` and ``m`` rounded up to multiples of 1024::

    a_rj = elements (r k + j) (N + M) ... + n,      b_rj = elements (r k + j) (N + M) + N ... + m

They are of the noise's distribution, normals rounded to bfloat16 (nearest, ties to even), so that every dtype holds
them exactly. Numbers that are no matrix have ``Z_r`` = elements ``r M ... + m``, rounded likewise, whatever the rank.

**Sign flips.** ``Z_r = (mask z) * (u_r v_r^T)`` with the mask and the noise ``z`` that scheme 1 has for sample 0, in
all samples, and ``u_r`` and ``v_r`` where a rank of 1 has ``a`` and ``b``, but always signs. Numbers that are no matrix
have ``mask z v_r`` with ``v_r`` where low rank has ``Z_r``.

**Shared.** A direction of low rank for the whole batch is that of row 0; so is that of a tensor whose rows cannot be
told. Of sign flips such a tensor has ``mask z`` with the ``z`` of the sample, as in scheme 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from smezo_pl.optim.kernels.base import Draw, Kernel
from smezo_pl.optim.noise import BLOCK, NOISE_SCHEME, Distribution, Stream

DIRECTIONS_SCHEME = 2
"""Version of the scheme above, kept in every trajectory that uses it."""

DirectionsName = Literal["shared", "per_row"]
"""One direction for the whole batch (the papers'), or one for each of its rows."""

FACTORS = 1 << 23
"""Added to a sample's number where factors and signs are drawn."""

MAX_RANK = 64
"""Highest rank of a direction."""


@dataclass(frozen=True, slots=True)
class Directions:
    """What directions a run has.

    Attributes:
        per_row: Whether each row of the batch has its own.
        rank: Their rank; None for full noise, with sign flips where each row has its own.
    """

    per_row: bool
    rank: int | None

    @property
    def scheme(self) -> int:
        """Version of the noise that they need."""
        return NOISE_SCHEME if self == SHARED else DIRECTIONS_SCHEME

    def __str__(self) -> str:
        return f"directions={'per_row' if self.per_row else 'shared'!r} and rank={self.rank}"


SHARED = Directions(per_row=False, rank=None)
"""The papers': full noise, one direction for the whole batch."""


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """``n`` and ``m`` of a tensor; ``n`` is 1 for what is no matrix."""
    last = shape[-1] if shape else 1
    return (torch.Size(shape[:-1]).numel(), last) if len(shape) > 1 else (1, last)


@dataclass(frozen=True, slots=True)
class Factors:
    """Where the factors of a tensor come from in one sample of a step.

    Attributes:
        kernel: What draws them.
        stream: The stream of the tensor for that step and sample, as in scheme 1.
        shape: Shape of the tensor.
        rank: The rank; 1 for sign flips.
        distribution: Of the factors; ``rademacher`` for sign flips.
    """

    kernel: Kernel
    stream: Stream
    shape: torch.Size
    rank: int
    distribution: Distribution

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor counts as a matrix."""
        return len(self.shape) > 1

    @property
    def count(self) -> int:
        """How many outer products the direction of one row is the sum of."""
        return self.rank if self.is_matrix else 1

    def left(self, rows: Sequence[int]) -> Tensor | None:
        """``a`` of some rows of the global batch: bfloat16 ``[len(rows), rank, n]``; None for what is no matrix."""
        return both([self], rows)[0][0]

    def right(self, rows: Sequence[int]) -> Tensor:
        """``b`` of some rows, or all of their direction: bfloat16 ``[len(rows), rank, m]``, rank 1 for no matrix."""
        return both([self], rows)[0][1]

    def draw(self, side: Literal["left", "right"], out: Tensor, first: int = 0) -> Draw:
        """How to draw a part of `left`, of a matrix, or of `right`, of the first rows.

        Args:
            side: Which of them.
            out: bfloat16 ``[rows * count, numbers]``.
            first: Which number of each vector is the first in ``out``; a multiple of 1024.
        """
        offset, width = self.widths()
        first += 0 if side == "left" else offset
        return Draw(out, range(first, first + len(out) * width, width), self.source())

    def widths(self) -> tuple[int, int]:
        """``N`` and ``N + M``; ``N`` is 0 for what is no matrix."""
        return _widths(self.shape)

    def source(self) -> Stream:
        """The stream of the factors."""
        own = self.stream
        return Stream(own.seed, own.step, own.sample + FACTORS, own.tensor, own.start)


def both(
    tensors: Sequence[Factors], rows: Sequence[int], device: torch.device | str = "cpu"
) -> list[tuple[Tensor | None, Tensor]]:
    """`Factors.left` and `Factors.right` of tensors that have one kernel and distribution; not contiguous."""
    is_range = isinstance(rows, range) or list(rows) == list(range(rows[0], rows[0] + len(rows)))
    begins = rows[:1] if is_range else rows  # what lies together is drawn in one piece
    widths = [factors.widths() for factors in tensors]
    sizes = [len(rows) * factors.count * width for factors, (_, width) in zip(tensors, widths, strict=True)]
    memory = torch.empty(sum(sizes), dtype=torch.bfloat16, device=device)
    draws, drawn = list[Draw](), list[tuple[Tensor | None, Tensor]]()
    for factors, (offset, width), part in zip(tensors, widths, torch.split(memory, sizes), strict=True):
        count, columns = factors.count, factors.shape[-1] if factors.shape else 1
        vectors = part.view(len(rows), count, width)
        drawn.append(
            (vectors[..., : factors.shape[:-1].numel()] if offset else None, vectors[..., offset : offset + columns])
        )
        draws.append(Draw(part.view(len(begins), -1), [row * count * width for row in begins], factors.source()))
    tensors[0].kernel.draw_rows(draws, tensors[0].distribution)
    return drawn


@functools.cache
def _widths(shape: torch.Size) -> tuple[int, int]:
    n, m = matrix_shape(shape)
    offset = _padded(n) if len(shape) > 1 else 0
    return offset, offset + _padded(m)


def _padded(numel: int) -> int:
    return -(-numel // BLOCK) * BLOCK
