"""What the callbacks share: the run's optimizer, its folder, and loggers that take figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
