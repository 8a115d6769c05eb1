# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803
# Triton compiles the functions below its decorator: no Python types, and compile-time arguments in capitals.
"""The fused passes on CUDA (and ROCm) devices, compiled by Triton.

Perturbation, update and packing are fused; saving, restoring and counting are torch operations on the device. In this
version the kernels have run in Triton's interpreter only (``TRITON_INTERPRET=1``, bit-equal to the reference). The
tests compile every variant for compute capabilities 8.0 and 9.0 and inspect it (no fused multiply-add, correctly
rounded roots, no flushing of subnormal numbers, no spilled registers). They have not been run or timed on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smezo_pl.optim.kernels import base
from smezo_pl.optim.kernels._triton_words import (
    BFLOAT16,
    block_noise,
    block_words,
    f32,
    load_code,
    magnitude,
    narrow,
    philox,
    store_code,
    u32,
    widen,
)
from smezo_pl.optim.kernels.base import Draw, Factored, FactoredUpdate, Update
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import DENSE, Mask
from smezo_pl.optim.noise import BLOCK, MASK, NOISE, ROUNDING, Distribution, Stream

FROM_THRESHOLD, FROM_WORDS, FROM_BITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NEAREST, STOCHASTIC, DRAWN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NONE, TIMES_NOISE, ALONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What an update does, as `_sweep` says; where outer products are in it."""

ROW = 6
"""Arguments of a stream, each an int32: key low, key high, tensor, step, sample and kind, bits of the scale."""


@triton.jit
def _apply(
    theta, out, i, numel, delta, drawn, word, decay, low, span, level, bits,
    FORMAT: tl.constexpr, SOURCE: tl.constexpr, DECAY: tl.constexpr, RESULT: tl.constexpr,
):  # fmt: skip
    """Update the weights at some local indices; ``drawn`` are their mask words, ``word`` those for rounding."""
    inside = (i >= 0) & (i < numel)
    code = load_code(theta, i, inside, FORMAT)
    value = widen(code, FORMAT)
    if DECAY:
        delta = delta + value * decay
    if RESULT != DRAWN:
        delta = value - delta
    new = narrow(delta, word, FORMAT, RESULT == STOCHASTIC)
    chosen = (magnitude(code, FORMAT) - low) <= span
    if SOURCE == FROM_WORDS:
        chosen = drawn < level
    elif SOURCE == FROM_BITS:
        byte = tl.load(bits + (i >> 3), mask=inside, other=0).to(tl.uint32)
        chosen = ((byte >> (i & 7).to(tl.uint32)) & 1) != 0
    if RESULT == DRAWN:
        code = code * 0
    store_code(out, i, inside, tl.where(chosen, new, code), FORMAT)


@triton.jit
def _outer(left, right, scales, terms, numel, width, base, lane):
    """The sum of outer products at the local indices ``base + lane``."""
    inside = (base + lane >= 0) & (base + lane < numel)
    # One division of 64 bits, which is slow, for all lanes.
    top = base // width
    near = (base - top * width).to(tl.int32) + lane
    row, column = top + near // width, near % width
    height = numel // width
    delta = tl.full(lane.shape, -0.0, tl.float32)  # added to it, every number keeps its bits
    for term in range(terms):
        a = widen(load_code(left, row, inside, BFLOAT16), BFLOAT16)
        b = widen(load_code(right, column, inside, BFLOAT16), BFLOAT16)
        delta = delta + (a * tl.load(scales + term)) * b
        left, right = left + height, right + width
    return delta


@triton.jit(
    do_not_specialize=[
        "first", "samples", "decay", "low", "span", "level", "terms", "width",
        "n0", "n1", "n2", "n3", "n4", "n5", "m0", "m1", "m2", "m3", "m4", "r0", "r1", "r2", "r3", "r4",
    ]
)  # fmt: skip
def _sweep(
    theta, out, numel, start, first, decay, low, span, level, bits,
    n0, n1, n2, n3, n4, n5, m0, m1, m2, m3, m4, r0, r1, r2, r3, r4, samples, more, left, right, scales, terms, width,
    FORMAT: tl.constexpr, KIND: tl.constexpr, SOURCE: tl.constexpr, DECAY: tl.constexpr, RESULT: tl.constexpr,
    OUTER: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """``out = round(theta - (sum of scale * z + decay * theta))`` under the mask; a program for each block.

    ``first`` is the number of the first block; ``n``, ``m`` and ``r`` are the streams of the first sample, of the mask
    and of the rounding. Those of further samples are at ``more``. With `OUTER` the sum is one of outer products, times
    ``z`` if there is a sample. `DRAWN` leaves ``theta`` out.
    """
    block = first.to(tl.int64) + tl.program_id(0)
    decay, low, span, level = f32(u32(decay)), u32(low), u32(span), u32(level)
    none = tl.full((), 0, tl.uint32)
    drawn_a, drawn_b, word_a, word_b = none, none, none, none
    if SOURCE == FROM_WORDS:
        drawn_a, drawn_b = block_words(block, m0, m1, m2, m3, m4)
    if RESULT == STOCHASTIC:
        word_a, word_b = block_words(block, r0, r1, r2, r3, r4)
    base = block * 1024 - start
    lane = tl.arange(0, 256)
    if OUTER != ALONE:
        scale = f32(u32(n5))
        a0, a1, b0, b1 = block_noise(block, n0, n1, n2, n3, n4, KIND)
        a0, a1, b0, b1 = a0 * scale, a1 * scale, b0 * scale, b1 * scale
        for sample in range(1, samples):
            row = more + (sample - 1) * ROW
            scale = f32(u32(tl.load(row + 5)))
            c0, c1, d0, d1 = block_noise(
                block, tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), KIND
            )
            a0, a1, b0, b1 = a0 + c0 * scale, a1 + c1 * scale, b0 + d0 * scale, b1 + d1 * scale
    if OUTER != NONE:
        e0 = _outer(left, right, scales, terms, numel, width, base, lane)
        f0 = _outer(left, right, scales, terms, numel, width, base, lane + 256)
        e1 = _outer(left, right, scales, terms, numel, width, base, lane + 512)
        f1 = _outer(left, right, scales, terms, numel, width, base, lane + 768)
        if OUTER == ALONE:
            a0, a1, b0, b1 = e0, e1, f0, f1
        else:
            a0, a1, b0, b1 = e0 * a0, e1 * a1, f0 * b0, f1 * b1
    i = base + lane
    _apply(theta, out, i, numel, a0, drawn_a & 0xFFFF, word_a & 0xFFFF, decay, low, span, level, bits,
           FORMAT, SOURCE, DECAY, RESULT)  # fmt: skip
    _apply(theta, out, i + 256, numel, b0, drawn_b & 0xFFFF, word_b & 0xFFFF, decay, low, span, level, bits,
           FORMAT, SOURCE, DECAY, RESULT)  # fmt: skip
    _apply(theta, out, i + 512, numel, a1, drawn_a >> 16, word_a >> 16, decay, low, span, level, bits,
           FORMAT, SOURCE, DECAY, RESULT)  # fmt: skip
    _apply(theta, out, i + 768, numel, b1, drawn_b >> 16, word_b >> 16, decay, low, span, level, bits,
           FORMAT, SOURCE, DECAY, RESULT)  # fmt: skip


@triton.jit(do_not_specialize=["first", "n0", "n1", "n2", "n3", "n4"])
def _draw_rows(out, starts, length, first, n0, n1, n2, n3, n4, KIND: tl.constexpr):
    """Vectors of noise in bfloat16; a program for each block of each, ``first`` the block that stream begins with."""
    number = tl.program_id(1).to(tl.int64)
    block = tl.load(starts + number) // 1024 + first + tl.program_id(0)
    a0, a1, b0, b1 = block_noise(block, n0, n1, n2, n3, n4, KIND)
    i, none = tl.program_id(0) * 1024 + tl.arange(0, 256), tl.full((), 0, tl.uint32)
    row = out + number * length
    store_code(row, i, i < length, narrow(a0, none, BFLOAT16, False), BFLOAT16)
    store_code(row, i + 256, i + 256 < length, narrow(b0, none, BFLOAT16, False), BFLOAT16)
    store_code(row, i + 512, i + 512 < length, narrow(a1, none, BFLOAT16, False), BFLOAT16)
    store_code(row, i + 768, i + 768 < length, narrow(b1, none, BFLOAT16, False), BFLOAT16)


@triton.jit(do_not_specialize=["low", "span", "level", "m0", "m1", "m2", "m3", "m4"])
def _pack(
    theta, numel, start, low, span, level, bits, m0, m1, m2, m3, m4, FORMAT: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The mask as bits; a program for each 1024 weights, counted locally."""
    i = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 128)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = i < numel
    chosen = (magnitude(load_code(theta, i, inside, FORMAT), FORMAT) - u32(low)) <= u32(span)
    if SOURCE == FROM_WORDS:
        # One call per weight, three words of four unused: a tile of a shard does not coincide with a block.
        at = start + i
        m = (at & 511).to(tl.uint32)
        w0, w1, w2, w3 = philox((at >> 10) * 128 + ((m & 255) >> 1).to(tl.int64), m0, m1, m2, m3, m4)
        word = tl.where(m < 256, tl.where((m & 1) == 0, w0, w1), tl.where((m & 1) == 0, w2, w3))
        chosen = tl.where(((at >> 9) & 1) == 0, word & 0xFFFF, word >> 16) < u32(level)
    value = (inside & chosen).to(tl.int32) << tl.arange(0, 8)[None, :]
    byte = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    tl.store(bits + byte, tl.sum(value, 1).to(tl.uint8), mask=byte < (numel + 7) // 8)


_FORMAT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOURCE = {"dense": 0, "small": 0, "large": 0, "random": 1, "packed": 2}
_NO_STREAM = Stream(0, 0, 0, 0)


class TritonKernel(TorchKernel):
    """Fused kernels for one device's memory (see `Kernel` for what each pass computes); torch does the rest."""

    name = "triton"

    def perturb(
        self, theta: Tensor, out: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float
    ) -> None:
        """Write ``theta + scale * m * z`` to ``out``; see `Kernel.perturb`."""
        base.check_pair(theta, out)
        if theta.dtype == torch.float64:
            return super().perturb(theta, out, mask, noise, stream, scale)
        if scale != 0.0:
            # Adding is subtracting the negative, to the last bit: one kernel serves both.
            return _launch(out, noise, theta, mask, [stream], [-scale])
        if out.data_ptr() != theta.data_ptr():
            out.copy_(theta)
        return None

    def update_all(self, updates: Sequence[Update], noise: Distribution) -> None:
        """Update one tensor after the other; see `Kernel.update_all`."""
        for update in updates:
            base.check_weights(update.theta)
            if update.theta.dtype == torch.float64:
                super().update_all([update], noise)
            elif update.decay != 0.0 or any(update.scales):
                _launch(update.theta, noise, *update)

    def draw_rows(self, draws: Sequence[Draw], noise: Distribution) -> None:
        """Vectors of noise; see `Kernel.draw_rows`."""
        for draw in draws:
            out, starts, stream = draw
            base.check_draws(out, starts)
            if stream.start % BLOCK:
                super().draw_rows([draw], noise)
            elif out.numel():
                at = torch.tensor(starts, dtype=torch.int64, device=out.device)
                with _on(out):
                    _draw_rows[-(-out.shape[1] // BLOCK), len(starts)](
                        base.codes_of(out), at, out.shape[1], stream.start // BLOCK, *_row(stream, NOISE, 1.0)[:5],
                        KIND=0 if noise == "gaussian" else 1, enable_fp_fusion=False,
                    )  # fmt: skip

    def draw(self, theta: Tensor, out: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float) -> None:
        """The noise under the mask alone; see `Kernel.draw`."""
        base.check_pair(theta, out)
        if theta.dtype == torch.float64:
            return super().draw(theta, out, mask, noise, stream, scale)
        return _launch(out, noise, theta, mask, [stream], [scale], drawn=True)

    def perturb_factored(self, theta: Tensor, out: Tensor, factored: Factored) -> None:
        """``theta`` minus a sum of outer products; see `Kernel.perturb_factored`."""
        base.check_pair(theta, out)
        if theta.dtype == torch.float64:
            return super().perturb_factored(theta, out, factored)
        base.check_no_stream(factored)
        return _launch_factored(out, "gaussian", theta, DENSE, factored)

    def update_factored(self, update: FactoredUpdate, noise: Distribution) -> None:
        """Update by a sum of outer products; see `Kernel.update_factored`."""
        base.check_weights(update.theta)
        if update.theta.dtype == torch.float64:
            super().update_factored(update, noise)
        elif update.decay != 0.0 or any(update.factored.scales):
            _launch_factored(update.theta, noise, *update)

    def pack(self, theta: Tensor, mask: Mask) -> Tensor:
        """The mask, one bit per weight; see `Kernel.pack`."""
        base.check_weights(theta)
        base.check_mask(theta, mask)
        if mask.rule == "packed" and mask.bits is not None:
            return mask.bits.clone()
        if theta.dtype == torch.float64 or theta.numel() == 0:
            return super().pack(theta, mask)
        bits = torch.empty(base.packed_size(theta.numel()), dtype=torch.uint8, device=theta.device)
        stream = mask.stream or _NO_STREAM
        low, span = (_signed(code) for code in base.code_range(mask.rule, mask.threshold, theta.dtype))
        with _on(theta):
            _pack[-(-theta.numel() // BLOCK),](
                base.codes_of(theta), theta.numel(), stream.start, low, span, mask.level, bits,
                *_row(stream, MASK, 0.0)[:5],
                FORMAT=_FORMAT[theta.dtype], SOURCE=_SOURCE[mask.rule], enable_fp_fusion=False,
            )  # fmt: skip
        return bits


def _launch(
    out: Tensor,
    noise: Distribution,
    theta: Tensor,
    mask: Mask,
    streams: Sequence[Stream],
    scales: Sequence[float],
    decay: float = 0.0,
    rounding: Stream | None = None,
    drawn: bool = False,
) -> None:
    base.check_mask(theta, mask)
    start = base.check_streams(mask, streams, scales, rounding)
    # int32 also where it is empty: the loop over it is compiled even if it never runs.
    more = torch.empty(0, dtype=torch.int32, device=theta.device)
    if len(streams) > 1:
        table = [_row(stream, NOISE, scale) for stream, scale in zip(streams[1:], scales[1:], strict=True)]
        more = torch.tensor(table, dtype=torch.int32, device=theta.device)
    first = _row(streams[0], NOISE, scales[0])
    outer = (more, more, more, 0, 0)
    _launch_sweep(out, noise, theta, mask, start, decay, rounding, (*first, len(streams), more), outer, 0, drawn)


def _launch_factored(
    out: Tensor,
    noise: Distribution,
    theta: Tensor,
    mask: Mask,
    factored: Factored,
    decay: float = 0.0,
    rounding: Stream | None = None,
) -> None:
    base.check_mask(theta, mask)
    start = base.check_factored(theta, factored, mask, rounding)
    left, right, scales, stream = factored
    factors = torch.tensor(scales, dtype=torch.float32, device=theta.device)
    outer = (base.codes_of(left), base.codes_of(right), factors, len(scales), right.shape[1])
    drawn = (*_row(stream or _NO_STREAM, NOISE, 1.0), 1, torch.empty(0, dtype=torch.int32, device=theta.device))
    where = (ALONE if stream is None else TIMES_NOISE).value
    _launch_sweep(out, noise, theta, mask, start, decay, rounding, drawn, outer, where, False)


def _launch_sweep(
    out: Tensor,
    noise: Distribution,
    theta: Tensor,
    mask: Mask,
    start: int,
    decay: float,
    rounding: Stream | None,
    drawn: tuple[Any, ...],
    outer: tuple[Any, ...],
    where: int,
    alone: bool,
) -> None:
    """Lay out the arguments of the compiled pass and launch it."""
    if theta.numel() == 0:
        return
    if theta.element_size() > 2:
        rounding = None
    first, last = start // BLOCK, -(-(start + theta.numel()) // BLOCK)
    low, span = (_signed(code) for code in base.code_range(mask.rule, mask.threshold, theta.dtype))
    result = DRAWN if alone else NEAREST if rounding is None else STOCHASTIC
    *noise_row, samples, more = drawn
    with _on(theta):
        _sweep[last - first,](
            base.codes_of(theta), base.codes_of(out), theta.numel(), start, first, _signed(base.float_bits(decay)),
            low, span, mask.level, theta if mask.bits is None else mask.bits, *noise_row,
            *_row(mask.stream or _NO_STREAM, MASK, 0.0)[:5], *_row(rounding or _NO_STREAM, ROUNDING, 0.0)[:5],
            samples, more, *outer, FORMAT=_FORMAT[theta.dtype], KIND=0 if noise == "gaussian" else 1,
            SOURCE=_SOURCE[mask.rule], DECAY=decay != 0.0, RESULT=result.value, OUTER=where, ROW=ROW,
            enable_fp_fusion=False,
        )  # fmt: skip


def _row(stream: Stream, kind: int, scale: float) -> list[int]:
    words = (stream.seed & 0xFFFFFFFF, stream.seed >> 32, stream.tensor, stream.step, stream.sample | kind << 24)
    return [_signed(word) for word in (*words, base.float_bits(scale))]


def _signed(code: int) -> int:
    """A 32-bit word as Triton types it: a larger number would become a 64-bit argument, and a kernel of its own."""
    return code - (1 << 32) if code >= 1 << 31 else code


def _on(theta: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(theta.device) if theta.is_cuda else contextlib.nullcontext()
