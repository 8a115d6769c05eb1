from typing import Any

import pytest

from smezo_pl.tasks import ExampleError, ListCandidates, Task, get_task, make_example

SST2 = get_task("sst2")


def fails(task: Task, row: dict[str, Any], names: tuple[str, ...] | None = None) -> str:
    with pytest.raises(ExampleError) as error:
        make_example(task, row, 7, "train.parquet", names)
    assert str(error.value).startswith("train.parquet, row 7: ")
    return str(error.value).removeprefix("train.parquet, row 7: ")


@pytest.mark.parametrize("value", ["", " \n", None, float("nan")])
def test_an_empty_example_is_refused_by_name(value: object) -> None:
    assert fails(SST2, {"sentence": value, "label": 1}) == "empty example, column 'sentence' holds no text"


def test_a_blank_column_is_fine_where_the_official_data_has_some() -> None:
    example = make_example(get_task("qqp"), {"question1": "", "question2": "Why?", "label": 0})
    assert example.prompt == "Why? Is the second sentence a paraphrase of the first?\n"


@pytest.mark.parametrize("label", [2, -2, "2", "neutral", 1.5])
def test_a_label_outside_the_task(label: object) -> None:
    assert fails(SST2, {"sentence": "fine", "label": label}) == (
        f"label {label!r} in column 'label' is outside task 'sst2', allowed are 'negative', 'positive' or 0 to 1"
    )


@pytest.mark.parametrize("label", [None, -1, float("nan")])
def test_an_unknown_label(label: object) -> None:
    example = make_example(SST2, {"sentence": "fine", "label": label})
    assert (example.label, example.correct) == (-1, ())


def test_labels_by_name_by_number_and_as_booleans() -> None:
    boolq = get_task("boolq")
    row = {"passage": "It is.", "question": "is it"}
    assert [make_example(boolq, {**row, "label": label}).label for label in (True, "True", 1)] == [1, 1, 1]
    assert [make_example(boolq, {**row, "label": label}).label for label in (False, "False", 0)] == [0, 0, 0]


def test_the_names_of_the_data_set_decide_what_a_number_means() -> None:
    row = {"sentence": "fine", "label": 0}
    assert make_example(SST2, row, label_names=("negative", "positive")).label == 0
    assert make_example(SST2, row, label_names=("positive", "negative")).label == 1
    # Names that are only numbers say nothing.
    assert make_example(SST2, row, label_names=("0", "1")).label == 0


def test_trec_needs_names() -> None:
    row = {"text": "Who ?", "coarse_label": 3}
    message = fails(get_task("trec"), row)
    assert message.startswith(
        "label 3 in column 'coarse_label' is outside task 'trec', allowed are 'ABBR', 'ENTY', 'DESC', 'HUM', 'LOC',"
        " 'NUM'; numbers need names of their own in the file"
    )
    assert make_example(get_task("trec"), {"text": "Who ?", "coarse_label": "HUM"}).label == 3


def test_keys_that_are_numbers_are_names_first() -> None:
    task = Task("mine", "{text}\n", {"1": "B", "0": "A"})
    assert make_example(task, {"text": "x", "label": 1}).label == 0
    assert make_example(task, {"text": "x", "label": "0"}).label == 1


def test_a_word_that_the_task_does_not_know() -> None:
    row = {"premise": "It rained.", "choice1": "A.", "choice2": "B.", "question": "why", "label": 0}
    assert fails(get_task("copa"), row) == "column 'question' is 'why', must be one of 'effect', 'cause'"


def test_candidates_with_equal_text() -> None:
    row = {
        "premise": "It rained.",
        "choice1": "It was wet.",
        "choice2": "it was wet. ",
        "question": "cause",
        "label": 0,
    }
    assert fails(get_task("copa"), row) == (
        "two candidates have the same text ' it was wet.', so no label can tell them apart"
    )


def test_list_candidates() -> None:
    task = Task("mine", "{text}", ListCandidates("options", " @", slot="@"), label="answer")
    row = {"text": "x", "options": [" a", "b", "a"]}
    assert make_example(task, {**row, "answer": "b"}).candidates == (" a", " b")
    assert [make_example(task, {**row, "answer": answer}).label for answer in ("b", 1, ["b", "a"])] == [1, 1, 1]
    assert make_example(task, {**row, "answer": []}).label == -1
    assert fails(task, {**row, "answer": ["c"]}) == "none of the answers ['c'] in column 'answer' is a candidate"
    assert "outside task 'mine', allowed are 'a', 'b' or 0 to 2" in fails(task, {**row, "answer": "c"})
    assert "must hold a list of texts, got 'a'" in fails(task, {"text": "x", "options": "a", "answer": "a"})
    assert "must hold at least two candidates, got ('a',)" in fails(
        task, {"text": "x", "options": ["a"], "answer": "a"}
    )


def test_fewer_options_than_letters() -> None:
    row = {"question": "1 + 1?", "options": ["A)1", "B)2"], "correct": "C"}
    assert "allowed are 'A', 'B'" in fails(get_task("aqua"), row)


def test_the_prompt_neither_starts_with_white_space_nor_ends_in_a_space() -> None:
    task = Task("mine", " \n{a} {b}", {"0": " no", "1": " yes"}, may_be_empty=("b",))
    assert make_example(task, {"a": " x", "b": "", "label": 0}).prompt == "x"
