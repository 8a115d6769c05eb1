import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smezo_pl.data.files import read_csv, read_json, read_json_lines, read_tsv
from smezo_pl.data.sources import load_file, load_split
from smezo_pl.tasks import Source, Task, get_task, make_example, make_task

SST2 = get_task("sst2")


def write(path: Path, rows: list[dict[str, Any]], names: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"sentence": f"s{i}", "label": i % 2, "idx": i} for i in range(start, start + count)]


def test_a_local_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "sst2" / "train.parquet", rows(5), ["negative", "positive"])
    with caplog.at_level(logging.INFO):
        split = load_split(SST2, "train", tmp_path)
    assert len(split) == 5
    assert split.rows([3, 0]) == [{"sentence": "s3", "label": 1, "idx": 3}, {"sentence": "s0", "label": 0, "idx": 0}]
    assert split.names == {"label": ["negative", "positive"]}
    assert caplog.messages == [f"sst2: 5 rows of {tmp_path / 'sst2' / 'train.parquet'}"]


def test_a_part_of_a_split_is_taken_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "sst2" / "train_sub9k.parquet", rows(5))
    with caplog.at_level(logging.INFO):
        assert len(load_split(SST2, "train", str(tmp_path))) == 5
    assert "train_sub9k.parquet (a part of the split, by its name)" in caplog.text


def test_shards_come_in_order(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        write(tmp_path / "sst2" / f"train-0000{i}-of-00003.parquet", rows(2, 2 * i))
    split = load_split(SST2, "train", tmp_path)
    assert [row["idx"] for row in split.rows(range(6))] == list(range(6))


def test_the_whole_split_goes_before_its_parts(tmp_path: Path) -> None:
    write(tmp_path / "sst2" / "train.parquet", rows(7))
    write(tmp_path / "sst2" / "train_small.parquet", rows(2))
    assert len(load_split(SST2, "train", tmp_path)) == 7


def test_another_split_with_the_same_prefix_is_not_taken(tmp_path: Path) -> None:
    mnli = get_task("mnli")
    row = {"premise": "a", "hypothesis": "b", "label": 0}
    write(tmp_path / "mnli" / "validation_matched.parquet", [row])
    write(tmp_path / "mnli" / "validation_mismatched.parquet", [row] * 2)
    assert len(load_split(mnli, "validation_matched", tmp_path)) == 1


def test_two_parts_of_a_split_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "sst2" / f"train_{name}.parquet", rows(1))
    with pytest.raises(ValueError, match=r"has 2 files for split 'train' and none is called train.parquet: train_a"):
        load_split(SST2, "train", tmp_path)


def test_a_task_may_have_a_folder_of_another_name(tmp_path: Path) -> None:
    write(tmp_path / "wsc.fixed" / "train.parquet", [{"text": "a", "span1_text": "b", "span2_text": "c", "label": 0}])
    assert len(load_split(get_task("wsc"), "train", tmp_path)) == 1


def test_a_folder_without_the_task(tmp_path: Path) -> None:
    write(tmp_path / "rte" / "train.parquet", rows(1))
    with pytest.raises(FileNotFoundError, match=r"has no folder 'sst2' for task 'sst2': it holds rte"):
        load_split(SST2, "train", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no such folder or it is empty"):
        load_split(SST2, "train", tmp_path / "nowhere")


def test_a_folder_without_the_split(tmp_path: Path) -> None:
    write(tmp_path / "sst2" / "train.parquet", rows(1))
    with pytest.raises(FileNotFoundError, match=r"sst2 has no validation\*\.parquet; it holds train\.parquet"):
        load_split(SST2, "validation", tmp_path)
    (tmp_path / "rte").mkdir()
    with pytest.raises(FileNotFoundError, match=r"rte has no train\*\.parquet; it holds no Parquet file"):
        load_split(get_task("rte"), "train", tmp_path)


def test_missing_columns_are_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rte" / "train.parquet"
    write(path, [{"premise": "a", "gold": 0}])
    with pytest.raises(ValueError, match="lacks columns") as error:
        load_split(get_task("rte"), "train", tmp_path)
    assert str(error.value) == f"{path} lacks columns 'hypothesis', 'label' of task 'rte'; it has 'premise', 'gold'"


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "sst2" / "train.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), path)
    with pytest.raises(ValueError, match=r"train\.parquet holds no rows"):
        load_split(SST2, "train", tmp_path)


def test_a_corrupted_file(tmp_path: Path) -> None:
    path = tmp_path / "sst2" / "train.parquet"
    path.parent.mkdir()
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"cannot read .*train\.parquet as Parquet"):
        load_split(SST2, "train", tmp_path)


def test_shards_with_different_columns(tmp_path: Path) -> None:
    write(tmp_path / "sst2" / "train-00000-of-00002.parquet", rows(1))
    write(tmp_path / "sst2" / "train-00001-of-00002.parquet", [{"sentence": "s"}])
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet and .* have different columns"):
        load_split(SST2, "train", tmp_path)


def test_the_demo_set_needs_no_folder_and_is_called_synthetic(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        split = load_split(get_task("demo"), "test", "/nowhere")
    assert "synthetic" in split.origin
    assert caplog.messages == ["demo: 1000 bundled synthetic sentences (test)"]


def test_a_task_without_a_source() -> None:
    task = Task("mine", "{a}\n", {"0": "No", "1": "Yes"})
    with pytest.raises(ValueError, match="task 'mine' names no data source"):
        load_split(task, "train")
    with pytest.raises(ValueError, match="task 'mine' has no dataset on the hub: give data_dir"):
        load_split(Task("mine", "{a}\n", {"0": "No", "1": "Yes"}, source=Source()), "train")


class Hub:
    """Stands for ``datasets.load_dataset``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: object) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.answers = list(answers)
        monkeypatch.setattr("datasets.load_dataset", self)

    def __call__(self, path: str, config: str | None, *, revision: str | None, split: str) -> object:
        self.calls.append((path, config, revision, split))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def hub_rows() -> object:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    # A selection: rows that are not where the table has them.
    data = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
    return data.select([2, 0])


def test_the_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    hub = Hub(monkeypatch, hub_rows())
    with caplog.at_level(logging.INFO):
        split = load_split(SST2, "train")
    assert hub.calls == [("nyu-mll/glue", "sst2", None, "train")]
    assert split.rows([0, 1]) == [{"sentence": "c", "label": 1}, {"sentence": "a", "label": 0}]
    assert split.names == {"label": ["negative", "positive"]}
    assert "2 rows of nyu-mll/glue/sst2/train from the Hugging Face hub" in caplog.text


def test_a_loading_script_on_the_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    script = RuntimeError("Dataset scripts are no longer supported, but found glue.py")
    hub = Hub(monkeypatch, script, hub_rows())
    assert len(load_split(SST2, "train")) == 2
    assert hub.calls[1] == ("nyu-mll/glue", "sst2", "refs/convert/parquet", "train")
    assert "its Parquet conversion by the hub is taken instead" in caplog.text


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub"))
    with pytest.raises(ConnectionError, match=r"cannot load nyu-mll/glue/sst2/train from the .* give data_dir with"):
        load_split(SST2, "train")


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        "sst2",
        "rte",
        "cb",
        "boolq",
        "wsc",
        "wic",
        "multirc",
        "copa",
        "record",
        "mnli",
        "qnli",
        "mrpc",
        "qqp",
        "cola",
        "trec",
    ],
)
def test_real_files(name: str, data_folder: Path) -> None:
    from smezo_pl.tasks.task import render

    task = get_task(name)
    assert task.source is not None
    for split in (task.source.train, task.source.test):
        data = load_split(task, split, data_folder)
        taken = range(0, len(data), max(1, len(data) // 200))
        for i, row in zip(taken, data.rows(taken), strict=True):
            example = make_example(task, row, i, data.origin, data.names.get(task.label))
            assert example.label >= 0
            assert "{" not in render(task.prompt, dict.fromkeys(task.text_columns, ""))


Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write_file(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def task() -> Task:
    return make_task({"prompt": "{text}\n", "candidates": {0: "No", 1: "Yes"}}, name="mine")


def test_json_lines(write_file: Write) -> None:
    path = write_file("a.jsonl", '\ufeff{"text": "é\\u2028", "label": 0}\r\n\n{"text": "b\u2028c", "label": null}\n')
    assert read_json_lines(path) == [(1, {"text": "é\u2028", "label": 0}), (3, {"text": "b\u2028c", "label": None})]


ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


@pytest.mark.parametrize(
    "document",
    [
        '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n',
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        '[{"text": "a", "label": 0}\n,{"text": "b", "label": 1}\n]',
        '\ufeff{"text": ["a", "b"], "label": [0, 1]}',
        json.dumps({"label": [0, 1], "text": ["a", "b"]}, indent=1),
        '{"text": {"0": "a", "1": "b"}, "label": {"0": 0, "1": 1}}',
        json.dumps({"version": "1", "data": ROWS}),
        json.dumps({"data": ROWS}),
    ],
)
def test_the_forms_of_a_json_file(write_file: Write, task: Task, document: str) -> None:
    assert load_file(write_file("a.json", document), task, "train").rows([0, 1]) == ROWS


def test_one_row_of_json(write_file: Write) -> None:
    assert read_json(write_file("a.json", '{"text": "a", "options": ["b", "c"]}')) == [
        (0, {"text": "a", "options": ["b", "c"]})
    ]


def test_squad_as_it_is_published(write_file: Write) -> None:
    answers = [{"text": "Paris", "answer_start": 5}]
    question = {"id": "1", "question": "Where?", "answers": answers}
    article = {"title": "France", "paragraphs": [{"context": "It is Paris.", "qas": [question, question]}]}
    squad = get_task("squad")
    rows = load_file(write_file("a.json", json.dumps({"version": "1.1", "data": [article]})), squad, "train")
    assert len(rows) == 2
    example = make_example(squad, rows.rows([1])[0])
    assert example.prompt == "Title: France\nContext: It is Paris.\nQuestion: Where?\nAnswer:"
    assert example.references == ("Paris",)


def test_integers_that_were_read_as_floats(write_file: Write, tmp_path: Path) -> None:
    """As pandas writes a column of integers with an empty cell."""
    task = make_task({"prompt": "{year} {price}", "target": "stars"})
    rows = [{"year": 1999.0, "price": 3.0, "stars": [3.0]}, {"year": None, "price": 2.5, "stars": [float("nan"), 4.0]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_file("a.jsonl", "\n".join(map(json.dumps, rows)))
    for name in ("a.parquet", "a.jsonl"):
        data = load_file(tmp_path / name, task, "train")
        example = make_example(task, data.rows([0])[0])
        assert (example.prompt, example.candidates) == ("1999 3", (" 3\n",))


def test_fractions_of_32_bits(tmp_path: Path, task: Task) -> None:
    table = pa.table({"text": pa.array([0.1, None, 3], pa.float32()), "label": [0, 1, 1]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row["text"] for row in load_file(tmp_path / "a.parquet", task, "train").rows([0, 1, 2])] == [0.1, None, 3.0]


def test_text_columns_that_are_not_utf8(tmp_path: Path) -> None:
    """Other writers of Parquet do not check."""
    cells = pa.array([b"a", b"caf\xe9"]).view(pa.string())
    answers = pa.StructArray.from_arrays([pa.ListArray.from_arrays([0, 1, 2], cells)], ["text"])
    pq.write_table(pa.table({"text": ["x", "y"], "cells": cells, "answers": answers}), tmp_path / "a.parquet")
    for keys in ({"prompt": "{text}", "target": "answers.text"}, {"prompt": "{cells}", "target": "text"}):
        task = make_task(keys)
        first, second = load_file(tmp_path / "a.parquet", task, "train").rows([0, 1])
        assert len(make_example(task, first).candidates) == 1
        with pytest.raises(ValueError, match=r"row 1: column '(answers.text|cells)' holds bytes that are not UTF-8"):
            make_example(task, second, 1)


def test_csv_counts_the_lines_of_quoted_fields(write_file: Write) -> None:
    path = write_file("a.csv", 'text,label\r\n"one, ""two""\nthree",0\r\n\r\nfour,1\r\n')
    assert read_csv(path) == [
        (2, {"text": 'one, "two"\nthree', "label": "0"}),
        (5, {"text": "four", "label": "1"}),
    ]


def test_a_quote_in_a_tsv_is_text(write_file: Write) -> None:
    path = write_file("a.tsv", 'text\tlabel\n"so he said\t0\nit\'s 5" long\t1')
    assert read_tsv(path) == [(2, {"text": '"so he said', "label": "0"}), (3, {"text": "it's 5\" long", "label": "1"})]


def test_ten_megabytes_in_one_field(write_file: Write) -> None:
    import csv

    before = csv.field_size_limit()
    long = "word " * 2_000_000
    ((line, row),) = read_csv(write_file("a.csv", f'text,label\n"{long}",1\n'))
    assert (line, row["text"]) == (2, long)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: no JSON, Expecting value at column 10"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl, line 1: a line must hold one JSON object, {...}, got a list"),
        (
            "a.jsonl",
            '[\n{"text": "a"}]\n',
            "a.jsonl, line 1: a line must hold one JSON object, {...}, got a list; a file",
        ),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "a.jsonl, line 1: not readable as JSON: key 'text' is there twice"),
        ("a.json", '[{"text": "a"},\n {"text": }]', "a.json, line 2: no JSON, Expecting value at column 11"),
        ("a.json", '[{"text": "a"}, "b"]', "a.json, row 1: must be a JSON object, {...}, got 'b'"),
        ("a.json", '"a"', "a.json: a document must be an array of objects or an object, got 'a'"),
        (
            "a.json",
            '{"text": ["a", "b"], "label": [0]}',
            "a.json: the columns have different numbers of rows: 2 in",
        ),
        ("a.json", '{"text": {"0": "a"}, "label": {"1": 0}}', "a.json: the columns text, label have different rows"),
        ("a.json", '{"data": [{"paragraphs": [{"context": ""}]}]}', "a.json, article 0: not nested as in SQuAD's"),
        ("a.json", "[]", "a.json holds no rows"),
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
def test_a_file_that_cannot_be_used(
    write_file: Write, task: Task, name: str, content: str | bytes, message: str
) -> None:
    path = write_file(name, content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_file(path, task, "train")


def test_a_file_that_is_not_there(tmp_path: Path, task: Task) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("there is no file")):
        load_file(tmp_path / "none.csv", task, "train")


def test_every_kind_of_file_gives_the_same_rows(write_file: Write, tmp_path: Path, task: Task) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_file("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    write_file("a.csv", "text,label\na,0\nb,1\n")
    write_file("a.tsv", "text\tlabel\na\t0\nb\t1\n")
    pq.write_table(pa.table({"text": pa.array(["a", "b"], pa.string_view()), "label": [0, 1]}), tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet", "a.jsonl", "a.csv", "a.tsv"):
        found = load_file(tmp_path / name, task, "train").rows([1, 0])
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
