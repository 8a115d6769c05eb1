"""From tokens to a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smezo_pl.data.batch import PromptBatch
from smezo_pl.data.encoding import Encoded, fed_rows
from smezo_pl.data.extras import Calibration, GenerationPrompts, left_padded
from smezo_pl.tasks.task import Loss


@dataclass(frozen=True)
class Collate:
    """Makes a :class:`PromptBatch` of encoded examples.

    Args:
        pad_id: The token that fills rows up on the left.
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
            # A free answer that is not known has no candidate to score, and its prompt is a row all the same.
            rows += (example.prompt + tail for tail in fed or [()])
            answer_tokens += len(example.candidates[example.label]) if example.label >= 0 else 0

        keep = 1 + max((from_end for _, from_end, *_ in tokens), default=0)
        input_ids, attention_mask = left_padded(rows, self.pad_id)
        token_row, from_end, token_id, token_candidate, token_order = (
            torch.tensor(tokens, dtype=torch.long).reshape(-1, 5).unbind(1)
        )
        example_of, place_of, length_of, correct_of = (
            torch.tensor(candidates, dtype=torch.long).reshape(-1, 4).unbind(1)
        )
        labels = torch.tensor([example.label for example in examples])
        return PromptBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp_min(0),
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
            num_candidates=int(place_of.max()) + 1 if len(place_of) else 0,
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


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> tuple[torch.Tensor, ...]:
    return torch.tensor(rows, dtype=torch.long).reshape(-1, count).unbind(1)
