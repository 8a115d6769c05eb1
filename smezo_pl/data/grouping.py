"""Neighbours that share a passage: which examples are read in one row."""

import math
from collections.abc import Sequence

from smezo_pl.data.encoding import Encoded
from smezo_pl.data.forest import common_prefix

LEAST_SHARED = 32
"""Tokens that neighbours must begin with alike: below, a mask over the row costs more than it saves."""

_ATTENTION = 2000
"""Length at which attention costs as much as the rest of a layer: 1,500 to 2,000 in a model of 135M, more in larger."""


def group(examples: Sequence[Encoded], max_tokens: int | None = None) -> list[list[int]]:
    """Numbers of the examples that go into one row each, all of them once.

    A row with a passage of P tokens and its branches costs, in units of a token, its length T for the layers and
    ``T^2 / A`` for attention, and carries ``T - P`` tokens of branches. Per branch that is least at
    ``T = P + sqrt(P^2 + P A)``, where a row ends and the next begins.

    Args:
        examples: The examples, in any order; a group keeps the order of its members' prompts.
        max_tokens: No group grows beyond it.

    Returns:
        Groups by the number of their first member; most hold one example.
    """
    order = sorted(range(len(examples)), key=lambda number: (examples[number].prompt, number))
    groups: list[list[int]] = []
    size, limit = 0, 0.0
    for before, number in zip([None, *order], order, strict=False):
        example = examples[number]
        shared = 0 if before is None else common_prefix(examples[before].prompt, example.prompt)
        if groups and not example.bidirectional and shared >= LEAST_SHARED:
            if len(groups[-1]) == 1:
                best = shared + math.sqrt(shared * shared + shared * _ATTENTION)
                limit = best if max_tokens is None else min(best, max_tokens)
            if size + example.tokens - shared <= limit:
                groups[-1].append(number)
                size += example.tokens - shared
                continue
        groups.append([number])
        size = example.tokens
    return sorted(groups, key=min)
