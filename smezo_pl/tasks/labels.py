"""How the labels of a file are read: as names, as positions or as texts, decided once for the whole file."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from numbers import Integral
from typing import Any

from smezo_pl.tasks.task import ListCandidates, Reading, Task
from smezo_pl.tasks.text import ExampleError

UNKNOWN = -1
"""An unknown label: hidden test sets carry it."""

UNCLEAR = (-2,)
"""What a label is that spells several names or candidates, or stands for an option that is null."""

SHORT_FORMS = (
    ("yes", "y", "true", "t"),
    ("no", "n", "false", "f"),
    ("positive", "pos"),
    ("negative", "neg"),
    ("neutral", "neu"),
    ("entailment", "entail", "entails"),
    ("contradiction", "contradict", "contradicts"),
)
"""Spellings of one name, in lower case. Those of yes and no are what truth values are matched with."""

_OPINIONS = {
    **dict.fromkeys(("good", "great", "excellent", "wonderful", "amazing"), "positive"),
    **dict.fromkeys(("bad", "terrible", "awful", "horrible", "poor"), "negative"),
}
"""Candidates that say the same as a name: enough to refuse an order, not to read a label by."""

_ANSWERS = {"entailment": "yes", "contradiction": "no"}
"""The same for names, as the prompt of an inference is a question."""

_SHORT = {spelling: group[0] for group in SHORT_FORMS for spelling in group}
_JOINED = re.compile(r"(?<=[a-z])[_-](?=[a-z])")
_WHOLE = re.compile(r"(0|-?[1-9][0-9]{0,999})(\.0+)?")

Options = Sequence[str | None]
"""The texts of a row's candidates as they stand in the file; None for one that is null."""

Cell = tuple[str, Any, Callable[[], Options]]
"""File and line of a label, for errors; its value; its row's options."""


def plain(value: Any) -> Any:
    """A cell as a whole number, a truth value, a stripped text, a tuple of texts, or None if it is empty.

    ``1.0`` is 1, as a number and as a text: a column of integers with an empty cell is written so. ``02`` is a text.
    """
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        text = value.strip()
        number = _WHOLE.fullmatch(text)
        return int(number[1]) if number else text or None
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, (float, Decimal)):
        if value != value:
            return None
        return int(value) if float(value).is_integer() else str(value)
    if isinstance(value, (list, tuple)):
        return tuple(text.strip() if isinstance(text, str) else text for text in value) or None
    return value


def _raw(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) else None


def _number(value: Any) -> int | str | None:
    cell = plain(value)
    return cell if isinstance(cell, str) or type(cell) is int else None


def _meaning(letters: bool, value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    folded = _JOINED.sub(" ", value.strip().casefold()) if isinstance(value, str) else None
    return _SHORT.get(folded, folded) if folded and (letters or len(folded) > 1) else folded


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().casefold() in ("true", "false"))


def find(value: Any, known: Options, loose: bool) -> tuple[int, ...]:
    """The indices of the texts that a value may spell: of one text, which may repeat, or of several.

    It is compared as it stands, then as a number, then, if ``loose`` or a truth value, in lower case and by short
    forms. The first comparison that finds something decides. A letter is a short form among two texts only: beside
    entailment and contradiction, ``n`` is hardly no.
    """
    meaning = partial(_meaning, _is_truth(value) or len(known) == 2)
    for form in (_raw, _number, *((meaning,) if loose or _is_truth(value) else ())):
        own = form(value)
        hits = tuple(i for i, text in enumerate(known) if own is not None and text is not None and form(text) == own)
        if hits:
            return hits
    return ()


@dataclass(frozen=True)
class LabelReading:
    """How one file's labels are read.

    Attributes:
        task: The task.
        kinds: The readings that every label of the file allows, and that agree on each; the first one is taken.
        declared: What the file calls the integers of its label column, if it says so.
        codes: The same if that is what they are read as; empty if the integers themselves are.
        origin: The file, for errors.
    """

    task: Task
    kinds: tuple[Reading, ...]
    declared: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    origin: str = ""

    @classmethod
    def of(cls, task: Task, cells: Iterable[Cell], declared: Sequence[str] = (), origin: str = "") -> "LabelReading":
        """The reading that a file's labels allow.

        Where the task has names for its labels, the first reading that a label allows is the only one. Otherwise all
        that it allows must agree.

        Args:
            task: The task. If it leaves only one reading, ``cells`` are not looked at.
            cells: The labels, one of each value where the candidates do not depend on the row.
            declared: What the file calls the integers of its label column, if it says so.
            origin: The file, for errors.

        Raises:
            ExampleError: If a label has two readings that differ, if two labels have no reading in common, or if the
                names that the file declares do not fit the task's.
        """
        reading = cls(task, task.readings, origin=origin)
        # Numbers as names of themselves say nothing.
        if any(name != str(index) for index, name in enumerate(declared)):
            reading = reading._with_declared(tuple(declared))
        return replace(reading, kinds=reading._inferred(cells)) if len(reading.kinds) > 1 else reading

    def _with_declared(self, declared: tuple[str, ...]) -> "LabelReading":
        """What is left of the readings by the file's names for its numbers, which must not contradict the task."""
        task, names = self.task, self.task.labels
        by_name = [hits if len(hits := find(name, names, loose=True)) == 1 else () for name in declared]
        by_number = [find(number, names, loose=False) for number in range(len(declared))]
        # The file says what its numbers are, so they are no positions among the task's names.
        named = tuple(kind for kind in self.kinds if kind != "position")
        compared = not task.candidate_columns and len(self.kinds) > 1
        problem = ""
        if "name" not in self.kinds:
            reading = replace(self, declared=declared, codes=() if self.kinds == ("position",) else declared)
            if compared and len(declared) != len(names):
                problem = "a list of candidates is for as many labels"
            elif compared:
                problem = reading._contradiction([(number,) for number in range(len(declared))])
        elif any(by_name) or not any(by_number):
            reading = replace(self, kinds=named, declared=declared, codes=declared)
            if twice := [hit for hit in by_name if hit and by_name.count(hit) > 1]:
                problem = f"two of them are {names[twice[0][0]]!r}"
            elif any(by_number) and not set(names) <= set(declared):
                problem = "a number of the file and its name are different labels of the task"
        else:
            reading = replace(self, kinds=named, declared=declared)
            if compared and len(set(by_number) - {()}) < len(names):
                problem = f"the numbers of the file are 0 to {len(declared) - 1}"
            elif compared:
                problem = reading._contradiction(by_number)
        if problem:
            raise ExampleError(
                f"{self.origin}: column {task.label!r} declares the labels {_quoted(declared)}, and task {task.name!r}"
                f" has {_quoted(names)}: {problem}; write candidates: {{name: text}} with the file's names"
                + ("" if "name" in self.kinds else ", or label_is: position")
            )
        return reading

    def _contradiction(self, by_number: Sequence[tuple[int, ...]]) -> str:
        """Where a declared name reads like another candidate than the one that its number is."""
        texts = [text.strip() for text in self.task.candidate_templates]
        # Among more, "terrible" may be another degree than "negative".
        read = [_OPINIONS.get(text.casefold(), text) if len(texts) <= 3 else text for text in texts]
        for name, number in zip(self.declared, by_number, strict=True):
            text = find(_ANSWERS.get(str(_meaning(True, name)), name), read, loose=True)
            if len(text) == 1 and text != number:
                told = repr(texts[number[0]]) if number else "no candidate"
                return f"{name!r} is {texts[text[0]]!r} by its name and {told} by its number"
        return ""

    def _inferred(self, cells: Iterable[Cell]) -> tuple[Reading, ...]:
        common, because, odd, numbers = self.kinds, "", "", set[int]()
        for where, value, options in cells:
            try:
                golds = self._possible(value, options)
            except ExampleError:
                continue  # no example: refused or left out when it is made into one
            if type(number := plain(value)) is int:
                numbers.add(number)
            if not any(golds.values()):
                texts = self.task.candidate_templates if self.task.names_first else options()
                if not odd and number in (UNKNOWN, len(texts)):
                    odd = f"{where}: {self._refusal(value, texts)}"
                continue
            label = f"{where}: label {value!r} in column {self.task.label!r}"
            if len(set(map(frozenset, golds.values()))) > 1:
                texts = options()
                told = [f"as {kind} {_told(gold, texts)}" for kind, gold in golds.items()]
                raise ExampleError(f"{label} has two readings, {', '.join(told)}; write {_ways(golds)} in the task")
            kept = tuple(kind for kind in common if kind in golds)
            if not kept:
                raise ExampleError(
                    f"{label} is a {' or '.join(golds)}, but {because}; a file's labels are read in one way: write them"
                    " so" + ("" if self.task.source else f", or {_ways(self.kinds)} in the task")
                )
            if kept != common:
                common, because = kept, f"{value!r} in {where} is a {' or '.join(golds)}"
        if odd and common[0] == "position" and numbers - {UNKNOWN} and 0 not in numbers:
            # Where such rows are left out, the others would be read off by one.
            raise ExampleError(
                f"{odd}; no label is 0, so these are hardly positions: name them, {{1: TEXT, 2: TEXT}}, for a list in"
                " a column names: [1, 2], or write label_is: position"
            )
        return common

    def _possible(self, value: Any, options: Callable[[], Options]) -> dict[Reading, tuple[int, ...]]:
        """What a label is under the readings that it allows; where names come first, under the first of them."""
        named, golds = self.task.names_first, dict[Reading, tuple[int, ...]]()
        # Names and positions in a mapping do not depend on the row, whose texts take time.
        texts: Options = self.task.candidate_templates if named else options()
        for kind in self.kinds:
            texts = options() if named and kind == "text" else texts
            if (gold := self._under(kind, value, texts)) is not None:
                golds[kind] = gold
                if named:
                    break
        if named and "text" in golds and not self.codes:
            # No name, but the text of one candidate may be the position of another.
            rival = self._under("position", value, texts)
            golds |= {"position": rival} if rival else {}
        return golds

    def _under(self, kind: Reading, value: Any, options: Options) -> tuple[int, ...] | None:
        """The indices of the correct options, the one that is trained on first; none if the label is unknown.

        None if it cannot be read so, or `UNCLEAR`.
        """
        cell = plain(value)
        if cell is None:
            return ()
        if isinstance(cell, tuple):
            texts = [find(text, options, loose=False) for text in cell if isinstance(text, str) and kind == "text"]
            clear = [hits for hits in texts if len({options[i] for i in hits}) == 1]
            return tuple(dict.fromkeys(i for hits in clear for i in hits)) or None
        known: Options = self.task.labels[: len(options)] if kind == "name" else options
        found: tuple[int, ...]
        if kind == "position":
            found = (cell,) if type(cell) is int and 0 <= cell < len(options) else ()
        else:
            if self.codes and type(cell) is int:
                value = self.codes[cell] if 0 <= cell < len(self.codes) else None
            found = find(value, known, loose=kind == "name" or not self.task.candidate_columns)
        if not found:
            return () if type(cell) is int and cell == UNKNOWN else None
        if options[found[0]] is None or (kind != "position" and len({known[i] for i in found}) > 1):
            return UNCLEAR
        if isinstance(self.task.candidates, ListCandidates):  # an option that repeats is one answer
            return (found[0], *(i for i, text in enumerate(options) if text == options[found[0]] and i != found[0]))
        return found if len(found) == 1 else UNCLEAR

    def gold(self, value: Any, options: Options, where: str) -> tuple[int, ...]:
        """The indices of the correct options, the one that is trained on first; none if the label is unknown.

        Raises:
            ExampleError: If the label is none of those that the task has.
        """
        gold = self._under(self.kinds[0], value, options)
        if gold is None or gold == UNCLEAR:
            raise ExampleError(f"{where}: {self._refusal(value, options)}")
        return gold

    def _refusal(self, value: Any, options: Options) -> str:
        task, cell = self.task, plain(value)
        if isinstance(cell, tuple):
            return f"none of the answers {list(value)} in column {task.label!r} is a candidate"
        label = f"label {value!r} in column {task.label!r}"
        texts = dict.fromkeys(text for text in options if text is not None)
        names = task.labels[: len(options)] if "name" in self.kinds else tuple(texts)
        if _is_truth(value):
            return (
                f"{label} is a truth value, and task {task.name!r} has no name or candidate, or several, that say so:"
                f" {_quoted(names)}; write a mapping, candidates: {{true: TEXT, false: TEXT}}"
            )
        allowed = [_quoted(names)] if self.kinds != ("position",) else []
        allowed += [f"0 to {len(options) - 1}"] if "position" in self.kinds else []
        if self._under(self.kinds[0], value, options) == UNCLEAR:
            return f"{label} stands for a null option, or for several of {_quoted(names)}"
        text = f"{label} is outside task {task.name!r}, allowed are {' or '.join(allowed)}"
        if isinstance(task.candidates, ListCandidates) and isinstance(cell, str) and len(cell) == 1 and not task.labels:
            return f"{text}; for letters write candidates: {{column: {task.candidates.column}, names: [A, B, ...]}}"
        if type(cell) is not int:
            return text
        if self.codes:
            return f"{text}; the file calls its labels {_quoted(self.codes)}"
        if "position" in self.kinds or any(type(plain(name)) is int for name in names):
            return text
        way = (
            "" if task.source else " or the task, {0: TEXT, 1: TEXT}, or label_is: position if they count in this order"
        )
        return f"{text}; numbers need names of their own in the file{way}"

    def kept(self, options: Options) -> list[int]:
        """The indices of the options that are candidates: none that is null, and if labels are texts each text once."""
        once = self.kinds[0] == "text"
        return [i for i, text in enumerate(options) if text is not None and not (once and text in options[:i])]

    def describe(self) -> str:
        """Which label is which candidate; empty where labels are the task's own names."""
        task, kind = self.task, self.kinds[0]
        if task.is_generation:
            return ""
        if isinstance(task.candidates, ListCandidates):
            return f"each label is the {kind} of an option in column {task.candidates.column!r}"
        if task.names_first and kind != "text" and all(name in task.labels for name in self.declared):
            return ""
        if kind == "text" and task.candidate_columns:
            return "each label is the text of a candidate"
        texts = task.candidate_templates
        options = [text.strip() for text in texts]
        own: dict[Reading, Sequence[Any]] = {"name": task.labels, "position": range(len(texts)), "text": options}
        labels = range(len(self.declared)) if self.declared else own[kind]
        golds = [self._under(kind, label, options) for label in labels]
        return ", ".join(
            f'{label} -> "{texts[gold[0]]}"' if gold and gold != UNCLEAR else f"{label} -> no candidate"
            for label, gold in zip(self.declared or labels, golds, strict=True)
        )

    @property
    def _agreeing(self) -> set[Reading]:
        """The readings that give the same: also positions where the file's names stand in the task's own order."""
        in_order = [(index,) for index in range(len(self.codes))]
        ordered = self.codes and [find(name, self.task.labels, loose=True) for name in self.codes] == in_order
        return {*self.kinds, "position"} if ordered else {*self.kinds}

    def check_agrees(self, other: "LabelReading") -> None:
        """Refuse two files of one task whose labels are read in different ways.

        Raises:
            ExampleError: If they are.
        """
        files = f"{other.origin} and {self.origin}: column {self.task.label!r} holds"
        if not self._agreeing & other._agreeing:
            raise ExampleError(
                f"{files} a {other.kinds[0]} in the one and a {self.kinds[0]} in the other; write the labels of a task"
                " in one way"
            )
        if self.kinds[0] == "position" and self.declared and other.declared and self.declared != other.declared:
            raise ExampleError(
                f"{files} positions of different labels, {_quoted(other.declared)} and {_quoted(self.declared)}"
            )


def _told(gold: tuple[int, ...], texts: Options) -> str:
    if gold == UNCLEAR:
        return "one of several, or null"
    return f"it is {texts[gold[0]]!r}" if gold else "unknown"


def _ways(kinds: Iterable[Reading]) -> str:
    return " or ".join(f"label_is: {kind}" for kind in kinds)


def _quoted(values: Iterable[Any]) -> str:
    return ", ".join(map(repr, values))
