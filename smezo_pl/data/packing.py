"""Token sequences that begin alike, laid out in one row so that what they share is read once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


def common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with alike."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass
class PackedRow:
    """A tree of tokens in depth-first order: every branch stands after the tokens that it goes on from.

    Token ``j`` goes before token ``i`` in some sequence, or is that token, exactly if ``j <= i < end[j]``.

    Attributes:
        tokens: The tokens.
        depth: Number of tokens before each one in its sequence: its position.
        end: The place after the last token that follows from each one.
    """

    tokens: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)


def pack(sequences: Iterable[tuple[int, ...]]) -> tuple[PackedRow, dict[tuple[int, ...], list[int]]]:
    """Lay sequences out as one row.

    Args:
        sequences: Not empty; equal ones count once, and one that begins another takes no place of its own.

    Returns:
        The row, and for each sequence the places of its tokens in the row.
    """
    row, paths = PackedRow(), {}
    before: tuple[int, ...] = ()
    path: list[int] = []
    # In this order a sequence stands beside the one that it shares most with, and after those that begin it.
    for sequence in sorted(set(sequences)):
        shared = common_prefix(before, sequence)
        first = len(row.tokens)
        path = path[:shared] + list(range(first, first + len(sequence) - shared))
        row.tokens += sequence[shared:]
        row.depth += range(shared, len(sequence))
        row.end += [0] * (len(sequence) - shared)
        for place in path:
            row.end[place] = max(row.end[place], path[-1] + 1)
        paths[sequence] = path
        before = sequence
    return row, paths


def tree_size(sequences: Iterable[tuple[int, ...]]) -> int:
    """The number of tokens of the row that `pack` makes."""
    size = 0
    before: tuple[int, ...] = ()
    for sequence in sorted(set(sequences)):
        size += len(sequence) - common_prefix(before, sequence)
        before = sequence
    return size
