# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803
# Triton compiles the functions below its decorator: no Python types, and compile-time arguments in capitals.
"""The fused passes on CUDA (and ROCm) devices, compiled by Triton.

Perturbation, update and packing are fused; saving, restoring and counting are torch operations on the device. In this
version the kernels have run in Triton's interpreter only (``TRITON_INTERPRET=1``, bit-equal to the reference). The
tests compile every variant for compute capabilities 8.0 and 9.0 and inspect it (no fused multiply-add, correctly
rounded roots, no flushing of subnormal numbers, no spilled registers). They have not been run or timed on a GPU.

The operations and their order are those of `smezo_pl.optim.noise` and of the reference. Weights come as their bits,
int32 for float32 and int16 for the 16-bit formats; conversions are integer operations, as in the numba kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from smezo_pl.optim import noise as scheme
from smezo_pl.optim.kernels import base
from smezo_pl.optim.kernels.base import Update
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import BLOCK, MASK, NOISE, ROUNDING, Distribution, Stream

FLOAT32, BFLOAT16, FLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FROM_THRESHOLD, FROM_WORDS, FROM_BITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
GAUSSIAN, RADEMACHER = tl.constexpr(0), tl.constexpr(1)

ROW = 6
"""Arguments of a stream, each an int32: key low, key high, tensor, step, sample and kind, bits of the scale."""

_M0, _M1 = (tl.constexpr(m) for m in scheme.PHILOX_MULTIPLIERS)
_K0, _K1 = (tl.constexpr(k) for k in scheme.PHILOX_KEY_STEPS)
_ROUNDS = tl.constexpr(scheme.PHILOX_ROUNDS)
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (tl.constexpr(c) for c in scheme.LOG)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in scheme.SIN)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in scheme.COS)
_LOG_2, _CENTER, _SQRT_HALF = (tl.constexpr(c) for c in (scheme.LOG_2, scheme.ANGLE_CENTER, scheme.SQRT_HALF_BITS))


@triton.jit
def _u32(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def _f32(value):
    return value.to(tl.float32, bitcast=True)


@triton.jit
def _philox(group, key_low, key_high, tensor, step, sample):
    """The four words of some groups."""
    k0, k1 = _u32(key_low), _u32(key_high)
    c0 = group.to(tl.uint32)
    c1 = _u32(tensor) | ((group >> 32).to(tl.uint32) << 24)
    c2, c3 = _u32(step) + c0 * 0, _u32(sample) + c0 * 0
    m0, m1 = tl.full(c0.shape, _M0, tl.uint32), tl.full(c0.shape, _M1, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        h0, h1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, c2 * m1, h0 ^ c3 ^ k1, c0 * m0
        k0, k1 = k0 + tl.full((), _K0, tl.uint32), k1 + tl.full((), _K1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _block_words(block, key_low, key_high, tensor, step, sample):
    """Words 0-255 and 256-511 of a block."""
    group = block.to(tl.int64) * 128 + tl.arange(0, 128)
    w0, w1, w2, w3 = _philox(group, key_low, key_high, tensor, step, sample)
    return tl.interleave(w0, w1), tl.interleave(w2, w3)


@triton.jit
def _pair(word):
    """The two normals of a word."""
    n = _u32((word & 0xFFFFF).to(tl.int32).to(tl.float32) + 0.5) - _SQRT_HALF
    t = _f32((n & 0x7FFFFF) + _SQRT_HALF) - 1.0
    s = t * t
    p = ((s * _L6 + (t * _L5 + _L4)) * s + (t * _L3 + _L2)) * s + (t * _L1 + _L0)
    exponent = (n.to(tl.int32, bitcast=True) >> 23) - 20
    radius = tl.sqrt_rn(exponent.to(tl.float32) * _LOG_2 + p * t)
    v = _f32(((word >> 7) & 0x7FE000) | 0x3F800000) - _CENTER
    w = v * v
    x = w * w
    sine = ((w * _S3 + _S2) * x + (w * _S1 + _S0)) * v
    cosine = (w * _C3 + _C2) * x + (w * _C1 + _C0)
    z0 = _u32(radius * (cosine - sine)) ^ (word & 0x80000000)
    z1 = _u32(radius * (cosine + sine)) ^ ((word << 1) & 0x80000000)
    return _f32(z0), _f32(z1)


@triton.jit
def _noise_of(word, bit, KIND: tl.constexpr):
    """``z`` of the elements m and m + 512 that a word makes."""
    if KIND == GAUSSIAN:
        z0, z1 = _pair(word)
    else:
        one = tl.full(word.shape, 0x3F800000, tl.uint32)
        z0 = _f32(one | ((word << (31 - bit)) & 0x80000000))
        z1 = _f32(one | ((word << (30 - bit)) & 0x80000000))
    return z0, z1


@triton.jit
def _widen(code, FORMAT: tl.constexpr):
    """Exact float32 value of some bits (uint32)."""
    if FORMAT == FLOAT32:
        value = _f32(code)
    elif FORMAT == BFLOAT16:
        value = _f32(code << 16)
    else:
        shifted = (code & 0x7FFF) << 13
        top = shifted & 0x0F800000
        normal = shifted + (112 << 23)
        small = _u32(_f32(normal + (1 << 23)) - _f32(tl.full(code.shape, 113 << 23, tl.uint32)))
        wide = tl.where(top == 0x0F800000, normal + (112 << 23), tl.where(top == 0, small, normal))
        value = _f32(wide | ((code & 0x8000) << 16))
    return value


@triton.jit
def _narrow(value, word, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Bits (uint32) of a float32 rounded to nearest even, or by 16 random bits; one quiet NaN."""
    code = _u32(value)
    size = code & 0x7FFFFFFF
    sign = (code >> 16) & 0x8000
    if FORMAT == FLOAT32:
        rounded = tl.where(size > 0x7F800000, 0x7FC00000, code)
    elif FORMAT == BFLOAT16:
        if STOCHASTIC:
            up = word
        else:
            up = ((size >> 16) & 1) + 0x7FFF
        rounded = tl.where(size > 0x7F800000, 0x7FC0, ((size + up) >> 16) | sign)
    else:
        if STOCHASTIC:
            normal = (size - (112 << 23) + (word >> 3)) >> 13
            bounded = _f32(tl.where(size < 0x38800000, size, 0x38800000))
            small = (_u32((bounded * 1099511627776.0).to(tl.int32)) + word) >> 16
        else:
            normal = (size - (112 << 23) + 0xFFF + ((size >> 13) & 1)) >> 13
            small = _u32(_f32(size) + 0.5) - 0x3F000000
        rounded = tl.where(size < 0x38800000, small, normal)
        rounded = tl.where(size >= 0x47800000, 0x7C00, rounded) | sign
        rounded = tl.where(size > 0x7F800000, 0x7E00, rounded)
    return rounded.to(tl.uint32)


@triton.jit
def _magnitude(code, FORMAT: tl.constexpr):
    if FORMAT == FLOAT32:
        magnitude = code & 0x7FFFFFFF
    else:
        magnitude = code & 0x7FFF
    return magnitude


@triton.jit
def _load_code(theta, i, inside, FORMAT: tl.constexpr):
    code = tl.load(theta + i, mask=inside, other=0)
    if FORMAT == FLOAT32:
        wide = _u32(code)
    else:
        wide = code.to(tl.uint16, bitcast=True).to(tl.uint32)
    return wide


@triton.jit
def _apply(
    theta, out, i, numel, delta, drawn, word, decay, low, span, level, bits,
    FORMAT: tl.constexpr, SOURCE: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Update the weights at some local indices; ``drawn`` are their mask words, ``word`` those for rounding."""
    inside = (i >= 0) & (i < numel)
    code = _load_code(theta, i, inside, FORMAT)
    value = _widen(code, FORMAT)
    if DECAY:
        delta = delta + value * decay
    new = _narrow(value - delta, word, FORMAT, STOCHASTIC)
    chosen = (_magnitude(code, FORMAT) - low) <= span
    if SOURCE == FROM_WORDS:
        chosen = drawn < level
    elif SOURCE == FROM_BITS:
        byte = tl.load(bits + (i >> 3), mask=inside, other=0).to(tl.uint32)
        chosen = ((byte >> (i & 7).to(tl.uint32)) & 1) != 0
    result = tl.where(chosen, new, code)
    if FORMAT == FLOAT32:
        tl.store(out + i, result.to(tl.int32, bitcast=True), mask=inside)
    else:
        tl.store(out + i, result.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)


@triton.jit(
    do_not_specialize=[
        "first", "samples", "decay", "low", "span", "level",
        "n0", "n1", "n2", "n3", "n4", "n5", "m0", "m1", "m2", "m3", "m4", "r0", "r1", "r2", "r3", "r4",
    ]
)  # fmt: skip
def _sweep(
    theta, out, numel, start, first, decay, low, span, level, bits,
    n0, n1, n2, n3, n4, n5, m0, m1, m2, m3, m4, r0, r1, r2, r3, r4, samples, more,
    FORMAT: tl.constexpr, KIND: tl.constexpr, SOURCE: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """``out = round(theta - (sum of scale * z + decay * theta))`` under the mask; a program for each block.

    ``first`` is the number of the first block; ``n``, ``m`` and ``r`` are the streams of the first sample, of the mask
    and of the rounding. Those of further samples are at ``more``.
    """
    block = first.to(tl.int64) + tl.program_id(0)
    decay, low, span, level = _f32(_u32(decay)), _u32(low), _u32(span), _u32(level)
    none = tl.full((), 0, tl.uint32)
    drawn_a, drawn_b, word_a, word_b = none, none, none, none
    if SOURCE == FROM_WORDS:
        drawn_a, drawn_b = _block_words(block, m0, m1, m2, m3, m4)
    if STOCHASTIC:
        word_a, word_b = _block_words(block, r0, r1, r2, r3, r4)
    bit = (2 * (block & 15)).to(tl.uint32)
    if KIND == GAUSSIAN:
        group = block
    else:
        group = block >> 4
    a, b = _block_words(group, n0, n1, n2, n3, n4)
    scale = _f32(_u32(n5))
    a0, a1 = _noise_of(a, bit, KIND)
    b0, b1 = _noise_of(b, bit, KIND)
    a0, a1, b0, b1 = a0 * scale, a1 * scale, b0 * scale, b1 * scale
    for sample in range(1, samples):
        row = more + (sample - 1) * ROW
        a, b = _block_words(group, tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4))
        scale = _f32(_u32(tl.load(row + 5)))
        c0, c1 = _noise_of(a, bit, KIND)
        d0, d1 = _noise_of(b, bit, KIND)
        a0, a1, b0, b1 = a0 + c0 * scale, a1 + c1 * scale, b0 + d0 * scale, b1 + d1 * scale
    i = block * 1024 - start + tl.arange(0, 256)
    _apply(theta, out, i, numel, a0, drawn_a & 0xFFFF, word_a & 0xFFFF, decay, low, span, level, bits,
           FORMAT, SOURCE, DECAY, STOCHASTIC)  # fmt: skip
    _apply(theta, out, i + 256, numel, b0, drawn_b & 0xFFFF, word_b & 0xFFFF, decay, low, span, level, bits,
           FORMAT, SOURCE, DECAY, STOCHASTIC)  # fmt: skip
    _apply(theta, out, i + 512, numel, a1, drawn_a >> 16, word_a >> 16, decay, low, span, level, bits,
           FORMAT, SOURCE, DECAY, STOCHASTIC)  # fmt: skip
    _apply(theta, out, i + 768, numel, b1, drawn_b >> 16, word_b >> 16, decay, low, span, level, bits,
           FORMAT, SOURCE, DECAY, STOCHASTIC)  # fmt: skip


@triton.jit(do_not_specialize=["low", "span", "level", "m0", "m1", "m2", "m3", "m4"])
def _pack(
    theta, numel, start, low, span, level, bits, m0, m1, m2, m3, m4, FORMAT: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The mask as bits; a program for each 1024 weights, counted locally."""
    i = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 128)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = i < numel
    chosen = (_magnitude(_load_code(theta, i, inside, FORMAT), FORMAT) - _u32(low)) <= _u32(span)
    if SOURCE == FROM_WORDS:
        # One call per weight, three words of four unused: a tile of a shard does not coincide with a block.
        at = start + i
        m = (at & 511).to(tl.uint32)
        w0, w1, w2, w3 = _philox((at >> 10) * 128 + ((m & 255) >> 1).to(tl.int64), m0, m1, m2, m3, m4)
        word = tl.where(m < 256, tl.where((m & 1) == 0, w0, w1), tl.where((m & 1) == 0, w2, w3))
        chosen = tl.where(((at >> 9) & 1) == 0, word & 0xFFFF, word >> 16) < _u32(level)
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
            return _launch(Update(theta, mask, [stream], [-scale]), out, noise)
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
                _launch(update, update.theta, noise)

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


def _launch(update: Update, out: Tensor, noise: Distribution) -> None:
    """Lay out the arguments of the compiled pass and launch it."""
    theta, mask, streams, scales, decay, rounding = update
    base.check_mask(theta, mask)
    base.check_streams(mask, streams, scales, rounding)
    if theta.numel() == 0:
        return
    if theta.element_size() > 2:
        rounding = None
    start, end = streams[0].start, streams[0].start + theta.numel()
    low, span = (_signed(code) for code in base.code_range(mask.rule, mask.threshold, theta.dtype))
    # int32 also where it is empty: the loop over it is compiled even if it never runs.
    more = torch.empty(0, dtype=torch.int32, device=theta.device)
    if len(streams) > 1:
        table = [_row(stream, NOISE, scale) for stream, scale in zip(streams[1:], scales[1:], strict=True)]
        more = torch.tensor(table, dtype=torch.int32, device=theta.device)
    first = start // BLOCK
    with _on(theta):
        _sweep[-(-end // BLOCK) - first,](
            base.codes_of(theta), base.codes_of(out), theta.numel(), start, first, _signed(base.float_bits(decay)),
            low, span, mask.level, theta if mask.bits is None else mask.bits, *_row(streams[0], NOISE, scales[0]),
            *_row(mask.stream or _NO_STREAM, MASK, 0.0)[:5], *_row(rounding or _NO_STREAM, ROUNDING, 0.0)[:5],
            len(streams), more, FORMAT=_FORMAT[theta.dtype], KIND=0 if noise == "gaussian" else 1,
            SOURCE=_SOURCE[mask.rule], DECAY=decay != 0.0, STOCHASTIC=rounding is not None, ROW=ROW,
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
