"""What the fused passes are, and what all kernels refuse.

`Kernel` says what each pass computes. The functions check arguments and turn thresholds into the bits of a dtype.
"""

from __future__ import annotations

import functools
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

import torch
from torch import Tensor

from smezo_pl.optim.masks import DENSE, Mask
from smezo_pl.optim.noise import BLOCK, Distribution, Stream

CODE_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype that holds the bits of a float of so many bytes."""

QUIET_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000, torch.float64: 0x7FF8 << 48}
"""The one NaN that arithmetic leaves in a weight: processors and libraries differ in the payload they would keep."""

INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
"""Bits of positive infinity; a larger magnitude code is a NaN."""

_FLOAT32, _UINT32 = struct.Struct("<f"), struct.Struct("<I")


class Update(NamedTuple):
    """The update of one tensor, ``theta = round(theta - (sum of scale * z + decay * theta))`` under the mask.

    Attributes:
        theta: Weights, updated in place.
        mask: Which of them are active, judged by ``theta`` before the update.
        streams: Where ``z`` comes from, one for each sample.
        scales: Learning rate times projected gradient, one for each sample; ``scale * z`` are summed in this order.
        decay: Learning rate times weight decay; left out of the sum if it is 0. With all scales 0 too, nothing changes.
        rounding: Where the random bits of stochastic rounding come from; None rounds to nearest even. Weights of 32
            and 64 bits are always rounded to nearest.
    """

    theta: Tensor
    mask: Mask
    streams: Sequence[Stream]
    scales: Sequence[float]
    decay: float = 0.0
    rounding: Stream | None = None


class Factored(NamedTuple):
    """A sum of outer products as the noise of a pass, ``delta = sum over d of (scale_d left_d) right_d^T``.

    ``theta`` counts as a matrix ``[n, m]``. For each weight, in this order and each operation rounded once:
    ``delta = (scales[0] left[0, i]) right[0, j]``; for every further ``d``, ``delta = delta + (scales[d] left[d, i])
    right[d, j]``; with a stream, ``delta = delta * z``.

    Attributes:
        left: bfloat16 ``[D, n]``.
        right: bfloat16 ``[D, m]``.
        scales: ``D`` numbers, at least one; rounded to the precision of the arithmetic.
        stream: Where a factor ``z`` of every element comes from; None for none.
    """

    left: Tensor
    right: Tensor
    scales: Sequence[float]
    stream: Stream | None = None


class FactoredUpdate(NamedTuple):
    """``theta = round(theta - (delta + decay * theta))`` under the mask, with the ``delta`` of `Factored`.

    Attributes:
        theta: Weights, flat, updated in place.
        mask: Which of them are active, judged by ``theta`` before the update.
        factored: The noise.
        decay: As in `Update`.
        rounding: As in `Update`.
    """

    theta: Tensor
    mask: Mask
    factored: Factored
    decay: float = 0.0
    rounding: Stream | None = None


class Draw(NamedTuple):
    """Vectors of noise: ``out[i]`` is that from element ``stream.start + starts[i]`` on, rounded to nearest even.

    Attributes:
        out: bfloat16 ``[V, L]``, contiguous.
        starts: ``V`` numbers, at least 0, multiples of 1024.
        stream: Where the noise comes from.
    """

    out: Tensor
    starts: Sequence[int]
    stream: Stream


class Kernel(ABC):
    """The passes over a tensor's weights. A kernel keeps no state between calls.

    ``theta`` and ``out`` are one-dimensional and contiguous, float32, bfloat16 or float16 (float64: the torch kernel
    alone; the others hand it over). ``m`` is the mask, ``z`` the noise. Arithmetic is float32 (float64 for float64
    weights), each operation rounded once, in the order written; scales and decay are rounded to that precision first.
    A weight outside the mask keeps its bits, the payload of a NaN included. An active weight follows the arithmetic:
    infinities stay, and every NaN becomes the one quiet NaN of its dtype. Streams give the noise of global element
    ``stream.start + i`` to ``theta[i]``.
    """

    name: str

    @abstractmethod
    def perturb(
        self, theta: Tensor, out: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float
    ) -> None:
        """``out = round(theta + scale * z)`` under the mask, ``theta`` elsewhere; a plain copy if ``scale`` is 0.

        Args:
            theta: Weights; not written unless ``out`` is the same memory.
            out: Where the result goes; may be ``theta`` itself.
            mask: Which weights are active, judged by ``theta``.
            noise: Distribution of ``z``.
            stream: Where ``z`` comes from.
            scale: Factor of ``z``: eps or -eps.
        """

    def perturb_rows(
        self, theta: Tensor, out: Tensor, rows: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float
    ) -> None:
        """`perturb` some rows of a matrix: ``out[i]`` is row ``rows[i]`` of the perturbed matrix.

        ``theta`` has shape ``[n, width]``, is contiguous, and ``width`` is a multiple of 8; ``out`` has shape
        ``[len(rows), width]``; ``rows`` are int64 in ``[0, n)``. Mask and stream are those of the whole matrix.
        """
        check_rows(theta, out, rows)
        width = theta.shape[1]
        for index, row in enumerate(rows.tolist()):
            first = row * width
            self.perturb(theta[row], out[index], mask.part(first, width), noise, stream.part(first), scale)

    @abstractmethod
    def update_all(self, updates: Sequence[Update], noise: Distribution) -> None:
        """Update several tensors, of any dtypes, at once: many small passes cost as much as one large one.

        Args:
            updates: The tensors and their updates. No two share memory.
            noise: Distribution of ``z``.
        """

    def draw_rows(self, draws: Sequence[Draw], noise: Distribution) -> None:
        """Draw vectors of noise, all on one device; many in one call cost little more than one.

        Args:
            draws: The vectors.
            noise: Distribution of the noise.
        """
        for out, starts, stream in draws:
            check_draws(out, starts)
            for row, start in zip(out, starts, strict=True):
                self.draw(row, row, DENSE, noise, stream.part(start), 1.0)

    @abstractmethod
    def draw(self, theta: Tensor, out: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float) -> None:
        """``out = round(scale * z)`` under the mask, 0 elsewhere; the arguments are those of `perturb`."""

    @abstractmethod
    def perturb_factored(self, theta: Tensor, out: Tensor, factored: Factored) -> None:
        """``out = round(theta - delta)`` with the ``delta`` of `Factored`, which has no stream here; no mask.

        ``out`` may be ``theta`` itself.
        """

    @abstractmethod
    def update_factored(self, update: FactoredUpdate, noise: Distribution) -> None:
        """Update a tensor by a sum of outer products."""

    def update_all_factored(self, updates: Sequence[FactoredUpdate], noise: Distribution) -> None:
        """Update several tensors, of any dtypes, by sums of outer products.

        Args:
            updates: The tensors and their updates. No two share memory.
            noise: Distribution of ``z``, where a stream gives it.
        """
        for update in updates:
            self.update_factored(update, noise)

    @abstractmethod
    def select(self, theta: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Pack the mask and copy the weights under it.

        Returns:
            Bits as `pack` gives them, and the active weights in ascending order of their index.
        """

    @abstractmethod
    def restore(self, theta: Tensor, bits: Tensor, saved: Tensor) -> None:
        """Write the weights that `select` saved back, in place; ``bits`` and ``saved`` are its results."""

    @abstractmethod
    def pack(self, theta: Tensor, mask: Mask) -> Tensor:
        """Evaluate a mask to one bit per weight.

        Returns:
            uint8 of shape ``[ceil(n / 8)]``: weight ``i`` is bit ``i & 7`` of byte ``i >> 3``; spare bits are 0.
        """

    @abstractmethod
    def histogram(self, theta: Tensor, shift: int, prefix: int | None) -> Tensor:
        """Count 16-bit digits of the magnitude codes (the bits of a weight without its sign).

        16-bit weights need ``histogram(theta, 0, None)``; float32 the upper halves ``histogram(theta, 16, None)`` and
        the lower ones of a bucket ``histogram(theta, 0, bucket)``.

        Args:
            theta: Weights.
            shift: Bits below the digit.
            prefix: Only weights with ``code >> (shift + 16) == prefix`` are counted; None counts all.

        Returns:
            int64 of shape ``[65536]``: how often each value of ``(code >> shift) & 0xffff`` occurs.
        """


def check_weights(theta: Tensor, name: str = "theta") -> None:
    """Refuse a tensor that is not flat, contiguous and of a dtype that kernels know."""
    if theta.dtype in QUIET_NAN and theta.dim() == 1 and theta.is_contiguous() and not theta.is_meta:
        return
    if theta.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {theta.layout}")
    if theta.dtype not in QUIET_NAN:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {theta.dtype}")
    if theta.is_meta:
        raise ValueError(f"{name} is on the meta device: it has no weights to work on")
    shape = f"shape {tuple(theta.shape)} and strides {theta.stride()}"
    raise ValueError(f"{name} must be one-dimensional and contiguous, got {shape}")


def check_pair(theta: Tensor, out: Tensor) -> None:
    """Refuse an output that does not fit the weights."""
    check_weights(theta)
    check_weights(out, "out")
    if out.dtype != theta.dtype:
        raise TypeError(f"out must be {theta.dtype} like theta, got {out.dtype}")
    if out.numel() != theta.numel() or out.device != theta.device:
        raise ValueError(
            f"out must have the {theta.numel()} elements of theta on {theta.device}, "
            f"got {out.numel()} elements on {out.device}"
        )
    distance = abs(out.data_ptr() - theta.data_ptr())
    if 0 < distance < theta.numel() * theta.element_size():
        raise ValueError("out must be theta itself or not overlap it")


def check_rows(theta: Tensor, out: Tensor, rows: Tensor) -> None:
    """Refuse rows that do not fit the matrix or the output."""
    if theta.dim() != 2 or theta.shape[1] % 8:
        raise ValueError(f"theta must be a matrix whose width is a multiple of 8, got shape {tuple(theta.shape)}")
    if rows.dtype != torch.int64:
        raise TypeError(f"rows must be int64, got {rows.dtype}")
    if rows.dim() != 1 or out.shape != (rows.numel(), theta.shape[1]):
        raise ValueError(
            f"out must have shape {(rows.numel(), theta.shape[1])} for rows of shape {tuple(rows.shape)}, "
            f"got {tuple(out.shape)}"
        )
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < theta.shape[0]:
        raise ValueError(f"rows must be in [0, {theta.shape[0]}), got {int(rows.min())} to {int(rows.max())}")
    check_weights(theta.view(-1))
    check_weights(out.view(-1), "out")
    if out.dtype != theta.dtype or out.device != theta.device:
        raise TypeError(f"out must be {theta.dtype} on {theta.device} like theta, got {out.dtype} on {out.device}")


def check_streams(mask: Mask, streams: Sequence[Stream], scales: Sequence[float], rounding: Stream | None) -> int:
    """Refuse noise that does not fit together; return the element that it starts at."""
    if not streams or len(streams) != len(scales):
        raise ValueError(f"update needs one scale per stream and at least one, got {len(streams)} and {len(scales)}")
    return _common_start(*streams, mask.stream, rounding)


def _common_start(*streams: Stream | None) -> int:
    starts = [stream.start for stream in streams if stream is not None]
    for start in starts:
        if start != starts[0]:
            raise ValueError(f"all streams of a pass must start at the same element, got {starts[0]} and {start}")
    return starts[0] if starts else 0


def check_factored(theta: Tensor, factored: Factored, mask: Mask = DENSE, rounding: Stream | None = None) -> int:
    """Refuse factors that do not fit the weights, or each other; return the element that streams start at."""
    left, right, scales, _ = factored
    count = len(scales)
    fits = left.dim() == right.dim() == 2 and left.shape[0] == right.shape[0] == count > 0
    if not fits or left.shape[1] * right.shape[1] != theta.numel():
        raise ValueError(
            f"left and right must have shapes [{count}, n] and [{count}, m] with n m = {theta.numel()} for {count} "
            f"scales, at least one, got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    for name, factor in (("left", left), ("right", right)):
        if factor.dtype != torch.bfloat16 or not factor.is_contiguous() or factor.device != theta.device:
            raise ValueError(
                f"{name} must be bfloat16, contiguous and on {theta.device}, got {factor.dtype} on {factor.device}"
            )
    return _common_start(factored.stream, mask.stream, rounding)


def check_no_stream(factored: Factored) -> None:
    """Refuse a factor of every element, which a perturbation has not."""
    if factored.stream is not None:
        raise ValueError(f"a perturbation by outer products takes no stream, got {factored.stream}")


def check_draws(out: Tensor, starts: Sequence[int]) -> None:
    """Refuse a place for vectors of noise, or elements that they begin at."""
    if out.dtype != torch.bfloat16 or out.dim() != 2 or out.shape[0] != len(starts) or not out.is_contiguous():
        shape = f"shape {tuple(out.shape)} and strides {out.stride()}"
        raise ValueError(f"out must be bfloat16 [{len(starts)}, L] and contiguous, got {out.dtype} of {shape}")
    for start in starts:
        if start < 0 or start % BLOCK:
            raise ValueError(f"starts must be multiples of {BLOCK}, at least 0, got {start}")


def check_mask(theta: Tensor, mask: Mask) -> None:
    """Refuse a mask that lacks what its rule needs."""
    if mask.rule in ("small", "large"):
        if isnan(mask.threshold):
            raise ValueError("threshold of a mask must be a number, got nan")
    elif mask.rule == "random":
        if mask.stream is None:
            raise ValueError("a random mask needs a stream")
    elif mask.rule == "packed":
        if mask.bits is None:
            raise ValueError("a packed mask needs bits")
        check_bits(theta, mask.bits)
    elif mask.rule != "dense":
        raise ValueError(f"mask rule must be 'dense', 'small', 'large', 'random' or 'packed', got {mask.rule!r}")


def check_bits(theta: Tensor, bits: Tensor) -> None:
    """Refuse packed bits whose dtype, length, layout or device does not fit the weights."""
    size = packed_size(theta.numel())
    if bits.dtype != torch.uint8 or bits.shape != (size,) or not bits.is_contiguous() or bits.device != theta.device:
        raise ValueError(
            f"packed bits of {theta.numel()} weights must be uint8 of shape ({size},) on {theta.device}, "
            f"got {bits.dtype} of shape {tuple(bits.shape)} on {bits.device}"
        )


def check_saved(theta: Tensor, saved: Tensor, count: int) -> None:
    """Refuse saved weights that do not belong to packed bits of which ``count`` are set."""
    if saved.dtype != theta.dtype or saved.shape != (count,) or not saved.is_contiguous():
        raise ValueError(
            f"saved weights must be {theta.dtype} of shape ({count},), got {saved.dtype} of shape {tuple(saved.shape)}"
        )


def codes_of(theta: Tensor) -> Tensor:
    """The bits of the weights, as integers."""
    return theta.view(CODE_DTYPES[theta.element_size()])


def packed_size(numel: int) -> int:
    """Bytes of a packed mask."""
    return (numel + 7) // 8


def threshold_code(threshold: float, dtype: torch.dtype) -> int:
    """Bits of the largest number of a dtype that is not above a threshold; -1 for a negative threshold.

    Comparing with it is comparing with the threshold itself, whatever digits the dtype lacks.
    """
    if threshold < 0.0:
        return -1
    near = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    code = int(codes_of(near))
    return code - 1 if float(near) > threshold else code


@functools.lru_cache(maxsize=1 << 14)
def code_range(rule: str, threshold: float, dtype: torch.dtype) -> tuple[int, int]:
    """``low`` and ``span`` of the magnitude codes that a rule selects; all for rules that do not look at the weights.

    Both are 32 bits unsigned. A weight is active if ``code - low <= span`` in arithmetic modulo ``2**32``.
    """
    if rule not in ("small", "large"):
        return 0, 0x7FFFFFFF
    limit = threshold_code(threshold, dtype)
    low, high = (0, limit) if rule == "small" else (limit + 1, INFINITY[dtype])
    # The one code that no magnitude has stands for the empty range.
    return (low, high - low) if low <= high else (0x80000000, 0)


def float_bits(value: float) -> int:
    """Bits of a number rounded to float32, beyond its range infinity."""
    try:
        return int(_UINT32.unpack(_FLOAT32.pack(value))[0])
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000
