"""What callbacks share: the run's optimizer, folder and loggers, and one progress bar for the whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from smezo_pl.optim import SparseMeZO


def find_zeroth_order(trainer: Trainer) -> SparseMeZO | None:
    """The run's `SparseMeZO`, if it has one."""
    return next((optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SparseMeZO)), None)


def zeroth_order_optimizer(trainer: Trainer, callback: Callback) -> SparseMeZO:
    """The run's `SparseMeZO`; a ``TypeError`` if it has none."""
    if (optimizer := find_zeroth_order(trainer)) is None:
        present = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
        raise TypeError(f"{type(callback).__name__} needs a SparseMeZO optimizer, the run has {present}")
    return optimizer


def run_folder(trainer: Trainer) -> Path:
    """The folder that a run writes to, the same on every process: the logger's, else ``default_root_dir``."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def log_scalars(trainer: Trainer, scalars: dict[str, float]) -> None:
    """Give scalars to every logger, at the number of optimizer steps."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=trainer.global_step)


def logged_metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    """What was last logged under names with a prefix, without it."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in logged.items()}


def task_and_model(trainer: Trainer) -> tuple[str | None, str]:
    """Names of the run's task, None without one, and of its model."""
    module, task = trainer.lightning_module, getattr(getattr(trainer, "datamodule", None), "task", None)
    model = getattr(module, "pretrained", None) or type(getattr(module, "model", module)).__name__
    return None if task is None else str(getattr(task, "name", task)), model


class RunProgressBar(RichProgressBar):
    """One bar from the first step to the last, with loss, steps/s and the time left.

    Lightning's own bar starts again at every epoch, and an epoch of 1,000 examples is 63 of 20,000 steps.
    """

    def __init__(self, refresh_rate: int = 4) -> None:  # updates per second
        super().__init__(refresh_rate=refresh_rate)

    @property
    def total_train_batches(self) -> int | float:
        """Steps of the run."""
        return self.trainer.estimated_stepping_batches

    @property
    def sanity_check_description(self) -> str:
        """`RunMetrics` measures the run's first and last weights in sanity checks."""
        return "Measuring "

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training  "

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics to show, without the logger's version number, which is in the name of the run's folder."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar, once."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance by one step of the run."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hide the bar of a measurement."""
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking:
            self.on_sanity_check_end(trainer, pl_module)
