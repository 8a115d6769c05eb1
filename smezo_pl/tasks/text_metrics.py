"""Similarity of an answer to its references as text, by the definitions of SQuAD, DROP and ROUGE."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalized(text: str) -> str:
    """A text as SQuAD compares it: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_em(answer: str, references: Sequence[str]) -> float:
    """1 if the answer, normalized, is one of the references, else 0."""
    return float(normalized(answer) in map(normalized, references))


def squad_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall in words, normalized, with the most similar reference, in [0, 1]."""
    words = normalized(answer).split()
    return max((_word_f1(words, normalized(reference).split()) for reference in references), default=0.0)


def _word_f1(words: list[str], reference: list[str]) -> float:
    common = sum((Counter(words) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def drop_normalized(text: str) -> str:
    """A text as DROP compares it: word by word (also at hyphens), and numbers as floats."""
    words = (_drop_word(word) for word in re.split(r"[ -]", text))
    return " ".join(word for word in words if word)


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
    """1 if there is one span and the answer is equal to it, both normalized, else 0.

    An answer is one text and so never equal to several spans, which together are the reference.
    """
    return float([drop_normalized(answer)] == [drop_normalized(span) for span in spans])


def drop_f1(answer: str, spans: Sequence[str]) -> float:
    """F1 of the answer's words with the best span's, over the number of spans, to two digits; in [0, 1].

    All spans together are the reference, and the answer is one text, so it can match one of them. A span with numbers
    scores 0 unless the answer has one of them. Words count once.
    """
    if not spans:
        return 0.0
    words = set(drop_normalized(answer).split())
    best = max(_drop_span(words, set(drop_normalized(span).split())) for span in spans)
    return round(best / len(spans), 2)


def _drop_span(words: set[str], span: set[str]) -> float:
    numbers = {word for word in span if _is_number(word)}
    if numbers and not numbers & words:
        return 0.0
    common = len(words & span)
    # The official definition: an empty side holds no error.
    precision = common / len(words) if words else 1.0
    recall = common / len(span) if span else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def rouge(key: str) -> Callable[[str, Sequence[str]], float]:
    """ROUGE's F-measure of ``rouge1``, ``rouge2`` or ``rougeL`` with the most similar reference, by torchmetrics."""

    def score(answer: str, references: Sequence[str]) -> float:
        # Imported late: torchmetrics' text metrics bring a good deal with them.
        from torchmetrics.functional.text import rouge_score

        values = rouge_score(answer, [list(references)], accumulate="best", rouge_keys=key)
        return float(values[f"{key}_fmeasure"])

    return score


_NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def number_in(text: str) -> float | None:
    """The first number in a text (``-3``, ``2.5``, ``1,000``, ``1e3``), None if there is none."""
    match = _NUMBER.search(text)
    return None if match is None else float(match[0].replace(",", ""))
