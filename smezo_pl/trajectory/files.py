"""Files that are written whole or not at all."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from smezo_pl.trajectory.database import sync_folder
from smezo_pl.trajectory.header import TrajectoryError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that at every moment its name holds all of the old bytes or all of the new ones.

    Raises:
        TrajectoryError: If it cannot be written; what was there before is intact.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise TrajectoryError(
            f"{path}: the checkpoint could not be written ({error.strerror}); the one before is intact. Resume from it "
            "when there is space"
        ) from error


def serialised(checkpoint: dict[str, Any]) -> bytes:
    """A checkpoint as the bytes of its file."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def check_readable(checkpoint: dict[str, Any]) -> None:
    """Find out before training what could not be read back after it.

    Raises:
        TrajectoryError: If something in the checkpoint is of a type that a safe load refuses.
    """
    try:
        torch.load(io.BytesIO(serialised(checkpoint)), weights_only=True)
    except Exception as error:
        raise TrajectoryError(
            "a checkpoint of this run could not be read back: a hyperparameter, or the state of a callback, scheduler "
            f"or data loader is of no plain type; in the module, self.save_hyperparameters(ignore=[...]) ({error})"
        ) from error
