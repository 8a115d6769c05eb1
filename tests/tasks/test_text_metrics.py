"""Cases worked out by hand from the official definitions."""

import pytest

from smezo_pl.tasks.text_metrics import (
    drop_em,
    drop_f1,
    drop_normalized,
    normalized,
    number_in,
    rouge,
    squad_em,
    squad_f1,
)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("A.D. 1066", "ad 1066"),
        ("1,000", "1000"),
        ("U.S.A.", "usa"),
        # The punctuation goes first, so that what it leaves can be an article: "a-" is "a".
        ("a- b", "b"),
        ("theatre another", "theatre another"),
        ("state-of-the-art", "stateoftheart"),
        ("the", ""),
        ("“quoted”", "“quoted”"),
        ("Zürich's", "zürichs"),
    ],
)
def test_squad_normalization(text: str, plain: str) -> None:
    assert normalized(text) == plain


@pytest.mark.parametrize(
    ("answer", "references", "em", "f1"),
    [
        ("the Broncos", ["Denver Broncos", "Broncos"], 1.0, 1.0),
        ("Denver", ["Denver Broncos"], 0.0, 2 / 3),
        # precision 2/4, recall 2/2
        ("the big red Denver Broncos", ["Denver Broncos"], 0.0, 2 / 3),
        # A word counts as often as both have it: common 2, precision 2/3, recall 1.
        ("no no no", ["no no"], 0.0, 0.8),
        ("1,000", ["1000"], 1.0, 1.0),
        ("1000.0", ["1000"], 0.0, 0.0),
        ("five", ["5"], 0.0, 0.0),
        ("", ["x"], 0.0, 0.0),
        ("the", ["an"], 1.0, 0.0),
        ("October 1973", ["1973", "in October 1973", "October"], 0.0, 0.8),
        ("x", [], 0.0, 0.0),
    ],
)
def test_squad(answer: str, references: list[str], em: float, f1: float) -> None:
    assert squad_em(answer, references) == em
    assert squad_f1(answer, references) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The 12-yard run", "12.0 yard run"),
        ("3", "3.0"),
        ("3.50", "3.5"),
        # The comma goes with the punctuation, and what is left is a number.
        ("1,000", "1000.0"),
        ("$5", "5.0"),
        # The hyphen separates words, so no number has a sign.
        ("-7", "7.0"),
        ("a touchdown, an end.", "touchdown end"),
        ("Smith's", "smiths"),
        ("5th", "5th"),
    ],
)
def test_drop_normalization(text: str, plain: str) -> None:
    assert drop_normalized(text) == plain


@pytest.mark.parametrize(
    ("answer", "spans", "em", "f1"),
    [
        ("3", ["3.0"], 1.0, 1.0),
        ("The Bears", ["Bears"], 1.0, 1.0),
        # A number that is not there makes it 0, whatever else agrees.
        ("4 yards", ["3 yards"], 0.0, 0.0),
        # The right number among other words: precision 2/3, recall 1.
        ("3 long yards", ["3 yards"], 0.0, 0.8),
        # All spans together are one answer; one text can stand for one of them.
        ("Bears", ["Bears", "Lions"], 0.0, 0.5),
        ("Bears Lions", ["Bears", "Lions"], 0.0, 0.33),
        # Words count once: precision 1, recall 1.
        ("no no no", ["no no"], 0.0, 1.0),
        # To two digits: 2 * (1/3) * 1 / (4/3) = 0.5; 2 * (2/3) * (2/3) / (4/3) = 0.666...
        ("tall red house", ["red house boat"], 0.0, 0.67),
        ("", ["x"], 0.0, 0.0),
    ],
)
def test_drop(answer: str, spans: list[str], em: float, f1: float) -> None:
    assert drop_em(answer, spans) == em
    assert drop_f1(answer, spans) == pytest.approx(f1)


def test_the_two_variants_of_drop_differ_on_several_spans() -> None:
    spans = ["Bears", "Lions"]
    assert squad_f1("Lions", spans) == 1.0
    assert drop_f1("Lions", spans) == 0.5


def test_rouge() -> None:
    # Unigrams: 3 of 4 and 3 of 3. Bigrams: 1 of 3 and 1 of 2. Longest common subsequence: 3.
    answer, references = "the red cat sat", ["cats", "red cat the"]
    assert rouge("rouge1")(answer, references) == pytest.approx(6 / 7)
    assert rouge("rouge2")(answer, references) == pytest.approx(0.4)
    assert rouge("rougeL")("the cat sat", ["the cat quickly sat"]) == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4", 4.0),
        ("it is -2.5 or 3", -2.5),
        ("1,234,567 people", 1234567.0),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("3-4", 3.0),
        ("about three", None),
        ("", None),
        ("- 7", 7.0),
        ("+8%", 8.0),
    ],
)
def test_number_in(text: str, number: float | None) -> None:
    assert number_in(text) == number
