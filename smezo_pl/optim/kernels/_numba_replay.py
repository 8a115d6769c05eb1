# mypy: ignore-errors
# numba compiles this file: its functions have no Python types, and its intrinsics take one argument less than declared.
"""The compiled pass of a blocked replay: many updates of a tile of weights while it stays in cache.

A mask that does not change between two refreshes but by weights leaving it is evaluated once a call: the selected
weights of each block are gathered, stepped, and put back. Of the block's random words those groups alone are made that
a selected weight reads. Each operation on a weight is that of `_numba_passes`, in the same order, so the bits are those
of one pass a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, float32, int64, njit, types, uint8, uint16, uint32, uint64

from smezo_pl.optim.kernels import _numba_passes
from smezo_pl.optim.kernels._numba_formats import magnitude_of, nearest, stochastic, widen
from smezo_pl.optim.kernels._numba_passes import (
    FROM_BITS,
    FROM_WORDS,
    MEMORY,
    _cached,
    _is_active,
    _source_stamp,
    _sweep,
)
from smezo_pl.optim.kernels._numba_words import (
    BITS,
    DECAY,
    LAW,
    LOW,
    NUMEL,
    ROUNDING,
    ROW,
    ROWS,
    SAMPLES,
    SOURCE,
    SPAN,
    THETA,
    array_at,
    bits_of,
    fill_words,
    float_of,
    philox,
    polar,
    wide_vectors,
)

TILE = 16
"""Blocks of a tile, the unit of work: a block of signs serves so many."""

CROWDED = 400
"""From so many selected weights of a block on, all of it is quicker than gathered weights."""

REPLAY_MEMORY = MEMORY + 2048 + 2048 + 4096 + 4096 + 256 + TILE * (256 + 2048 + 2048 + 4096) + 4096
"""Bytes of working memory of a thread."""

# Loops of a fixed length: a vectorised loop of any other leaves a rest that runs one number at a time.
_GROUPS, _WEIGHTS = 16, 16

_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_SIGN = np.uint32(1 << 31)


@njit(nogil=True)
def _fill_some(words, groups, count, task, block, row):
    """Words of some groups of a block: their words 0 and 1 at the beginning, 2 and 3 from 128 on."""
    wide_vectors()
    at = ROWS + ROW * row
    k0, k1, high = uint64(task[at]), uint64(task[at + 1]), uint64(task[at + 2])
    step, sample = uint64(task[at + 3]), uint64(task[at + 4])
    base = uint64(block) * uint64(128)
    high |= (base >> _32) << uint64(24)
    for begin in range(0, count, _GROUPS):
        here = groups[begin : begin + _GROUPS]
        first, second = words[begin : begin + _GROUPS], words[128 + begin : 128 + begin + _GROUPS]
        for j in range(_GROUPS):
            counter = (base + uint64(here[j])) & _LOW
            first[j], second[j] = philox(counter, high, step, sample, k0, k1)


@njit(nogil=True)
def _gather(words, at, out, count):
    """The word of each weight. A loop of its own, because LLVM takes a scalar one where it reads out of order."""
    for j in range(count):
        out[j] = words[at[j] & uint16(511)]


@njit(nogil=True)
def _fill_some_normals(drawn, at, out, count, scale):
    """``scale * z`` of the gathered weights; bit 9 of ``at`` tells the second half of a block, whose sine is added."""
    wide_vectors()
    for begin in range(0, count, _WEIGHTS):
        here, there = at[begin : begin + _WEIGHTS], out[begin : begin + _WEIGHTS]
        read = drawn[begin : begin + _WEIGHTS]
        for j in range(_WEIGHTS):
            half = uint32(uint32(here[j]) >> uint32(9))
            word = read[j]
            radius, sine, cosine = polar(word)
            # C - S is C + (-S) to the last bit
            turned = float_of(uint32(bits_of(sine) ^ uint32(uint32(uint32(1) - half) << uint32(31))))
            z = uint32(bits_of(radius * (cosine + turned)) ^ uint32(uint32(word << half) & _SIGN))
            there[j] = float_of(z) * scale


@njit(nogil=True)
def _fill_some_signs(drawn, at, out, count, scale, place):
    """``scale * z`` of the gathered weights for z = +1 or -1."""
    wide_vectors()
    code = bits_of(scale)
    for begin in range(0, count, _WEIGHTS):
        here, there = at[begin : begin + _WEIGHTS], out[begin : begin + _WEIGHTS]
        read = drawn[begin : begin + _WEIGHTS]
        for j in range(_WEIGHTS):
            left = uint32(uint32(31 - place) - uint32(uint32(here[j]) >> uint32(9)))
            there[j] = float_of(uint32(code ^ uint32(uint32(read[j] << left) & _SIGN)))


@njit(nogil=True)
def _add(delta, part, count):
    wide_vectors()
    for begin in range(0, count, _WEIGHTS):
        here, there = part[begin : begin + _WEIGHTS], delta[begin : begin + _WEIGHTS]
        for j in range(_WEIGHTS):
            there[j] += here[j]


@njit(nogil=True)
def _add_some_decay(state, delta, count, decay):
    wide_vectors()
    for begin in range(0, count, _WEIGHTS):
        here, there = state[begin : begin + _WEIGHTS], delta[begin : begin + _WEIGHTS]
        for j in range(_WEIGHTS):
            there[j] += widen(here[j]) * decay


@njit(nogil=True)
def _step_some(state, delta, count, low, span):
    wide_vectors()
    for begin in range(0, count, _WEIGHTS):
        here, there = delta[begin : begin + _WEIGHTS], state[begin : begin + _WEIGHTS]
        for j in range(_WEIGHTS):
            code = there[j]
            new = nearest(widen(code) - here[j], code)
            there[j] = new if _is_active(magnitude_of(code), uint32(0), low, span) else code


@njit(nogil=True)
def _step_some_stochastically(state, delta, drawn, at, count, low, span):
    wide_vectors()
    for begin in range(0, count, _WEIGHTS):
        here, there = delta[begin : begin + _WEIGHTS], state[begin : begin + _WEIGHTS]
        where, read = at[begin : begin + _WEIGHTS], drawn[begin : begin + _WEIGHTS]
        for j in range(_WEIGHTS):
            code = there[j]
            shift = uint32(uint32(uint32(where[j]) >> uint32(9)) << uint32(4))
            word = uint32(uint32(read[j] >> shift) & uint32(0xFFFF))
            new = stochastic(widen(code) - here[j], word, code)
            there[j] = new if _is_active(magnitude_of(code), uint32(0), low, span) else code


@njit(nogil=True)
def _choose(theta, bits, offset, from_bits, low, span, chosen):
    """Local indices of the selected weights of a block; how many."""
    count = uint64(0)
    for j in range(theta.size):
        chosen[count] = uint16(j)
        i = uint64(offset + j)
        active = _is_active(magnitude_of(theta[j]), uint32(0), low, span)
        if from_bits:
            active = uint8(bits[i >> uint64(3)] >> uint8(i & uint64(7))) & uint8(1) != uint8(0)
        count += uint64(1) if active else uint64(0)
    return int64(count)


@njit(nogil=True)
def _number_groups(chosen, at, groups, place, count, every):
    """Which groups of words the weights read, and where in them each finds its own; how many groups."""
    place[:] = uint16(every)
    for j in range(count):
        place[(chosen[j] & uint16(255)) >> uint16(1)] = uint16(1)
    used = uint64(0)
    for g in range(128):
        groups[used] = uint16(g)
        here = uint64(place[g])
        place[g] = uint16(used)
        used += here
    for j in range(count):
        e = uint32(chosen[j])
        slot = uint32(uint32(place[uint32(e & uint32(255)) >> uint32(1)]) << uint32(1))
        at[j] = uint16(slot | uint32(e & uint32(1)) | uint32(e & uint32(256)) | uint32(e & uint32(512)))
    return int64(used)


@njit(nogil=True)
def _replay(first, last, memory, address, like):
    """Make several updates of the tiles ``[first, last)``, one after the other.

    The argument holds the number of updates, the address of the first one's task (as for `_sweep`, in place, of a whole
    tensor) and the bytes from one task to the next. Tasks differ in scales, decay and steps alone.
    """
    argument = array_at(address, 3, int64(0))
    steps, tasks, stride = argument[0], argument[1], argument[2]
    task = array_at(tasks, ROWS, int64(0))
    numel, samples, source = task[NUMEL], task[SAMPLES], task[SOURCE]
    low, span, signs = uint32(task[LOW]), uint32(task[SPAN]), task[LAW] != 0
    theta = array_at(task[THETA], numel, like)
    bits = array_at(task[BITS], (numel + 7) // 8, uint8(0))
    width = ROWS + ROW * (samples + 2)
    base = memory + MEMORY
    words, halves = array_at(base, 256, uint64(0)), array_at(base, 512, uint32(0))
    other, other_halves = array_at(base + 2048, 256, uint64(0)), array_at(base + 2048, 512, uint32(0))
    delta, part = array_at(base + 4096, 1024, float32(0)), array_at(base + 8192, 1024, float32(0))
    place = array_at(base + 8192, 128, uint16(0))
    counts, used = array_at(base + 12288, TILE, int64(0)), array_at(base + 12288 + 128, TILE, int64(0))
    groups = array_at(base + 12544, TILE * 128, uint16(0))
    chosen = array_at(base + 12544 + TILE * 256, TILE * 1024, uint16(0))
    at = array_at(base + 12544 + TILE * 2304, TILE * 1024, uint16(0))
    state = array_at(base + 12544 + TILE * 4352, TILE * 1024, like)
    drawn = array_at(base + 12544 + TILE * 8448, 1024, uint32(0))
    blocks = (numel + 1023) // 1024
    for tile in range(first, last):
        begin, end = tile * TILE, min(tile * TILE + TILE, blocks)
        if source == FROM_WORDS:
            for s in range(steps):
                _sweep(begin, end, memory, tasks + s * stride, like)
            continue
        for block in range(begin, end):
            k = block - begin
            mine, spots = chosen[k * 1024 : k * 1024 + 1024], at[k * 1024 : k * 1024 + 1024]
            old = theta[block * 1024 : min(block * 1024 + 1024, numel)]
            counts[k] = _choose(old, bits, block * 1024, source == FROM_BITS, low, span, mine)
            if counts[k] > CROWDED:
                counts[k] = -1
                continue
            used[k] = _number_groups(mine, spots, groups[k * 128 : k * 128 + 128], place, counts[k], signs)
            for j in range(counts[k]):
                state[k * 1024 + j] = old[mine[j]]
        for s in range(steps):
            task = array_at(tasks + s * stride, width, int64(0))
            decay, fresh = float_of(uint32(task[DECAY])), True
            for block in range(begin, end):
                k = block - begin
                count = counts[k]
                if count < 0:
                    _sweep(block, block + 1, memory, tasks + s * stride, like)
                if count <= 0:
                    continue
                spots, here = at[k * 1024 : k * 1024 + 1024], state[k * 1024 : k * 1024 + 1024]
                some = groups[k * 128 : k * 128 + 128]
                for sample in range(samples):
                    target, scale = delta if sample == 0 else part, float_of(uint32(task[ROWS + ROW * sample + 5]))
                    if signs:
                        if samples > 1 or fresh:
                            fill_words(words, block >> 4, task, sample)
                            fresh = False
                        _gather(halves, spots, drawn, count)
                        _fill_some_signs(drawn, spots, target, count, scale, 2 * (block & 15))
                    else:
                        _fill_some(words, some, used[k], task, block, sample)
                        _gather(halves, spots, drawn, count)
                        _fill_some_normals(drawn, spots, target, count, scale)
                    if sample > 0:
                        _add(delta, part, count)
                if decay != float32(0.0):
                    _add_some_decay(here, delta, count, decay)
                if task[ROUNDING]:
                    _fill_some(other, some, used[k], task, block, samples + 1)
                    _gather(other_halves, spots, drawn, count)
                    _step_some_stochastically(here, delta, drawn, spots, count, low, span)
                else:
                    _step_some(here, delta, count, low, span)
        for block in range(begin, end):
            k = block - begin
            mine, old = chosen[k * 1024 : k * 1024 + 1024], theta[block * 1024 : min(block * 1024 + 1024, numel)]
            for j in range(counts[k]):
                old[mine[j]] = state[k * 1024 + j]


def compile_replay(like: Any) -> Any:
    """Compile the pass for a format of weights, or load it from numba's cache.

    Args:
        like: Scalar whose type tells the format.

    Returns:
        numba's C function object: its ``address`` and ``cache_hits``.
    """
    stamp = _source_stamp(_numba_passes)

    def replay(first, last, memory, argument):
        _ = stamp
        _replay(first, last, memory, argument, like)

    signature = types.void(*[types.int64] * 4)
    return _cached(cfunc(signature, cache=True), cfunc(signature), replay)
