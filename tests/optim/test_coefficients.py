"""The coefficients of a step from its losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smezo_pl.optim.coefficients import BETA, coefficients, in_steps, rounded
from smezo_pl.optim.parameters import float32

EPS = 1e-3
numbers = st.floats(-(2.0**100), 2.0**100, width=32)
losses = st.lists(st.tuples(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32)), min_size=1, max_size=20)


def of(pairs, rule, mean_square=0.0, steps=0):
    return coefficients(pairs, EPS, rule, mean_square, steps)


def is_float32(value):
    return math.isfinite(value) and float32(value) == value


def test_raw_are_the_projected_gradients():
    assert of([(1.5, 1.0), (2.0, 2.0)], "raw") == ((250.0, 0.0), 0.0)


def test_normalized_have_a_mean_square_of_one():
    values, moving = of([(1.5, 1.0), (1.0, 2.0), (0.3, 0.4)], "normalized")
    assert sum(c * c for c in values) / 3 == pytest.approx(1.0, rel=1e-6)
    assert values[1] / values[0] == pytest.approx(-2.0, rel=1e-6) and moving == 0.0
    assert of([(1.5, 1.0)], "normalized")[0] == (1.0,) and of([(0.5, 1.0)], "normalized")[0] == (-1.0,)


@pytest.mark.parametrize("rule", ["normalized", "moving"])
def test_losses_that_are_equal_but_for_rounding_make_a_small_step(rule):
    one = torch.tensor(2.3)
    near = torch.nextafter(one, torch.tensor(3.0))
    values, _ = of([(float(near), float(one)), (float(one), float(near))], rule)
    assert 0.01 < values[0] == -values[1] < 0.15  # an ulp of 2.3 is 2^-22, the floor eight at most
    assert of([(2.3, 2.4), (1.0, 1.0)], rule)[0][0] == pytest.approx(-math.sqrt(2))  # above the floor it does nothing


def test_moving_is_the_mean_of_all_steps_with_a_signal():
    mean_square, squares = 0.0, []
    for step, plus in enumerate((1.5, 1.1, 3.0, 1.01)):
        pairs = [(plus, 1.0), (1.0, 1.2)]
        gradients = [float32((a - b) / (2 * EPS)) for a, b in pairs]
        squares.append(sum(g * g for g in gradients) / 2)
        weights = [BETA ** (step - index) for index in range(step + 1)]
        mean = sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)
        values, mean_square = of(pairs, "moving", mean_square, step)
        assert mean_square == pytest.approx(mean, rel=1e-12)
        assert values == pytest.approx([g / math.sqrt(mean) for g in gradients], rel=1e-6)
    assert of([(1.0, 1.0)], "moving", mean_square, 4) == ((0.0,), mean_square)  # a step of ties does not count
    assert of([(math.nan, 1.0)], "moving", mean_square, 4) == ((), mean_square)


def test_ranks_average_ties_and_leave_zeros():
    pairs = [(3.0, 1.0), (1.0, 1.5), (1.5, 1.0), (1.0, 1.0)]
    assert of(pairs, "ranks")[0] == (1.0, -0.625, 0.625, 0.0)
    assert of([(1.0, 9.0)], "ranks")[0] == (-1.0,)


@settings(deadline=None, max_examples=50)
@given(losses, st.randoms(use_true_random=False))
def test_properties_of_all_rules(pairs, random):
    order = random.sample(range(len(pairs)), len(pairs))
    for rule in ("raw", "normalized", "moving", "ranks"):
        values, _ = of(pairs, rule)
        assert all(map(is_float32, values))
        for c, (plus, minus) in zip(values, pairs, strict=True):
            assert c * (plus - minus) >= 0  # never uphill
            assert c or plus == minus or abs(plus - minus) < 1e-30
        assert of([(minus, plus) for plus, minus in pairs], rule)[0] == tuple(-c for c in values)
        assert of([pairs[i] for i in order], rule)[0] == tuple(values[i] for i in order)
        if rule != "raw":
            assert sum(c * c for c in values) <= len(values) * (1 + 1e-6)
    assert not any(any(of([(loss, loss) for loss, _ in pairs], rule)[0]) for rule in ("normalized", "moving", "ranks"))


@settings(deadline=None, max_examples=100)
@given(st.lists(numbers, min_size=1, max_size=30))
def test_eight_bits(values):
    result, (step, multiples) = rounded(values), in_steps(values)
    largest = max(map(abs, values))
    assert all(map(is_float32, result)) and all(-127 <= k <= 127 for k in multiples)
    assert all(abs(a - b) <= step * (0.5 + 1e-3) for a, b in zip(result, values, strict=True)) or step < 1e-40
    assert step == pytest.approx(largest / 127, rel=2**-16, abs=2**-149)
    assert result == tuple(float32(float32(step) * k) for k in multiples)
    assert in_steps(result) == (step, multiples) and rounded(result) == result  # an export stores these
    assert rounded([-value for value in values]) == tuple(-value for value in result)


def test_eight_bits_of_nothing():
    assert rounded([]) == () and rounded([0.0, -0.0]) == (0.0, 0.0)
    assert rounded([1e-45, 0.0])[0] in (0.0, 2**-149)
