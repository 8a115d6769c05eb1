"""Which candidates a row's label says are right."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from smezo_pl.tasks.task import Task

UNKNOWN = -1
"""A label that is not known: hidden test sets carry it."""


class ExampleError(ValueError):
    """A row that cannot be made into an example. The message names the file, the row and what is allowed."""


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, or NaN where an empty cell became a float."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def right_candidates(
    task: Task,
    value: Any,
    names: Sequence[str],
    label_names: Sequence[str] | None,
    where: str,
) -> list[int]:
    """Places of the right candidates, the one that is trained on first; none if the label is unknown.

    A label may be a name of the task's, a place as an integer or in digits, a boolean, the text of a candidate, or a
    list of texts. Null, NaN, an empty text and -1 are unknown.

    Args:
        task: The task.
        value: What stands in the label's column.
        names: What each candidate is called: its text.
        label_names: What the data set calls the integers of its label column, if it says.
        where: File and row, for errors.

    Raises:
        ExampleError: For a label that is none of these.
    """
    labels = task.labels[: len(names)]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with an empty cell is read as floats
    if missing(value) or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, (list, tuple)):
        places = list(dict.fromkeys(names.index(text) for text in (str(one).strip() for one in value) if text in names))
        if value and not places:
            raise ExampleError(f"{where}: none of the answers {list(value)} in column {task.label!r} is a candidate")
        return places
    name = _name(value, labels)
    number = _number(value, name)
    if number == UNKNOWN and name not in labels:
        return []
    if number is not None and label_names is not None and set(labels) <= set(label_names):
        name = label_names[number] if 0 <= number < len(label_names) else name
    elif number is not None and name not in labels:
        if task.named_labels:
            raise ExampleError(
                f"{where}: column {task.label!r} holds the number {value}, but numberings of {task.name!r} differ"
                f" between copies; it must hold, or be declared with, the names {listed(labels)}"
            )
        if 0 <= number < len(names) and name not in names:
            return [number]
    if name in labels:
        return [labels.index(name)]
    if name in names:
        return [names.index(name)]
    raise ExampleError(
        f"{where}: label {value!r} in column {task.label!r} is outside task {task.name!r},"
        f" allowed are {listed(labels or names)} or 0 to {len(names) - 1}"
    )


def _name(value: Any, labels: Sequence[str]) -> str:
    """The label as a text; ``true`` of JSON, YAML and CSV are one label."""
    name = str(value).strip()
    if name.lower() in ("true", "false") and name not in labels:
        for label in labels:
            if label.lower() == name.lower():
                return label
        return str(int(name.lower() == "true"))
    return name


def _number(value: Any, name: str) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(name) if name.removeprefix("-").isdecimal() else None


def listed(values: Iterable[str]) -> str:
    """The values in quotes, with commas."""
    return ", ".join(repr(value) for value in values)
