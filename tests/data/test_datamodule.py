import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl.data import PromptBatch, PromptDataModule
from smezo_pl.data.splits import permutation, sample_train_dev
from smezo_pl.scoring.evaluation import candidate_scores, predictions
from smezo_pl.scoring.logits import model_logits
from smezo_pl.tasks import Source, Task
from tests.data.synthetic_tokenizers import word_tokenizer

pytestmark = pytest.mark.filterwarnings(
    # Lightning: on machines with more cores. Making a batch of text needs no worker.
    "ignore:The '.*_dataloader' does not have many workers",
    # ModelCheckpoint: any manual optimisation.
    "ignore:Using ModelCheckpoint with manual optimization",
    # ModelCheckpoint: the folder of the run that is resumed.
    "ignore:Checkpoint directory .* exists and is not empty",
    # Lightning: the resumed run here saves nothing.
    "ignore:Be aware that when using `ckpt_path`, callbacks",
)


class Reader(pl.LightningModule):
    """Records which rows it is given."""

    def __init__(self, tokenizer: object = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": [], "predict": []}
        self.automatic_optimization = False
        self._later = tokenizer

    def configure_model(self) -> None:
        self.tokenizer = self._later

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def _take(self, stage: str, batch: PromptBatch) -> None:
        assert isinstance(batch, PromptBatch)
        self.seen[stage].append(batch.index.tolist())

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._take("train", batch)
        self.optimizers().step(closure=lambda: (self.weight * 0).sum())  # type: ignore[union-attr]

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._take("val", batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._take("test", batch)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[int]:
        self._take("predict", batch)
        return batch.index.tolist()


def trainer(tmp_path: Path, **changes: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": "callbacks" in changes,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**{**quiet, **changes})


@pytest.fixture
def small(task_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PromptDataModule]:
    def make(**changes: Any) -> PromptDataModule:
        arguments = {
            "task": "sst2",
            "data_dir": task_folder,
            "tokenizer": tiny_tokenizer,
            "batch_size": 8,
            "num_train": 30,
            "num_dev": 12,
            "num_test": 10,
        }
        return PromptDataModule(**{**arguments, **changes})

    return make


def saving(folder: Path, steps: int) -> pl.Callback:
    """Lightning's own checkpoint after so many steps, ``last.ckpt``."""
    return ModelCheckpoint(folder, every_n_train_steps=steps, save_last=True, save_top_k=0)


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("task", "sst3", "unknown task 'sst3'; did you mean sst2"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("eval_batch_size", 0, "eval_batch_size must be at least 1, got 0"),
        ("num_train", 0, "num_train must be at least 1, got 0"),
        ("num_dev", -1, "num_dev must be at least 0, got -1"),
        ("num_test", -1, "num_test must be at least 0, got -1"),
        ("data_seed", -1, r"data_seed must be in \[0, 2\^32\), got -1"),
        ("data_seed", 2**32, r"data_seed must be in \[0, 2\^32\), got 4294967296"),
        ("max_length", 1, "max_length must be at least 2, got 1"),
        ("max_length", float("nan"), "max_length must be at least 2, got nan"),
        ("num_workers", -1, "num_workers must be at least 0, got -1"),
    ],
)
def test_arguments_out_of_range(argument: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**{argument: value})  # type: ignore[arg-type]


def test_the_tasks_own_sizes() -> None:
    data = PromptDataModule("cb")
    assert (data.num_train, data.num_dev, data.num_test) == (150, 100, 1000)
    data = PromptDataModule("cb", num_train=7, num_dev=0, num_test=3)
    assert (data.num_train, data.num_dev, data.num_test) == (7, 0, 3)


def test_examples_are_drawn_as_mezo_does(small: Callable[..., PromptDataModule]) -> None:
    data = small(data_seed=5)
    train, dev = sample_train_dev(48, 30, 12, 5, "x")
    assert [example.index for example in data.examples("train")] == train
    assert [example.index for example in data.examples("dev")] == dev
    assert [example.index for example in data.examples("test")] == permutation(16, 5)[:10]
    example = data.examples("train")[0]
    assert example.prompt.startswith(f"the movie number {example.index} is ")
    assert example.prompt.endswith(" It was")
    assert example.candidates == (" terrible", " great")
    with pytest.raises(ValueError, match="split must be one of train, dev, test, got 'val'"):
        data.examples("val")  # type: ignore[arg-type]


def test_demo_needs_no_folder(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = PromptDataModule(tokenizer=tiny_tokenizer)
    assert [len(data.examples(split)) for split in ("train", "dev", "test")] == [1000, 500, 1000]
    train = {example.prompt for example in data.examples("train")}
    assert not train & {example.prompt for example in data.examples("dev")}


def test_fit_scores_dev_and_test_scores_test(small: Callable[..., PromptDataModule], tmp_path: Path) -> None:
    data, module = small(), Reader()
    run = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, data)
    assert sorted(flat(module.seen["train"])) == sorted(example.index for example in data.examples("train"))
    assert sorted(flat(module.seen["val"])) == sorted(example.index for example in data.examples("dev"))
    run.test(module, data, verbose=False)
    assert sorted(flat(module.seen["test"])) == sorted(example.index for example in data.examples("test"))
    predicted = run.predict(module, data)
    assert predicted == module.seen["predict"]
    assert sorted(flat(predicted)) == sorted(flat(module.seen["test"]))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero")
def test_without_dev(small: Callable[..., PromptDataModule], tmp_path: Path) -> None:
    module = Reader()
    trainer(tmp_path, max_epochs=1).fit(module, small(num_dev=0))
    assert len(module.seen["train"]) == 4
    assert module.seen["val"] == []


def test_the_modules_tokenizer_is_taken_when_it_is_there(
    small: Callable[..., PromptDataModule], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data, module = small(tokenizer=None), Reader(tiny_tokenizer)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    assert data.tokenizer is tiny_tokenizer
    assert module.seen["train"]


def test_no_tokenizer(small: Callable[..., PromptDataModule], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the data module has no tokenizer"):
        small(tokenizer=None).train_dataloader()
    with pytest.raises(RuntimeError, match="the data module has no tokenizer"):
        trainer(tmp_path, max_steps=1).fit(Reader(), small(tokenizer=None))


def test_texts_that_were_cut_inside_a_character(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cut.jsonl"
    ends = ["", "", "\\ud83d", "\\ud83d\\ude00", ""]  # as JavaScript's slice leaves them; the fourth is whole
    file.write_text("".join(f'{{"text": "movie{end}", "label": {i % 2}}}\n' for i, end in enumerate(ends)))
    task = {"prompt": "{text}\n", "candidates": [" bad", " good"]}
    settings: dict[str, Any] = {"train_file": str(file), "tokenizer": tiny_tokenizer, "num_train": 3, "num_dev": 1}
    with pytest.raises(ValueError, match=r"cut\.jsonl, line 3: column 'text' holds half a character, '\\ud83d' at 5"):
        PromptDataModule(task, **settings | {"num_train": 4}).encoded("train")
    data = PromptDataModule(task, bad_rows="skip", **settings)
    assert len(data.encoded("train")) + len(data.encoded("dev")) == 4
    assert f"1 of 5 rows are left out; the first: {file}, line 3: column 'text' holds half a character" in caplog.text


def test_special_tokens_in_texts(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"text": f"movie {i}</s>", "label": i % 2}) + "\n" for i in range(4)))
    settings: dict[str, Any] = {"train_file": str(file), "tokenizer": tiny_tokenizer, "num_train": 2, "num_dev": 2}
    candidates = [" bad", " good"]
    plain = PromptDataModule({"prompt": "{text}\n", "candidates": candidates}, **settings)
    assert all(tiny_tokenizer.eos_token_id not in example.prompt for example in plain.encoded("train"))
    chat = {"prompt": "{text}</s>\n", "candidates": candidates}
    with pytest.raises(ValueError, match=r"holds the tokenizer's special token '</s>' .*data\.special_tokens: true"):
        PromptDataModule(chat, **settings).encoded("train")
    special = PromptDataModule(chat, special_tokens=True, **settings)
    assert all(example.prompt.count(tiny_tokenizer.eos_token_id) == 2 for example in special.encoded("train"))


def test_a_tokenizer_by_name_and_a_change_of_tokenizer(
    small: Callable[..., PromptDataModule], tiny_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = small(tokenizer=str(tiny_folder))
    before = data.encoded("test")
    assert before == small().encoded("test")
    from tests.data.synthetic_tokenizers import word_tokenizer

    data.set_tokenizer(word_tokenizer([" It", " was", " terrible", " great"]))
    assert data.encoded("test") != before


def test_two_models_read_one_data_module_each_in_its_own_tokens(
    small: Callable[..., PromptDataModule], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["great", "terrible"])
    data = small(tokenizer=None)
    tokens = []
    for tokenizer in (tiny_tokenizer, other, tiny_tokenizer):
        trainer(tmp_path).validate(Reader(tokenizer), data, verbose=False)
        assert data.tokenizer is tokenizer
        tokens.append([(example.prompt, example.candidates) for example in data.encoded("dev")])
    assert tokens[0] == tokens[2] != tokens[1]
    given = small(tokenizer=tiny_tokenizer)
    trainer(tmp_path).validate(Reader(other), given, verbose=False)
    assert given.tokenizer is tiny_tokenizer


def test_a_causal_model_after_a_masked_one(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = PromptDataModule("demo", tokenizer=tiny_tokenizer, num_train=8, num_dev=4)
    prompts = []
    for masked in (False, True, False):
        module = Reader()
        module.is_masked_lm = masked  # type: ignore[assignment]
        data.trainer = trainer(tmp_path)
        data.trainer.strategy.connect(module)
        data.setup("fit")
        assert data.task.is_masked == masked
        prompts.append([example.prompt for example in data.examples("train")])
    assert prompts[0] == prompts[2] != prompts[1]


def test_the_token_budget_is_found_for_each_model(
    small: Callable[..., PromptDataModule],
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def budget(of: pl.Trainer, *_: Any) -> int:
        asked.append(of.lightning_module)
        return 4096

    monkeypatch.setattr("smezo_pl.data.datamodule.find_token_budget", budget)
    data, modules = small(eval_batch_size="auto"), [Reader(tiny_tokenizer) for _ in range(2)]
    for module in (modules[0], modules[0], modules[1]):
        trainer(tmp_path).validate(module, data, verbose=False)
    assert asked == modules


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_resume_continues_with_the_same_batches(
    stop: int, small: Callable[..., PromptDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of the first epoch, at its end, in the middle of the second."""
    settings = {"max_epochs": 3, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    whole = Reader()
    trainer(tmp_path, **settings).fit(whole, small())
    assert len(whole.seen["train"]) == 12
    assert whole.seen["train"][:4] != whole.seen["train"][4:8]

    first = Reader()
    trainer(tmp_path, **settings, max_steps=stop, callbacks=saving(tmp_path, stop)).fit(first, small())
    second = Reader()
    trainer(tmp_path, **settings).fit(second, small(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert first.seen["train"] + second.seen["train"] == whole.seen["train"]
    assert "other training batches" not in caplog.text


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_resume_after_epochs_cut_short(stop: int, small: Callable[..., PromptDataModule], tmp_path: Path) -> None:
    settings = {"max_epochs": 3, "limit_val_batches": 0, "limit_train_batches": 3}
    whole, first, second = Reader(), Reader(), Reader()
    trainer(tmp_path, **settings).fit(whole, small())
    trainer(tmp_path, **settings, max_steps=stop, callbacks=saving(tmp_path, stop)).fit(first, small())
    trainer(tmp_path, **settings).fit(second, small(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert first.seen["train"] + second.seen["train"] == whole.seen["train"]


@pytest.mark.parametrize("where", ["validation", "epoch"])
def test_a_resume_from_a_checkpoint_of_the_epochs_end(
    where: str, small: Callable[..., PromptDataModule], tmp_path: Path
) -> None:
    whole, first, second = Reader(), Reader(), Reader()
    trainer(tmp_path, max_epochs=3).fit(whole, small())
    callback = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=where == "epoch")
    trainer(tmp_path, max_epochs=1, callbacks=callback).fit(first, small())
    trainer(tmp_path, max_epochs=3).fit(second, small(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert first.seen["train"] + second.seen["train"] == whole.seen["train"]


def test_a_resume_with_other_batches_is_logged(
    small: Callable[..., PromptDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=saving(tmp_path, 2)).fit(Reader(), small())
    other = small(batch_size=4, num_train=20)
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(Reader(), other, ckpt_path=str(tmp_path / "last.ckpt"))
    assert "other training batches (num_train 30 -> 20, batch_size 8 -> 4)" in caplog.text


OWN = {"prompt": "{text} It was", "candidates": {0: " terrible", 1: " great"}}
OTHER_BATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "prompt": ({**OWN, "prompt": "{text} So it was"}, {}, "(prompt '{text} It was' -> '{text} So it was')"),
    "candidates": ({**OWN, "candidates": {0: " bad", 1: " great"}}, {}, "(candidates \"{'0': ' terrible', '1':"),
    "a text of the file": (OWN, {"rows": lambda i: (i + 60 * (i % 7 == 5), i % 2)}, "(column 'text' of the training"),
    "a label of the file": (OWN, {"rows": lambda i: (i, i % 3 % 2)}, "(column 'label' of the training examples)"),
    "label mapping": ({**OWN, "candidates": {1: " great", 0: " terrible"}}, {}, "labels of the training examples)"),
    "words": ({**OWN, "words": {"text": {f"number {i}": f"{i}" for i in range(60)}}}, {}, "(texts of the training"),
    "tokenizer": (OWN, {"words": [" It", " was", " terrible", " great"]}, "(tokenizer)"),
    "max_length": (OWN, {"max_length": 9}, "(max_length 2048 -> 9)"),
    "another column": ({**OWN, "prompt": "{more} It was"}, {}, "(prompt '{text} It was' -> '{more} It was')"),
    "nothing": (OWN, {}, ""),
}


@pytest.mark.parametrize("name", OTHER_BATCHES)
def test_a_resume_names_what_differs(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def data(task: dict[str, Any], rows: Any = None, words: Any = None, **settings: Any) -> PromptDataModule:
        made = map(rows or (lambda i: (i, i % 2)), range(60))
        lines = [json.dumps({"text": f"number {n}", "label": label, "more": f"more {n}"}) + "\n" for n, label in made]
        (tmp_path / "train.jsonl").write_text("".join(lines))
        tokenizer = tiny_tokenizer if words is None else word_tokenizer(words)
        settings = {"num_train": 30, "num_dev": 10, "batch_size": 8, "tokenizer": tokenizer, **settings}
        return PromptDataModule(task, train_file=str(tmp_path / "train.jsonl"), **settings)

    settings = {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer(tmp_path, max_steps=2, **settings, callbacks=saving(tmp_path, 2)).fit(Reader(), data(OWN))
    task, other, message = OTHER_BATCHES[name]
    trainer(tmp_path, max_steps=3, **settings).fit(Reader(), data(task, **other), ckpt_path=str(tmp_path / "last.ckpt"))
    assert ("the resumed run had other training batches (" in caplog.text) is bool(message)
    assert message in caplog.text


def test_a_resume_from_a_checkpoint_without_digests_names_none(
    small: Callable[..., PromptDataModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer(tmp_path, max_steps=2, **settings, callbacks=saving(tmp_path, 2)).fit(Reader(), small())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = checkpoint["PromptDataModule"]
    kept = ("task", "data_seed", "num_train", "batch_size", "max_length", "objective")  # of version 0.1.0
    checkpoint["PromptDataModule"] = {name: state[name] for name in kept}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    trainer(tmp_path, max_steps=3, **settings).fit(Reader(), small(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert "other training batches" not in caplog.text


@pytest.mark.filterwarnings(
    "ignore:You requested to overfit but enabled", "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)
def test_overfit_batches(small: Callable[..., PromptDataModule], tmp_path: Path) -> None:
    module = Reader()
    trainer(tmp_path, overfit_batches=2, max_epochs=2).fit(module, small())
    assert module.seen["train"][:2] == module.seen["train"][2:]
    assert [len(batch) for batch in module.seen["train"]] == [8] * 4


def test_scores_come_back_in_the_order_of_the_data(
    small: Callable[..., PromptDataModule], make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    data, model = small(eval_batch_size=3), make_tiny_model("llama")
    found: dict[int, int] = {}
    with torch.no_grad():
        for batch in data.test_dataloader():
            predicted = predictions(candidate_scores(model_logits(model, batch), batch), batch)
            found |= dict(zip(batch.index.tolist(), predicted.tolist(), strict=True))
    assert set(found) == {example.index for example in data.examples("test")}


def test_lm_training_batches_hold_the_gold_candidate_alone(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "copa").mkdir()
    row = {"premise": "It was poor.", "choice1": "A.", "choice2": "The food.", "question": "cause", "label": 1}
    for split in ("train", "validation"):
        pq.write_table(pa.Table.from_pylist([row] * 4), tmp_path / "copa" / f"{split}.parquet")
    data = PromptDataModule("copa", tmp_path, tiny_tokenizer, batch_size=2, num_train=3, num_dev=1)
    (train, _), (dev,) = data.train_dataloader(), data.val_dataloader()
    assert train.candidate_index.tolist() == [1, 1]
    assert dev.candidate_index.tolist() == [0, 1]
    assert train.objective == dev.objective == "lm"


def test_unknown_labels_only_where_nothing_is_measured(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "sst2").mkdir()
    rows = [{"sentence": "nice", "label": label} for label in (0, 1, -1)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sst2" / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sst2" / "validation.parquet")

    def data() -> PromptDataModule:
        return PromptDataModule("sst2", tmp_path, tiny_tokenizer, num_train=2, num_dev=1)

    with pytest.raises(ValueError, match=r"train.parquet, row 2: column 'label' holds no label \(1 such rows of"):
        data().setup("fit")
    with pytest.raises(ValueError, match=r"validation.parquet, row 2: .* but test examples need one"):
        data().setup("test")
    module = Reader()
    trainer(tmp_path).predict(module, data())
    assert sorted(flat(module.seen["predict"])) == [0, 1, 2]


def test_a_dev_split_of_its_own(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "mine").mkdir()
    for split, count in (("train", 6), ("dev", 3), ("validation", 2)):
        rows = [{"text": f"{split} {i}", "label": i % 2} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine" / f"{split}.parquet")
    task = Task("mine", "{text}\n", {"0": "No", "1": "Yes"}, source=Source(dev="dev"))
    data = PromptDataModule(task, tmp_path, tiny_tokenizer, num_train=6, num_dev=3)
    assert {example.prompt[:3] for example in data.examples("dev")} == {"dev"}
    assert len(data.examples("train")) == 6


def test_the_hub_is_asked_once_for_each_split(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from datasets import Dataset

    asked: list[tuple[str, str]] = []

    def load_dataset(path: str, config: str, *, revision: None, split: str) -> Dataset:
        asked.append((config, split))
        return Dataset.from_list([{"sentence": f"{split} {i}", "label": i % 2} for i in range(8)])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = PromptDataModule("sst2", tokenizer=tiny_tokenizer, num_train=4, num_dev=2, num_test=8)
    data.prepare_data()
    assert sorted(asked) == [("sst2", "train"), ("sst2", "validation")]
    data.setup()
    assert [len(data.examples(split)) for split in ("train", "dev", "test")] == [4, 2, 8]
    assert data.examples("dev")[0].prompt.startswith("train ")
    asked.clear()
    PromptDataModule("demo").prepare_data()
    assert asked == []


def test_the_numbers_of_rows_are_logged(
    small: Callable[..., PromptDataModule], task_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        small().setup("fit")
    file = task_folder / "sst2" / "train.parquet"
    assert caplog.messages == [
        f"sst2: 48 rows of {file}",
        f"sst2: 30 of 48 rows of {file} are train examples (data_seed 0)",
        f"sst2: 12 of 48 rows of {file} are dev examples (data_seed 0)",
    ]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Together they read the batches of one process; every dev and test example is scored once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [*launcher, "--module", "tests.data.two_processes", str(tmp_path)]
    subprocess.run(command, check=True, cwd=root, env=environment, timeout=300, capture_output=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    from tests.data.two_processes import run

    _, alone = run(devices=1, batch_size=8)
    together = [sorted(a + b) for a, b in zip(first["train"], second["train"], strict=True)]
    assert together == [sorted(batch) for batch in alone["train"]]
    for stage in ("val", "test"):
        assert len(first[stage]) == len(second[stage])
        assert sorted(flat(first[stage]) + flat(second[stage])) == sorted(flat(alone[stage]))
