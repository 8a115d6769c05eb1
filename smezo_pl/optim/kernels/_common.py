"""What all kernels agree on: arguments that are refused, thresholds in a dtype, sizes."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import replace
from math import isnan
from typing import NamedTuple

import torch
from torch import Tensor

from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Law, Stream


class Update(NamedTuple):
    """One tensor's part of `Kernel.update_all`, with the arguments of `Kernel.update`."""

    theta: Tensor
    mask: Mask
    streams: Sequence[Stream]
    scales: Sequence[float]
    decay: float = 0.0
    rounding: Stream | None = None


CODE_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype that holds the bits of a float of so many bytes."""

QUIET_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000, torch.float64: 0x7FF8 << 48}
"""The one NaN that arithmetic leaves in a weight: processors and libraries differ in the payload they would keep."""

_FLOAT32, _UINT32 = struct.Struct("<f"), struct.Struct("<I")

INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
"""Bits of positive infinity; a larger magnitude code is a NaN."""


def check_weights(theta: Tensor, name: str = "theta") -> None:
    """Refuse what no kernel can walk over.

    Args:
        theta: The weights of one tensor.
        name: Its name in the message.

    Raises:
        TypeError: If the dtype or the layout is not supported.
        ValueError: If the tensor is not flat and contiguous, or has no storage.
    """
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
    """Refuse an output that does not fit the weights.

    Args:
        theta: The weights.
        out: Where the perturbed ones go.

    Raises:
        TypeError: If the dtypes differ.
        ValueError: If length or device differ, or if the two overlap without being the same elements.
    """
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
    """Refuse rows that do not fit the matrix or the output.

    Args:
        theta: The matrix.
        out: Where the perturbed rows go.
        rows: Their numbers.

    Raises:
        TypeError: If the numbers are not int64.
        ValueError: If a shape is not right, or a number is out of range.
    """
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


class OneByOne:
    """The passes over several tensors or rows, for a kernel that has them for one tensor alone."""

    def perturb_rows(
        self, theta: Tensor, out: Tensor, rows: Tensor, mask: Mask, law: Law, stream: Stream, scale: float
    ) -> None:
        """`perturb` some rows of a matrix, one after the other; see `Kernel.perturb_rows`."""
        check_rows(theta, out, rows)
        width = theta.shape[1]
        for place, row in enumerate(rows.tolist()):
            first = row * width
            part = replace(stream, start=stream.start + first)
            self.perturb(theta[row], out[place], mask.part(first, width), law, part, scale)

    def update_all(self, updates: Sequence[Update], law: Law) -> None:
        """`update` one tensor after the other; see `Kernel.update_all`."""
        for theta, mask, streams, scales, decay, rounding in updates:
            self.update(theta, mask, law, streams, scales, decay, rounding)

    def perturb(self, theta: Tensor, out: Tensor, mask: Mask, law: Law, stream: Stream, scale: float) -> None:
        """The pass over one tensor."""
        raise NotImplementedError

    def update(
        self,
        theta: Tensor,
        mask: Mask,
        law: Law,
        streams: Sequence[Stream],
        scales: Sequence[float],
        decay: float = 0.0,
        rounding: Stream | None = None,
    ) -> None:
        """The pass over one tensor."""
        raise NotImplementedError


def check_streams(mask: Mask, streams: Sequence[Stream], scales: Sequence[float], rounding: Stream | None) -> None:
    """Refuse noise that does not fit together.

    Args:
        mask: Mask of the pass.
        streams: One stream a sample.
        scales: One scale a sample.
        rounding: Stream of the stochastic rounding.

    Raises:
        ValueError: If there is no sample, if streams and scales differ in number, or if the streams begin at different
            elements.
    """
    if not streams or len(streams) != len(scales):
        raise ValueError(f"update needs one scale a stream and at least one, got {len(streams)} and {len(scales)}")
    start = streams[0].start
    for stream in (*streams, mask.stream, rounding):
        if stream is not None and stream.start != start:
            raise ValueError(f"all streams of a pass must start at the same element, got {start} and {stream.start}")


def check_mask(theta: Tensor, mask: Mask) -> None:
    """Refuse a mask that lacks what its rule needs.

    Args:
        theta: The weights.
        mask: Their mask.

    Raises:
        ValueError: If the threshold is NaN, the random rule has no stream, or the bits do not fit.
    """
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
    """Refuse packed bits that do not fit the weights.

    Args:
        theta: The weights.
        bits: Their packed mask.

    Raises:
        ValueError: If dtype, length, layout or device are not right.
    """
    size = packed_size(theta.numel())
    if bits.dtype != torch.uint8 or bits.shape != (size,) or not bits.is_contiguous() or bits.device != theta.device:
        raise ValueError(
            f"packed bits of {theta.numel()} weights must be uint8 of shape ({size},) on {theta.device}, "
            f"got {bits.dtype} of shape {tuple(bits.shape)} on {bits.device}"
        )


def check_saved(theta: Tensor, saved: Tensor, count: int) -> None:
    """Refuse saved weights that do not belong to the packed bits.

    Args:
        theta: The weights.
        saved: What `select` saved of them.
        count: How many bits are set.

    Raises:
        ValueError: If dtype, length or layout are not right.
    """
    if saved.dtype != theta.dtype or saved.shape != (count,) or not saved.is_contiguous():
        raise ValueError(
            f"saved weights must be {theta.dtype} of shape ({count},), got {saved.dtype} of shape {tuple(saved.shape)}"
        )


def packed_size(numel: int) -> int:
    """Bytes of a packed mask."""
    return (numel + 7) // 8


def threshold_code(threshold: float, dtype: torch.dtype) -> int:
    """Bits of the largest number of a dtype that is not above a threshold.

    Comparing with it is comparing with the threshold itself, whatever digits the dtype lacks.

    Args:
        threshold: Any number, infinity included.
        dtype: Of the weights.

    Returns:
        The bits without a sign, or -1 for a negative threshold, which no magnitude is at or below.
    """
    if threshold < 0.0:
        return -1
    near = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    code = int(near.view(CODE_DTYPES[near.element_size()]).item())
    return code - 1 if float(near) > threshold else code


@functools.lru_cache(maxsize=1 << 14)
def code_range(rule: str, threshold: float, dtype: torch.dtype) -> tuple[int, int]:
    """Magnitude codes that a rule selects.

    Args:
        rule: Of a mask; the rules that do not look at the weights select all codes.
        threshold: Of the mask.
        dtype: Of the weights.

    Returns:
        The lowest code and how far the range reaches beyond it, both in 32 bits unsigned: a weight is selected if
        ``code - low <= span`` in arithmetic modulo ``2**32``.
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
