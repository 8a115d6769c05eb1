"""What `predict` writes for a file: a line for every row, in the order of the file, whatever a row holds."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl import PromptDataModule, SparseMeZOModule
from smezo_pl.callbacks import PredictionWriter

CHOICE = {"prompt": "{text} It was", "candidates": {"no": " bad", "yes": " good"}}
ROWS: list[dict[str, Any]] = [
    {"text": "nice food", "label": "yes"},
    {"text": "  ", "label": "no"},
    {"text": "poor room", "label": "perhaps"},
    {"text": "hotel"},
    {"text": None, "label": "yes"},
    {"text": "story of a nice room", "label": "no"},
    {"text": {"a": 1}, "label": "no"},
]


@pytest.fixture
def module(make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    module = SparseMeZOModule(make_tiny_model())
    module.tokenizer = tiny_tokenizer
    return module


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trainer_of(folder: Path) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=[PredictionWriter()],
        **quiet,  # type: ignore[arg-type]
    )


def predicted(folder: Path, module: Any, data: PromptDataModule) -> list[dict[str, Any]]:
    trainer_of(folder).predict(module, data)
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_a_line_for_every_row_in_the_order_of_the_file(
    bad_rows: Any, module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "smezo_pl")
    file = write(tmp_path / "new.jsonl", ROWS)
    rows = predicted(tmp_path, module, PromptDataModule(CHOICE, test_file=file, bad_rows=bad_rows))
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["prediction"] is None for row in rows] == [False, True, False, False, True, False, True]
    assert [row.get("label") for row in rows] == [1, None, None, None, None, 0, None]
    assert [row["index"] for row in rows if "error" in row] == [1, 4, 6]
    assert rows[1] == {
        "index": 1,
        "prediction": None,
        "error": f"{file}, line 2: empty example, column 'text' holds no text",
    }
    assert f"new: 7 of 7 rows of {file} to predict: all" in caplog.text
    assert "1 of 7 rows have no label that can be read; the first: " in caplog.text
    assert f"3 of 7 rows cannot be predicted; the first: {file}, line 2: empty" in caplog.text


def test_a_sample_only_where_num_test_is_given(module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "smezo_pl")
    rows = [{"text": f"room {number}", "label": "no"} for number in range(1100)]
    file = write(tmp_path / "new.jsonl", rows)
    data = PromptDataModule(CHOICE, test_file=file, eval_batch_size=256)
    assert [row["index"] for row in predicted(tmp_path, module, data)] == list(range(1100))
    # The same data module afterwards: a test is of all rows too, and does not take over what was predicted.
    trainer_of(tmp_path).test(module, data, verbose=False)
    assert sorted(example.index for example in data.examples("test")) == list(range(1100))
    few = predicted(tmp_path, module, PromptDataModule(CHOICE, test_file=file, num_test=5))
    indices = [row["index"] for row in few]
    assert len(indices) == 5 and indices == sorted(indices) != list(range(5))
    assert "5 of 1100 rows of" in caplog.text and "a sample by data_seed 0, as num_test 5 is given" in caplog.text
    assert PromptDataModule(CHOICE, test_file=file, num_test=5).num_test == 5
    assert PromptDataModule("demo").num_test == 1000  # MeZO's protocol


def test_labels_that_cannot_be_read_are_no_obstacle(
    module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file whose labels contradict each other: no label is read."""
    options = {"prompt": "{text}", "candidates": {"column": "options", "text": " {option}"}}
    rows = [{"text": "a room", "options": ["1", "0"], "label": 1}, {"text": "b", "options": ["x", "y"], "label": "y"}]
    written = predicted(tmp_path, module, PromptDataModule(options, test_file=write(tmp_path / "new.jsonl", rows)))
    assert [(row["index"], row["label"], "error" in row) for row in written] == [(0, None, False), (1, None, False)]
    assert "2 of 2 rows have no label that can be read; the first: " in caplog.text
    assert [row["candidates"] for row in written] == [[" 1", " 0"], [" x", " y"]]


def test_a_row_without_room_for_its_prompt(module: Any, tmp_path: Path) -> None:
    options = {"prompt": "{text}", "candidates": {"column": "options", "text": " {option}"}}
    rows = [{"text": "a nice room", "options": ["bad", "good"]}] * 5
    rows[3] = {"text": "a room", "options": ["bad", "a very long story of a hotel"]}
    file = write(tmp_path / "new.jsonl", rows)
    written = predicted(tmp_path, module, PromptDataModule(options, test_file=file, max_length=6))
    assert [row["index"] for row in written] == list(range(5))
    assert ["error" in row for row in written] == [False, False, False, True, False]
    assert written[3]["error"].startswith(f"{file}, line 4: max_length 6 leaves no room")


def test_generation(module: Any, tmp_path: Path) -> None:
    task = {"prompt": "{text}", "target": "answer", "max_new_tokens": 2}
    rows = [{"text": "room", "answer": "x"}, {"text": ""}, {"text": "food"}, {"text": "hotel", "answer": {"a": 1}}]
    file = write(tmp_path / "new.jsonl", rows)
    written = predicted(tmp_path, module, PromptDataModule(task, test_file=file))
    assert [(row["index"], "error" in row) for row in written] == [(0, False), (1, True), (2, False), (3, False)]


def test_a_file_without_one_row_that_can_be_predicted(module: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "new.jsonl", [{"text": ""}, {"text": None}])
    with pytest.raises(ValueError, match=r"none of 2 rows can be predicted; the first: .*line 1: empty example"):
        predicted(tmp_path, module, PromptDataModule(CHOICE, test_file=file))
