"""From logits to candidate scores, the loss, predictions and metrics of a batch, and metrics of a dataset.

An example counts as scored if the score of each of its candidates is finite. Minus infinity is not, also where it means
that a candidate is impossible: no loss can be taken of it. A metric of examples that are not all scored is NaN.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from smezo_pl.data.batch import GenerationPrompts, PromptBatch
from smezo_pl.data.loaders import CPU_TOKENS
from smezo_pl.optim.rows import rows
from smezo_pl.scoring.generation import NO_TOKEN, generate
from smezo_pl.scoring.linear_probe import LinearProbe
from smezo_pl.scoring.logits import activation_dtype, model_logits, separates
from smezo_pl.scoring.neighbors import awaits_check, check_neighbors
from smezo_pl.tasks.metrics import METRICS, Answer, gathered

logger = logging.getLogger(__name__)

Tokenizer = Callable[[], PreTrainedTokenizerBase]
"""Returns the tokenizer, which only generation needs."""


def candidate_scores(logits: Tensor, batch: PromptBatch) -> Tensor:
    """Mean log-probability of each candidate's tokens given the prompt, float32 ``[K]``.

    ``logits`` are those of `smezo_pl.scoring.logits.model_logits`, ``[P, V]`` in any floating dtype.
    """
    at_tokens = logits[batch.token_logit, batch.token_id].float()  # [S]
    normalizer = logits.float().logsumexp(-1)  # [P]
    log_probs = at_tokens - normalizer[batch.token_logit]
    # A table and a sum over its rows, as index_add adds in a different order every time on a GPU.
    table = log_probs.new_zeros(batch.candidate_tokens.shape[0], batch.longest_candidate)
    table[batch.token_candidate, batch.token_order] = log_probs
    return table.sum(1) / batch.candidate_tokens


def scores_of(model: nn.Module, batch: PromptBatch) -> Tensor:
    """The score of each candidate, float32 ``[K]``: its mean log-probability, or the output of a linear probe."""
    scores = _scores_of(model, batch)
    if awaits_check(model, batch):
        shortest = batch.attention_mask.sum(1)[batch.example_row].argmin().reshape(1)
        read_alone = partial(_scores_of, model, batch.take(shortest))
        with rows(batch.example_row[shortest]):
            check_neighbors(model, scores[batch.candidate_example == shortest], read_alone, activation_dtype(model))
    return scores


def _scores_of(model: nn.Module, batch: PromptBatch) -> Tensor:
    network = model.network if isinstance(model, LinearProbe) else model
    if separates(network, batch):
        batch, row = batch.separated()
        with rows(row):
            return _scores_of_rows(model, batch)
    return _scores_of_rows(model, batch)


def _scores_of_rows(model: nn.Module, batch: PromptBatch) -> Tensor:
    if isinstance(model, LinearProbe):
        return model.scores(batch)
    return candidate_scores(model_logits(model, batch), batch)


def calibrated(model: nn.Module, scores: Tensor, batch: PromptBatch) -> Tensor:
    """The scores that candidates are chosen by, float32 ``[K]``, from their mean log-probabilities.

    The same where the batch holds no calibration; otherwise the sum of each candidate's log-probabilities minus that
    after the content-free prompt (surface form competition, as in MeZO).
    """
    if batch.calibration is None:
        return scores
    inner = batch.calibration.batch
    content_free = _scores_of(model, inner) * inner.candidate_tokens
    return scores * batch.candidate_tokens - content_free[batch.calibration.candidate]


def score_table(scores: Tensor, batch: PromptBatch) -> Tensor:
    """The scores by example and candidate, float32 ``[N, num_candidates]``, minus infinity where there is none."""
    return _table(scores, batch, -torch.inf)


def _table(values: Tensor, batch: PromptBatch, default: float) -> Tensor:
    table = values.new_full((len(batch), batch.num_candidates), default)
    table[batch.candidate_example, batch.candidate_index] = values
    return table


def loss_of(scores: Tensor, batch: PromptBatch) -> tuple[Tensor, int]:
    """The loss as a sum and the number it is a mean over, so that parts of a batch add up to the whole exactly.

    classification: cross-entropy over each example's candidates with their scores as logits, summed over examples;
    the number is that of the examples. lm: the negative log-probability of the gold candidates' tokens, summed over
    tokens; the number is that of the tokens. No label of the batch may be unknown.
    """
    losses, weight = example_losses(scores, batch)
    return losses.sum(), weight


def example_losses(scores: Tensor, batch: PromptBatch) -> tuple[Tensor, int]:
    """The terms of that sum, one per example, ``[N]``, and the number."""
    if not batch.answer_tokens:
        raise ValueError("the batch holds an example whose label is unknown, so it has no loss")
    table, labels = score_table(scores, batch), batch.labels.unsqueeze(1)
    gold = table.gather(1, labels).squeeze(1)  # [N]
    if batch.objective == "classification":
        return table.logsumexp(1) - gold, len(batch)
    tokens = _table(batch.candidate_tokens, batch, 0).gather(1, labels).squeeze(1)
    return -(gold * tokens), batch.answer_tokens


def predictions(scores: Tensor, batch: PromptBatch) -> Tensor:
    """Index of each example's best candidate, int64 ``[N]``; of equal ones the first, -1 where one is not finite."""
    return score_table(scores, batch).argmax(1).masked_fill(~scored(scores, batch), -1)


def scored(scores: Tensor, batch: PromptBatch) -> Tensor:
    """Whether the scores of all of an example's candidates are finite, bool ``[N]``."""
    return _table(scores.isfinite(), batch, True).all(1)


def correct_predictions(predicted: Tensor, batch: PromptBatch) -> Tensor:
    """Whether the predicted candidate counts as correct, bool ``[N]``; several candidates of an example may."""
    correct = _table(batch.candidate_correct, batch, False).gather(1, predicted.clamp_min(0).unsqueeze(1)).squeeze(1)
    return correct & (predicted >= 0)


def generated(model: nn.Module, prompts: GenerationPrompts, tokenizer: Tokenizer) -> list[str | None]:
    """What the model generates, up to the first stop token or stop text, without white space at either end.

    None where the logits were not finite.
    """
    answers = generate(
        model,
        prompts.input_ids,
        prompts.attention_mask,
        max_new_tokens=prompts.max_new_tokens,
        stop_ids=prompts.stop_ids,
        pad_id=prompts.pad_id,
    )
    tokens, stop_ids = [], set(prompts.stop_ids)
    failed = (answers == NO_TOKEN).any(1).tolist()
    for answer in answers.clamp_min(0).tolist():
        end = next((index for index, token in enumerate(answer) if token in stop_ids), len(answer))
        tokens.append(answer[: end + 1])  # a stop token's text may begin with the answer's last characters
    stop = re.compile("|".join(map(re.escape, prompts.stop)))
    texts = tokenizer().batch_decode(tokens, skip_special_tokens=True)
    return [
        None if no_text else stop.split(text, maxsplit=1)[0].strip()
        for text, no_text in zip(texts, failed, strict=True)
    ]


def prediction_rows(model: nn.Module, batch: PromptBatch, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One dict per example in the order of the batch.

    ``index`` is the row in its dataset. Where the model generates: ``prediction``, the text, and ``references``.
    Otherwise ``scores`` of the candidates, and the indices of candidates ``prediction`` and ``label``, the latter None
    where it is unknown. Where a score or a logit is not finite, ``scores`` and ``prediction`` are None and ``error``
    says so.
    """
    indices = batch.index.tolist()
    if batch.prompts is not None:
        rows = zip(indices, generated(model, batch.prompts, tokenizer), batch.references, strict=True)
        return [
            {"index": index, "prediction": text, "references": list(texts)}
            | ({"error": "the logits of the model are not finite"} if text is None else {})
            for index, text, texts in rows
        ]
    scores = calibrated(model, scores_of(model, batch), batch)
    counts = batch.candidate_example.bincount(minlength=len(batch)).tolist()
    columns = (score_table(scores, batch).tolist(), counts, predictions(scores, batch).tolist(), batch.labels.tolist())
    found: list[dict[str, Any]] = []
    for index, row, count, best, label in zip(indices, *columns, strict=True):
        answer: dict[str, Any] = {"scores": row[:count], "prediction": best}
        if best < 0:
            error = f"the scores are not finite: {', '.join(f'{score:g}' for score in row[:count])}"
            answer = {"scores": None, "prediction": None, "error": error}
        found.append({"index": index, **answer, "label": label if label >= 0 else None})
    return found


def answers_of(model: nn.Module, batch: PromptBatch, tokenizer: Tokenizer) -> list[Answer]:
    """The model's answer to each example: the best candidate, or what it generates."""
    if batch.prompts is None:
        return _choices(predictions(calibrated(model, scores_of(model, batch), batch), batch), batch)
    with rows(batch.example_row):  # a batch that is trained on has each prompt in a row of its own
        texts = generated(model, batch.prompts, tokenizer)
    columns = zip(batch.index.tolist(), texts, batch.references, strict=True)
    return [Answer(index, text or "", references, scored=text is not None) for index, text, references in columns]


def _choices(predicted: Tensor, batch: PromptBatch) -> list[Answer]:
    group = batch.labels if batch.group is None else batch.group
    columns = (batch.index, predicted, batch.labels, correct_predictions(predicted, batch), group)
    rows = zip(*(column.tolist() for column in columns), batch.answers, batch.references, strict=True)
    return [
        Answer(index, names[choice], references, choice, label, correct, number, scored=choice >= 0)
        for index, choice, label, correct, number, names, references in rows
    ]


@dataclass(frozen=True)
class Collected:
    """A batch's part of a metric that is no mean over batches."""

    metric: str  # its name in `smezo_pl.tasks.metrics.METRICS`
    answers: list[Answer]
    num_labels: int = 0  # of the task, 0 where they are not shared by all examples


SCORED = "scored"
"""The name of the sum that counts the examples that are scored, which is no metric."""

Sums = Mapping[str, tuple[Tensor | float, float] | Collected]
"""What a batch adds to each metric: a sum and its weight, or answers."""


def batch_sums(model: nn.Module, batch: PromptBatch, tokenizer: Tokenizer) -> Sums:
    """Loss, accuracy where there are candidates, and the answers that the task's metrics are computed from.

    Loss and accuracy are NaN if an example is not scored. `SCORED` counts those that are.
    """
    if batch.prompts is not None:
        # A batch holds more prompts for generation than are fast to score at once.
        parts = batch.split(max(1, CPU_TOKENS // batch.input_ids.shape[1]))
        scores = [scores_of(model, part) for part in parts]
        losses = [loss_of(*part) for part in zip(scores, parts, strict=True)]
        finite = torch.cat([scored(*part) for part in zip(scores, parts, strict=True)])
        total, weight = torch.stack([loss for loss, _ in losses]).sum(), sum(weight for _, weight in losses)
    else:
        of_batch = scores_of(model, batch)
        predicted = predictions(calibrated(model, of_batch, batch), batch)
        finite = predicted >= 0
        total, weight = loss_of(of_batch, batch)
    sums: dict[str, Any] = {"loss": (_if_all(finite, total), weight), SCORED: (finite.sum(), len(batch))}
    if batch.prompts is None:
        sums["accuracy"] = (_if_all(finite, correct_predictions(predicted, batch).sum()), len(batch))
    if names := [name for name in batch.metrics if name not in sums]:
        answers = answers_of(model, batch, tokenizer) if batch.prompts is not None else _choices(predicted, batch)
        sums |= {name: Collected(name, answers, batch.num_labels) for name in names}
    return sums


def _if_all(finite: Tensor, total: Tensor) -> Tensor:
    return torch.where(finite.all(), total.double(), math.nan)


class WeightedMeans:
    """Means over batches by name, weighted by what each sum counts, over all processes.

    Example:
        >>> means = WeightedMeans()
        >>> means.update({"accuracy": (3.0, 4.0)}, torch.device("cpu"))
        >>> means.update({"accuracy": (1.0, 1.0)}, torch.device("cpu"))
        >>> means.compute()
        {'accuracy': tensor(0.8000, dtype=torch.float64)}

    Attributes:
        scored: Fraction of the examples that were scored, after `compute`. Where batches do not say (`SCORED`), one
            counts whose sums are finite.
    """

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}
        self._collected: dict[str, Collected] = {}
        self.scored = 1.0

    # Outside Lightning's inference mode, whose tensors could not be added to after it, as in `fit` after `validate`.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, sums: Sums, device: torch.device) -> None:
        """Add a batch: for each name a sum and its weight, or answers."""
        if SCORED not in sums:
            values = [torch.as_tensor(part[0]) for part in sums.values() if not isinstance(part, Collected)]
            sums = {**sums, SCORED: (float(all(bool(value.isfinite().all()) for value in values)), 1.0)}
        for name, part in sums.items():
            if isinstance(part, Collected):
                collected = self._collected.setdefault(name, Collected(part.metric, [], part.num_labels))
                collected.answers.extend(part.answers)
                continue
            if name not in self._means:
                # float64, as thousands of float32 batches would lose the last digits that runs are compared by. Set
                # last: torchmetrics 1.9 takes torch's default dtype in `to`, 16-bit inside a step of bf16-true.
                # NaN for NaN: left alone, it would take NaN out of the mean.
                self._means[name] = MeanMetric(nan_strategy=math.nan).to(device)
                self._means[name].set_dtype(torch.float64)
            total, weight = part
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
            value = METRICS[part.metric].value(gathered(part.answers), part.num_labels)
            values[name] = torch.tensor(value, dtype=torch.float64)
        self._collected.clear()
        if SCORED in values:
            self.scored = float(values.pop(SCORED))
        return values
