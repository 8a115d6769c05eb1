"""The SQLite file of a trajectory: its tables, how it is opened and locked, and what SQLite's errors mean for a run."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

from smezo_pl.trajectory.files import atomic_path, lock_file
from smezo_pl.trajectory.header import LATEST_FORMAT, TrajectoryError

APPLICATION_ID = int.from_bytes(b"SMZO", "big")

_TABLES = {
    "header": "CREATE TABLE header (id INTEGER PRIMARY KEY, data BLOB NOT NULL, digest BLOB NOT NULL)",
    "steps": "CREATE TABLE steps (step INTEGER PRIMARY KEY, data BLOB NOT NULL)",
    "refreshes": "CREATE TABLE refreshes (step INTEGER PRIMARY KEY, data BLOB NOT NULL)",
    "marks": "CREATE TABLE marks (id INTEGER PRIMARY KEY, steps INTEGER NOT NULL, data BLOB NOT NULL)",
}


def create(path: Path, header: bytes, digest: bytes, version: int) -> sqlite3.Connection:
    """Make a new file of format ``version``, open for writing.

    At every moment there is no file of that name, or one with its header.
    """
    if path.exists():
        raise TrajectoryError(
            f"{path} is there already, and a run appends to its own trajectory alone: resume that run from its "
            "checkpoint, or give this one another folder"
        )
    with explained(path, "create"), atomic_path(path) as part:
        remove(part)
        with closing(_connect(part, "rwc")) as connection:
            # four tables and the header of a small model fit in a few such pages, and a commit writes one
            connection.execute("PRAGMA page_size = 1024")
            connection.execute("BEGIN")
            for statement in _TABLES.values():
                connection.execute(statement)
            connection.execute("INSERT INTO header VALUES (0, ?, ?)", (header, digest))
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {version}")
            connection.execute("COMMIT")
    return open_to_append(path)


def open_to_append(path: Path) -> sqlite3.Connection:
    """Open an existing file for writing."""
    with explained(path, "open"):
        connection = _connect(path, "rw")
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            connection.close()
            raise TrajectoryError(
                f"{path}: this file system cannot hold SQLite's write-ahead log (it stayed in mode {mode!r}), as some "
                "network file systems cannot: keep the run's folder on a local disk"
            )
        # a commit is handed to the system at once, so it outlives the process; the writer's sync() waits for the disk
        connection.execute("PRAGMA synchronous = NORMAL")
    return connection


@contextmanager
def open_to_read(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a file for reading, also while another process writes it or where nothing can be written.

    All that is read within the context is one consistent state.
    """
    log = _beside(path, "-wal")
    # SQLite writes beside a file with a log: in a folder that cannot be written, a copy elsewhere is read
    readable = os.access(path.parent, os.W_OK) or (not log.exists() and path.read_bytes()[18:19] == b"\x01")
    with nullcontext() if readable else tempfile.TemporaryDirectory() as folder, explained(path, "read"):
        source = path
        if folder is not None:
            source = Path(folder) / path.name
            for file in filter(Path.exists, (path, log)):
                shutil.copyfile(file, Path(folder) / file.name)
        with closing(_connect(source, "ro")) as connection:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("BEGIN")
            _check_schema(connection, path)
            if log.exists():
                _check_log(connection, path)
            yield connection


def close(connection: sqlite3.Connection) -> None:
    """Close after writing: the file is left complete in itself, without a log beside it, unless a reader is at it."""
    with closing(connection):
        connection.execute("PRAGMA busy_timeout = 500")
        with suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = DELETE")


def copy(source: Path, target: Path) -> None:
    """Copy a trajectory, whatever lies in its log, to a new file that is complete in itself."""
    with open_to_read(source) as connection, explained(target, "copy"), closing(_connect(target, "rwc")) as new:
        connection.backup(new)
        new.execute("PRAGMA journal_mode = DELETE")


def move(path: Path, target: Path) -> None:
    """Give a trajectory another name, with the log that belongs to it."""
    for suffix in ("-wal", ""):
        if _beside(path, suffix).exists():
            shutil.copyfile(_beside(path, suffix), _beside(target, suffix))
    remove(path)


def remove(path: Path) -> None:
    """Delete a trajectory with all that SQLite keeps beside it; nothing happens where nothing is.

    What lies beside goes first: SQLite would take the log of a deleted file for that of the next one of its name.
    """
    for suffix in ("-wal", "-shm", "-journal", ""):
        _beside(path, suffix).unlink(missing_ok=True)


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn SQLite's errors into ones that say what to do."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        text = str(error)
        if "full" in text:
            what = (
                "the disk is full. What was recorded before is intact: make space and resume from the last checkpoint"
            )
        elif "readonly" in text or "read-only" in text or "unable to open" in text:
            what = f"{path.parent} is missing or cannot be written"
        elif "locked" in text or "locking" in text:
            what = (
                "it is locked, by another program or because the file system cannot lock (some network file systems "
                "cannot): keep the run's folder on a local disk"
            )
        # SQLite quotes a corrupted schema in its message, which Python then cannot decode
        elif isinstance(error, UnicodeDecodeError) or "malformed" in text or "not a database" in text:
            what = "the file is corrupted or no trajectory"
            if doing != "read":
                what += "; `smezo show` says up to which step it is valid"
        else:
            what = "SQLite could not"
        raise TrajectoryError(f"{path}: cannot {doing} the trajectory: {what} ({text})") from error


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10.0)
    # a stranger's file: no function in its schema runs, and a size in it allocates no more than 64 MiB
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    if hasattr(connection, "setlimit"):  # Python 3.11
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1 << 26)
    return connection


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    found = connection.execute("PRAGMA application_id").fetchone()[0]
    if found != APPLICATION_ID:
        raise TrajectoryError(f"{path} is an SQLite file but no trajectory of smezo_pl (application id {found:#x})")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if not 1 <= version <= LATEST_FORMAT:
        raise TrajectoryError(
            f"{path}: format {version}; this version of smezo_pl reads formats up to {LATEST_FORMAT}: install a later "
            "one"
        )
    schema = dict(connection.execute("SELECT name, sql FROM sqlite_master").fetchall())
    if schema != _TABLES:
        odd = sorted(set(schema.items()) ^ set(_TABLES.items()), key=str)[0][0]
        raise TrajectoryError(
            f"{path}: its tables are not those of a trajectory (see {odd!s:.40}): corrupted, or another program's"
        )


def _check_log(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse the log of another run beside a trajectory: SQLite would read that run's pages in place of this one's.

    The header is in the file itself from the first moment on, and never changes.
    """
    header = "SELECT digest FROM header"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as alone:
            own = alone.execute(header).fetchall()
    except (sqlite3.Error, UnicodeDecodeError):
        return  # the file is corrupted: what the log holds instead is checked step by step
    if own != connection.execute(header).fetchall():
        raise TrajectoryError(
            f"{path}: the log beside it ({path.name}-wal) belongs to another run, or one of the two is corrupted: put "
            "the right one there, or move it away to read what the trajectory itself holds"
        )


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def is_written(path: Path) -> bool:
    """Whether a process writes the trajectory at this moment."""
    lock = _beside(path, "-lock")
    with suppress(OSError):  # nobody writes in a folder that cannot be written
        if lock.exists():
            handle = lock_file(lock)
            if handle is None:
                return True
            os.close(handle)
    return False


class WriterLock:
    """The right to write a trajectory, held from construction to `close`; refused if anyone else has it.

    A file beside the trajectory is locked, not the trajectory: SQLite's own locks on that must not meet another handle
    of this process (POSIX drops all locks of a process on a file when any of its handles is closed).
    """

    def __init__(self, path: Path) -> None:
        self._file = _beside(path, "-lock")
        try:
            while (handle := lock_file(self._file)) is not None:
                # the holder before may have removed the file between our open and our lock
                if self._file.exists() and os.path.samestat(os.fstat(handle), os.stat(self._file)):
                    os.ftruncate(handle, 0)
                    os.write(handle, str(os.getpid()).encode())
                    break
                os.close(handle)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise TrajectoryError(
                    f"{path}: this file system cannot lock ({error.strerror}), so two runs could write one trajectory "
                    "unseen: keep the run's folder on a local disk"
                ) from None
            raise TrajectoryError(f"{path}: {path.parent} cannot be written ({error.strerror})") from None
        if handle is None:
            owner = ""
            with suppress(OSError, ValueError):
                owner = f" (process {int(self._file.read_text())})"
            raise TrajectoryError(
                f"{path} is being written by another run{owner}: two runs cannot share a folder. Wait for it, stop "
                "it, or give this run another one"
            )
        self._handle = handle

    def close(self) -> None:
        """Let others write; the lock file is removed."""
        self._file.unlink(missing_ok=True)
        os.close(self._handle)
