"""Masks computed again from the current weights, a schedule of sparsity, and how two masks compare."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from smezo_pl.callbacks.common import log_scalars, zeroth_order_optimizer
from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.masks import count_ones

log = logging.getLogger(__name__)

SAMPLE = 1 << 26  # weights at most whose masks are kept to be compared later: 8 MiB of bits


class MaskRefresh(Callback):
    """Calls `SparseMeZO.refresh_masks` every so many steps or epochs.

    Otherwise thresholds are computed once, before training (the paper's choice). Logged at each refresh:
    ``mask/density``, the fraction of active weights, ``mask/churn``, the fraction that became active or inactive (both
    over a sample of the tensors in models of more than 67 million weights), and ``mask/sparsity`` if it is scheduled.

    Args:
        every_n_steps: Steps between two refreshes, at least 1.
        every_n_epochs: Epochs between two refreshes, at least 1; instead of steps.
        sparsity: Sparsity in ``[0, 1)`` from a step on (with ``every_n_epochs`` from an epoch on), for instance
            ``{0: 0.5, 1000: 0.8}``; masks are refreshed where it changes. None leaves each group its own.

    Raises:
        ValueError: If no argument says when, or one is out of range.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        sparsity: dict[int, float] | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_epochs is not None:
            raise ValueError("MaskRefresh takes every_n_steps or every_n_epochs, not both")
        if every_n_steps is None and every_n_epochs is None and not sparsity:
            raise ValueError("MaskRefresh needs every_n_steps, every_n_epochs or sparsity: it would never refresh")
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for start, fraction in (sparsity or {}).items():
            if not start >= 0:
                raise ValueError(f"sparsity must start at 0 or later, got {start}")
            if not 0.0 <= fraction < 1.0:
                raise ValueError(f"sparsity must be in [0, 1), got {fraction} from {start} on")
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.sparsity = dict(sorted((sparsity or {}).items()))

    @property
    def keeps_sparsity(self) -> bool:
        """Whether masks are refreshed with each group's own sparsity: a resumed run may then be given another."""
        return not self.sparsity

    @property
    def state_key(self) -> str:
        """The arguments: Lightning warns if a run is resumed without this callback, or with others."""
        return self._generate_state_key(**self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """When masks are refreshed, and with which sparsity."""
        return {name: getattr(self, name) for name in ("every_n_steps", "every_n_epochs", "sparsity")}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the sparsity that the schedule begins with."""
        if trainer.global_step == 0 and 0 in self.sparsity:
            zeroth_order_optimizer(trainer, self).refresh_masks(self.sparsity[0])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Refresh where it is due, unless the run ends here.

        Also for epochs, whose own hook comes after the checkpoint of their last step and would be left out of a resume.
        """
        if self.every_n_epochs is not None and not trainer.is_last_batch:
            return
        now = trainer.global_step if self.every_n_epochs is None else trainer.current_epoch + 1
        period = self.every_n_epochs or self.every_n_steps
        is_due = now in self.sparsity or (period is not None and now % period == 0)
        if not is_due or trainer.global_step == trainer.max_steps:
            return
        optimizer = zeroth_order_optimizer(trainer, self)
        names = sampled_names(optimizer)
        before = optimizer.packed_masks(names)
        scheduled = [value for start, value in self.sparsity.items() if start <= now]
        optimizer.refresh_masks(scheduled[-1] if scheduled else None)
        after = optimizer.packed_masks(names)
        scalars = {"mask/churn": churn(before, after, optimizer), "mask/density": density(after, optimizer)}
        if scheduled:
            scalars["mask/sparsity"] = scheduled[-1]
        log_scalars(trainer, scalars)
        values = ", ".join(f"{name.removeprefix('mask/')} {value:.4g}" for name, value in scalars.items())
        log.info("masks refreshed after step %d: %s", trainer.global_step, values)


def sampled_names(optimizer: SparseMeZO, limit: int = SAMPLE) -> list[str]:
    """Names of tensors that together hold at most about ``limit`` weights, spread evenly over the model."""
    sizes = _sizes(optimizer)
    share = min(1.0, limit / max(1, sum(sizes.values())))
    names: list[str] = []
    owed = 0.0
    for name, size in sizes.items():
        owed += size * share
        if size <= owed:
            names.append(name)
            owed -= size
    return names or [min(sizes, key=lambda name: sizes[name])]


def density(masks: Mapping[str, Tensor], optimizer: SparseMeZO) -> float:
    """Fraction of the weights that the masks select."""
    sizes = _sizes(optimizer)
    return sum(map(count_ones, masks.values())) / sum(sizes[name] for name in masks)


def churn(before: Mapping[str, Tensor], after: Mapping[str, Tensor], optimizer: SparseMeZO) -> float:
    """Fraction of the weights that one mask selects and the other does not, over the tensors of ``before``."""
    return density({name: before[name] ^ after[name] for name in before}, optimizer)


def _sizes(optimizer: SparseMeZO) -> dict[str, int]:
    return {
        name: parameter.numel()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
