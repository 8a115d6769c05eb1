"""What a batch holds beside the rows that are scored: prompts to generate after, prompts without content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from smezo_pl.data.batch import PromptBatch


@dataclass
class GenerationPrompts:
    """N prompts that answers are generated after.

    Attributes:
        input_ids: int64 ``[N, P]``, padded on the left.
        attention_mask: int64 ``[N, P]``, 0 on padding.
        max_new_tokens: Most tokens of an answer.
        stop_ids: Tokens that end an answer.
        stop: Texts that end an answer.
        pad_id: The token that fills rows up.
    """

    input_ids: Tensor
    attention_mask: Tensor
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...]
    pad_id: int

    def map(self, change: Callable[[Tensor], Tensor]) -> GenerationPrompts:
        """The same with every tensor changed."""
        return replace(self, input_ids=change(self.input_ids), attention_mask=change(self.attention_mask))

    def take(self, examples: Tensor) -> GenerationPrompts:
        """The prompts of these numbers, without needless padding."""
        mask = self.attention_mask[examples]
        cut = mask.shape[1] - int(mask.sum(1).max())
        return replace(self, input_ids=self.input_ids[examples, cut:], attention_mask=mask[:, cut:])


@dataclass
class Calibration:
    """The candidates after prompts without content; those that are the same for several examples stand once.

    Attributes:
        batch: What is scored.
        candidate: int64 ``[K]``, for each candidate of the batch that it belongs to the one of ``batch``.
    """

    batch: PromptBatch
    candidate: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Calibration:
        """The same with every tensor changed."""
        return Calibration(self.batch.map(change), change(self.candidate))

    def take(self, candidates: Tensor) -> Calibration:
        """The same for these candidates."""
        return replace(self, candidate=self.candidate[candidates])


def left_padded(rows: list[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Tokens as rows of one length, and where they are not padding: both int64 ``[R, T]``."""
    width = max(map(len, rows))
    input_ids = torch.tensor([(pad_id,) * (width - len(row)) + row for row in rows])
    start = torch.tensor([width - len(row) for row in rows]).unsqueeze(1)
    return input_ids, (torch.arange(width).unsqueeze(0) >= start).long()
