"""Which checkpoints of a run are written and kept: the last one, and the best by a metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from smezo_pl.callbacks.common import run_folder, validates_now
from smezo_pl.trajectory.files import check_readable, serialised, write_atomically


class LastAndBest(Checkpoint):
    """Decides when ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt`` are written; a subclass writes them.

    Args:
        dirpath: Folder to write to; by default the logger's, else ``default_root_dir``.
        every_n_steps: Steps between two checkpoints, at least 1; the end of the run and each validation write one too.
        monitor: Metric that ``best.ckpt`` goes by, looked at after each validation; None for no ``best.ckpt``.
        mode: Whether the smallest or the largest value is the best.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, dirpath: str | None, every_n_steps: int, monitor: str | None, mode: Literal["min", "max"]
    ) -> None:
        super().__init__()
        if not every_n_steps >= 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        self.dirpath, self.every_n_steps, self.monitor, self.mode = dirpath, every_n_steps, monitor, mode
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._folder: Path | None = None
        self._saved_step = -1

    @property
    def state_key(self) -> str:
        """One state whatever the arguments, so that a resumed run may change them."""
        return type(self).__qualname__

    @property
    def best_model_path(self) -> str:
        """Path of ``best.ckpt``, or nothing: for ``ckpt_path="best"``."""
        return self._existing("best")

    @property
    def last_model_path(self) -> str:
        """Path of ``last.ckpt``, or nothing."""
        return self._existing("last")

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best_score": self.best_score, "best_step": self.best_step, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if state_dict["monitor"] == self.monitor:
            self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint where one is due, unless a validation follows: it writes one when it is done."""
        if self._is_due(trainer) and not validates_now(trainer):
            self._save(trainer, in_epoch=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint, and keep it as the best if it is."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or self._folder is None:
            return
        better = self._is_better(trainer)
        if better:
            self.best_step = trainer.global_step
        self._save(trainer, also_best=better, in_epoch=True)

    def _find_folder(self, trainer: Trainer) -> Path:
        """The folder of a run that begins or goes on; until then nothing is saved."""
        self._folder = Path(self.dirpath) if self.dirpath is not None else run_folder(trainer)
        self._saved_step = -1
        return self._folder

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        return step % self.every_n_steps == 0 or step == trainer.max_steps

    def _is_better(self, trainer: Trainer) -> bool:
        if self.monitor is None:
            return False
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            name = type(self).__name__
            raise ValueError(f"{name}: monitor={self.monitor!r} is no metric of this run; there are: {known}")
        score = float(value)
        if self.best_score is None or (score < self.best_score if self.mode == "min" else score > self.best_score):
            self.best_score = score
            return True
        return False

    def _save(self, trainer: Trainer, also_best: bool = False, in_epoch: bool = False) -> None:
        """Write ``last.ckpt``.

        Args:
            trainer: The Trainer.
            also_best: Whether to write ``best.ckpt`` too.
            in_epoch: Whether an epoch is under way: see `begin_epoch`.
        """
        raise NotImplementedError

    def _existing(self, name: str) -> str:
        path = self._folder / "checkpoints" / f"{name}.ckpt" if self._folder is not None else None
        return str(path) if path is not None and path.is_file() else ""


def begin_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint say that its epoch has begun.

    In the epoch after a resume from an epoch's last batch Lightning 2.6 leaves that out, and a second resume from an
    epoch's last batch would then count one epoch too few.
    """
    for progress in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
        progress["completed"] = progress["processed"]
        progress["ready"] = progress["started"] = progress["processed"] + 1


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
                write_atomically(self._folder / "checkpoints" / name, data)
        self._saved_step = trainer.global_step
        trainer.strategy.barrier("WeightCheckpoint.save")
