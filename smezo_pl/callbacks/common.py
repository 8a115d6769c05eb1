"""What several callbacks need: the optimizer of a run, its folder, its masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smezo_pl.optim import SparseMeZO

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer


def zeroth_order_optimizer(trainer: Trainer, callback: Callback) -> SparseMeZO:
    """The run's `SparseMeZO`.

    Raises:
        TypeError: If it has none.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, SparseMeZO):
            return optimizer
    found = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
    raise TypeError(f"{type(callback).__name__} needs a SparseMeZO optimizer, the run has {found}")


def step_loss(trainer: Trainer, module: Any) -> float:
    """The training loss of the last step: the optimizer's, or by backpropagation the module's."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, SparseMeZO):
            return optimizer.last_step.loss
    return float(module.backpropagation.last_loss)


def validates_now(trainer: Trainer) -> bool:
    """Whether Lightning validates after this batch."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def run_folder(trainer: Trainer) -> Path:
    """The folder that a run writes to, the same on every process: the logger's, else ``default_root_dir``."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def log_scalars(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    """Give scalars to every logger, at a number of optimizer steps."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)


def figure_writers(trainer: Trainer) -> list[Any]:
    """Those loggers' writers that take matplotlib figures (TensorBoard's do)."""
    writers = (getattr(logger, "experiment", None) for logger in trainer.loggers)
    return [writer for writer in writers if hasattr(writer, "add_figure")]


SAMPLE = 1 << 26
"""Most weights whose masks are kept to be compared later: 8 MiB of bits."""


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


def selected(bits: Tensor) -> int:
    """Number of set bits of a packed mask."""
    counts = torch.bincount(bits.flatten(), minlength=256)
    ones = torch.tensor([value.bit_count() for value in range(256)], device=bits.device)
    return int((counts * ones).sum())


def churn(before: Mapping[str, Tensor], after: Mapping[str, Tensor], optimizer: SparseMeZO) -> float:
    """Share of the weights that one mask selects and the other does not, over the tensors of ``before``."""
    sizes = _sizes(optimizer)
    changed = sum(selected(before[name] ^ after[name]) for name in before)
    return changed / sum(sizes[name] for name in before)


def density(masks: Mapping[str, Tensor], optimizer: SparseMeZO) -> float:
    """Share of the weights that the masks select."""
    sizes = _sizes(optimizer)
    return sum(selected(bits) for bits in masks.values()) / sum(sizes[name] for name in masks)


def _sizes(optimizer: SparseMeZO) -> dict[str, int]:
    return {
        name: parameter.numel()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
