# mypy: ignore-errors
# numba compiles this file: its functions have no Python types, and its intrinsics take one argument less than declared.
"""Compiled building blocks of the numba kernel: instructions that numba lacks, the noise of a block, formats.

What keeps the loops vectorized: numba widens 32-bit arithmetic to 64 bits, so every result is cast back; arrays are
walked through slices that begin at 0, because an index that might be negative gets a wrap-around test; nothing branches
on data. No fastmath: LLVM then keeps every rounding, and contracts nothing to FMA.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, float32, int32, njit, types, uint16, uint32, uint64
from numba.extending import intrinsic, overload

from smezo_pl.optim import noise

THETA, OUT, NUMEL, START, DISTRIBUTION, SAMPLES, DECAY, RESULT, SOURCE, LOW, SPAN, LEVEL, BITS = range(13)
LEFT, RIGHT, TERMS, WIDTH, ROWS = range(13, 18)
"""Indices into the task of `sweep` and `pack`, an int64 array: addresses, 32-bit codes (also of floats), then rows.

After the rows come the bits of the scales of outer products, of which there are `TERMS`."""

NEAREST, STOCHASTIC, DRAWN = 0, 1, 2
"""What `sweep` writes: the updated weights, rounded in one of two ways, or the noise itself."""

ROW = 6
"""Entries of a row: key low, key high, tensor, step, sample and kind, bits of the scale. One row for each sample, then
one for the mask and one for the rounding."""

PARTS = 2
"""Pieces that a block's words, and its normals, are made in: between them the next block's memory is asked for. All at
once, the requests would wait for each other and hold the processor up."""

GROUP_PART, WORD_PART = 128 // PARTS, 512 // PARTS
"""Groups, and words, of a piece."""

_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (np.float32(c) for c in noise.LOG)
_S0, _S1, _S2, _S3 = (np.float32(c) for c in noise.SIN)
_C0, _C1, _C2, _C3 = (np.float32(c) for c in noise.COS)
_LOG_2, _ANGLE_CENTER = np.float32(noise.LOG_2), np.float32(noise.ANGLE_CENTER)
_SQRT_HALF = np.uint32(noise.SQRT_HALF_BITS)
_M0, _M1 = (np.uint64(m) for m in noise.PHILOX_MULTIPLIERS)
_K0, _K1 = (np.uint64(k) for k in noise.PHILOX_KEY_STEPS)
_ROUNDS = noise.PHILOX_ROUNDS
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_SIGN = np.uint32(1 << 31)


@intrinsic
def bits_of(typing_context, value):
    """Bits of a float32."""
    return types.uint32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def float_of(typing_context, code):
    """The float32 of some bits."""
    return types.float32(types.uint32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def root(typing_context, value):
    """Square root, correctly rounded."""

    def generate(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [ir.FloatType()]), args)

    return types.float32(types.float32), generate


@intrinsic
def trailing_zeros(typing_context, word):
    """Number of zeros below the lowest bit that is set."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic
def count_ones(typing_context, word):
    """Number of bits that are set."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def wide_vectors(typing_context):
    """Let LLVM use 512-bit vectors here: on Intel processors it keeps to 256 bits, at half the speed."""

    def generate(context, builder, signature, args):
        # llvmlite's own `add` knows no attributes with values.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


def _prefetcher(write):
    def _prefetch(typing_context, address):
        def generate(context, builder, signature, args):
            word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
            name = "llvm.prefetch.p0"
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(function, [builder.inttoptr(args[0], pointer), word(write), word(3), word(1)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return intrinsic(_prefetch)


_prefetch_to_read, _prefetch_to_write = _prefetcher(0), _prefetcher(1)


@njit(nogil=True)
def fetch_ahead(source, target, size):
    """Ask for memory that the next block reads and writes: it arrives while the noise of this one is made."""
    for offset in range(0, size, 64):
        _prefetch_to_write(target + offset)
    if source != target:
        for offset in range(0, size, 64):
            _prefetch_to_read(source + offset)


def array_at(address, size, like):
    """The memory at an address as an array of the type of ``like``.

    Slices of a numpy array count references with atomic operations, which took a fifth of a block's time.
    """


@overload(array_at)
def _array_for(address, size, like):
    dtype = np.dtype(str(like))
    return lambda address, size, like: carray(_pointer(address), size, dtype)


@njit(nogil=True, inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """The four words of a counter, two to a uint64; every argument is a 32-bit number in a uint64."""
    for _ in range(_ROUNDS):
        p0, p1 = (c0 & _LOW) * _M0, (c2 & _LOW) * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1, (p0 >> _32) ^ c3 ^ k1, p0
        k0, k1 = (k0 + _K0) & _LOW, (k1 + _K1) & _LOW
    return (c0 & _LOW) | (c1 << _32), (c2 & _LOW) | (c3 << _32)


@njit(nogil=True, inline="always")
def polar(word):
    """Radius of the two normals of a word, and sine and cosine of the part of their angle within an octant pair.

    In the order of operations of `smezo_pl.optim.noise`.
    """
    n = uint32(bits_of(float32(int32(word & uint32(0xFFFFF))) + float32(0.5)) - _SQRT_HALF)
    t = float_of(uint32(uint32(n & uint32(0x7FFFFF)) + _SQRT_HALF)) - float32(1.0)
    s = t * t
    p = ((_L6 * s + (_L5 * t + _L4)) * s + (_L3 * t + _L2)) * s + (_L1 * t + _L0)
    radius = root(float32(int32(int32(int32(n) >> int32(23)) - int32(20))) * _LOG_2 + p * t)
    v = float_of(uint32(uint32(uint32(word >> uint32(7)) & uint32(0x7FE000)) | uint32(0x3F800000))) - _ANGLE_CENTER
    w = v * v
    x = w * w
    sine = ((_S3 * w + _S2) * x + (_S1 * w + _S0)) * v
    cosine = (_C3 * w + _C2) * x + (_C1 * w + _C0)
    return radius, sine, cosine


@njit(nogil=True)
def _fill_groups(first, second, group, task, at):
    """Words of as many groups as ``first`` is long, from ``group`` on, two to a uint64.

    Each 64-bit lane carries one call, so a product needs no shuffling.
    """
    wide_vectors()
    k0, k1, high = uint64(task[at]), uint64(task[at + 1]), uint64(task[at + 2])
    step, sample = uint64(task[at + 3]), uint64(task[at + 4])
    high |= (group >> _32) << uint64(24)
    for j in range(GROUP_PART):
        first[j], second[j] = philox((group + uint64(j)) & _LOW, high, step, sample, k0, k1)


@njit(nogil=True)
def fill_words(words, block, task, row):
    """Words of a block, two to a uint64."""
    fill_words_ahead(words, block, task, row, 0, 0, 0)


@njit(nogil=True)
def fill_words_ahead(words, block, task, row, source, target, part):
    """Words of a block; in between, `PARTS` calls of `fetch_ahead` over ``part`` bytes each, from two addresses on."""
    at, group = ROWS + ROW * row, uint64(block) * uint64(128)
    first, second = words[:128], words[128:256]
    for k in range(PARTS):
        fetch_ahead(source + part * k, target + part * k, part)
        begin, end = k * GROUP_PART, (k + 1) * GROUP_PART
        _fill_groups(first[begin:end], second[begin:end], group + uint64(begin), task, at)


@njit(nogil=True)
def _fill_normals_ahead(words, out, scale, source, target, part):
    """``scale * z`` of a block; in between, `PARTS` calls of `fetch_ahead`."""
    first, second = out[:512], out[512:1024]
    for k in range(PARTS):
        fetch_ahead(source + part * k, target + part * k, part)
        low, high = k * WORD_PART, (k + 1) * WORD_PART
        _fill_normals(words[low:high], first[low:high], second[low:high], scale)


@njit(nogil=True)
def _fill_normals(words, first, second, scale):
    """``scale * z`` of `WORD_PART` words."""
    wide_vectors()
    for j in range(WORD_PART):
        word = words[j]
        radius, sine, cosine = polar(word)
        z0 = uint32(bits_of(radius * (cosine - sine)) ^ uint32(word & _SIGN))
        z1 = uint32(bits_of(radius * (cosine + sine)) ^ uint32(uint32(word << uint32(1)) & _SIGN))
        first[j] = float_of(z0) * scale
        second[j] = float_of(z1) * scale


@njit(nogil=True)
def _fill_signs(words, out, scale, bit):
    """``scale * z`` of 1024 elements for z = +1 or -1: two bits of every word, moved up to the sign."""
    wide_vectors()
    code, left = bits_of(scale), uint32(31 - bit)
    first, second = out[:512], out[512:1024]
    for j in range(512):
        first[j] = float_of(uint32(code ^ uint32(uint32(words[j] << left) & _SIGN)))
        second[j] = float_of(uint32(code ^ uint32(uint32(words[j] << uint32(left - uint32(1))) & _SIGN)))


@njit(nogil=True)
def fill_halves(words, out):
    """16-bit words of a block."""
    wide_vectors()
    first, second = out[:512], out[512:1024]
    for j in range(512):
        word = words[j]
        first[j] = word & uint32(0xFFFF)
        second[j] = word >> uint32(16)


@njit(nogil=True)
def fill_delta(words, halfwords, part, delta, task, block, fresh, source, target, ahead):
    """Sum of ``scale * z`` of a block over the samples, in their order.

    Meanwhile ``ahead`` bytes from ``source`` on, which are read next, and from ``target`` on, which are written, come
    into the cache.
    """
    samples = task[SAMPLES]
    for sample in range(samples):
        result, scale = delta if sample == 0 else part, float_of(uint32(task[ROWS + ROW * sample + 5]))
        if task[DISTRIBUTION] == 0:
            piece = ahead // (2 * PARTS) if sample == 0 else 0
            fill_words_ahead(words, block, task, sample, source, target, piece)
            done = piece * PARTS
            _fill_normals_ahead(halfwords, result, scale, source + done, target + done, piece)
        else:
            if sample == 0:
                fetch_ahead(source, target, ahead)
            # A block of signs serves 16 of 1024 elements; with one sample its words are still there.
            if samples > 1 or block & 15 == 0 or fresh:
                fill_words(words, block >> 4, task, sample)
            _fill_signs(halfwords, result, scale, 2 * (block & 15))
        if sample > 0:
            for j in range(1024):
                delta[j] += part[j]


# Weights come as their bits: uint32 is float32, uint16 bfloat16, int16 float16; numba chooses the branch by type. Not
# the processor's own conversions, because those differ (bfloat16 ones flush subnormal numbers).


def magnitude_of(code):
    """Bits without the sign, as uint32."""


def widen(code):
    """Exact float32 value."""


def nearest(value, like):
    """Bits of a float32 rounded to nearest even, one quiet NaN."""


def stochastic(value, word, like):
    """Bits of a float32 rounded by 16 random bits, as the reference's `round_stochastically` has it."""


@overload(magnitude_of)
def _magnitude_for(code):
    if code == types.uint32:
        return lambda code: uint32(code & uint32(0x7FFFFFFF))
    return lambda code: uint32(uint32(uint16(code)) & uint32(0x7FFF))


@overload(widen)
def _widen_for(code):
    if code == types.uint32:
        return lambda code: float_of(code)
    if code == types.uint16:
        return lambda code: float_of(uint32(uint32(code) << uint32(16)))

    def half(code):
        # Subnormal numbers become normal by adding 2^-14 in the exponent and taking it off as a number.
        shifted = uint32(uint32(uint16(code) & uint16(0x7FFF)) << uint32(13))
        top = uint32(shifted & uint32(0x0F800000))
        normal = uint32(shifted + uint32(112 << 23))
        small = bits_of(float_of(uint32(normal + uint32(1 << 23))) - float_of(uint32(113 << 23)))
        code32 = uint32(normal + uint32(112 << 23)) if top == uint32(0x0F800000) else (small if top == 0 else normal)
        return float_of(uint32(code32 | uint32(uint32(uint16(code) & uint16(0x8000)) << uint32(16))))

    return half


@overload(nearest)
def _nearest_for(value, like):
    if like == types.uint32:
        return lambda value, like: bits_of(value) if value == value else uint32(0x7FC00000)
    if like == types.uint16:

        def brain(value, like):
            code = bits_of(value)
            rounded = uint32(uint32(code + uint32(0x7FFF)) + uint32(uint32(code >> uint32(16)) & uint32(1)))
            return uint16(uint32(rounded >> uint32(16)) if value == value else uint32(0x7FC0))

        return brain

    def half(value, like):
        code = bits_of(value)
        sign = uint32(uint32(code >> uint32(16)) & uint32(0x8000))
        size = uint32(code & uint32(0x7FFFFFFF))
        odd = uint32(uint32(size >> uint32(13)) & uint32(1))
        normal = uint32(uint32(uint32(size - uint32(112 << 23)) + uint32(0xFFF)) + odd) >> uint32(13)
        # Adding 1/2 rounds a small number to a multiple of 2^-24, which is then the lowest bits.
        small = uint32(bits_of(float_of(size) + float32(0.5)) - uint32(0x3F000000))
        rounded = small if size < uint32(0x38800000) else uint32(normal)
        rounded = uint32(0x7C00) if size >= uint32(0x47800000) else rounded
        return np.int16(uint32(rounded | sign) if value == value else uint32(0x7E00))

    return half


@overload(stochastic)
def _stochastic_for(value, word, like):
    if like == types.uint32:
        return lambda value, word, like: bits_of(value) if value == value else uint32(0x7FC00000)
    if like == types.uint16:
        return lambda value, word, like: uint16(
            uint32(uint32(bits_of(value) + word) >> uint32(16)) if value == value else uint32(0x7FC0)
        )

    def half(value, word, like):
        code = bits_of(value)
        sign = uint32(uint32(code >> uint32(16)) & uint32(0x8000))
        size = uint32(code & uint32(0x7FFFFFFF))
        normal = uint32(uint32(size - uint32(112 << 23)) + uint32(word >> uint32(3))) >> uint32(13)
        bounded = size if size < uint32(0x38800000) else uint32(0x38800000)
        small = uint32(uint32(int32(float_of(bounded) * float32(2.0**40))) + word) >> uint32(16)
        rounded = uint32(small) if size < uint32(0x38800000) else uint32(normal)
        rounded = uint32(0x7C00) if size >= uint32(0x47800000) else rounded
        return np.int16(uint32(rounded | sign) if value == value else uint32(0x7E00))

    return half
