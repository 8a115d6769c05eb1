"""Rows from a user's own files: JSON lines, CSV and TSV, with the line that each row begins on."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = tuple[int, dict[str, Any]]
"""The line that a row begins on, from 1, and the row."""


def read_json_lines(path: Path) -> list[Record]:
    """One JSON object a line; blank lines are left out.

    Raises:
        ValueError: If a line is no JSON object; it names the file and the line.
    """
    records = []
    # Only line feeds end a line: JSON texts may hold the other characters that `splitlines` splits at.
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON, {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            kind = "a list" if isinstance(row, list) else repr(row)
            raise ValueError(f"{path}, line {number}: a line must hold one JSON object, {{...}}, got {kind[:60]}")
        records.append((number, row))
    return records


def read_csv(path: Path) -> list[Record]:
    """Comma-separated values with a header; a field in double quotes may hold commas, line breaks and doubled quotes.

    Raises:
        ValueError: If a row has another number of fields than the header, or quotes do not close; it names the line.
    """
    # The default of 128 KiB a field refuses long documents. It is a setting of the whole process.
    before = csv.field_size_limit(2**31 - 1)
    try:
        return _table(path, _csv_rows(path))
    finally:
        csv.field_size_limit(before)


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(decoded(path).splitlines(keepends=True), strict=True)
    start = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {start}: not readable as CSV: {error}") from error
        yield start, fields
        start = reader.line_num + 1


def read_tsv(path: Path) -> list[Record]:
    """Values with a tab between them and a header; one row a line, and quotes are text like any other.

    Raises:
        ValueError: If a row has another number of fields than the header; it names the line.
    """
    lines = enumerate(decoded(path).split("\n"), start=1)
    return _table(path, ((number, line.removesuffix("\r").split("\t")) for number, line in lines))


def _table(path: Path, rows: Iterator[tuple[int, list[str]]]) -> list[Record]:
    header: list[str] = []
    records = []
    for number, fields in rows:
        if not fields or (len(fields) == 1 and not fields[0].strip()):
            continue
        if not header:
            header = [name.strip() for name in fields]
            twice = [name for name in header if not name or header.count(name) > 1]
            if twice:
                raise ValueError(f"{path}, line {number}: the header must name every column once, got {header}")
            continue
        if len(fields) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} {'field' if len(fields) == 1 else 'fields'}, but the header has"
                f" {len(header)} ({', '.join(header)})"
            )
        records.append((number, dict(zip(header, fields, strict=True))))
    return records


def decoded(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        ValueError: If it is in another encoding; it names the line.
    """
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}, line 1: the file is UTF-16, and must be UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8 (it may be"
            " Latin-1 or Windows-1252)"
        ) from error


READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
"""What reads a file by the end of its name; ``.parquet`` goes another way."""
