"""A batch of examples as tensors: rows that the model reads, and the places where candidates are scored."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from smezo_pl.data.extras import Calibration, GenerationPrompts
from smezo_pl.tasks.task import Loss


@dataclass
class PromptBatch:
    """N examples with K candidates in R rows of T tokens, scored at S places.

    A row holds a prompt and the tokens of a candidate but its last one, which is never needed as input. Candidates of
    one example share a row where one's tokens begin the other's, so one-token candidates take one row an example.

    Attributes:
        input_ids: int64 ``[R, T]``, padded on the left.
        attention_mask: int64 ``[R, T]``, 0 on padding.
        position_ids: int64 ``[R, T]``, 0 at a row's first token.
        token_row: int64 ``[S]``, the row of each scored token.
        token_pos: int64 ``[S]``, where it is predicted, among the last ``logits_to_keep`` positions of its row.
        token_id: int64 ``[S]``, the token.
        token_candidate: int64 ``[S]``, its candidate, 0 to K - 1.
        token_order: int64 ``[S]``, its place in its candidate.
        candidate_example: int64 ``[K]``, the candidate's example, 0 to N - 1.
        candidate_index: int64 ``[K]``, its place among its example's candidates.
        candidate_tokens: int64 ``[K]``, the number of its tokens.
        candidate_correct: bool ``[K]``, whether it counts as right (several may).
        labels: int64 ``[N]``, place of the right candidate, the one that is trained on; -1 if unknown.
        index: int64 ``[N]``, the example's row in its data set.
        logits_to_keep: Number of positions at the end of the rows that logits are needed for.
        num_candidates: The most candidates that an example has.
        answer_tokens: Tokens of the right candidates, all together; 0 if a label is unknown.
        objective: What the loss is: ``"classification"`` or ``"lm"``.
        group: int64 ``[N]``, a number that all answers to one question share; None for no groups.
        answers: What each candidate of each example is called in metrics on texts.
        references: The right answers of each example as texts.
        metrics: Names of what is measured.
        num_labels: Number of labels of the task, 0 where they are not shared by all examples.
        reward: A metric's name or a function's import path that training maximises in the place of the loss.
        prompts: What answers are generated after; None where nothing is generated.
        calibration: The candidates after prompts without content; None for scores that are not calibrated.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    token_row: Tensor
    token_pos: Tensor
    token_id: Tensor
    token_candidate: Tensor
    token_order: Tensor
    candidate_example: Tensor
    candidate_index: Tensor
    candidate_tokens: Tensor
    candidate_correct: Tensor
    labels: Tensor
    index: Tensor
    logits_to_keep: int
    num_candidates: int
    answer_tokens: int
    objective: Loss
    group: Tensor | None = None
    answers: tuple[tuple[str, ...], ...] = ()
    references: tuple[tuple[str, ...], ...] = ()
    metrics: tuple[str, ...] = ()
    num_labels: int = 0
    reward: str | None = None
    prompts: GenerationPrompts | None = None
    calibration: Calibration | None = None

    def __len__(self) -> int:
        """The number of examples."""
        return self.labels.shape[0]

    @property
    def num_rows(self) -> int:
        """The number of rows that a forward reads."""
        return self.input_ids.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> "PromptBatch":
        """The same batch with every tensor changed."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, (GenerationPrompts, Calibration)):
                changed[field.name] = value.map(change)
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        """The batch on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PromptBatch":
        """The batch in page-locked memory, from which copies to a GPU need not wait."""
        return self.map(Tensor.pin_memory)

    def split(self, micro_batch_size: int) -> "list[PromptBatch]":
        """Parts of at most ``micro_batch_size`` examples each, of similar length, without needless padding.

        The shortest examples come first. No example is in two parts, so sums over the parts are sums over the batch.

        Raises:
            ValueError: If ``micro_batch_size`` is not at least 1.
        """
        if not micro_batch_size >= 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        if micro_batch_size >= len(self):
            return [self]
        lengths = self.attention_mask.sum(1)
        token_example = self.candidate_example[self.token_candidate]
        longest = lengths.new_zeros(len(self)).scatter_reduce(0, token_example, lengths[self.token_row], "amax")
        order = longest.argsort(stable=True)
        return [self._take(part) for part in torch.split(order, micro_batch_size)]

    def _take(self, examples: Tensor) -> "PromptBatch":
        """The examples of these numbers, in this order."""
        rank = torch.full_like(self.labels, -1)
        rank[examples] = torch.arange(len(examples), device=rank.device)
        token_example = self.candidate_example[self.token_candidate]
        # Candidates and tokens keep their order within an example.
        candidates = _sorted_members(rank[self.candidate_example])
        tokens = _sorted_members(rank[token_example])
        rows, token_row = torch.unique(self.token_row[tokens], return_inverse=True)
        new_candidate = torch.full_like(self.candidate_example, -1)
        new_candidate[candidates] = torch.arange(len(candidates), device=rank.device)

        width = self.input_ids.shape[1]
        cut = width - int(self.attention_mask[rows].sum(1).max())
        pos = self.token_pos[tokens]
        unused = int(pos.min())
        labels = self.labels[examples]
        candidate_example = rank[self.candidate_example[candidates]]
        candidate_index = self.candidate_index[candidates]
        candidate_tokens = self.candidate_tokens[candidates]
        right = candidate_index == labels[candidate_example]
        known = bool((labels >= 0).all())
        return replace(
            self,
            input_ids=self.input_ids[rows, cut:],
            attention_mask=self.attention_mask[rows, cut:],
            position_ids=self.position_ids[rows, cut:],
            token_row=token_row,
            token_pos=pos - unused,
            token_id=self.token_id[tokens],
            token_candidate=new_candidate[self.token_candidate[tokens]],
            token_order=self.token_order[tokens],
            candidate_example=candidate_example,
            candidate_index=candidate_index,
            candidate_tokens=candidate_tokens,
            candidate_correct=self.candidate_correct[candidates],
            labels=labels,
            index=self.index[examples],
            logits_to_keep=self.logits_to_keep - unused,
            num_candidates=int(candidate_index.max()) + 1,
            answer_tokens=int(candidate_tokens[right].sum()) if known else 0,
            group=None if self.group is None else self.group[examples],
            answers=_picked(self.answers, examples),
            references=_picked(self.references, examples),
            prompts=None if self.prompts is None else self.prompts.take(examples),
            calibration=None if self.calibration is None else self.calibration.take(candidates),
        )


def _picked(texts: tuple[tuple[str, ...], ...], examples: Tensor) -> tuple[tuple[str, ...], ...]:
    return tuple(texts[number] for number in examples.tolist()) if texts else ()


def _sorted_members(rank: Tensor) -> Tensor:
    """Places of the non-negative ranks, by rank and then by place."""
    order = rank.argsort(stable=True)
    return order[rank[order] >= 0]
