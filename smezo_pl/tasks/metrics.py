"""Answers of a model, and their metrics; those on texts by the definitions of SQuAD, DROP and ROUGE."""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error, pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score

from smezo_pl.tasks.task import ListCandidates, Task, unknown

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Answer:
    """The answer to one example.

    Attributes:
        index: The example's row in its dataset.
        text: The answer as text: what was generated, or the name of the chosen candidate.
        references: The correct answers as text, each of which counts.
        choice: Index of the chosen candidate; -1 for generated text.
        label: Index of the gold candidate, the one that is trained on.
        correct: Whether the chosen candidate counts as correct.
        group: A number that answers to one question share.
        scored: Whether there is an answer; False where the model's scores or logits are not finite.
    """

    index: int
    text: str
    references: tuple[str, ...]
    choice: int = -1
    label: int = -1
    correct: bool = False
    group: int = 0
    scored: bool = True


def gathered(answers: list[Answer]) -> list[Answer]:
    """The answers of all processes in the order of their rows, each once; the same on every process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts: list[list[Answer]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, answers)
        answers = [answer for part in parts for answer in part]
    return list({answer.index: answer for answer in sorted(answers, key=lambda answer: answer.index)}.values())


def normalized(text: str) -> str:
    """A text as SQuAD compares it: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_em(answer: str, references: Sequence[str]) -> float:
    """1 if the answer, normalized, is one of the references, else 0."""
    return float(normalized(answer) in map(normalized, references))


def squad_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall in words, normalized, with the most similar reference, in [0, 1]."""
    words, best = Counter(normalized(answer).split()), 0.0
    for reference in references:
        expected = Counter(normalized(reference).split())
        if common := (words & expected).total():
            precision, recall = common / words.total(), common / expected.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


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


def rouge(answer: str, references: Sequence[str], key: str) -> float:
    """F-measure of ``rouge1``, ``rouge2`` or ``rougeL`` with the most similar reference, by torchmetrics."""
    # Imported late: torchmetrics' text metrics bring a good deal with them.
    from torchmetrics.functional.text import rouge_score

    values = rouge_score(answer, [list(references)], accumulate="best", rouge_keys=key)
    return float(values[f"{key}_fmeasure"])


def number_in(text: str) -> float | None:
    """The first number in a text (``-3``, ``2.5``, ``1,000``, ``1e3``), None if there is none."""
    match = _NUMBER.search(text)
    return None if match is None else float(match[0].replace(",", ""))


Kind = Literal["labels", "listed", "text"]
"""Whether answers are labels that all examples share, candidates of an example's own list, or generated text."""

KINDS: dict[Kind, str] = {
    "labels": "whose candidates are its labels",
    "listed": "whose candidates come from a list in each row",
    "text": "whose answer is generated text",
}


@dataclass(frozen=True)
class Metric:
    """A number that a set of answers gets.

    Attributes:
        name: Its name; ``val/<name>`` and ``test/<name>`` in the log.
        measure: From answers, at least one, and the number of labels (0 where they are not shared) to the number.
        kinds: The kinds of tasks that it fits.
        two_labels: Whether it needs a task of exactly two labels; the last one is the positive.
        grouped: Whether it needs a task that names the columns its answers are grouped by.
        lower_is_better: Whether it measures an error.
        mean_on: The kinds of tasks on which it is the mean of the numbers that the answers get one by one.
    """

    name: str
    measure: Callable[[Sequence[Answer], int], float]
    kinds: tuple[Kind, ...]
    two_labels: bool = False
    grouped: bool = False
    lower_is_better: bool = False
    mean_on: tuple[Kind, ...] = ()

    def value(self, answers: Sequence[Answer], labels: int) -> float:
        """The number of these answers; NaN if one of them is missing, as the others alone say nothing of the model."""
        return self.measure(answers, labels) if all(answer.scored for answer in answers) else math.nan

    def misfit(self, task: Task) -> str | None:
        """Why it cannot be measured on that task, None if it can."""
        listed: Kind = "listed" if isinstance(task.candidates, ListCandidates) else "labels"
        kind: Kind = "text" if task.is_generation else listed
        if kind not in self.kinds:
            fits = " or ".join(KINDS[kind] for kind in self.kinds)
            return f"it is for tasks {fits}, and {task.name!r} is one {KINDS[kind]}"
        if self.two_labels and kind == "labels" and len(task.labels) != 2:
            return f"it is for tasks of two labels, and {task.name!r} has {len(task.labels)}"
        if self.grouped and kind == "labels" and not task.group:
            return f"it is over whole questions, and {task.name!r} names no columns in `group`"
        return None


def _text_mean(score: Callable[[str, Sequence[str]], float], answers: Sequence[Answer], labels: int) -> float:
    return sum(score(answer.text, answer.references) for answer in answers) / len(answers)


def _accuracy(answers: Sequence[Answer], labels: int) -> float:
    return sum(answer.correct for answer in answers) / len(answers)


def _choices(answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    return torch.tensor([answer.choice for answer in answers]), torch.tensor([answer.label for answer in answers])


def _f1(answers: Sequence[Answer], labels: int) -> float:
    return float(binary_f1_score(*_choices(answers))) if labels else _text_mean(squad_f1, answers, labels)


def _f1_macro(answers: Sequence[Answer], labels: int) -> float:
    return float(multiclass_f1_score(*_choices(answers), num_classes=labels, average="macro"))


def _matthews(answers: Sequence[Answer], labels: int) -> float:
    # Not torchmetrics 1.9: where one side is constant it returns something else than 0, the official GLUE value.
    chosen, gold = (torch.nn.functional.one_hot(indices, labels).double() for indices in _choices(answers))
    chosen, gold = chosen - chosen.mean(0), gold - gold.mean(0)
    spread = chosen.square().sum() * gold.square().sum()
    return float((chosen * gold).sum() / spread.sqrt()) if spread > 0 else 0.0


def _em(answers: Sequence[Answer], labels: int) -> float:
    if not labels:
        return _text_mean(squad_em, answers, labels)
    questions: dict[int, list[bool]] = defaultdict(list)
    for answer in answers:
        questions[answer.group].append(answer.correct)
    return sum(map(all, questions.values())) / len(questions)


def _numbers(compare: Callable[[Tensor, Tensor], Tensor], answers: Sequence[Answer], labels: int) -> float:
    generated = torch.tensor([number_in(answer.text) or 0.0 for answer in answers], dtype=torch.float64)
    gold = torch.tensor([number_in(answer.references[0]) or 0.0 for answer in answers], dtype=torch.float64)
    return float(compare(generated, gold))


def _correlation(compare: Callable[[Tensor, Tensor], Tensor], generated: Tensor, gold: Tensor) -> Tensor:
    # Undefined where one side does not vary; a model that always answers the same number has learned no order.
    if len(generated) < 2 or generated.eq(generated[0]).all() or gold.eq(gold[0]).all():
        return torch.zeros(())
    return compare(generated, gold)


def _readable(answers: Sequence[Answer], labels: int) -> float:
    return sum(number_in(answer.text) is not None for answer in answers) / len(answers)


_EVERY: tuple[Kind, ...] = ("labels", "listed", "text")
_CHOICE: tuple[Kind, ...] = ("labels", "listed")
_WORDS: tuple[Kind, ...] = ("listed", "text")
_TEXT: tuple[Kind, ...] = ("text",)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy, _CHOICE, mean_on=_CHOICE),
        Metric("f1", _f1, _EVERY, two_labels=True, mean_on=_WORDS),
        Metric("f1_macro", _f1_macro, ("labels",)),
        Metric("matthews", _matthews, ("labels",)),
        Metric("f1a", _f1, ("labels",), two_labels=True),
        Metric("em", _em, _EVERY, grouped=True, mean_on=_WORDS),
        Metric("drop_f1", partial(_text_mean, drop_f1), _TEXT, mean_on=_TEXT),
        Metric("drop_em", partial(_text_mean, drop_em), _TEXT, mean_on=_TEXT),
        Metric("rouge1", partial(_text_mean, partial(rouge, key="rouge1")), _TEXT, mean_on=_TEXT),
        Metric("rouge2", partial(_text_mean, partial(rouge, key="rouge2")), _TEXT, mean_on=_TEXT),
        Metric("rougeL", partial(_text_mean, partial(rouge, key="rougeL")), _TEXT, mean_on=_TEXT),
        Metric("mae", partial(_numbers, mean_absolute_error), _TEXT, lower_is_better=True, mean_on=_TEXT),
        Metric("pearson", partial(_numbers, partial(_correlation, pearson_corrcoef)), _TEXT),
        Metric("spearman", partial(_numbers, partial(_correlation, spearman_corrcoef)), _TEXT),
        Metric("readable", _readable, _TEXT, mean_on=_TEXT),
    )
}
"""The metrics by name.

``accuracy``: fraction of examples whose chosen candidate counts as correct. ``f1``: of the last of two labels; for
generated text and listed candidates SQuAD's F1 in words with the most similar reference, a mean over examples.
``f1_macro``: mean of the labels' F1. ``matthews``: Matthews' correlation. ``f1a``: MultiRC's F1 over all answers.
``em``: fraction of answers that are equal to a reference after SQuAD's normalization; for tasks with `group` the
fraction of questions with every answer correct. ``drop_f1``, ``drop_em``: DROP's own, where several spans together are
one reference. ``rouge1``, ``rouge2``, ``rougeL``: F-measures. ``mae``, ``pearson``, ``spearman``: of the first number
in the answer (0 if there is none), and ``readable``, the fraction of answers that have one.
"""


def lower_is_better(name: str) -> bool:
    """Whether a logged metric, such as ``loss`` or ``val/mae/dataloader_idx_0``, measures an error."""
    return any(part == "loss" or (part in METRICS and METRICS[part].lower_is_better) for part in name.split("/"))


def get_metric(name: str, task: Task, what: str = "metric") -> Metric:
    """The metric of that name.

    Raises:
        ValueError: If there is none, or it does not fit the task.
    """
    if name not in METRICS:
        raise unknown(f"unknown {what}", name, METRICS)
    if (reason := METRICS[name].misfit(task)) is not None:
        fit = ", ".join(other for other, metric in METRICS.items() if metric.misfit(task) is None)
        raise ValueError(f"{what} {name!r} does not fit: {reason}. Those that fit are {fit}")
    return METRICS[name]
