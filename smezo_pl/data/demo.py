"""The bundled synthetic dataset: short judgements. No word or phrase of judgement is in two of the three splits."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

_WORDS = json.loads(files("smezo_pl.data").joinpath("demo.json").read_bytes())

VOCABULARIES: dict[str, dict[str, Any]] = _WORDS["splits"]
"""The words of each split: ``things`` of a kind with what can be judged about them, adjectives of ``praise`` and
``blame``, and pairs of a negative and a positive sentence: an ``indirect`` judgement or a ``comparison``."""

SIZES = {"train": 2000, "validation": 500, "test": 1000}
"""Sentences of each split, half of them positive."""

KINDS: dict[str, float] = {"plain": 0.35, "contrast": 0.25, "negation": 0.15, "comparison": 0.1, "indirect": 0.15}
"""The kinds of sentence and their proportions."""

# {same}: an adjective of the sentence's own polarity; {other}: of the opposite one; {a_same}: with its article.
_PATTERNS: dict[str, list[str]] = _WORDS["patterns"]


def demo_rows(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """The sentences of a split.

    Args:
        split: ``train``, ``validation`` or ``test``.
        seed: Another seed makes other sentences of the same words.

    Returns:
        Rows with ``sentence``, ``label`` (0 negative, 1 positive), ``kind`` (see `KINDS`), all different, labels
        balanced.

    Raises:
        ValueError: For another split.
    """
    if split not in VOCABULARIES:
        raise ValueError(f"split of the demo set must be one of {', '.join(VOCABULARIES)}, got {split!r}")
    random = np.random.RandomState([seed, list(VOCABULARIES).index(split)])
    kinds, thresholds = list(KINDS), np.cumsum(list(KINDS.values()))
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < SIZES[split]:
        label = len(rows) % 2
        kind = kinds[int(np.searchsorted(thresholds, random.random_sample() * thresholds[-1], side="right"))]
        sentence = _sentence(VOCABULARIES[split], kind, label, random)
        rows.setdefault(sentence, {"sentence": sentence, "label": label, "kind": kind})
    return list(rows.values())


def _sentence(words: dict[str, Any], kind: str, label: int, random: np.random.RandomState) -> str:
    def choose(options: Sequence[str], number: int) -> list[str]:
        return [options[index] for index in random.permutation(len(options))[:number]]

    (thing,) = choose(list(words["things"]), 1)
    aspect, aspect2 = choose(words["things"][thing], 2)
    same, same2 = choose(words["praise" if label else "blame"], 2)
    (other,) = choose(words["blame" if label else "praise"], 1)
    patterns = _PATTERNS[kind] if kind in _PATTERNS else [pair[label] for pair in words[kind]]
    (pattern,) = choose(patterns, 1)
    adjectives = {"same": same, "same2": same2, "other": other}
    articles = {f"a_{name}": f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for name, word in adjectives.items()}
    return pattern.format(thing=thing, aspect=aspect, aspect2=aspect2, **adjectives, **articles)
