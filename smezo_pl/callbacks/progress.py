"""A progress bar for the whole run."""

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class RunProgressBar(RichProgressBar):
    """One bar from the first step to the last, with loss, steps a second and the time left.

    Lightning's own bar starts again at every epoch, and an epoch of 1,000 examples is 63 of 20,000 steps.

    Args:
        refresh_rate: Updates a second.
    """

    def __init__(self, refresh_rate: int = 4) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @property
    def total_train_batches(self) -> int | float:
        """Steps of the run."""
        return self.trainer.estimated_stepping_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training  "

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The metrics to show; the logger's version number is in the run's folder."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar, once."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by a step of the run."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def measuring(self, batches: Iterable[Any], total: int) -> Iterator[Any]:
        """Hand on batches that are scored outside the Trainer's loops, with a bar of their own and the time left."""
        if self.is_disabled:
            yield from batches
            return
        self._init_progress(self.trainer)
        task = self._add_task(total, "Measuring ")
        for number, batch in enumerate(batches, 1):
            yield batch
            self._update(task, number)
        self._update(task, total, visible=False)
