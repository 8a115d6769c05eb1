"""The trajectory file: written while training, read at any moment."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from smezo_pl.optim import StepRecord
from smezo_pl.trajectory import database as store
from smezo_pl.trajectory.database import WriterLock
from smezo_pl.trajectory.header import Header, TrajectoryError, header_digest
from smezo_pl.trajectory.records import Mark, check_of, pack_mark, pack_row, unpack_mark, unpack_row


@dataclass(frozen=True)
class Trajectory:
    """A run, as far as it is recorded and sound.

    Attributes:
        path: The file.
        header: What the run is.
        rows: Its steps, in order and without a gap.
        checks: Check of each row.
        marks: Notes made on the way.
        damage: What was found wrong after the last row of `rows`; None if nothing was.
    """

    path: Path
    header: Header
    rows: Sequence[StepRecord]
    checks: Sequence[bytes]
    marks: Sequence[Mark]
    damage: str | None = None

    @classmethod
    def read(cls, path: str | Path, *, damaged: bool = False) -> Trajectory:
        """Read and verify a record.

        Args:
            path: The file, or a run's folder that holds ``trajectory.smezo``.
            damaged: Whether to give what is sound of a damaged record instead of refusing it.

        Raises:
            TrajectoryError: If it is missing, no record, of a later format, or damaged.
        """
        path = locate(path)
        with store.open_to_read(path) as connection:
            header, digest = _read_header(connection, path)
            rows, checks, damage = _read_rows(connection, header, digest)
            marks, mark_damage = _read_marks(connection, header, digest, checks)
        trajectory = cls(path, header, rows, checks, marks, damage or mark_damage)
        if trajectory.damage and not damaged:
            raise TrajectoryError(f"{path}: {trajectory.damage}. {trajectory._what_is_left()}")
        return trajectory

    @property
    def next_step(self) -> int:
        """Index of the step after the last: how many steps the optimizer had done."""
        return self.header.first_step + len(self.rows)

    @property
    def check(self) -> bytes:
        """Check of the last row: a name for all that the record says."""
        return self.checks[-1] if self.checks else header_digest(self.header.to_bytes())

    def upto(self, steps: int | None) -> Trajectory:
        """The record as it was after so many steps of the optimizer; None for all of it.

        Raises:
            TrajectoryError: If it does not reach that far, or begins later.
        """
        if steps is None:
            return self
        kept = steps - self.header.first_step
        if not 0 <= kept <= len(self.rows):
            broken = f"; after them, {self.damage}" if self.damage else ""
            raise TrajectoryError(
                f"{self.path} holds the weights after {self.header.first_step} to {self.next_step} steps, not after "
                f"{steps}{broken}"
            )
        marks = [mark for mark in self.marks if mark.steps <= steps]
        return replace(self, rows=self.rows[:kept], checks=self.checks[:kept], marks=marks, damage=None)

    def marked(self, kind: str) -> list[Mark]:
        """The notes of one kind, in order."""
        return [mark for mark in self.marks if mark.kind == kind]

    def _what_is_left(self) -> str:
        if not self.rows:
            return "No step can be saved"
        return f"It is sound up to {self.next_step} steps: `smezo replay --step {self.next_step}` gives those weights"


def locate(path: str | Path) -> Path:
    """The record of a run.

    Args:
        path: The file itself, or a folder with ``trajectory.smezo``.

    Raises:
        TrajectoryError: If there is none.
    """
    path = Path(path)
    if path.is_dir():
        inside = path / FILE_NAME
        if not inside.is_file():
            raise TrajectoryError(
                f"{path} holds no {FILE_NAME}: give a run's folder, as a training run prints it, or the file"
            )
        return inside
    if not path.is_file():
        raise TrajectoryError(f"{path}: there is no such file or folder")
    return path


def is_record(path: Path) -> bool:
    """Whether a file is an SQLite file, by its first bytes: a record and no exported run."""
    with open(path, "rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE


_SQLITE = b"SQLite format 3\x00"

FILE_NAME = "trajectory.smezo"
"""Name of the record in a run's folder."""


def _read_header(connection: sqlite3.Connection, path: Path) -> tuple[Header, bytes]:
    found = connection.execute("SELECT data, digest FROM header").fetchall()
    if len(found) != 1 or not all(isinstance(value, bytes) for value in found[0]):
        raise TrajectoryError(f"{path}: the header is missing or damaged; nothing can be replayed from it")
    data, digest = found[0]
    if header_digest(data) != digest:
        raise TrajectoryError(
            f"{path}: the header is damaged (its check does not match); nothing can be replayed from it"
        )
    return Header.from_bytes(data, str(path)), digest


def _read_rows(
    connection: sqlite3.Connection, header: Header, digest: bytes
) -> tuple[list[StepRecord], list[bytes], str | None]:
    """Rows as far as they are sound, their checks, and what is wrong with the next one."""
    rows: list[StepRecord] = []
    checks: list[bytes] = []
    step = header.first_step
    try:
        refreshes: dict[Any, Any] = dict(connection.execute("SELECT step, data FROM refreshes").fetchall())
        for index, data in connection.execute("SELECT step, data FROM steps ORDER BY step"):
            if index != step:
                return rows, checks, f"step {step} is missing (the next one there is {index!s:.20})"
            refresh = refreshes.pop(step, None)
            if not isinstance(data, bytes) or not isinstance(refresh, bytes | None):
                return rows, checks, f"step {step} is damaged: not bytes"
            before = rows[-1] if rows else None
            rows.append(unpack_row(step, data, refresh, before, checks[-1] if checks else digest, len(header.groups)))
            checks.append(check_of(data))
            step += 1
    except (ValueError, sqlite3.Error) as error:
        return rows, checks, f"step {step} is damaged: {error}"
    if refreshes:
        return rows, checks, f"a mask refresh belongs to step {min(refreshes, key=str)!s:.20}, which is not there"
    return rows, checks, None


def _read_marks(
    connection: sqlite3.Connection, header: Header, digest: bytes, checks: list[bytes]
) -> tuple[list[Mark], str | None]:
    """Marks of the sound steps, and what is wrong with the first that is not."""
    marks: list[Mark] = []
    try:
        for number, steps, data in connection.execute("SELECT id, steps, data FROM marks ORDER BY id"):
            if not isinstance(steps, int) or not isinstance(data, bytes):
                return marks, f"mark {number!s:.20} is damaged: not a number and bytes"
            at = steps - header.first_step
            if 0 <= at <= len(checks):
                marks.append(unpack_mark(steps, data, checks[at - 1] if at else digest))
            else:
                return (
                    marks,
                    f"a note was made after {steps} steps, and only {header.first_step + len(checks)} are there",
                )
    except (ValueError, RecursionError, sqlite3.Error) as error:
        return marks, f"a mark is damaged: {error}"
    return marks, None


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
        self._last = trajectory.rows[-1] if trajectory and trajectory.rows else None
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

    def append(self, row: StepRecord) -> None:
        """Add the next step.

        Raises:
            TrajectoryError: If it is not the next one, or the file cannot be written. The record is then what it was.
        """
        if row.step != self._next:
            raise TrajectoryError(f"{self.path}: step {row.step} cannot be recorded: the next one is {self._next}")
        data = pack_row(row, self._last, self._check)
        with store.explained(self.path, "write"), self._connection:
            self._connection.execute("BEGIN")
            self._connection.execute("INSERT INTO steps VALUES (?, ?)", (row.step, data))
            if row.refreshed:
                self._connection.execute("INSERT INTO refreshes VALUES (?, ?)", (row.step, row.thresholds))
        self._next, self._last, self._check = row.step + 1, row, check_of(data)
        if self._next - self._synced_step >= SYNC_STEPS or monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def mark(self, kind: str, **facts: Any) -> None:
        """Note something about the run at its present step (see `records`); survives a power cut."""
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
    check, before = header_digest(trajectory.header.to_bytes()), None
    checks = {trajectory.header.first_step: check}
    with TrajectoryWriter.create(path, trajectory.header) as writer, store.explained(path, "write"), writer._connection:
        writer._connection.execute("BEGIN")
        for row in trajectory.rows:
            data = pack_row(row, before, check)
            check, before = check_of(data), row
            checks[row.step + 1] = check
            writer._connection.execute("INSERT INTO steps VALUES (?, ?)", (row.step, data))
            if row.refreshed:
                writer._connection.execute("INSERT INTO refreshes VALUES (?, ?)", (row.step, row.thresholds))
        for mark in trajectory.marks:
            packed = pack_mark(mark, checks[mark.steps])
            writer._connection.execute("INSERT INTO marks (steps, data) VALUES (?, ?)", (mark.steps, packed))
