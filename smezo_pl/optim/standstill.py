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

    A step has none if all its projected gradients are 0, or if no weight of a sample changes although lr is above 0.
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
        self._before: list[Tensor] | None = None
        self._watching = True  # until an update is seen to change a weight

    def after(self, record: StepRecord, step: StepPerturbation) -> None:
        """Look at a step that has been made."""
        if record.skipped:
            return
        if not any(record.projected_gradients):
            low, high = self._range if self._flat else (record.loss, record.loss)
            self._flat, self._range = self._flat + 1, (min(low, record.loss), max(high, record.loss))
            if self._flat == PATIENCE:
                self._say(record, "both losses were equal, so no weight was updated", self._why_flat(step))
                if self.moved and self._range == (0.0, 0.0):
                    self.reason = None
            return
        self.moved = True
        if self._flat >= PATIENCE:
            self.reason = None
        self._flat = 0
        if self._watching and any(record.lr):
            self._compare(record, step)

    def _say(self, record: StepRecord, what: str, reason: str) -> None:
        if self.reason is None:
            logger.warning("the last %d steps (to %d) did nothing: %s. %s", PATIENCE, record.step + 1, what, reason)
        self.reason = f"{what}. {reason}"

    def _compare(self, record: StepRecord, step: StepPerturbation) -> None:
        self._updates += 1
        if self._before is None:
            self._before = [_sample(passes).clone() for passes in step.passes.values()]
        elif self._updates % PATIENCE == 0:
            pairs = zip(self._before, step.passes.values(), strict=False)
            if any(not torch.equal(before, _sample(passes)) for before, passes in pairs):
                self._watching, self._before, self.reason = False, None, None
            elif _active(step, _SAMPLE):
                rate = (
                    f"lr {max(record.lr):g} times a projected gradient of {max(map(abs, record.projected_gradients)):g}"
                )
                self._say(record, "no weight changed", f"{rate} is rounded away: raise lr")

    def _why_flat(self, step: StepPerturbation) -> str:
        low, high = self._range
        if not _active(step):
            return "No weight is active: refresh the masks, or lower sparsity"
        if all(_rounded_away(passes) for passes in step.passes.values()):
            largest = max(float(_sample(passes).abs().max()) for passes in step.passes.values())
            return f"The weights, up to {largest:g}, are so large that eps is rounded away: lower lr, and begin again"
        if low == high:
            return (
                f"The loss was {low:g} in each: the model's output has become constant, or does not depend on the "
                "weights that are optimized, or the loss is a step function such as an accuracy (then a larger eps or "
                "batch may help)"
            )
        return (
            "The loss changes with the batch, and not with the weights that are optimized: does the model read them, "
            "and is eps large enough?"
        )


def _sample(passes: TensorPasses) -> Tensor:
    return passes.tensor.flat[:_SAMPLE]


def _active(step: StepPerturbation, most: int | None = None) -> int:
    """How many of the first ``most`` weights of each tensor are active."""
    total = 0
    for tensor, kernel, mask, _ in step.passes.values():
        flat = tensor.flat[:most]
        bits = None if mask.bits is None else mask.bits[: packed_size(flat.numel())]
        total += count_ones(kernel.pack(flat, replace(mask, bits=bits)))
    return total


def _rounded_away(passes: TensorPasses) -> bool:
    """Whether a perturbation of 4 eps, larger than almost all, changes no weight of the sample."""
    weights = _sample(passes)
    return torch.equal(weights + 4 * float(passes.tensor.group["eps"]), weights)
