import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl.data import PromptDataModule
from smezo_pl.data.splits import permutation, sample, sample_k_per_class, sample_train_dev
from smezo_pl.scoring.evaluation import calibrated, candidate_scores, score_table
from smezo_pl.scoring.logits import model_logits
from smezo_pl.tasks import Task, make_task

KEYS = {"prompt": "{text} It was", "candidates": {0: " bad", 1: " good"}, "calibration": "It was"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", [{"text": f"story {i}", "label": int(i % 3 == 0)} for i in range(30)])


@pytest.fixture
def held(tmp_path: Path) -> str:
    return write(tmp_path / "held.jsonl", [{"text": f"room {i}", "label": i % 2} for i in range(8)])


def test_train_and_dev_of_k_per_class_are_disjoint() -> None:
    labels = [i % 3 for i in range(60)]
    train, dev = sample_k_per_class(labels, 5, ["a", "b", "c"], seed=3, origin="file", dev=True)
    assert Counter(labels[row] for row in train) == Counter(labels[row] for row in dev) == {0: 5, 1: 5, 2: 5}
    assert not set(train) & set(dev)
    assert sample_k_per_class(labels, 5, ["a", "b", "c"], 3, "file", dev=False) == (train, [])
    assert sample_k_per_class(labels, 5, ["a", "b", "c"], 4, "file", dev=True)[0] != train


def test_more_than_a_class_has(train: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=train, k_shot=6)
    message = "k_shot 6 needs 12 rows of each class (train and dev), and {} has 10 of '1'"
    with pytest.raises(ValueError, match=re.escape(message.format(train))):
        data.setup("fit")


def test_k_shot_with_files_of_its_own(train: str, held: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=train, dev_file=held, k_shot=4)
    data.setup("fit")
    for split in ("train", "dev"):
        assert Counter(example.label for example in data.examples(split)) == {0: 4, 1: 4}
    assert {example.index for example in data.examples("dev")} == set(range(8))


def test_bad_rows_are_refused_or_left_out(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"text": "a", "label": 0},
        {"text": " ", "label": 1},
        {"text": "c", "label": 5},
        {"text": "d", "label": None},
    ]
    file = write(tmp_path / "mine.jsonl", [*rows, {"text": "e", "label": 1}])
    arguments: dict[str, Any] = {"tokenizer": tiny_tokenizer, "train_file": file, "dev_file": file}
    with pytest.raises(ValueError, match=r"mine.jsonl, line \d"):
        PromptDataModule(KEYS, **arguments).setup("fit")
    with caplog.at_level(logging.INFO):
        data = PromptDataModule(KEYS, **arguments, bad_rows="skip")
        data.setup("fit")
    assert sorted(example.line for example in data.examples("train")) == ["line 1", "line 5"]
    assert f"3 of 5 rows are left out; the first: {file}, line 2: empty example, column 'text' holds no text" in [
        *caplog.messages
    ]
    nothing = write(tmp_path / "none.jsonl", rows[1:])
    with pytest.raises(
        ValueError, match=re.escape(f"{nothing}: none of the 3 rows is usable; the first: {nothing}, l")
    ):
        PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=nothing, bad_rows="skip").setup("fit")


def test_a_null_label_names_its_line(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    file = write(tmp_path / "mine.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": None}])
    data = PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=file, dev_file=file)
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 2: column 'label' holds no label (1 such")):
        data.setup("fit")


def test_a_test_file_is_asked_for_when_it_is_needed(train: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=train)
    data.setup("fit")
    assert [data.task.name, len(data.examples("train")), len(data.examples("dev"))] == ["train", 20, 10]
    with pytest.raises(ValueError, match=re.escape("need test_file: give one (train_file is given)")):
        data.setup("test")
    with pytest.raises(ValueError, match="train examples of task 'own' need train_file: give one"):
        PromptDataModule(KEYS, tokenizer=tiny_tokenizer).setup("fit")


def icl(train: str, held: str, tokenizer: PreTrainedTokenizerFast, **more: Any) -> PromptDataModule:
    return PromptDataModule(KEYS, tokenizer=tokenizer, train_file=train, test_file=held, num_demonstrations=3, **more)


def solved(train: str) -> list[str]:
    rows = [json.loads(line) for line in Path(train).read_text().splitlines()]
    return [f"{row['text']} It was {'good' if row['label'] else 'bad'}" for row in rows]


def test_demonstrations_are_drawn_as_mezo_draws_them(
    train: str, held: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = icl(train, held, tiny_tokenizer).examples("test")
    seeds = np.random.RandomState(0).randint(0, 10000, 8)
    lines = solved(train)
    for example, seed in zip(examples, seeds, strict=True):
        rows = np.random.RandomState(seed).permutation(30)[:3]
        assert example.prompt == "\n\n".join([*(lines[row] for row in rows), f"room {example.index} It was"])
    assert len({example.prompt.rpartition("\n\n")[0] for example in examples}) > 1


def test_one_set_of_demonstrations(train: str, held: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = icl(train, held, tiny_tokenizer, demonstration_seed=7).examples("test")
    (shown,) = {example.prompt.rpartition("\n\n")[0] for example in examples}
    assert shown == "\n\n".join(solved(train)[row] for row in np.random.RandomState(7).permutation(30)[:3])


def test_no_example_is_its_own_demonstration(train: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=train, num_demonstrations=20)
    lines = solved(train)
    for example in data.examples("dev"):
        *shown, _ = example.prompt.split("\n\n")
        assert len(set(shown)) == 20
        assert lines[example.index] not in shown


def test_demonstrations_are_cut_on_the_left(train: str, held: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = icl(train, held, tiny_tokenizer, max_length=24)
    for encoded in data.encoded("test"):
        assert encoded.cut and len(encoded.prompt) + max(map(len, encoded.candidates)) == 24
        assert encoded.prompt[0] == tiny_tokenizer.bos_token_id
        assert tiny_tokenizer.decode(encoded.prompt).endswith(f"room {encoded.index} It was")


def test_demonstrations_are_for_evaluation_only(train: str, held: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="num_demonstrations is for validate and test"):
        icl(train, held, tiny_tokenizer).train_dataloader()
    with pytest.raises(ValueError, match=re.escape("num_demonstrations 30 needs more than 30 rows, and ")):
        PromptDataModule(
            KEYS, tokenizer=tiny_tokenizer, train_file=train, test_file=held, num_demonstrations=30
        ).examples("test")


@torch.no_grad()
def log_probability(model: PreTrainedModel, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    ids = torch.tensor([[*prompt, *tokens]])
    log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[len(prompt) + n - 1, token]) for n, token in enumerate(tokens))


@pytest.mark.parametrize("calibration", ["sfc", "icl_sfc"])
def test_calibrated_scores_are_what_the_prompt_adds(
    calibration: Any, train: str, held: str, tiny_tokenizer: PreTrainedTokenizerFast, make_tiny_model: Any
) -> None:
    data = icl(train, held, tiny_tokenizer, calibration=calibration)
    model = make_tiny_model()
    (batch,) = data.test_dataloader()
    with torch.no_grad():
        scores = candidate_scores(model_logits(model, batch), batch)
        table = score_table(calibrated(model, scores, batch), batch)
    assert batch.calibration is not None
    assert len(batch.calibration.batch) == (1 if calibration == "sfc" else len(batch))
    encoded = {example.index: example for example in data.encoded("test")}
    for index, row in zip(batch.index.tolist(), table.tolist(), strict=True):
        example = encoded[index]
        before = example.example.prompt.rpartition("\n\n")[0] + "\n\n" if calibration == "icl_sfc" else ""
        content_free = (0, *tiny_tokenizer(before + "It was", add_special_tokens=False)["input_ids"])
        for tokens, score in zip(example.candidates, row, strict=True):
            expected = log_probability(model, example.prompt, tokens) - log_probability(model, content_free, tokens)
            assert score == pytest.approx(expected, abs=2e-4)


def test_impossible_calibration(train: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="calibration 'icl_sfc' is for demonstrations"):
        PromptDataModule(KEYS, train_file=train, calibration="icl_sfc")
    with pytest.raises(ValueError, match="task 'squad' has no content-free prompt, so it cannot be calibrated"):
        PromptDataModule("squad", calibration="sfc")


def own() -> Task:
    return make_task(KEYS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "copa", "k_shot": 3, "num_train": 4}, "k_shot takes the place of num_train and num_dev"),
        ({"task": "squad", "k_shot": 3}, "k_shot 3 needs classes, and task 'squad' has none"),
        ({"task": "sst2", "k_shot": 0}, "k_shot must be at least 1, got 0"),
        ({"task": "sst2", "num_demonstrations": -1}, "num_demonstrations must be at least 0, got -1"),
        ({"task": "sst2", "max_new_tokens": 5}, "max_new_tokens is for generation tasks, and task 'sst2'"),
        ({"task": "sst2", "objective": "f1", "reward": "math.sqrt"}, "give one of them"),
        ({"task": "sst2", "reward": "score"}, "reward must be the import path of a function, module.function"),
        ({"task": "sst2", "objective": "rouge1"}, "objective 'rouge1' does not fit"),
        ({"task": "sst2", "bad_rows": "drop"}, "bad_rows must be 'refuse' or 'skip', got 'drop'"),
        ({"task": {**KEYS, "metric": "acc"}}, "unknown metric 'acc'"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PromptDataModule(**arguments)


def test_the_draw_is_that_of_numpys_seeded_permutation() -> None:
    """MeZO draws with numpy.random.seed and numpy.random.permutation: the same seed gives the same examples."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(3)  # noqa: NPY002
        expected = np.random.permutation(1000).tolist()  # noqa: NPY002
    finally:
        np.random.set_state(state)  # noqa: NPY002
    assert permutation(1000, 3) == expected


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    permutation(100, 1, 2)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]  # noqa: NPY002


def test_the_draw_never_changes() -> None:
    assert permutation(10, 0) == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    assert permutation(10, 0, 0) != permutation(10, 0, 1) != permutation(10, 1, 0)


def test_the_last_drawn_are_dev() -> None:
    train, dev = sample_train_dev(100, 20, 10, 5, "x")
    assert train + dev == permutation(100, 5)[:30]
    assert (len(train), len(dev)) == (20, 10)


def test_more_training_examples_leave_the_dev_set_disjoint() -> None:
    for num_train in (10, 60, 90):
        train, dev = sample_train_dev(100, num_train, 10, 0, "x")
        assert not set(train) & set(dev)


@pytest.mark.parametrize(
    ("count", "asked", "given"),
    [
        (64, (1000, 500), (43, 21)),
        (250, (150, 100), (150, 100)),
        (2, (1000, 1), (1, 1)),
        (2, (1, 1000), (1, 1)),
        (3, (10, 0), (3, 0)),
    ],
)
def test_a_small_split_is_shared_out(
    count: int, asked: tuple[int, int], given: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    train, dev = sample_train_dev(count, *asked, 0, "boolq.parquet")
    assert (len(train), len(dev)) == given
    assert len(set(train + dev)) == sum(given)
    expected = (
        f"boolq.parquet holds {count} rows, fewer than the {asked[0]} for training and {asked[1]} for dev that were"
        f" asked for: {given[0]} and {given[1]} are used"
    )
    assert ([record.getMessage() for record in caplog.records] == [expected]) == (sum(asked) > count)


def test_too_small_a_split() -> None:
    with pytest.raises(ValueError, match=r"x holds 1 rows, too few for a train and a dev set"):
        sample_train_dev(1, 10, 5, 0, "x")


def test_sample(caplog: pytest.LogCaptureFixture) -> None:
    assert sample(100, 10, 7, "test examples", "x") == permutation(100, 7)[:10]
    with caplog.at_level(logging.INFO):
        assert sample(5, 10, 7, "test examples", "x") == permutation(5, 7)
    assert "x holds 5 rows, fewer than the 10 asked for as test examples: all are used" in caplog.text


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.funcName == "log_leaked_examples"]


def test_rows_that_repeat_an_id_are_examples_of_their_own(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = ["a", "b", "a", None, None, "", "", "c", "b", "a"]
    rows = [{"id": name, "text": f"story {i}", "label": i % 2} for i, name in enumerate(ids)]
    data = PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=write(tmp_path / "mine.jsonl", rows))
    rows_drawn = [example.index for split in ("train", "dev") for example in data.examples(split)]  # type: ignore[arg-type]
    assert sorted(rows_drawn) == list(range(10))


def test_dev_examples_that_are_trained_on(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": f"story {i}", "label": i % 2} for i in range(6)])
    dev = write(tmp_path / "dev.jsonl", [{"text": f"story {i}", "label": 0} for i in (9, 3, 8)])
    arguments: dict[str, Any] = {"tokenizer": tiny_tokenizer, "train_file": train, "dev_file": dev}
    PromptDataModule(KEYS, **arguments).setup("fit")
    assert logged(caplog) == [
        "1 of 3 dev examples have the text of a training example (train/dev leakage); the first:"
        f" {dev}, line 2, trained on as {train}, line 4"
    ]
    caplog.clear()
    PromptDataModule(KEYS, tokenizer=tiny_tokenizer, train_file=train).setup("fit")
    assert logged(caplog) == []
