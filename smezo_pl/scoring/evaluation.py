"""Means over a data set, from sums and weights of batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from smezo_pl.data import Collate, Encoded, PromptBatch
from smezo_pl.data.encoding import answer_texts
from smezo_pl.data.loaders import CPU_TOKENS, BatchLimit, fill
from smezo_pl.scoring.candidates import (
    calibrated,
    candidate_scores,
    correct_predictions,
    loss_of,
    predictions,
    score_table,
)
from smezo_pl.scoring.generation import generate
from smezo_pl.scoring.linear_probe import LinearProbe
from smezo_pl.scoring.logits import model_logits
from smezo_pl.tasks.metrics import METRICS, Answer, choices, gathered


@dataclass(frozen=True)
class Collected:
    """A batch's part of a metric that only all answers together give.

    Attributes:
        metric: Its name in `smezo_pl.tasks.metrics.METRICS`.
        answers: The batch's answers.
        num_labels: Number of labels of the task, 0 where they are not shared by all examples.
    """

    metric: str
    answers: list[Answer]
    num_labels: int = 0


Sums = dict[str, tuple[Tensor | float, float] | Collected]
"""What a batch adds to each metric: a sum and the weight it stands for, or answers."""


class WeightedMeans:
    """Named means that weigh batches by what their sums count, over all processes.

    Example:
        >>> means = WeightedMeans()
        >>> means.update({"accuracy": (3.0, 4.0)}, torch.device("cpu"))
        >>> means.update({"accuracy": (1.0, 1.0)}, torch.device("cpu"))
        >>> means.compute()
        {'accuracy': tensor(0.8000, dtype=torch.float64)}
    """

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}
        self._collected: dict[str, Collected] = {}

    def update(self, sums: Mapping[str, tuple[Tensor | float, float] | Collected], device: torch.device) -> None:
        """Add a batch: for each name a sum and the weight it stands for, or answers."""
        for name, part in sums.items():
            if isinstance(part, Collected):
                kept = self._collected.setdefault(name, Collected(part.metric, [], part.num_labels))
                kept.answers.extend(part.answers)
        # States made inside Lightning's inference mode could not be added to outside it, as in `fit` after `validate`.
        with torch.inference_mode(False), torch.no_grad():
            self._update({name: part for name, part in sums.items() if not isinstance(part, Collected)}, device)

    def _update(self, sums: Mapping[str, tuple[Tensor | float, float]], device: torch.device) -> None:
        for name, (total, weight) in sums.items():
            if name not in self._means:
                # float64, as thousands of float32 batches would lose the last digits that runs are compared by. Set
                # last: torchmetrics 1.9 takes torch's default dtype in `to`, 16-bit inside a step of bf16-true.
                self._means[name] = MeanMetric().to(device)
                self._means[name].set_dtype(torch.float64)
            if weight:
                value = torch.as_tensor(total, dtype=torch.float64, device=device) / weight
                self._means[name].update(value, torch.full_like(value, weight))

    def compute(self) -> dict[str, Tensor]:
        """The means of all that was added since the last call, the same on every process."""
        values: dict[str, Tensor] = {}
        for name, metric in self._means.items():
            if metric.update_called:
                values[name] = metric.compute()
                with torch.inference_mode(False):
                    metric.reset()
        for name, part in self._collected.items():
            value = METRICS[part.metric].measure(gathered(part.answers), part.num_labels)
            values[name] = torch.tensor(value, dtype=torch.float64)
        self._collected.clear()
        return values


def generation_rows(batch: PromptBatch, texts: list[str]) -> list[dict[str, Any]]:
    """One dict an example: ``index``, ``prediction``, the text that was written, and ``references``, the right ones."""
    rows = zip(batch.index.tolist(), texts, batch.references, strict=True)
    return [{"index": index, "prediction": text, "references": list(right)} for index, text, right in rows]


def prediction_rows(batch: PromptBatch, scores: Tensor) -> list[dict[str, Any]]:
    """One dict an example: ``index`` in its data set, ``scores`` of its candidates, ``prediction`` and ``label``.

    Args:
        batch: The batch.
        scores: float32 ``[K]``, mean log-probabilities of the candidates.

    Returns:
        Rows in the order of the batch. ``prediction`` and ``label`` are places among the candidates; ``label`` is None
        where it is unknown.
    """
    table = score_table(scores, batch).cpu()
    best = predictions(scores, batch).tolist()
    counts = batch.candidate_example.bincount(minlength=len(batch)).tolist()
    return [
        {
            "index": index,
            "scores": table[number, : counts[number]].tolist(),
            "prediction": best[number],
            "label": label if label >= 0 else None,
        }
        for number, (index, label) in enumerate(zip(batch.index.tolist(), batch.labels.tolist(), strict=True))
    ]


Tokenizer = Callable[[], PreTrainedTokenizerBase]
"""Gives the tokenizer, which only free answers need."""


def scores_of(model: nn.Module, batch: PromptBatch) -> Tensor:
    """The score of each candidate, float32 ``[K]``: its mean log-probability, or what a linear probe makes of it."""
    if isinstance(model, LinearProbe):
        return model.scores(batch)
    return candidate_scores(model_logits(model, batch), batch)


@torch.no_grad()
def scores_in_order(
    model: nn.Module, examples: Sequence[Encoded], pad_id: int, limit: BatchLimit | None = None
) -> list[list[float]]:
    """Mean log-probability of every candidate, by example, in the order of the examples.

    What the examples share is read once, in batches alike in length. The scores are those of one candidate at a time,
    up to rounding.

    Args:
        model: The network, on its device.
        examples: Encoded examples.
        pad_id: The token that fills rows up.
        limit: How much a forward may read; what is quick on a CPU if None.
    """
    collate = Collate(pad_id)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    scores: list[list[float]] = [[] for _ in examples]
    for numbers in fill(examples, limit or BatchLimit(tokens=CPU_TOKENS)):
        batch = collate([examples[number] for number in numbers]).to(device)
        found = candidate_scores(model_logits(model, batch), batch).tolist()
        for place, value in zip(batch.candidate_example.tolist(), found, strict=True):
            scores[numbers[place]].append(value)
    return scores


def generated(model: nn.Module, batch: PromptBatch, tokenizer: Tokenizer) -> list[str]:
    """The answers that the model writes after each prompt of the batch.

    Raises:
        ValueError: If the batch holds no prompts to generate after.
    """
    prompts = batch.prompts
    if prompts is None:
        raise ValueError("the batch holds no prompts to generate after")
    tokens = generate(
        model,
        prompts.input_ids,
        prompts.attention_mask,
        max_new_tokens=prompts.max_new_tokens,
        stop_ids=prompts.stop_ids,
        pad_id=prompts.pad_id,
    )
    return answer_texts(tokenizer(), tokens, prompts.stop_ids, prompts.stop)


def answers_of(
    model: nn.Module, batch: PromptBatch, tokenizer: Tokenizer, scores: Tensor | None = None
) -> list[Answer]:
    """What the model answers to each example: the best candidate, or what it writes.

    Args:
        model: The network.
        batch: The batch.
        tokenizer: Gives the tokenizer.
        scores: float32 ``[K]``, the candidates' scores, where they are there already.
    """
    index = batch.index.tolist()
    if batch.prompts is not None:
        texts = generated(model, batch, tokenizer)
        return [Answer(row, text, right) for row, text, right in zip(index, texts, batch.references, strict=True)]
    if scores is None:
        scores = scores_of(model, batch)
    predicted = predictions(calibrated(model, scores, batch), batch)
    right = correct_predictions(predicted, batch)
    group = batch.labels if batch.group is None else batch.group
    return choices(predicted, right, batch.labels, batch.index, group, batch.answers, batch.references)


def batch_sums(model: nn.Module, batch: PromptBatch, tokenizer: Tokenizer) -> Sums:
    """Loss, accuracy where there are candidates, and what the task's metrics are made of."""
    sums: Sums = {}
    scores = None
    if batch.prompts is not None:
        # More prompts are generated after than are quick to read at once.
        parts = batch.split(max(1, CPU_TOKENS // batch.input_ids.shape[1]))
        losses = [loss_of(scores_of(model, part), part) for part in parts]
        sums["loss"] = torch.stack([total for total, _ in losses]).sum(), sum(weight for _, weight in losses)
    else:
        scores = scores_of(model, batch)
        sums["loss"] = loss_of(scores, batch)
        ranked = calibrated(model, scores, batch)
        sums["accuracy"] = (correct_predictions(predictions(ranked, batch), batch).sum(), len(batch))
    names = [name for name in batch.metrics if name not in sums]
    if names:
        answers = answers_of(model, batch, tokenizer, scores)
        sums |= {name: Collected(name, answers, batch.num_labels) for name in names}
    return sums
