"""From the losses of a step to the coefficients that the update multiplies its directions with.

With ``g = (l+ - l-) / (2 eps)`` of each direction, the projected gradients, the rules are

- ``raw``: ``c = g``, the papers';
- ``normalized``: ``c = g / rms(g)`` over the directions of the step (FZOO, arXiv 2506.09034; GRZO, arXiv 2606.02857);
- ``moving``: ``c = g / sqrt(v)`` with the moving mean ``v`` of ``mean(g^2)`` over the steps (MEAZO, arXiv 2605.03869);
- ``ranks``: ``c = sign(g) * rank of |g| / number of directions``; equal ``|g|`` share their mean rank, 0 stays 0.

``rms(g)`` and ``sqrt(v)`` are not taken below what eight units in the last place of a float32 loss make of ``g``: a
step whose losses are equal but for rounding is a small one. A step whose losses are all equal changes nothing, and does
not count in ``v``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from smezo_pl.optim.parameters import float32

CoefficientsName = Literal["raw", "normalized", "moving", "ranks"]
"""Rules a user chooses from."""

BETA = 0.99
"""Decay of the moving mean."""

RESOLUTION = 2.0**-20
"""Eight units in the last place of a float32 number, relative to it."""

LEVELS = 127
"""Largest multiple in `rounded`."""


def coefficients(
    losses: Sequence[tuple[float, float]], eps: float, rule: CoefficientsName, mean_square: float, steps: int
) -> tuple[tuple[float, ...], float]:
    """The coefficients of a step as float32, none if ``g`` or a loss is not finite, and the moving mean after it.

    Args:
        losses: ``(l+, l-)`` of each direction.
        eps: Perturbation scale.
        rule: The rule.
        mean_square: ``v`` before the step; 0 before the first.
        steps: How many steps it is a mean of.
    """
    gradients = tuple(float32((plus - minus) / (2.0 * eps)) for plus, minus in losses)
    if not all(map(math.isfinite, (*gradients, *(loss for pair in losses for loss in pair)))):
        return (), mean_square
    if rule == "raw" or not any(gradients):
        return gradients, mean_square
    if rule == "ranks":
        return tuple(map(float32, _signed_ranks(gradients))), mean_square
    square = math.fsum(g * g for g in gradients) / len(gradients)
    if rule == "moving":
        # the mean with the weights beta^0, beta^1, ..., divided by their sum
        share = (1.0 - BETA) / (1.0 - BETA ** (steps + 1)) if mean_square else 1.0
        square = mean_square = mean_square + share * (square - mean_square)
    resolution = RESOLUTION * math.fsum(abs(loss) for pair in losses for loss in pair) / (2 * len(losses))
    spread = max(math.sqrt(square), resolution / (2.0 * eps))
    return tuple(float32(g / spread) for g in gradients), mean_square


def rounded(values: Sequence[float]) -> tuple[float, ...]:
    """Numbers as multiples ``-127 ... 127`` of one step, which is 1/127 of the largest magnitude: 8 bits each.

    The step has 17 significant bits, so that every multiple is a float32 without rounding, and `in_steps` finds it.
    """
    step, multiples = in_steps(values)
    return tuple(step * multiple for multiple in multiples)


def in_steps(values: Sequence[float]) -> tuple[float, tuple[int, ...]]:
    """The step of `rounded` and the multiples; of numbers that are rounded those that give them exactly."""
    mantissa, exponent = math.frexp(max(map(abs, values), default=0.0) / LEVELS)
    step = float32(math.ldexp(round(math.ldexp(mantissa, 17)), exponent - 17))
    if step == 0.0:
        return 0.0, (0,) * len(values)
    return step, tuple(max(-LEVELS, min(LEVELS, round(value / step))) for value in values)


def _signed_ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(map(abs, values))
    first = {size: index for index, size in reversed(list(enumerate(ordered)))}
    last = {size: index for index, size in enumerate(ordered)}
    mean = {size: (first[size] + last[size] + 2) / 2 for size in first}  # counted from 1
    return [math.copysign(mean[abs(value)], value) / len(values) if value else 0.0 for value in values]
