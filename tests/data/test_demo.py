import re
from collections import Counter

import pytest

from smezo_pl.data.demo import KINDS, SIZES, VOCABULARIES, demo_rows
from smezo_pl.tasks import get_task

SPLITS = ("train", "validation", "test")


def sentences(split: str) -> set[str]:
    return {row["sentence"] for row in demo_rows(split)}


@pytest.mark.parametrize("split", SPLITS)
def test_size_balance_and_kinds(split: str) -> None:
    rows = demo_rows(split)
    assert len(rows) == len(sentences(split)) == SIZES[split]
    assert sum(row["label"] for row in rows) * 2 == len(rows)
    shares = Counter(row["kind"] for row in rows)
    for kind, share in KINDS.items():
        assert shares[kind] / len(rows) > share / 3
        labels = Counter(row["label"] for row in rows if row["kind"] == kind)
        assert 0.7 < labels[0] / labels[1] < 1.4


def test_the_rows_are_a_function_of_the_seed() -> None:
    assert demo_rows("train") == demo_rows("train", seed=0)
    assert demo_rows("train") != demo_rows("train", seed=1)
    assert demo_rows("train")[0] == {
        "sentence": "Everything about this phone is forgettable, the speaker above all.",
        "label": 0,
        "kind": "plain",
    }


def test_no_word_of_judgement_is_in_two_splits() -> None:
    judging: dict[str, set[str]] = {}
    for split, words in VOCABULARIES.items():
        phrases = [phrase for pair in (*words["indirect"], *words["comparison"]) for phrase in pair]
        judging[split] = {*words["praise"], *words["blame"], *phrases}
        assert not set(words["praise"]) & set(words["blame"])
    for one in SPLITS:
        for other in SPLITS:
            if one < other:
                assert not judging[one] & judging[other]
                assert not sentences(one) & sentences(other)


def test_held_out_adjectives_are_nowhere_in_the_training_sentences() -> None:
    trained = set(re.findall(r"[\w-]+", " ".join(sentences("train")).lower()))
    for split in ("validation", "test"):
        assert not trained & {*VOCABULARIES[split]["praise"], *VOCABULARIES[split]["blame"]}


def test_the_answers_are_nowhere_in_the_sentences() -> None:
    candidates = get_task("demo").candidates
    assert isinstance(candidates, dict)
    for answer in candidates.values():
        assert not any(answer.strip() in sentence.lower() for split in SPLITS for sentence in sentences(split))


@pytest.mark.parametrize("split", SPLITS)
def test_sentences_are_well_formed(split: str) -> None:
    for sentence in sentences(split):
        assert re.fullmatch(r"[A-Z][^{}]*[.]", sentence)
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]|  ", sentence), sentence


def test_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="must be one of train, validation, test, got 'dev'"):
        demo_rows("dev")
