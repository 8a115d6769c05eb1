import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smezo_pl.data.sources import load_file, read_csv, read_json_lines, read_tsv
from smezo_pl.tasks import Task, make_task

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def task() -> Task:
    return make_task({"prompt": "{text}\n", "candidates": {0: "No", 1: "Yes"}}, name="mine")


def test_json_lines(write: Write) -> None:
    path = write("a.jsonl", '\ufeff{"text": "é\\u2028", "label": 0}\r\n\n{"text": "b\u2028c", "label": null}\n')
    assert read_json_lines(path) == [(1, {"text": "é\u2028", "label": 0}), (3, {"text": "b\u2028c", "label": None})]


def test_csv_counts_the_lines_of_quoted_fields(write: Write) -> None:
    path = write("a.csv", 'text,label\r\n"one, ""two""\nthree",0\r\n\r\nfour,1\r\n')
    assert read_csv(path) == [
        (2, {"text": 'one, "two"\nthree', "label": "0"}),
        (5, {"text": "four", "label": "1"}),
    ]


def test_a_quote_in_a_tsv_is_text(write: Write) -> None:
    path = write("a.tsv", 'text\tlabel\n"so he said\t0\nit\'s 5" long\t1')
    assert read_tsv(path) == [(2, {"text": '"so he said', "label": "0"}), (3, {"text": "it's 5\" long", "label": "1"})]


def test_ten_megabytes_in_one_field(write: Write) -> None:
    import csv

    before = csv.field_size_limit()
    long = "word " * 2_000_000
    ((line, row),) = read_csv(write("a.csv", f'text,label\n"{long}",1\n'))
    assert (line, row["text"]) == (2, long)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: no JSON, Expecting value at column 10"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl, line 1: a line must hold one JSON object, {...}, got a list"),
        ("a.csv", "text,label\na,0\nb,1,2\n", "a.csv, line 3: 3 fields, but the header has 2 (text, label)"),
        ("a.csv", 'text,label\n"a\nb",0\nc\n', "a.csv, line 4: 1 field, but the header has 2"),
        ("a.csv", 'text,label\na,0\n"b,1\n', "a.csv, line 3: not readable as CSV: unexpected end of data"),
        ("a.csv", "text,text\na,0\n", "a.csv, line 1: the header must name every column once, got ['text', 'text']"),
        ("a.tsv", "text\tlabel\na b\n", "a.tsv, line 2: 1 field, but the header has 2 (text, label)"),
        ("a.csv", b"text,label\na,0\ncaf\xe9,1\n", "a.csv, line 3: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("a.jsonl", "\ufefftext".encode("utf-16"), "a.jsonl, line 1: the file is UTF-16, and must be UTF-8"),
        ("a.csv", "text,label\n", "a.csv holds no rows"),
        ("a.jsonl", "", "a.jsonl holds no rows"),
        (
            "a.csv",
            "txt,label\na,0\n",
            "a.csv lacks column 'text' of task 'mine' (did you mean 'txt'?); it has 'txt'",
        ),
        ("a.parquet", "no", "as Parquet"),
        ("a.xlsx", "", "a.xlsx' is neither a file that ends in .jsonl, .ndjson, .json, .csv, .tsv, .parquet nor"),
    ],
)
def test_a_file_that_cannot_be_used(write: Write, task: Task, name: str, content: str | bytes, message: str) -> None:
    path = write(name, content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_file(path, task, "train")


def test_a_file_that_is_not_there(tmp_path: Path, task: Task) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("there is no file")):
        load_file(tmp_path / "none.csv", task, "train")


def test_every_kind_of_file_gives_the_same_rows(write: Write, tmp_path: Path, task: Task) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    write("a.csv", "text,label\na,0\nb,1\n")
    write("a.tsv", "text\tlabel\na\t0\nb\t1\n")
    for kind in ("parquet", "jsonl", "csv", "tsv"):
        found = load_file(tmp_path / f"a.{kind}", task, "train").rows([1, 0])
        assert [{key: str(value) for key, value in row.items()} for row in found] == [
            {"text": "b", "label": "1"},
            {"text": "a", "label": "0"},
        ]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/set", ("owner/set", None, "train")),
        ("owner/set:dev", ("owner/set", None, "dev")),
        ("owner/set@config", ("owner/set", "config", "train")),
        ("owner/set-1.0@con_fig:dev", ("owner/set-1.0", "con_fig", "dev")),
    ],
)
def test_a_name_on_the_hub(name: str, asked: tuple[Any, ...], task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen = []

    def load(path: str, config: str | None, revision: str | None, split: str) -> Any:
        seen.append((path, config, split))
        return datasets.Dataset.from_list([{"text": "a", "label": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_file(name, task, "train").rows([0]) == [{"text": "a", "label": 1}]
    assert seen == [asked]
