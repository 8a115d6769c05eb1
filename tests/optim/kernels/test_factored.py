"""Noise alone and sums of outer products: every kernel against the reference, and that against its equations."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from smezo_pl.optim.kernels import Kernel
from smezo_pl.optim.kernels.base import Draw, Factored, FactoredUpdate
from smezo_pl.optim.kernels.numba_cpu import NumbaKernel
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import DENSE, Mask
from smezo_pl.optim.noise import Stream, normals, signs
from tests.optim.kernels.cases import (
    DISTRIBUTIONS,
    DTYPES,
    RANGES,
    RULES,
    mask_of,
    moved,
    needs_two_threads,
    place,
    same,
    weights,
)

REFERENCE = TorchKernel()
ONE = Stream((1 << 64) - 5, (1 << 32) - 1, 7, (1 << 24) - 1)

# (n, m, terms): rows across blocks, columns in and beyond groups of 64, vectors, tiny matrices, more terms than are
# added at a time, rows longer and columns taller than what is summed at a time.
SHAPES = (
    (60, 90, 1),
    (40, 100, 16),
    (1, 4000, 16),
    (3, 1, 2),
    (1, 1, 1),
    (9, 192, 70),
    (2, 20000, 3),
    (3001, 1, 5),
    (700, 7, 9),
)


def factored(n: int, m: int, terms: int, stream: Stream | None = None) -> Factored:
    generator = torch.Generator().manual_seed(n + terms)
    left, right = (torch.randn(terms, size, generator=generator).bfloat16() for size in (n, m))
    right[:, ::5] = 0.0  # products of either sign of zero, for weights of either
    return Factored(left, right, (torch.randn(terms, generator=generator, dtype=torch.float64) * 1e-3).tolist(), stream)


def at(device: torch.device, noise: Factored) -> Factored:
    return noise._replace(left=noise.left.to(device), right=noise.right.to(device))


def shapes(kernel: Kernel) -> tuple[tuple[int, int, int], ...]:
    return SHAPES if kernel.name == "numba" else ((11, 100, 1), (11, 60, 5), (1, 1500, 2), (300, 3, 2))


def changes(n: int, m: int, terms: int, start: int) -> Iterator[tuple[str, Factored, float, Stream | None]]:
    stream = Stream(5, 6, 7, 8, start)
    yield "dense", factored(n, m, terms), 0.0, None
    yield "dense", factored(n, m, terms), 1e-3, stream
    yield "small", factored(n, m, terms, stream), 0.0, stream
    yield "packed", factored(n, m, terms, stream), 1e-3, None
    yield "random", factored(n, m, terms), 1e-3, stream


@pytest.mark.parametrize("dtype", DTYPES)
def test_update_by_outer_products(kernel: Kernel, dtype: torch.dtype) -> None:
    device = place(kernel.name)
    for (n, m, terms), start in itertools.product(shapes(kernel), (0, 777)):
        for index, (rule, noise, decay, rounding) in enumerate(changes(n, m, terms, start)):
            expected, mask = weights(dtype, n * m), mask_of(rule, n * m, start)
            got = expected.to(device, copy=True)
            distribution = DISTRIBUTIONS[(index + start) % 2]
            there = FactoredUpdate(got, moved(mask, device), at(device, noise), decay, rounding)
            kernel.update_factored(there, distribution)
            REFERENCE.update_factored(FactoredUpdate(expected, mask, noise, decay, rounding), distribution)
            assert same(got, expected), (n, m, terms, start, rule)


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturbation_by_outer_products(kernel: Kernel, dtype: torch.dtype) -> None:
    device = place(kernel.name)
    for n, m, terms in shapes(kernel):
        theta, noise = weights(dtype, n * m), factored(n, m, terms)
        here, got, expected = theta.to(device), torch.empty_like(theta, device=device), torch.empty_like(theta)
        kernel.perturb_factored(here, got, at(device, noise))
        REFERENCE.perturb_factored(theta, expected, noise)
        assert same(got, expected), (n, m, terms)
        assert same(here, theta)
        kernel.perturb_factored(here, here, at(device, noise))
        assert same(here, expected), (n, m, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_noise_alone(kernel: Kernel, dtype: torch.dtype, rule: str) -> None:
    device, ranges = place(kernel.name), RANGES if kernel.name == "numba" else ((5, 1023), ((3 << 35) + 12345, 300))
    for (start, count), noise in itertools.product(ranges, DISTRIBUTIONS):
        theta, mask, stream = weights(dtype, count), mask_of(rule, count, start), Stream(1, 2, 3, 4, start)
        here, there = theta.to(device), moved(mask, device)
        for scale in (1.0, -1e-3, 0.0, 1e300):
            got, expected = torch.empty_like(here), torch.empty_like(theta)
            kernel.draw(here, got, there, noise, stream, scale)
            REFERENCE.draw(theta, expected, mask, noise, stream, scale)
            assert same(got, expected), (start, count, noise, scale)
        kernel.draw(got.copy_(here), got, there, noise, stream, scale)
        assert same(got, expected), (start, count, noise)


def test_vectors_of_noise(kernel: Kernel) -> None:
    starts, stream = [0, 1024, 16 * 1024, 17 * 1024, 1 << 40], Stream(1, 2, 3, 4, 5 * 1024)
    for length, noise in itertools.product((1, 576, 1024, 3000), DISTRIBUTIONS):
        out = torch.full((5, length), float("nan"), dtype=torch.bfloat16, device=place(kernel.name))
        kernel.draw_rows([Draw(out, starts, stream)], noise)
        draw = normals if noise == "gaussian" else signs
        expected = torch.stack([draw(stream.part(start), length).bfloat16() for start in starts])
        assert same(out, expected), (length, noise)
        many = [
            Draw(torch.empty_like(out[:count, :size]).contiguous(), starts[:count], Stream(6, 5, 4, number, 1024))
            for number, (count, size) in enumerate(((2, 1), (5, length), (1, 100)))
        ]
        kernel.draw_rows(many, noise)
        for out, begins, stream_of in many:
            assert same(out, torch.stack([draw(stream_of.part(start), out.shape[1]).bfloat16() for start in begins]))
    kernel.draw_rows([Draw(out[:0], [], stream)], "gaussian")


@needs_two_threads
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_what_is_updated_beside_do_not_change_a_bit(dtype: torch.dtype) -> None:
    sizes, results = ((300, 576, 16), (577, 200, 3), (1, 576, 16), (1, 100_000, 4)), []
    listed = [(weights(dtype, n * m), factored(n, m, terms)) for n, m, terms in sizes]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        copies = [FactoredUpdate(theta.clone(), DENSE, noise, 1e-3, ONE) for theta, noise in listed]
        still = FactoredUpdate(torch.ones(6), DENSE, factored(2, 3, 2)._replace(scales=[0.0, -0.0]))
        nothing = FactoredUpdate(torch.empty(0), DENSE, factored(0, 5, 2))
        double = FactoredUpdate(torch.ones(6, dtype=torch.float64), DENSE, factored(2, 3, 2))
        NumbaKernel().update_all_factored([*copies, nothing, still, double], "gaussian")
        assert torch.equal(still.theta, torch.ones(6))
        REFERENCE.update_factored(double._replace(theta=(alone := torch.ones(6, dtype=torch.float64))), "gaussian")
        assert same(double.theta, alone)
        results.append([each.theta for each in copies])
    for (theta, noise), one, two in zip(listed, *results, strict=True):
        REFERENCE.update_factored(FactoredUpdate(theta, DENSE, noise, 1e-3, ONE), "gaussian")
        assert same(one, two)
        assert same(one, theta)


def test_terms_are_added_in_their_order_and_every_operation_rounded(kernel: Kernel) -> None:
    device, n, m, terms = place(kernel.name), 3, 130, 7
    noise = factored(n, m, terms)
    last = reversed(range(terms))
    other = Factored(*(each.flip(0).contiguous() for each in noise[:2]), [noise.scales[k] for k in last])
    results = []
    for one in (noise, other):
        theta = torch.zeros(n * m, device=device)
        kernel.update_factored(FactoredUpdate(theta, DENSE, at(device, one)), "gaussian")
        results.append(theta.cpu())
        total = torch.zeros(n, m) - 0.0
        for a, b, scale in zip(one.left.float(), one.right.float(), one.scales, strict=True):
            # A product of two float32 is exact in float64: so each is rounded once, and so is each sum.
            product = (a * torch.tensor(scale))[:, None].double() * b[None, :].double()
            total = (total.double() + product.float().double()).float()
        assert torch.equal(-results[-1], total.view(-1))
    assert not torch.equal(*results)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_reference_is_the_equation(dtype: torch.dtype) -> None:
    n, m, wide = 30, 70, torch.float64 if dtype == torch.float64 else torch.float32
    theta = torch.linspace(-0.05, 0.05, n * m, dtype=torch.float64).to(dtype)
    start, stream, mask = theta.clone(), Stream(11, 5, 0, 3), Mask("large", threshold=0.01)
    (left, right, scales, _) = noise = factored(n, m, 2, stream)
    REFERENCE.update_factored(FactoredUpdate(theta, mask, noise, 0.25), "gaussian")
    a, b = ((left[d].to(wide) * torch.tensor(scales[d], dtype=wide))[:, None] * right[d].to(wide) for d in (0, 1))
    delta = (a + b).view(-1) * normals(stream, n * m).to(wide) + start.to(wide) * torch.tensor(0.25, dtype=wide)
    expected = torch.where(start.double().abs() > 0.01, (start.to(wide) - delta).to(dtype), start)
    assert torch.equal(theta, expected)
    out = torch.empty_like(theta)
    REFERENCE.draw(start, out, mask, "gaussian", stream, 0.5)
    half = (normals(stream, n * m).to(wide) * 0.5).to(dtype)
    assert torch.equal(out, torch.where(start.double().abs() > 0.01, half, torch.zeros_like(half)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_factors_and_the_one_nan(kernel: Kernel, dtype: torch.dtype) -> None:
    device, noise = place(kernel.name), factored(4, 50, 3)
    noise.left[1, 2], noise.right[2, 7], noise.right[0, 8] = float("inf"), float("-inf"), float("nan")
    for scales in (noise.scales, [1e300, -1e300, 1.0], [0.0, 1.0, 0.0]):
        expected = weights(dtype, 200)
        got = expected.to(device, copy=True)
        kernel.update_factored(FactoredUpdate(got, DENSE, at(device, noise)._replace(scales=scales)), "gaussian")
        REFERENCE.update_factored(FactoredUpdate(expected, DENSE, noise._replace(scales=scales)), "gaussian")
        assert same(got, expected), scales


def wrong() -> Iterator[tuple[Factored, str]]:
    good = factored(4, 5, 2)
    yield good._replace(scales=[1.0]), "left and right must have shapes [1, n] and [1, m] with n m = 20 for 1 scales"
    yield good._replace(left=good.left[:, :3].contiguous()), "got (2, 3) and (2, 5)"
    yield good._replace(scales=[], left=good.left[:0], right=good.right[:0]), "at least one, got (0, 4) and (0, 5)"
    yield good._replace(right=good.right.float()), "right must be bfloat16, contiguous and on cpu, got torch.float32"
    yield good._replace(left=good.left.t().contiguous().t()), "left must be bfloat16, contiguous and on cpu"
    yield good._replace(stream=Stream(0, 0, 0, 0, 5)), "all streams of a pass must start at the same element, got 5"


@pytest.mark.parametrize("kernel", [NumbaKernel(), REFERENCE], ids=lambda kernel: kernel.name)
def test_what_does_not_fit_is_refused(kernel: Kernel) -> None:
    theta = torch.zeros(20)
    for noise, message in wrong():
        with pytest.raises(ValueError, match="must") as caught:
            kernel.update_factored(FactoredUpdate(theta, DENSE, noise, 1.0, Stream(0, 0, 0, 0)), "gaussian")
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="a perturbation by outer products takes no stream, got Stream"):
        kernel.perturb_factored(theta, theta, factored(4, 5, 2, Stream(0, 0, 0, 0)))
    with pytest.raises(TypeError, match="out must be torch.float32 like theta, got torch.bfloat16"):
        kernel.draw(theta, theta.bfloat16(), DENSE, "gaussian", ONE, 1.0)
    out = torch.zeros(2, 8, dtype=torch.bfloat16)
    for target, starts, text in (
        (out, [0], "out must be bfloat16 [1, L] and contiguous, got torch.bfloat16 of shape (2, 8)"),
        (out.float(), [0, 1024], "got torch.float32 of shape (2, 8)"),
        (out[:, ::2], [0, 1024], "strides (8, 2)"),
        (out, [0, 1000], "starts must be multiples of 1024, at least 0, got 1000"),
        (out, [-1024, 0], "starts must be multiples of 1024, at least 0, got -1024"),
    ):
        with pytest.raises(ValueError, match="must be") as caught:
            kernel.draw_rows([Draw(target, starts, ONE)], "gaussian")
        assert text in str(caught.value)
    assert not Tensor.any(theta)
