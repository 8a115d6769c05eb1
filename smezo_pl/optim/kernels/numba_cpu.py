"""The fused passes on the CPU, compiled by numba for the processor they run on; no system compiler is needed.

The first call of a pass for a dtype compiles for some seconds and keeps the result in numba's cache on disk
(``__pycache__`` beside the code, else the user's cache folder; ``NUMBA_CACHE_DIR`` overrides). Threads follow
``torch.get_num_threads()``; what comes out does not depend on their number.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from smezo_pl.optim.kernels import _numba_passes as passes
from smezo_pl.optim.kernels import base
from smezo_pl.optim.kernels._numba_words import (
    BITS,
    DRAWN,
    NEAREST,
    NUMEL,
    OUT,
    RESULT,
    ROW,
    ROWS,
    START,
    STOCHASTIC,
    THETA,
)
from smezo_pl.optim.kernels.base import Draw, Factored, FactoredUpdate, Update
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import DENSE, Mask
from smezo_pl.optim.noise import BLOCK, MASK, NOISE, ROUNDING, Distribution, Stream

log = logging.getLogger(__name__)

_LIKE = {torch.float32: np.uint32(0), torch.bfloat16: np.uint16(0), torch.float16: np.int16(0)}
_SERIAL = 1 << 15  # weights; waking a second thread takes about as long as one thread takes for these
_STEP = {"sweep": 64, "pack": 64, "count": 8, "move": 1, "histogram": 1 << 16}
"""Units of work that a thread takes at a time: about 30 microseconds."""
_LOCK = threading.Lock()  # one of numba's threading layers (workqueue) aborts the process when entered twice at once


class NumbaKernel(TorchKernel):
    """Compiled loops over CPU memory (see `Kernel` for what each pass computes); torch for float64 weights."""

    name = "numba"

    def perturb(
        self, theta: Tensor, out: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float
    ) -> None:
        """Write ``theta + scale * m * z`` to ``out``; see `Kernel.perturb`."""
        base.check_pair(theta, out)
        if theta.dtype == torch.float64:
            return super().perturb(theta, out, mask, noise, stream, scale)
        if scale == 0.0:
            if out.data_ptr() != theta.data_ptr():
                out.copy_(theta)
            return None
        # Adding is subtracting the negative, to the last bit: one compiled pass serves both.
        task = _task(out, noise, theta, mask, [stream], [-scale])
        return _run("sweep", theta, *_blocks(stream.start, theta.numel()), task)

    def perturb_rows(
        self, theta: Tensor, out: Tensor, rows: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float
    ) -> None:
        """`perturb` some rows of a matrix; see `Kernel.perturb_rows`."""
        base.check_rows(theta, out, rows)
        if theta.dtype == torch.float64 or scale == 0.0:
            return super().perturb_rows(theta, out, rows, mask, noise, stream, scale)
        width, size = theta.shape[1], theta.element_size()
        first = rows.numpy() * width  # index of the first weight of each row
        task = _task(out, noise, theta.view(-1), mask, [stream], [-scale])
        tasks = np.tile(np.array(task, np.int64), (len(first), 1))
        tasks[:, NUMEL], tasks[:, START] = width, first + stream.start
        tasks[:, THETA] += first * size
        tasks[:, OUT] += np.arange(len(first)) * (width * size)
        if mask.rule == "packed":
            tasks[:, BITS] += first // 8
        return _run_rows(tasks, out.dtype, out.numel())

    def draw_rows(self, draws: Sequence[Draw], noise: Distribution) -> None:
        """Vectors of noise, all in one parallel pass; see `Kernel.draw_rows`."""
        for out, starts, _ in draws:
            base.check_draws(out, starts)
            _check_device(out)
        if not any(draw.starts for draw in draws):
            return
        first = draws[0].out
        task = _task(first, noise, first.view(-1), DENSE, [draws[0].stream], [1.0])
        task[RESULT] = DRAWN
        counts = np.array([len(starts) for _, starts, _ in draws])
        tasks = np.tile(np.array(task, np.int64), (counts.sum(), 1))
        of_draw = [(out.data_ptr(), out.shape[1], at.start, *_row(at, NOISE, _ONE)) for out, _, at in draws]
        address, numel, start, *row = np.array(of_draw, np.int64).repeat(counts, 0).T
        within = np.arange(len(tasks)) - (counts.cumsum() - counts).repeat(counts)
        tasks[:, NUMEL], tasks[:, START] = numel, start + np.concatenate([starts for _, starts, _ in draws])
        tasks[:, THETA] = tasks[:, OUT] = address + within * numel * first.element_size()
        tasks[:, ROWS : ROWS + ROW] = np.stack(row, 1)
        _run_rows(tasks, first.dtype, sum(out.numel() for out, _, _ in draws))

    def draw(self, theta: Tensor, out: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float) -> None:
        """The noise under the mask alone; see `Kernel.draw`."""
        base.check_pair(theta, out)
        if theta.dtype == torch.float64:
            return super().draw(theta, out, mask, noise, stream, scale)
        task = _task(out, noise, theta, mask, [stream], [scale])
        task[RESULT] = DRAWN
        return _run("sweep", theta, *_blocks(stream.start, theta.numel()), task)

    def perturb_factored(self, theta: Tensor, out: Tensor, factored: Factored) -> None:
        """``theta`` minus a sum of outer products; see `Kernel.perturb_factored`."""
        base.check_pair(theta, out)
        if theta.dtype == torch.float64 or theta.numel() == 0:
            return super().perturb_factored(theta, out, factored)
        base.check_no_stream(factored)
        return _run("sweep", theta, *_blocks(0, theta.numel()), _factored_task(out, "gaussian", theta, DENSE, factored))

    def update_factored(self, update: FactoredUpdate, noise: Distribution) -> None:
        """Update by a sum of outer products; see `Kernel.update_factored`."""
        self.update_all_factored([update], noise)

    def update_all(self, updates: Sequence[Update], noise: Distribution) -> None:
        """Update all tensors in one parallel pass; see `Kernel.update_all`."""
        tasks = []
        for update in updates:
            base.check_weights(update.theta)
            if update.theta.dtype == torch.float64:
                super().update_all([update], noise)
            elif update.decay != 0.0 or any(update.scales):
                tasks.append((update.theta, _task(update.theta, noise, *update)))
        _run_all(tasks)

    def update_all_factored(self, updates: Sequence[FactoredUpdate], noise: Distribution) -> None:
        """Update all tensors in one parallel pass; see `Kernel.update_all_factored`."""
        tasks = []
        for update in updates:
            base.check_weights(update.theta)
            if update.theta.dtype == torch.float64 or update.theta.numel() == 0:
                super().update_factored(update, noise)
            elif update.decay != 0.0 or any(update.factored.scales):
                tasks.append((update.theta, _factored_task(update.theta, noise, *update)))
        _run_all(tasks)

    def select(self, theta: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Packed mask and a copy of the weights under it; see `Kernel.select`."""
        bits = self.pack(theta, mask)
        if theta.dtype == torch.float64:
            return super().select(theta, Mask("packed", bits=bits))
        ends = _ends(theta, bits)
        saved = torch.empty(int(ends[-1]) if ends.size else 0, dtype=theta.dtype)
        _move(theta, bits, saved, ends, False)
        return bits, saved

    def restore(self, theta: Tensor, bits: Tensor, saved: Tensor) -> None:
        """Put back what `select` saved; see `Kernel.restore`."""
        base.check_weights(theta)
        _check_device(theta)
        base.check_bits(theta, bits)
        if theta.dtype == torch.float64:
            return super().restore(theta, bits, saved)
        ends = _ends(theta, bits)
        base.check_saved(theta, saved, int(ends[-1]) if ends.size else 0)
        return _move(theta, bits, saved, ends, True)

    def pack(self, theta: Tensor, mask: Mask) -> Tensor:
        """The mask, one bit per weight; see `Kernel.pack`."""
        base.check_weights(theta)
        _check_device(theta)
        base.check_mask(theta, mask)
        if theta.dtype == torch.float64:
            return super().pack(theta, mask)
        if mask.rule == "packed" and mask.bits is not None:
            return mask.bits.clone()
        bits = torch.empty(base.packed_size(theta.numel()), dtype=torch.uint8)
        stream = mask.stream or Stream(0, 0, 0, 0)
        task = [theta.data_ptr(), 0, theta.numel(), stream.start, 0, 0, 0, 0, *_mask_fields(mask, theta.dtype)]
        task[BITS] = bits.data_ptr()
        task += _NO_OUTER
        _run("pack", theta, 0, -(-theta.numel() // BLOCK), task + _row(stream, MASK))
        return bits

    def histogram(self, theta: Tensor, shift: int, prefix: int | None) -> Tensor:
        """Counts of magnitude codes; see `Kernel.histogram`."""
        base.check_weights(theta)
        _check_device(theta)
        if theta.dtype == torch.float64:
            return super().histogram(theta, shift, prefix)
        counts = np.zeros((_threads(theta.numel()), 1 << 16), np.int64)
        task = [theta.data_ptr(), shift, -1 if prefix is None else prefix]
        _run("histogram", theta, 0, theta.numel(), task, counts)
        return torch.from_numpy(counts.sum(0))


_NO_ROW, _NO_OUTER = [0] * ROW, [0] * 4
_ONE = base.float_bits(1.0)


def _blocks(start: int, numel: int) -> tuple[int, int]:
    """Blocks of noise that the elements ``[start, start + numel)`` lie in."""
    return start // BLOCK, (start + numel + BLOCK - 1) // BLOCK


def _task(
    out: Tensor,
    noise: Distribution,
    theta: Tensor,
    mask: Mask,
    streams: Sequence[Stream],
    scales: Sequence[float],
    decay: float = 0.0,
    rounding: Stream | None = None,
) -> list[int]:
    """What the compiled sweep needs to know of an `Update` written to ``out``, as it reads it."""
    _check_device(theta)
    base.check_mask(theta, mask)
    start = base.check_streams(mask, streams, scales, rounding)
    rows = zip(streams, map(base.float_bits, scales), strict=True)
    return _layout(out, noise, theta, mask, start, rows, decay, rounding, _NO_OUTER)


def _factored_task(
    out: Tensor,
    noise: Distribution,
    theta: Tensor,
    mask: Mask,
    factored: Factored,
    decay: float = 0.0,
    rounding: Stream | None = None,
) -> list[int]:
    """The same of a `FactoredUpdate`."""
    _check_device(theta)
    base.check_mask(theta, mask)
    start = base.check_factored(theta, factored, mask, rounding)
    left, right, scales, stream = factored
    outer = [left.data_ptr(), right.data_ptr(), len(scales), right.shape[1]]
    rows = [] if stream is None else [(stream, _ONE)]
    task = _layout(out, noise, theta, mask, start, rows, decay, rounding, outer)
    return task + array("I", array("f", scales).tobytes()).tolist()


def _layout(
    out: Tensor,
    noise: Distribution,
    theta: Tensor,
    mask: Mask,
    start: int,
    rows: Iterable[tuple[Stream, int]],
    decay: float,
    rounding: Stream | None,
    outer: list[int],
) -> list[int]:
    stochastic = rounding is not None and theta.element_size() == 2
    drawn = [_row(stream, NOISE, scale) for stream, scale in rows]
    task = [theta.data_ptr(), out.data_ptr(), theta.numel(), start, int(noise != "gaussian"), len(drawn)]
    task += [base.float_bits(decay), STOCHASTIC if stochastic else NEAREST, *_mask_fields(mask, theta.dtype), *outer]
    for row in drawn:
        task += row
    task += _NO_ROW if mask.stream is None else _row(mask.stream, MASK)
    task += _row(rounding, ROUNDING) if stochastic and rounding is not None else _NO_ROW
    return task


def _run_all(tasks: Sequence[tuple[Tensor, list[int]]]) -> None:
    """Sweep over several tensors at once, each by its own task."""
    arguments, table, pieces, numel, step = array("q"), array("q"), 0, 0, _STEP["sweep"]
    for theta, task in tasks:
        first, last = _blocks(task[START], theta.numel())
        pieces, numel = pieces + (last - first + step - 1) // step, numel + theta.numel()
        table.extend((_compiled("sweep", theta.dtype).address, pieces, first, last, step, len(arguments)))
        arguments.extend(task)
    address = arguments.buffer_info()[0]
    for index in range(passes.TABLE_ROW - 1, len(table), passes.TABLE_ROW):
        table[index] = address + arguments.itemsize * table[index]
    _run_table(table.buffer_info()[0], len(table) // passes.TABLE_ROW, pieces, numel)


def _run_rows(tasks: Any, dtype: torch.dtype, numel: int) -> None:
    """Sweep over rows of ``numel`` elements in all, each by its own row of ``tasks``."""
    table = np.empty((len(tasks), passes.TABLE_ROW), np.int64)
    table[:, 0] = _compiled("sweep", dtype).address
    table[:, 2], table[:, 3] = tasks[:, START] // BLOCK, -(-(tasks[:, START] + tasks[:, NUMEL]) // BLOCK)
    table[:, 4], table[:, 5] = _STEP["sweep"], tasks.ctypes.data + np.arange(len(tasks)) * tasks.strides[0]
    table[:, 1] = np.cumsum(-((table[:, 2] - table[:, 3]) // table[:, 4]))
    _run_table(table.ctypes.data, len(tasks), int(table[-1, 1]) if len(tasks) else 0, numel)


def _move(theta: Tensor, bits: Tensor, saved: Tensor, ends: Any, back: bool) -> None:
    task = [theta.data_ptr(), bits.data_ptr(), saved.data_ptr(), ends.ctypes.data, theta.numel(), int(back)]
    _run("move", theta, 0, ends.size, task)


def _ends(theta: Tensor, bits: Tensor) -> Any:
    """How many weights are selected up to the end of each chunk of bits."""
    counts = np.zeros(-(-bits.numel() // passes.CHUNK), np.int64)
    _run("count", theta, 0, counts.size, [bits.data_ptr(), bits.numel(), counts.ctypes.data])
    return np.cumsum(counts)


def _check_device(theta: Tensor) -> None:
    if not theta.is_cpu:
        raise ValueError(f"the numba kernel works on CPU memory only, got a tensor on {theta.device}")


def _row(stream: Stream, kind: int, scale_bits: int = 0) -> list[int]:
    seed, step, sample = stream.seed, stream.step, stream.sample | kind << 24
    return [seed & 0xFFFFFFFF, seed >> 32, stream.tensor, step, sample, scale_bits]


def _mask_fields(mask: Mask, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """A mask as source, low, span, level and bits of a task."""
    if mask.rule == "random":
        return passes.FROM_WORDS, 0, 0x7FFFFFFF, min(max(mask.level, 0), 65536), 0
    if mask.rule == "packed" and mask.bits is not None:
        return passes.FROM_BITS, 0, 0x7FFFFFFF, 0, mask.bits.data_ptr()
    return passes.FROM_THRESHOLD, *base.code_range(mask.rule, mask.threshold, dtype), 0, 0


def _threads(numel: int) -> int:
    if numel <= _SERIAL:
        return 1
    limit: int = vars(numba.config)["NUMBA_NUM_THREADS"]  # set at import, so unknown to type checkers
    return max(1, min(torch.get_num_threads(), limit))


class _Scratch(threading.local):
    """Working memory of a call, kept: allocating them took longer than a small tensor's pass."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)
        self.address = 0
        self.next = np.zeros(1, np.int64)
        self.next_address = self.next.ctypes.data

    def counter(self) -> int:
        """Address of an int64 that is 0."""
        self.next[0] = 0
        return self.next_address

    def working_memory(self, threads: int) -> int:
        """Address of memory for so many threads."""
        size = threads * passes.MEMORY + 64
        if self.memory.size < size:
            self.memory = np.empty(size, np.uint8)
            # Vectors that lie across two cache lines cost a third of the speed.
            self.address = (self.memory.ctypes.data + 63) & -64
        return self.address


_SCRATCH = _Scratch()


def _run(name: str, theta: Tensor, first: int, last: int, task: list[int], memory: Any = None) -> None:
    """Run a pass over its units of work ``[first, last)``, on as many threads as pay."""
    numel = theta.numel()
    if numel == 0:
        return
    threads, function = _threads(numel), _compiled(name, theta.dtype)
    arguments = array("q", task)  # lives until the pass has run
    if threads == 1:
        memory_of_one = _SCRATCH.working_memory(1) if memory is None else memory.ctypes.data
        function.ctypes(first, last, memory_of_one, arguments.buffer_info()[0])
        return
    step = max(1, min(_STEP[name], (last - first) // (4 * threads)))  # so that small tensors are shared out evenly
    pieces = -(-(last - first) // step)
    table = array("q", (function.address, pieces, first, last, step, arguments.buffer_info()[0]))
    _run_table(table.buffer_info()[0], 1, pieces, numel, memory)


def _run_table(table: int, rows: int, pieces: int, numel: int, memory: Any = None) -> None:
    """Run the passes of a table (see `compile_table`) over ``numel`` weights in all."""
    if pieces == 0:
        return
    threads = _threads(numel)
    if memory is None:
        address, stride = _SCRATCH.working_memory(threads), passes.MEMORY
    else:
        address, stride = memory.ctypes.data, memory.strides[0]
    units = (table, rows, pieces, threads, _SCRATCH.counter(), address, stride)
    if threads == 1:
        _table(False)(*units)
        return
    with _LOCK:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            _table(True)(*units)
        finally:
            numba.set_num_threads(before)


@functools.cache
def _compiled(name: str, dtype: torch.dtype) -> Any:
    before = time.perf_counter()
    compiled = passes.compile_pass(name, _LIKE[dtype])
    if not compiled.cache_hits:
        what, seconds = f"{name} for {str(dtype).removeprefix('torch.')}", time.perf_counter() - before
        log.info("numba compiled the pass %s in %.1f s; the next run finds it on disk", what, seconds)
    return compiled


_table = functools.cache(passes.compile_table)
