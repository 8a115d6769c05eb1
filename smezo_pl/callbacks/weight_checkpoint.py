"""Checkpoints with the learned weights, for the methods whose runs cannot be replayed."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from smezo_pl.callbacks.checkpoint_files import check_readable, serialised, write_whole
from smezo_pl.callbacks.last_and_best import LastAndBest, begin_epoch


class WeightCheckpoint(LastAndBest):
    """Writes ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt`` with everything that is learned.

    What `SeedCheckpoint` is to a zeroth-order run, with weights and AdamW's state in the file instead of a place in a
    record: an adapter or a linear layer is small, full fine-tuning takes three times the model. A file is written to a
    temporary name, waited for, and renamed, so the one before is intact whatever happens.

    Args:
        dirpath: Folder to write to; by default the logger's, else ``default_root_dir``.
        every_n_steps: Steps between two checkpoints, at least 1; the end of the run and each validation write one too.
        monitor: Metric that ``best.ckpt`` goes by, looked at after each validation; None for no ``best.ckpt``.
        mode: Whether the smallest or the largest value is the best.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int = 100,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        super().__init__(dirpath, every_n_steps, monitor, mode)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder, and write the checkpoint of a run that begins."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._find_folder(trainer)
        if trainer.global_step == 0 and trainer.optimizers:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a last checkpoint."""
        if self._folder is not None and self._saved_step != trainer.global_step and trainer.optimizers:
            self._save(trainer)

    def _save(self, trainer: Trainer, also_best: bool = False, in_epoch: bool = False) -> None:
        if self._folder is None:
            return
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if in_epoch:
            begin_epoch(checkpoint)
        if trainer.is_global_zero:
            if self._saved_step < 0:
                check_readable({name: value for name, value in checkpoint.items() if name != "state_dict"})
            data = serialised(checkpoint)
            for name in ("last.ckpt", "best.ckpt") if also_best else ("last.ckpt",):
                write_whole(self._folder / "checkpoints" / name, data)
        self._saved_step = trainer.global_step
        trainer.strategy.barrier("WeightCheckpoint.save")
