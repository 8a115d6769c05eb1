"""Token sequences with common prefixes: which ones share a row, and the row, in which a common prefix is read once."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIN_SHARED = 32
"""Fewest tokens of a common prefix worth sharing: below, a mask over the row costs more than it saves."""

_ATTENTION = 2000
"""Length at which attention costs as much as the rest of a layer: 1,500 to 2,000 in a model of 135M, more in larger."""


def common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def group_by_prefix(
    prompts: Sequence[tuple[int, ...]], sizes: Sequence[int], max_tokens: int | None = None
) -> list[list[int]]:
    """Indices of the prompts that go into one row each, all of them once.

    A row with a prefix of P tokens and its branches costs, in units of a token, its length T for the layers and
    ``T^2 / A`` for attention, and carries ``T - P`` tokens of branches. The cost per branch is least at
    ``T = P + sqrt(P^2 + P A)``, where a row ends and the next begins.

    ``sizes`` are the tokens that each prompt takes in a row of its own, what follows it included; no group grows beyond
    ``max_tokens``. Groups come by their smallest index; most hold one prompt.
    """
    groups: list[list[int]] = []
    size, limit = 0, 0.0
    previous: tuple[int, ...] = ()
    for index in sorted(range(len(prompts)), key=lambda index: (prompts[index], index)):
        shared = common_prefix(previous, prompts[index])
        previous = prompts[index]
        if shared >= MIN_SHARED:
            if len(groups[-1]) == 1:
                best = shared + math.sqrt(shared * shared + shared * _ATTENTION)
                limit = best if max_tokens is None else min(best, max_tokens)
            if size + sizes[index] - shared <= limit:
                groups[-1].append(index)
                size += sizes[index] - shared
                continue
        groups.append([index])
        size = sizes[index]
    return sorted(groups, key=min)


@dataclass
class PackedRow:
    """A tree of tokens in depth-first order: every branch comes after the tokens that it continues."""

    tokens: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)  # number of tokens before each one in its sequence
    end: list[int] = field(default_factory=list)  # j precedes i in some sequence, or is i, exactly if j <= i < end[j]


def pack(sequences: Iterable[tuple[int, ...]]) -> tuple[PackedRow, dict[tuple[int, ...], list[int]]]:
    """Sequences, none of them empty, as one row, and for each one the indices of its tokens in the row.

    Equal ones count once, and a prefix of another adds no tokens.
    """
    row, paths = PackedRow(), {}
    previous: tuple[int, ...] = ()
    path: list[int] = []
    # Sorted, a sequence comes right after the one that it shares most with, and after its own prefixes.
    for sequence in sorted(set(sequences)):
        shared = common_prefix(previous, sequence)
        first = len(row.tokens)
        path = path[:shared] + list(range(first, first + len(sequence) - shared))
        row.tokens += sequence[shared:]
        row.depth += range(shared, len(sequence))
        row.end += [0] * (len(sequence) - shared)
        for index in path:
            row.end[index] = max(row.end[index], path[-1] + 1)
        paths[sequence] = path
        previous = sequence
    return row, paths


def tree_size(sequences: Iterable[tuple[int, ...]]) -> int:
    """The number of tokens in the row that `pack` makes."""
    size = 0
    previous: tuple[int, ...] = ()
    for sequence in sorted(set(sequences)):
        size += len(sequence) - common_prefix(previous, sequence)
        previous = sequence
    return size
