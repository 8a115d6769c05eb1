"""A batch of prompts with candidates as tensors, and batches of any kind as what micro-batches are cut from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from smezo_pl.tasks.task import Loss


@dataclass
class GenerationPrompts:
    """N prompts to generate after."""

    input_ids: Tensor  # int64 [N, P], padded on the left
    attention_mask: Tensor  # int64 [N, P], 0 on padding
    max_new_tokens: int
    stop_ids: tuple[int, ...]  # tokens that end an answer
    stop: tuple[str, ...]  # texts that end an answer
    pad_id: int

    def take(self, examples: Tensor) -> GenerationPrompts:
        """The prompts of these examples, without needless padding."""
        mask = self.attention_mask[examples]
        cut = mask.shape[1] - int(mask.sum(1).max())
        return replace(self, input_ids=self.input_ids[examples, cut:], attention_mask=mask[:, cut:])


@dataclass
class Calibration:
    """The candidates after content-free prompts; a prompt that several examples have in common is there once."""

    batch: PromptBatch
    candidate: Tensor  # int64 [K], for each candidate of the examples its index among those of `batch`


def left_padded(rows: list[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Tokens as rows of one length, and where they are not padding: both int64 ``[R, T]``."""
    width = max(map(len, rows))
    input_ids = torch.tensor([(pad_id,) * (width - len(row)) + row for row in rows])
    start = torch.tensor([width - len(row) for row in rows]).unsqueeze(1)
    return input_ids, (torch.arange(width).unsqueeze(0) >= start).long()


@dataclass
class PromptBatch:
    """N examples with K candidates in R rows of T tokens; S tokens are scored, predicted at P positions.

    A row holds a tree of tokens in depth-first order (`smezo_pl.data.packing`): a passage, the prompts that begin with
    it, and after each prompt its candidates without their last tokens, which are never input. A common prefix is there
    once. A row of a single text is that text. Rows are padded on the right, which a causal LM never sees.
    """

    input_ids: Tensor  # int64 [R, T]
    attention_mask: Tensor  # int64 [R, T], 0 on padding
    position_ids: Tensor  # int64 [R, T], the position of each token in its text, 0 for the first one
    subtree_end: Tensor  # int64 [R, T]; token i follows from token j, or is it, exactly if j <= i < subtree_end[j]
    row_number: Tensor  # int64 [R], which row of the batch that was collated each one is
    logit_row: Tensor  # int64 [P], the row of each position that something is predicted at
    logit_pos: Tensor  # int64 [P], that position in the row
    token_logit: Tensor  # int64 [S], which of the P positions each scored token is predicted at
    token_id: Tensor  # int64 [S], the token
    token_candidate: Tensor  # int64 [S], its candidate, 0 to K - 1
    token_order: Tensor  # int64 [S], its index in its candidate
    candidate_example: Tensor  # int64 [K], the candidate's example, 0 to N - 1
    candidate_index: Tensor  # int64 [K], its index among its example's candidates
    candidate_tokens: Tensor  # int64 [K], the number of its tokens
    candidate_correct: Tensor  # bool [K], whether it counts as correct (several may)
    example_row: Tensor  # int64 [N], the row that holds each example's prompt
    example_pos: Tensor  # int64 [N], the position of the prompt's last token
    labels: Tensor  # int64 [N], index of the gold candidate, the one that is trained on; -1 if unknown
    index: Tensor  # int64 [N], the example's row in its dataset
    branching: bool  # a row holds more than one text, so that its tokens must not attend to all those before them
    bidirectional: bool  # every token of a row attends to every other (masked LMs)
    longest_candidate: int  # the most tokens that a candidate has
    num_candidates: int  # the most candidates that an example has
    answer_tokens: int  # tokens of all gold candidates; 0 if a label is unknown
    objective: Loss
    group: Tensor | None = None  # int64 [N], a number that all answers to one question share
    answers: tuple[tuple[str, ...], ...] = ()  # what each candidate of each example is called in metrics on texts
    references: tuple[tuple[str, ...], ...] = ()  # the correct answers to each example as texts
    metrics: tuple[str, ...] = ()
    num_labels: int = 0  # labels of the task, 0 where examples have candidates of their own
    reward: str | None = None  # a metric or a function's import path that training maximizes instead of the loss
    prompts: GenerationPrompts | None = None
    calibration: Calibration | None = None

    def __len__(self) -> int:
        """The number of examples."""
        return self.labels.shape[0]

    @property
    def num_rows(self) -> int:
        """The number of rows that a forward reads."""
        return self.input_ids.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> PromptBatch:
        """The same batch with every tensor changed."""
        return cast("PromptBatch", _mapped(self, change))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PromptBatch:
        """The batch on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PromptBatch:
        """The batch in page-locked memory, from which copies to a GPU need not wait."""
        return self.map(Tensor.pin_memory)

    def visible(self) -> Tensor:
        """Which tokens each token follows from, itself included: bool ``[R, T, T]``, by row, token and earlier token.

        Padding sees itself, and nothing else sees it.
        """
        position = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        token, earlier = position.unsqueeze(1), position.unsqueeze(0)
        return (earlier <= token) & (token < self.subtree_end.unsqueeze(1))

    def texts(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The text that ends at each of some tokens, in a row of its own.

        Args:
            rows: int64 ``[M]``, the tokens' rows.
            positions: int64 ``[M]``, their positions in these.

        Returns:
            Tokens, int64 ``[M, L]``, 0 after each text's end, and the texts' lengths, int64 ``[M]``.
        """
        position = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        last = positions.unsqueeze(1)
        seen = (position <= last) & (last < self.subtree_end[rows])  # [M, T]
        lengths = seen.sum(1)
        width = int(lengths.max()) if len(lengths) else 0
        # Stable: what is seen comes first, in its order.
        order = (~seen).byte().argsort(stable=True, dim=1)[:, :width]
        tokens = self.input_ids[rows].gather(1, order)
        return tokens.masked_fill(position[:width] >= lengths.unsqueeze(1), 0), lengths

    def row_sums(self, values: Tensor) -> Tensor:
        """Sums ``[R]`` over the examples in each row, of one value per example, ``[N]``."""
        members = self.example_row == torch.arange(self.num_rows, device=values.device).unsqueeze(1)
        # Not index_add, which adds in a different order every time on a GPU.
        return torch.where(members, values, 0).sum(1)

    def split(self, micro_batch_size: int) -> list[PromptBatch]:
        """Parts of at most ``micro_batch_size`` examples each, of similar length, without needless padding.

        The shortest examples come first. No example is in two parts, so sums over the parts are sums over the batch. A
        row that examples of two parts share is in both.

        Raises:
            ValueError: If ``micro_batch_size`` is not at least 1.
        """
        if not micro_batch_size >= 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        if micro_batch_size >= len(self):
            return [self]
        order = self.attention_mask.sum(1)[self.example_row].argsort(stable=True)
        return [self.take(part) for part in torch.split(order, micro_batch_size)]

    def separated(self) -> tuple[PromptBatch, Tensor]:
        """The same candidates, for a model to score, with each different text in a row of its own.

        It holds the logits of each token apart, and no longer says where an example's prompt is.

        Returns:
            The batch, and for each of its rows the row here that holds its text, int64.
        """
        if self.bidirectional:
            return self, torch.arange(self.num_rows, device=self.input_ids.device)
        width, count = self.input_ids.shape[1], self.candidate_tokens[self.token_candidate]
        last = self.token_order == count - 1
        ends = (self.logit_row * width + self.logit_pos)[self.token_logit[last]]  # where each candidate's text ends
        places, row = torch.unique(ends[self.token_candidate[last].argsort()], return_inverse=True)
        ids, lengths = self.texts(places // width, places % width)
        column = torch.arange(ids.shape[1], device=ids.device)
        within = column < lengths.unsqueeze(1)
        rows = row[self.token_candidate]
        batch = replace(
            self,
            row_number=self.row_number[places // width],
            input_ids=ids,
            attention_mask=within.long(),
            position_ids=column * within,
            subtree_end=torch.where(within, lengths.unsqueeze(1), column + 1),
            logit_row=rows,
            logit_pos=lengths[rows] - count + self.token_order,
            token_logit=torch.arange(len(rows), device=ids.device),
            branching=False,
        )
        return batch, places // width

    def take(self, examples: Tensor) -> PromptBatch:
        """The examples at these indices, in this order."""
        rank = _inverse(examples, len(self))
        # Candidates and tokens keep their order within an example.
        candidates = _sorted_members(rank[self.candidate_example])
        tokens = _sorted_members(rank[self.candidate_example[self.token_candidate]])
        kept_logits, token_logit = torch.unique(self.token_logit[tokens], return_inverse=True)
        rows, example_row = torch.unique(self.example_row[examples], return_inverse=True)

        lengths = self.attention_mask[rows].sum(1)
        kept = slice(0, int(lengths.max()))
        numbers = examples.tolist()
        part = replace(
            self,
            input_ids=self.input_ids[rows, kept],
            attention_mask=self.attention_mask[rows, kept],
            position_ids=self.position_ids[rows, kept],
            subtree_end=self.subtree_end[rows, kept],
            row_number=self.row_number[rows],
            logit_row=_inverse(rows, self.num_rows)[self.logit_row[kept_logits]],
            logit_pos=self.logit_pos[kept_logits],
            token_logit=token_logit,
            token_id=self.token_id[tokens],
            token_candidate=_inverse(candidates, len(self.candidate_example))[self.token_candidate[tokens]],
            token_order=self.token_order[tokens],
            candidate_example=rank[self.candidate_example[candidates]],
            candidate_index=self.candidate_index[candidates],
            candidate_tokens=self.candidate_tokens[candidates],
            candidate_correct=self.candidate_correct[candidates],
            example_row=example_row,
            example_pos=self.example_pos[examples],
            labels=self.labels[examples],
            index=self.index[examples],
            group=None if self.group is None else self.group[examples],
            answers=tuple(self.answers[n] for n in numbers) if self.answers else (),
            references=tuple(self.references[n] for n in numbers) if self.references else (),
            prompts=None if self.prompts is None else self.prompts.take(examples),
            calibration=(
                None
                if self.calibration is None
                else replace(self.calibration, candidate=self.calibration.candidate[candidates])
            ),
        )
        # In a row of one text all that is no padding ends where the row does.
        ends = (part.subtree_end == lengths.unsqueeze(1)) | (part.attention_mask == 0)
        part.branching = not bool(ends.all())
        part.longest_candidate = int(part.candidate_tokens.max()) if len(candidates) else 0
        part.num_candidates = int(part.candidate_index.max()) + 1 if len(candidates) else 0
        gold = part.candidate_index == part.labels[part.candidate_example]
        part.answer_tokens = int(part.candidate_tokens[gold].sum()) if bool((part.labels >= 0).all()) else 0
        return part


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (PromptBatch, GenerationPrompts, Calibration)):
        return replace(value, **{field.name: _mapped(getattr(value, field.name), change) for field in fields(value)})
    return value


def _inverse(indices: Tensor, count: int) -> Tensor:
    """For each of ``count`` numbers where it is in ``indices``, -1 where it is not."""
    inverse = indices.new_full((count,), -1)
    inverse[indices] = torch.arange(len(indices), device=indices.device)
    return inverse


def _sorted_members(rank: Tensor) -> Tensor:
    """Indices of the ranks that are not negative, by rank and then by index."""
    order = rank.argsort(stable=True)
    return order[rank[order] >= 0]


def batch_size(batch: Any) -> int:
    """Number of examples: of prompts, or the first dimension of the first tensor in nested containers."""
    if isinstance(batch, PromptBatch):
        return len(batch)
    if sizes := _sizes(batch):
        return sizes[0]
    raise TypeError(f"cannot tell the number of examples in a batch of type {type(batch).__name__}: it holds no tensor")


def batch_weight(batch: Any) -> int:
    """What a batch's mean loss is a mean over: answer tokens for prompts with the ``lm`` objective, else examples."""
    if isinstance(batch, PromptBatch) and batch.objective == "lm" and batch.reward is None:
        return batch.answer_tokens
    return batch_size(batch)


def split_batch(batch: Any, micro_batch_size: int | None) -> list[Any]:
    """Parts of at most ``micro_batch_size`` examples; the batch itself if None.

    Prompts are sorted by length. Of other batches every tensor in (nested) tuples, lists and dicts is cut along its
    first dimension; what is not a tensor, or has no dimension, is in every part.
    """
    if micro_batch_size is None:
        return [batch]
    if isinstance(batch, PromptBatch):
        return list(batch.split(micro_batch_size))
    sizes = sorted(set(_sizes(batch)))
    if len(sizes) > 1:
        raise ValueError(
            f"micro_batch_size={micro_batch_size}: the batch's tensors differ in their first dimension "
            f"({sizes}), so it cannot be split by example"
        )
    return [_cut(batch, start, start + micro_batch_size) for start in range(0, batch_size(batch), micro_batch_size)]


def _sizes(batch: Any) -> list[int]:
    """First dimensions of all tensors that have one."""
    if isinstance(batch, Tensor):
        return [batch.shape[0]] if batch.ndim else []
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return [size for part in batch for size in _sizes(part)]
    return []


def _cut(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        parts = [_cut(value, start, stop) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # type: ignore[call-arg]
    return batch
