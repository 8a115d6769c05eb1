"""Scores that are infinite or NaN: in metrics, in training, in predictions, in a run."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl import PromptDataModule, SparseMeZOModule
from smezo_pl.callbacks import PredictionWriter, RunMetrics, ScoreWriter, SeedCheckpoint
from smezo_pl.optim import NonFiniteLossError

ODD = 7
"""The row whose scores are not finite."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [
        "nice food",
        "bad hotel",
        "the room",
        "poor service",
        "it was",
        "great story",
        "awful",
        "movie Q",
        "lovely",
    ]
    path.write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def network(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[float, str], PreTrainedModel]:
    """A function that makes a network with one value in the embedding of a word, ``Q`` or ``It``."""

    def make(value: float, word: str) -> PreTrainedModel:
        model = make_tiny_model("llama", tie_word_embeddings=False)
        token = tiny_tokenizer(" " + word, add_special_tokens=False)["input_ids"][-1]
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = value  # type: ignore[operator, index]
        return model

    return make


def data_of(path: Path, tokenizer: PreTrainedTokenizerFast, answer: dict[str, Any] | None = None, **more: Any) -> Any:
    answer = answer or {"candidates": {0: " bad", 1: " good"}, "metric": ["accuracy", "f1"]}
    file = str(path)
    files = {"train_file": file, "dev_file": file, "test_file": file}
    return PromptDataModule({"prompt": "{text} It", **answer}, tokenizer=tokenizer, batch_size=4, **{**files, **more})


def trainer_of(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=2,
        val_check_interval=1,
        logger=False,
        enable_checkpointing=any(isinstance(callback, SeedCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


GENERATION = {"target": "text", "metric": ["f1", "em"], "max_new_tokens": 3}


@pytest.mark.parametrize("size", [1, 4, "auto"])
@pytest.mark.parametrize("answer", [None, GENERATION], ids=["candidates", "generation"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_example_makes_every_metric_nan_and_is_named(
    size: int | str,
    answer: dict[str, Any] | None,
    value: float,
    rows: Path,
    network: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, data = SparseMeZOModule(network(value, "Q")), data_of(rows, tiny_tokenizer, answer, eval_batch_size=size)
    trainer = trainer_of(tmp_path, ScoreWriter(), PredictionWriter())
    [metrics] = trainer.validate(module, data, verbose=False)
    assert set(metrics) == ({"val/loss", "val/f1", "val/em"} if answer else {"val/loss", "val/accuracy", "val/f1"})
    assert all(math.isnan(metric) for metric in metrics.values())
    assert "the scores of 11.111% of the examples are infinite or NaN, so metrics are NaN" in caplog.text
    written = json.loads((tmp_path / "validate.json").read_text(), parse_constant=pytest.fail)
    assert set(written["metrics"].values()) == {None}
    assert "metrics.loss is nan" in written["not_finite"]
    trainer.predict(module, data)
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "predictions.jsonl").read_text().splitlines()
    ]
    by_index = {line["index"]: line for line in lines}
    odd = by_index.pop(ODD)
    assert odd["prediction"] is None and "not finite" in odd["error"]
    assert odd.get("scores", None) is None
    assert len(by_index) == 8 and not any("error" in line for line in by_index.values())


def test_minus_infinity_for_a_wrong_candidate_is_not_finite_either(
    rows: Path, network: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = network(0.1, "Q")
    [token] = tiny_tokenizer(" bad", add_special_tokens=False)["input_ids"]
    model.get_output_embeddings().register_forward_hook(  # type: ignore[union-attr, operator]
        lambda _, __, logits: logits.index_fill(-1, torch.tensor(token), -math.inf)
    )
    trainer, module, data = trainer_of(tmp_path), SparseMeZOModule(model), data_of(rows, tiny_tokenizer)
    [metrics] = trainer.validate(module, data, verbose=False)
    assert all(math.isnan(metric) for metric in metrics.values())
    predicted = [row for batch in trainer.predict(module, data) or [] for row in batch]  # type: ignore[union-attr]
    assert all(row["error"].startswith("the scores are not finite: -inf, ") for row in predicted)  # type: ignore[index, call-overload]


@pytest.mark.parametrize("before", [True, False])
def test_a_validation_without_one_finite_score_ends_the_run_with_advice(
    before: bool,
    rows: Path,
    network: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    # A batch of one example of nine that is not finite is skipped; the validation goes on.
    fine, broken = network(math.nan, "Q"), network(math.nan, "It")
    module = SparseMeZOModule(fine)
    trainer_of(tmp_path, RunMetrics(before=before, table=False), SeedCheckpoint()).fit(
        module, data_of(rows, tiny_tokenizer)
    )
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written["after"] == dict.fromkeys(("loss", "accuracy", "f1")) and written["not_finite"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt"]
    advice = "after (0 steps. They are those of the starting weights: try bfloat16|1 steps. Try a smaller lr)"
    with pytest.raises(NonFiniteLossError, match=f"all validation examples .* {advice}"):
        trainer_of(tmp_path / "broken", RunMetrics(before=before, table=False)).fit(
            SparseMeZOModule(broken), data_of(rows, tiny_tokenizer)
        )


def test_a_step_whose_answers_are_missing_is_skipped(
    rows: Path, network: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = data_of(rows, tiny_tokenizer, objective="accuracy")
    module = SparseMeZOModule(network(math.nan, "It"))
    trainer = trainer_of(tmp_path, limit_val_batches=0)
    trainer.fit(module, data)
    assert trainer.optimizers[0].skipped_steps == 2  # type: ignore[attr-defined]
