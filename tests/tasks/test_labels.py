import json
import logging
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl.data import PromptDataModule
from smezo_pl.data.collate import Collate
from smezo_pl.data.sources import Rows
from smezo_pl.data.splits import make_examples, read_labels
from smezo_pl.scoring.evaluation import correct_predictions, predictions, scores_of
from smezo_pl.tasks import ExampleError, LabelReading, Task, get_task, make_task
from smezo_pl.tasks.labels import SHORT_FORMS

Rowlike = Sequence[tuple[Any, Sequence[str | None]]]


def own(candidates: Any, **keys: Any) -> Task:
    return make_task({"prompt": "{text}\nAnswer:", "candidates": candidates, **keys})


def answers(task: Task, labels: Sequence[Any], names: Sequence[str] = (), **columns: Sequence[Any]) -> list[str | None]:
    """The text of the gold candidate of each row of a file with these labels."""
    rows = [
        {"text": "x", "sentence": "x", task.label: label, **{name: values[i] for name, values in columns.items()}}
        for i, label in enumerate(labels)
    ]
    data = Rows(rows, "a.jsonl", {task.label: names} if names else {}, lines=range(1, len(rows) + 1))
    examples = make_examples(task, data, range(len(rows)))
    return [example.candidates[example.label].strip() if example.label >= 0 else None for example in examples]


def refused(message: str, task: Task, labels: Sequence[Any], names: Sequence[str] = (), **columns: Any) -> None:
    with pytest.raises(ExampleError, match=re.escape(message)):
        answers(task, labels, names, **columns)


@pytest.mark.parametrize(
    "candidates",
    [
        [" Yes", " No"],
        [" No", " Yes"],
        {"yes": " Yes", "no": " No"},
        {"No": " No", "Yes": " Yes"},
        {True: " Yes", False: " No"},
        {"f": " No", "t": " Yes"},
        {0: " Yes", 1: " No"},
    ],
)
@pytest.mark.parametrize("labels", [[True, False], ["true", "False"]])
def test_a_truth_value_is_what_says_so(candidates: Any, labels: list[Any]) -> None:
    assert answers(own(candidates), labels) == ["Yes", "No"]


@pytest.mark.parametrize(
    "candidates", [[" 0", " 1"], {0: " sports", 1: " politics"}, ["yes", " true"], {"yes": " a", "true": " b"}]
)
def test_a_truth_value_is_neither_a_number_nor_one_of_two_names(candidates: Any) -> None:
    message = (
        "a.jsonl, line 1: label True in column 'label' is a truth value, and task 'own' has no name or candidate, or"
    )
    refused(message, own(candidates), [True])
    refused("write a mapping, candidates: {true: TEXT, false: TEXT}", own(candidates), [True])


def test_a_truth_value_that_two_options_say() -> None:
    assert answers(choice(), [True, "false"], choices=[["no", "t", "other"]] * 2) == ["t", "no"]
    refused("is a truth value, and task 'own' has", choice(), [True], choices=[["yes", "Yes", "no"]])
    refused(
        "'ab' in column 'label' stands for a null option, or for",
        choice(names=["Ab", "AB"]),
        ["ab"],
        choices=[["x", "y"]],
    )


def test_a_number_is_no_truth_value() -> None:
    refused("label 1 in column 'label' is outside", own({False: " No", True: " Yes"}), [1])


SENTIMENT = ("negative", "positive")


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ({"positive": " good", "negative": " bad"}, ["bad", "good"]),
        ({"Positive": " good", "NEGATIVE": " bad"}, ["bad", "good"]),
        ({"pos": " good", "neg": " bad"}, ["bad", "good"]),
        ({"positive": " good", "neutral": " so", "negative": " bad"}, ["bad", "good"]),
        ({1: " good", 0: " bad"}, ["bad", "good"]),
        ([" bad", " good"], ["bad", "good"]),
        ([" neg", " pos"], ["neg", "pos"]),
    ],
)
def test_names_that_the_file_declares(candidates: Any, expected: list[str]) -> None:
    assert answers(own(candidates), [0, 1], SENTIMENT) == expected


def test_the_page_names_every_short_form() -> None:
    page = (Path(__file__).parents[2] / "docs" / "labels.md").read_text(encoding="utf-8")
    for spellings in SHORT_FORMS:
        assert f"| {', '.join(spellings)} |" in page


@pytest.mark.parametrize(
    ("candidates", "names", "message"),
    [
        ([" positive", " negative"], SENTIMENT, "'negative' is 'negative' by its name and 'positive' by its number"),
        ([" Pos", " other"], SENTIMENT, "'positive' is 'Pos' by its name and 'other' by its number"),
        ([" Great", " terrible"], SENTIMENT, "'negative' is 'terrible' by its name and 'Great' by its number"),
        ({0: " positive", 1: " negative"}, SENTIMENT, "'negative' is 'negative' by its name and 'positive' by its num"),
        ([" a", " b", " c"], SENTIMENT, "a list of candidates is for as many labels"),
        ({"pos": " a", "neg": " b"}, ("pos", "positive"), "two of them are 'pos'"),
        ({1: " a", 2: " b", 3: " c"}, ("2", "3"), "a number of the file and its name are different labels"),
        ({1: " a", 2: " b"}, ("1 star", "2 stars"), "the numbers of the file are 0 to 1"),
        ([" Yes", " No"], ("contradiction", "entails"), "'contradiction' is 'No' by its name and 'Yes' by its number"),
        ([" awful", " excellent"], SENTIMENT[::-1], "'positive' is 'excellent' by its name and 'awful' by its number"),
    ],
)
def test_names_that_contradict_the_task(candidates: Any, names: tuple[str, ...], message: str) -> None:
    task = own(candidates)
    lists = f"a.jsonl: column 'label' declares the labels {', '.join(map(repr, names))}, and task 'own' has "
    refused(lists, task, [0], names)
    refused(message, task, [0], names)


def test_an_order_that_reads_wrong_is_taken_where_the_task_says_so() -> None:
    assert answers(own([" good", " bad"], label_is="position"), [0, 1], SENTIMENT) == ["good", "bad"]
    assert answers(own({0: " good", 1: " bad"}, label_is="name"), [0, 1], SENTIMENT) == ["good", "bad"]


def test_names_that_the_task_does_not_know_print_both_lists() -> None:
    message = "label 0 in column 'label' is outside task 'own', allowed are 'good', 'bad'; the file calls its labels "
    refused(message + "'negative', 'positive'", own({"good": " a", "bad": " b"}), [0, 1], SENTIMENT)
    refused("calls its labels 'bad', 'good'", get_task("sst2"), [0], ("bad", "good"))


def test_declared_numbers_name_the_numbers_of_the_task() -> None:
    assert answers(own({1: " a", 2: " b", 3: " c"}), [0, 2], ("1", "2", "3")) == ["a", "c"]
    assert answers(own({1: " a", 2: " b"}), [1, 2], ("0", "1", "2")) == ["a", "b"]


@pytest.mark.parametrize(
    ("candidates", "label"),
    [
        ({0: " Yes", 2: " No"}, 1),
        ({1: " bad", 2: " fine", 3: " good"}, 0),
        ({-1: " bad", 0: " fine", 1: " good"}, 2),
        ({1: " bad", 2: " fine", 3: " good"}, "02"),
        ({10: " sports", 20: " politics"}, 1),
        ({"sports": " a", "politics": " b"}, 0),
        ([" a", " b"], 2),
        ([" a", " b"], -2),
        ([" a", " b"], 0.5),
        ([" a", " b"], "0.5"),
        ([" a", " b"], {"label": 0}),
    ],
)
def test_a_label_that_the_task_does_not_have(candidates: Any, label: Any) -> None:
    refused(f"a.jsonl, line 1: label {label!r} in column 'label' is outside task 'own'", own(candidates), [label])


@pytest.mark.parametrize("label", [1, 1.0, "1", "1.0", " 1 ", b"1", np.int64(1), Decimal("1.0")])
def test_a_whole_number_in_any_writing(label: Any) -> None:
    for candidates in ([" a", " b"], {0: " a", 1: " b"}, {"1.0": " b", "0.0": " a"}):
        assert answers(own(candidates), [label, None]) == ["b", None]


@pytest.mark.parametrize("label", [None, float("nan"), "", "  ", -1, "-1", -1.0, "-1.0"])
def test_an_unknown_label_says_nothing_about_the_file(label: Any) -> None:
    assert answers(own([" a", " b"]), [label, "b"]) == [None, "b"]
    assert answers(own({0: " a", 1: " b"}), [label, 1]) == [None, "b"]


def test_names_come_first() -> None:
    assert answers(own({1: " 0", 0: " 1"}), [0, 1]) == ["1", "0"]
    assert answers(own({"a": " b", "b": " a"}), ["a", "b"]) == ["b", "a"]
    assert answers(own({"E": " x", "e": " y"}), ["E", "e"]) == ["x", "y"]
    refused(
        "label 'Ab' in column 'label' stands for a null option, or for several of 'AB', 'ab'",
        own({"AB": " x", "ab": " y"}),
        ["Ab"],
    )


def test_the_text_of_a_candidate_is_its_label_too() -> None:
    assert answers(own({0: " sports", 1: " politics"}), ["politics", "Sports"]) == ["politics", "sports"]
    refused("as text it is '1', as position it is '0'; write label_is: text or", own({"yes": " 1", "no": " 0"}), [1])
    assert answers(own({"yes": " 1", "no": " 0"}, label_is="text"), [1, 0]) == ["1", "0"]


TWO = "label 1 in column 'label' has two readings, as position it is '2', as text it is '1'; write label_is: position"


def test_a_letter_is_a_short_form_among_two_only() -> None:
    assert answers(own([" Yes", " No"]), ["y", "n"]) == ["Yes", "No"]
    relation = {"entailment": " Yes", "neutral": " Maybe", "contradiction": " No"}
    for candidates in (relation, [*relation.values()]):
        refused("label 'n' in column 'label' is outside task", own(candidates), ["n"])
    refused("label 'no' in column 'label' is outside", own({"E": " x", "N": " y", "C": " z"}), ["no"])


def test_words_may_be_joined() -> None:
    names = ("not_entailment", "Entailment")
    assert answers(own({"not entailment": " a", "entailment": " b"}), [0, 1], names) == ["a", "b"]
    assert answers(own({"1": " a", "x-y": " b"}), ["X Y", "-1"]) == ["b", None]
    refused(
        "'very_bad' is 'very bad' by its name and 'very good'", own([" very good", " very bad"]), [0], ("very_bad", "x")
    )


def test_degrees_of_a_name_are_no_other_order() -> None:
    names = ("very negative", "negative", "neutral", "positive", "very positive")
    assert answers(own([" terrible", " poorly", " okay", " fine", " great"]), [1, 3], names) == ["poorly", "fine"]


def test_numbers_that_are_hardly_positions() -> None:
    with_choices = {"choices": [["a", "b"]] * 2}
    counted = "a.jsonl, line 2: label 2 in column 'label' is outside"
    refused(counted, own([" a", " b"]), [1, 2])
    refused(
        "no label is 0, so these are hardly positions: name them", own({"column": "choices"}), [1, 2], **with_choices
    )
    refused("line 1: label -1 in column 'label' is outside task", own([" a", " b"]), [-1, 1])
    refused("so these are hardly positions", get_task("sst2"), [1, 2])
    assert answers(own([" a", " b"]), [-1, -1]) == [None, None]  # all hidden
    assert answers(own([" a", " b"], label_is="position"), [-1, 1]) == [None, "b"]
    assert answers(own({"column": "choices", "names": ["1", "2"]}), [1, 2], **with_choices) == ["a", "b"]
    refused("allowed are 'a', 'b' or 0 to 1; for letters write candidates: {column: choices, names: [A, B, ...]}",
            own({"column": "choices"}), ["A", "B"], **with_choices)  # fmt: skip


def test_two_readings_are_refused_and_label_is_decides() -> None:
    refused("a.jsonl, line 2: " + TWO, own([" 1", " 2"]), [0, 1])
    assert answers(own([" 1", " 2"], label_is="position"), [0, 1]) == ["1", "2"]
    assert answers(own([" 1", " 2"], label_is="text"), [1, 2]) == ["1", "2"]
    assert answers(own([" 0", " 1"]), [1, 0]) == ["1", "0"]  # the same answers by both
    refused("has two readings, as position unknown, as text it is '-1'", own([" -1", " 0"]), [-1])
    assert answers(own({"a": " x", "b": " y"}, label_is="position"), [1]) == ["y"]
    refused("allowed are 0 to 1", own({"a": " x", "b": " y"}, label_is="position"), ["a"])
    refused("allowed are 'a', 'b'", own({"a": " x", "b": " y"}, label_is="name"), ["x"])
    assert answers(own([" positive", " negative"], label_is="position"), [0], SENTIMENT) == ["positive"]


def test_a_file_is_read_in_one_way() -> None:
    message = "line 3: label 'b' in column 'label' is a text, but 1 in a.jsonl, line 2 is a position; a file's labels"
    refused(message, own([" a", " b"]), [None, 1, "b"])
    refused("line 2: label 'b' in column 'label' is a text, but 0 in a.jsonl", own({0: " a", 1: " b"}), [0, "b"])
    refused("line 2: label 1 in column 'label' is a position, but 'negative'", get_task("sst2"), ["negative", 1])


DIGITS = [["1", "2", "3", "4"], ["9", "8", "7", "6"]]


def choice(**keys: Any) -> Task:
    names = {"names": keys.pop("names")} if "names" in keys else {}
    return own({"column": "choices", **names}, **keys)


@pytest.mark.parametrize("names", [{}, {"names": ["A", "B", "C", "D"]}])
def test_whether_an_option_is_meant_by_position_or_by_text(names: dict[str, Any]) -> None:
    refused("a.jsonl, line 2: " + TWO, choice(**names), [0, 1], choices=DIGITS[::-1])
    assert answers(choice(label_is="position", **names), [1, 0], choices=DIGITS) == ["2", "9"]
    assert answers(choice(label_is="text", **names), [1, "6"], choices=DIGITS) == ["1", "6"]
    assert answers(choice(**names), [0, 3], choices=DIGITS[1:] * 2) == ["9", "6"]
    assert answers(choice(**names), [9, "6"], choices=DIGITS[1:] * 2) == ["9", "6"]
    refused("line 2: label 9 in column 'label' is a text, but 0", choice(**names), [0, 9], choices=DIGITS[1:] * 2)


def test_letters_of_options() -> None:
    options = [["x", "y", "z"], ["B", "C", "A"]]
    assert answers(choice(names=["A", "B", "C"]), ["C", "a"], choices=options[:1] * 2) == ["z", "x"]
    refused("as name it is 'C', as text it is 'B'", choice(names=["A", "B", "C"]), ["C", "B"], choices=options)
    assert answers(choice(names=["A", "B", "C"], label_is="name"), ["C", "B"], choices=options) == ["z", "C"]
    assert answers(choice(names=[1, 2, 3]), [1, 3], choices=options[:1] * 2) == ["x", "z"]
    # A file that declares the letters, as MMLU's does, with its numbers as positions.
    assert answers(choice(), [1, 0], ("A", "B", "C"), choices=[DIGITS[0], DIGITS[1]]) == ["2", "9"]
    assert answers(choice(names=["A", "B", "C"]), [1, 0], ("A", "B", "C"), choices=DIGITS) == ["2", "9"]


def test_positions_count_the_options_as_they_stand_in_the_file() -> None:
    for task in (choice(), choice(names=["A", "B", "C", "D"])):
        assert answers(task, [2], choices=[["a", "a", "b", "c"]]) == ["b"]
        assert answers(task, [2], choices=[["yes ", "yes", "no", "maybe"]]) == ["no"]
        assert answers(task, [2], choices=[["a", None, "b"]]) == ["b"]
        refused("label 1 in column 'label' stands for a null option", task, [1], choices=[["a", None, "b"]])
    assert answers(choice(names=["A", "B", "C"]), ["C"], choices=[["a", None, "b"]]) == ["b"]


def example_of(task: Task, **row: Any) -> Any:
    return make_examples(task, Rows([{"text": "x", **row}], "a.jsonl"), [0])[0]


def test_equal_options_are_one_answer() -> None:
    example = example_of(choice(), choices=["a", "a", "b"], label=1)
    assert (example.candidates, example.label, example.correct) == ((" a", " a", " b"), 1, (0, 1))
    assert example.references == ("a",)
    assert example_of(choice(), choices=["a", "a", "b"], label=2).correct == (2,)
    by_text = example_of(choice(), choices=["a", "a", "b"], label="b")
    assert (by_text.candidates, by_text.label, by_text.correct) == ((" a", " b"), 1, (1,))


def test_equal_options_share_their_score(
    tiny_tokenizer: PreTrainedTokenizerFast, make_tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    rows = [{"text": "it was", "choices": ["good", "good", "not bad", "not bad"], "label": i} for i in range(4)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"prompt": "{text}\nAnswer:", "candidates": {"column": "choices"}}
    data = PromptDataModule(keys, tokenizer=tiny_tokenizer, train_file=str(file), test_file=str(file))
    batch = Collate(0)(data.encoded("test"))
    with torch.no_grad():
        scores = scores_of(make_tiny_model(), batch)
    table = scores.reshape(4, 4)
    assert (table[:, 0] == table[:, 1]).all() and (table[:, 2] == table[:, 3]).all()
    predicted = predictions(scores, batch)
    chosen = {example.index: example.example.candidates[best] for example, best in zip(data.encoded("test"), predicted)}  # type: ignore[union-attr]  # noqa: B905
    (text,) = set(chosen.values())
    right = dict(zip(batch.index.tolist(), correct_predictions(predicted, batch).tolist(), strict=True))
    assert right == {i: rows[i]["choices"][i] == text.strip() for i in range(4)}  # type: ignore[index]
    with pytest.raises(ValueError, match=r"a\.jsonl, line \d: two options have the same text, and objective 'classifi"):
        PromptDataModule(
            keys, tokenizer=tiny_tokenizer, train_file=str(file), dev_file=str(file), objective="classification"
        ).encoded("train")


def test_several_correct_texts() -> None:
    example = example_of(choice(), choices=["a", "b", "a", "c"], label=["c", "a", "d"])
    assert (example.candidates, example.label, example.correct) == ((" a", " b", " c"), 2, (0, 2))
    # Where two options say so, none does.
    assert example_of(choice(label_is="text"), choices=["Yes", "y", "no"], label=["true", "false"]).correct == (2,)
    with pytest.raises(ExampleError, match=r"none of the answers \['d'\] in column 'label' is a candidate"):
        example_of(choice(), choices=["a", "b"], label=["d"])


def test_texts_in_columns() -> None:
    task = own([" {one}", " {two}"])
    assert answers(task, [1, "0"], one=["a", "b"], two=["c", "d"]) == ["c", "b"]
    assert answers(task, ["a", "d"], one=["a", "b"], two=["c", "d"]) == ["a", "d"]
    refused("as position it is '0', as text it is '1'", task, [1], one=["1"], two=["0"])
    refused("as text it is '1', as position it is '0'", own({"A": " {one}", "B": " {two}"}), [1], one=["1"], two=["0"])


def test_label_is_names_what_it_allows() -> None:
    for keys in ({"candidates": [" a", " b"]}, {"candidates": {"column": "c"}}, {"target": "t"}):
        with pytest.raises(ValueError, match="label_is"):
            make_task({"prompt": "{text}\n", **keys, "label_is": "name"})
    with pytest.raises(ValueError, match=re.escape("names of options must differ, got ('A', 'B', 'A')")):
        choice(names=["A", "B", "A"])
    with pytest.raises(ValueError, match=r"'label_is' must be position, text or name: .*; got 'index'"):
        own([" a", " b"], label_is="index")


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labeled(path: Path, labels: Sequence[Any]) -> str:
    return write(path, [{"text": f"story {i}", "label": label} for i, label in enumerate(labels)])


def test_train_and_dev_are_read_in_one_way(tmp_path: Path) -> None:
    keys = {"prompt": "{text}\n", "candidates": ["a", "b"]}
    train, dev = labeled(tmp_path / "train.jsonl", [0, 1]), labeled(tmp_path / "dev.jsonl", ["a", "b"])
    data = PromptDataModule(keys, train_file=train, dev_file=dev)
    with pytest.raises(ExampleError, match=re.escape(f"{train} and {dev}: column 'label' holds a position in the one")):
        data.examples("train")
    parquet = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, names in zip(parquet, (["x", "y"], ["y", "x"]), strict=True):
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = pa.table({"text": ["s", "t"], "label": [0, 1]})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    data = PromptDataModule(keys, train_file=str(parquet[0]), dev_file=str(parquet[1]))
    with pytest.raises(ExampleError, match="holds positions of different labels, 'x', 'y' and 'y', 'x'"):
        data.examples("train")


def test_names_in_the_order_of_the_task_agree_with_positions() -> None:
    rows = [{"sentence": "x", "label": label} for label in (0, 1)]
    numbers = read_labels(get_task("sst2"), Rows(rows, "numbers"))
    ordered, swapped = (
        read_labels(get_task("sst2"), Rows(rows, "named", {"label": names})) for names in (SENTIMENT, ("pos", "neg"))
    )
    ordered.check_agrees(numbers)
    with pytest.raises(ExampleError, match="numbers and named: column 'label' holds a position in the one and a name"):
        swapped.check_agrees(numbers)


def test_all_rows_decide_also_those_that_are_not_drawn(tmp_path: Path) -> None:
    file = labeled(tmp_path / "train.jsonl", [0] * 50 + ["b"])
    for more in ({}, {"bad_rows": "skip"}):
        data = PromptDataModule(
            {"prompt": "{text}\n", "candidates": ["a", "b"]}, train_file=file, num_train=2, num_dev=2, **more
        )
        with pytest.raises(ExampleError, match="line 51: label 'b' in column 'label' is a text, but 0 in .*line 1 is"):
            data.examples("train")


def test_rows_whose_label_is_no_label_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = labeled(tmp_path / "train.jsonl", [0, True, 1, 1.5, "02", 0, 1])
    keys = {"prompt": "{text}\n", "candidates": {0: "a", 1: "b"}}
    data = PromptDataModule(keys, train_file=file, bad_rows="skip", k_shot=1)
    assert sorted(example.label for example in data.examples("train")) == [0, 1]
    assert "3 of 7 rows are left out; the first: " in caplog.text


def test_rows_that_are_left_out_leave_no_others_off_by_one(tmp_path: Path) -> None:
    file = labeled(tmp_path / "train.jsonl", [1, 2, 1, 2])
    keys = {"prompt": "{text}\n", "candidates": ["a", "b"]}
    with pytest.raises(ExampleError, match="line 2: label 2 in column 'label' is outside .* hardly positions"):
        PromptDataModule(keys, train_file=file, bad_rows="skip").examples("train")


def test_a_file_without_labels_can_be_predicted(tmp_path: Path) -> None:
    file = write(tmp_path / "test.jsonl", [{"text": "a"}, {"text": "b"}])
    data = PromptDataModule({"prompt": "{text}\n", "candidates": ["a", "b"]}, test_file=file)
    assert [example.label for example in data.splits.get("test", predicting=True).examples] == [-1, -1]


def test_what_came_of_the_labels_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = labeled(tmp_path / "train.jsonl", [0, 1] * 4)
    with caplog.at_level(logging.INFO):
        PromptDataModule({"prompt": "{text}\n", "candidates": [" sports", " politics"]}, train_file=train).setup("fit")
    told = [message for message in caplog.messages if message.startswith("labels of")]
    assert told == [f'labels of {train}: 0 -> " sports", 1 -> " politics"']


@pytest.mark.parametrize(
    ("candidates", "labels", "names", "told"),
    [
        ([" terrible", " great"], [0, 1], SENTIMENT, 'negative -> " terrible", positive -> " great"'),
        ({"pos": " great", "neg": " bad"}, [0], SENTIMENT, 'negative -> " bad", positive -> " great"'),
        ({"pos": " great", "neu": " so"}, [1], SENTIMENT, 'negative -> no candidate, positive -> " great"'),
        ([" sports", " politics"], ["sports"], (), 'sports -> " sports", politics -> " politics"'),
        ({0: " sports", 1: " politics"}, ["sports"], (), 'sports -> " sports", politics -> " politics"'),
        ({"column": "choices"}, [0], (), "each label is the position of an option in column 'choices'"),
        ([" {choices}", " {text}"], ["y"], (), "each label is the text of a candidate"),
        ({0: " sports", 1: " politics"}, [0, 1], (), ""),
        ({"negative": " bad", "positive": " good"}, [0, 1], SENTIMENT, ""),
    ],
)
def test_what_is_told(candidates: Any, labels: list[Any], names: tuple[str, ...], told: str) -> None:
    options: Any = ["x", "z"] if isinstance(candidates, dict) else "y"
    rows = [{"text": "t", "label": label, "choices": options} for label in labels]
    data = Rows(rows, "a.jsonl", {"label": names} if names else {})
    assert read_labels(own(candidates), data).describe() == told


def test_many_rows_are_read_quickly() -> None:
    """Each label is looked at once, whatever the number of rows, and no row where only one reading is allowed."""
    looked = []
    cells = [("a", label, lambda: looked.append(1) or ["a", "b"]) for label in [0, 1] * 3]  # type: ignore[func-returns-value]
    LabelReading.of(own([" {a}", " {b}"], label_is="position"), cells)  # type: ignore[arg-type]
    LabelReading.of(own({0: " {a}", 1: " {b}"}), cells)  # type: ignore[arg-type]
    assert not looked


# What follows reads labels a second time, in other words than the package does.

ALIKE = [{"yes", "true"}, {"no", "false"}, {"positive", "pos"}, {"negative", "neg"}]


def alike(one: str, two: str) -> bool:
    return one.lower() == two.lower() or any({one.lower(), two.lower()} <= group for group in ALIKE)


def spelled(word: str, known: Sequence[str | None]) -> list[str]:
    """The known texts that a word may stand for."""
    return list(dict.fromkeys([k for k in known if k == word] or [k for k in known if k and alike(k, word)]))


def oracle(names: list[str], rows: Rowlike, declared: Sequence[str], fixed: bool) -> list[str] | None:
    """The gold text of each row, None if the file must be refused. Without names candidates are a list or a column."""
    shared, result = {"name", "position", "text"}, []
    if any(str(i) in names for i in range(len(declared))) and not any(spelled(d, names) for d in declared):
        declared = ()  # the names of the task are the file's numbers
    for value, options in rows:
        number = None if isinstance(value, bool) or not re.fullmatch(r"\d+(\.0)?", str(value)) else int(float(value))
        word = str(value).lower() if isinstance(value, bool) else str(value if number is None else number)
        if declared and number is not None:
            word = declared[number] if number < len(declared) else "?"
        truth = isinstance(value, bool) or word.lower() in ("true", "false")
        pool = names if names else []
        as_name = [options[names.index(name)] for name in spelled(word, pool)]
        as_text = spelled(word, options) if fixed or truth else [o for o in set(options) if o == word]
        ways = {"name": set(as_name), "text": set(as_text), "position": set()}
        # Numbers that the file names are no positions among the names of the task.
        if number is not None and not (declared and names) and number < len(options) and options[number] is not None:
            ways["position"] = {options[number]}
        if fixed and names and ways["name"]:
            ways = {"name": ways["name"]}
        meant = set().union(*ways.values())
        if len(meant) != 1:
            return None
        shared &= {way for way, texts in ways.items() if texts}
        result.append(meant.pop())
    if names and fixed:
        shared -= {"position"}
    return [str(text) for text in result] if shared else None


WORDS = ["yes", "No", "true", "False", "pos", "Positive", "negative", "neg", "sports", "A", "B", "0", "1", "2"]
word_lists = st.lists(st.sampled_from(WORDS), min_size=2, max_size=3, unique_by=str.lower)
columns = st.one_of(
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=4),
    st.lists(st.sampled_from([*WORDS, "1.0", "TRUE", "sports"]), min_size=1, max_size=4),
)


@settings(max_examples=600)
@given(st.data())
def test_a_reading_is_the_one_that_is_meant_or_an_error(data: st.DataObject) -> None:
    labels = data.draw(columns)
    kind = data.draw(st.sampled_from(["list", "mapping", "column", "letters"]))
    declared: list[str] = data.draw(word_lists | st.just([])) if isinstance(labels[0], int) else []
    if all(name == str(i) for i, name in enumerate(declared)):
        declared = []
    names: list[str] = []
    more: dict[str, Any] = {}
    if kind in ("list", "mapping"):
        texts = data.draw(word_lists)
        names = data.draw(st.permutations(WORDS))[: len(texts)] if kind == "mapping" else []
        task = own(dict(zip(names, texts, strict=True)) if names else texts)
        rows: Rowlike = [(label, texts) for label in labels]
    else:
        names = ["A", "B", "C", "D"] if kind == "letters" else []
        option = st.sampled_from([*WORDS, None])
        lists = st.lists(option, min_size=3, max_size=4).filter(lambda o: len(set(o) - {None}) > 1)
        more["choices"] = [data.draw(lists) for _ in labels]
        task = choice(names=names) if names else choice()
        rows = list(zip(labels, more["choices"], strict=True))
        names = names[: min(map(len, more["choices"]))]
    try:
        read = answers(task, labels, declared, **more)
    except ExampleError:
        return
    assert read == oracle(names, rows, declared, fixed=not more), (labels, names, rows, declared)


@settings(max_examples=200)
@given(data=st.data(), names=word_lists.filter(lambda words: not any(alike(a, b) for a, b in combinations(words, 2))))
def test_clear_labels_are_never_refused(data: st.DataObject, names: list[str]) -> None:
    """Without this the test above would pass for a reading that refuses all."""
    picks = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=4))
    mapping, plain = own({name: f" text {i}" for i, name in enumerate(names)}), own([" x", " y", " z"][: len(names)])
    expected = [f"text {i}" for i in picks]
    change = data.draw(st.sampled_from([str, str.upper, str.lower, str.title]))
    assert answers(mapping, [change(names[i]) for i in picks]) == expected
    for number in (int, float, str):
        assert answers(plain, [number(i) for i in picks]) == ["xyz"[i] for i in picks]
    words = [name for name in names if not name.isdecimal()]
    if len(words) == len(names):
        assert answers(mapping, picks, [change(name) for name in names]) == expected
    options = [["u", "u", "v", "w"]] * len(picks)
    assert answers(choice(), picks, choices=options) == [options[0][i] for i in picks]
