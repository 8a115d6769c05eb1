"""Which candidates a row's label says are right."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from smezo_pl.tasks.task import FILTERS, GeneratedAnswer, ListCandidates, Task, Template

UNKNOWN = -1
"""A label that is not known: hidden test sets carry it."""


class ExampleError(ValueError):
    """A row that cannot be made into an example. The message names the file, the row and what is allowed."""


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, or NaN where an empty cell became a float."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def gold_candidates(
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


@dataclass(frozen=True)
class Example:
    """What the model is shown and what it may answer.

    Attributes:
        prompt: The text before the answer, without a space at its end.
        candidates: The possible answers; a space before an answer is part of it.
        label: Place of the right candidate, -1 if it is not known.
        correct: Places of all candidates that count as right (ReCoRD: an entity may go by several names).
        index: Row of the data set that it was made from.
        answers: What each candidate is called for metrics on texts: the element that it was made from, or its text.
        references: The right answers as text, each of which counts; empty if unknown.
        group: A number that all answers to one question share; 0 where the task has no such groups.
        calibration: The prompt without content, None where the task has none.
        line: Where it stands in its file, for errors: ``line 7``; empty for ``row <index>``.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int
    correct: tuple[int, ...]
    index: int
    answers: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    group: int = 0
    calibration: str | None = None
    line: str = ""

    @property
    def where(self) -> str:
        """Its place in its file."""
        return self.line or f"row {self.index}"

    def __str__(self) -> str:
        """The prompt with every candidate in brackets, the right one with a star."""
        answers = (
            f"⟦{text}⟧{'*' if place in self.correct else ''}".replace("\n", "⏎")
            for place, text in enumerate(self.candidates)
        )
        return self.prompt + " ".join(answers)


def make_example(
    task: Task,
    row: Mapping[str, Any],
    index: int = 0,
    origin: str = "row",
    label_names: Sequence[str] | None = None,
    line: str = "",
) -> Example:
    """Fill in the task's prompt and candidates from one row.

    Args:
        task: The task.
        row: Column names and values.
        index: Number of the row, for `Example.index` and for errors.
        origin: The file that it comes from, for errors.
        line: Where it stands in that file, for errors; ``row <index>`` if empty.
        label_names: What the data set calls the integers of its label column, if it says.

    Raises:
        ExampleError: A blank text, a value that the task does not know, a label outside the task.
    """
    where = f"{origin}, {line or f'row {index}'}"
    values = {column: _text(task, column, row.get(column), where) for column in task.text_columns}
    # MeZO strips the same: a prompt neither starts with white space nor ends in a space.
    prompt = task.prompt_template.render(values).lstrip().rstrip(" ")
    if isinstance(task.candidates, GeneratedAnswer):
        return _free(task.candidates, prompt, row, index, where, line)
    if isinstance(task.candidates, ListCandidates):
        items = _items(task.candidates, row.get(task.candidates.column), where)
        pattern = task.candidate_templates[0].render(values)
        texts = tuple(pattern.replace(task.candidates.slot, item).rstrip(" ") for item in items)
    else:
        items = ()
        texts = tuple(template.render(values).rstrip(" ") for template in task.candidate_templates)
    for text in texts:
        if not text.strip():
            raise ExampleError(f"{where}: a candidate of task {task.name!r} is blank")
        if texts.count(text) > 1:
            raise ExampleError(f"{where}: two candidates have the same text {text!r}, so no label can tell them apart")
    answers = items or tuple(text.strip() for text in texts)
    correct = gold_candidates(task, row.get(task.label), answers, label_names, where)
    label = correct[0] if correct else UNKNOWN
    right = tuple(sorted(correct))
    references = tuple(answers[place] for place in right)
    content_free = task.calibration_template
    calibration = None if content_free is None else content_free.render(values).strip(" ")
    group = _group(task, values, row)
    return Example(prompt, texts, label, right, index, answers, references, group, calibration, line)


def _group(task: Task, values: Mapping[str, str], row: Mapping[str, Any]) -> int:
    """A hash of the group's columns: the same in every process, and of equal texts wherever they stand."""
    if not task.group:
        return 0
    text = "\0".join(str(values.get(column, row.get(column))) for column in task.group)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _free(free: GeneratedAnswer, prompt: str, row: Mapping[str, Any], index: int, where: str, line: str) -> Example:
    """An example whose one candidate is the text that is trained on."""
    value = row.get(free.root)
    for part in free.column.split(".")[1:]:
        if value is not None and (not isinstance(value, Mapping) or part not in value):
            raise ExampleError(f"{where}: column {free.root!r} has no part {part!r} (of {free.column!r}): {value!r}")
        value = None if value is None else value[part]
    if isinstance(value, (list, tuple)):
        found = [str(text).strip() for text in value if not missing(text)]
    else:
        found = [] if missing(value) else [str(value).strip()]
    references = tuple(dict.fromkeys(text for text in found if text))
    if not references:
        return Example(prompt, (), UNKNOWN, (), index, line=line)
    text = Template(free.text).render({"answer": references[0]})
    return Example(prompt, (text,), 0, (0,), index, (references[0],), references, line=line)


def _text(task: Task, column: str, value: Any, where: str) -> str:
    if isinstance(value, (list, tuple, Mapping)):
        raise ExampleError(f"{where}: column {column!r} must hold a text, got {str(value)[:60]}")
    text = "" if missing(value) else str(value)
    if column in task.words:
        if text not in task.words[column]:
            raise ExampleError(f"{where}: column {column!r} is {text!r}, must be one of {listed(task.words[column])}")
        return task.words[column][text]
    if not text.strip() and column not in task.may_be_empty:
        raise ExampleError(f"{where}: empty example, column {column!r} holds no text")
    return text


def _items(candidates: ListCandidates, value: Any, where: str) -> tuple[str, ...]:
    if missing(value) or isinstance(value, str) or not isinstance(value, Iterable):
        raise ExampleError(f"{where}: column {candidates.column!r} must hold a list of texts, got {value!r}")
    change = FILTERS[candidates.filter or "strip"]
    if candidates.names:
        # A label that names a place needs every place kept.
        items = tuple(change(str(item)) for item in value)
    else:
        items = tuple(dict.fromkeys(change(str(item)) for item in value))
    if len(items) < 2:
        raise ExampleError(f"{where}: column {candidates.column!r} must hold at least two candidates, got {items}")
    return items
