# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803
# Triton compiles these functions: no Python types, and compile-time arguments in capitals.
"""Building blocks of the Triton kernels: the words and the noise of a block, formats of weights.

The operations and their order are those of `smezo_pl.optim.noise` and of the reference. Weights come as their bits,
int32 for float32 and int16 for the 16-bit formats; conversions are integer operations, as in the numba kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smezo_pl.optim import noise as scheme

FLOAT32, BFLOAT16, FLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
GAUSSIAN, RADEMACHER = tl.constexpr(0), tl.constexpr(1)

_M0, _M1 = (tl.constexpr(m) for m in scheme.PHILOX_MULTIPLIERS)
_K0, _K1 = (tl.constexpr(k) for k in scheme.PHILOX_KEY_STEPS)
_ROUNDS = tl.constexpr(scheme.PHILOX_ROUNDS)
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (tl.constexpr(c) for c in scheme.LOG)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in scheme.SIN)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in scheme.COS)
_LOG_2, _CENTER, _SQRT_HALF = (tl.constexpr(c) for c in (scheme.LOG_2, scheme.ANGLE_CENTER, scheme.SQRT_HALF_BITS))


@triton.jit
def u32(value):
    """The bits of a number as an unsigned integer of 32 bits."""
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def f32(value):
    """The float32 of some bits."""
    return value.to(tl.float32, bitcast=True)


@triton.jit
def philox(group, key_low, key_high, tensor, step, sample):
    """The four words of some groups."""
    k0, k1 = u32(key_low), u32(key_high)
    c0 = group.to(tl.uint32)
    c1 = u32(tensor) | ((group >> 32).to(tl.uint32) << 24)
    c2, c3 = u32(step) + c0 * 0, u32(sample) + c0 * 0
    m0, m1 = tl.full(c0.shape, _M0, tl.uint32), tl.full(c0.shape, _M1, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        h0, h1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, c2 * m1, h0 ^ c3 ^ k1, c0 * m0
        k0, k1 = k0 + tl.full((), _K0, tl.uint32), k1 + tl.full((), _K1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def block_words(block, key_low, key_high, tensor, step, sample):
    """Words 0-255 and 256-511 of a block."""
    group = block.to(tl.int64) * 128 + tl.arange(0, 128)
    w0, w1, w2, w3 = philox(group, key_low, key_high, tensor, step, sample)
    return tl.interleave(w0, w1), tl.interleave(w2, w3)


@triton.jit
def _pair(word):
    """The two normals of a word."""
    n = u32((word & 0xFFFFF).to(tl.int32).to(tl.float32) + 0.5) - _SQRT_HALF
    t = f32((n & 0x7FFFFF) + _SQRT_HALF) - 1.0
    s = t * t
    p = ((s * _L6 + (t * _L5 + _L4)) * s + (t * _L3 + _L2)) * s + (t * _L1 + _L0)
    exponent = (n.to(tl.int32, bitcast=True) >> 23) - 20
    radius = tl.sqrt_rn(exponent.to(tl.float32) * _LOG_2 + p * t)
    v = f32(((word >> 7) & 0x7FE000) | 0x3F800000) - _CENTER
    w = v * v
    x = w * w
    sine = ((w * _S3 + _S2) * x + (w * _S1 + _S0)) * v
    cosine = (w * _C3 + _C2) * x + (w * _C1 + _C0)
    z0 = u32(radius * (cosine - sine)) ^ (word & 0x80000000)
    z1 = u32(radius * (cosine + sine)) ^ ((word << 1) & 0x80000000)
    return f32(z0), f32(z1)


@triton.jit
def noise_of(word, bit, KIND: tl.constexpr):
    """``z`` of the elements m and m + 512 that a word makes."""
    if KIND == GAUSSIAN:
        z0, z1 = _pair(word)
    else:
        one = tl.full(word.shape, 0x3F800000, tl.uint32)
        z0 = f32(one | ((word << (31 - bit)) & 0x80000000))
        z1 = f32(one | ((word << (30 - bit)) & 0x80000000))
    return z0, z1


@triton.jit
def block_noise(block, key_low, key_high, tensor, step, sample, KIND: tl.constexpr):
    """``z`` of the elements of a block of 1024: from 0, 512, 256 and 768 on, 256 each."""
    bit = (2 * (block & 15)).to(tl.uint32)
    if KIND == GAUSSIAN:
        group = block
    else:
        group = block >> 4
    a, b = block_words(group, key_low, key_high, tensor, step, sample)
    a0, a1 = noise_of(a, bit, KIND)
    b0, b1 = noise_of(b, bit, KIND)
    return a0, a1, b0, b1


@triton.jit
def widen(code, FORMAT: tl.constexpr):
    """Exact float32 value of some bits (uint32)."""
    if FORMAT == FLOAT32:
        value = f32(code)
    elif FORMAT == BFLOAT16:
        value = f32(code << 16)
    else:
        shifted = (code & 0x7FFF) << 13
        top = shifted & 0x0F800000
        normal = shifted + (112 << 23)
        small = u32(f32(normal + (1 << 23)) - f32(tl.full(code.shape, 113 << 23, tl.uint32)))
        wide = tl.where(top == 0x0F800000, normal + (112 << 23), tl.where(top == 0, small, normal))
        value = f32(wide | ((code & 0x8000) << 16))
    return value


@triton.jit
def narrow(value, word, FORMAT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Bits (uint32) of a float32 rounded to nearest even, or by 16 random bits; one quiet NaN."""
    code = u32(value)
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
            bounded = f32(tl.where(size < 0x38800000, size, 0x38800000))
            small = (u32((bounded * 1099511627776.0).to(tl.int32)) + word) >> 16
        else:
            normal = (size - (112 << 23) + 0xFFF + ((size >> 13) & 1)) >> 13
            small = u32(f32(size) + 0.5) - 0x3F000000
        rounded = tl.where(size < 0x38800000, small, normal)
        rounded = tl.where(size >= 0x47800000, 0x7C00, rounded) | sign
        rounded = tl.where(size > 0x7F800000, 0x7E00, rounded)
    return rounded.to(tl.uint32)


@triton.jit
def magnitude(code, FORMAT: tl.constexpr):
    """The bits of a weight without its sign."""
    if FORMAT == FLOAT32:
        size = code & 0x7FFFFFFF
    else:
        size = code & 0x7FFF
    return size


@triton.jit
def load_code(theta, i, inside, FORMAT: tl.constexpr):
    """The bits of weights, widened to 32."""
    code = tl.load(theta + i, mask=inside, other=0)
    if FORMAT == FLOAT32:
        wide = u32(code)
    else:
        wide = code.to(tl.uint16, bitcast=True).to(tl.uint32)
    return wide


@triton.jit
def store_code(out, i, inside, code, FORMAT: tl.constexpr):
    """Write what `load_code` reads."""
    if FORMAT == FLOAT32:
        tl.store(out + i, code.to(tl.int32, bitcast=True), mask=inside)
    else:
        tl.store(out + i, code.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
