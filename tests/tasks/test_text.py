import math
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smezo_pl.tasks import ExampleError, make_example, make_task
from smezo_pl.tasks.text import as_text

LABEL = make_task({"prompt": "{text}\nIt was", "candidates": {0: " bad", 1: " good"}})
CHOICE = make_task({"prompt": "{text}\nA:", "candidates": {"column": "options"}})
ANSWER = make_task({"prompt": "{text}\nAnswer:", "target": "answers.text"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a film", "a film"),
        ("\U0001f600", "\U0001f600"),
        ("schön".encode(), "schön"),
        (3, "3"),
        (-(10**20), "-100000000000000000000"),
        (np.int64(3), "3"),
        (3.5, "3.5"),
        (3.0, "3"),
        (-20.0, "-20"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (Decimal("1.50"), "1.50"),
        (Decimal("1E+3"), "1000"),
        (date(2024, 1, 31), "2024-01-31"),
        (datetime(2024, 1, 31, 12), "2024-01-31 12:00:00"),
    ],
)
def test_text_and_what_has_one_text(value: object, text: str) -> None:
    assert as_text(value, "text", "a.jsonl, line 2") == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "holds the truth value true, which is no text: write words in the file, or"),
        (b"caf\xe9", "holds bytes that are not UTF-8 (byte 0xe9 at 3)"),
        ("cut \ud83d", "holds half a character, '\\ud83d' at 4: the text was cut inside it; bad_rows: skip leaves"),
        (["a"], "must hold a text, got ['a']"),
        ({"text": "a"}, "must hold a text, got {'text': 'a'}"),
        (float("inf"), "must hold a text, got inf"),
        (np.array(["a"]), "must hold a text, got array(['a']"),
    ],
)
def test_what_is_no_text_is_refused(value: object, message: str) -> None:
    with pytest.raises(ExampleError) as error:
        as_text(value, "text", "a.jsonl, line 2")
    assert str(error.value).startswith(f"a.jsonl, line 2: column 'text' {message}")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("1é\U0001f600\ud83d"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("a"), inner, max_size=2),
    max_leaves=4,
)


@given(VALUES)
def test_a_value_of_json_is_its_own_text_or_refused(value: Any) -> None:
    try:
        text = as_text(value, "text", "a.jsonl, line 2")
    except ExampleError:
        half = isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)
        assert half or value is None or isinstance(value, (bool, list, dict)) or not math.isfinite(value)
    else:
        assert text == value if isinstance(value, str) else type(value)(text) == value
        assert isinstance(value, str) or set(text) <= set("-.0123456789")


WRONG = (b"\xff", "\udc80", True, {"a": 1}, [["a"]])


@pytest.mark.parametrize("value", WRONG)
def test_no_column_that_the_model_reads_takes_what_is_no_text(value: Any) -> None:
    for task, row in (
        (LABEL, {"text": value, "label": 1}),
        (CHOICE, {"text": "q", "options": ["a", value], "label": "a"}),
        (ANSWER, {"text": "q", "answers": {"text": ["a", value]}}),
        (ANSWER, {"text": "q", "answers": [{"text": value}]}),
    ):
        with pytest.raises(
            ExampleError, match=r"^a\.jsonl, line 7: column '(text|options|answers\.text)' (holds|must)"
        ):
            make_example(task, row, 0, "a.jsonl", line="line 7")


def test_a_null_option_is_no_option() -> None:
    assert make_example(CHOICE, {"text": "q", "options": ["a", "b", None], "label": "b"}).candidates == (" a", " b")
    with pytest.raises(ExampleError, match="must hold at least two candidates"):
        make_example(CHOICE, {"text": "q", "options": ["a", None], "label": "a"})
    with pytest.raises(ExampleError, match="must hold a list of texts, got \"{'text': "):
        make_example(CHOICE, {"text": "q", "options": {"text": ["a", "b"]}, "label": 0})


def test_a_structure_as_target_names_its_fields() -> None:
    task = make_task({"prompt": "{text}\nAnswer:", "target": "answers"})
    for answers in ({"text": ["Paris"], "answer_start": [5]}, [{"text": "Paris", "answer_start": 5}]):
        with pytest.raises(ExampleError, match=r"name the field that is the answer, answers\.text, answers\.answer_st"):
            make_example(task, {"text": "q", "answers": answers})


def test_answers_as_squad_nests_them() -> None:
    answers = [{"text": "Paris", "answer_start": 5}, {"text": "in Paris", "answer_start": 2}]
    assert make_example(ANSWER, {"text": "q", "answers": answers}).references == ("Paris", "in Paris")
    assert make_example(ANSWER, {"text": "q", "answers": []}).references == ()
    with pytest.raises(ExampleError, match=r"column 'answers' has no field 'text'"):
        make_example(ANSWER, {"text": "q", "answers": [{"answer_start": 5}]})


def test_truth_values_by_words() -> None:
    keys = {"prompt": "{text} {open}", "candidates": {0: "No", 1: "Yes"}, "words": {"open": {True: "on", False: "off"}}}
    task = make_task(keys)
    assert [make_example(task, {"text": "x", "open": value, "label": 0}).prompt for value in (True, False)] == [
        "x on",
        "x off",
    ]


def test_a_group_that_is_empty() -> None:
    task = make_task({"prompt": "{text}", "candidates": {0: "No", 1: "Yes"}, "group": "question"})
    with pytest.raises(ExampleError, match="column 'question' of the task's group is empty"):
        make_example(task, {"text": "x", "question": None, "label": 0})
    one, same, other = (make_example(task, {"text": "x", "question": q, "label": 0}).group for q in (1, 1, "2"))
    assert one == same != other


def test_half_a_character_in_a_template() -> None:
    with pytest.raises(ValueError, match=r"template '\{text\}\\ud83d' holds half a character at 6"):
        make_task({"prompt": "{text}\ud83d", "candidates": ["a", "b"]})
