from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from smezo_pl.optim.kernels import _numba_replay, numba_replay
from smezo_pl.optim.kernels.numba_cpu import NumbaKernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Law, Stream
from tests.optim.kernels.cases import DTYPES, LAWS, RULES, mask_of, same, weights

KERNEL = NumbaKernel()
SEED = (1 << 63) + 12345
TILE = _numba_replay.TILE * 1024
# less than a block, whole blocks, parts of blocks, more than a tile
COUNTS = (1, 700, 2048, TILE + 1, 2 * TILE + 3333)


def many(
    theta: Tensor, mask: Mask, law: Law, scales: list[list[float]], decays: list[float], rounded: bool, redrawn: bool
) -> None:
    steps = np.arange(7, 7 + 3 * len(scales), 3)
    arrays = np.array(scales, np.float32), np.array(decays, np.float32)
    numba_replay.update_many(theta, mask, law, Stream(SEED, 0, 0, 5), steps, *arrays, rounded=rounded, redrawn=redrawn)


def one_by_one(
    theta: Tensor, mask: Mask, law: Law, scales: list[list[float]], decays: list[float], rounded: bool, redrawn: bool
) -> None:
    for index, (row, decay) in enumerate(zip(scales, decays, strict=True)):
        step = 7 + 3 * index
        streams = [Stream(SEED, step, sample, 5) for sample in range(len(row))]
        here = replace(mask, stream=Stream(SEED, step, 0, 5)) if redrawn else mask
        KERNEL.update(theta, here, law, streams, row, decay, Stream(SEED, step, 0, 5) if rounded else None)


def both(theta: Tensor, mask: Mask, law: Law, *numbers: object, redrawn: bool = False) -> tuple[Tensor, Tensor]:
    got, expected = theta.clone(), theta.clone()
    many(got, mask, law, *numbers, redrawn)  # type: ignore[arg-type]
    one_by_one(expected, mask, law, *numbers, redrawn)  # type: ignore[arg-type]
    return got, expected


# float16 overflows and 1e-4 moves a weight across the threshold: both happen in these updates
ONE = ([[3e-4], [-2e-4], [5e-3], [1e-4], [-7e-4]], [0.0, 1e-3, 0.0, 0.0, 2e-3])
THREE = ([[3e-4, 0.0, 1e-4], [0.0, 0.0, 0.0], [-1e-3, 2e-4, 5e-4]], [0.0, 1e-3, 0.0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rule", RULES)
def test_many_updates_are_the_updates_one_by_one(dtype: torch.dtype, law: Law, rule: str) -> None:
    for count in COUNTS:
        theta, mask = weights(dtype, count), mask_of(rule, count)
        for numbers in ((*ONE, True), (*THREE, True), (*ONE, False)):
            got, expected = both(theta, mask, law, *numbers)
            assert same(got, expected), (count, numbers)
            if count > 1000 and rule != "empty":
                assert not same(got, theta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_that_is_drawn_at_each_step(dtype: torch.dtype) -> None:
    theta = weights(dtype, TILE + 99)
    got, expected = both(theta, mask_of("random", theta.numel()), "gaussian", *ONE, True, redrawn=True)
    assert same(got, expected)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.55, 0.6, 0.9])
def test_few_and_many_selected_weights(law: Law, share: float) -> None:
    """Gathered weights, whole blocks, and tiles at the border between the two."""
    theta = (torch.rand(3 * TILE, generator=torch.Generator().manual_seed(0)) - 0.5).bfloat16()
    got, expected = both(theta, Mask("small", threshold=share / 2), law, *ONE, True)
    assert same(got, expected)
    assert 0.5 * share < (got != theta).double().mean() < 1.2 * share


def test_weights_leave_the_mask_between_the_updates() -> None:
    theta = torch.full((TILE,), 0.0099, dtype=torch.bfloat16)
    mask = Mask("small", threshold=0.01)
    got, expected = both(theta, mask, "gaussian", [[1e-3]] * 6, [0.0] * 6, True)
    assert same(got, expected)
    once = theta.clone()
    one_by_one(once, mask, "gaussian", [[1e-3]], [0.0], True, False)
    left = once.float().abs() > 0.01
    assert left.float().mean() > 0.2
    assert torch.equal(got[left], once[left])


def test_threads_do_not_change_a_bit() -> None:
    theta, mask, results = weights(torch.bfloat16, 40 * TILE), mask_of("small", 40 * TILE), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(theta.clone())
        many(results[-1], mask, "gaussian", *ONE, True, False)
    assert same(*results)


def test_nothing_to_do() -> None:
    theta = weights(torch.bfloat16, 100)
    before = theta.clone()
    nothing = np.zeros(0, np.int64), np.zeros((0, 1), np.float32), np.zeros(0, np.float32)
    numba_replay.update_many(theta, Mask("dense"), "gaussian", Stream(0, 0, 0, 0), *nothing, rounded=True)
    assert same(theta, before)
    numba_replay.update_many(
        theta[:0], Mask("dense"), "gaussian", Stream(0, 0, 0, 0),
        np.zeros(1, np.int64), np.ones((1, 1), np.float32), np.zeros(1, np.float32), rounded=True,
    )  # fmt: skip


def test_what_it_cannot_do_is_refused() -> None:
    numbers = np.zeros(1, np.int64), np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    with pytest.raises(TypeError, match="16-bit and 32-bit weights on the CPU, got torch.float64"):
        numba_replay.update_many(
            torch.zeros(3, dtype=torch.float64), Mask("dense"), "gaussian", Stream(0, 0, 0, 0), *numbers, rounded=True
        )
    with pytest.raises(ValueError, match="steps, scales and decays differ"):
        numba_replay.update_many(
            torch.zeros(3), Mask("dense"), "gaussian", Stream(0, 0, 0, 0), np.zeros(2, np.int64), *numbers[1:],
            rounded=True,
        )  # fmt: skip
