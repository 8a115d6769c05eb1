"""Folders of the command line's runs: each belongs to one run, and ``--ckpt_path`` finds the files in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from smezo_pl.callbacks import WeightCheckpoint
from smezo_pl.trajectory.database import WriterLock
from smezo_pl.trajectory.log import FILE_NAME, Trajectory
from smezo_pl.trajectory.resume import SEED_KEY

_LEFTOVERS = ("events.out.tfevents*", "hparams.yaml", "config.yaml")  # what is written before there is any result


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger; its ``version_<n>`` is made by this run alone, however many start at once."""

    def _get_next_version(self) -> int:
        root = Path(os.path.expanduser(os.path.expandvars(self.root_dir)))  # as in `log_dir`
        for number in count(max((number for number, _ in versions(root)), default=-1) + 1):
            if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
                break  # Lightning broadcasts the first process's
            with suppress(FileExistsError):
                (root / f"version_{number}").mkdir(parents=True)
                break
        return number


def versions(root: Path) -> list[tuple[int, Path]]:
    """The folders ``version_<n>`` in a folder, the newest first."""
    found = ((path.name.removeprefix("version_"), path) for path in root.glob("version_*") if path.is_dir())
    return sorted(((int(number), path) for number, path in found if number.isdecimal()), reverse=True)


def checkpoint_folders(trainer: Trainer, logger: Any) -> list[Path]:
    """The run's folders that may hold its checkpoints: one that is configured, else those of its name, newest first."""
    given = [
        Path(c.given_folder) for c in trainer.checkpoint_callbacks if isinstance(c, WeightCheckpoint) and c.given_folder
    ]
    if given:
        return given
    if not isinstance(logger, TensorBoardLogger | CSVLogger) or logger._version is not None:
        return [_folder(trainer, logger)]
    return [path for _, path in versions(Path(logger.root_dir))]


def find_checkpoint(given: str, trainer: Trainer, logger: Any) -> str:
    """The file that ``--ckpt_path`` names: ``last`` and ``best`` are those of the newest run of the same name.

    ``logger`` is the configured one, which Lightning's trial runs (``fast_dev_run``) replace.

    What Lightning alone knows is left to it: a URL, ``hpc`` and ``registry``, if there is such a checkpoint.

    Raises:
        ValueError: If there is no such file.
    """
    if given == "hpc":
        if any(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")):
            return given
        raise ValueError(f"--ckpt_path hpc: {trainer.default_root_dir} holds no hpc_ckpt_<n>.ckpt")
    if given.partition(":")[0] == "registry":
        if find_spec("litmodels") is not None:
            return given
        raise ValueError(f"--ckpt_path {given} needs Lightning's model registry: pip install litmodels, or pass a file")
    if given not in ("last", "best"):
        if "://" in given or Path(given).is_file():
            return given
        kind, inside = "a folder" if Path(given).is_dir() else "no file", _names([Path(given, "checkpoints")])
        raise ValueError(
            f"--ckpt_path {given} is {kind}: pass {inside or 'a file'}, or last or best for that of the newest run of "
            "this name"
        )
    if Path(given).exists():
        raise ValueError(f"--ckpt_path {given} could also be the file ./{given}: pass it with its folder")
    folders = checkpoint_folders(trainer, logger)
    found = next((path for folder in folders if (path := folder / "checkpoints" / f"{given}.ckpt").is_file()), None)
    if found is None:
        where = ", ".join(map(str, folders[:3])) or str(logger.root_dir)
        others = _names([folder / "checkpoints" for folder in folders])
        raise ValueError(
            f"--ckpt_path {given}: there is no checkpoints/{given}.ckpt in {where}; "
            + (f"pass one of {others}" if others else "pass a file, or with --name the name of a run that has one")
        )
    return str(found)


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(str(path) for folder in folders for path in sorted(folder.glob("*.ckpt"))[:3])


def _folder(trainer: Trainer, logger: Any) -> Path:
    """As `callbacks.common.run_folder`, also before the processes are connected, on the first one."""
    named = isinstance(logger, TensorBoardLogger | CSVLogger)
    folder = None if not logger else logger.log_dir if named else logger.save_dir
    return Path(folder or trainer.default_root_dir)


@contextmanager
def held(trainer: Trainer, checkpoint: str | None, *, fit: bool) -> Iterator[Path | None]:
    """Keep the run's folder from other runs before anything is written; nothing of a run that never began stays in it.

    Gives the folder, None on other processes than the first and for Lightning's trial runs.

    Raises:
        TrajectoryError: If another process is writing it.
        ValueError: If it holds another run than that of ``checkpoint``.
    """
    if rank_zero_only.rank != 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        yield None
        return
    existed = not isinstance(trainer.logger, RunLogger) and _folder(trainer, trainer.logger).exists()
    folder = _folder(trainer, trainer.logger)
    callbacks = (c for c in trainer.checkpoint_callbacks if isinstance(c, WeightCheckpoint))
    folders = dict.fromkeys([folder, *(Path(c.given_folder) for c in callbacks if c.given_folder)])
    try:
        with ExitStack() as stack:
            for path in folders if fit else ():
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(closing(WriterLock(path.absolute())))  # beside the folder: loggers want it empty
                _refuse_another_run(path, checkpoint)
            yield folder
    except BaseException:
        if not existed and trainer.global_step <= _read(checkpoint).get("global_step", 0):
            _remove_leftovers(folder)
        raise


def _refuse_another_run(folder: Path, checkpoint: str | None) -> None:
    trajectory = Trajectory.read(folder, damaged=True) if (folder / FILE_NAME).is_file() else None
    if trajectory is not None and not trajectory.records:
        return
    if trajectory is None and not (folder / "checkpoints" / "last.ckpt").is_file():
        return
    if checkpoint is not None and Path(checkpoint).resolve().is_relative_to(folder.resolve()):
        return
    if trajectory is None or checkpoint is None or _run_of(checkpoint) != trajectory.header.run:
        raise ValueError(
            f"{folder} holds another run: resume that with --ckpt_path {folder / 'checkpoints' / 'last.ckpt'}, or give "
            "this run a folder of its own (leave out the logger's version and the checkpoint's dirpath, or change them)"
        )


def _run_of(checkpoint: str) -> str | None:
    """The run whose trajectory a checkpoint continues, whether or not it holds weights."""
    with suppress(KeyError):
        content = _read(checkpoint)
        return str((content.get(SEED_KEY) or content["callbacks"]["SeedCheckpoint"]["place"])["run"])
    return None


def _read(checkpoint: str | None) -> dict[str, Any]:
    """What a checkpoint holds, without its tensors' values; empty if it cannot be read, which loading it refuses."""
    content: Any = None
    if checkpoint is not None:
        with suppress(Exception):
            content = torch.load(checkpoint, map_location="meta", mmap=True, weights_only=True)
    return content if isinstance(content, dict) else {}


def _remove_leftovers(folder: Path) -> None:
    """Remove a folder in which there is no result."""
    files = set(folder.glob("*"))
    if files <= {path for pattern in _LEFTOVERS for path in folder.glob(pattern)}:
        with suppress(OSError):
            for path in files:
                path.unlink()
            folder.rmdir()
            folder.parent.rmdir()  # if there is no other run of the name
