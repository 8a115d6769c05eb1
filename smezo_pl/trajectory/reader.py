"""Reading a record: a consistent, verified copy in memory, also while the run writes on."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smezo_pl.trajectory import store
from smezo_pl.trajectory.errors import TrajectoryError
from smezo_pl.trajectory.header import Header, header_digest
from smezo_pl.trajectory.marks import Mark, unpack_mark
from smezo_pl.trajectory.rows import StepRow, check_of, unpack_row


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
    rows: Sequence[StepRow]
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
) -> tuple[list[StepRow], list[bytes], str | None]:
    """Rows as far as they are sound, their checks, and what is wrong with the next one."""
    rows: list[StepRow] = []
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
            before = rows[-1].rates if rows else None
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
