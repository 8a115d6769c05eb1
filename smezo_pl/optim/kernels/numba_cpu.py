"""The fused passes on the CPU, compiled by numba for the processor they run on; no system compiler is needed.

The first call for a dtype compiles for some seconds and keeps the result in numba's cache on disk (``__pycache__`` of
the installed package, else the user's cache folder; ``NUMBA_CACHE_DIR`` overrides). Threads follow
``torch.get_num_threads()``; what a thread computes does not depend on their number.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from smezo_pl.optim.kernels import _numba_passes as passes
from smezo_pl.optim.kernels._common import (
    INFINITY,
    check_bits,
    check_mask,
    check_pair,
    check_update,
    check_weights,
    packed_size,
    threshold_code,
)
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import MASK, NOISE, ROUNDING, Law, Stream

log = logging.getLogger(__name__)

_LIKE: dict[torch.dtype, Any] = {
    torch.float32: np.uint32(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
}
_SERIAL = 1 << 17  # weights; waking a second thread takes about as long as a thread takes for these
_LOCK = threading.Lock()  # one of numba's threading layers (workqueue) aborts the process when entered twice at once
_REFERENCE = TorchKernel()


class NumbaKernel:
    """Compiled loops over CPU memory (see `Kernel` for what each pass computes)."""

    name = "numba"

    def perturb(self, theta: Tensor, out: Tensor, mask: Mask, law: Law, stream: Stream, scale: float) -> None:
        """Write ``theta + scale * m * z`` to ``out``; see `Kernel.perturb`."""
        check_pair(theta, out)
        check_mask(theta, mask)
        if theta.dtype == torch.float64:
            return _REFERENCE.perturb(theta, out, mask, law, stream, scale)
        if scale != 0.0:
            # Adding is subtracting the negative, to the last bit: one compiled pass serves both.
            return _sweep(theta, out, mask, law, [stream], [-scale], 0.0, None)
        if out.data_ptr() != theta.data_ptr():
            out.copy_(theta)
        return None

    def update(
        self,
        theta: Tensor,
        mask: Mask,
        law: Law,
        streams: Sequence[Stream],
        scales: Sequence[float],
        decay: float = 0.0,
        rounding: Stream | None = None,
    ) -> None:
        """Subtract ``m * (sum of scale * z + decay * theta)`` from ``theta``; see `Kernel.update`."""
        check_weights(theta)
        check_mask(theta, mask)
        check_update(streams, scales)
        if theta.dtype == torch.float64:
            return _REFERENCE.update(theta, mask, law, streams, scales, decay, rounding)
        if decay != 0.0 or any(scales):
            _sweep(theta, theta, mask, law, streams, scales, decay, None if theta.element_size() > 2 else rounding)
        return None

    def select(self, theta: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Packed mask and a copy of the weights under it; see `Kernel.select`."""
        bits = self.pack(theta, mask)
        if theta.dtype == torch.float64:
            return _REFERENCE.select(theta, Mask("packed", bits=bits))
        ends = _ends(bits)
        saved = torch.empty(int(ends[-1]) if ends.size else 0, dtype=theta.dtype)
        _move(theta, bits, saved, ends, False)
        return bits, saved

    def restore(self, theta: Tensor, bits: Tensor, saved: Tensor) -> None:
        """Put back what `select` saved; see `Kernel.restore`."""
        _check_cpu(theta)
        check_bits(theta, bits)
        if theta.dtype == torch.float64:
            return _REFERENCE.restore(theta, bits, saved)
        ends = _ends(bits)
        count = int(ends[-1]) if ends.size else 0
        if saved.dtype != theta.dtype or saved.shape != (count,) or not saved.is_contiguous():
            raise ValueError(
                f"saved weights must be {theta.dtype} of shape ({count},), got {saved.dtype} of {tuple(saved.shape)}"
            )
        return _move(theta, bits, saved, ends, True)

    def pack(self, theta: Tensor, mask: Mask) -> Tensor:
        """The mask, one bit a weight; see `Kernel.pack`."""
        _check_cpu(theta)
        check_mask(theta, mask)
        if theta.dtype == torch.float64:
            return _REFERENCE.pack(theta, mask)
        if mask.bits is not None and mask.rule == "packed":
            return mask.bits.clone()
        bits = torch.empty(packed_size(theta.numel()), dtype=torch.uint8)
        source, low, span, level, _ = _mask_arguments(mask, theta.dtype)
        streams = _rows([(mask.stream or _NO_STREAM, MASK)])
        threads = _threads(theta.numel())
        memory, address = _memory(threads)
        start = mask.stream.start if mask.stream else 0
        arguments = (theta.data_ptr(), theta.numel(), _LIKE[theta.dtype], start, streams, source, low, span, level)
        tiles = -(-theta.numel() // 1024)
        _run(passes.pack, passes.pack_parallel, threads, theta.dtype, 0, tiles, address, *arguments, bits.data_ptr())
        del memory
        return bits

    def histogram(self, theta: Tensor, shift: int, prefix: int | None) -> Tensor:
        """Counts of magnitude codes; see `Kernel.histogram`."""
        _check_cpu(theta)
        if theta.dtype == torch.float64:
            return _REFERENCE.histogram(theta, shift, prefix)
        threads = _threads(theta.numel())
        counts = np.zeros((threads, 1 << 16), np.int64)
        arguments = (theta.data_ptr(), _LIKE[theta.dtype], shift, -1 if prefix is None else prefix)
        if threads == 1:
            _run(passes.histogram, None, 1, theta.dtype, 0, theta.numel(), *arguments, counts[0])
        else:
            _run(None, passes.histogram_parallel, threads, theta.dtype, theta.numel(), *arguments, counts)
        return torch.from_numpy(counts.sum(0))


_NO_STREAM = Stream(0, 0, 0, 0)


def _sweep(
    theta: Tensor,
    out: Tensor,
    mask: Mask,
    law: Law,
    streams: Sequence[Stream],
    scales: Sequence[float],
    decay: float,
    rounding: Stream | None,
) -> None:
    """Lay out the arguments of the compiled pass and run it."""
    _check_cpu(theta)
    numel, start = theta.numel(), streams[0].start
    if numel == 0:
        return
    others = (*streams[1:], rounding or streams[0], mask.stream or streams[0])
    if any(stream.start != start for stream in others):
        raise ValueError(
            f"all streams of a pass must start at one element, got {sorted({s.start for s in others} | {start})}"
        )
    table = _rows(
        [(s, NOISE) for s in streams] + [(mask.stream or streams[0], MASK), (rounding or streams[0], ROUNDING)]
    )
    threads = _threads(numel)
    memory, address = _memory(threads)
    source, low, span, level, bits = _mask_arguments(mask, theta.dtype)
    _run(
        passes.sweep,
        passes.sweep_parallel,
        threads,
        theta.dtype,
        start // 1024,
        -(-(start + numel) // 1024),
        address,
        theta.data_ptr(),
        out.data_ptr(),
        numel,
        _LIKE[theta.dtype],
        start,
        0 if law == "gaussian" else 1,
        table,
        np.array(scales, np.float32),
        np.float32(decay),
        rounding is not None,
        source,
        low,
        span,
        level,
        bits,
    )
    del memory


def _move(theta: Tensor, bits: Tensor, saved: Tensor, ends: Any, back: bool) -> None:
    threads = _threads(theta.numel())
    arguments = (theta.data_ptr(), theta.numel(), _LIKE[theta.dtype], bits.data_ptr(), saved.data_ptr(), ends, back)
    _run(passes.move, passes.move_parallel, threads, theta.dtype, 0, ends.size, *arguments)


def _ends(bits: Tensor) -> Any:
    """How many weights are selected up to the end of each chunk."""
    counts = np.zeros(-(-bits.numel() // passes.CHUNK), np.int64)
    passes.count(0, counts.size, bits.data_ptr(), bits.numel(), counts)
    return np.cumsum(counts)


def _check_cpu(theta: Tensor) -> None:
    check_weights(theta)
    if theta.device.type != "cpu":
        raise ValueError(f"the numba kernel works on CPU memory only, got a tensor on {theta.device}")


def _mask_arguments(mask: Mask, dtype: torch.dtype) -> tuple[int, Any, Any, Any, int]:
    """A mask as ``source, low, span, level, bits`` of the compiled passes."""
    low, span = 0, 0x7FFFFFFF
    if mask.rule == "random":
        return passes.FROM_WORDS, np.uint32(low), np.uint32(span), np.uint32(min(max(mask.level, 0), 65536)), 0
    if mask.rule == "packed":
        assert mask.bits is not None
        return passes.FROM_BITS, np.uint32(low), np.uint32(span), np.uint32(0), mask.bits.data_ptr()
    if mask.rule != "dense":
        low, span = _code_range(mask.rule, mask.threshold, dtype)
    return passes.FROM_THRESHOLD, np.uint32(low), np.uint32(span), np.uint32(0), 0


@lru_cache(maxsize=65536)
def _code_range(rule: str, threshold: float, dtype: torch.dtype) -> tuple[int, int]:
    """Range of magnitude codes that a rule selects: the lowest, and how far it reaches."""
    limit = threshold_code(threshold, dtype)
    low, high = (0, limit) if rule == "small" else (limit + 1, INFINITY[dtype])
    # A range of one code that no magnitude has stands for the empty one.
    return (low, high - low) if low <= high else (0x80000000, 0)


def _rows(streams: list[tuple[Stream, int]]) -> Any:
    return np.array(
        [(s.seed & 0xFFFFFFFF, s.seed >> 32, s.tensor, s.step, s.sample | kind << 24) for s, kind in streams], np.uint64
    )


def _memory(threads: int) -> tuple[Any, int]:
    """Working memory and its first address on a cache line: vectors across two lines cost a third of the speed."""
    memory = np.empty(threads * passes.MEMORY + 64, np.uint8)
    return memory, (memory.ctypes.data + 63) & -64


def _threads(numel: int) -> int:
    if numel <= _SERIAL:
        return 1
    return max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def _run(serial: Any, parallel: Any, threads: int, dtype: torch.dtype, *arguments: Any) -> None:
    """Call one of the two forms of a compiled pass; say so when it had to be compiled."""
    function: Callable[..., None] = serial if threads == 1 else parallel
    misses = sum(function.stats.cache_misses.values())  # type: ignore[attr-defined]
    before = time.perf_counter()
    if threads == 1:
        function(*arguments)
    else:
        with _LOCK:
            mine = numba.get_num_threads()
            numba.set_num_threads(threads)
            try:
                function(threads, *arguments)
            finally:
                numba.set_num_threads(mine)
    if sum(function.stats.cache_misses.values()) != misses:  # type: ignore[attr-defined]
        seconds = time.perf_counter() - before
        log.info("compiled %s for %s in %.1f s; kept in numba's cache", function.__name__, dtype, seconds)
