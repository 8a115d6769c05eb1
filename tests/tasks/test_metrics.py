"""Metrics of texts and of sets of answers: cases worked out by hand from the official definitions."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from smezo_pl.tasks import objectives
from smezo_pl.tasks.metrics import (
    METRICS,
    Answer,
    drop_em,
    drop_f1,
    drop_normalized,
    gathered,
    normalized,
    number_in,
    rouge,
    squad_em,
    squad_f1,
)
from smezo_pl.tasks.objectives import reward_loss, reward_losses


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
        # The gold number among other words: precision 2/3, recall 1.
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
    assert rouge(answer, references, "rouge1") == pytest.approx(6 / 7)
    assert rouge(answer, references, "rouge2") == pytest.approx(0.4)
    assert rouge("the cat sat", ["the cat quickly sat"], "rougeL") == pytest.approx(6 / 7)


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


def chosen(*pairs: tuple[int, int], groups: tuple[int, ...] = ()) -> list[Answer]:
    return [
        Answer(n, str(choice), (str(label),), choice, label, choice == label, groups[n] if groups else 0)
        for n, (choice, label) in enumerate(pairs)
    ]


def generated(*answers: tuple[str, tuple[str, ...]]) -> list[Answer]:
    return [Answer(n, text, references) for n, (text, references) in enumerate(answers)]


def test_labels() -> None:
    # Of label 1: 2 found of 3, 1 wrongly found.
    answers = chosen((1, 1), (1, 1), (0, 1), (1, 0), (0, 0))
    assert METRICS["accuracy"].measure(answers, 2) == pytest.approx(3 / 5)
    assert METRICS["f1"].measure(answers, 2) == pytest.approx(2 / 3)
    assert METRICS["f1a"].measure(answers, 2) == pytest.approx(2 / 3)
    # Of label 0: 1 found of 2, 1 wrongly found: 1/2.
    assert METRICS["f1_macro"].measure(answers, 2) == pytest.approx((2 / 3 + 1 / 2) / 2)
    # (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    assert METRICS["matthews"].measure(answers, 2) == pytest.approx(1 / 6)


def test_a_constant_answer_has_no_matthews_correlation() -> None:
    assert METRICS["matthews"].measure(chosen((1, 1), (1, 0), (1, 1)), 2) == 0.0


def test_exact_match_over_whole_questions() -> None:
    answers = chosen((1, 1), (0, 0), (1, 0), (1, 1), (1, 1), groups=(7, 7, 8, 8, 9))
    assert METRICS["em"].measure(answers, 2) == pytest.approx(2 / 3)


def test_texts() -> None:
    answers = generated(("the Bears", ("Bears", "Lions")), ("Denver", ("Denver Broncos",)), ("", ("x",)))
    assert METRICS["em"].measure(answers, 0) == pytest.approx(1 / 3)
    assert METRICS["f1"].measure(answers, 0) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert METRICS["drop_f1"].measure(answers, 0) == pytest.approx((0.5 + 0.67 + 0) / 3)


def test_numbers() -> None:
    answers = generated(("about 3", ("4",)), ("no idea", ("2",)), ("5 or 6", ("6",)))
    assert METRICS["mae"].measure(answers, 0) == pytest.approx((1 + 2 + 1) / 3)
    assert METRICS["readable"].measure(answers, 0) == pytest.approx(2 / 3)
    # 3, 0, 5 and 4, 2, 6 have the same order.
    assert METRICS["spearman"].measure(answers, 0) == pytest.approx(1.0, abs=1e-5)
    assert METRICS["pearson"].measure(generated(("1", ("1",)), ("1", ("2",))), 0) == 0.0


def test_each_answer_counts_once_in_the_order_of_the_rows() -> None:
    first, second = generated(("a", ("a",)), ("b", ("b",)))
    assert gathered([second, first, second]) == [first, second]


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, which is not on the path."""
    (tmp_path / "rewards_of_a_test.py").write_text(
        "def longer(predictions, references):\n    return sum(map(len, predictions)) / len(predictions)\n"
        "def each(predictions, references):\n    return [p in r for p, r in zip(predictions, references)]\n"
        "def raises(predictions, references):\n    raise KeyError('oops')\n"
        "def nan(predictions, references):\n    return float('nan')\n"
        "def infinite(predictions, references):\n    return -float('inf')\n"
        "def few(predictions, references):\n    return [1.0]\n"
        "def none(predictions, references):\n    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    objectives._warn_once.cache_clear()
    return "rewards_of_a_test"


def test_rewards_are_made_larger_and_errors_smaller(rewards: str) -> None:
    answers = generated(("abcd", ("abcd",)), ("xy", ("x", "y")))
    assert reward_loss(f"{rewards}.longer", answers) == -3.0
    assert reward_loss(f"{rewards}.each", answers) == -0.5
    assert reward_loss(f"{rewards}.longer(predictions, references)", answers) == -3.0
    assert reward_loss("em", answers) == pytest.approx(0.5)
    assert reward_loss("mae", generated(("3", ("4",)))) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised KeyError: 'oops': the step is skipped"),
        ("nan", "returned nan: the step is skipped"),
        ("infinite", "returned -inf: the step is skipped"),
        ("few", "raised ValueError: it returned 1 numbers for 2 answers"),
        ("none", "raised TypeError"),
    ],
)
def test_a_reward_that_fails_skips_the_step_and_says_so_once(
    rewards: str, name: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    answers = generated(("a", ("a",)), ("b", ("b",)))
    for _ in range(2):
        assert math.isnan(reward_loss(f"{rewards}.{name}", answers))
    assert [message in text for text in caplog.messages] == [True]


def test_each_answer_has_a_reward_of_its_own(rewards: str, caplog: pytest.LogCaptureFixture) -> None:
    answers = generated(("a cat", ("cat",)), ("xy", ("x", "y")), ("cat 3", ("4 cat",)))
    assert reward_losses(f"{rewards}.each", answers) == [0.0, 0.0, 0.0]
    assert reward_losses(f"{rewards}.each", generated(("x", ("x",)), ("y", ("x",)))) == [-1.0, 0.0]
    assert reward_losses("em", answers) == [0.0, 1.0, 1.0]
    assert reward_losses("mae", answers) == [0.0, 0.0, 1.0]
    assert reward_losses("accuracy", chosen((1, 1), (0, 1)), 2) == [0.0, 1.0]
    assert reward_losses("f1", answers) == pytest.approx([0.0, 1.0, 0.5])
    for name, metric in METRICS.items():
        if "text" in metric.mean_on:
            assert sum(reward_losses(name, answers)) / 3 == pytest.approx(reward_loss(name, answers)), name
    assert all(map(math.isnan, reward_losses("em", [*answers, replace(answers[0], scored=False)])))
    # One number for one answer is its own; several cannot share one.
    assert reward_losses(f"{rewards}.longer", answers[:1]) == [-5.0]
    with pytest.raises(ValueError, match="longer: it returned one number for 3 answers, and directions='per_row'"):
        reward_losses(f"{rewards}.longer", answers)
    assert not caplog.messages
    for name, message in (("raises", "raised KeyError"), ("infinite", "returned -inf"), ("few", "1 numbers for 3")):
        assert all(map(math.isnan, found := reward_losses(f"{rewards}.{name}", answers))) and len(found) == 3
        assert message in caplog.messages[-1]


@pytest.mark.parametrize(
    ("name", "labels", "means"),
    [
        ("f1", 2, "accuracy"),
        ("f1_macro", 3, "accuracy"),
        ("matthews", 2, "accuracy"),
        ("em", 2, "accuracy"),
        ("spearman", 0, "f1, em, drop_f1, drop_em, rouge1, rouge2, rougeL, mae, readable"),
    ],
)
def test_what_is_no_mean_over_answers_is_refused_row_by_row(name: str, labels: int, means: str) -> None:
    answers = chosen((1, 1), (0, 1)) if labels else generated(("1", ("1",)), ("2", ("3",)))
    with pytest.raises(ValueError, match=f"objective '{name}' is no mean over the answers.* choose {means}, a reward"):
        reward_losses(name, answers, labels)
