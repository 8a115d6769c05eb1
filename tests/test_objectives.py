"""Objectives that are no loss: metrics and rewards through the same step, and generated answers."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedTokenizerFast

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.callbacks import PredictionWriter
from smezo_pl.data.batch import split_batch
from smezo_pl.optim import NonFiniteLossError
from smezo_pl.scoring.evaluation import answers_of
from smezo_pl.tasks.metrics import METRICS, squad_em, squad_f1

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "max_epochs": -1,
}
fast = partial(SparseMeZO, lr=1e-2, eps=1e-2, sparsity=0.5, kernel="torch")
QUESTIONS = {"prompt": "question {q}?\nanswer:", "target": "answers", "max_new_tokens": 6, "metric": ["f1", "em"]}


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """Twelve questions; the tiny model generates gibberish, so that every answer of it holds one of the letters."""
    path = tmp_path / "questions.jsonl"
    rows = [{"q": "the " * (i % 5) + f"{i}", "answers": [f"{i} great", "good", "e"]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rewards_of_a_run.py").write_text(
        "def great(predictions, references):\n    return [p == 'great' for p in predictions]\n"
        "def length(predictions, references):\n    return [len(p) for p in predictions]\n"
        "def broken(predictions, references):\n    raise RuntimeError('no such file')\n"
        "calls = []\n"
        "def sometimes(predictions, references):\n"
        "    calls.append(1)\n    return float('nan') if len(calls) % 4 == 0 else 0.5\n"
    )
    monkeypatch.chdir(tmp_path)
    return "rewards_of_a_run"


def generation_data(questions: str, **changes: Any) -> PromptDataModule:
    arguments: dict[str, Any] = {"task": QUESTIONS, "train_file": questions, "dev_file": questions, "batch_size": 4}
    return PromptDataModule(**{**arguments, "test_file": questions, "eval_batch_size": 5, **changes})


def demo(**changes: Any) -> PromptDataModule:
    return PromptDataModule(**{"task": "demo", "num_train": 32, "num_dev": 16, "batch_size": 16, **changes})


@torch.no_grad()
def one_at_a_time(module: SparseMeZOModule, data: PromptDataModule) -> dict[int, str]:
    """Every answer from a forward of its own a token, without cache, padding or batch."""
    texts = {}
    for encoded in data.encoded("test"):
        tokens = list(encoded.generated_after)
        for _ in range(6):
            tokens.append(int(module.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        text = data.tokenizer.decode(tokens[len(encoded.generated_after) :])
        end = min([index for index in (text.find("\n"), text.find("</s>")) if index >= 0], default=len(text))
        texts[encoded.index] = text[:end].strip()
    return texts


def test_generated_answers_are_scored_as_texts(tiny_folder: Path, questions: str, tmp_path: Path) -> None:
    module, data = SparseMeZOModule(str(tiny_folder)), generation_data(questions)
    trainer = Trainer(**QUIET, callbacks=[PredictionWriter(str(tmp_path / "out.jsonl"))])
    (values,) = trainer.test(module, data, verbose=False)
    texts = one_at_a_time(module, data)
    references = {example.index: example.references for example in data.examples("test")}
    assert len(set(texts.values())) > 3
    assert set(values) == {"test/loss", "test/f1", "test/em"}
    assert values["test/f1"] == pytest.approx(sum(squad_f1(texts[i], references[i]) for i in texts) / 12)
    assert values["test/em"] == pytest.approx(sum(squad_em(texts[i], references[i]) for i in texts) / 12)
    trainer.predict(module, data)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["index"]: row["prediction"] for row in rows} == texts
    assert list(rows[0]) == ["index", "prompt", "prediction", "references"]


def test_predicting_needs_no_answers(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "unanswered.jsonl"
    path.write_text('{"q": "a"}\n{"q": "b"}\n')
    trainer = Trainer(**QUIET, callbacks=[PredictionWriter(str(tmp_path / "out.jsonl"))])
    trainer.predict(SparseMeZOModule(str(tiny_folder)), generation_data(str(path)))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["references"] for row in rows] == [[], []]


def closure(module: SparseMeZOModule, data: PromptDataModule, micro: int | None = None) -> float:
    """The loss that a step sees of the first training batch."""
    trainer = Trainer(**QUIET, max_steps=1)
    values: list[float] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> int:
            assert isinstance(pl_module, SparseMeZOModule)
            with torch.no_grad():
                values.append(float(pl_module.batch_loss(split_batch(batch, micro))))
            return -1

    trainer.callbacks.append(Look())
    trainer.fit(module, data)
    return values[0]


@pytest.mark.parametrize("objective", ["accuracy", "f1", "f1_macro"])
def test_a_metric_of_the_batch_is_what_a_step_sees(tiny_folder: Path, objective: str) -> None:
    whole = closure(SparseMeZOModule(str(tiny_folder)), demo(objective=objective))
    # An F1 is no mean over parts: they must be put together first.
    assert closure(SparseMeZOModule(str(tiny_folder)), demo(objective=objective), micro=3) == whole
    assert 0 < whole < 1
    # The same, from the answers to the batch one by one.
    module, data = SparseMeZOModule(str(tiny_folder)), demo(objective=objective)
    module.configure_model()
    data.set_tokenizer(module.tokenizer)
    with torch.no_grad():
        answers = answers_of(module.model, next(iter(data.train_dataloader())), module.text_tokenizer)
    assert whole == pytest.approx(1 - METRICS[objective].measure(answers, 2))


@pytest.mark.parametrize("perturbation", ["layerwise", "in_place"])
def test_a_step_on_generated_answers(tiny_folder: Path, questions: str, rewards: str, perturbation: Any) -> None:
    module = SparseMeZOModule(str(tiny_folder), partial(fast, eps=0.05), perturbation=perturbation)
    data = generation_data(questions, reward=f"{rewards}.length", batch_size=12)
    module.configure_model()
    start = {name: weight.clone() for name, weight in module.model.named_parameters()}
    Trainer(**QUIET, max_steps=6, limit_val_batches=0).fit(module, data)
    steps = module.optimizers()
    assert steps.skipped_steps == 0  # type: ignore[union-attr]
    assert any(not torch.equal(start[name], weight) for name, weight in module.model.named_parameters())


def test_both_perturbations_see_the_same_generated_answers(tiny_folder: Path, questions: str, rewards: str) -> None:
    losses = []
    for perturbation in ("layerwise", "in_place"):
        seen: list[float] = []

        class Look(Callback):
            def __init__(self, seen: list[float]) -> None:
                self.seen = seen

            def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
                self.seen.append(float(trainer.callback_metrics["train/loss"]))

        module = SparseMeZOModule(str(tiny_folder), partial(fast, eps=0.05), perturbation=perturbation)
        trainer = Trainer(**QUIET, max_steps=5, limit_val_batches=0, callbacks=[Look(seen)])
        trainer.fit(module, generation_data(questions, reward=f"{rewards}.length", batch_size=12))
        losses.append(seen)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1


def test_a_reward_is_learned(tiny_folder: Path, rewards: str) -> None:
    """The reward wants one answer whatever the question: in a few steps it is given nearly always."""
    module = SparseMeZOModule(str(tiny_folder), partial(fast, lr=3e-3, eps=3e-2))
    data = demo(reward=f"{rewards}.great", num_train=32, batch_size=32)
    trainer = Trainer(**QUIET, max_steps=40, limit_val_batches=0)
    trainer.fit(module, data)
    answered = [row["prediction"] for part in Trainer(**QUIET).predict(module, data) or [] for row in part]
    assert sum(answered) / len(answered) > 0.95


def test_a_run_whose_reward_always_fails_ends(
    tiny_folder: Path, rewards: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = SparseMeZOModule(str(tiny_folder), fast)
    trainer = Trainer(**QUIET, max_steps=50, limit_val_batches=0)
    with pytest.raises(NonFiniteLossError, match="not finite in 20 steps in a row"):
        trainer.fit(module, demo(reward=f"{rewards}.broken"))
    assert "reward rewards_of_a_run.broken raised RuntimeError: no such file: the step is skipped" in caplog.text


def test_a_reward_that_fails_at_times_skips_those_steps(tiny_folder: Path, rewards: str) -> None:
    module = SparseMeZOModule(str(tiny_folder), fast)
    trainer = Trainer(**QUIET, max_steps=10, limit_val_batches=0)
    trainer.fit(module, demo(reward=f"{rewards}.sometimes"))
    # Every fourth call gives NaN, and a step calls twice.
    assert (trainer.global_step, module.optimizers().skipped_steps) == (10, 5)  # type: ignore[union-attr]


def test_dev_loss_stays_a_loss(tiny_folder: Path) -> None:
    values = [
        Trainer(**QUIET).validate(SparseMeZOModule(str(tiny_folder)), demo(objective=objective), verbose=False)[0]
        for objective in (None, "accuracy")
    ]
    assert values[0] == values[1]


def test_parts_of_a_batch_keep_their_texts(
    tiny_tokenizer: PreTrainedTokenizerFast, questions: str, tmp_path: Path
) -> None:
    data = generation_data(questions, tokenizer=tiny_tokenizer, objective="f1", batch_size=12)
    (batch,) = data.train_dataloader()
    whole = {int(index): (batch.references[n], batch.prompts) for n, index in enumerate(batch.index)}
    for part in batch.split(5):
        assert part.prompts is not None and len(part.prompts.input_ids) == len(part)
        assert int(part.prompts.attention_mask[:, 0].max()) == 1
        for n, index in enumerate(part.index.tolist()):
            assert part.references[n] == whole[index][0]
            row = part.prompts.input_ids[n][part.prompts.attention_mask[n].bool()].tolist()
            assert tuple(row) == next(e.generated_after for e in data.encoded("train") if e.index == index)


def test_whole_split_metrics_are_logged(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "three.csv"
    path.write_text("text,label\n" + "".join(f"story {i},{'abc'[i % 3]}\n" for i in range(30)))
    keys = {"prompt": "{text} is", "candidates": {"a": " good", "b": " bad", "c": " nice"}}
    data = PromptDataModule(
        {**keys, "metric": ["f1_macro", "matthews"]}, train_file=str(path), dev_file=str(path), eval_batch_size=4
    )
    module = SparseMeZOModule(str(tiny_folder))
    (values,) = Trainer(**QUIET).validate(module, data, verbose=False)
    assert set(values) == {"val/loss", "val/accuracy", "val/f1_macro", "val/matthews"}
    (whole,) = Trainer(**QUIET).validate(
        SparseMeZOModule(str(tiny_folder)),
        PromptDataModule(
            {**keys, "metric": ["f1_macro", "matthews"]}, train_file=str(path), dev_file=str(path), eval_batch_size=90
        ),
        verbose=False,
    )
    assert values == pytest.approx(whole)
