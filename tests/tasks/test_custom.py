import re
from typing import Any

import pytest

from smezo_pl.tasks import GeneratedAnswer, ListCandidates, Task, make_example, make_task
from smezo_pl.tasks.metrics import get_metric
from smezo_pl.tasks.objectives import check_objective

TOPIC = {"prompt": "{title}\n{body}\nTopic:", "candidates": {0: " sports", 1: " politics"}, "label": "topic"}


def test_labels_of_any_type_name_a_candidate() -> None:
    task = make_task({**TOPIC, "metric": ["accuracy", "f1_macro"]}, name="mine")
    assert (task.name, task.labels, task.objective, task.metrics) == (
        "mine",
        ("0", "1"),
        "classification",
        ("accuracy", "f1_macro"),
    )
    row = {"title": "A", "body": "B"}
    for value in (1, "1", 1.0, " 1 ", "1.0", "politics"):
        example = make_example(task, {**row, "topic": value})
        assert (example.prompt, example.candidates, example.label) == ("A\nB\nTopic:", (" sports", " politics"), 1)
    for value in (None, float("nan"), "", "  ", -1, "-1"):
        assert make_example(task, {**row, "topic": value}).label == -1


@pytest.mark.parametrize("value", [True, "True", "true", "TRUE"])
def test_booleans_of_yaml_json_and_csv_are_one_label(value: Any) -> None:
    task = make_task({"prompt": "{a}\n", "candidates": {False: "No", True: "Yes"}})
    assert task.labels == ("False", "True")
    assert make_example(task, {"a": "x", "label": value}).label == 1


@pytest.mark.parametrize("value", [1, "1", "politics", "politics "])
def test_a_list_of_texts_is_labeled_by_text_or_index(value: Any) -> None:
    task = make_task({"prompt": "{a}\nTopic:", "candidates": [" sports", " politics"]})
    assert make_example(task, {"a": "x", "label": value}).label == 1


@pytest.mark.parametrize("value", [1, "1", "a cat"])
def test_multiple_choice_from_columns(value: Any) -> None:
    task = make_task({"prompt": "{q}\nAnswer:", "candidates": [" {one}", " {two}"], "label": "right"})
    assert task.objective == "lm"
    example = make_example(task, {"q": "What?", "one": "a dog", "two": "a cat", "right": value})
    assert (example.candidates, example.label, example.references) == ((" a dog", " a cat"), 1, ("a cat",))


@pytest.mark.parametrize(("value", "label"), [("C", 2), (0, 0), ("red {x}", 2)])
def test_multiple_choice_from_a_column_that_holds_a_list(value: Any, label: int) -> None:
    task = make_task(
        {"prompt": "{q}\nAnswer:", "candidates": {"column": "options", "names": ["A", "B", "C"]}, "label": "right"}
    )
    assert isinstance(task.candidates, ListCandidates)
    example = make_example(task, {"q": "What?", "options": ["blue", "green", "red {x}"], "right": value})
    assert (example.candidates, example.label) == ((" blue", " green", " red {x}"), label)


def test_generation() -> None:
    task = make_task({"prompt": "{article}\nSummary:", "target": "summary", "metric": "rougeL", "max_new_tokens": 9})
    assert isinstance(task.candidates, GeneratedAnswer)
    assert (task.objective, task.metrics, task.candidates.max_new_tokens) == ("lm", ("rougeL",), 9)
    example = make_example(task, {"article": "Long.", "summary": " short "})
    assert (example.candidates, example.references, example.label) == ((" short\n",), ("short",), 0)
    after_a_line = make_task({"prompt": "{article}\n", "target": "summary", "stop": "###"})
    assert make_example(after_a_line, {"article": "Long.", "summary": "short"}).candidates == ("short###",)


def test_several_references_each_once() -> None:
    task = make_task({"prompt": "{q}\nAnswer:", "target": "answers.text"})
    example = make_example(task, {"q": "When?", "answers": {"text": ["1066", "in 1066", "1066", None]}})
    assert (example.candidates, example.references) == ((" 1066\n",), ("1066", "in 1066"))


@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", [], [None]])
def test_no_answer_is_an_unknown_one(value: Any) -> None:
    example = make_example(make_task({"prompt": "{q}\nA:", "target": "a"}), {"q": "When?", "a": value})
    assert (example.label, example.candidates, example.references) == (-1, (), ())


def test_a_number_in_words() -> None:
    task = make_task({"prompt": "{text}\nStars:", "target": "stars", "metric": ["mae", "readable"]})
    assert make_example(task, {"text": "Fine.", "stars": 4}).candidates == (" 4\n",)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**TOPIC, "candidate": 1}, "task has no key 'candidate'; did you mean 'candidates'? Choose from prompt, "),
        ({"candidates": ["a", "b"]}, "task needs 'prompt': text with columns in braces; got None"),
        ({"prompt": "{a}\n"}, "task needs either `candidates`, to choose from, or `target`"),
        ({**TOPIC, "target": "x"}, "it has both"),
        ({**TOPIC, "candidates": " yes"}, "task: candidates must be a mapping from labels to texts"),
        ({**TOPIC, "words": {"open": {True: False}}}, "the word for True must be in quotes, got False (bool)"),
        ({**TOPIC, "calibration": 1.5}, "'calibration' must be in quotes, got 1.5 (float)"),
        ({**TOPIC, "candidates": {"column": "x", "text": {"option": None}}}, "the text of an option must be in quotes"),
        ({**TOPIC, "candidates": {0: False, 1: True}}, "must be in quotes, got False (bool); YAML takes a bare Yes"),
        ({**TOPIC, "candidates": {1: " a", "1": " b"}}, "two candidates have the same label, ['1', '1']"),
        ({**TOPIC, "candidates": [" a", " a"]}, "two candidates have the same label, ['a', 'a']"),
        ({**TOPIC, "candidates": {0: " a", 1: " a"}}, "candidates must differ, got ' a' more than once"),
        ({**TOPIC, "candidates": [" a"]}, "candidates must be at least two"),
        ({**TOPIC, "candidates": {"column": "o", "slot": "x"}}, "candidates from a column have no key 'slot'"),
        ({**TOPIC, "stop": "x"}, "task: 'stop' is for answers that the model generates"),
        ({**TOPIC, "metric": 3}, "task: 'metric' must be a name or a list of names; got 3"),
        ({**TOPIC, "objective": "mse"}, "objective must be one of classification, lm, got 'mse'"),
        ({**TOPIC, "prompt": "{title"}, "template '{title' has a lone '{' at 0"),
        ({"prompt": "{a}\n", "target": "b", "objective": "classification"}, "has no candidates to classify"),
        ({"prompt": "{a}\n", "target": "b", "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_bad_keys(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task(keys)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"topic": 7}, "file, line 4: label 7 in column 'topic' is outside task 'own', allowed are '0', '1'"),
        ({"topic": "tennis"}, "label 'tennis' in column 'topic' is outside task 'own', allowed are '0', '1'"),
        ({"topic": 1.5}, "label 1.5 in column 'topic' is outside"),
        ({"title": " "}, "file, line 4: empty example, column 'title' holds no text"),
        ({"title": None}, "file, line 4: empty example, column 'title' holds no text"),
        ({"title": float("nan")}, "file, line 4: empty example, column 'title' holds no text"),
        ({"title": ["a"]}, "file, line 4: column 'title' must hold a text, got ['a']"),
    ],
)
def test_bad_rows_name_file_and_line(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_example(make_task(TOPIC), {"title": "t", "body": "b", "topic": 0, **row}, 3, "file", line="line 4")


def test_candidates_of_equal_text_are_refused_by_row() -> None:
    task = make_task({"prompt": "{q}\nAnswer:", "candidates": [" {one}", " {two}"]})
    with pytest.raises(ValueError, match="two candidates have the same text ' a', so no label can tell them apart"):
        make_example(task, {"q": "q", "one": "a", "two": "a ", "label": 0})


def generation() -> Task:
    return make_task({"prompt": "{a}\n", "target": "b"})


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        (make_task(TOPIC), "acuracy", "unknown metric 'acuracy'; did you mean 'accuracy'? Choose from accuracy, f1, "),
        (
            make_task(TOPIC),
            "rougeL",
            "metric 'rougeL' does not fit: it is for tasks whose answer is generated text",
        ),
        (make_task(TOPIC), "em", "it is over whole questions, and 'own' names no columns in `group`"),
        (generation(), "matthews", "it is for tasks whose candidates are its labels"),
        (generation(), "accuracy", "Those that fit are f1, em, drop_f1"),
        (make_task({**TOPIC, "candidates": [" a", " b", " c"]}), "f1", "two labels, and 'own' has 3"),
    ],
)
def test_a_metric_that_is_unknown_or_does_not_fit(task: Task, metric: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        get_metric(metric, task)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("acuracy", "unknown objective 'acuracy'; did you mean 'accuracy'? Choose from classification, lm, accuracy"),
        ("rougeL", "objective 'rougeL' does not fit"),
        ("no_such_module_1.score", "reward 'no_such_module_1.score': cannot import 'no_such_module_1'"),
        ("math.skore", "module 'math' has no function 'skore'; it has acos"),
    ],
)
def test_a_bad_objective(objective: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_objective(objective, make_task(TOPIC))
