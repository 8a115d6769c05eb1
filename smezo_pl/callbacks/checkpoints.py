"""Checkpoints of a run: the last and the best by a metric, with weights or with a trajectory in their place."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, StochasticWeightAveraging, WeightAveraging

from smezo_pl.callbacks.common import run_folder, zeroth_order_optimizer
from smezo_pl.data.loaders import logged_name
from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory import resume
from smezo_pl.trajectory.log import FILE_NAME
from smezo_pl.trajectory.recorder import Recorder, named_tensors
from smezo_pl.trajectory.replaying import tensors_of, write_snapshot

log = logging.getLogger(__name__)


class WeightCheckpoint(ModelCheckpoint):
    """Writes ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt`` with all weights that are trained.

    What `SeedCheckpoint` is to a zeroth-order run, with the weights and AdamW's state in the file: an adapter or a
    linear layer is small, full fine-tuning takes three times the model. A file is written under a temporary name,
    synced to disk and renamed, so the one before is intact whatever happens.

    Args:
        dirpath: Folder of the run; by default the logger's, else ``default_root_dir``.
        every_n_steps: Steps between two checkpoints, at least 1; one is also written at the end of the run and after
            each validation.
        monitor: Metric that decides which checkpoint is the best, read after each validation; None for no
            ``best.ckpt``. Without ``/dataloader_idx_N``, the first of several dataloaders decides. A value that is
            infinite or NaN is never the best.
        mode: Whether the smallest or the largest value is the best.
        save_top_k: Number of best checkpoints to keep; -1 for one per validation.
        filename: Their name without ``.ckpt``, with metrics in braces: ``step={step}-loss={val/loss:.3f}``. By default
            ``best``, and ``step={step}`` if more than one is kept.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int = 100,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        filename: str | None = None,
    ) -> None:
        if not every_n_steps >= 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        super().__init__(
            filename=filename or ("best" if save_top_k == 1 else "step={step}"),
            auto_insert_metric_name=False,  # a metric's name has a slash
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_top_k=save_top_k if monitor is not None else 0,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.given_folder = dirpath
        self._forget()
        self._recorder: Recorder | None = None

    def _forget(self) -> None:
        """Begin without the scores and files of a run before, as when the callback goes to a second Trainer."""
        self.best_k_models = {}
        self.best_model_score = self.current_score = None
        self.best_model_path = self.kth_best_model_path = self.last_model_path = ""
        self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.best_step: int | None = None

    @property
    def state_key(self) -> str:
        """One state whatever the arguments, so that a resumed run may change them."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and the scores of the files that are kept if they are not ``best.ckpt`` alone."""
        score = None if self.best_model_score is None else float(self.best_model_score)
        state = {"best_score": score, "best_step": self.best_step, "monitor": self.monitor}
        files = {Path(path).name: float(score) for path, score in self.best_k_models.items()}
        return state | ({"files": files} if files.keys() - {"best.ckpt"} else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to compare with the best scores of the run that is resumed, if they are of the same metric."""
        if state_dict["monitor"] != self.monitor or state_dict["best_score"] is None:
            return
        scores = state_dict.get("files", {"best.ckpt": state_dict["best_score"]})
        ranked = sorted(scores, key=lambda name: scores[name], reverse=self.mode == "max")
        ranked = ranked[: self.save_top_k if self.save_top_k > 0 else None]
        self.best_k_models = {str(Path(self.dirpath or "", name)): torch.tensor(scores[name]) for name in ranked}
        kept = list(self.best_k_models.items())
        best, self.best_model_score = kept[0]
        self.kth_best_model_path, self.kth_value = kept[-1]
        self.best_step = state_dict["best_step"]
        self.best_model_path = best if Path(best).is_file() else ""  # the run may have a new folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and let the Trainer read and write checkpoints without weights."""
        # not `ModelCheckpoint.setup`, which warns of the files of the run that is resumed
        resume.install(trainer)
        if stage == "fit":
            self._forget()  # the state of a checkpoint comes after this
        self._folder = run_folder(trainer) if self.given_folder is None else Path(self.given_folder).absolute()
        self.dirpath = str(self._folder / "checkpoints")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of a run that begins, so that it resumes wherever it ends."""
        self._last_global_step_saved = 0
        if trainer.global_step == 0 and trainer.optimizers and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save_last_checkpoint(trainer, {})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a checkpoint if one is due, unless a validation follows: one is written after it."""
        loop: Any = trainer.fit_loop
        for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
            # Lightning 2.6 does not count the epoch as begun that follows a resume from an epoch's last batch, and a
            # second resume from an epoch's last batch would then count one epoch too few.
            progress.completed = progress.processed
            progress.ready = progress.started = progress.processed + 1
        # A resume makes up for no validation: where one is due, a signal leaves the checkpoint of an earlier step.
        validates_now = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if self._is_due(trainer) and not validates_now and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, {})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint, and keep it if it is one of the best."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        metrics = self._monitor_candidates(trainer)
        if self.monitor is not None:
            name = logged_name(self.monitor, metrics)
            if name not in metrics:
                known = ", ".join(sorted(trainer.callback_metrics)) or "none"
                raise ValueError(
                    f"{type(self).__name__}: monitor={self.monitor!r} is no metric of this run; there are: {known}"
                )
            metrics[self.monitor] = metrics[name]
            if self.best_model_score is None and name != self.monitor:
                log.info("the best checkpoint is that by %s", name)
        # What is not finite is no score: none of the best, and never in the way of a later one.
        if self.monitor is None or self.save_top_k == -1 or metrics[self.monitor].isfinite():
            self._save_topk_checkpoint(trainer, metrics)
        self._save_last_checkpoint(trainer, metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a last checkpoint."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, {})

    def _is_due(self, trainer: Trainer) -> bool:
        stops = trainer.received_sigterm and trainer.world_size == 1  # a save waits for all processes
        return stops or trainer.global_step % self._every_n_train_steps == 0 or trainer.global_step == trainer.max_steps

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if filepath == self.best_model_path:
            self.best_step = trainer.global_step
        writer = self._recorder.writer if self._recorder is not None else None
        with _before_the_next_epoch(trainer):
            trainer.save_checkpoint(filepath, False, storage_options=resume.Atomic(writer))
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath


@contextmanager
def _before_the_next_epoch(trainer: Trainer) -> Iterator[None]:
    """Inside the block a resume from an epoch's last batch begins the next epoch, as it does where a validation is due.

    Of a run that is stopped there Lightning 2.6 takes the next epoch's batches for more of that epoch.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    stops, trainer.should_stop = trainer.should_stop, False  # else a validation is due in any case
    ended = progress.is_last_batch and progress.current.completed == progress.current.processed
    ended = ended and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
    trainer.should_stop = stops
    counters = (progress.total, progress.current) if ended else ()
    for counter in counters:
        counter.completed -= 1  # as in `on_train_batch_end`, from where Lightning resumes rightly
    try:
        yield
    finally:
        for counter in counters:
            counter.completed += 1


class SeedCheckpoint(WeightCheckpoint):
    """Records every step, and writes checkpoints without weights.

    The run's folder (the logger's, or ``dirpath``) holds ``trajectory.smezo``, the trajectory, and
    ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt``. ``--ckpt_path`` takes these for ``fit``, ``validate``,
    ``test`` and ``predict``; the weights come back by replaying the trajectory on the starting weights, and are the
    run's to the last bit. A checkpoint is written under a temporary name, synced to disk and renamed, so the one before
    is intact whatever happens. ``ModelCheckpoint`` may be used beside it for full weights.

    Args:
        dirpath: Folder of the run; by default the logger's, else ``default_root_dir``.
        every_n_steps: Steps between two checkpoints, at least 1; one is also written at the end of an epoch and of the
            run, and after each validation.
        monitor: Metric that decides which checkpoint is the best, read after each validation; None for no
            ``best.ckpt``. Without ``/dataloader_idx_N``, the first of several dataloaders decides. A value that is
            infinite or NaN is never the best.
        mode: Whether the smallest or the largest value is the best.
        anchor_every_n_steps: Steps between two files with the full weights in ``anchors/``, of which the last is kept:
            a resume then replays at most that many steps. None for none; a multiple of ``every_n_steps``.
        fingerprints: Whether a hash of the weights is stored with a checkpoint, which a later replay is checked
            against; it reads the weights once (about half a second per gigabyte on two cores).
        save_top_k: Number of best checkpoints to keep; -1 for one per validation.
        filename: Their name without ``.ckpt``, with metrics in braces: ``step={step}-loss={val/loss:.3f}``. By default
            ``best``, and ``step={step}`` if more than one is kept.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int = 100,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        anchor_every_n_steps: int | None = None,
        fingerprints: bool = True,
        save_top_k: int = 1,
        filename: str | None = None,
    ) -> None:
        super().__init__(dirpath, every_n_steps, monitor, mode, save_top_k, filename)
        if anchor_every_n_steps is not None and (anchor_every_n_steps < 1 or anchor_every_n_steps % every_n_steps):
            raise ValueError(
                "anchor_every_n_steps must be a multiple of every_n_steps "
                f"({every_n_steps}), got {anchor_every_n_steps}"
            )
        self.anchor_every_n_steps, self.fingerprints = anchor_every_n_steps, fingerprints

    def _forget(self) -> None:
        super()._forget()
        self._place: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The state of `WeightCheckpoint`, and the position in the trajectory."""
        writer = self._recorder.writer if self._recorder is not None else None
        place = {} if writer is None else {**resume.position_of(writer), "record": str(writer.path.absolute())}
        return {**super().state_dict(), "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load_state_dict(state_dict)
        self._place = state_dict["place"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the settings of a resumed run if its module does not."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, SparseMeZO) and (resumed := resume.settle(trainer, optimizer, optimizer)):
                resumed.settle_built_schedule(optimizer, [config.scheduler for config in trainer.lr_scheduler_configs])
                resumed.log()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse callbacks whose weights are in no trajectory, and do what `WeightCheckpoint` does."""
        kinds = (WeightAveraging, StochasticWeightAveraging, ModelPruning)
        if stage == "fit" and (other := next((c for c in trainer.callbacks if isinstance(c, kinds)), None)):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{type(other).__name__} gives the model weights that the optimizer did not make, and the checkpoints "
                "of SeedCheckpoint hold the optimizer's steps alone: leave it out, or use WeightCheckpoint in place of "
                "SeedCheckpoint, which saves whole weights"
            )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back the weights of a resumed run and open its trajectory, or begin a new one."""
        resume.restore(trainer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._last_global_step_saved = -1
        earlier = resume.earlier_trajectory(trainer, self._place)
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            optimizer = zeroth_order_optimizer(trainer, self)
            self._recorder = resume.open_trajectory(optimizer, pl_module, self._folder / FILE_NAME, earlier)
        if earlier is None:
            self._save_last_checkpoint(trainer, {})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back the weights of a checkpoint without weights."""
        resume.restore(trainer)

    # after `fit` for a run that had ended already: Lightning trains no step of it
    on_test_start = on_predict_start = on_fit_end = on_validation_start

    def on_validation_batch_start(self, *_: Any) -> None:
        """Refuse to score weights that are not the trajectory's."""
        if self._recorder is not None:
            self._recorder.refuse_writes()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a last checkpoint and close the trajectory."""
        self.on_validation_batch_start()
        super().on_train_end(trainer, pl_module)
        if self._recorder is not None:
            log.info("the trajectory of %d steps is %s", trainer.global_step, self._recorder.writer.path)
            self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the trajectory."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the trajectory: it holds all steps that were made."""
        self.teardown(trainer, pl_module, "fit")

    def _is_due(self, trainer: Trainer) -> bool:
        return super()._is_due(trainer) or trainer.is_last_batch

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        step, every = trainer.global_step, self.anchor_every_n_steps
        if self._recorder is not None and step != self._last_global_step_saved:  # not for the second of two files
            if every is not None and step > 0 and step % every == 0:
                self._write_snapshot(self._recorder)
            if self.fingerprints:
                self._recorder.mark_weights()
        super()._save_checkpoint(trainer, filepath)

    def _write_snapshot(self, recorder: Recorder) -> None:
        """Write a full-weight snapshot, and delete those before it."""
        writer = recorder.writer
        path = self._folder / "anchors" / f"step-{writer.steps}.safetensors"
        tensors = tensors_of(writer.header, named_tensors(recorder.optimizer, recorder.model), str(writer.path))
        digest = write_snapshot(path, recorder.optimizer, writer.header, tensors)
        writer.add_event("anchor", file=str(path.relative_to(self._folder)), sha256=digest)
        for earlier in set(path.parent.glob("step-*.safetensors")) - {path}:
            earlier.unlink()
