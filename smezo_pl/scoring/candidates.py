"""What a model makes of a batch: the candidates' scores, the loss, the predictions."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smezo_pl.scoring.logits import model_logits

if TYPE_CHECKING:
    from smezo_pl.data.batch import PromptBatch


def candidate_scores(logits: Tensor, batch: "PromptBatch") -> Tensor:
    """Mean log-probability of each candidate's tokens given the prompt.

    Args:
        logits: ``[P, V]``, any floating dtype, from `smezo_pl.scoring.logits.model_logits`.
        batch: The batch.

    Returns:
        float32 ``[K]``.
    """
    at_tokens = logits[batch.token_logit, batch.token_id].float()
    normaliser = logits.float().logsumexp(-1)  # [P]
    log_probs = at_tokens - normaliser[batch.token_logit]
    # A table and a sum over its rows, as index_add adds in a different order every time on a GPU.
    table = log_probs.new_zeros(batch.candidate_tokens.shape[0], batch.longest_candidate)
    table[batch.token_candidate, batch.token_order] = log_probs
    return table.sum(1) / batch.candidate_tokens


def calibrated(model: nn.Module, scores: Tensor, batch: "PromptBatch") -> Tensor:
    """The scores that candidates are chosen by: with calibration, log-probability gained over a prompt without content.

    Args:
        model: The network.
        scores: float32 ``[K]``, mean log-probabilities of the candidates.
        batch: The batch.

    Returns:
        float32 ``[K]``: ``scores`` themselves where the batch holds no calibration; otherwise the sum of each
        candidate's log-probabilities minus that after the prompt without content (surface form competition, as MeZO).
    """
    if batch.calibration is None:
        return scores
    inner = batch.calibration.batch
    without = candidate_scores(model_logits(model, inner), inner) * inner.candidate_tokens
    return scores * batch.candidate_tokens - without[batch.calibration.candidate]


def score_table(scores: Tensor, batch: "PromptBatch") -> Tensor:
    """The scores by example and candidate, float32 ``[N, num_candidates]``, minus infinity where there is none."""
    table = scores.new_full((len(batch), batch.num_candidates), -torch.inf)
    table[batch.candidate_example, batch.candidate_index] = scores
    return table


def loss_of(scores: Tensor, batch: "PromptBatch") -> tuple[Tensor, int]:
    """The loss as a sum and the number it is a mean over, so that parts of a batch add up to the whole exactly.

    classification: cross-entropy over each example's candidates with their scores as logits, summed over examples;
    the number is that of the examples. lm: the negative log-probability of the right candidates' tokens, summed over
    tokens; the number is that of the tokens.

    Args:
        scores: float32 ``[K]`` from `candidate_scores`.
        batch: The batch.

    Returns:
        The sum, a float32 scalar, and the number. ``sum / number`` is the loss of the batch.

    Raises:
        ValueError: If a label of the batch is unknown.
    """
    if not batch.answer_tokens:
        raise ValueError("the batch holds an example whose label is unknown, so it has no loss")
    table = score_table(scores, batch)
    right = table.gather(1, batch.labels.unsqueeze(1)).squeeze(1)  # [N]
    if batch.objective == "classification":
        return (table.logsumexp(1) - right).sum(), len(batch)
    counts = torch.zeros_like(table, dtype=torch.long)
    counts[batch.candidate_example, batch.candidate_index] = batch.candidate_tokens
    return -(right * counts.gather(1, batch.labels.unsqueeze(1)).squeeze(1)).sum(), batch.answer_tokens


def predictions(scores: Tensor, batch: "PromptBatch") -> Tensor:
    """Place of each example's best candidate, int64 ``[N]``; of equal ones the first."""
    return score_table(scores, batch).argmax(1)


def correct_predictions(predicted: Tensor, batch: "PromptBatch") -> Tensor:
    """Whether the predicted candidate counts as right, bool ``[N]``; several candidates of an example may."""
    table = torch.zeros(len(batch), batch.num_candidates, dtype=torch.bool, device=predicted.device)
    table[batch.candidate_example, batch.candidate_index] = batch.candidate_correct
    return table.gather(1, predicted.unsqueeze(1)).squeeze(1)
