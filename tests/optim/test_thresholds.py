from __future__ import annotations

import math

import pytest
import torch

from smezo_pl.optim.kernels import get_kernel
from smezo_pl.optim.masks import find_threshold

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def kernel_for(dtype: torch.dtype, name: str):
    return get_kernel("torch" if dtype == torch.float64 else name, CPU)


@pytest.mark.parametrize("name", ["torch", "numba"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "few values", "wide", "with nan"])
def test_against_a_sort(name, dtype, share, kind):
    generator = torch.Generator().manual_seed(7)
    theta = torch.randn(5003, generator=generator, dtype=torch.float64) * 0.02
    if kind == "few values":
        theta = (theta * 100).round() / 128
    elif kind == "wide":
        theta = theta * 10.0 ** torch.randint(-8, 4, theta.shape, generator=generator)
    theta = theta.to(dtype)
    if kind == "with nan":
        theta[::7] = math.nan
        theta[3] = math.inf
        theta[4] = -math.inf
    rank = round(share * theta.numel())
    found = find_threshold(theta, rank, kernel_for(dtype, name).histogram)
    magnitudes = theta[~theta.isnan()].double().abs()
    _, counts = magnitudes.unique(return_counts=True)
    best = int((counts.cumsum(0) - rank).abs().min())
    assert abs(found.at_most - rank) == best
    assert int((magnitudes <= found.value).sum()) == found.at_most
    if math.isfinite(found.value):
        low = magnitudes[magnitudes <= found.value].max().item()
        high = magnitudes[magnitudes > found.value].min().item()
        assert low <= found.value < high
        if math.isfinite(high) and kind != "wide":
            assert found.value == pytest.approx((low + high) / 2, rel=1e-6)


def test_tensors_that_cannot_be_parted():
    histogram = get_kernel("torch", CPU).histogram
    for dtype in DTYPES:
        ones = torch.ones(10, dtype=dtype)
        assert find_threshold(ones, 2, histogram).magnitudes == 1
        assert find_threshold(ones * math.nan, 2, histogram).magnitudes == 0


def test_leave_one_keeps_something_above():
    histogram = get_kernel("torch", CPU).histogram
    theta = torch.tensor([1.0] * 9 + [2.0])
    assert find_threshold(theta, 10, histogram).at_most == 10
    assert find_threshold(theta, 10, histogram, leave_one=True).at_most == 9


def test_neighboring_floats_are_parted_exactly():
    theta = torch.tensor([1.0, 1.0 + 2**-23, 1.0 + 2**-22])
    for rank in (1, 2):
        found = find_threshold(theta, rank, get_kernel("torch", CPU).histogram)
        assert found.at_most == rank == int((theta <= found.value).sum())
