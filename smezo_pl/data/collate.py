"""From tokens to a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smezo_pl.data.batch import PromptBatch
from smezo_pl.data.encoding import Encoded, fed_rows
from smezo_pl.tasks.task import Objective


@dataclass(frozen=True)
class Collate:
    """Makes a :class:`PromptBatch` of encoded examples.

    Args:
        pad_id: The token that fills rows up on the left.
        objective: What the batch is for.
        right_only: Leave out all candidates but the right one: a step of the ``lm`` objective reads no other.
    """

    pad_id: int
    objective: Objective = "classification"
    right_only: bool = False

    def __call__(self, examples: Sequence[Encoded]) -> PromptBatch:
        """The batch.

        Raises:
            ValueError: For no examples, or an unknown label with ``right_only``.
        """
        if not examples:
            raise ValueError("a batch needs at least one example, got none")
        rows: list[tuple[int, ...]] = []
        tokens: list[tuple[int, int, int, int, int]] = []  # row, position from the row's end, id, candidate, order
        candidates: list[tuple[int, int, int, bool]] = []  # example, index, number of tokens, correct
        answer_tokens = 0
        for number, example in enumerate(examples):
            chosen = self._chosen(example)
            fed = fed_rows([example.candidates[place] for place in chosen])
            for place in chosen:
                candidate = example.candidates[place]
                row = next(i for i, tail in enumerate(fed) if tail[: len(candidate) - 1] == candidate[:-1])
                # The first token is predicted at the prompt's last one, `len(fed[row])` before the row's end.
                tokens += (
                    (len(rows) + row, len(fed[row]) - order, token, len(candidates), order)
                    for order, token in enumerate(candidate)
                )
                candidates.append((number, place, len(candidate), place in example.correct))
            rows += (example.prompt + tail for tail in fed)
            answer_tokens += len(example.candidates[example.label]) if example.label >= 0 else 0

        width = max(map(len, rows))
        keep = 1 + max(from_end for _, from_end, *_ in tokens)
        input_ids = torch.tensor([(self.pad_id,) * (width - len(row)) + row for row in rows])
        start = torch.tensor([width - len(row) for row in rows]).unsqueeze(1)
        places = torch.arange(width).unsqueeze(0) - start
        token_row, from_end, token_id, token_candidate, token_order = torch.tensor(tokens).unbind(1)
        example_of, place_of, length_of, correct_of = torch.tensor(candidates).unbind(1)
        labels = torch.tensor([example.label for example in examples])
        return PromptBatch(
            input_ids=input_ids,
            attention_mask=(places >= 0).long(),
            position_ids=places.clamp_min(0),
            token_row=token_row,
            token_pos=keep - 1 - from_end,
            token_id=token_id,
            token_candidate=token_candidate,
            token_order=token_order,
            candidate_example=example_of,
            candidate_index=place_of,
            candidate_tokens=length_of,
            candidate_correct=correct_of.bool(),
            labels=labels,
            index=torch.tensor([example.index for example in examples]),
            logits_to_keep=keep,
            num_candidates=int(place_of.max()) + 1,
            answer_tokens=answer_tokens if bool((labels >= 0).all()) else 0,
            objective=self.objective,
        )

    def _chosen(self, example: Encoded) -> Sequence[int]:
        if not self.right_only:
            return range(len(example.candidates))
        if example.label < 0:
            raise ValueError(f"row {example.index} has no label, so there is no right candidate to train on")
        return (example.label,)
