"""Which rows of a split become which examples: rows that are left out, k a class, demonstrations."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from smezo_pl.data.sampling import permutation
from smezo_pl.data.sources import Split
from smezo_pl.tasks import Example, ExampleError, Task, make_example

logger = logging.getLogger(__name__)

SEPARATOR = "\n\n"
"""What stands between demonstrations, and before the example: MeZO's."""


def examples_of(task: Task, data: Split, numbers: Sequence[int]) -> list[Example]:
    """The rows of these numbers as examples.

    Raises:
        ExampleError: If a row cannot be made into one.
    """
    names = data.names.get(task.label)
    rows = zip(numbers, data.rows(numbers), strict=True)
    return [make_example(task, row, i, data.origin, names, data.line(i)) for i, row in rows]


def usable(task: Task, data: Split, labelled: bool) -> list[int]:
    """The rows that can be made into examples; the log says how many are left out, and why the first one is.

    Raises:
        ValueError: If there is none.
    """
    names = data.names.get(task.label)
    kept, reasons = [], []
    for index, row in enumerate(data.rows(range(len(data)))):
        try:
            example = make_example(task, row, index, data.origin, names, data.line(index))
        except ExampleError as error:
            reasons.append(str(error))
            continue
        if example.label < 0 and labelled:
            reasons.append(f"{data.origin}, {data.line(index)}: no label")
        else:
            kept.append(index)
    if reasons:
        logger.warning("%d of %d rows are left out; the first: %s", len(reasons), len(data), reasons[0])
    if not kept:
        raise ValueError(f"{data.origin}: none of the {len(data)} rows is usable; the first: {reasons[0]}")
    return kept


def k_of_each_class(
    labels: Sequence[int], k: int, names: Sequence[str], seed: int, origin: str, dev: bool
) -> tuple[list[int], list[int]]:
    """``k`` rows of every class for training and, if they come from the same split, ``k`` others for dev.

    The rows are shuffled by the seed; of each class the first ``k`` train, the next ``k`` are dev.

    Raises:
        ValueError: If a class has too few; it says how many there are.
    """
    of_class: dict[int, list[int]] = defaultdict(list)
    for row in permutation(len(labels), seed):
        of_class[labels[row]].append(row)
    need = 2 * k if dev else k
    for place, name in enumerate(names):
        if len(of_class[place]) < need:
            raise ValueError(
                f"k_shot {k} needs {need} rows of each class{' (train and dev)' if dev else ''}, and {origin} has"
                f" {len(of_class[place])} of {name!r}"
            )
    order = {row: place for place, row in enumerate(permutation(len(labels), seed))}

    def drawn(first: int) -> list[int]:
        return sorted((row for rows in of_class.values() for row in rows[first : first + k]), key=order.__getitem__)

    return drawn(0), drawn(k) if dev else []


def with_demonstrations(
    examples: Sequence[Example], task: Task, data: Split, count: int, seed: int | None, evaluated: str, after: bool
) -> list[Example]:
    """The examples with demonstrations before them: solved training examples, as in-context learning shows them.

    Each is its prompt and the right answer, stripped; they are joined by two line breaks. Without a seed every example
    gets a draw of its own, by seeds that are drawn themselves as MeZO draws them.

    Args:
        examples: What is evaluated.
        task: The task.
        data: The split that demonstrations come from.
        count: Demonstrations of an example.
        seed: Decides the one set for all examples; None: a fresh one for each.
        evaluated: Where the examples come from, so that none is shown to itself.
        after: Whether prompts without content follow demonstrations too.

    Raises:
        ValueError: If there are too few rows.
    """
    if len(data) <= count:
        raise ValueError(f"num_demonstrations {count} needs more than {count} rows, and {data.origin} has {len(data)}")
    seeds: Iterable[int] = np.random.RandomState(0).randint(0, 10000, len(examples)).tolist()
    if seed is not None:
        seeds = [seed] * len(examples)
    rows = []
    for example, own_seed in zip(examples, seeds, strict=True):
        drawn = np.random.RandomState(own_seed).permutation(len(data))[: count + 1].tolist()
        itself = example.index if evaluated == data.origin else None
        rows.append([row for row in drawn if row != itself][:count])
    needed = sorted({row for drawn in rows for row in drawn})
    solved = {}
    for shown in examples_of(task, data, needed):
        if shown.label < 0:
            raise ValueError(f"{data.origin}, {shown.where}: a demonstration needs a label, and this row has none")
        solved[shown.index] = (shown.prompt + shown.candidates[shown.label]).strip()
    result = []
    for example, drawn in zip(examples, rows, strict=True):
        before = SEPARATOR.join(solved[row] for row in drawn) + SEPARATOR
        content_free = example.calibration
        if after and content_free is not None:
            content_free = before + content_free
        result.append(replace(example, prompt=before + example.prompt, calibration=content_free))
    return result
