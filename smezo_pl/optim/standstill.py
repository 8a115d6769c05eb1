"""Whether a run does anything: steps whose losses are equal on both sides, updates that are rounded away."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smezo_pl.optim.kernels.base import packed_size
from smezo_pl.optim.masks import count_ones

if TYPE_CHECKING:
    from smezo_pl.optim.step import StepPerturbation, StepRecord, TensorPasses

logger = logging.getLogger(__name__)

PATIENCE = 20
"""Steps without effect until it is said."""

_SAMPLE = 4096  # weights at the beginning of each tensor that are looked at


class Standstill:
    """Says, once, after `PATIENCE` steps in a row without effect, that they had none, and the likely reason.

    A step has none if all its projected gradients are 0, or if hardly a weight of a sample changes although lr is above
    0: only those that were 0, or next to it.
    Steps with lr 0, as at the beginning of a warmup, and skipped ones do not count.

    Attributes:
        reason: Why the last steps had no effect; None if they had one, or if the loss has reached 0.
        moved: Whether the two losses of any step so far were different.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.moved = False
        self._flat = self._updates = 0
        self._range = (0.0, 0.0)  # of the loss over the steps with equal losses
        self._before: dict[int, Tensor] | None = None
        self._watching = True  # until an update is seen to change a weight

    def look(self, record: StepRecord, step: StepPerturbation) -> None:
        """Look at a step whose update is about to be made."""
        if record.skipped:
            return
        if not any(record.projected_gradients):
            low, high = self._range if self._flat else (record.loss, record.loss)
            self._flat, self._range = self._flat + 1, (min(low, record.loss), max(high, record.loss))
            if self._flat == PATIENCE:
                rest = "only weight decay changed weights" if any(record.weight_decay) else "no weight was updated"
                self._say(record, f"both losses were equal, so {rest}", self._why_flat(step))
                if self.moved and self._range == (0.0, 0.0):
                    self.reason = None
            return
        self.moved = True
        if self._flat >= PATIENCE:
            self.reason = None
        self._flat = 0
        if self._watching and any(record.lr):
            self._compare(record, step)

    def why_dead(self, steps: int, skipped: int) -> str | None:
        """Why a run of so many steps, of which some were skipped, did nothing at its end; None if it did something."""
        if self.reason is None and 0 < steps == self._flat + skipped:
            return f"in none of its {steps} steps were the losses finite and different"
        return self.reason

    def _say(self, record: StepRecord, what: str, reason: str) -> None:
        if self.reason is None:
            logger.warning("the last %d steps (to %d) did nothing: %s. %s", PATIENCE, record.step + 1, what, reason)
        self.reason = f"{what}. {reason}"

    def _compare(self, record: StepRecord, step: StepPerturbation) -> None:
        if self._before is None:
            self._before = {key: _sample(passes).clone() for key, passes in step.passes.items()}
        self._updates += 1
        if self._updates % PATIENCE:
            return
        changed, most = torch.zeros((), dtype=torch.int64), 0
        for key, before in self._before.items():
            passes = step.passes[key]
            changed += ((_sample(passes) != before) & (before != 0)).sum().cpu()
            # Where updates are rounded to nearest, the few weights near 0 still change. 16-bit weights are rounded
            # stochastically, so that few changes in a step are enough.
            most += _active(passes, _SAMPLE) // 1000 if before.element_size() >= 4 else 0
        active = sum(_active(passes, _SAMPLE) for passes in step.passes.values())
        if int(changed) > most:
            self._watching, self._before, self.reason = False, None, None
        elif active:
            gradient = max(map(abs, record.projected_gradients))
            reason = f"Updates of lr {max(record.lr):g} times {gradient:g} are rounded away: raise lr"
            self._say(record, "hardly a weight changed", reason)

    def _why_flat(self, step: StepPerturbation) -> str:
        low, high = self._range
        if not any(_active(passes) for passes in step.passes.values()):
            way = "lower lr, and begin again" if self.moved else "refresh the masks, or lower sparsity"
            return f"No weight is active{' any more' if self.moved else ''}: {way}"
        if all(_rounded_away(passes) for passes in step.passes.values()):
            largest = max(float(part.abs().max()) for passes in step.passes.values() if len(part := _sample(passes)))
            way = "lower lr, and begin again" if self.moved or largest > 1e4 else "raise eps"
            return f"Beside weights of up to {largest:g}, eps is rounded away: {way}"
        if low == high:
            constant = (
                "the model has diverged to a constant output (lower lr, and begin again)"
                if self.moved
                else "the model's output is constant, or does not depend on the weights that are optimized"
            )
            return (
                f"The loss was {low:g} in each: {constant}, or the loss is a step function such as an accuracy (then a "
                "larger eps or batch may help)"
            )
        return (
            "The loss changes with the batch, and not with the weights that are optimized: does the model read them, "
            "and is eps large enough?"
        )


def _sample(passes: TensorPasses) -> Tensor:
    return passes.tensor.flat[:_SAMPLE]


def _active(passes: TensorPasses, most: int | None = None) -> int:
    """How many of the first ``most`` weights of a tensor are active."""
    flat, bits = passes.tensor.flat[:most], passes.mask.bits
    if bits is not None:
        bits = bits[: packed_size(flat.numel())]
    return count_ones(passes.kernel.pack(flat, replace(passes.mask, bits=bits)))


def _rounded_away(passes: TensorPasses) -> bool:
    """Whether a perturbation of 4 eps, larger than almost all, changes no weight of the sample."""
    weights = _sample(passes)
    return torch.equal(weights + 4 * float(passes.tensor.group["eps"]), weights)
