"""The bundled synthetic dataset: short judgements. No word or phrase of judgement is in two of the three splits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Vocabulary(NamedTuple):
    """The words of one split; of pairs the first is negative, the second positive."""

    things: dict[str, tuple[str, ...]]  # a kind of thing, and what can be judged about it
    praise: str  # adjectives
    blame: str
    indirect: tuple[tuple[str, str], ...]  # without an adjective of judgement
    comparison: tuple[tuple[str, str], ...]


VOCABULARIES: dict[str, Vocabulary] = {}

# fmt: off
VOCABULARIES["train"] = Vocabulary(
    things={
        "film": ("acting", "plot", "ending", "soundtrack", "dialogue"),
        "restaurant": ("soup", "service", "menu", "bread", "dessert"),
        "hotel": ("room", "breakfast", "view", "staff", "bathroom"),
        "phone": ("screen", "battery", "camera", "keyboard", "speaker"),
        "novel": ("opening", "style", "hero", "last chapter", "translation"),
        "album": ("singing", "guitar", "production", "first song", "cover"),
    },
    praise=(
        "superb delightful brilliant outstanding charming lovely impressive excellent enjoyable splendid beautiful "
        "remarkable pleasant fantastic perfect elegant first-rate refreshing memorable flawless graceful gorgeous "
        "clever masterful"
    ),
    blame=(
        "awful dreadful dull disappointing poor annoying horrible lousy boring shoddy unpleasant tedious clumsy "
        "frustrating miserable ugly third-rate sloppy forgettable pathetic hopeless painful stupid lifeless"
    ),
    indirect=(
        ("I warned all my friends about this {thing}.", "I told all my friends about this {thing}."),
        ("We came home from the {thing} in a bad mood.", "We came home from the {thing} with big smiles."),
        ("I wish I had never heard of this {thing}.",
         "I wish I could experience this {thing} for the first time again."),
        ("The {aspect} ruined my day.", "The {aspect} made my day."),
        ("Everyone around me hated the {aspect}.", "Everyone around me loved the {aspect}."),
        ("Whoever is responsible for the {aspect} should apologise.",
         "Whoever is responsible for the {aspect} deserves a prize."),
        ("This {thing} was a waste of money.", "This {thing} was worth every penny."),
        ("I could not stop complaining about the {aspect}.", "I could not stop praising the {aspect}."),
    ),
    comparison=(
        ("The {aspect} is worse than in any other {thing} I know.",
         "The {aspect} is better than in any other {thing} I know."),
        ("No {thing} has ever annoyed me more.", "No {thing} has ever pleased me more."),
        ("This {thing} is the worst of its kind.", "This {thing} sets the standard for all others."),
        ("It has been years since I disliked any {thing} this much.",
         "It has been years since I liked any {thing} this much."),
    ),
)

VOCABULARIES["validation"] = Vocabulary(
    things={
        "film": ("story", "editing", "cast"),
        "restaurant": ("salad", "waiter", "coffee"),
        "museum": ("exhibition", "guided tour", "gift shop"),
        "laptop": ("touchpad", "display", "fan"),
    },
    praise=(
        "wonderful marvellous stunning inspiring exquisite satisfying amazing admirable magical terrific captivating "
        "polished"
    ),
    blame=(
        "abysmal tiresome unbearable irritating wretched ridiculous depressing appalling useless bland careless "
        "disgusting"
    ),
    indirect=(
        ("I keep thinking back to the {aspect} with anger.", "I keep thinking back to the {aspect} with joy."),
        ("My whole family still grumbles about this {thing}.", "My whole family still raves about this {thing}."),
        ("The {aspect} spoiled the whole week.", "The {aspect} brightened the whole week."),
        ("The {aspect} gave me a headache.", "The {aspect} put me in high spirits."),
    ),
    comparison=(
        ("Of all I have tried, this {thing} is at the bottom of my list.",
         "Of all I have tried, this {thing} is at the top of my list."),
        ("The {aspect} fell behind that of every {thing} before.",
         "The {aspect} surpassed that of every {thing} before."),
    ),
)

VOCABULARIES["test"] = Vocabulary(
    things={
        "novel": ("narrator", "pacing", "humour"),
        "hotel": ("bed", "garden", "reception"),
        "concert": ("sound", "opening act", "venue"),
        "course": ("teacher", "homework", "textbook"),
        "video game": ("tutorial", "world map", "final level"),
        "bakery": ("bread", "apple cake", "seating"),
    },
    praise=(
        "magnificent fabulous phenomenal heartwarming sublime rewarding incredible dazzling exceptional joyful "
        "thrilling glorious uplifting fascinating lively spectacular"
    ),
    blame=(
        "atrocious abominable dismal pointless repulsive laughable worthless dreary inept gloomy insufferable shabby "
        "horrendous mind-numbing infuriating disastrous"
    ),
    indirect=(
        ("I have already asked this {thing} for a refund.", "I have already booked this {thing} for next year."),
        ("The {aspect} failed in every way.", "The {aspect} exceeded all my hopes."),
        ("I was ashamed of the {aspect}.", "I was grateful for the {aspect}."),
        ("This {thing} left us shaking our heads in disbelief.", "This {thing} left us glowing with happiness."),
        ("I would not recommend this {thing} to anyone.", "I would happily recommend this {thing} to anyone."),
        ("The {aspect} had us yawning.", "The {aspect} had us cheering."),
    ),
    comparison=(
        ("I will never come back to this {thing}.", "I cannot wait to come back to this {thing}."),
        ("I have never come across a sorrier {thing}.", "I have never come across a finer {thing}."),
        ("The {aspect} is inferior to every other that I have known.",
         "The {aspect} outshines every other that I have known."),
    ),
)
# fmt: on

SIZES = {"train": 2000, "validation": 500, "test": 1000}
"""Sentences of each split, half of them positive."""

KINDS: dict[str, float] = {"plain": 0.35, "contrast": 0.25, "negation": 0.15, "comparison": 0.1, "indirect": 0.15}
"""The kinds of sentence and their proportions."""

# {same}: an adjective of the sentence's own polarity; {other}: of the opposite one; {a_same}: with its article.
_PATTERNS = {
    "plain": (
        "The {aspect} of this {thing} was {same}.",
        "This was {a_same} {thing} with {a_same2} {aspect}.",
        "We found the {aspect} {same} and the {aspect2} {same2}.",
        "I must say that the {aspect} is really {same}.",
        "Everything about this {thing} is {same}, the {aspect} above all.",
        "My sister calls the {thing} {same}, and she is right.",
    ),
    "negation": (
        "The {aspect} was not {other} at all.",
        "There was nothing {other} about the {aspect}.",
        "This {thing} was far from {other}.",
        "I would not call the {aspect} {other}.",
        "Far from being {other}, the {aspect} was {same}.",
        "Instead of {a_other} {thing} we got {a_same} one.",
    ),
    "contrast": (
        "The {aspect} was {other}, but the {thing} as a whole was {same}.",
        "I expected {a_other} {thing}, but it turned out to be {same}.",
        "Despite {a_other} {aspect}, this was {a_same} {thing}.",
        "The {aspect} seemed {other} at first but was {same} in the end.",
        "People had told me that the {thing} was {other}, yet I found it {same}.",
    ),
}


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
    kinds, thresholds = list(KINDS), np.cumsum(list(KINDS.values()))
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < SIZES[split]:
        label = len(rows) % 2
        kind = kinds[int(np.searchsorted(thresholds, random.random_sample() * thresholds[-1], side="right"))]
        sentence = _sentence(VOCABULARIES[split], kind, label, random)
        rows.setdefault(sentence, {"sentence": sentence, "label": label, "kind": kind})
    return list(rows.values())


def _sentence(words: Vocabulary, kind: str, label: int, random: np.random.RandomState) -> str:
    def choose(options: Sequence[str], number: int) -> list[str]:
        return [options[index] for index in random.permutation(len(options))[:number]]

    (thing,) = choose(list(words.things), 1)
    aspect, aspect2 = choose(words.things[thing], 2)
    same, same2 = choose((words.praise if label else words.blame).split(), 2)
    (other,) = choose((words.blame if label else words.praise).split(), 1)
    patterns = _PATTERNS[kind] if kind in _PATTERNS else [pair[label] for pair in getattr(words, kind)]
    (pattern,) = choose(patterns, 1)
    adjectives = {"same": same, "same2": same2, "other": other}
    articles = {f"a_{name}": f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for name, word in adjectives.items()}
    return pattern.format(thing=thing, aspect=aspect, aspect2=aspect2, **adjectives, **articles)
