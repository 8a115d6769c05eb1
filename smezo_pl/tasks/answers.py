"""What a model answered to one example, and what would have been right: what metrics and rewards are made of."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answered:
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


def gathered(answers: list[Answered]) -> list[Answered]:
    """The answers of all processes in the order of their rows, each once; the same on every process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts: list[list[Answered]] = [[] for _ in range(torch.distributed.get_world_size())]
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
) -> list[Answered]:
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
        Answered(row, names[n][place], references[n], place, label, correct, number)
        for n, (place, correct, label, row, number) in enumerate(zip(*columns, strict=True))
    ]
