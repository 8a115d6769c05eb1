"""What a model makes of each example, as plain values for a file."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smezo_pl.data import PromptBatch
from smezo_pl.tasks import Example
from smezo_pl.tasks.scoring import predictions, score_table


def prediction_rows(batch: PromptBatch, scores: Tensor, examples: Mapping[int, Example]) -> list[dict[str, Any]]:
    """One dict an example: ``index`` in its data set, ``prompt``, ``candidates``, ``scores``, ``prediction``, ``label``.

    Args:
        batch: The batch.
        scores: float32 ``[K]``, mean log-probabilities of the candidates.
        examples: The examples as text by index; ``prompt`` and ``candidates`` are left out of those that are not there.

    Returns:
        Rows in the order of the batch. ``prediction`` and ``label`` are places among the candidates; ``label`` is None
        where it is unknown.
    """
    table = score_table(scores, batch).cpu()
    best = predictions(scores, batch).tolist()
    counts = batch.candidate_example.bincount(minlength=len(batch)).tolist()
    rows = []
    for number, (index, label) in enumerate(zip(batch.index.tolist(), batch.labels.tolist(), strict=True)):
        example = examples.get(index)
        text = {} if example is None else {"prompt": example.prompt, "candidates": list(example.candidates)}
        rows.append(
            {
                "index": index,
                **text,
                "scores": table[number, : counts[number]].tolist(),
                "prediction": best[number],
                "label": label if label >= 0 else None,
            }
        )
    return rows
