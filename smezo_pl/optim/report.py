"""What one optimizer step did, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepReport:
    """The record of one step: with the base seed it is all that is needed to make the step again.

    Attributes:
        step: Index of the step, counted from 0; the noise of the step is drawn with it.
        losses: ``(l+, l-)`` of each sample.
        projected_gradients: ``(l+ - l-) / (2 eps)`` of each sample, rounded to float32, with the ``eps`` of the first
            parameter group. Empty when the step was skipped.
        lr: Learning rate of each parameter group.
        eps: Perturbation scale of each parameter group.
        weight_decay: Weight decay of each parameter group.
        skipped: Whether a loss was not finite, so that no weight was changed.
        refreshed: Whether masks were refreshed since the step before.
        forward_seconds: Wall-clock seconds in the closure, without the writing of perturbed copies on a CPU. On an
            accelerator launches return early and the time of the perturbations inside a layer counts here.
        total_seconds: Wall-clock seconds of the whole step.
    """

    step: int
    losses: tuple[tuple[float, float], ...]
    projected_gradients: tuple[float, ...]
    lr: tuple[float, ...]
    eps: tuple[float, ...]
    weight_decay: tuple[float, ...]
    skipped: bool
    refreshed: bool
    forward_seconds: float
    total_seconds: float

    @property
    def loss(self) -> float:
        """Mean of ``l+`` and ``l-`` over the samples."""
        return sum(plus + minus for plus, minus in self.losses) / (2 * len(self.losses))

    @property
    def other_seconds(self) -> float:
        """Seconds of the step outside the forwards: noise, weight traffic, bookkeeping."""
        return self.total_seconds - self.forward_seconds
