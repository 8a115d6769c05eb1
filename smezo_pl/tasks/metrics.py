"""What a model answered to one example, and what would have been right: what metrics and rewards are made of."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error, pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import (
    binary_f1_score,
    multiclass_f1_score,
)

from smezo_pl.tasks.task import GeneratedAnswer, ListCandidates, Task
from smezo_pl.tasks.text_metrics import drop_em, drop_f1, number_in, rouge, squad_em, squad_f1


@dataclass(frozen=True)
class Answer:
    """The answer to one example.

    Attributes:
        index: The example's row in its data set.
        text: The answer as text: what was generated, or what the chosen candidate is called.
        references: The right answers as text, each of which counts.
        place: The chosen candidate's place; -1 for generated text.
        label: The right candidate's place, the one that is trained on.
        correct: Whether the chosen candidate counts as right.
        group: A number that answers to one question share.
    """

    index: int
    text: str
    references: tuple[str, ...]
    place: int = -1
    label: int = -1
    correct: bool = False
    group: int = 0


def gathered(answers: list[Answer]) -> list[Answer]:
    """The answers of all processes in the order of their rows, each once; the same on every process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts: list[list[Answer]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, answers)
        answers = [answer for part in parts for answer in part]
    return list({answer.index: answer for answer in sorted(answers, key=lambda answer: answer.index)}.values())


def choices(
    predicted: Tensor,
    right: Tensor,
    labels: Tensor,
    index: Tensor,
    group: Tensor,
    names: tuple[tuple[str, ...], ...],
    references: tuple[tuple[str, ...], ...],
) -> list[Answer]:
    """Answers that chose one of an example's candidates.

    Args:
        predicted: int64 ``[N]``, place of the chosen candidate.
        right: bool ``[N]``, whether it counts as right.
        labels: int64 ``[N]``, place of the right one.
        index: int64 ``[N]``, the examples' rows.
        group: int64 ``[N]``, the examples' groups.
        names: What each candidate of each example is called.
        references: The right answers of each example.
    """
    columns = (tensor.tolist() for tensor in (predicted, right, labels, index, group))
    return [
        Answer(row, names[n][place], references[n], place, label, correct, number)
        for n, (place, correct, label, row, number) in enumerate(zip(*columns, strict=True))
    ]


Kind = Literal["labels", "listed", "text"]
"""Whose answers are labels that all examples share, candidates of an example's own list, or free text."""

KINDS: dict[Kind, str] = {
    "labels": "whose candidates are its labels",
    "listed": "whose candidates come from a list in each row",
    "text": "whose answer is free text",
}


@dataclass(frozen=True)
class Metric:
    """A number that a set of answers gets.

    Attributes:
        name: Its name; ``val/<name>`` and ``test/<name>`` in the log.
        measure: From answers, at least one, and the number of labels (0 where they are not shared) to the number.
        kinds: The kinds of tasks that it fits.
        two_labels: Whether it needs a task of exactly two labels; the last one is the positive.
        grouped: Whether it needs a task that names what its answers are grouped by.
        lower_is_better: Whether it measures an error.
    """

    name: str
    measure: Callable[[Sequence[Answer], int], float]
    kinds: tuple[Kind, ...]
    two_labels: bool = False
    grouped: bool = False
    lower_is_better: bool = False

    def misfit(self, task: Task) -> str | None:
        """Why it cannot be measured on that task, None if it can."""
        kind = kind_of(task)
        if kind not in self.kinds:
            fits = " or ".join(KINDS[kind] for kind in self.kinds)
            return f"it is for tasks {fits}, and {task.name!r} is one {KINDS[kind]}"
        if self.two_labels and kind == "labels" and len(task.labels) != 2:
            return f"it is for tasks of two labels, and {task.name!r} has {len(task.labels)}"
        if self.grouped and kind == "labels" and not task.group:
            return f"it is over whole questions, and {task.name!r} names no columns in `group`"
        return None


def kind_of(task: Task) -> Kind:
    """What kind of answers a task has."""
    if isinstance(task.candidates, GeneratedAnswer):
        return "text"
    return "listed" if isinstance(task.candidates, ListCandidates) else "labels"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _text_mean(score: Callable[[str, Sequence[str]], float], answers: Sequence[Answer], labels: int) -> float:
    return _mean([score(answer.text, answer.references) for answer in answers])


def _accuracy(answers: Sequence[Answer], labels: int) -> float:
    return _mean([float(answer.correct) for answer in answers])


def _places(answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    return torch.tensor([answer.place for answer in answers]), torch.tensor([answer.label for answer in answers])


def _f1(answers: Sequence[Answer], labels: int) -> float:
    """F1 of the last of two labels; of the answers as texts where labels are not shared."""
    if labels:
        return float(binary_f1_score(*_places(answers)))
    return _text_mean(squad_f1, answers, labels)


def _f1_macro(answers: Sequence[Answer], labels: int) -> float:
    return float(multiclass_f1_score(*_places(answers), num_classes=labels, average="macro"))


def _matthews(answers: Sequence[Answer], labels: int) -> float:
    """Correlation of chosen and right labels, for two labels or more; 0 where one side is constant, as for GLUE.

    torchmetrics 1.9 gives a constant answer something else than 0.
    """
    chosen, right = (torch.nn.functional.one_hot(places, labels).double() for places in _places(answers))
    chosen, right = chosen - chosen.mean(0), right - right.mean(0)
    spread = chosen.square().sum() * right.square().sum()
    return float((chosen * right).sum() / spread.sqrt()) if spread > 0 else 0.0


def _em(answers: Sequence[Answer], labels: int) -> float:
    """Share of questions with every answer right; of answers equal to a reference where labels are not shared."""
    if not labels:
        return _text_mean(squad_em, answers, labels)
    questions: dict[int, list[bool]] = defaultdict(list)
    for answer in answers:
        questions[answer.group].append(answer.correct)
    return _mean([float(all(right)) for right in questions.values()])


def _numbers(compare: Callable[[Tensor, Tensor], Tensor], answers: Sequence[Answer], labels: int) -> float:
    """A comparison of verbalised numbers; an answer without one counts as 0."""
    said = torch.tensor([number_in(answer.text) or 0.0 for answer in answers], dtype=torch.float64)
    right = torch.tensor([number_in(answer.references[0]) or 0.0 for answer in answers], dtype=torch.float64)
    return float(compare(said, right))


def _correlation(compare: Callable[[Tensor, Tensor], Tensor], said: Tensor, right: Tensor) -> Tensor:
    # Undefined where one side does not vary; a model that always says the same number has learnt no order.
    if len(said) < 2 or said.eq(said[0]).all() or right.eq(right[0]).all():
        return torch.zeros(())
    return compare(said, right)


def _readable(answers: Sequence[Answer], labels: int) -> float:
    return _mean([float(number_in(answer.text) is not None) for answer in answers])


_EVERY: tuple[Kind, ...] = ("labels", "listed", "text")
_CHOICE: tuple[Kind, ...] = ("labels", "listed")

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy, _CHOICE),
        Metric("f1", _f1, _EVERY, two_labels=True),
        Metric("f1_macro", _f1_macro, ("labels",)),
        Metric("matthews", _matthews, ("labels",)),
        Metric("f1a", _f1, ("labels",), two_labels=True),
        Metric("em", _em, _EVERY, grouped=True),
        Metric("drop_f1", partial(_text_mean, drop_f1), ("text",)),
        Metric("drop_em", partial(_text_mean, drop_em), ("text",)),
        Metric("rouge1", partial(_text_mean, rouge("rouge1")), ("text",)),
        Metric("rouge2", partial(_text_mean, rouge("rouge2")), ("text",)),
        Metric("rougeL", partial(_text_mean, rouge("rougeL")), ("text",)),
        Metric("mae", partial(_numbers, mean_absolute_error), ("text",), lower_is_better=True),
        Metric("pearson", partial(_numbers, partial(_correlation, pearson_corrcoef)), ("text",)),
        Metric("spearman", partial(_numbers, partial(_correlation, spearman_corrcoef)), ("text",)),
        Metric("readable", _readable, ("text",)),
    )
}
"""The metrics by name.

``accuracy``: share of examples whose chosen candidate counts as right. ``f1``: of the last of two labels; for free text
and listed candidates SQuAD's F1 in words with the best of the right answers, a mean over examples. ``f1_macro``: mean
of the labels' F1. ``matthews``: Matthews' correlation. ``f1a``: MultiRC's F1 over all answers. ``em``: share of answers
that are equal to a right one after SQuAD's normalisation; for tasks with `group` the share of questions with every
answer right. ``drop_f1``, ``drop_em``: DROP's own, where several spans together are one answer. ``rouge1``, ``rouge2``,
``rougeL``: F-measures. ``mae``, ``pearson``, ``spearman``: of the first number in the answer (0 if there is none), and
``readable``, the share of answers that have one.
"""


def get_metric(name: str, task: Task, what: str = "metric") -> Metric:
    """The metric of that name.

    Raises:
        ValueError: If there is none, or it does not fit the task.
    """
    if name not in METRICS:
        near = get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown {what} {name!r}{hint} There are {', '.join(METRICS)}")
    if (reason := METRICS[name].misfit(task)) is not None:
        fit = ", ".join(other for other, metric in METRICS.items() if metric.misfit(task) is None)
        raise ValueError(f"{what} {name!r} does not fit: {reason}. Those that fit are {fit}")
    return METRICS[name]
