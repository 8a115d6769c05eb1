"""What the module makes of a batch of prompts beside the loss: answers, and the metrics they add to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from smezo_pl.data import Collate, Encoded, PromptBatch
from smezo_pl.data.budget import CPU_TOKENS
from smezo_pl.data.filling import BatchLimit, fill
from smezo_pl.data.free_text import answer_texts
from smezo_pl.linear_probe import LinearProbe
from smezo_pl.metrics import Collected, Sums
from smezo_pl.tasks.answers import Answered, choices
from smezo_pl.tasks.generation import generate
from smezo_pl.tasks.scoring import (
    calibrated,
    candidate_scores,
    correct_predictions,
    loss_of,
    model_logits,
    predictions,
)

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
) -> list[Answered]:
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
        return [Answered(row, text, right) for row, text, right in zip(index, texts, batch.references, strict=True)]
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
