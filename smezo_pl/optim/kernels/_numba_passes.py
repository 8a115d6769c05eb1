# mypy: ignore-errors
# numba compiles this file: its functions have no Python types, and its intrinsics take one argument less than declared.
"""The compiled passes of the numba kernel (`smezo_pl.optim.kernels.numba_cpu` calls them).

A pass is a C function ``(first, last, memory, task)`` over a range of its units of work, with the addresses of its
working memory and of its arguments. So one small parallel function, compiled once, serves all passes and dtypes.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, float32, int64, njit, prange, types, uint8, uint32, uint64
from numba.extending import intrinsic

from smezo_pl.optim import noise
from smezo_pl.optim.kernels import _numba_outer, _numba_words
from smezo_pl.optim.kernels._numba_outer import OUTER_MEMORY, TILE, fill_outer
from smezo_pl.optim.kernels._numba_words import (
    BITS,
    DECAY,
    DRAWN,
    LEVEL,
    LOW,
    NUMEL,
    OUT,
    RESULT,
    ROW,
    ROWS,
    SAMPLES,
    SOURCE,
    SPAN,
    START,
    STOCHASTIC,
    TERMS,
    THETA,
    array_at,
    count_ones,
    fill_delta,
    fill_halves,
    fill_words,
    float_of,
    magnitude_of,
    nearest,
    stochastic,
    trailing_zeros,
    wide_vectors,
    widen,
)

log = logging.getLogger(__name__)

MEMORY = 20480 + OUTER_MEMORY
"""Bytes of working memory of a thread: words, two vectors of noise, the mask, words for rounding, other words; then
what sums of outer products need."""

CHUNK = 8192
"""Bytes of packed mask in a unit of work of `_count` and `_move`."""

TABLE_ROW = 6
"""Entries of a row of the table of passes that `compile_table` describes."""

FROM_THRESHOLD, FROM_WORDS, FROM_BITS = 0, 1, 2
"""Where a mask comes from: a range of magnitude codes, 16-bit words below a level, packed bits."""

_ALL = np.uint32(0xFFFFFFFF)


# In the passes, `skip` is all ones where a weight stays out. The same memory is never both one array's source and
# another one's target (LLVM would take a scalar loop): hence the twins that work in place.


@njit(nogil=True)
def _fill_skip(words, halfwords, flags, skip, bits, task, block, row, offset):
    """``skip`` of a block from random words or from packed bits; ``offset`` is the local index of its element 0."""
    wide_vectors()
    if task[SOURCE] == FROM_WORDS:
        level = uint32(task[LEVEL])
        fill_words(words, block, task, row)
        fill_halves(halfwords, skip)
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


@njit(nogil=True)
def _apply(theta, out, delta, skip, low, span):
    wide_vectors()
    for i in range(theta.size):
        code = theta[i]
        new = nearest(widen(code) - delta[i], code)
        out[i] = new if _is_active(magnitude_of(code), skip[i], low, span) else code


@njit(nogil=True)
def _apply_in_place(theta, delta, skip, low, span):
    wide_vectors()
    for i in range(theta.size):
        code = theta[i]
        new = nearest(widen(code) - delta[i], code)
        theta[i] = new if _is_active(magnitude_of(code), skip[i], low, span) else code


@njit(nogil=True)
def _apply_stochastically(theta, delta, word, skip, low, span):
    wide_vectors()
    for i in range(theta.size):
        code = theta[i]
        new = stochastic(widen(code) - delta[i], word[i], code)
        theta[i] = new if _is_active(magnitude_of(code), skip[i], low, span) else code


@njit(nogil=True)
def _draw(theta, out, delta, skip, low, span):
    wide_vectors()
    # Two loops, so that one serves noise in the place of the weights too.
    for i in range(theta.size):
        delta[i] = delta[i] if _is_active(magnitude_of(theta[i]), skip[i], low, span) else float32(0.0)
    for i in range(theta.size):
        out[i] = nearest(delta[i], out[i])


@njit(nogil=True)
def _multiply(delta, z):
    wide_vectors()
    for i in range(delta.size):
        delta[i] *= z[i]


@njit(nogil=True)
def _add_decay(theta, delta, decay):
    wide_vectors()
    for i in range(theta.size):
        delta[i] += widen(theta[i]) * decay


@njit(nogil=True)
def _shift_down(buffer, by, count):
    for j in range(count):
        buffer[j] = buffer[by + j]


@njit(nogil=True)
def _sweep(first, last, memory, address, like):
    """``out = round(theta - (sum of scale * z + decay * theta))`` under the mask, for the blocks ``[first, last)``.

    Blocks are counted by global index. ``out`` may be ``theta``; stochastic rounding is done in place only. With terms
    the sum is one of outer products, times ``z`` if there is a sample. `DRAWN` leaves ``theta`` out, and the rest 0.
    """
    words, half = array_at(memory, 256, uint64(0)), array_at(memory, 512, uint32(0))
    delta, part = array_at(memory + 2048, 1024, float32(0)), array_at(memory + 6144, 1024, float32(0))
    skip, word = array_at(memory + 10240, 1024, uint32(0)), array_at(memory + 14336, 1024, uint32(0))
    other, other_half = array_at(memory + 18432, 256, uint64(0)), array_at(memory + 18432, 512, uint32(0))
    flags = array_at(memory + 18432, 1024, uint8(0))
    task = array_at(address, ROWS, int64(0))
    numel, start, samples = task[NUMEL], task[START], task[SAMPLES]
    task = array_at(address, ROWS + ROW * (samples + 2), int64(0))
    terms, result = task[TERMS], task[RESULT]
    scales = array_at(address + 8 * task.size, terms, int64(0))
    tile, tile_begin, tile_end = array_at(memory + 20480, 1024 * TILE, float32(0)), 0, 0
    low, span, decay = uint32(task[LOW]), uint32(task[SPAN]), float_of(uint32(task[DECAY]))
    theta, out = array_at(task[THETA], numel, like), array_at(task[OUT], numel, like)
    bits = array_at(task[BITS], (numel + 7) // 8, uint8(0))
    skip[:] = uint32(0)
    for block in range(first, last):
        offset = block * 1024 - start
        begin, end = max(offset, 0), min(offset + 1024, numel)
        count, missing = end - begin, begin - offset
        old = theta[begin:end]
        ahead = end * old.itemsize
        size = (min(end + 1024, numel) - end) * old.itemsize if block + 1 < last else 0
        if terms == 0 or samples > 0:
            from_, to = task[THETA] + ahead, task[OUT] + ahead
            fill_delta(words, half, part, delta, task, block, block == first, from_, to, size)
        if task[SOURCE] != FROM_THRESHOLD:
            _fill_skip(other, other_half, flags, skip, bits, task, block, samples, offset)
        if result == STOCHASTIC:
            fill_words(other, block, task, samples + 1)
            fill_halves(other_half, word)
        if missing:
            _shift_down(delta, missing, count)
            _shift_down(skip, missing, count)
            _shift_down(word, missing, count)
        change = delta[:count]
        if terms > 0:
            if begin >= tile_end:
                tile_begin, tile_end = begin, min(min(block + TILE, last) * 1024 - start, numel)
                fill_outer(memory + 20480, task, scales, tile_begin, tile_end, old.itemsize)
            change = tile[begin - tile_begin : end - tile_begin]
            if samples > 0:
                _multiply(change, delta)
        if decay != float32(0.0):
            _add_decay(old, change, decay)
        if result == DRAWN:
            _draw(old, out[begin:end], change, skip, low, span)
        elif result == STOCHASTIC:
            _apply_stochastically(old, change, word, skip, low, span)
        elif task[THETA] == task[OUT]:
            _apply_in_place(old, change, skip, low, span)
        else:
            _apply(old, out[begin:end], change, skip, low, span)


@njit(nogil=True)
def _pack(first, last, memory, address, like):
    """The mask of the weights ``[1024 * first, 1024 * last)``, counted locally, as bits to the address BITS."""
    words, half = array_at(memory, 256, uint64(0)), array_at(memory, 512, uint32(0))
    flags, eights = array_at(memory + 2048, 1024, uint8(0)), array_at(memory + 2048, 128, uint64(0))
    skip, drawn = array_at(memory + 6144, 1024, uint32(0)), array_at(memory + 10240, 1024, uint32(0))
    task = array_at(address, ROWS + ROW, int64(0))
    numel, start, low, span = task[NUMEL], task[START], uint32(task[LOW]), uint32(task[SPAN])
    theta, bits = array_at(task[THETA], numel, like), array_at(task[BITS], (numel + 7) // 8, uint8(0))
    skip[:] = uint32(0)
    for tile in range(first, last):
        begin, end = tile * 1024, min(tile * 1024 + 1024, numel)
        done = 0
        while task[SOURCE] == FROM_WORDS and done < end - begin:
            # A tile of a shard may lie across two blocks.
            index = start + begin + done
            _fill_skip(words, half, flags, drawn, bits, task, index // 1024, 0, 0)
            count = min(1024 - index % 1024, end - begin - done)
            for j in range(count):
                skip[done + j] = drawn[index % 1024 + j]
            done += count
        part = theta[begin:end]
        flags[:] = uint8(0)
        for j in range(part.size):
            flags[j] = uint8(1) if _is_active(magnitude_of(part[j]), skip[j], low, span) else uint8(0)
        target = bits[begin // 8 : (end + 7) // 8]
        for j in range(target.size):
            # The product gathers bit 0 of the eight bytes in the topmost byte.
            target[j] = uint8((eights[j] * uint64(0x0102040810204080)) >> uint64(56))


@njit(nogil=True)
def _count(first, last, memory, address, like):
    """Count the bits that are set in each chunk of `CHUNK` bytes.

    The task holds the address of the bits, their number of bytes, and the address of the result.
    """
    task = array_at(address, 3, int64(0))
    bits, counts = array_at(task[0], task[1], uint8(0)), array_at(task[2], last, int64(0))
    for chunk in range(first, last):
        part = bits[chunk * CHUNK : min(chunk * CHUNK + CHUNK, bits.size)]
        total = uint64(0)
        for j in range(part.size):
            total += count_ones(uint64(part[j]))
        counts[chunk] = int64(total)


@njit(nogil=True)
def _move(first, last, memory, address, like):
    """Copy the weights under a mask to a compact array, or back, in chunks of `CHUNK` bytes of the mask.

    The task holds the addresses of weights, bits, compact array and of the numbers of weights before each chunk's end,
    then the number of weights, and whether to copy back.
    """
    task = array_at(address, 6, int64(0))
    numel, back = task[4], task[5] != 0
    theta, size = array_at(task[0], numel, like), (numel + 7) // 8
    bits, saved = array_at(task[1], size, uint8(0)), array_at(task[2], numel, like)
    ends = array_at(task[3], last, int64(0))
    for chunk in range(first, last):
        slot = ends[chunk - 1] if chunk > 0 else 0
        stop = min(chunk * CHUNK + CHUNK, size)
        for j in range(chunk * CHUNK, stop, 8):
            word = uint64(0)
            for k in range(min(8, stop - j)):
                word |= uint64(bits[j + k]) << uint64(8 * k)
            while word != 0:
                i = 8 * j + int64(trailing_zeros(word))
                if back:
                    theta[i] = saved[slot]
                else:
                    saved[slot] = theta[i]
                slot += 1
                word &= word - uint64(1)


@njit(nogil=True)
def _histogram(first, last, memory, address, like):
    """Count digits of the weights ``[first, last)`` in 65536 int64 at ``memory``.

    The task holds the address of the weights, the shift and the prefix (-1: none).
    """
    task, counts = array_at(address, 3, int64(0)), array_at(memory, 65536, int64(0))
    theta, shift, prefix = array_at(task[0], last, like), uint32(task[1]), task[2]
    for i in range(first, last):
        digit = magnitude_of(theta[i]) >> shift
        if prefix < 0 or int64(digit >> uint32(16)) == prefix:
            counts[digit & uint32(0xFFFF)] += 1


@intrinsic
def _call(typing_context, function, first, last, memory, task):
    """Call the pass at an address."""

    def generate(context, builder, signature, args):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _fetch_and_increment(typing_context, address):
    def generate(context, builder, signature, args):
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], word.as_pointer()), word(1), "monotonic")

    return types.int64(types.int64), generate


def compile_pass(name: str, like: Any) -> Any:
    """Compile a pass for a format of weights, or load it from numba's cache.

    Args:
        name: ``sweep``, ``pack``, ``count``, ``move`` or ``histogram``.
        like: Scalar whose type tells the format.

    Returns:
        numba's C function object: its ``address`` and ``cache_hits``.
    """
    # numba's cache compares what a closure holds. By the stamp it notices a change in any of the files; the passes are
    # globals, because a compiled function in a closure does not compare equal in the next process.
    stamp = _source_stamp()

    def sweep(first, last, memory, task):
        _ = stamp
        _sweep(first, last, memory, task, like)

    def pack(first, last, memory, task):
        _ = stamp
        _pack(first, last, memory, task, like)

    def count(first, last, memory, task):
        _ = stamp
        _count(first, last, memory, task, like)

    def move(first, last, memory, task):
        _ = stamp
        _move(first, last, memory, task, like)

    def histogram(first, last, memory, task):
        _ = stamp
        _histogram(first, last, memory, task, like)

    entry = {"sweep": sweep, "pack": pack, "count": count, "move": move, "histogram": histogram}[name]
    signature = types.void(*[types.int64] * 4)
    return _cached(cfunc(signature, cache=True), cfunc(signature), entry)


@njit(nogil=True)
def _take_pieces(table, rows, total, next, memory):
    entries = array_at(table, rows * TABLE_ROW, int64(0))
    at, done = 0, 0
    piece = _fetch_and_increment(next)
    while piece < total:
        while piece >= entries[at + 1]:
            done = entries[at + 1]
            at += TABLE_ROW
        begin = entries[at + 2] + entries[at + 4] * (piece - done)
        end = min(begin + entries[at + 4], entries[at + 3])
        _call(entries[at], begin, end, memory, entries[at + 5])
        piece = _fetch_and_increment(next)


def compile_table(parallel: bool) -> Any:
    """Compile what shares passes out to threads: ``(table, rows, total, threads, next, memory, stride)``.

    ``table`` is the address of `TABLE_ROW` int64 for each pass: its function, the number of pieces up to its end, its
    first and last unit of work, the units of a piece, its task. ``total`` counts the pieces of all passes, which the
    threads take one by one, so one that starts late or is interrupted holds up no other; ``next`` is the address of an
    int64 that begins as 0.

    Args:
        parallel: Whether for several threads. For one it keeps away from numba's threads: a process that is forked
            after they were started is ended by numba when it uses them.

    Returns:
        numba's dispatcher.
    """

    def table(table, rows, total, threads, next, memory, stride):
        for t in prange(threads):
            _take_pieces(table, rows, total, next, memory + t * stride)

    def table_alone(table, rows, total, threads, next, memory, stride):
        _take_pieces(table, rows, total, next, memory)

    signature = types.void(*[types.int64] * 7)
    options = {"parallel": parallel, "nogil": True}
    function = table if parallel else table_alone  # numba's cache tells functions apart by name, not by option
    return _cached(njit(signature, cache=True, **options), njit(signature, **options), function)


def _source_stamp():
    digest = hashlib.sha256()
    for module in (noise, _numba_words, _numba_outer):
        digest.update(Path(module.__file__).read_bytes())
    return int.from_bytes(digest.digest()[:4], "big")


def _cached(decorate, decorate_uncached, function):
    """Keep compiled code beside this file or in the user's cache folder; do without where neither can be written."""
    try:
        return decorate(function)
    except (RuntimeError, OSError) as error:
        log.info("compiled kernels cannot be kept on disk, every run compiles anew: %s", error)
        return decorate_uncached(function)
