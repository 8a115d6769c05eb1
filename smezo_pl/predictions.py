"""What a model makes of each example, as plain values for a file."""

from typing import Any

from torch import Tensor

from smezo_pl.data import PromptBatch
from smezo_pl.tasks.scoring import predictions, score_table


def written_rows(batch: PromptBatch, texts: list[str]) -> list[dict[str, Any]]:
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
