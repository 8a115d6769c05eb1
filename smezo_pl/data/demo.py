"""The words of the synthetic demo set. No word or phrase of judgement is in two of the three splits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Vocabulary:
    """What one split is made of.

    Attributes:
        things: A kind of thing and what can be judged about it.
        praise: Positive adjectives.
        blame: Negative adjectives.
        praised: Positive sentences without any adjective of judgement.
        blamed: Negative ones.
        preferred: Comparisons in favour.
        outdone: Comparisons against.
    """

    things: dict[str, tuple[str, ...]]
    praise: tuple[str, ...]
    blame: tuple[str, ...]
    praised: tuple[str, ...]
    blamed: tuple[str, ...]
    preferred: tuple[str, ...]
    outdone: tuple[str, ...]


TRAIN = Vocabulary(
    things={
        "film": ("acting", "plot", "ending", "soundtrack", "dialogue"),
        "restaurant": ("soup", "service", "menu", "bread", "dessert"),
        "hotel": ("room", "breakfast", "view", "staff", "bathroom"),
        "phone": ("screen", "battery", "camera", "keyboard", "speaker"),
        "novel": ("opening", "style", "hero", "last chapter", "translation"),
        "album": ("singing", "guitar", "production", "first song", "cover"),
    },
    praise=(
        "superb", "delightful", "brilliant", "outstanding", "charming", "lovely", "impressive", "excellent",
        "enjoyable", "splendid", "beautiful", "remarkable", "pleasant", "fantastic", "perfect", "elegant",
        "first-rate", "refreshing", "memorable", "flawless", "graceful", "gorgeous", "clever", "masterful",
    ),
    blame=(
        "awful", "dreadful", "dull", "disappointing", "poor", "annoying", "horrible", "lousy",
        "boring", "shoddy", "unpleasant", "tedious", "clumsy", "frustrating", "miserable", "ugly",
        "third-rate", "sloppy", "forgettable", "pathetic", "hopeless", "painful", "stupid", "lifeless",
    ),
    praised=(
        "I told all my friends about this {thing}.",
        "We came home from the {thing} with big smiles.",
        "I wish I could experience this {thing} for the first time again.",
        "The {aspect} made my day.",
        "Everyone around me loved the {aspect}.",
        "Whoever is responsible for the {aspect} deserves a prize.",
        "This {thing} was worth every penny.",
        "I could not stop praising the {aspect}.",
    ),
    blamed=(
        "I warned all my friends about this {thing}.",
        "We came home from the {thing} in a bad mood.",
        "I wish I had never heard of this {thing}.",
        "The {aspect} ruined my day.",
        "Everyone around me hated the {aspect}.",
        "Whoever is responsible for the {aspect} should apologise.",
        "This {thing} was a waste of money.",
        "I could not stop complaining about the {aspect}.",
    ),
    preferred=(
        "The {aspect} is better than in any other {thing} I know.",
        "No {thing} has ever pleased me more.",
        "This {thing} sets the standard for all others.",
        "It has been years since I liked any {thing} this much.",
    ),
    outdone=(
        "The {aspect} is worse than in any other {thing} I know.",
        "No {thing} has ever annoyed me more.",
        "This {thing} is the worst of its kind.",
        "It has been years since I disliked any {thing} this much.",
    ),
)  # fmt: skip

VALIDATION = Vocabulary(
    things={
        "film": ("story", "editing", "cast"),
        "restaurant": ("salad", "waiter", "coffee"),
        "museum": ("exhibition", "guided tour", "gift shop"),
        "laptop": ("touchpad", "display", "fan"),
    },
    praise=(
        "wonderful", "marvellous", "stunning", "inspiring", "exquisite", "satisfying", "amazing", "admirable",
        "magical", "terrific", "captivating", "polished",
    ),
    blame=(
        "abysmal", "tiresome", "unbearable", "irritating", "wretched", "ridiculous", "depressing", "appalling",
        "useless", "bland", "careless", "disgusting",
    ),
    praised=(
        "I keep thinking back to the {aspect} with joy.",
        "My whole family still raves about this {thing}.",
        "The {aspect} brightened the whole week.",
        "The {aspect} put me in high spirits.",
    ),
    blamed=(
        "I keep thinking back to the {aspect} with anger.",
        "My whole family still grumbles about this {thing}.",
        "The {aspect} spoiled the whole week.",
        "The {aspect} gave me a headache.",
    ),
    preferred=(
        "Of all I have tried, this {thing} is at the top of my list.",
        "The {aspect} surpassed that of every {thing} before.",
    ),
    outdone=(
        "Of all I have tried, this {thing} is at the bottom of my list.",
        "The {aspect} fell behind that of every {thing} before.",
    ),
)  # fmt: skip

TEST = Vocabulary(
    things={
        "novel": ("narrator", "pacing", "humour"),
        "hotel": ("bed", "garden", "reception"),
        "concert": ("sound", "opening act", "venue"),
        "course": ("teacher", "homework", "textbook"),
        "video game": ("tutorial", "world map", "final level"),
        "bakery": ("bread", "apple cake", "seating"),
    },
    praise=(
        "magnificent", "fabulous", "phenomenal", "heartwarming", "sublime", "rewarding", "incredible", "dazzling",
        "exceptional", "joyful", "thrilling", "glorious", "uplifting", "fascinating", "lively", "spectacular",
    ),
    blame=(
        "atrocious", "abominable", "dismal", "pointless", "repulsive", "laughable", "worthless", "dreary",
        "inept", "gloomy", "insufferable", "shabby", "horrendous", "mind-numbing", "infuriating", "disastrous",
    ),
    praised=(
        "I have already booked this {thing} for next year.",
        "The {aspect} exceeded all my hopes.",
        "I was grateful for the {aspect}.",
        "This {thing} left us glowing with happiness.",
        "I would happily recommend this {thing} to anyone.",
        "The {aspect} had us cheering.",
    ),
    blamed=(
        "I have already asked this {thing} for a refund.",
        "The {aspect} failed in every way.",
        "I was ashamed of the {aspect}.",
        "This {thing} left us shaking our heads in disbelief.",
        "I would not recommend this {thing} to anyone.",
        "The {aspect} had us yawning.",
    ),
    preferred=(
        "I cannot wait to come back to this {thing}.",
        "I have never come across a finer {thing}.",
        "The {aspect} outshines every other that I have known.",
    ),
    outdone=(
        "I will never come back to this {thing}.",
        "I have never come across a sorrier {thing}.",
        "The {aspect} is inferior to every other that I have known.",
    ),
)  # fmt: skip

VOCABULARIES: dict[str, Vocabulary] = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


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
