"""How alike two answers are as text, by the definitions of SQuAD, DROP and ROUGE."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """A text as SQuAD compares it: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_em(answer: str, references: Sequence[str]) -> float:
    """1 if the answer, normalised, is one of the references, else 0."""
    return float(normalised(answer) in map(normalised, references))


def squad_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall in words, both normalised, with the reference that fits best, in [0, 1]."""
    return _best(_word_f1, normalised(answer).split(), [normalised(reference).split() for reference in references])


def _best(score: Callable[[list[str], list[str]], float], words: list[str], references: list[list[str]]) -> float:
    return max((score(words, reference) for reference in references), default=0.0)


def _word_f1(words: list[str], reference: list[str]) -> float:
    common = sum((Counter(words) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def drop_normalised(text: str) -> str:
    """A text as DROP compares it: word by word (hyphens part words), and numbers as floats (``1,000`` stays text)."""
    words = (_drop_word(word) for word in re.split(r"[ -]", text))
    return " ".join(word for word in words if word).strip()


def _drop_word(word: str) -> str:
    word = word.lower()
    # Punctuation is part of a number: its point, its sign.
    if not _is_number(word):
        word = word.translate(_PUNCTUATION)
    if _is_number(word):
        word = str(float(word))
    return " ".join(_ARTICLES.sub(" ", word).split())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def drop_em(answer: str, spans: Sequence[str]) -> float:
    """1 if there is one span and the answer is equal to it, both normalised, else 0.

    An answer is one text and so never equal to several spans, which together are the right answer.
    """
    return float([drop_normalised(answer)] == [drop_normalised(span) for span in spans])


def drop_f1(answer: str, spans: Sequence[str]) -> float:
    """F1 of the answer's words with the best span's, over the number of spans, to two digits; in [0, 1].

    All spans together are the right answer, and the answer is one text, so it can stand for one of them. A span with
    numbers scores 0 unless the answer has one of them. Words count once.
    """
    if not spans:
        return 0.0
    words = set(drop_normalised(answer).split())
    best = max(_drop_span(words, set(drop_normalised(span).split())) for span in spans)
    return round(best / len(spans), 2)


def _drop_span(words: set[str], span: set[str]) -> float:
    numbers = {word for word in span if _is_number(word)}
    if numbers and not numbers & words:
        return 0.0
    common = len(words & span)
    # The official definition: an empty side has nothing wrong in it.
    precision = common / len(words) if words else 1.0
    recall = common / len(span) if span else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def rouge(key: str) -> Callable[[str, Sequence[str]], float]:
    """ROUGE's F-measure of ``rouge1``, ``rouge2`` or ``rougeL`` with the reference that fits best, by torchmetrics."""

    def score(answer: str, references: Sequence[str]) -> float:
        # Imported late: torchmetrics' text metrics bring a good deal with them.
        from torchmetrics.functional.text import rouge_score

        values = rouge_score(answer, [list(references)], accumulate="best", rouge_keys=key)
        return float(values[f"{key}_fmeasure"])

    return score


@lru_cache(maxsize=1024)
def number_in(text: str) -> float | None:
    """The first number that a text holds (``-3``, ``2.5``, ``1,000``, ``1e3``), None if there is none."""
    found = re.search(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?", _from_digit(text))
    if found is None or not any(letter.isdigit() for letter in found[0]):
        return None
    return float(found[0].replace(",", ""))


def _from_digit(text: str) -> str:
    """The text from its first digit on, with the sign or the point before it."""
    first = re.search(r"(?:(?<![\w.])[-+])?\.?\d", text)
    return text[first.start() :] if first else ""
