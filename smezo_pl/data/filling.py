"""Evaluation batches: neighbours together, alike in length, filled up to a limit."""

from collections.abc import Sequence
from dataclasses import dataclass

from smezo_pl.data.encoding import Encoded
from smezo_pl.data.forest import tree_size
from smezo_pl.data.grouping import group


@dataclass(frozen=True)
class BatchLimit:
    """How much a forward may read in evaluation.

    Args:
        rows: Most texts, a candidate that does not begin another counting as one; no limit if None.
        tokens: Most tokens, padding included; no limit if None.
    """

    rows: int | None = None
    tokens: int | None = None


def fill(examples: Sequence[Encoded], limit: BatchLimit) -> list[list[int]]:
    """Numbers of the examples of each batch, the batches with the longest rows first.

    Examples that share a row (`smezo_pl.data.grouping`) are in one batch, unless they are more than the limit. A single
    example with more than that is a batch of its own.
    """
    units = [unit for members in group(examples, limit.tokens) for unit in _within(examples, members, limit.rows)]
    lengths = [_row_length(examples, unit) for unit in units]
    batches: list[list[int]] = []
    rows = texts = width = 0
    # Longest first: too little memory shows at once, and the progress bar's time left is never too short.
    for number in sorted(range(len(units)), key=lambda number: -lengths[number]):
        more = sum(examples[member].rows for member in units[number])
        full = (limit.rows is not None and texts + more > limit.rows) or (
            limit.tokens is not None and (rows + 1) * width > limit.tokens
        )
        if not batches or full:
            batches.append([])
            rows, texts, width = 0, 0, lengths[number]
        batches[-1] += units[number]
        rows, texts = rows + 1, texts + more
    return batches


def _within(examples: Sequence[Encoded], members: list[int], rows: int | None) -> list[list[int]]:
    """A group cut where it holds more texts than a batch may."""
    units: list[list[int]] = []
    texts = 0
    for member in members:
        more = examples[member].rows
        if not units or (rows is not None and texts + more > rows):
            units.append([])
            texts = 0
        units[-1].append(member)
        texts += more
    return units


def _row_length(examples: Sequence[Encoded], members: list[int]) -> int:
    if len(members) == 1:
        return examples[members[0]].tokens
    shared = (examples[m].prompt + tokens[:-1] for m in members for tokens in examples[m].candidates)
    return tree_size([*shared, *(examples[m].prompt for m in members)])
