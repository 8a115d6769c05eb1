"""The record of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smezo_pl.optim.noise import Stream

if TYPE_CHECKING:
    from smezo_pl.optim.kernels import Kernel
    from smezo_pl.optim.selection import Member


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record of one step: with the base seed it is all that is needed to make the step again.

    Attributes:
        step: Index of the step, counted from 0; the noise of the step is drawn with it.
        losses: ``(l+, l-)`` of each sample; empty where they were not kept, as in an exported run.
        projected_gradients: ``(l+ - l-) / (2 eps)`` of each sample, rounded to float32, with the ``eps`` of the first
            parameter group. Empty when the step was skipped.
        lr: Learning rate of each parameter group.
        weight_decay: Weight decay of each parameter group.
        eps: Perturbation scale of each parameter group.
        sparsity: Sparsity of each parameter group.
        skipped: Whether a loss was not finite, so that no weight was changed.
        refreshed: Whether masks were refreshed since the step before.
        thresholds: The thresholds of that refresh as a trajectory stores them; empty where they are not kept.
        forward_seconds: Wall-clock seconds in the closure, without the writing of perturbed copies on a CPU. On an
            accelerator launches return early and the time of the perturbations inside a layer counts here.
        total_seconds: Wall-clock seconds of the whole step. Neither of the two is compared or stored.
    """

    step: int
    losses: tuple[tuple[float, float], ...]
    projected_gradients: tuple[float, ...]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    eps: tuple[float, ...]
    sparsity: tuple[float, ...]
    skipped: bool = False
    refreshed: bool = False
    thresholds: bytes = b""
    forward_seconds: float = field(default=0.0, compare=False)
    total_seconds: float = field(default=0.0, compare=False)

    @property
    def loss(self) -> float:
        """Mean of ``l+`` and ``l-`` over the samples."""
        return sum(plus + minus for plus, minus in self.losses) / (2 * len(self.losses))

    @property
    def other_seconds(self) -> float:
        """Seconds of the step outside the forwards: noise, weight traffic, bookkeeping."""
        return self.total_seconds - self.forward_seconds


def coefficients(groups: Sequence[dict[str, Any]], step: StepRecord) -> list[tuple[list[float], float]]:
    """What an update multiplies with: for each group the factor of each sample's noise, and the decay, in float64."""
    first_eps, gradients = groups[0]["eps"], step.projected_gradients
    found = []
    for group, rate, decay in zip(groups, step.lr, step.weight_decay, strict=True):
        sign = -1.0 if group["maximize"] else 1.0
        scales = [sign * rate * g / len(gradients) * (first_eps / group["eps"]) for g in gradients]
        found.append((scales, rate * decay))
    return found


def check_recorded(recorded: StepRecord, step: int, groups: int, samples: int) -> None:
    """Refuse a step that cannot be made now.

    Args:
        recorded: The step.
        step: Index of the next one.
        groups: Number of parameter groups.
        samples: Samples a step.

    Raises:
        ValueError: If it is not the next one, or numbers are missing.
    """
    if recorded.step != step:
        raise ValueError(f"step {recorded.step} cannot be made now: the next step is {step}")
    if not len(recorded.lr) == len(recorded.weight_decay) == groups:
        raise ValueError(f"lr and weight_decay need one number for each of the {groups} groups")
    if not recorded.skipped and len(recorded.projected_gradients) != samples:
        raise ValueError(
            f"step {recorded.step} has {len(recorded.projected_gradients)} projected gradients, expected {samples}"
        )


def update_in_blocks(optimizer: Any, members: Sequence[tuple[Member, Kernel]], steps: Sequence[StepRecord]) -> None:
    """Make the updates of several steps, tensor by tensor. No mask is refreshed and no eps changed between them.

    The bits are those of the steps one after the other: no tensor's update looks at another tensor.

    Args:
        optimizer: The `SparseMeZO`; its counters are left alone.
        members: Its tensors and the kernel of each.
        steps: The steps, none of them skipped.
    """
    groups = optimizer.param_groups
    numbers = _numbers(groups, steps)
    slow = sorted({kernel.name for _, kernel in members if kernel.name != "numba"})
    if slow:
        optimizer.say_once(f"replay: step by step (slower): kernel {', '.join(slow)} makes one update at a time")
    for member, kernel in members:
        which = next(index for index, group in enumerate(groups) if group is member.group)
        if kernel.name == "numba":
            from smezo_pl.optim.kernels.numba_replay import update_many

            at, scales, decays = numbers[which]
            mask = optimizer.mask_at(member, steps[0].step)
            redrawn = mask.rule == "random" and member.group["mask_update"] == "dynamic"
            first = Stream(optimizer.seed, 0, 0, member.number)
            update_many(member.flat, mask, optimizer.noise, first, at, scales, decays, rounded=True, redrawn=redrawn)
        else:
            for recorded in steps:
                optimizer.moves_at(recorded.step, [member]).update(coefficients(groups, recorded), groups)


def _numbers(
    groups: Sequence[dict[str, Any]], steps: Sequence[StepRecord]
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Of each group: index, scales and decay of those steps that change it."""
    made = [coefficients(groups, step) for step in steps]
    found = []
    for group in range(len(groups)):
        # numpy rounds to float32 as torch does: to nearest, and to infinity beyond its range
        with np.errstate(over="ignore"):
            scales = np.array([each[group][0] for each in made]).astype(np.float32)
            decays = np.array([each[group][1] for each in made]).astype(np.float32)
        some = scales.any(1) | (decays != 0)
        at = np.array([s.step for s in steps], np.int64)
        found.append((at[some], np.ascontiguousarray(scales[some]), np.ascontiguousarray(decays[some])))
    return found
