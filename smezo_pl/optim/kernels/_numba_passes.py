# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,no-any-return,misc"
"""The compiled passes of the numba kernel (`smezo_pl.optim.kernels.numba_cpu` calls them).

Weights come as their bits: uint32 is float32, uint16 bfloat16, int16 float16 (numba chooses by type). All compiled code
is in this one file because numba's cache notices changes of the file of the entry point only.

What keeps the loops vectorised: numba widens 32-bit arithmetic to 64 bits, so every result is cast back; arrays are
walked through slices that begin at 0, because an index that might be negative gets a wrap-around test; nothing branches
on data; the same memory is never both a source and another array's target (LLVM then takes a scalar loop), hence the
twins that work in place. No fastmath: LLVM then keeps every rounding, and contracts nothing to FMA.
"""

from __future__ import annotations

import logging

import numpy as np
from llvmlite import ir
from numba import carray, float32, int32, int64, njit, prange, types, uint8, uint16, uint32, uint64
from numba.extending import intrinsic, overload

from smezo_pl.optim.noise import (
    ANGLE_CENTRE,
    COS,
    LOG,
    LOG_2,
    PHILOX_KEY_STEPS,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    SIN,
    SQRT_HALF_BITS,
)

log = logging.getLogger(__name__)

FROM_THRESHOLD, FROM_WORDS, FROM_BITS = 0, 1, 2
"""Where a mask comes from: a range of magnitude codes, 16-bit words below a level, packed bits."""

MEMORY = 20480
"""Bytes of working memory of a thread: words, two vectors of noise, the mask, words for rounding, other words."""

CHUNK = 8192
"""Bytes of packed mask that one unit of work of `count` and `move` covers."""

_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (np.float32(c) for c in LOG)
_S0, _S1, _S2, _S3 = (np.float32(c) for c in SIN)
_C0, _C1, _C2, _C3 = (np.float32(c) for c in COS)
_LOG_2, _ANGLE_CENTRE, _SQRT_HALF = np.float32(LOG_2), np.float32(ANGLE_CENTRE), np.uint32(SQRT_HALF_BITS)
_M0, _M1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)
_K0, _K1 = (np.uint64(k) for k in PHILOX_KEY_STEPS)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_SIGN, _ALL = np.uint32(1 << 31), np.uint32(0xFFFFFFFF)


def _entry(**options):
    """`njit` with the cache on disk: beside this file, in the user's cache folder, or none where neither is writable."""

    def decorate(function):
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError as error:
            log.info("numba's compiled kernels cannot be kept, every run compiles anew (%s)", error)
            return njit(**options)(function)

    return decorate


@intrinsic
def _bits(typing_context, value):
    """Bits of a float32."""
    return types.uint32(types.float32), lambda c, builder, s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _float(typing_context, code):
    """The float32 of some bits."""
    return types.float32(types.uint32), lambda c, builder, s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _root(typing_context, value):
    """Square root, correctly rounded."""

    def generate(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [ir.FloatType()]), args)

    return types.float32(types.float32), generate


@intrinsic
def _trailing_zeros(typing_context, word):
    """Number of zeros below the lowest bit that is set."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@intrinsic
def _ones(typing_context, word):
    """Number of bits that are set."""
    return types.uint64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def _wide_vectors(typing_context):
    """Let LLVM use 512-bit vectors here: it keeps to 256 bits on Intel processors, which halves the speed."""

    def generate(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        # llvmlite's own `add` knows no attributes with values.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


def _array(address, size, like):
    """The memory at an address as an array of the type of ``like``.

    Slices of a numpy array count references with atomic operations, which took a fifth of a block's time.
    """


@overload(_array)
def _array_of(address, size, like):
    dtype = np.dtype(str(like))
    return lambda address, size, like: carray(_pointer(address), size, dtype)


# --- noise -----------------------------------------------------------------------------------------------------------


@njit(nogil=True)
def _fill_words(words, block, streams, row):
    _wide_vectors()
    """Words of a block, two to a uint64: each 64-bit lane carries one call, so a product needs no shuffling."""
    k0, k1, high, step, sample = streams[row, 0], streams[row, 1], streams[row, 2], streams[row, 3], streams[row, 4]
    group = uint64(block) * uint64(128)
    high |= (group >> _32) << uint64(24)
    first, second = words[:128], words[128:256]
    for j in range(128):
        c0, c1, c2, c3 = (group + uint64(j)) & _LOW, high, step, sample
        a, b = k0, k1
        for _ in range(PHILOX_ROUNDS):
            p0, p1 = (c0 & _LOW) * _M0, (c2 & _LOW) * _M1
            c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ a, p1, (p0 >> _32) ^ c3 ^ b, p0
            a, b = (a + _K0) & _LOW, (b + _K1) & _LOW
        first[j] = (c0 & _LOW) | (c1 << _32)
        second[j] = (c2 & _LOW) | (c3 << _32)


@njit(nogil=True)
def _fill_normals(words, out, scale):
    _wide_vectors()
    """``scale * z`` of a block, in the order of operations of `smezo_pl.optim.noise`."""
    first, second = out[:512], out[512:1024]
    for j in range(512):
        word = words[j]
        n = uint32(_bits(float32(int32(word & uint32(0xFFFFF))) + float32(0.5)) - _SQRT_HALF)
        t = _float(uint32(uint32(n & uint32(0x7FFFFF)) + _SQRT_HALF)) - float32(1.0)
        s = t * t
        p = ((_L6 * s + (_L5 * t + _L4)) * s + (_L3 * t + _L2)) * s + (_L1 * t + _L0)
        radius = _root(float32(int32(int32(int32(n) >> int32(23)) - int32(20))) * _LOG_2 + p * t)
        v = _float(uint32(uint32(uint32(word >> uint32(7)) & uint32(0x7FE000)) | uint32(0x3F800000))) - _ANGLE_CENTRE
        w = v * v
        x = w * w
        sine = ((_S3 * w + _S2) * x + (_S1 * w + _S0)) * v
        cosine = (_C3 * w + _C2) * x + (_C1 * w + _C0)
        first[j] = _float(uint32(_bits(radius * (cosine - sine)) ^ uint32(word & _SIGN))) * scale
        second[j] = _float(uint32(_bits(radius * (cosine + sine)) ^ uint32(uint32(word << uint32(1)) & _SIGN))) * scale


@njit(nogil=True)
def _fill_signs(words, out, scale, place):
    _wide_vectors()
    """``scale * z`` of 1024 elements for z = +1 or -1: two bits of every word, moved up to the sign's place."""
    code, left = _bits(scale), uint32(31 - place)
    first, second = out[:512], out[512:1024]
    for j in range(512):
        first[j] = _float(uint32(code ^ uint32(uint32(words[j] << left) & _SIGN)))
        second[j] = _float(uint32(code ^ uint32(uint32(words[j] << uint32(left - uint32(1))) & _SIGN)))


@njit(nogil=True)
def _fill_halves(words, out):
    _wide_vectors()
    """16-bit words of a block."""
    first, second = out[:512], out[512:1024]
    for j in range(512):
        word = words[j]
        first[j] = word & uint32(0xFFFF)
        second[j] = word >> uint32(16)


@njit(nogil=True)
def _fill_delta(words, halfwords, part, delta, law, block, fresh, streams, scales):
    _wide_vectors()
    """Sum of ``scale * z`` of a block over the samples, in their order."""
    for sample in range(scales.size):
        target = delta if sample == 0 else part
        if law == 0:
            _fill_words(words, block, streams, sample)
            _fill_normals(halfwords, target, scales[sample])
        else:
            # A block of signs serves 16 of 1024 elements; with one sample its words are still there.
            if scales.size > 1 or block & 15 == 0 or fresh:
                _fill_words(words, block >> 4, streams, sample)
            _fill_signs(halfwords, target, scales[sample], 2 * (block & 15))
        if sample > 0:
            for j in range(1024):
                delta[j] += part[j]


# --- masks: `skip` is all ones where a weight stays out --------------------------------------------------------------


@njit(nogil=True)
def _fill_skip(words, halfwords, flags, skip, source, block, streams, row, level, bits, offset):
    _wide_vectors()
    """``skip`` of a block from random words or from packed bits; ``offset`` is the local index of its element 0."""
    if source == FROM_WORDS:
        _fill_words(words, block, streams, row)
        _fill_halves(halfwords, skip)
        for j in range(1024):
            skip[j] = uint32(0) if skip[j] < level else _ALL
    elif offset & 7 == 0 and offset >= 0 and offset // 8 + 128 <= bits.size:
        chunk = bits[offset // 8 : offset // 8 + 128]
        for j in range(128):
            # A copy of the byte in each of eight, one bit kept of each, moved to the top by a carry that stays inside.
            spread = (uint64(chunk[j]) * uint64(0x0101010101010101)) & uint64(0x8040201008040201)
            words[j] = spread + uint64(0x7F7F7F7F7F7F7F7F)
        for j in range(1024):
            skip[j] = uint32(uint32(uint32(flags[j]) >> uint32(7)) - uint32(1))
    else:
        for j in range(max(-offset, 0), min(1024, 8 * bits.size - offset)):
            i = offset + j
            skip[j] = uint32(uint32(uint32(bits[i >> 3] >> uint8(i & 7)) & uint32(1)) - uint32(1))


@njit(nogil=True)
def _is_active(magnitude, skip, low, span):
    """One unsigned comparison does every rule: ``low <= magnitude <= low + span``, and nothing where skip is set."""
    return uint32(uint32(magnitude - low) | skip) <= span


# --- formats ---------------------------------------------------------------------------------------------------------


def _magnitude(code):
    """Bits without the sign, as uint32."""


def _widen(code):
    """Exact float32 value."""


def _nearest(value, like):
    """Bits of a float32 rounded to nearest even, one quiet NaN."""


def _stochastic(value, word, like):
    """Bits of a float32 rounded by 16 random bits, as `smezo_pl.optim.kernels.reference.round_stochastically` has it."""


@overload(_magnitude)
def _magnitude_of(code):
    if code == types.uint32:
        return lambda code: uint32(code & uint32(0x7FFFFFFF))
    return lambda code: uint32(uint32(uint16(code)) & uint32(0x7FFF))


@overload(_widen)
def _widen_of(code):
    if code == types.uint32:
        return lambda code: _float(code)
    if code == types.uint16:
        return lambda code: _float(uint32(uint32(code) << uint32(16)))

    def half(code):
        # Subnormal numbers become normal by adding 2^-14 in the exponent and taking it off as a number.
        shifted = uint32(uint32(uint16(code) & uint16(0x7FFF)) << uint32(13))
        top = uint32(shifted & uint32(0x0F800000))
        normal = uint32(shifted + uint32(112 << 23))
        small = _bits(_float(uint32(normal + uint32(1 << 23))) - _float(uint32(113 << 23)))
        code32 = uint32(normal + uint32(112 << 23)) if top == uint32(0x0F800000) else (small if top == 0 else normal)
        return _float(uint32(code32 | uint32(uint32(uint16(code) & uint16(0x8000)) << uint32(16))))

    return half


@overload(_nearest)
def _nearest_of(value, like):
    if like == types.uint32:
        return lambda value, like: _bits(value) if value == value else uint32(0x7FC00000)
    if like == types.uint16:

        def brain(value, like):
            code = _bits(value)
            rounded = uint32(uint32(code + uint32(0x7FFF)) + uint32(uint32(code >> uint32(16)) & uint32(1)))
            return uint16(uint32(rounded >> uint32(16)) if value == value else uint32(0x7FC0))

        return brain

    def half(value, like):
        code = _bits(value)
        sign = uint32(uint32(code >> uint32(16)) & uint32(0x8000))
        size = uint32(code & uint32(0x7FFFFFFF))
        odd = uint32(uint32(size >> uint32(13)) & uint32(1))
        normal = uint32(uint32(uint32(size - uint32(112 << 23)) + uint32(0xFFF)) + odd) >> uint32(13)
        # Adding 1/2 rounds a small number to a multiple of 2^-24, which is then the lowest bits.
        small = uint32(_bits(_float(size) + float32(0.5)) - uint32(0x3F000000))
        rounded = small if size < uint32(0x38800000) else uint32(normal)
        rounded = uint32(0x7C00) if size >= uint32(0x47800000) else rounded
        return np.int16(uint32(rounded | sign) if value == value else uint32(0x7E00))

    return half


@overload(_stochastic)
def _stochastic_of(value, word, like):
    if like == types.uint32:
        return lambda value, word, like: _bits(value) if value == value else uint32(0x7FC00000)
    if like == types.uint16:
        return lambda value, word, like: uint16(
            uint32(uint32(_bits(value) + word) >> uint32(16)) if value == value else uint32(0x7FC0)
        )

    def half(value, word, like):
        code = _bits(value)
        sign = uint32(uint32(code >> uint32(16)) & uint32(0x8000))
        size = uint32(code & uint32(0x7FFFFFFF))
        normal = uint32(uint32(size - uint32(112 << 23)) + uint32(word >> uint32(3))) >> uint32(13)
        bounded = size if size < uint32(0x38800000) else uint32(0x38800000)
        small = uint32(uint32(int32(_float(bounded) * float32(2.0**40))) + word) >> uint32(16)
        rounded = uint32(small) if size < uint32(0x38800000) else uint32(normal)
        rounded = uint32(0x7C00) if size >= uint32(0x47800000) else rounded
        return np.int16(uint32(rounded | sign) if value == value else uint32(0x7E00))

    return half


# --- passes ----------------------------------------------------------------------------------------------------------


@njit(nogil=True)
def _apply(theta, out, delta, skip, low, span):
    _wide_vectors()
    for i in range(theta.size):
        code = theta[i]
        new = _nearest(_widen(code) - delta[i], code)
        out[i] = new if _is_active(_magnitude(code), skip[i], low, span) else code


@njit(nogil=True)
def _apply_in_place(theta, delta, skip, low, span):
    _wide_vectors()
    for i in range(theta.size):
        code = theta[i]
        new = _nearest(_widen(code) - delta[i], code)
        theta[i] = new if _is_active(_magnitude(code), skip[i], low, span) else code


@njit(nogil=True)
def _apply_stochastically(theta, delta, word, skip, low, span):
    _wide_vectors()
    for i in range(theta.size):
        code = theta[i]
        new = _stochastic(_widen(code) - delta[i], word[i], code)
        theta[i] = new if _is_active(_magnitude(code), skip[i], low, span) else code


@njit(nogil=True)
def _add_decay(theta, delta, decay):
    _wide_vectors()
    for i in range(theta.size):
        delta[i] += _widen(theta[i]) * decay


@njit(nogil=True)
def _shift_down(buffer, by, count):
    for j in range(count):
        buffer[j] = buffer[by + j]


@_entry(nogil=True)
def sweep(
    first,
    last,
    memory,
    theta,
    out,
    numel,
    like,
    start,
    law,
    streams,
    scales,
    decay,
    rounding,
    source,
    low,
    span,
    level,
    bits,
):
    _wide_vectors()
    """``out = round(theta - (sum of scale * z + decay * theta))`` under the mask, for the blocks ``[first, last)``.

    Args:
        first: Block of global indices to begin with.
        last: Block to end before.
        memory: Address of `MEMORY` bytes of working memory.
        theta: Address of the weights.
        out: Address of the result, may be that of the weights.
        numel: Number of weights.
        like: A scalar whose type tells the format of the weights.
        start: Global index of the first weight.
        law: 0 for normals, 1 for signs.
        streams: Row ``(key low, key high, tensor, step, sample + kind)`` for each sample, for mask and rounding.
        scales: float32, one for each sample.
        decay: float32.
        rounding: Whether to round stochastically (in place only).
        source: Where the mask comes from.
        low: Smallest magnitude code that takes part.
        span: Largest one, counted from ``low``.
        level: Random words below it take part.
        bits: Address of the packed mask.
    """
    words = _array(memory, 256, uint64(0))
    halfwords, flags = _array(memory, 512, uint32(0)), _array(memory, 1024, uint8(0))
    delta, part = _array(memory + 2048, 1024, float32(0)), _array(memory + 6144, 1024, float32(0))
    skip, word = _array(memory + 10240, 1024, uint32(0)), _array(memory + 14336, 1024, uint32(0))
    other, other_half, other_flags = (
        _array(memory + 18432, 256, uint64(0)),
        _array(memory + 18432, 512, uint32(0)),
        _array(memory + 18432, 1024, uint8(0)),
    )
    weights, result, packed = (
        _array(theta, numel, like),
        _array(out, numel, like),
        _array(bits, (numel + 7) // 8, uint8(0)),
    )
    skip[:] = uint32(0)
    for block in range(first, last):
        offset = block * 1024 - start
        begin, end = max(offset, 0), min(offset + 1024, numel)
        count, missing = end - begin, begin - offset
        old = weights[begin:end]
        _fill_delta(words, halfwords, part, delta, law, block, block == first, streams, scales)
        if source != FROM_THRESHOLD:
            _fill_skip(other, other_half, other_flags, skip, source, block, streams, scales.size, level, packed, offset)
        if rounding:
            _fill_words(other, block, streams, scales.size + 1)
            _fill_halves(other_half, word)
        if missing:
            _shift_down(delta, missing, count)
            _shift_down(skip, missing, count)
            _shift_down(word, missing, count)
        if decay != float32(0.0):
            _add_decay(old, delta, decay)
        if rounding:
            _apply_stochastically(old, delta, word, skip, low, span)
        elif theta == out:
            _apply_in_place(old, delta, skip, low, span)
        else:
            _apply(old, result[begin:end], delta, skip, low, span)


@_entry(parallel=True)
def sweep_parallel(
    threads,
    first,
    last,
    memory,
    theta,
    out,
    numel,
    like,
    start,
    law,
    streams,
    scales,
    decay,
    rounding,
    source,
    low,
    span,
    level,
    bits,
):
    """`sweep`, the blocks shared out to the threads; ``memory`` holds `MEMORY` bytes for each."""
    for t in prange(threads):
        a, b = first + (last - first) * t // threads, first + (last - first) * (t + 1) // threads
        sweep(
            a,
            b,
            memory + t * MEMORY,
            theta,
            out,
            numel,
            like,
            start,
            law,
            streams,
            scales,
            decay,
            rounding,
            source,
            low,
            span,
            level,
            bits,
        )


@_entry(nogil=True)
def pack(first, last, memory, theta, numel, like, start, streams, source, low, span, level, bits):
    """Write the mask of the weights ``[1024 * first, 1024 * last)``, counted locally, to the bytes at ``bits``."""
    _wide_vectors()
    words, halfwords = _array(memory, 256, uint64(0)), _array(memory, 512, uint32(0))
    flags, eights = _array(memory + 2048, 1024, uint8(0)), _array(memory + 2048, 128, uint64(0))
    skip, drawn = _array(memory + 6144, 1024, uint32(0)), _array(memory + 10240, 1024, uint32(0))
    weights, packed = _array(theta, numel, like), _array(bits, (numel + 7) // 8, uint8(0))
    skip[:] = uint32(0)
    for tile in range(first, last):
        begin, end = tile * 1024, min(tile * 1024 + 1024, numel)
        done = 0
        while source == FROM_WORDS and done < end - begin:
            # A tile of a shard may lie across two blocks.
            place = start + begin + done
            _fill_skip(words, halfwords, flags, drawn, source, place // 1024, streams, 0, level, packed, 0)
            count = min(1024 - place % 1024, end - begin - done)
            for j in range(count):
                skip[done + j] = drawn[place % 1024 + j]
            done += count
        part = weights[begin:end]
        flags[:] = uint8(0)
        for j in range(part.size):
            flags[j] = uint8(1) if _is_active(_magnitude(part[j]), skip[j], low, span) else uint8(0)
        target = packed[begin // 8 : (end + 7) // 8]
        for j in range(target.size):
            # The product gathers bit 0 of the eight bytes in the topmost byte.
            target[j] = uint8((eights[j] * uint64(0x0102040810204080)) >> uint64(56))


@_entry(nogil=True)
def count(first, last, bits, size, counts):
    """Number of set bits of each chunk of `CHUNK` bytes."""
    packed = _array(bits, size, uint8(0))
    for chunk in range(first, last):
        part = packed[chunk * CHUNK : min(chunk * CHUNK + CHUNK, size)]
        total = 0
        for j in range(part.size):
            total += int64(_ones(uint64(part[j])))
        counts[chunk] = total


@_entry(nogil=True)
def move(first, last, theta, numel, like, bits, saved, ends, back):
    """Copy the weights under the mask to ``saved``, or back, chunk by chunk; ``ends[c]`` is where chunk ``c`` ends."""
    weights, size = _array(theta, numel, like), (numel + 7) // 8
    packed, store = _array(bits, size, uint8(0)), _array(saved, numel, like)
    for chunk in range(first, last):
        slot = ends[chunk - 1] if chunk > 0 else 0
        stop = min(chunk * CHUNK + CHUNK, size)
        for j in range(chunk * CHUNK, stop, 8):
            word = uint64(0)
            for k in range(min(8, stop - j)):
                word |= uint64(packed[j + k]) << uint64(8 * k)
            while word != 0:
                i = 8 * j + int64(_trailing_zeros(word))
                if back:
                    weights[i] = store[slot]
                else:
                    store[slot] = weights[i]
                slot += 1
                word &= word - uint64(1)


@_entry(nogil=True)
def histogram(first, last, theta, like, shift, prefix, counts):
    """Count digits of the weights ``[first, last)``; a negative prefix counts all."""
    weights, shift = _array(theta, last, like), uint32(shift)
    for i in range(first, last):
        digit = _magnitude(weights[i]) >> shift
        if prefix < 0 or int64(digit >> uint32(16)) == prefix:
            counts[digit & uint32(0xFFFF)] += 1


@_entry(parallel=True)
def pack_parallel(threads, first, last, memory, theta, numel, like, start, streams, source, low, span, level, bits):
    """`pack`, the tiles shared out to the threads."""
    for t in prange(threads):
        a, b = first + (last - first) * t // threads, first + (last - first) * (t + 1) // threads
        pack(a, b, memory + t * MEMORY, theta, numel, like, start, streams, source, low, span, level, bits)


@_entry(parallel=True)
def move_parallel(threads, first, last, theta, numel, like, bits, saved, ends, back):
    """`move`, the chunks shared out to the threads."""
    for t in prange(threads):
        a, b = first + (last - first) * t // threads, first + (last - first) * (t + 1) // threads
        move(a, b, theta, numel, like, bits, saved, ends, back)


@_entry(parallel=True)
def histogram_parallel(threads, numel, theta, like, shift, prefix, counts):
    """`histogram`, a row of ``counts`` for each thread."""
    for t in prange(threads):
        histogram(numel * t // threads, numel * (t + 1) // threads, theta, like, shift, prefix, counts[t])
