"""Rows that are there more than once: ids that repeat in a file, dev examples that are trained on."""

import json
import logging
from collections.abc import Sequence

from smezo_pl.data.sources import Split
from smezo_pl.tasks import Example

logger = logging.getLogger(__name__)

ID_COLUMNS = ("id", "idx", "uid", "guid", "query_id", "question_id", "example_id")
"""Columns that number the rows of a data set, wherever one is called so."""


def say_repeated_ids(data: Split) -> None:
    """Say in the log which ids of a file stand on several of its rows, and on which the first of them does.

    Nothing here goes by an id: rows are known by their place, also in ``predictions.jsonl``. So a repeated one harms
    nothing by itself, but it mostly means that rows were copied, and copies may fall on both sides of train and dev.
    """
    for column in ID_COLUMNS:
        if column not in data.column_names:
            continue
        first: dict[str, int] = {}
        again: list[tuple[str, int]] = []
        for row, value in enumerate(data.column(column)):
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            key = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
            if key in first:
                again.append((key, row))
            else:
                first[key] = row
        if again:
            key, row = again[0]
            logger.warning(
                "%s: %d of %d rows repeat the %s of an earlier row; the first: %s on %s and %s. Every row counts as an"
                " example of its own; copies may be in train and dev alike",
                data.origin, len(again), len(data), column, key, data.line(first[key]), data.line(row),
            )  # fmt: skip


def say_shared_texts(train: Sequence[Example], dev: Sequence[Example], train_origin: str, dev_origin: str) -> None:
    """Say in the log how many dev examples have the text and the candidates of a training example.

    Args:
        train: The training examples.
        dev: The dev examples.
        train_origin: The file or data set of the training examples.
        dev_origin: That of the dev examples.
    """
    trained = {_texts(example): example.where for example in reversed(train)}
    shared = [example for example in dev if _texts(example) in trained]
    if shared:
        logger.warning(
            "%d of %d dev examples have the text of a training example and measure what was learnt by heart; the first:"
            " %s, %s, trained on as %s, %s",
            len(shared), len(dev), dev_origin, shared[0].where, train_origin, trained[_texts(shared[0])],
        )  # fmt: skip


def _texts(example: Example) -> tuple[str, tuple[str, ...]]:
    return example.prompt, example.candidates
