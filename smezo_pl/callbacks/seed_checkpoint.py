"""The record of a run in the Trainer: a new one, or the one that a resumed run goes on with."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from smezo_pl.callbacks.common import zeroth_order_optimizer
from smezo_pl.callbacks.weight_checkpoint import LastAndBest, begin_epoch
from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory import resume
from smezo_pl.trajectory.database import copy, move
from smezo_pl.trajectory.files import check_readable, serialised, write_atomically
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import FILE_NAME, Trajectory, TrajectoryWriter, rewrite
from smezo_pl.trajectory.recorder import Recorder, describe, named_tensors
from smezo_pl.trajectory.replaying import tensors_of
from smezo_pl.trajectory.snapshots import write_anchor

log = logging.getLogger(__name__)


def earlier_record(trainer: Trainer, place: Mapping[str, Any]) -> Trajectory | None:
    """The record of the run that a resumed one goes on with, up to where it does; None for a new run.

    Args:
        trainer: The Trainer, after its checkpoint was read.
        place: The place in the record that the callback's state holds, empty if there is none.
    """
    restored = resume.install(trainer).restored
    if restored is not None:
        return restored.trajectory
    if not place:
        return None
    # a checkpoint of ModelCheckpoint: the weights were in it, the record is where it was
    path, steps = Path(place["record"]), place["steps"]
    if path.is_file():
        trajectory = Trajectory.read(path, damaged=True)
        if trajectory.header.run == place["run"] and trajectory.next_step >= steps:
            trajectory = trajectory.upto(steps)
            if trajectory.check.hex() == place["check"]:
                return trajectory
    log.warning(
        "the record of the run's first %d steps is not in %s: a new one begins with the weights of the checkpoint, "
        "and can be replayed on those alone",
        steps,
        path,
    )
    return None


def open_record(optimizer: SparseMeZO, module: LightningModule, path: Path, earlier: Trajectory | None) -> Recorder:
    """Begin a record, or go on with an earlier one in this run's folder.

    Raises:
        TrajectoryError: If the folder holds the record of another run, or cannot be written.
    """
    if earlier is not None:
        writer = _continue(earlier, path)
        log.info("the record %s goes on after %d steps", path, writer.steps)
        return Recorder(optimizer, writer, resume.network_of(module, writer.header))
    network = resume.network_of(module)
    header = describe(
        optimizer,
        network,
        pretrained=getattr(module, "pretrained", None),
        revision=getattr(module, "revision", None),
        adapter=getattr(module, "adapter", None),
        adapter_seed=getattr(module, "adapter_seed", 0),
    )
    return Recorder(optimizer, TrajectoryWriter.create(path, header), network)


def _continue(earlier: Trajectory, path: Path) -> TrajectoryWriter:
    steps = earlier.next_step
    if not path.exists():
        copy(earlier.path, path)
    elif not os.path.samefile(earlier.path, path):
        raise TrajectoryError(f"{path} is the record of another run: give SeedCheckpoint another dirpath")
    whole = Trajectory.read(path, damaged=True)
    if whole.damage is not None:
        kept = _aside(path, "damaged")
        log.warning(
            "%s is damaged (%s): its sound part is written anew, the file is kept as %s", path, whole.damage, kept
        )
        anew = _aside(path, "sound")
        rewrite(whole.upto(steps), anew)
        move(path, kept)
        os.replace(anew, path)
    later = [mark.steps for mark in whole.marked("checkpoint") if mark.steps > steps]
    if later and whole.damage is None:
        kept = _aside(path, f"until-{max(later)}")
        copy(path, kept)
        log.info("the run goes on from step %d of %d; the record until now is kept as %s", steps, max(later), kept)
    return TrajectoryWriter.resume(path, steps)


def _aside(path: Path, why: str) -> Path:
    """A name beside the record that is free."""
    names = (f"{path.stem}-{why}{number or ''}{path.suffix}" for number in range(1 << 20))
    return next(aside for aside in map(path.with_name, names) if not aside.exists())


class SeedCheckpoint(LastAndBest):
    """Records every step, and writes checkpoints without weights.

    In the run's folder (the logger's, or ``dirpath``) lie ``trajectory.smezo``, the record of the run, and
    ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt``. ``--ckpt_path`` takes the latter for ``fit``, ``validate``,
    ``test`` and ``predict``; the weights come back by replaying the record on the starting weights, and are the run's
    to the last bit. A checkpoint is written to a temporary name, waited for, and renamed, so whatever happens the one
    before is intact. ``ModelCheckpoint`` may be used beside it for whole weights.

    Args:
        dirpath: Folder to write to; by default the logger's, else ``default_root_dir``.
        every_n_steps: Steps between two checkpoints, at least 1; the end of an epoch, of the run and each validation
            write one too.
        monitor: Metric that ``best.ckpt`` goes by, looked at after each validation; None for no ``best.ckpt``.
        mode: Whether the smallest or the largest value is the best.
        anchor_every_n_steps: Steps between two files with whole weights, in ``anchors/``, of which the last is kept:
            a resume then replays at most that many steps. None for none; a multiple of ``every_n_steps``.
        fingerprints: Whether a checkpoint notes a hash of the weights, which a later replay is checked against; it
            costs one reading of the weights (about half a second for a gigabyte on two cores).

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
    ) -> None:
        super().__init__(dirpath, every_n_steps, monitor, mode)
        if anchor_every_n_steps is not None and (anchor_every_n_steps < 1 or anchor_every_n_steps % every_n_steps):
            raise ValueError(
                "anchor_every_n_steps must be a multiple of every_n_steps "
                f"({every_n_steps}), got {anchor_every_n_steps}"
            )
        self.anchor_every_n_steps, self.fingerprints = anchor_every_n_steps, fingerprints
        self._recorder: Recorder | None = None
        self._marked_step = -1
        self._loaded: dict[str, Any] = {}

    # ------------------------------------------------------------------ what Lightning asks for

    @property
    def record_path(self) -> Path | None:
        """The record of the run, once training has begun."""
        return self._folder / FILE_NAME if self._folder is not None else None

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and the place in the record."""
        place = {}
        if self._recorder is not None:
            writer = self._recorder.writer
            place = {
                "run": writer.header.run,
                "steps": writer.steps,
                "check": writer.check.hex(),
                "record": str(writer.path.absolute()),
            }
        return {**super().state_dict(), "place": place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._loaded = state_dict["place"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the Trainer read checkpoints without weights."""
        resume.install(trainer)

    # ------------------------------------------------------------------ the run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back the weights of a resumed run and open its record, or begin a new one."""
        resume.restore(trainer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder, self._marked_step = self._find_folder(trainer), -1
        earlier = earlier_record(trainer, self._loaded)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            optimizer = zeroth_order_optimizer(trainer, self)
            self._recorder = open_record(optimizer, pl_module, folder / FILE_NAME, earlier)
            check_readable(self._checkpoint(trainer, folder))
        if earlier is None:
            self._save(trainer)  # so that a run that ends before its first checkpoint can go on too

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back the weights of a checkpoint without weights."""
        resume.restore(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back the weights of a checkpoint without weights."""
        resume.restore(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back the weights of a checkpoint without weights."""
        resume.restore(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a last checkpoint and close the record."""
        if self._folder is None:
            return
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        self._close()
        log.info("the record of %d steps is %s", trainer.global_step, self.record_path)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back the weights of a run that had ended already: Lightning trains no step of it."""
        resume.restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the record: all steps that were made are in it."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the record if it is still open."""
        self._close()

    def _close(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()

    # ------------------------------------------------------------------ checkpoints

    def _is_due(self, trainer: Trainer) -> bool:
        return super()._is_due(trainer) or trainer.is_last_batch

    def _save(self, trainer: Trainer, also_best: bool = False, in_epoch: bool = False) -> None:
        if self._folder is None:
            return
        data = b""
        if trainer.is_global_zero:
            checkpoint = self._checkpoint(trainer, self._folder)
            if in_epoch:
                begin_epoch(checkpoint)
            data = serialised(checkpoint)
        if self._recorder is not None:
            self._anchor(trainer.global_step)
            if self.fingerprints and self._marked_step != trainer.global_step:
                self._recorder.mark_weights()
                self._marked_step = trainer.global_step
            folder = self._folder / "checkpoints"
            for name in ("last.ckpt", "best.ckpt") if also_best else ("last.ckpt",):
                # the record knows the file before the file is there: without an entry it would be taken for damaged
                self._recorder.writer.mark("checkpoint", file=name, sha256=sha256(data).hexdigest())
                write_atomically(folder / name, data)
        self._saved_step = trainer.global_step
        trainer.strategy.barrier("SeedCheckpoint.save")

    def _anchor(self, step: int) -> None:
        """Write whole weights where they are due, and drop those before them."""
        due = self.anchor_every_n_steps is not None and step > 0 and step % self.anchor_every_n_steps == 0
        if not due or self._recorder is None or self._folder is None or self._saved_step == step:
            return
        recorder, path = self._recorder, self._folder / "anchors" / f"step-{step}.safetensors"
        header = recorder.writer.header
        tensors = tensors_of(header, named_tensors(recorder.optimizer, recorder.model), str(recorder.writer.path))
        digest = write_anchor(path, recorder.optimizer, header, tensors)
        recorder.writer.mark("anchor", file=str(path.relative_to(self._folder)), sha256=digest)
        for earlier in path.parent.glob("step-*.safetensors"):
            if earlier != path:
                earlier.unlink()

    def _checkpoint(self, trainer: Trainer, folder: Path) -> dict[str, Any]:
        """Lightning's checkpoint with the place in the record instead of weights."""
        checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        del checkpoint["state_dict"]
        for state in checkpoint["optimizer_states"]:
            if "smezo" in state:
                state["smezo"]["bits"] = {}  # constant masks: the replay makes them again
        if self._recorder is not None:
            writer = self._recorder.writer
            checkpoint[resume.SEED_KEY] = {
                "run": writer.header.run,
                "steps": writer.steps,
                "check": writer.check.hex(),
                "record": os.path.relpath(writer.path, folder / "checkpoints"),
            }
        return checkpoint
