"""The trajectory file: written while training, read at any moment."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from smezo_pl.optim import StepRecord
from smezo_pl.trajectory import database
from smezo_pl.trajectory.header import Header, TrajectoryError, header_digest
from smezo_pl.trajectory.records import (
    CHECK_SIZE,
    Event,
    format_of,
    pack_event,
    pack_step,
    unpack_event,
    unpack_step,
)

FILE_NAME = "trajectory.smezo"
"""Name of the trajectory in a run's folder."""


@dataclass(frozen=True)
class Trajectory:
    """A run, as far as it is recorded and valid.

    Attributes:
        path: The file.
        header: What the run is.
        records: Its steps, in order and without a gap.
        checks: Checksum of each step.
        events: What happened between the steps.
        damage: What was found wrong after the last of ``records``; None if nothing was.
    """

    path: Path
    header: Header
    records: Sequence[StepRecord]
    checks: Sequence[bytes]
    events: Sequence[Event]
    damage: str | None = None

    @classmethod
    def read(cls, path: str | Path, *, damaged: bool = False) -> Trajectory:
        """Read and verify a trajectory.

        Args:
            path: The file, or a run's folder that holds ``trajectory.smezo``.
            damaged: Whether to give the valid part of a corrupted trajectory instead of refusing it.

        Raises:
            TrajectoryError: If it is missing, no trajectory, of a later format, or corrupted.
        """
        path = locate(path)
        with database.open_to_read(path) as connection:
            found = connection.execute("SELECT data, digest FROM header").fetchall()
            if len(found) != 1 or not isinstance(found[0][0], bytes) or header_digest(found[0][0]) != found[0][1]:
                raise TrajectoryError(f"{path}: the header is missing or corrupted; nothing can be replayed from it")
            [(data, digest)] = found
            header = Header.from_bytes(data, str(path))
            records, checks, damage = _read_steps(connection, header, digest)
            events, event_damage = _read_events(connection, header, [digest, *checks])
        trajectory = cls(path, header, records, checks, events, damage or event_damage)
        if trajectory.damage and not damaged:
            last = trajectory.next_step
            left = f"It is valid up to {last} steps: `smezo replay --step {last}` gives those weights"
            raise TrajectoryError(f"{path}: {trajectory.damage}. {left if records else 'No step can be saved'}")
        return trajectory

    @property
    def next_step(self) -> int:
        """Index of the step after the last: how many steps the optimizer had done."""
        return self.header.first_step + len(self.records)

    @property
    def check(self) -> bytes:
        """Checksum of the last step, which depends on all before it."""
        return self.checks[-1] if self.checks else header_digest(self.header.to_bytes())

    def upto(self, steps: int | None) -> Trajectory:
        """The trajectory as it was after so many steps of the optimizer; None for all of it.

        Raises:
            TrajectoryError: If it does not reach that far, or begins later.
        """
        if steps is None:
            return self
        kept = steps - self.header.first_step
        if not 0 <= kept <= len(self.records):
            broken = f"; after them, {self.damage}" if self.damage else ""
            raise TrajectoryError(
                f"{self.path} holds the weights after {self.header.first_step} to {self.next_step} steps, not after "
                f"{steps}{broken}"
            )
        events = [event for event in self.events if event.steps <= steps]
        return replace(self, records=self.records[:kept], checks=self.checks[:kept], events=events, damage=None)

    def events_of(self, kind: str) -> list[Event]:
        """The events of one kind, in order."""
        return [event for event in self.events if event.kind == kind]

    @property
    def settings(self) -> dict[str, Any]:
        """The optimizer's settings as given last: a resumed run may have changed some."""
        changes = [event.facts["changes"] for event in self.events_of("settings")]
        return self.header.settings | {name: now for each in changes for name, (_, now) in each.items()}

    @property
    def final_root(self) -> str | None:
        """Hash of the weights after the last step, if the run noted it."""
        noted = [event for event in self.events_of("weights") if event.steps == self.next_step]
        root = noted[-1].facts.get("root") if noted else None
        return root if isinstance(root, str) else None


def locate(path: str | Path) -> Path:
    """The file of a run: the path itself, or ``trajectory.smezo`` in a folder."""
    path = Path(path)
    if path.is_dir():
        inside = path / FILE_NAME
        if not inside.is_file():
            raise TrajectoryError(
                f"{path} holds no {FILE_NAME}: pass a run's folder, as a training run prints it, or the file"
            )
        return inside
    if not path.is_file():
        raise TrajectoryError(f"{path}: there is no such file or folder")
    return path


def is_trajectory(path: Path) -> bool:
    """Whether a file is an SQLite file, by its first bytes: a trajectory and no exported run."""
    with open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\x00"


def _read_steps(
    connection: sqlite3.Connection, header: Header, digest: bytes
) -> tuple[list[StepRecord], list[bytes], str | None]:
    """Steps as far as they are valid, their checksums, and what is wrong with the next one."""
    records: list[StepRecord] = []
    checks: list[bytes] = []
    step, check, before, bits = header.first_step, digest, None, header.last_number + 1
    try:
        refreshes: dict[Any, Any] = dict(connection.execute("SELECT step, data FROM refreshes").fetchall())
        for index, data in connection.execute("SELECT step, data FROM steps ORDER BY step"):
            if index != step:
                return records, checks, f"step {step} is missing (the next one is {index!s:.20})"
            thresholds = refreshes.pop(step, None)
            if not isinstance(data, bytes) or not isinstance(thresholds, bytes | None):
                return records, checks, f"step {step} is corrupted: not bytes"
            before = unpack_step(step, data, thresholds, before, check, len(header.groups))
            if max(before.unread, before.shared).bit_length() > bits:
                return records, checks, f"step {step} is corrupted: it names a tensor that is not optimized"
            if before.rows > 1 and header.directions == "shared":
                return records, checks, f"step {step} is corrupted: it has {before.rows} rows with a direction each"
            check = data[-CHECK_SIZE:]
            records.append(before)
            checks.append(check)
            step += 1
    except (ValueError, sqlite3.Error) as error:
        return records, checks, f"step {step} is corrupted: {error}"
    if refreshes:
        return records, checks, f"a mask refresh belongs to step {min(refreshes, key=str)!s:.20}, which is missing"
    return records, checks, None


def _read_events(
    connection: sqlite3.Connection, header: Header, checks: Sequence[bytes]
) -> tuple[list[Event], str | None]:
    """Events as far as they are valid, and what is wrong with the next one."""
    events: list[Event] = []
    try:
        for steps, data in connection.execute("SELECT steps, data FROM marks ORDER BY id"):
            if not isinstance(steps, int) or not isinstance(data, bytes):
                return events, "an event is corrupted: not a number and bytes"
            if not 0 <= steps - header.first_step < len(checks):
                valid = header.first_step + len(checks) - 1
                return events, f"an event is after {steps} steps, and only {valid} are valid"
            events.append(unpack_event(steps, data, checks[steps - header.first_step]))
    except (ValueError, RecursionError, sqlite3.Error) as error:
        return events, f"an event is corrupted: {error}"
    return events, None


SYNC_STEPS = 1000
SYNC_SECONDS = 30.0


class TrajectoryWriter:
    """Appends to a trajectory.

    Each step is committed as it comes: a process that is killed loses no step that was appended. The disk is waited for
    every `SYNC_STEPS` steps or `SYNC_SECONDS` seconds, whichever comes first, and in `sync`: that much, at most, is
    lost in a power cut, and the trajectory is valid up to there.

    Use `create` or `resume`; close it, or use it as a context.

    Attributes:
        steps: Steps of the optimizer that are recorded: the index of the next one.
        check: Checksum of the last step, which depends on all before it.
    """

    def __init__(self, trajectory: Trajectory, connection: sqlite3.Connection, lock: database.WriterLock) -> None:
        self.path, self.header = trajectory.path, trajectory.header
        self._connection, self._lock = connection, lock
        self.steps, self.check = trajectory.next_step, trajectory.check
        self._last = trajectory.records[-1] if trajectory.records else None
        self._closed = False
        self._synced_step, self._synced_at = self.steps, monotonic()

    @classmethod
    def create(cls, path: str | Path, header: Header) -> TrajectoryWriter:
        """Begin a trajectory in a folder that exists. One that ended before its first step is replaced."""
        path = Path(path)
        lock = database.WriterLock(path)
        try:
            if path.exists() and not Trajectory.read(path, damaged=True).records:
                database.remove(path)
            data = header.to_bytes()
            connection = database.create(path, data, header_digest(data), header.format)
        except BaseException:
            lock.close()
            raise
        writer = cls(Trajectory(path, header, [], [], []), connection, lock)
        writer.sync()
        return writer

    @classmethod
    def resume(cls, path: str | Path, steps: int | None = None) -> TrajectoryWriter:
        """Resume a trajectory after so many steps of the optimizer, None for the last; later steps are removed."""
        path = Path(path)
        lock = database.WriterLock(path)
        try:
            trajectory = Trajectory.read(path, damaged=steps is not None).upto(steps)
            connection = database.open_to_append(path)
            with database.explained(path, "write"), connection:
                connection.execute("BEGIN")
                connection.execute("DELETE FROM steps WHERE step >= ?", (trajectory.next_step,))
                connection.execute("DELETE FROM refreshes WHERE step >= ?", (trajectory.next_step,))
                connection.execute("DELETE FROM marks WHERE steps > ?", (trajectory.next_step,))
                # what an earlier resume from here changed: this one may change something else
                values = trajectory.next_step, b'{"kind":"settings"'
                connection.execute("DELETE FROM marks WHERE steps = ? AND substr(data, 1, 18) = ?", values)
        except BaseException:
            lock.close()
            raise
        return cls(trajectory, connection, lock)

    def append(self, record: StepRecord) -> None:
        """Add the next step. If it cannot be written the trajectory is what it was."""
        if record.step != self.steps:
            raise TrajectoryError(f"{self.path}: step {record.step} cannot be recorded: the next one is {self.steps}")
        data = pack_step(record, self._last, self.check)
        with database.explained(self.path, "write"), self._connection:
            self._connection.execute("BEGIN")
            self._connection.execute("INSERT INTO steps VALUES (?, ?)", (record.step, data))
            if record.refreshed:
                self._connection.execute("INSERT INTO refreshes VALUES (?, ?)", (record.step, record.thresholds))
            if (needed := format_of(record, self.header)) > self.header.format:
                # so that no earlier version misreads the step
                self._connection.execute(f"PRAGMA user_version = {needed}")
        self.steps, self._last, self.check = record.step + 1, record, data[-CHECK_SIZE:]
        if self.steps - self._synced_step >= SYNC_STEPS or monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def add_event(self, kind: str, /, **facts: Any) -> None:
        """Note an event at the present step (see `Event`); survives a power cut."""
        data = pack_event(Event(self.steps, kind, facts), self.check)
        self._commit_to_disk("INSERT INTO marks (steps, data) VALUES (?, ?)", self.steps, data)

    def sync(self) -> None:
        """Wait until all that was appended is on the disk."""
        # a commit waits for the disk only if it writes something
        self._commit_to_disk("UPDATE header SET id = 0")

    def _commit_to_disk(self, statement: str, *values: Any) -> None:
        with database.explained(self.path, "write"):
            self._connection.execute("PRAGMA synchronous = FULL")
            try:
                with self._connection:
                    self._connection.execute("BEGIN")
                    self._connection.execute(statement, values)
            finally:
                self._connection.execute("PRAGMA synchronous = NORMAL")
        self._synced_step, self._synced_at = self.steps, monotonic()

    def close(self) -> None:
        """Leave one file that is complete in itself; harmless when closed already."""
        if not self._closed:
            self._closed = True
            with closing(self._lock), database.explained(self.path, "close"):
                database.close(self._connection)

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rewrite(trajectory: Trajectory, path: Path) -> None:
    """Write what was read of a trajectory to a new file, for instance the valid part of a corrupted one."""
    events = list(trajectory.events)
    with TrajectoryWriter.create(path, trajectory.header) as writer:
        for record in (*trajectory.records, None):
            while events and events[0].steps <= writer.steps:
                event = events.pop(0)
                writer.add_event(event.kind, **event.facts)
            if record is not None:
                writer.append(record)
