import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl.callbacks import PredictionWriter
from smezo_pl.data import PromptDataModule
from smezo_pl.module import SparseMeZOModule
from tests.trajectory.runs import Classifier, Examples, make_trainer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_line_an_example_in_the_order_of_the_data(tmp_path: Path) -> None:
    module = Classifier()
    rows = [row for batch in make_trainer(tmp_path).predict(module, Examples()) or [] for row in batch]
    make_trainer(tmp_path, PredictionWriter()).predict(module, Examples())
    assert lines(tmp_path / "predictions.jsonl") == rows
    assert [row["index"] for row in rows] == list(range(16))


def test_a_path_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "ünïcödé.jsonl"
    make_trainer(tmp_path, PredictionWriter(str(path))).predict(Classifier(), Examples())
    assert len(lines(path)) == 16


def test_prompts_stand_with_their_scores(
    tmp_path: Path,
    task_folder: Path,
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    data = PromptDataModule("sst2", str(task_folder), tiny_tokenizer, num_train=8, num_dev=4, num_test=10)
    module = SparseMeZOModule(make_tiny_model())
    make_trainer(tmp_path, PredictionWriter()).predict(module, data)
    written = lines(tmp_path / "predictions.jsonl")
    wanted = data.examples("test")
    assert [row["prompt"] for row in written] == [example.prompt for example in wanted]
    assert [row["index"] for row in written] == [example.index for example in wanted]
    assert [row["label"] for row in written] == [example.label for example in wanted]
    for row in written:
        assert list(row) == ["index", "prompt", "candidates", "scores", "prediction", "label"]
        assert row["candidates"] == [" terrible", " great"]
        assert row["scores"].index(max(row["scores"])) == row["prediction"]


def test_another_predict_step_is_refused(tmp_path: Path) -> None:
    class Other(Classifier):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.scores(batch)

    with pytest.raises(TypeError, match="returns a list of dicts, one per example, with 'index'; got Tensor"):
        make_trainer(tmp_path, PredictionWriter()).predict(Other(), Examples())
