"""Rows that are there more than once are named in the log, and used all the same."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from smezo_pl.data import PromptDataModule
from smezo_pl.data.sources import Rows
from smezo_pl.data.splits import log_repeated_ids

KEYS = {"prompt": "{text} It was", "candidates": {0: " bad", 1: " good"}}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.levelno >= logging.WARNING and r.funcName in ("log_repeated_ids", "log_leaked_examples")
    ]


def test_repeated_ids_of_a_file(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    ids = ["a", "b", "a", None, None, "", "", "c", "b", "a"]
    rows = [{"id": name, "text": f"story {i}", "label": i % 2} for i, name in enumerate(ids)]
    file = write(tmp_path / "mine.jsonl", rows)
    data = PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=file)
    data.setup("fit")
    assert said(caplog) == [
        f"{file}: 3 of 10 rows repeat the id of an earlier row; the first: a on line 1 and line 3. Every row counts as"
        " an example of its own; copies may be in train and dev alike"
    ]
    rows_drawn = [example.index for split in ("train", "dev") for example in data.examples(split)]  # type: ignore[arg-type]
    assert sorted(rows_drawn) == list(range(10))


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ([0, 1, 0], "0 on row 0 and row 2"),
        ([{"paragraph": 0, "question": 1}, {"paragraph": 0, "question": 2}, {"paragraph": 0, "question": 2}], "row 1"),
        ([0, 1, 2], None),
        ([{"paragraph": 0, "question": 1}, {"paragraph": 0, "question": 2}], None),
        (["", "", " "], None),
        ([None, None], None),
    ],
)
def test_ids_of_a_table(values: list[Any], first: str | None, caplog: pytest.LogCaptureFixture) -> None:
    log_repeated_ids(Rows(pa.table({"idx": values}), "somewhere"))
    assert bool(said(caplog)) is (first is not None)
    if first is not None:
        assert "somewhere: 1 of 3 rows repeat the idx of an earlier row" in said(caplog)[0] and first in said(caplog)[0]


def test_dev_examples_that_are_trained_on(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": f"story {i}", "label": i % 2} for i in range(6)])
    dev = write(tmp_path / "dev.jsonl", [{"text": f"story {i}", "label": 0} for i in (9, 3, 8)])
    arguments: dict[str, Any] = {"tokenizer": tiny_tokenizer, "train_file": train, "dev_file": dev}
    PromptDataModule(KEYS, **arguments).setup("fit")
    assert said(caplog) == [
        "1 of 3 dev examples have the text of a training example (train/dev leakage); the first:"
        f" {dev}, line 2, trained on as {train}, line 4"
    ]
    caplog.clear()
    PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=train).setup("fit")
    assert said(caplog) == []
