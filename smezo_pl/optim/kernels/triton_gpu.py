"""The fused passes on CUDA (and ROCm) devices, compiled by Triton.

Perturbation, update and packing are fused; saving, restoring and counting are torch operations on the device. In this
version the kernels have run in Triton's interpreter only (``TRITON_INTERPRET=1``, bit-equal to the reference). The
tests compile every variant for compute capabilities 8.0 and 9.0 and inspect it (no fused multiply-add, correctly
rounded roots, no flushing of subnormal numbers, no spilled registers). They have not been run or timed on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from smezo_pl.optim.kernels import _triton_passes as passes
from smezo_pl.optim.kernels._common import (
    CODE_DTYPES,
    OneByOne,
    check_mask,
    check_pair,
    check_streams,
    check_weights,
    code_range,
    float_bits,
    packed_size,
)
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import BLOCK, MASK, NOISE, ROUNDING, Law, Stream

_FORMAT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOURCE = {"dense": 0, "small": 0, "large": 0, "random": 1, "packed": 2}
_REFERENCE = TorchKernel()
_NO_STREAM = Stream(0, 0, 0, 0)


class TritonKernel(OneByOne):
    """Fused kernels for one device's memory (see `Kernel` for what each pass computes)."""

    name = "triton"

    def perturb(self, theta: Tensor, out: Tensor, mask: Mask, law: Law, stream: Stream, scale: float) -> None:
        """Write ``theta + scale * m * z`` to ``out``; see `Kernel.perturb`."""
        check_pair(theta, out)
        if theta.dtype == torch.float64:
            return _REFERENCE.perturb(theta, out, mask, law, stream, scale)
        if scale != 0.0:
            # Adding is subtracting the negative, to the last bit: one kernel serves both.
            return _sweep(theta, out, mask, law, [stream], [-scale], 0.0, None)
        if out.data_ptr() != theta.data_ptr():
            out.copy_(theta)
        return None

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
        """Subtract ``m * (sum of scale * z + decay * theta)`` from ``theta``; see `Kernel.update`."""
        check_weights(theta)
        if theta.dtype == torch.float64:
            return _REFERENCE.update(theta, mask, law, streams, scales, decay, rounding)
        if decay == 0.0 and not any(scales):
            return None
        return _sweep(theta, theta, mask, law, streams, scales, decay, rounding)

    def select(self, theta: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Packed mask and a copy of the weights under it; see `Kernel.select`."""
        return _REFERENCE.select(theta, Mask("packed", bits=self.pack(theta, mask)))

    def restore(self, theta: Tensor, bits: Tensor, saved: Tensor) -> None:
        """Put back what `select` saved; see `Kernel.restore`."""
        _REFERENCE.restore(theta, bits, saved)

    def pack(self, theta: Tensor, mask: Mask) -> Tensor:
        """The mask, one bit a weight; see `Kernel.pack`."""
        check_weights(theta)
        check_mask(theta, mask)
        if mask.rule == "packed" and mask.bits is not None:
            return mask.bits.clone()
        if theta.dtype == torch.float64 or theta.numel() == 0:
            return _REFERENCE.pack(theta, mask)
        bits = torch.empty(packed_size(theta.numel()), dtype=torch.uint8, device=theta.device)
        stream = mask.stream or _NO_STREAM
        low, span = (_signed(code) for code in code_range(mask.rule, mask.threshold, theta.dtype))
        with _on(theta):
            passes.pack[-(-theta.numel() // BLOCK),](
                _codes(theta), theta.numel(), stream.start, low, span, mask.level, bits, *_row(stream, MASK, 0.0)[:5],
                FORMAT=_FORMAT[theta.dtype], SOURCE=_SOURCE[mask.rule], enable_fp_fusion=False,
            )  # fmt: skip
        return bits

    def histogram(self, theta: Tensor, shift: int, prefix: int | None) -> Tensor:
        """Counts of magnitude codes; see `Kernel.histogram`."""
        return _REFERENCE.histogram(theta, shift, prefix)


def _sweep(
    theta: Tensor,
    out: Tensor,
    mask: Mask,
    law: Law,
    streams: Sequence[Stream],
    scales: Sequence[float],
    decay: float,
    rounding: Stream | None,
) -> None:
    """Lay out the arguments of the compiled pass and launch it."""
    check_mask(theta, mask)
    check_streams(mask, streams, scales, rounding)
    if theta.numel() == 0:
        return
    if theta.element_size() > 2:
        rounding = None
    start, end = streams[0].start, streams[0].start + theta.numel()
    low, span = (_signed(code) for code in code_range(mask.rule, mask.threshold, theta.dtype))
    # int32 also where it is empty: the loop over it is compiled even if it never runs.
    more = torch.empty(0, dtype=torch.int32, device=theta.device)
    if len(streams) > 1:
        table = [_row(stream, NOISE, scale) for stream, scale in zip(streams[1:], scales[1:], strict=True)]
        more = torch.tensor(table, dtype=torch.int32, device=theta.device)
    first = start // BLOCK
    with _on(theta):
        passes.sweep[-(-end // BLOCK) - first,](
            _codes(theta), _codes(out), theta.numel(), start, first, _signed(float_bits(decay)), low, span, mask.level,
            theta if mask.bits is None else mask.bits, *_row(streams[0], NOISE, scales[0]),
            *_row(mask.stream or _NO_STREAM, MASK, 0.0)[:5], *_row(rounding or _NO_STREAM, ROUNDING, 0.0)[:5],
            len(streams), more, FORMAT=_FORMAT[theta.dtype], LAW=0 if law == "gaussian" else 1,
            SOURCE=_SOURCE[mask.rule], DECAY=decay != 0.0, STOCHASTIC=rounding is not None, ROW=passes.ROW,
            enable_fp_fusion=False,
        )  # fmt: skip


def _row(stream: Stream, kind: int, scale: float) -> list[int]:
    words = (stream.seed & 0xFFFFFFFF, stream.seed >> 32, stream.tensor, stream.step, stream.sample | kind << 24)
    return [_signed(word) for word in (*words, float_bits(scale))]


def _signed(code: int) -> int:
    """A 32-bit word as Triton types it: a larger number would become a 64-bit argument, and a kernel of its own."""
    return code - (1 << 32) if code >= 1 << 31 else code


def _codes(theta: Tensor) -> Tensor:
    return theta.view(CODE_DTYPES[theta.element_size()])


def _on(theta: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(theta.device) if theta.is_cuda else contextlib.nullcontext()
