"""From a row of a data set to an example: the prompt, the candidates and which of them are right."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from smezo_pl.tasks.labels import UNKNOWN, ExampleError, listed, missing, right_candidates
from smezo_pl.tasks.task import FreeText, ListCandidates, Task
from smezo_pl.tasks.template import FILTERS, Template


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
        index: Number of the row, for :attr:`Example.index` and for errors.
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
    if isinstance(task.candidates, FreeText):
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
    correct = right_candidates(task, row.get(task.label), answers, label_names, where)
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


def _free(free: FreeText, prompt: str, row: Mapping[str, Any], index: int, where: str, line: str) -> Example:
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
