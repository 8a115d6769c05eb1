# mypy: ignore-errors
# numba compiles this file: its functions have no Python types, and its intrinsics take one argument less than declared.
"""Compiled sums of outer products of the numba kernel: the ``delta`` of `Factored`.

Some blocks are summed at a time, and of those 128 columns of the matrix: their right factors are widened once for all
rows, and each row's 128 sums stay in registers while terms are added in their order. So a term costs little more than a
product and a sum for each weight, however many terms and columns there are.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import float32, njit, types, uint16, uint32
from numba.core import cgutils
from numba.extending import intrinsic

from smezo_pl.optim.kernels._numba_words import (
    LEFT,
    NUMEL,
    OUT,
    RIGHT,
    TERMS,
    THETA,
    WIDTH,
    array_at,
    fetch_ahead,
    float_of,
    wide_vectors,
    widen,
)

TILE = 16
"""Blocks that are summed at a time."""

COLUMNS = 128
"""Columns whose sums are in registers at a time."""

_MOST, _LEFTS = 64, 16384
"""Most terms that are added at a time, and most left factors."""

OUTER_MEMORY = 4 * (1024 * TILE + COLUMNS + COLUMNS * _MOST + _LEFTS)
"""Bytes of working memory: the sums, what they begin with, right factors and left factors."""

_NOTHING = np.float32(-0.0)
"""What a sum begins with: added to it, every number keeps its bits, zeros too."""


def _adder(lanes):
    """What adds ``left[k] * right[k]`` for ``k`` of ``[0, terms)`` to ``lanes`` numbers, held in registers meanwhile.

    LLVM's own vectorizer would read and write the sums again for every few terms.
    """
    word, single = ir.IntType(64), ir.FloatType()
    vector = ir.VectorType(single, lanes)
    undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)

    def _add(typing_context, source, target, right, left, stride, terms):
        def generate(context, builder, signature, args):
            source, target, right, left, stride, terms = args
            total = cgutils.alloca_once(builder, vector)
            builder.store(builder.load(builder.inttoptr(source, vector.as_pointer()), align=4), total)
            with cgutils.for_range(builder, terms) as loop:
                place = builder.add(right, builder.mul(loop.index, word(4 * COLUMNS)))
                factor = builder.load(
                    builder.inttoptr(builder.add(left, builder.mul(loop.index, stride)), single.as_pointer())
                )
                spread = builder.insert_element(undefined, factor, ir.IntType(32)(0))
                spread = builder.shuffle_vector(spread, undefined, zeros)
                wide = builder.load(builder.inttoptr(place, vector.as_pointer()), align=4)
                builder.store(builder.fadd(builder.load(total), builder.fmul(spread, wide)), total)
            builder.store(builder.load(total), builder.inttoptr(target, vector.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return intrinsic(_add)


_add_all, _add_64, _add_16, _add_1 = _adder(COLUMNS), _adder(64), _adder(16), _adder(1)


@njit(nogil=True)
def _add_terms(source, target, size, right, left, stride, terms):
    """Add terms to up to 128 numbers at the address ``source``; left factors are ``stride`` bytes apart."""
    wide_vectors()
    if size == COLUMNS:
        _add_all(source, target, right, left, stride, terms)
        return
    j = 0
    if size >= 64:
        _add_64(source, target, right, left, stride, terms)
        j = 64
    while j + 16 <= size:
        _add_16(source + 4 * j, target + 4 * j, right + 4 * j, left, stride, terms)
        j += 16
    while j < size:
        _add_1(source + 4 * j, target + 4 * j, right + 4 * j, left, stride, terms)
        j += 1


@njit(nogil=True)
def _widen_all(source, target, scale):
    wide_vectors()
    for j in range(target.size):
        target[j] = scale * widen(source[j])


@njit(nogil=True)
def fill_outer(memory, task, scales, begin, end, itemsize):
    """The sum of outer products for the weights ``[begin, end)``, which come into the cache meanwhile.

    It goes to the address ``memory``, and other working memory lies behind it.
    """
    terms, width = task[TERMS], task[WIDTH]
    height = task[NUMEL] // width
    left, right = array_at(task[LEFT], terms * height, uint16(0)), array_at(task[RIGHT], terms * width, uint16(0))
    nothing = memory + 4096 * TILE
    array_at(nothing, COLUMNS, float32(0))[:] = _NOTHING
    wide = nothing + 4 * COLUMNS
    lefts = wide + 4 * COLUMNS * _MOST
    top, rows = begin // width, (end - 1) // width + 1 - begin // width
    # A row can be much longer than what is summed here.
    start, stop = (begin - top * width, end - top * width) if rows == 1 else (0, width)
    most = min(terms, min(_MOST, _LEFTS // rows))
    for term in range(0, terms, most):
        count = min(most, terms - term)
        for k in range(count):
            at = (term + k) * height + top
            target = array_at(lefts + 4 * rows * k, rows, float32(0))
            _widen_all(left[at : at + rows], target, float_of(uint32(scales[term + k])))
        for first in range(start, stop, COLUMNS):
            size = min(COLUMNS, stop - first)
            for k in range(count):
                at = (term + k) * width + first
                _widen_all(right[at : at + size], array_at(wide + 4 * COLUMNS * k, size, float32(0)), float32(1.0))
            for row in range(rows):
                origin = (top + row) * width + first
                low, high = max(origin, begin), min(origin + size, end)
                if low < high:
                    if term == 0:
                        fetch_ahead(task[THETA] + low * itemsize, task[OUT] + low * itemsize, (high - low) * itemsize)
                    place = memory + 4 * (low - begin)
                    source = place if term > 0 else nothing
                    _add_terms(source, place, high - low, wide + 4 * (low - origin), lefts + 4 * row, 4 * rows, count)
