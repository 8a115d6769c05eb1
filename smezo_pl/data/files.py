"""Files of rows as text: JSON, JSON Lines, comma- and tab-separated values."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = tuple[int, dict[str, Any]]
"""The line that a row begins on, from 1 (0: the file has no line for each row), and the row."""


def read_json_lines(path: Path) -> list[Record]:
    """One JSON object per line; blank lines are left out."""
    records: list[Record] = []
    # Only line feeds end a line: JSON texts may hold the other characters that `splitlines` splits at.
    for line, text in enumerate(_decoded(path).split("\n"), start=1):
        if text.strip():
            if not records and text.lstrip()[0] == "[":
                raise ValueError(
                    f"{path}, line {line}: a line must hold one JSON object, {{...}}, got a list; a file that is one"
                    " array must end in .json"
                )
            row = _parsed(path, text, line)
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {line}: a line must hold one JSON object, {{...}}, got {repr(row)[:60]}"
                )
            records.append((line, row))
    return records


def read_json(path: Path) -> list[Record]:
    """One JSON document, or one object per line as in `read_json_lines`.

    A document is an array of objects; or an object with a list for each column (``{"text": [...], "label": [...]}``, or
    an object for each, as pandas writes them); or an object whose ``data`` is an array of objects; or one row. Articles
    with paragraphs and questions, as SQuAD nests them, are rows of ``title``, ``context`` and what a question has.
    """
    text = _decoded(path)
    first, _, rest = text.lstrip().partition("\n")
    if rest.strip() and first[0] == "{" and first.rstrip()[-1] == "}":
        return read_json_lines(path)
    document = _parsed(path, text) if text.strip() else []
    if isinstance(document, dict):
        document = _rows_of(path, document)
    if not isinstance(document, list):
        raise ValueError(f"{path}: a document must be an array of objects or an object, got {document!r}")
    for index, row in enumerate(document):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {index}: must be a JSON object, {{...}}, got {repr(row)[:60]}")
    if any("paragraphs" in row for row in document):
        document = list(_questions(path, document))
    return [(0, row) for row in document]


def _parsed(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        at = f"{path}, line {line + error.lineno - 1}"
        raise ValueError(f"{at}: no JSON, {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a repeated key, a number of thousands of digits, deep nesting
        raise ValueError(f"{path}, line {line}: not readable as JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice in one object")
    return row


def _rows_of(path: Path, document: dict[str, Any]) -> list[Any]:
    """The rows of a document that is one object."""
    columns = list(document.values())
    data = document.get("data")
    by_column = len(columns) > 1 and all(isinstance(column, list) for column in columns)
    if isinstance(data, list) and all(isinstance(row, dict) for row in data) and not by_column:
        return data
    if columns and all(isinstance(column, dict) for column in columns):
        if any(list(column) != list(columns[0]) for column in columns):
            raise ValueError(f"{path}: the columns {', '.join(document)} have different rows")
        columns = [list(column.values()) for column in columns]
    elif not columns or not all(isinstance(column, list) for column in columns):
        return [document]
    lengths = [f"{len(column)} in {name!r}" for name, column in zip(document, columns, strict=True)]
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"{path}: the columns have different numbers of rows: {', '.join(lengths)}")
    return [dict(zip(document, row, strict=True)) for row in zip(*columns, strict=True)]


def _questions(path: Path, articles: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for index, article in enumerate(articles):
        try:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {"title": article.get("title", ""), "context": paragraph["context"], **question}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, article {index}: not nested as in SQuAD's files ({error!r})") from error


def read_csv(path: Path) -> list[Record]:
    """Comma-separated values with a header; a field in double quotes may hold commas, line breaks, doubled quotes."""
    # The default of 128 KiB per field refuses long documents. It is a setting of the whole process.
    before = csv.field_size_limit(2**31 - 1)
    rows, line = [], 1
    reader = csv.reader(_decoded(path).splitlines(keepends=True), strict=True)
    try:
        for fields in reader:
            rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not readable as CSV: {error}") from error
    finally:
        csv.field_size_limit(before)
    return _with_header(path, rows)


def read_tsv(path: Path) -> list[Record]:
    """Tab-separated values with a header; one row per line, and quotes are text like any other."""
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return _with_header(path, [(line, text.removesuffix("\r").split("\t")) for line, text in lines])


def _with_header(path: Path, rows: list[tuple[int, list[str]]]) -> list[Record]:
    rows = [(line, fields) for line, fields in rows if len(fields) > 1 or "".join(fields).strip()]
    if not rows:
        return []
    line, header = rows[0][0], [name.strip() for name in rows[0][1]]
    if not all(header) or len(set(header)) < len(header):
        raise ValueError(f"{path}, line {line}: the header must name every column once, got {header}")
    for line, fields in rows[1:]:
        if len(fields) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(fields)} {'field' if len(fields) == 1 else 'fields'}, but the header has"
                f" {len(header)} ({', '.join(header)})"
            )
    return [(line, dict(zip(header, fields, strict=True))) for line, fields in rows[1:]]


def _decoded(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark."""
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
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
"""What reads a file by its suffix, ``.parquet`` apart."""
