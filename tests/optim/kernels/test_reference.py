"""The reference pass against its equations, written out once more."""

import math

import pytest
import torch

from smezo_pl.optim.kernels.base import code_range, float_bits, threshold_code
from smezo_pl.optim.kernels.reference import TorchKernel, round_stochastically
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import ROUNDING, Stream, normals, signs, words16
from tests.optim.kernels.cases import DTYPES, same, update, weights

KERNEL = TorchKernel()
ONE, TWO = Stream(11, 5, 0, 3), Stream(11, 5, 1, 3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_perturb_is_theta_plus_scaled_noise_under_the_mask(dtype: torch.dtype) -> None:
    theta = (torch.linspace(-0.05, 0.05, 3001, dtype=torch.float64)).to(dtype)
    out = torch.empty_like(theta)
    KERNEL.perturb(theta, out, Mask("small", threshold=0.01), "gaussian", ONE, 1e-3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(1e-3, dtype=wide)
    moved = (theta.to(wide) + normals(ONE, 3001).to(wide) * scale).to(dtype)
    assert torch.equal(out, torch.where(theta.double().abs() <= 0.01, moved, theta))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_update_subtracts_the_sum_and_the_decay(dtype: torch.dtype) -> None:
    theta = (torch.linspace(-0.05, 0.05, 3001, dtype=torch.float64)).to(dtype)
    start = theta.clone()
    update(KERNEL, theta, Mask("large", threshold=0.01), "rademacher", [ONE, TWO], [2e-3, -3e-3], 0.25, None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b, decay = (torch.tensor(value, dtype=wide) for value in (2e-3, -3e-3, 0.25))
    delta = signs(ONE, 3001).to(wide) * a + signs(TWO, 3001).to(wide) * b + start.to(wide) * decay
    expected = torch.where(start.double().abs() > 0.01, (start.to(wide) - delta).to(dtype), start)
    assert torch.equal(theta, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_selected_keeps_its_bits_and_nan_becomes_one(dtype: torch.dtype) -> None:
    theta = weights(dtype, 2000)
    out, chosen = torch.empty_like(theta), torch.zeros(2000, dtype=torch.bool)
    chosen[::3] = True
    bits = KERNEL.pack(torch.where(chosen, 1.0, 0.0), Mask("large", threshold=0.5))
    KERNEL.perturb(theta, out, Mask("packed", bits=bits), "gaussian", ONE, 1e-3)
    assert same(out[~chosen], theta[~chosen])
    quiet = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    codes = out.view(torch.int32 if dtype == torch.float32 else torch.int16)[chosen & theta.isnan()]
    assert codes.unique().tolist() == [quiet]
    infinite = chosen & theta.isinf()
    assert torch.equal(out[infinite], theta[infinite])


def test_nan_is_active_under_no_threshold() -> None:
    theta = torch.tensor([float("nan"), float("inf"), 1.0, -0.0, -2.0])
    packed = {rule: int(KERNEL.pack(theta, Mask(rule, threshold=1.0))[0]) for rule in ("small", "large", "dense")}
    assert packed == {"small": 0b01100, "large": 0b10010, "dense": 0b11111}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_threshold_is_compared_as_the_number_it_is(dtype: torch.dtype) -> None:
    # Also where it lies between two numbers of the dtype and would be rounded up to the larger.
    low = torch.tensor(0.01, dtype=dtype)
    high = torch.nextafter(low, torch.tensor(1.0, dtype=dtype))
    between = 0.1 * float(low) + 0.9 * float(high)
    theta = torch.stack((low, high, -low, -high))
    assert int(KERNEL.pack(theta, Mask("small", threshold=between))[0]) == 0b0101
    assert int(KERNEL.pack(theta, Mask("large", threshold=between))[0]) == 0b1010
    assert int(KERNEL.pack(theta, Mask("small", threshold=float(high)))[0]) == 0b1111


def test_threshold_codes_and_ranges() -> None:
    assert threshold_code(1.0, torch.bfloat16) == 0x3F80
    assert threshold_code(1.0039, torch.bfloat16) == 0x3F80
    assert threshold_code(1.0077, torch.bfloat16) == 0x3F80  # one ulp is 0.0078
    assert threshold_code(math.inf, torch.float16) == 0x7C00
    assert threshold_code(1e6, torch.float16) == 0x7BFF
    assert threshold_code(0.0, torch.float32) == 0
    assert threshold_code(-0.5, torch.float32) == -1
    assert code_range("small", math.inf, torch.float32) == (0, 0x7F800000)
    assert code_range("large", math.inf, torch.float32) == (0x80000000, 0)
    assert code_range("large", -1.0, torch.float16) == (0, 0x7C00)
    assert code_range("dense", math.inf, torch.float16) == (0, 0x7FFFFFFF)
    assert (float_bits(1.0), float_bits(1e300), float_bits(-1e300)) == (0x3F800000, 0x7F800000, 0xFF800000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [3e-2, 1.0, 1.5e4, 1.3e-6, 5e-5])
def test_stochastic_rounding_is_unbiased_within_a_hundredth_of_the_step(dtype: torch.dtype, size: float) -> None:
    # A step of a twentieth of the distance between two numbers: to nearest, all of it would be lost.
    start = torch.tensor(size, dtype=dtype)
    ulp = float(torch.nextafter(start, torch.tensor(math.inf, dtype=dtype)) - start)
    count = 1 << 18
    value = torch.full((count,), float(start) + 0.05 * ulp)
    for sign in (1, -1):
        rounded = round_stochastically(sign * value, words16(ONE, ROUNDING, count), dtype)
        step = (rounded.double() * sign - float(start)) / ulp
        assert step.unique().tolist() == [0.0, 1.0]
        exact = float(value[0].double() - float(start)) / ulp
        error = abs(float(step.mean()) - exact)
        assert error < 4.5 * math.sqrt(exact / count)  # 0.0019 of an ulp, of which a hundredth of the step is 0.0005
        assert abs(float(step.mean()) / exact - 1) < 0.045


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_over_all_words_is_exact(dtype: torch.dtype) -> None:
    # Each of the 65536 words once: the mean is the number itself, up to the bits that no word decides about.
    word = torch.arange(1 << 16, dtype=torch.int32)
    for value in (0.3, 1.00001, 123.456, 3e-5, 7e-6, 2.9e-7, -1e-4, -4e-8):
        if dtype == torch.bfloat16 or abs(value) >= 2**-14:
            exact, spread = torch.tensor(value), abs(value) * 2**-20
        else:
            exact, spread = torch.tensor(value), 2.0**-40
        rounded = round_stochastically(exact.expand(1 << 16).contiguous(), word, dtype)
        assert len(rounded.unique()) == 2
        assert abs(float(rounded.double().mean()) - float(exact)) <= spread


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_what_fits(dtype: torch.dtype) -> None:
    codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    theta = codes.view(dtype)
    for word in (0, 1, 40000, 65535):
        rounded = round_stochastically(theta.float(), torch.full((1 << 16,), word, dtype=torch.int32), dtype)
        number = ~theta.isnan()
        assert same(rounded[number], theta[number])
        assert rounded[~number].view(torch.int16).unique().numel() == 1


def test_nearest_rounding_loses_small_updates_and_stochastic_keeps_them_within_a_hundredth() -> None:
    count, step = 1 << 22, 2e-6
    theta = (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    z = signs(ONE, count)
    nearest, chance = theta.clone(), theta.clone()
    update(KERNEL, nearest, Mask("dense"), "rademacher", [ONE], [step], 0.0, None)
    update(KERNEL, chance, Mask("dense"), "rademacher", [ONE], [step], 0.0, TWO)

    def survived(after: torch.Tensor) -> float:
        return float(((theta.double() - after.double()) * z).mean() / step)

    assert survived(nearest) < 0.2
    # An update becomes 0 or one ulp, mostly 2^-13: the variance is their product, the standard error 0.004.
    assert abs(survived(chance) - 1) < 0.01


def test_histogram_counts_digits_of_magnitudes() -> None:
    theta = torch.tensor([1.0, -1.0, 1.5, 0.0, -0.0, float("inf")])
    counts = KERNEL.histogram(theta, 16, None)
    assert {i: int(counts[i]) for i in counts.nonzero().flatten().tolist()} == {0: 2, 0x3F80: 2, 0x3FC0: 1, 0x7F80: 1}
    assert int(KERNEL.histogram(theta, 0, 0x3F80)[0]) == 2
    assert int(KERNEL.histogram(theta, 0, 0x3F81).sum()) == 0
    assert int(KERNEL.histogram(theta.bfloat16(), 0, None)[0x3FC0]) == 1
    assert int(KERNEL.histogram(theta.double(), 48, None)[0x3FF0]) == 2
