import copy
import pickle
import re
from typing import Any

import pytest

from smezo_pl.tasks import TASKS, ListCandidates, Task, get_task
from smezo_pl.tasks.task import FILTERS, columns_in, render

YES_NO = {"0": "No", "1": "Yes"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "{a} is "}, "prompt must not end in a space, got '{a} is '"),
        ({"prompt": "{a"}, "lone '{'"),
        ({"candidates": {"0": "No"}}, "candidates must be at least two, got ['No']"),
        ({"candidates": {"0": "No", "1": " "}}, "candidates must not be blank, got ' '"),
        ({"candidates": {"0": "No", "1": "No"}}, "candidates must differ, got 'No' more than once"),
        ({"candidates": {"0": "{b|x}", "1": "No"}}, "unknown filter 'x'"),
        ({"objective": "regression"}, "objective must be one of classification, lm, got 'regression'"),
    ],
)
def test_a_bad_task_is_refused_when_it_is_made(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Task(**{"name": "t", "prompt": "{a}\n", "candidates": YES_NO, **bad})


def test_bad_filter_of_list_candidates() -> None:
    with pytest.raises(ValueError, match="unknown filter 'shout'"):
        ListCandidates("a", " @", slot="@", filter="shout")


def test_columns() -> None:
    task = Task("t", "{a} {b}\n", {"x": " {c}", "y": " {d} {a}"}, label="gold")
    assert task.text_columns == ("a", "b", "c", "d")
    assert task.columns == ("a", "b", "c", "d", "gold")
    listed = Task("t", "{a}\n", ListCandidates("options", " @", slot="@"), label="gold")
    assert listed.columns == ("a", "options", "gold")


def test_the_registry_holds_every_task_under_its_name() -> None:
    assert set(TASKS) == {
        *("demo", "sst2", "mnli", "qnli", "mrpc", "qqp", "cola", "rte", "cb", "boolq", "wsc", "wic", "multirc"),
        *("copa", "record", "trec", "piqa", "siqa", "aqua", "squad", "drop"),
    }
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_the_space_belongs_to_the_candidate(task: Task) -> None:
    for template in task.candidate_templates:
        assert template.startswith(" ") != task.prompt.endswith("\n")


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_a_task_survives_copies(task: Task) -> None:
    assert task.columns
    assert copy.deepcopy(task) == task
    assert pickle.loads(pickle.dumps(task)).columns == task.columns


@pytest.mark.parametrize(
    ("name", "near"),
    [("sst-2", "sst2"), ("SST2", "sst2"), ("bolq", "boolq"), ("multi_rc", "multirc"), ("demos", "demo")],
)
def test_an_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown task '{name}'; did you mean {near}"):
        get_task(name)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'zzzzzzzz'\. Choose from aqua, boolq, .*, wsc$"):
        get_task("zzzzzzzz")


def test_columns_are_named_once_in_order() -> None:
    assert columns_in("{b} {a|strip} {b|lower}") == ("b", "a")


def test_braces_in_a_value_are_text() -> None:
    assert render("<{a}>", {"a": "{b} {{c}}"}) == "<{b} {{c}}>"


def test_doubled_braces_are_braces() -> None:
    template = "{{{a}}} {{b}}"
    assert columns_in(template) == ("a",)
    assert render(template, {"a": "x"}) == "{x} {b}"


def test_filters_apply_from_left_to_right() -> None:
    assert render("{a|strip|lower}", {"a": " AB "}) == "ab"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("strip", " a b\n", "a b"),
        ("lower", "He", "he"),
        ("question", " is it so", "Is it so?"),
        ("question", "is it so?", "Is it so?"),
        ("question", "is it so ??", "Is it so?"),
        ("question", "", "?"),
        ("lower_first", "The sun rose.", "the sun rose."),
        ("lower_first", "I saw It.", "I saw It."),
        ("lower_first", "I'm Here.", "i'm Here."),
        ("no_period", "It rained. ", "It rained"),
        ("no_period", "It rained..", "It rained."),
        ("no_period", "It rained!", "It rained!"),
        ("bullets", "A.\n@highlight\nB\n@highlight\nC", "A.\n- B\n- C"),
        ("option", "A)21", "21"),
        ("option", "B ) 3.5 m", "3.5 m"),
        ("option", "(21)", "(21)"),
    ],
)
def test_filter(name: str, text: str, expected: str) -> None:
    assert FILTERS[name](text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a { b", r"has a lone '\{' at 2"),
        ("a } b", r"has a lone '\}' at 2"),
        ("a {} b", "has braces without a column name"),
        ("{a|shout}", "unknown filter 'shout'; there are strip, lower"),
    ],
)
def test_bad_template(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        columns_in(text)
