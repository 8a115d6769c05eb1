"""The record of a run in the Trainer: a new one, or the one that a resumed run goes on with."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory import resume
from smezo_pl.trajectory.errors import TrajectoryError
from smezo_pl.trajectory.reader import Trajectory
from smezo_pl.trajectory.recorder import Recorder, describe
from smezo_pl.trajectory.store import move, snapshot
from smezo_pl.trajectory.writer import TrajectoryWriter, rewrite

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
        snapshot(earlier.path, path)
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
        snapshot(path, kept)
        log.info("the run goes on from step %d of %d; the record until now is kept as %s", steps, max(later), kept)
    return TrajectoryWriter.resume(path, steps)


def _aside(path: Path, why: str) -> Path:
    """A name beside the record that is free."""
    names = (f"{path.stem}-{why}{number or ''}{path.suffix}" for number in range(1 << 20))
    return next(aside for aside in map(path.with_name, names) if not aside.exists())
