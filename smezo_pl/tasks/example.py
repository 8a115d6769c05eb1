"""From a row of a dataset to an example: its prompt, its candidates and which of them are correct."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from smezo_pl.tasks.labels import UNKNOWN, LabelReading
from smezo_pl.tasks.task import FILTERS, MASK, GeneratedAnswer, ListCandidates, Task, render
from smezo_pl.tasks.text import ExampleError, as_text, is_missing


@dataclass(frozen=True)
class Example:
    """What the model is shown and what it may answer.

    Attributes:
        prompt: The text before the answer, without a space at its end.
        candidates: The possible answers; a space before an answer is part of it.
        label: Index of the gold candidate, -1 if it is unknown.
        correct: Indices of all candidates that count as correct (ReCoRD: an entity may go by several names).
        index: Row of the dataset that it was made from.
        answers: Name of each candidate for metrics on texts: the element that it was made from, or its text.
        references: The correct answers as text, each of which counts; empty if unknown.
        group: A number that all answers to one question share; 0 where the task has no such groups.
        calibration: The content-free prompt, None where the task has none.
        line: Its line in its file, for errors: ``line 7``; empty for ``row <index>``.
        mask_at: Where the task's own ``<mask>`` begins in the prompt of a masked language model; -1 without one.
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
    mask_at: int = -1

    @property
    def where(self) -> str:
        """Its line or row in its file."""
        return self.line or f"row {self.index}"


def make_example(
    task: Task,
    row: Mapping[str, Any],
    index: int = 0,
    origin: str = "row",
    label_names: Sequence[str] | None = None,
    line: str = "",
    reading: LabelReading | None = None,
) -> Example:
    """Fill in the task's prompt and candidates from one row.

    Args:
        task: The task.
        row: Column names and values.
        index: Number of the row, for `Example.index` and for errors.
        origin: The file that it comes from, for errors.
        label_names: The dataset's names for the integers of its label column, if it declares them.
        line: Its line in that file, for errors; ``row <index>`` if empty.
        reading: How the labels of its file are read; this row's label alone decides it if None.

    Raises:
        ExampleError: A blank text, a value that the task does not know, a label outside the task.
    """
    where = f"{origin}, {line or f'row {index}'}"
    values = {column: _text(task, column, row.get(column), where) for column in task.text_columns}
    # MeZO strips the same: a prompt neither starts with white space nor ends in a space.
    prompt = render(task.prompt, values).lstrip().rstrip(" ")
    before, mask, _ = task.prompt.partition(MASK)
    mask_at = len(render(before, values).lstrip()) if mask else -1
    if isinstance(task.candidates, GeneratedAnswer):
        references = _references(task.candidates.column, row, where)
        if not references:
            return Example(prompt, (), UNKNOWN, (), index, line=line)
        text = render(task.candidates.text, {"answer": references[0]})
        return Example(prompt, (text,), 0, (0,), index, references[:1], references, line=line)
    value, options = row.get(task.label), options_of(task, row, where)
    if reading is None:
        reading = LabelReading.of(task, [(where, value, lambda: options)], label_names or (), origin)
    gold = reading.gold(value, options, where)
    kept = reading.kept(options)
    answers = tuple(str(options[option]) for option in kept)
    texts = [render(template, values) for template in task.candidate_templates]
    if isinstance(task.candidates, ListCandidates):
        texts = [texts[0].replace(task.candidates.slot, answer) for answer in answers]
    texts = [text.rstrip(" ") for text in texts]
    for text in texts:
        if not text.strip():
            raise ExampleError(f"{where}: a candidate of task {task.name!r} is blank")
        # An option that repeats is one answer; others are not.
        same = [answer for other, answer in zip(texts, answers, strict=True) if other == text]
        if len(same) > 1 and (isinstance(task.candidates, Mapping) or len(set(same)) > 1):
            raise ExampleError(f"{where}: two candidates have the same text {text!r}, so no label can tell them apart")
    trained, *_ = [kept.index(option) for option in gold if option in kept] or [UNKNOWN]
    correct = tuple(index for index, option in enumerate(kept) if option in gold)
    return Example(
        prompt,
        tuple(texts),
        label=trained,
        correct=correct,
        index=index,
        answers=answers,
        references=tuple(dict.fromkeys(answers[candidate] for candidate in correct)),
        group=_group(task, values, row, where),
        calibration=None if task.calibration is None else render(task.calibration, values).strip(" "),
        line=line,
        mask_at=mask_at,
    )


def options_of(task: Task, row: Mapping[str, Any], where: str) -> list[str | None]:
    """The texts that a row's label may be one of: the options as they stand in its list, or the task's candidates.

    Raises:
        ExampleError: If a value is no text.
    """
    if isinstance(task.candidates, ListCandidates):
        return _options(task.candidates, row.get(task.candidates.column), where)
    values = {column: _text(task, column, row.get(column), where) for column in task.candidate_columns}
    return [render(template, values).strip() for template in task.candidate_templates]


def _quoted(values: Iterable[str]) -> str:
    return ", ".join(map(repr, values))


def _text(task: Task, column: str, value: Any, where: str) -> str:
    words = task.words.get(column)
    if words is not None and isinstance(value, bool):
        # YAML's `true` as a key became "True".
        value = next((key for key in words if key.lower() == str(value).lower()), str(value))
    text = "" if is_missing(value) else as_text(value, column, where)
    if words is not None:
        if text not in words:
            raise ExampleError(f"{where}: column {column!r} is {text!r}, must be one of {_quoted(words)}")
        return words[text]
    if not text.strip() and column not in task.may_be_empty:
        raise ExampleError(f"{where}: empty example, column {column!r} holds no text")
    return text


def _options(candidates: ListCandidates, value: Any, where: str) -> list[str | None]:
    """The options as they stand in the list; None for a null, which is no option but keeps its position."""
    column = candidates.column
    if not isinstance(value, (list, tuple)):
        way = "; write the list that the structure holds as a column" if isinstance(value, Mapping) else ""
        raise ExampleError(f"{where}: column {column!r} must hold a list of texts, got {str(value)[:60]!r}{way}")
    change = FILTERS[candidates.filter or "strip"]
    options = [None if is_missing(item) else change(as_text(item, column, where)) for item in value]
    distinct = tuple(dict.fromkeys(option for option in options if option is not None))
    if len(distinct) < 2:
        raise ExampleError(f"{where}: column {column!r} must hold at least two candidates, got {distinct}")
    return options


def _references(column: str, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The distinct references of a generated answer; none if they are unknown.

    A field is that of a structure, or of each structure of a list.
    """
    root, *fields = column.split(".")
    value = row.get(root)
    for name in fields:
        if isinstance(value, list):
            value = [_field_of(item, name, column, where) for item in value]
        else:
            value = _field_of(value, name, column, where)
    values = value if isinstance(value, (list, tuple)) else (value,)
    for text in values:
        if isinstance(text, Mapping):
            fields = [f"{column}.{name}" for name in text]
            raise ExampleError(
                f"{where}: column {column!r} holds a structure: name the field that is the answer, {', '.join(fields)}"
            )
    texts = (as_text(text, column, where).strip() for text in values if not is_missing(text))
    return tuple(dict.fromkeys(text for text in texts if text))


def _field_of(value: Any, name: str, column: str, where: str) -> Any:
    if value is not None and (not isinstance(value, Mapping) or name not in value):
        raise ExampleError(f"{where}: column {column.split('.')[0]!r} has no field {name!r} (of {column!r}): {value!r}")
    return None if value is None else value[name]


def _group(task: Task, values: Mapping[str, str], row: Mapping[str, Any], where: str) -> int:
    """A hash of the group's columns: the same in every process, and for equal texts wherever they stand."""
    if not task.group:
        return 0
    texts = []
    for column in task.group:
        if column not in values and is_missing(row.get(column)):
            raise ExampleError(f"{where}: column {column!r} of the task's group is empty")
        texts.append(values[column] if column in values else as_text(row[column], column, where))
    text = "\0".join(texts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
