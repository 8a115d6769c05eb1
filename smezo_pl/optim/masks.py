"""Which weights of a tensor are active: the mask rules and their thresholds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isinf
from typing import Any, Literal

import torch
from torch import Tensor

from smezo_pl.optim.noise import Stream

MaskRule = Literal["small", "large", "random", "dense"]
"""Rules a user chooses from: ``small`` is Sparse MeZO, ``random`` R-MeZO, ``large`` an ablation, ``dense`` MeZO."""

MASK_RULES: tuple[MaskRule, ...] = ("small", "large", "random", "dense")

WORD_RANGE = 1 << 16
"""The random rule compares 16-bit words, so its density is a multiple of ``1 / WORD_RANGE``."""


@dataclass(frozen=True, slots=True)
class Mask:
    """The selection ``m`` of one tensor, described rather than stored.

    A weight is active (perturbed and updated) where

    - ``dense``: always,
    - ``small``: ``|theta| <= threshold``,
    - ``large``: ``|theta| > threshold``,
    - ``random``: its 16-bit word of ``stream`` is below ``level``,
    - ``packed``: its bit is set.

    A NaN compares false, so it is active under ``dense``, ``random`` and ``packed`` only.

    Attributes:
        rule: One of the rules above.
        threshold: Magnitude ``h`` that ``small`` and ``large`` compare with.
        stream: Where the random rule draws from.
        level: Active share of the random rule times 65536.
        bits: Packed mask, uint8 of shape ``[ceil(n / 8)]``: element ``i`` is bit ``i & 7`` of byte ``i >> 3``.
    """

    rule: Literal["small", "large", "random", "dense", "packed"]
    threshold: float = inf
    stream: Stream | None = None
    level: int = WORD_RANGE
    bits: Tensor | None = None

    def part(self, first: int, count: int) -> Mask:
        """The same selection for the elements ``[first, first + count)``; ``first`` is a multiple of 8."""
        if self.rule == "random" and self.stream is not None:
            return replace(self, stream=self.stream.part(first))
        if self.rule == "packed" and self.bits is not None:
            return replace(self, bits=self.bits[first // 8 : (first + count + 7) // 8])
        return self


DENSE = Mask("dense")


def count_ones(bits: Tensor) -> int:
    """How many weights a packed mask selects."""
    return int.from_bytes(bits.cpu().numpy().tobytes(), "little").bit_count()


Histogram = Callable[[Tensor, int, "int | None"], Tensor]
"""``histogram(theta, shift, prefix)`` of a kernel (see `smezo_pl.optim.kernels.base.Kernel`)."""

_INFINITY_CODE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80}
"""Upper 16 bits of infinity; a larger code is a NaN."""

_FLOAT32_MAX = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True, slots=True)
class Threshold:
    """A magnitude between two distinct magnitudes of a tensor.

    Attributes:
        value: ``h``; ``inf`` when no finite value divides the tensor.
        at_most: Number of weights with ``|theta| <= h``.
        magnitudes: How many distinct magnitudes were seen, at least; 1 means the tensor cannot be divided.
    """

    value: float
    at_most: int
    magnitudes: int


def find_threshold(theta: Tensor, rank: int, histogram: Histogram, *, leave_one: bool = False) -> Threshold:
    """Find the threshold below which the number of weights is nearest to ``rank``.

    Tied magnitudes (quantized or pruned weights) stay together, so the number may differ from ``rank``; of two equally
    near ones the smaller is taken. ``h`` lies midway between two neighboring distinct magnitudes, so that a weight on
    either side does not change sides by one rounding.

    Args:
        theta: Flat tensor, float32, bfloat16, float16 or float64. NaN are left out.
        rank: Wanted number of weights at or below the threshold, in ``[0, numel]``.
        histogram: Counts of codes, from a kernel.
        leave_one: Whether some weight must stay above the threshold (for the rule ``large``).
    """
    codes: list[Any]
    if theta.dtype == torch.float64:  # the dtype of references: by a sort
        magnitudes, counts = torch.unique(theta[~theta.isnan()].abs(), return_counts=True)
        codes, cumulative = magnitudes.tolist(), counts.cumsum(0).tolist()
    elif theta.dtype == torch.float32:
        codes, cumulative = _codes_around(theta, rank, histogram)
    else:
        counts = histogram(theta, 0, None)[: _INFINITY_CODE[theta.dtype] + 1].cpu()
        present = counts.nonzero().flatten()
        codes, cumulative = present.tolist(), counts[present].cumsum(0).tolist()
    if not codes:
        return Threshold(inf, theta.numel(), 0)
    pick = min(range(len(codes)), key=lambda j: abs(cumulative[j] - rank))
    if leave_one and pick == len(codes) - 1 and len(codes) > 1:
        pick -= 1
    if pick == len(codes) - 1:
        return Threshold(inf, cumulative[pick], len(codes))
    low, high = (_magnitude(codes[j], theta.dtype) for j in (pick, pick + 1))
    return Threshold(_between(low, high, theta.dtype), cumulative[pick], len(codes))


def _codes_around(theta: Tensor, rank: int, histogram: Histogram) -> tuple[list[int], list[int]]:
    """Codes and cumulative counts of float32: of the bucket (upper 16 bits) that holds ``rank`` and its neighbors."""
    infinity = _INFINITY_CODE[theta.dtype]
    upper = histogram(theta, 16, None)[: infinity + 1].cpu()
    # NaN share the topmost bucket with infinity: only the code with no lower bits is a number
    upper[infinity] = histogram(theta, 0, infinity)[0] if upper[infinity] else 0
    buckets = upper.nonzero().flatten()
    ends = upper[buckets].cumsum(0)
    middle = min(int(torch.searchsorted(ends, rank)), len(ends) - 1)
    first = max(middle - 1, 0)
    total = int(ends[first - 1]) if first else 0
    codes: list[int] = []
    cumulative: list[int] = []
    for bucket in buckets[first : middle + 2].tolist():
        counts = histogram(theta, 0, bucket).cpu()
        if bucket == infinity:
            counts = counts[:1]
        present = counts.nonzero().flatten()
        codes += [(bucket << 16) | low for low in present.tolist()]
        cumulative += (counts[present].cumsum(0) + total).tolist()
        total = cumulative[-1]
    return codes, cumulative


def _magnitude(code: Any, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return float(code)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    return float(torch.tensor([code], dtype=bits).view(dtype).item())


def _between(low: float, high: float, dtype: torch.dtype) -> float:
    """A number in ``[low, high)``, the middle where there is one; a float32 for what kernels compare in float32."""
    if dtype == torch.float64:
        middle = low + (high - low) / 2
    elif isinf(high):
        return _FLOAT32_MAX
    else:
        middle = float(torch.tensor((low + high) / 2, dtype=torch.float32).item())
    return middle if middle < high else low
