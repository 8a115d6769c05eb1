# mypy: ignore-errors
# numba compiles this file: its functions have no Python types.
"""Compiled sums of outer products of the numba kernel: the ``delta`` of `Factored`.

The sum of some blocks lies in the cache while terms are added to it, eight in one loop and in their order. Their right
factors are widened for one slice of columns at a time, which serves every row of the matrix in those blocks. So a term
costs a product and a sum for each weight, however many terms and columns there are.
"""

from __future__ import annotations

import numpy as np
from numba import float32, njit, uint16, uint32

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

COLUMNS = 1024
"""Most columns of a slice, a multiple of 16."""

OUTER_MEMORY = 4096 * TILE + 32 * COLUMNS + 32
"""Bytes of working memory: the sum, eight right factors and their scales."""

_NOTHING = np.float32(-0.0)
"""What changes no number when it is added, zeros included."""


@njit(nogil=True)
def _add_terms(delta, r0, r1, r2, r3, r4, r5, r6, r7, s):
    wide_vectors()
    s0, s1, s2, s3, s4, s5, s6, s7 = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]
    for j in range(delta.size):
        total = delta[j] + s0 * r0[j]
        total = total + s1 * r1[j]
        total = total + s2 * r2[j]
        total = total + s3 * r3[j]
        total = total + s4 * r4[j]
        total = total + s5 * r5[j]
        total = total + s6 * r6[j]
        delta[j] = total + s7 * r7[j]


@njit(nogil=True)
def _widen_all(source, target):
    wide_vectors()
    for j in range(target.size):
        target[j] = widen(source[j])


@njit(nogil=True)
def fill_outer(delta, memory, task, scales, begin, end, itemsize):
    """The sum of outer products for the weights ``[begin, end)``, which come into the cache meanwhile."""
    terms, width = task[TERMS], task[WIDTH]
    height = task[NUMEL] // width
    left, right = array_at(task[LEFT], terms * height, uint16(0)), array_at(task[RIGHT], terms * width, uint16(0))
    factors = array_at(memory + 32 * COLUMNS, 8, float32(0))
    delta[:] = _NOTHING
    slices = (width + COLUMNS - 1) // COLUMNS
    step = ((width + slices - 1) // slices + 15) // 16 * 16
    for first in range(0, width, step):
        size = min(step, width - first)
        r0, r1 = array_at(memory, size, float32(0)), array_at(memory + 4 * COLUMNS, size, float32(0))
        r2, r3 = array_at(memory + 8 * COLUMNS, size, float32(0)), array_at(memory + 12 * COLUMNS, size, float32(0))
        r4, r5 = array_at(memory + 16 * COLUMNS, size, float32(0)), array_at(memory + 20 * COLUMNS, size, float32(0))
        r6, r7 = array_at(memory + 24 * COLUMNS, size, float32(0)), array_at(memory + 28 * COLUMNS, size, float32(0))
        for term in range(0, terms, 8):
            count, wide = min(8, terms - term), False
            for row in range(begin // width, (end - 1) // width + 1):
                origin = row * width + first
                low, high = max(origin, begin), min(origin + size, end)
                if low >= high:
                    continue
                if not wide:
                    wide = True
                    for k in range(8):
                        target = array_at(memory + 4 * COLUMNS * k, size, float32(0))
                        at = (term + k) * width + first
                        if k < count:
                            _widen_all(right[at : at + size], target)
                        else:
                            target[:] = float32(1.0)
                for k in range(count):
                    factors[k] = float_of(uint32(scales[term + k])) * widen(left[(term + k) * height + row])
                for k in range(count, 8):
                    factors[k] = _NOTHING
                if term == 0:
                    fetch_ahead(task[THETA] + low * itemsize, task[OUT] + low * itemsize, (high - low) * itemsize)
                a, b = low - origin, high - origin
                part = delta[low - begin : high - begin]
                _add_terms(part, r0[a:b], r1[a:b], r2[a:b], r3[a:b], r4[a:b], r5[a:b], r6[a:b], r7[a:b], factors)
