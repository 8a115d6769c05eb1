"""Files that appear whole or not at all, reports as JSON, and locks that end with their process."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from smezo_pl.trajectory.header import TrajectoryError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; on leaving the context the file is on the disk and takes its own name.

    At every moment ``path`` is absent, the old file, or the whole new one. Its folder is made. A `TrajectoryError`
    says why it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name != "nt":  # so that the new name survives a power cut; Windows has no handle for a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrajectoryError(
            f"{path} cannot be written ({reason}); what was there before is intact. Make space or choose another "
            "folder, then resume or try again"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, see `atomic_path`."""
    with atomic_path(path) as part:
        part.write_bytes(data)


def as_json(document: Mapping[str, Any], indent: int | None = None, ensure_ascii: bool = True) -> str:
    """A document as JSON, which knows neither NaN nor infinity: these are null, and ``not_finite`` lists where."""
    missing: list[str] = []
    plain = _finite(document, "", missing)
    note = {"not_finite": missing} if missing else {}
    return json.dumps({**plain, **note}, indent=indent, ensure_ascii=ensure_ascii, default=str, allow_nan=False)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a report whole or not at all, see `as_json`."""
    write_atomically(path, (as_json(document, indent=2) + "\n").encode())


def _finite(value: Any, where: str, missing: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        missing.append(f"{where} is {value}")
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part, f"{where}.{key}".lstrip("."), missing) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{where}[{index}]", missing) for index, part in enumerate(value)]
    return value


def lock_file(path: Path) -> int | None:
    """Lock a file, made where there is none, without waiting; None if it is locked already.

    The lock ends when the handle is closed (`os.close`), or with the process however it ends. A child process that
    inherits the handle keeps the lock. An `OSError` says that the file system has no locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(handle)
    except OSError as error:
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return None
        raise
    return handle


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
