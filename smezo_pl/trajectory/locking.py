"""One writer a record, enforced by the operating system: the lock ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from smezo_pl.trajectory.errors import TrajectoryError

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_written(path: Path) -> bool:
    """Whether a process writes the record at this moment."""
    try:
        handle = os.open(path.with_name(path.name + "-lock"), os.O_RDWR)
    except OSError:
        return False
    try:
        _lock(handle)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


class WriterLock:
    """Held from construction to `release`.

    A file beside the record is locked, not the record: SQLite's own locks on that must not meet another handle of this
    process (POSIX drops all locks of a process on a file when any of its handles is closed).

    Args:
        path: The record.

    Raises:
        TrajectoryError: If another process, or another part of this one, writes the record, or the file system cannot
            lock.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.with_name(path.name + "-lock")
        try:
            self._handle = self._acquire()
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) and self._file.exists():
                owner = self._owner()
                raise TrajectoryError(
                    f"{path} is being written by another run{owner}: two runs cannot share a record. Wait for it, stop "
                    "it, or give this run another folder"
                ) from None
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise TrajectoryError(
                    f"{path}: this file system cannot lock ({error.strerror}), so two runs could write one record "
                    "unseen: keep the run's folder on a local disk"
                ) from None
            raise TrajectoryError(f"{path}: {path.parent} cannot be written ({error.strerror})") from None

    def _acquire(self) -> int:
        while True:
            handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(handle)
                # the holder before may have removed the file between our open and our lock
                if os.path.exists(self._file) and os.path.samestat(os.fstat(handle), os.stat(self._file)):
                    os.ftruncate(handle, 0)
                    os.write(handle, str(os.getpid()).encode())
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _owner(self) -> str:
        try:
            text = self._file.read_text()
        except OSError:
            return ""
        return f" (process {text})" if text.isdigit() else ""

    def release(self) -> None:
        """Let others write; the lock file goes."""
        if self._handle >= 0:
            self._file.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1
