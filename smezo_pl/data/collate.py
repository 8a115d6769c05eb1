"""Batches of encoded examples: which examples share rows, and the tensors made of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smezo_pl.data.batch import Calibration, GenerationPrompts, PromptBatch, left_padded
from smezo_pl.data.encoding import Encoded
from smezo_pl.data.packing import PackedRow, common_prefix, pack
from smezo_pl.tasks.task import Loss

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


@dataclass(frozen=True)
class Collate:
    """Makes a :class:`PromptBatch` of encoded examples.

    Args:
        pad_id: The token that fills rows up on the right.
        objective: What the loss is.
        right_only: Leave out all candidates but the right one: a step of the ``lm`` objective reads no other.
        metrics: Names of what is measured.
        num_labels: Number of labels of the task, 0 where they are not shared by all examples.
        reward: A metric or a function that training maximises in the place of the loss.
        max_new_tokens: Most tokens of a generated answer; 0: nothing is generated.
        stop_ids: Tokens that end a generated answer.
        stop: Texts that end a generated answer.
    """

    pad_id: int
    objective: Loss = "classification"
    right_only: bool = False
    metrics: tuple[str, ...] = ()
    num_labels: int = 0
    reward: str | None = None
    max_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __call__(self, examples: Sequence[Encoded]) -> PromptBatch:
        """The batch; its examples are in the order given, its rows in that of their first examples.

        Raises:
            ValueError: For no examples, an unknown label with ``right_only``, or masked and other examples together.
        """
        if not examples:
            raise ValueError("a batch needs at least one example, got none")
        bidirectional = examples[0].bidirectional
        if any(example.bidirectional != bidirectional for example in examples):
            raise ValueError("a batch holds examples with a mask and examples without one")
        content = _Content(len(examples))
        chosen = [self._chosen(example) for example in examples]
        for members in group(examples):
            content.add_row(members, [examples[number] for number in members], [chosen[n] for n in members])
        tokens, candidates = content.in_order()

        width = max(len(row.tokens) for row in content.rows)
        answer_tokens = sum(len(e.candidates[e.label]) for e in examples if e.label >= 0)
        labels = torch.tensor([example.label for example in examples])
        place_row, place_pos = _columns(list(content.places), 2)
        token_place, token_id, token_candidate, token_order = _columns(tokens, 4)
        example_of, place_of, length_of, correct_of = _columns(candidates, 4)
        example_row, example_pos = _columns(content.prompt_ends, 2)
        return PromptBatch(
            input_ids=torch.tensor([row.tokens + [self.pad_id] * (width - len(row.tokens)) for row in content.rows]),
            attention_mask=torch.tensor(
                [[1] * len(row.tokens) + [0] * (width - len(row.tokens)) for row in content.rows]
            ),
            position_ids=torch.tensor([row.depth + [0] * (width - len(row.depth)) for row in content.rows]),
            subtree_end=torch.tensor([row.end + list(range(len(row.end) + 1, width + 1)) for row in content.rows]),
            place_row=place_row,
            place_pos=place_pos,
            token_place=token_place,
            token_id=token_id,
            token_candidate=token_candidate,
            token_order=token_order,
            candidate_example=example_of,
            candidate_index=place_of,
            candidate_tokens=length_of,
            candidate_correct=correct_of.bool(),
            example_row=example_row,
            example_pos=example_pos,
            labels=labels,
            index=torch.tensor([example.index for example in examples]),
            branching=any(row.depth[-1] + 1 < len(row.tokens) for row in content.rows),
            bidirectional=bidirectional,
            longest_candidate=max((length for _, _, length, _ in candidates), default=0),
            num_candidates=max((place + 1 for _, place, _, _ in candidates), default=0),
            answer_tokens=answer_tokens if bool((labels >= 0).all()) else 0,
            objective=self.objective,
            group=torch.tensor([example.example.group if example.example else 0 for example in examples]),
            answers=tuple(example.example.answers if example.example else () for example in examples),
            references=tuple(example.example.references if example.example else () for example in examples),
            metrics=self.metrics,
            num_labels=self.num_labels,
            reward=self.reward,
            prompts=self._prompts(examples),
            calibration=self._calibration(examples),
        )

    def _prompts(self, examples: Sequence[Encoded]) -> GenerationPrompts | None:
        if not self.max_new_tokens:
            return None
        rows = left_padded([example.generated_after for example in examples], self.pad_id)
        return GenerationPrompts(*rows, self.max_new_tokens, self.stop_ids, self.stop, self.pad_id)

    def _calibration(self, examples: Sequence[Encoded]) -> Calibration | None:
        if self.right_only or any(example.calibration is None for example in examples):
            return None
        # Most tasks have one prompt without content, so a batch has a row or two of them.
        different = list(dict.fromkeys(example.calibration for example in examples if example.calibration))
        first, total = {}, 0
        for content_free in different:
            first[content_free] = total
            total += len(content_free[1])
        inner = Collate(self.pad_id)([Encoded(*content_free, 0, (0,), 0) for content_free in different])
        own = [
            first[example.calibration] + place
            for example in examples
            if example.calibration
            for place in range(len(example.candidates))
        ]
        return Calibration(inner, torch.tensor(own))

    def _chosen(self, example: Encoded) -> Sequence[int]:
        if not self.right_only:
            return range(len(example.candidates))
        if example.label < 0:
            raise ValueError(f"row {example.index} has no label, so there is no right candidate to train on")
        return (example.label,)


@dataclass
class _Content:
    """Rows as they are made, and what is scored in them by the number of the example."""

    count: int
    rows: list[PackedRow] = field(default_factory=list)
    # (row, position) of each place, and its number.
    places: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # By example, by candidate: its place among the example's, whether it is right, its tokens and their places.
        self.scored: list[list[tuple[int, bool, tuple[int, ...], list[int]]]] = [[] for _ in range(self.count)]
        self.prompt_ends: list[tuple[int, ...]] = [()] * self.count

    def add_row(self, members: list[int], examples: list[Encoded], chosen: list[Sequence[int]]) -> None:
        number = len(self.rows)
        texts = [
            e.prompt + e.candidates[place][:-1] for e, places in zip(examples, chosen, strict=True) for place in places
        ]
        row, paths = pack([*(example.prompt for example in examples), *texts])
        self.rows.append(row)
        for member, example, places in zip(members, examples, chosen, strict=True):
            last = len(example.prompt) - 1
            self.prompt_ends[member] = (number, paths[example.prompt][-1])
            for place in places:
                tokens = example.candidates[place]
                path = paths[example.prompt + tokens[:-1]]
                # A token is predicted at the one before it, or where the mask stands.
                where = [path[example.mask]] if example.bidirectional else path[last : last + len(tokens)]
                numbers = [self.places.setdefault((number, pos), len(self.places)) for pos in where]
                self.scored[member].append((place, place in example.correct, tokens, numbers))

    def in_order(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Tokens (place, id, candidate, order) and candidates (example, place, length, right) by example."""
        tokens: list[tuple[int, ...]] = []
        candidates: list[tuple[int, ...]] = []
        for number, scored in enumerate(self.scored):
            for place, right, ids, where in scored:
                tokens += (
                    (at, i, len(candidates), order) for order, (at, i) in enumerate(zip(where, ids, strict=True))
                )
                candidates.append((number, place, len(ids), int(right)))
        return tokens, candidates


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> tuple[Tensor, ...]:
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), count).unbind(1)
