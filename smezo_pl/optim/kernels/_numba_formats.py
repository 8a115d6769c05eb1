# mypy: ignore-errors
# numba compiles this file: its functions have no Python types, and its intrinsics take one argument less than declared.
"""Compiled conversions between the formats of weights and float32, by integer operations.

Weights come as their bits: uint32 is float32, uint16 bfloat16, int16 float16; numba chooses the branch by type. Not the
processor's own instructions, because those differ (bfloat16 ones flush subnormal numbers).
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, types, uint16, uint32
from numba.extending import overload

from smezo_pl.optim.kernels._numba_words import bits_of, float_of


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
