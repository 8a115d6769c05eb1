"""Several tensors, and several rows of one, in one call."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from smezo_pl.optim.kernels import Kernel, Update
from smezo_pl.optim.kernels.numba_cpu import NumbaKernel
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Distribution, Stream
from tests.optim.kernels.cases import (
    DISTRIBUTIONS,
    DTYPES,
    RULES,
    mask_of,
    needs_two_threads,
    same,
    update,
    updates,
    weights,
)

KERNELS = (NumbaKernel(), TorchKernel())
ROWS, WIDTH = 40, 72  # rows begin at any place of a block of 1024


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("noise", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rows_are_those_of_the_whole_matrix(kernel: Kernel, noise: Distribution, dtype: torch.dtype) -> None:
    theta = weights(torch.float32, ROWS * WIDTH).to(dtype)
    chosen = torch.tensor([0, 3, 7, 8, 39])
    for start in (0, 1000):
        stream = Stream(3, 4, 1, 6, start)
        for rule in RULES:
            mask = mask_of(rule, theta.numel(), start)
            whole, rows = torch.empty_like(theta), torch.empty(len(chosen), WIDTH, dtype=dtype)
            kernel.perturb(theta, whole, mask, noise, stream, 1e-3)
            kernel.perturb_rows(theta.view(ROWS, WIDTH), rows, chosen, mask, noise, stream, 1e-3)
            assert same(rows, whole.view(ROWS, WIDTH)[chosen]), (start, rule)


@needs_two_threads
def test_rows_longer_than_a_piece_and_many_threads() -> None:
    kernel, width = KERNELS[0], 1 << 17
    theta, stream = weights(torch.bfloat16, 3 * width), Stream(1, 2, 0, 3)
    whole, mask = torch.empty_like(theta), Mask("small", threshold=0.005)
    kernel.perturb(theta, whole, mask, "gaussian", stream, 1e-3)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows = torch.empty(2, width, dtype=torch.bfloat16)
        kernel.perturb_rows(theta.view(3, width), rows, torch.tensor([2, 0]), mask, "gaussian", stream, 1e-3)
        assert same(rows, whole.view(3, width)[[2, 0]])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_no_row_and_a_perturbation_by_zero(kernel: Kernel) -> None:
    theta, stream = weights(torch.float32, ROWS * WIDTH).view(ROWS, WIDTH), Stream(1, 2, 0, 3)
    nothing = torch.empty(0, WIDTH)
    kernel.perturb_rows(theta, nothing, torch.tensor([], dtype=torch.int64), Mask("dense"), "gaussian", stream, 1e-3)
    rows = torch.empty(2, WIDTH)
    kernel.perturb_rows(theta, rows, torch.tensor([5, 1]), Mask("dense"), "gaussian", stream, 0.0)
    assert same(rows, theta[[5, 1]])


@pytest.mark.parametrize(
    ("theta", "rows", "out", "error", "message"),
    [
        ((4, 12), [0], (1, 12), ValueError, "whose width is a multiple of 8, got shape (4, 12)"),
        ((4, 16), [4], (1, 16), ValueError, "rows must be in [0, 4), got 4 to 4"),
        ((4, 16), [-1, 2], (2, 16), ValueError, "rows must be in [0, 4), got -1 to 2"),
        ((4, 16), [0, 1], (3, 16), ValueError, "out must have shape (2, 16)"),
        ((4, 16), [0.5], (1, 16), TypeError, "rows must be int64, got torch.float32"),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_rows_that_do_not_fit_are_refused(kernel: Kernel, theta, rows, out, error, message) -> None:
    with pytest.raises(error) as caught:
        kernel.perturb_rows(
            torch.zeros(theta), torch.zeros(out), torch.tensor(rows), Mask("dense"), "gaussian", Stream(0, 0, 0, 0), 1.0
        )
    assert message in str(caught.value)


@pytest.mark.parametrize("noise", DISTRIBUTIONS)
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=needs_two_threads)])
def test_updates_at_once_are_the_updates_one_by_one(noise: Distribution, threads: int) -> None:
    torch.set_num_threads(threads)
    tensors, one_by_one, listed = [], [], []
    for number, count in enumerate((1, 1023, 4096, 40001)):
        for dtype in (*DTYPES, torch.float64):
            for rule in ("small", "random", "packed"):
                theta = weights(torch.float32, count, number).to(dtype)
                start = 8 * number
                streams, scales, decay, rounding = list(updates(start))[len(listed) % 4]
                streams = [replace(stream, tensor=len(listed)) for stream in streams]
                mask = mask_of(rule, count, start)
                alone = theta.clone()
                update(TorchKernel(), alone, mask, noise, streams, scales, decay, rounding)
                tensors.append(theta)
                one_by_one.append(alone)
                listed.append(Update(theta, mask, streams, scales, decay, rounding))
    # one that changes nothing, and an empty one, in the middle of the others
    still = weights(torch.float32, 50)
    kept = still.clone()
    listed.insert(3, Update(still, Mask("dense"), [Stream(0, 0, 0, 0)], [0.0]))
    listed.insert(9, Update(torch.empty(0), Mask("dense"), [Stream(0, 0, 0, 0)], [1.0]))
    NumbaKernel().update_all(listed, noise)
    assert all(same(a, b) for a, b in zip(tensors, one_by_one, strict=True))
    assert same(still, kept)
    NumbaKernel().update_all([], noise)


def test_a_forked_process_with_one_thread_goes_on() -> None:
    code = """if True:
        import os, torch
        from smezo_pl.optim.kernels import Update
        from smezo_pl.optim.kernels.numba_cpu import NumbaKernel
        from smezo_pl.optim.masks import Mask
        from smezo_pl.optim.noise import Stream
        theta = torch.zeros(1 << 17)
        torch.set_num_threads(2)
        NumbaKernel().update_all([Update(theta, Mask("dense"), [Stream(0, 0, 0, 0)], [1.0])], "gaussian")
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            NumbaKernel().update_all([Update(theta, Mask("dense"), [Stream(0, 0, 0, 0)], [1.0])], "gaussian")
            os._exit(0)
        print(os.waitpid(child, 0)[1])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["0"], done.stderr
