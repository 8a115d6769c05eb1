"""Every fused pass against the reference, bit for bit."""

import itertools

import pytest
import torch

from smezo_pl.optim.kernels import Kernel
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Distribution, Stream
from tests.optim.kernels.cases import (
    DISTRIBUTIONS,
    DTYPES,
    RANGES,
    RULES,
    mask_of,
    moved,
    place,
    same,
    update,
    updates,
    weights,
)

REFERENCE = TorchKernel()


def ranges(kernel: Kernel) -> tuple[tuple[int, int], ...]:
    # The interpreter takes a second for ten thousand weights.
    return RANGES if kernel.name == "numba" else tuple((start, min(count, 1100)) for start, count in RANGES[2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_perturb(kernel: Kernel, dtype: torch.dtype, rule: str) -> None:
    device = place(kernel.name)
    for (start, count), noise in itertools.product(ranges(kernel), DISTRIBUTIONS):
        theta, mask = weights(dtype, count), mask_of(rule, count, start)
        here, there, stream = theta.to(device), moved(mask, device), Stream((1 << 64) - 5, (1 << 32) - 1, 7, 9, start)
        got, expected = torch.empty_like(here), torch.empty_like(theta)
        kernel.perturb(here, got, there, noise, stream, -1e-3)
        REFERENCE.perturb(theta, expected, mask, noise, stream, -1e-3)
        assert same(got, expected), (start, count, noise)
        assert same(here, theta)
        kernel.perturb(got.copy_(here), got, there, noise, stream, -1e-3)
        assert same(got, expected), (start, count, noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_update(kernel: Kernel, dtype: torch.dtype, rule: str) -> None:
    device = place(kernel.name)
    for (start, count), noise in itertools.product(ranges(kernel)[1:], DISTRIBUTIONS):
        for streams, scales, decay, rounding in updates(start):
            expected, mask = weights(dtype, count), mask_of(rule, count, start)
            got = expected.to(device, copy=True)
            update(kernel, got, moved(mask, device), noise, streams, scales, decay, rounding)
            update(REFERENCE, expected, mask, noise, streams, scales, decay, rounding)
            assert same(got, expected), (start, count, noise, scales, decay)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_pack_select_and_restore(kernel: Kernel, dtype: torch.dtype, rule: str) -> None:
    device = place(kernel.name)
    for start, count in ranges(kernel):
        theta, mask = weights(dtype, count), mask_of(rule, count, start)
        here, there = theta.to(device), moved(mask, device)
        bits, saved = kernel.select(here, there)
        expected_bits, expected_saved = REFERENCE.select(theta, mask)
        assert same(bits, expected_bits)
        assert same(kernel.pack(here, there), expected_bits)
        assert same(saved, expected_saved)
        changed = torch.empty_like(here)
        kernel.perturb(here, changed, there, "gaussian", Stream(1, 2, 3, 4, start), 1.0)
        kernel.restore(changed, bits, saved)
        assert same(changed, theta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_histogram(kernel: Kernel, dtype: torch.dtype) -> None:
    theta = weights(dtype, 40007)
    for shift, prefix in ((0, None), (16, None), (0, 0x3C23), (0, 0)):
        counts = kernel.histogram(theta.to(place(kernel.name)), shift, prefix)
        assert same(counts, REFERENCE.histogram(theta, shift, prefix))


@pytest.mark.parametrize("noise", DISTRIBUTIONS)
def test_a_packed_mask_does_what_its_rule_does(kernel: Kernel, noise: Distribution) -> None:
    count, device = 5000 if kernel.name == "numba" else 1100, place(kernel.name)
    theta, stream = weights(torch.bfloat16, count).to(device), Stream(1, 2, 3, 4)
    for rule in RULES:
        mask = moved(mask_of(rule, count), device)
        packed = Mask("packed", bits=kernel.pack(theta, mask))
        by_rule, by_bits = torch.empty_like(theta), torch.empty_like(theta)
        kernel.perturb(theta, by_rule, mask, noise, stream, 1e-2)
        kernel.perturb(theta, by_bits, packed, noise, stream, 1e-2)
        assert same(by_rule, by_bits)


def test_nothing_of_an_update_by_zero_is_seen(kernel: Kernel) -> None:
    for dtype in DTYPES:
        theta = weights(dtype, 3000).to(place(kernel.name))
        before, stream = theta.clone(), Stream(1, 2, 3, 4)
        for _ in range(3):
            update(kernel, theta, Mask("dense"), "gaussian", [stream, stream], [0.0, -0.0], 0.0, stream)
        out = torch.empty_like(theta)
        kernel.perturb(theta, out, Mask("dense"), "gaussian", stream, 0.0)
        assert same(theta, before)
        assert same(out, before)


def test_an_empty_tensor_is_no_trouble(kernel: Kernel) -> None:
    theta, stream = torch.empty(0, dtype=torch.bfloat16, device=place(kernel.name)), Stream(1, 2, 3, 4)
    kernel.perturb(theta, torch.empty_like(theta), Mask("dense"), "gaussian", stream, 1e-3)
    update(kernel, theta, Mask("dense"), "gaussian", [stream], [1e-3], 0.0, stream)
    bits, saved = kernel.select(theta, Mask("dense"))
    assert (bits.numel(), saved.numel()) == (0, 0)
    kernel.restore(theta, bits, saved)
    assert int(kernel.histogram(theta, 0, None).sum()) == 0


def test_float64_is_handed_to_the_reference(kernel: Kernel) -> None:
    theta, stream = torch.linspace(-1, 1, 3001, dtype=torch.float64), Stream(1, 2, 3, 4)
    here = theta.to(place(kernel.name))
    mask, expected, got = Mask("small", threshold=0.3), theta.clone(), here.clone()
    update(REFERENCE, expected, mask, "gaussian", [stream], [1e-3], 1e-4, None)
    update(kernel, got, mask, "gaussian", [stream], [1e-3], 1e-4, None)
    assert same(got, expected)
    bits, saved = kernel.select(here, mask)
    kernel.restore(got, bits, saved)
    assert same(got, theta)
