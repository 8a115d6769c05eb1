"""The demo set: synthetic sentences of praise and blame, made by a small grammar of this package.

It is synthetic: nobody said these sentences of anything. It is there so that a first run needs no download. Its test
sentences use none of the training sentences' words of judgement and speak partly of other things, so what a model
gains on them is not a list of words learnt by heart.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smezo_pl.data.demo_words import VOCABULARIES, Vocabulary

SIZES = {"train": 2000, "validation": 500, "test": 1000}
"""Sentences of each split, half of them positive."""

# {same}: an adjective of the sentence's own polarity; {other}: of the opposite one; {a_same}: with its article.
_PLAIN = (
    "The {aspect} of this {thing} was {same}.",
    "This was {a_same} {thing} with {a_same2} {aspect}.",
    "We found the {aspect} {same} and the {aspect2} {same2}.",
    "I must say that the {aspect} is really {same}.",
    "Everything about this {thing} is {same}, the {aspect} above all.",
    "My sister calls the {thing} {same}, and she is right.",
)
_NEGATION = (
    "The {aspect} was not {other} at all.",
    "There was nothing {other} about the {aspect}.",
    "This {thing} was far from {other}.",
    "I would not call the {aspect} {other}.",
    "Far from being {other}, the {aspect} was {same}.",
    "Instead of {a_other} {thing} we got {a_same} one.",
)
_CONTRAST = (
    "The {aspect} was {other}, but the {thing} as a whole was {same}.",
    "I expected {a_other} {thing}, but it turned out to be {same}.",
    "Despite {a_other} {aspect}, this was {a_same} {thing}.",
    "The {aspect} seemed {other} at first but was {same} in the end.",
    "People had told me that the {thing} was {other}, yet I found it {same}.",
)

KINDS: dict[str, float] = {"plain": 0.35, "contrast": 0.25, "negation": 0.15, "comparison": 0.1, "indirect": 0.15}
"""The kinds of sentence and their shares."""


def demo_rows(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """The sentences of a split.

    Args:
        split: ``train``, ``validation`` or ``test``.
        seed: Another seed makes other sentences of the same words.

    Returns:
        Rows with ``sentence``, ``label`` (0 negative, 1 positive), ``kind`` (see :data:`KINDS`), all different, labels
        balanced.

    Raises:
        ValueError: For another split.
    """
    if split not in VOCABULARIES:
        raise ValueError(f"split of the demo set must be one of {', '.join(VOCABULARIES)}, got {split!r}")
    random = np.random.RandomState([seed, list(VOCABULARIES).index(split)])

    def choose(options: Sequence[str], number: int = 1) -> list[str]:
        places = random.permutation(len(options))[:number]
        return [options[place] for place in places]

    kinds, shares = list(KINDS), np.cumsum(list(KINDS.values()))
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    while len(rows) < SIZES[split]:
        label = len(rows) % 2
        kind = kinds[int(np.searchsorted(shares, random.random_sample() * shares[-1], side="right"))]
        sentence = _sentence(VOCABULARIES[split], kind, label == 1, choose)
        if sentence not in seen:
            seen.add(sentence)
            rows.append({"sentence": sentence, "label": label, "kind": kind})
    return rows


def _sentence(words: Vocabulary, kind: str, positive: bool, choose: Callable[..., list[str]]) -> str:
    (thing,) = choose(list(words.things))
    aspect, aspect2 = choose(words.things[thing], 2)
    same, same2 = choose(words.praise if positive else words.blame, 2)
    (other,) = choose(words.blame if positive else words.praise)
    patterns = {
        "plain": _PLAIN,
        "negation": _NEGATION,
        "contrast": _CONTRAST,
        "comparison": words.preferred if positive else words.outdone,
        "indirect": words.praised if positive else words.blamed,
    }[kind]
    (pattern,) = choose(patterns)
    return pattern.format(
        thing=thing,
        aspect=aspect,
        aspect2=aspect2,
        same=same,
        same2=same2,
        other=other,
        a_same=_with_article(same),
        a_same2=_with_article(same2),
        a_other=_with_article(other),
    )


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
