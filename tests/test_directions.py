"""A direction per row through whole runs: every row's loss is that of a model whose weights were really changed."""

import copy
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.callbacks import SeedCheckpoint, WeightCheckpoint
from smezo_pl.data import PromptBatch
from smezo_pl.optim.directions import Factors
from smezo_pl.optim.kernels import get_kernel
from smezo_pl.optim.noise import Stream, normals
from smezo_pl.scoring.evaluation import answers_of
from smezo_pl.scoring.row_losses import row_rewards
from smezo_pl.tasks import Task

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "max_epochs": -1,
}
LABELS = {"0": " terrible", "1": " great"}
per_row = partial(SparseMeZO, directions="per_row", rank=1, lr=1e-3, eps=1e-2, seed=3)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Eight sentences of different lengths; of two passages of more than 32 tokens one begins three, one two."""
    one, two = "the movie was nice and good because it was lovely " * 4, "the food is poor and the hotel was awful " * 4
    sentences = [f"{one}food", "good", f"{one}a room", "it was nice and lovely", two, "poor", f"{two}so", f"{one}but"]
    path = tmp_path / "texts.jsonl"
    rows = [json.dumps({"sentence": text, "label": n % 2}) + "\n" for n, text in enumerate(sentences)]
    path.write_text("".join(rows))
    return str(path)


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Five questions of different lengths, and in the current folder a reward that varies with every answer."""
    path = tmp_path / "questions.jsonl"
    rows = [{"q": "the " * (5 * i % 7) + f"{i}", "answers": [f"{i} great", "good", "e"]} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "def characters(texts, references):\n    return [sum(map(ord, text)) / 1000 for text in texts]\n"
    (tmp_path / "rewards_of_rows.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    return str(path)


def texts_data(texts: str, prompt: str = "{sentence} It was", **changes: Any) -> PromptDataModule:
    task = Task("toy", prompt, LABELS)
    return PromptDataModule(task, **{"train_file": texts, "dev_file": texts, "batch_size": 8, **changes})


def questions_data(questions: str, **changes: Any) -> PromptDataModule:
    task = {"prompt": "question {q}?\nanswer:", "target": "answers", "max_new_tokens": 4, "metric": ["f1", "em"]}
    return PromptDataModule(task, train_file=questions, dev_file=questions, batch_size=5, **changes)


class Look(Callback):
    """Keeps what a step began with, the batch and its record, from the second step on."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], Any, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        optimizer: Any = trainer.optimizers[0]
        start = {name: p.detach().clone() for name, p in pl_module.model.named_parameters()}
        self._before = start, optimizer.packed_masks(), batch

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        optimizer: Any = trainer.optimizers[0]
        if optimizer.steps_done > 1:
            self.steps.append((*self._before, optimizer.last_step))


def direction(optimizer: SparseMeZO, name: str, like: Tensor, bits: Tensor, step: int, sample: int, row: int) -> Tensor:
    """``Z_r`` of a tensor by its definition."""
    (group,) = optimizer.param_groups
    number = group["numbers"][group["names"].index(name)]
    stream, flips = Stream(optimizer.seed, step, sample, number), optimizer.rank is None
    distribution: Any = "rademacher" if flips else optimizer.noise
    factors = Factors(get_kernel(), stream, like.shape, optimizer.rank or 1, distribution)
    left, right = factors.left([row]), factors.right([row])[0].to(like.dtype)
    z = right[0] if left is None else left[0].to(like.dtype).T @ right / len(right) ** 0.5
    if flips:
        mask = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: like.numel()]
        noise = normals(Stream(optimizer.seed, step, 0, number), like.numel())
        z = z.reshape(like.shape) * (mask * noise).view(like.shape)
    return z.reshape(like.shape)


@torch.no_grad()
def check(module: Any, look: Look, rows: int, distinct: int = 4) -> None:
    """Every loss of a step is the row's own in a model that has its weights; the update is the mean over rows."""
    optimizer: Any = module.trainer.optimizers[0]
    changed = SparseMeZOModule(copy.deepcopy(module.model))
    (start, masks, batch, record), (after, *_) = look.steps
    assert record.rows == rows and len(record.losses) == rows * optimizer.num_samples and not record.skipped
    z = {
        (name, index): direction(optimizer, name, start[name], masks[name], record.step, *divmod(index, rows))
        for name in masks
        for index in range(len(record.losses))
    }
    for index, pair in enumerate(record.losses):
        for sign, loss in zip((1, -1), pair, strict=True):
            for name in masks:
                moved = start[name] + sign * record.eps[0] * z[name, index]
                changed.model.get_parameter(name).copy_(moved)
            if isinstance(batch, PromptBatch) and batch.reward is not None:
                (losses,) = row_rewards([batch], [answers_of(changed.model, batch, module.text_tokenizer)])
            else:
                losses = type(module).losses(changed, batch)
            assert float(losses[index % rows]) == pytest.approx(loss, rel=1e-5, abs=1e-6), index
    assert len({loss for pair in record.losses for loss in pair}) > min(rows, distinct)
    for name in masks:
        terms = [c * z[name, index] for index, c in enumerate(record.projected_gradients)]
        wanted = start[name] - record.lr[0] * torch.stack(terms).mean(0)
        torch.testing.assert_close(after[name], wanted, rtol=0, atol=1e-9)
    assert not torch.equal(start[name], after[name])


def trained(module: SparseMeZOModule, data: Any, **changes: Any) -> Look:
    look = Look()
    settings: dict[str, Any] = {**QUIET, "max_steps": 3, "precision": "64-true", **changes}
    Trainer(**settings, callbacks=[look, *changes.get("callbacks", [])]).fit(module, data)
    return look


@pytest.mark.parametrize(
    ("optimizer", "objective", "micro"),
    [
        (per_row, None, 3),
        pytest.param(per_row, "lm", 1, marks=pytest.mark.slow),
        pytest.param(
            partial(per_row, rank=2, num_samples=2, coefficients="normalized"), None, None, marks=pytest.mark.slow
        ),
        (partial(per_row, rank=None, sparsity=0.5), None, 5),
        pytest.param(partial(per_row, eps=0.1, coefficients="ranks"), "accuracy", 3, marks=pytest.mark.slow),
    ],
    ids=["classification", "lm", "rank 2, two samples", "flips", "accuracy"],
)
def test_rows_of_packed_texts(
    optimizer: Any, objective: str | None, micro: int | None, tiny_folder: Path, texts: str
) -> None:
    module = SparseMeZOModule(str(tiny_folder), optimizer, micro_batch_size=micro)
    look = trained(module, texts_data(texts, objective=objective))
    assert look.steps[0][2].row_number.tolist() == [0, 1, 2, 3, 4]
    check(module, look, rows=5, distinct=2 if objective == "accuracy" else 4)


def test_rows_of_rewarded_answers(tiny_folder: Path, questions: str) -> None:
    optimizer = partial(per_row, eps=0.1, coefficients="ranks")
    module = SparseMeZOModule(str(tiny_folder), optimizer, micro_batch_size=3)
    check(module, trained(module, questions_data(questions, reward="rewards_of_rows.characters")), rows=5)


def test_rows_of_answers_that_a_metric_judges(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, questions: str
) -> None:
    """A model that answers in words, every question as its reference does, and along some directions otherwise."""
    words = tiny_tokenizer(" good great movie food room nice", add_special_tokens=False)["input_ids"]

    def module() -> SparseMeZOModule:
        network = make_tiny_model("llama").double()
        head = torch.zeros_like(network.lm_head.weight)
        head[words] = 3.0 * torch.randn(len(words), head.shape[1], generator=torch.Generator().manual_seed(2)).double()
        network.lm_head.weight = nn.Parameter(head)
        optimizer = partial(per_row, eps=0.05, coefficients="ranks")
        made = SparseMeZOModule(network, optimizer, micro_batch_size=3)
        made.tokenizer = tiny_tokenizer
        return made

    settings: dict[str, Any] = {**QUIET, "precision": "64-true"}
    batches: Any = Trainer(**settings).predict(module(), questions_data(questions, test_file=questions))
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()]
    for answer in (answer for batch in batches for answer in batch):
        rows[answer["index"]]["answers"] = [answer["prediction"]]
    Path(questions).write_text("".join(json.dumps(row) + "\n" for row in rows))
    trains = module()
    look = trained(trains, questions_data(questions, objective="f1"))
    check(trains, look, rows=5, distinct=2)
    losses = {loss for pair in look.steps[0][3].losses for loss in pair}
    assert min(losses) == 0.0 and any(0.0 < loss < 1.0 for loss in losses)


@pytest.mark.slow
def test_rows_of_texts_that_are_no_packed_ones(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, texts: str
) -> None:
    """Bloom's are read one by one."""
    module = SparseMeZOModule(make_tiny_model("bloom").double(), per_row, micro_batch_size=3)
    module.tokenizer = tiny_tokenizer
    check(module, trained(module, texts_data(texts)), rows=5)


def test_rows_of_a_masked_model(tiny_roberta_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"sentence": "the movie " * (1 + n % 4), "label": n % 2}) + "\n" for n in range(6))
    )
    module = SparseMeZOModule(str(tiny_roberta_folder), partial(per_row, eps=0.1), micro_batch_size=4)
    check(module, trained(module, texts_data(str(file), "{sentence} It was<mask>.")), rows=6)


def test_rows_of_an_adapter(tiny_folder: Path, texts: str) -> None:
    pytest.importorskip("peft")
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    module = SparseMeZOModule(str(tiny_folder), per_row, adapter=adapter, micro_batch_size=3)
    look = trained(module, texts_data(texts))
    assert all("lora" in name for name in look.steps[0][1])
    check(module, look, rows=5)


class Regression(SparseMeZOModule):
    """Another kind of model: one method."""

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.model(x) - y).square().squeeze(1)


def regression_data(batch_size: int = 8) -> DataLoader[Any]:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size)


@pytest.mark.parametrize("micro", [None, 3])
def test_rows_of_another_kind_of_model(perceptron: nn.Module, micro: int | None) -> None:
    module = Regression(perceptron.double(), per_row, micro_batch_size=micro)
    check(module, trained(module, regression_data()), rows=8)
    loss = module.loss(next(iter(regression_data())))
    assert loss.shape == () and loss == module.losses(next(iter(regression_data()))).mean()


def test_the_kind_of_directions_is_logged(perceptron: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "smezo_pl")
    for settings, line in (
        (
            {"coefficients": "moving"},
            "directions per_row (one for each of the 8 rows of the first batch), rank 1, coefficients moving",
        ),
        (
            {"rank": None},
            "directions per_row (one for each of the 8 rows of the first batch), sign flips, coefficients raw",
        ),
        ({"directions": "shared", "rank": 4}, "directions shared (one for the batch), rank 4, coefficients raw"),
        ({"directions": "shared", "rank": None}, None),
    ):
        caplog.clear()
        trained(Regression(perceptron.double(), partial(per_row, **settings)), regression_data())
        assert [m for m in caplog.messages if m.startswith("directions")] == ([line] if line else [])


def test_a_batch_of_one_row(perceptron: nn.Module) -> None:
    module = Regression(perceptron.double(), per_row)
    check(module, trained(module, regression_data(1)), rows=1)


class OneNumber(SparseMeZOModule):
    def loss(self, batch: Any) -> Tensor:
        return self.model(batch[0]).mean()


class TooFew(SparseMeZOModule):
    def losses(self, batch: Any) -> Tensor:
        return self.model(batch[0]).mean()


def test_what_cannot_be_told_row_by_row_is_refused(perceptron: nn.Module, tiny_folder: Path) -> None:
    network = perceptron.double()
    with pytest.raises(ValueError, match="OneNumber overrides loss, one number for a batch.* override losses too"):
        trained(OneNumber(network, per_row), regression_data())
    with pytest.raises(ValueError, match="losses must return one number for each of the 8 rows"):
        trained(TooFew(network, per_row), regression_data())
    with pytest.raises(ValueError, match="perturbation='in_place' perturbs the weights themselves"):
        trained(Regression(network, per_row, perturbation="in_place"), regression_data())
    data = PromptDataModule("demo", num_train=8, batch_size=8, objective="f1_macro")
    with pytest.raises(ValueError, match="objective 'f1_macro' is no mean over the answers.* choose accuracy"):
        trained(SparseMeZOModule(str(tiny_folder), per_row), data)


@pytest.mark.parametrize("kind", [SeedCheckpoint, WeightCheckpoint])
def test_a_run_that_is_resumed_is_the_uninterrupted_one(
    kind: Any, tiny_folder: Path, texts: str, tmp_path: Path
) -> None:
    def fit(folder: Path, steps: int, checkpoint: Path | None = None) -> tuple[SparseMeZOModule, Any]:
        module = SparseMeZOModule(str(tiny_folder), partial(per_row, coefficients="moving"), micro_batch_size=3)
        settings: dict[str, Any] = {**QUIET, "enable_checkpointing": True, "max_steps": steps}
        trainer = Trainer(**settings, callbacks=[kind(str(folder), every_n_steps=2)])
        trainer.fit(module, texts_data(texts, batch_size=6), ckpt_path=checkpoint)
        return module, trainer.optimizers[0]

    whole, optimizer = fit(tmp_path / "whole", 5)
    fit(tmp_path / "parts", 3)
    resumed, again = fit(tmp_path / "parts", 5, tmp_path / "parts" / "checkpoints" / "last.ckpt")
    assert again.last_step == optimizer.last_step and optimizer.last_step.rows > 1
    for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two), name
