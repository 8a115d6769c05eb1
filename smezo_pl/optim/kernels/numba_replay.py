"""Many updates of one tensor in one call: the replay of a record on the CPU.

A replay knows the projected gradients of all steps beforehand, so a tile of weights can take many steps while it lies
in cache, and between two mask refreshes only the selected weights need be touched: a weight outside the mask never
changes, so it never enters it. The bits are those of `NumbaKernel.update`, step by step.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smezo_pl.optim.kernels import _numba_replay as compiled
from smezo_pl.optim.kernels import numba_cpu
from smezo_pl.optim.kernels._common import check_mask, check_weights
from smezo_pl.optim.kernels._numba_words import DECAY, ROW, ROWS
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import BLOCK, MASK, NOISE, ROUNDING, Law, Stream

_TILE = compiled.TILE * BLOCK  # weights of a unit of work

_LOW = 0xFFFFFFFF


def update_many(
    theta: Tensor,
    mask: Mask,
    law: Law,
    first: Stream,
    steps: npt.NDArray[np.int64],
    scales: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    *,
    rounded: bool,
    redrawn: bool = False,
) -> None:
    """Make updates one after the other, each as `Kernel.update` does it.

    Args:
        theta: A whole tensor's weights on the CPU, float32, bfloat16 or float16; updated in place.
        mask: Which of them take part, judged by the weights before each update.
        law: Distribution of the noise.
        first: Seed and tensor of all streams; its step and sample are not looked at.
        steps: Step of each update, shape ``[updates]``.
        scales: Learning rate times projected gradient, shape ``[updates, samples]``.
        decays: Learning rate times weight decay, shape ``[updates]``. No update has nothing but zeros.
        rounded: Whether 16-bit weights are rounded stochastically.
        redrawn: Whether a random mask is drawn at each step instead of once.

    Raises:
        TypeError: If the dtype is float64.
        ValueError: If weights or mask are not as a kernel needs them, or the arrays differ in length.
    """
    check_weights(theta)
    if theta.dtype == torch.float64 or theta.device.type != "cpu":
        raise TypeError(f"a blocked replay works on 16-bit and 32-bit weights on the CPU, got {theta.dtype}")
    check_mask(theta, mask)
    if not steps.shape == decays.shape == scales.shape[:1] or scales.ndim != 2 or not scales.shape[1]:
        raise ValueError(f"steps, scales and decays differ: {steps.shape}, {scales.shape}, {decays.shape}")
    if not len(steps) or not theta.numel():
        return
    if mask.rule == "random" and not redrawn:
        mask = Mask("packed", bits=numba_cpu.NumbaKernel().pack(theta, mask))
    tasks = _tasks(theta, mask, law, first, steps, scales, decays, rounded and theta.element_size() == 2)
    argument = np.array([len(tasks), tasks.ctypes.data, tasks.strides[0]], np.int64)
    _run(theta, len(tasks), argument)


def _tasks(
    theta: Tensor,
    mask: Mask,
    law: Law,
    first: Stream,
    steps: npt.NDArray[np.int64],
    scales: npt.NDArray[np.float32],
    decays: npt.NDArray[np.float32],
    rounded: bool,
) -> npt.NDArray[np.int64]:
    """The task of each update, as the pass of one update takes it."""
    samples = scales.shape[1]
    address = theta.data_ptr()
    head = [address, address, theta.numel(), 0, int(law != "gaussian"), samples, 0, int(rounded)]
    head += numba_cpu._mask_fields(mask, theta.dtype)
    tasks = np.zeros((len(steps), ROWS + ROW * (samples + 2)), np.int64)
    tasks[:, :ROWS] = head
    tasks[:, DECAY] = decays.view(np.uint32)
    rows = tasks[:, ROWS:].reshape(len(steps), samples + 2, ROW)  # a view
    rows[:, :, :3] = first.seed & _LOW, first.seed >> 32, first.tensor
    rows[:, :, 3] = steps[:, None]
    rows[:, :samples, 4] = np.arange(samples) | NOISE << 24
    rows[:, :samples, 5] = scales.view(np.uint32)
    rows[:, samples, 4], rows[:, samples + 1, 4] = MASK << 24, ROUNDING << 24
    return tasks


def _run(theta: Tensor, updates: int, argument: npt.NDArray[np.int64]) -> None:
    tiles = -(-theta.numel() // _TILE)
    threads = min(numba_cpu._threads(theta.numel() * updates), tiles)
    function = _compiled(theta.dtype)
    memory = np.empty(threads * compiled.REPLAY_MEMORY + 64, np.uint8)
    address = (memory.ctypes.data + 63) & -64
    if threads == 1:
        function.ctypes(0, tiles, address, argument.ctypes.data)
        return
    counter = np.zeros(1, np.int64)
    with numba_cpu._LOCK:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            units = (0, tiles, 1, counter.ctypes.data)
            where = (address, compiled.REPLAY_MEMORY, argument.ctypes.data)
            numba_cpu._parallel()(function.address, threads, *units, *where)
        finally:
            numba.set_num_threads(before)


@functools.cache
def _compiled(dtype: torch.dtype) -> Any:
    name = f"replay for {str(dtype).removeprefix('torch.')}"
    return numba_cpu._timed(lambda: compiled.compile_replay(numba_cpu._LIKE[dtype]), name)
