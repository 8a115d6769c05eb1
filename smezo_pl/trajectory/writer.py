"""Writing the record of a run: one row a step, safe against the end of the process at any moment."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from smezo_pl.trajectory import store
from smezo_pl.trajectory.errors import TrajectoryError
from smezo_pl.trajectory.header import Header, header_digest
from smezo_pl.trajectory.locking import WriterLock
from smezo_pl.trajectory.marks import Mark, pack_mark
from smezo_pl.trajectory.reader import Trajectory
from smezo_pl.trajectory.rows import Rates, StepRow, check_of, pack_row

SYNC_STEPS = 1000
SYNC_SECONDS = 30.0


class TrajectoryWriter:
    """Appends to a record.

    Each step is committed as it comes: a process that is killed loses no step that was appended. The disk is waited for
    every `SYNC_STEPS` steps or `SYNC_SECONDS` seconds, whichever comes first, and in `sync`: that much, at most, is
    lost in a power cut, and the record is sound up to there.

    Use `create` or `resume`; close it, or use it as a context.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        connection: sqlite3.Connection,
        lock: WriterLock,
        trajectory: Trajectory | None,
    ) -> None:
        self.path, self.header = path, header
        self._connection, self._lock = connection, lock
        self._check = trajectory.check if trajectory else header_digest(header.to_bytes())
        self._rates: Rates | None = trajectory.rows[-1].rates if trajectory and trajectory.rows else None
        self._next = trajectory.next_step if trajectory else header.first_step
        self._closed = False
        self._synced_step, self._synced_at = self._next, monotonic()

    @classmethod
    def create(cls, path: str | Path, header: Header) -> TrajectoryWriter:
        """Begin a record. One that ended before its first step is replaced.

        Args:
            path: File to make; its folder must exist.
            header: What the run is.

        Raises:
            TrajectoryError: If the file exists, is being written, or cannot be.
        """
        path = Path(path)
        lock = WriterLock(path)
        try:
            if path.exists() and not Trajectory.read(path, damaged=True).rows:
                store.remove(path)
            data = header.to_bytes()
            writer = cls(path, header, store.create(path, data, header_digest(data)), lock, None)
        except BaseException:
            lock.release()
            raise
        writer.sync()
        return writer

    @classmethod
    def resume(cls, path: str | Path, steps: int | None = None) -> TrajectoryWriter:
        """Go on with a record.

        Args:
            path: The file.
            steps: Go on after this many steps of the optimizer; rows after them are removed. None: after the last.

        Raises:
            TrajectoryError: If it is being written, cannot be, or is not sound up to that step.
        """
        path = Path(path)
        lock = WriterLock(path)
        try:
            trajectory = Trajectory.read(path, damaged=steps is not None).upto(steps)
            connection = store.open_to_append(path)
            writer = cls(path, trajectory.header, connection, lock, trajectory)
            with store.explained(path, "write"), connection:
                connection.execute("BEGIN")
                connection.execute("DELETE FROM steps WHERE step >= ?", (writer._next,))
                connection.execute("DELETE FROM refreshes WHERE step >= ?", (writer._next,))
                connection.execute("DELETE FROM marks WHERE steps > ?", (writer._next,))
        except BaseException:
            lock.release()
            raise
        return writer

    @property
    def steps(self) -> int:
        """Steps of the optimizer that the record holds: the index of the next one."""
        return self._next

    @property
    def check(self) -> bytes:
        """Check of the last row: a name for all that the record says so far."""
        return self._check

    def append(self, row: StepRow) -> None:
        """Add the next step.

        Raises:
            TrajectoryError: If it is not the next one, or the file cannot be written. The record is then what it was.
        """
        if row.step != self._next:
            raise TrajectoryError(f"{self.path}: step {row.step} cannot be recorded: the next one is {self._next}")
        data = pack_row(row, self._rates, self._check)
        with store.explained(self.path, "write"), self._connection:
            self._connection.execute("BEGIN")
            self._connection.execute("INSERT INTO steps VALUES (?, ?)", (row.step, data))
            if row.refresh is not None:
                self._connection.execute("INSERT INTO refreshes VALUES (?, ?)", (row.step, row.refresh))
        self._next, self._rates, self._check = row.step + 1, row.rates, check_of(data)
        if self._next - self._synced_step >= SYNC_STEPS or monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def mark(self, kind: str, **facts: Any) -> None:
        """Note something about the run at its present step (see `smezo_pl.trajectory.marks`); survives a power cut."""
        data = pack_mark(Mark(self._next, kind, facts), self._check)
        self._commit_to_disk("INSERT INTO marks (steps, data) VALUES (?, ?)", self._next, data)

    def sync(self) -> None:
        """Wait until all that was appended is on the disk."""
        # a commit waits for the disk only if it writes something
        self._commit_to_disk("UPDATE header SET id = 0")

    def _commit_to_disk(self, statement: str, *values: Any) -> None:
        with store.explained(self.path, "write"):
            self._connection.execute("PRAGMA synchronous = FULL")
            try:
                with self._connection:
                    self._connection.execute("BEGIN")
                    self._connection.execute(statement, values)
            finally:
                self._connection.execute("PRAGMA synchronous = NORMAL")
        self._synced_step, self._synced_at = self._next, monotonic()

    def close(self) -> None:
        """Leave one file that is complete in itself; harmless when closed already."""
        if not self._closed:
            self._closed = True
            try:
                with store.explained(self.path, "close"):
                    store.close(self._connection)
            finally:
                self._lock.release()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def rewrite(trajectory: Trajectory, path: Path) -> None:
    """Write what was read of a record to a new file, for instance the sound part of a damaged one.

    Raises:
        TrajectoryError: If there is a file already, or it cannot be written.
    """
    check, rates = header_digest(trajectory.header.to_bytes()), None
    checks = {trajectory.header.first_step: check}
    with TrajectoryWriter.create(path, trajectory.header) as writer, store.explained(path, "write"), writer._connection:
        writer._connection.execute("BEGIN")
        for row in trajectory.rows:
            data = pack_row(row, rates, check)
            check, rates = check_of(data), row.rates
            checks[row.step + 1] = check
            writer._connection.execute("INSERT INTO steps VALUES (?, ?)", (row.step, data))
            if row.refresh is not None:
                writer._connection.execute("INSERT INTO refreshes VALUES (?, ?)", (row.step, row.refresh))
        for mark in trajectory.marks:
            packed = pack_mark(mark, checks[mark.steps])
            writer._connection.execute("INSERT INTO marks (steps, data) VALUES (?, ?)", (mark.steps, packed))
