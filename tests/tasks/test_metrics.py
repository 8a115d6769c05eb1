"""Metrics of whole sets of answers, by hand."""

import math
from pathlib import Path

import pytest

from smezo_pl.tasks.metrics import METRICS, Answer, gathered
from smezo_pl.tasks.objectives import reward_loss


def chosen(*pairs: tuple[int, int], groups: tuple[int, ...] = ()) -> list[Answer]:
    return [
        Answer(n, str(place), (str(label),), place, label, place == label, groups[n] if groups else 0)
        for n, (place, label) in enumerate(pairs)
    ]


def generated(*answers: tuple[str, tuple[str, ...]]) -> list[Answer]:
    return [Answer(n, text, right) for n, (text, right) in enumerate(answers)]


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
