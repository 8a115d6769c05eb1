"""The loss of each row of a batch, over its parts and over all processes, where each row has a direction of its own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smezo_pl.data.batch import PromptBatch, batch_size, batch_weight
from smezo_pl.optim.rows import rows
from smezo_pl.scoring.evaluation import answers_of
from smezo_pl.tasks.metrics import Answer
from smezo_pl.tasks.objectives import reward_losses


def row_losses(module: Any, parts: Sequence[Any]) -> Tensor:
    """The losses of all rows of the global batch, float32 ``[R]``, of which this process has these parts.

    Each forward runs inside the numbers of its rows (`smezo_pl.optim.rows`).
    """
    world, strategy = module.trainer.world_size, module.trainer.strategy
    batch = GlobalRows(
        parts,
        lambda tensor: strategy.all_gather(tensor).reshape(world, *tensor.shape),
        module.global_rank,
        module.device,
    )
    is_reward = isinstance(parts[0], PromptBatch) and parts[0].reward is not None
    answer = partial(answers_of, module.model, tokenizer=module.text_tokenizer)
    outputs: list[Any] = []
    for part, numbers in zip(parts, batch.numbers, strict=True):
        with rows(numbers):
            outputs.append(answer(part) if is_reward else module.losses(part))
    return batch.joined(row_rewards(parts, outputs) if is_reward else outputs)


class GlobalRows:
    """Which rows of the global batch the parts of this process's batch hold.

    Row ``i`` of process ``k`` of ``W`` has the number ``i W + k``, which for examples that are dealt out in turn does
    not depend on ``W``; where processes have different numbers of rows, it is that order without its gaps.

    Args:
        parts: The parts of this process's batch.
        gather: From a tensor to those of all processes, ``[W, ...]``.
        rank: The number of this process.
        device: Where losses are.

    Attributes:
        numbers: For each part the numbers of its rows, int64.
    """

    def __init__(
        self, parts: Sequence[Any], gather: Callable[[Tensor], Tensor], rank: int, device: torch.device
    ) -> None:
        own, first = [], 0
        for part in parts:
            last = first + batch_size(part)
            own.append(part.row_number if isinstance(part, PromptBatch) else torch.arange(first, last, device=device))
            first = last
        distinct, places = torch.unique(torch.cat(own), return_inverse=True)
        self._rows = torch.split(places, [len(numbers) for numbers in own])
        self._gather, self._weights = gather, [batch_weight(part) for part in parts]
        counts, weights = gather(torch.tensor([len(distinct), sum(self._weights)], device=device)).unbind(1)  # [W]
        self._weight = int(weights.sum())
        self._present = torch.arange(int(counts.max()), device=device).unsqueeze(1) < counts  # [most, W]
        numbers = self._present.flatten().cumsum(0).view_as(self._present) - 1
        self.numbers = [numbers[row, rank] for row in self._rows]

    def joined(self, losses: Sequence[Tensor]) -> Tensor:
        """The losses of all rows of the global batch in the order of their numbers, float32 ``[R]``.

        Their mean is the loss of the batch; they are the same bits on every process. What several parts hold of a row
        is added up.

        Args:
            losses: Of each row of each part; their mean is the loss of the part.

        Raises:
            ValueError: If a part does not have one per row.
        """
        sums = torch.zeros(len(self._present), device=self._present.device)
        for of_part, row, weight in zip(losses, self._rows, self._weights, strict=True):
            if of_part.shape != row.shape:
                raise ValueError(
                    f"losses must return one number for each of the {len(row)} rows of a forward, got a tensor of "
                    f"shape {tuple(of_part.shape)}"
                )
            sums[row] += of_part.float() * (weight / len(row))
        every = self._gather(sums).T[self._present]
        return every * (len(every) / self._weight)


def row_rewards(parts: Sequence[PromptBatch], answers: Sequence[Sequence[Answer]]) -> list[Tensor]:
    """What training minimizes with a reward, for each row of each part of a batch, float32, from the answers to it.

    Raises:
        ValueError: If answers have no reward of their own, or are calibrated.
    """
    reward = str(parts[0].reward)
    if any(part.calibration is not None for part in parts):
        raise ValueError(
            f"objective {reward!r} with calibration: the content-free prompt is read once for many rows, each of which "
            "has weights of its own with directions='per_row': set calibration='none', or directions='shared'"
        )
    together = [answer for part in answers for answer in part]
    values = torch.tensor(reward_losses(reward, together, parts[0].num_labels), device=parts[0].labels.device)
    of_parts = torch.split(values, [len(part) for part in parts])
    return [part.row_sums(each) * (part.num_rows / len(part)) for part, each in zip(parts, of_parts, strict=True)]
