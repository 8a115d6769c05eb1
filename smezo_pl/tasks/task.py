"""A task as data: templates of the prompt and of the answers, the label's column, the metrics, the dataset's name."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Literal, get_args

Loss = Literal["classification", "lm"]
LOSSES: tuple[Loss, ...] = get_args(Loss)

Reading = Literal["name", "position", "text"]
READINGS: tuple[Reading, ...] = get_args(Reading)

MASK = "<mask>"
"""Marks in a prompt where a masked language model predicts the label word, whatever its tokenizer's mask is called."""


def _question(text: str) -> str:
    text = text.strip().rstrip("?").rstrip() + "?"
    return text[:1].upper() + text[1:]


def _lower_first(text: str) -> str:
    first, space, rest = text.strip().partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


FILTERS: Mapping[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "question": _question,
    "lower_first": _lower_first,
    "no_period": lambda text: text.rstrip().removesuffix("."),
    "bullets": lambda text: text.replace("@highlight\n", "- "),
    "option": lambda text: re.sub(r"^\s*[A-Z]\s*\)\s*", "", text).strip(),
    "[:-1]": lambda text: text[:-1],
    "lc": lambda text: text[:1].lower() + text[1:],
}
"""What ``{column|name}`` does to the column's text.

``strip``: no white space at either end. ``lower``: lower case. ``question``: stripped, first letter a capital, one
``?`` at the end. ``lower_first``: stripped, first word in lower case unless it is exactly ``I``. ``no_period``: white
space and one period off the end. ``bullets``: ReCoRD's ``@highlight`` lines as ``- `` lines. ``option``: AQuA's
``A)`` off the front. ``[:-1]``: without the last character. ``lc``: first character in lower case.
"""


def unknown(what: str, name: str, known: Collection[str], more: str = "") -> ValueError:
    """The error for a name that is none of those known: similar ones, then all of them."""
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"{what} {name!r}{hint} Choose from {', '.join(known)}{more}")


_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def columns_in(template: str) -> tuple[str, ...]:
    r"""The columns of a template, each once, in their order.

    A template is text with columns in braces, each followed by its filters after bars, for instance
    ``"{premise}\nQuestion: {question|strip}\n"``. ``{{`` and ``}}`` stand for braces.

    Raises:
        ValueError: For a lone brace, empty braces, half a character, or a filter that is not one of `FILTERS`.
    """
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"template {template!r} holds half a character at {error.start}") from error
    columns = []
    for match in _FIELD.finditer(template):
        if match[0] in ("{{", "}}"):
            continue
        if match[1] is None:
            raise ValueError(f"template {template!r} has a lone {match[0]!r} at {match.start()}; write it twice")
        column, *filters = _field(match[1])
        if not column:
            raise ValueError(f"template {template!r} has braces without a column name; write {{{{ for a brace")
        for name in filters:
            if name not in FILTERS:
                raise ValueError(f"template {template!r}: unknown filter {name!r}; there are {', '.join(FILTERS)}")
        columns.append(column)
    return tuple(dict.fromkeys(columns))


def render(template: str, values: Mapping[str, str]) -> str:
    """The template with every column's value filled in; braces in a value are text."""

    def fill(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        column, *filters = _field(match[1])
        value = values[column]
        for name in filters:
            value = FILTERS[name](value)
        return value

    return _FIELD.sub(fill, template)


def _field(inside: str) -> list[str]:
    return [part.strip() for part in inside.split("|")]


@dataclass(frozen=True)
class Source:
    """Where a task's dataset comes from.

    Args:
        path: Name on the Hugging Face hub, ``None`` if the dataset is not there.
        config: The dataset's configuration on the hub.
        revision: Branch or commit on the hub. ``refs/convert/parquet`` is the hub's own conversion of a dataset that
            is stored there as a loading script, which ``datasets`` no longer runs.
        folder: Name of its folder in a local ``data_dir``; the task's name if ``None``.
        train: Name of the training split.
        dev: Name of the split that the dev set is drawn from; ``None`` draws it from the training split, as MeZO does.
        test: Name of the labeled split that the test set is drawn from (MeZO: the validation split).
    """

    path: str | None = None
    config: str | None = None
    revision: str | None = None
    folder: str | None = None
    train: str = "train"
    dev: str | None = None
    test: str = "validation"


@dataclass(frozen=True)
class ListCandidates:
    """Candidates from a column that holds a list: one for each element, or each distinct one if labels are texts.

    Args:
        column: The column with the list.
        text: Template of a candidate; ``slot`` in it stands for the element.
        slot: The characters in the rendered ``text`` that are replaced by the element.
        filter: Name of a template filter that each element goes through first.
        names: Label values that name an element by its index (``A``, ``B``, ...). Without them a label is an element's
            index, counted as they stand in the list, or its text, or a list of texts that all count as correct (the
            first one is trained on).
    """

    column: str
    text: str
    slot: str
    filter: str | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.filter is not None and self.filter not in FILTERS:
            raise ValueError(f"unknown filter {self.filter!r}; there are {', '.join(FILTERS)}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names of options must differ, got {self.names}")


@dataclass(frozen=True)
class GeneratedAnswer:
    r"""An answer that the model generates token by token; it is compared with the references as text.

    Args:
        column: The column with the reference, or with a list of references that each count as correct;
            ``answers.text`` is the field ``text`` of a structured column ``answers``.
        text: Template of what is trained on; ``{answer}`` is the first reference. It ends in what ends an answer.
        max_new_tokens: Most tokens of a generated answer, at least 1.
        stop: Texts that end a generated answer, as does the tokenizer's end-of-sequence token.
    """

    column: str
    text: str = " {answer}\n"
    max_new_tokens: int = 50
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        if not self.max_new_tokens >= 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if columns_in(self.text) != ("answer",):
            raise ValueError(f"text of a generated answer must hold {{answer}} and no other column, got {self.text!r}")
        if not self.stop or not all(self.stop):
            raise ValueError(f"stop must name at least one text, none of them empty, got {self.stop!r}")


@dataclass(frozen=True)
class Task:
    """A task as data: what the model is shown, what it may answer, which answer is correct.

    The space between prompt and candidate belongs to the candidate (``" great"``). After a prompt that ends in a
    newline the candidate has none (``"Yes"``).

    Args:
        name: Name in the registry and of the local folder.
        prompt: Template of the prompt. Spaces at its end and white space at its start are dropped once it is filled in.
            One with ``<mask>`` is for a masked language model, which predicts the candidate there.
        candidates: For each label's name the template of its text; or a `ListCandidates`; or a `GeneratedAnswer`.
        label: Column of the label.
        label_is: How a label may be read: as a ``name``, as a ``position`` among the candidates from 0, or as the
            ``text`` of one. Of several the file decides, see ``smezo_pl.tasks.labels``. Empty: any of them, but no
            position where a mapping, or numbers as names, give the labels names.
        objective: ``"classification"``: cross-entropy over the candidates' mean log-probabilities. ``"lm"``: token
            cross-entropy on the gold candidate alone.
        metrics: Names of what is measured beside the loss (and the accuracy, where there are candidates), the first
            one first; see ``smezo_pl.tasks.metrics``.
        source: Where the dataset comes from; ``None`` for local files.
        words: For a column, its values in the dataset and what stands for them in the prompt.
        may_be_empty: Columns of the prompt that may be blank.
        group: Columns that the answers to one question share (MultiRC), for metrics over whole questions.
        calibration: Template of the content-free prompt, for calibrated scores; ``None`` where there is none.
        num_train: Training examples by default.
        num_dev: Dev examples by default.
        num_test: Test examples by default, at most.

    Raises:
        ValueError: If prompt, candidates and objective are invalid or do not fit together.
    """

    name: str
    prompt: str
    candidates: Mapping[str, str] | ListCandidates | GeneratedAnswer
    label: str = "label"
    label_is: tuple[Reading, ...] = ()
    objective: Loss = "classification"
    metrics: tuple[str, ...] = ("accuracy",)
    source: Source | None = None
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    may_be_empty: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    calibration: str | None = None
    num_train: int = 1000
    num_dev: int = 500
    num_test: int = 1000

    def __post_init__(self) -> None:
        if self.objective not in LOSSES:
            raise ValueError(f"objective must be one of {', '.join(LOSSES)}, got {self.objective!r}")
        if self.prompt.endswith(" "):
            raise ValueError(
                f"prompt must not end in a space, got {self.prompt!r}: the space belongs to the candidate (' great')"
            )
        if self.prompt.count(MASK) > 1:
            raise ValueError(f"prompt must hold {MASK} once at most, got {self.prompt!r}")
        if self.is_masked and (not isinstance(self.candidates, Mapping) or self.objective != "classification"):
            raise ValueError(
                f"task {self.name!r} has {MASK} in its prompt: its candidates must be a word for each label, and its"
                f" objective 'classification', got {self.objective!r}"
            )
        for kind in self.label_is:
            if kind not in READINGS:
                raise ValueError(f"label_is must be one of {', '.join(READINGS)}, got {kind!r}")
            if self.is_generation or (kind == "name" and not self.labels):
                needed = "candidates" if self.is_generation else "names"
                raise ValueError(f"label_is {kind!r} is for labels with {needed}, and task {self.name!r} has none")
        # Parsed now, so that a misspelled template is refused where it is written.
        _ = self.text_columns
        if self.is_generation and self.objective == "classification":
            raise ValueError(f"task {self.name!r} has no candidates to classify: objective must be 'lm'")
        if not isinstance(self.candidates, Mapping):
            return
        texts = list(self.candidate_templates)
        if len(texts) < 2:
            raise ValueError(f"candidates must be at least two, got {texts}")
        for text in texts:
            if not text.strip():
                raise ValueError(f"candidates must not be blank, got {text!r}")
            if texts.count(text) > 1:
                raise ValueError(f"candidates must differ, got {text!r} more than once")

    @property
    def candidate_templates(self) -> tuple[str, ...]:
        """The candidates' templates: one for each label, or the one of a `ListCandidates`."""
        if isinstance(self.candidates, Mapping):
            return tuple(self.candidates.values())
        return (self.candidates.text,) if isinstance(self.candidates, ListCandidates) else ()

    @property
    def is_masked(self) -> bool:
        """Whether the prompt holds a mask."""
        return MASK in self.prompt

    @property
    def is_generation(self) -> bool:
        """Whether the model generates the answer."""
        return isinstance(self.candidates, GeneratedAnswer)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the dataset's order; empty when a label is the text of a candidate."""
        if isinstance(self.candidates, Mapping):
            return tuple(str(name) for name in self.candidates)
        return self.candidates.names if isinstance(self.candidates, ListCandidates) else ()

    @property
    def readings(self) -> tuple[Reading, ...]:
        """How a label may be read, the first that fits first."""
        if self.label_is or self.is_generation:
            return self.label_is or ("text",)
        if not self.labels:
            return ("position", "text")
        numbered = isinstance(self.candidates, Mapping) or any(map(str.isdecimal, self.labels))
        return ("name", "text") if numbered else ("name", "position", "text")

    @property
    def names_first(self) -> bool:
        """Whether a label that is the name of one is nothing else."""
        return isinstance(self.candidates, Mapping) and self.readings[0] == "name"

    @cached_property
    def candidate_columns(self) -> tuple[str, ...]:
        """The columns that the texts of the candidates come from; none where all rows have the same."""
        if isinstance(self.candidates, ListCandidates):
            return (self.candidates.column,)
        return tuple(dict.fromkeys(column for text in self.candidate_templates for column in columns_in(text)))

    @cached_property
    def text_columns(self) -> tuple[str, ...]:
        """The columns whose text the prompts and the candidates show."""
        templates = (self.prompt, *self.candidate_templates, self.calibration or "")
        return tuple(dict.fromkeys(column for template in templates for column in columns_in(template)))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every column that an example is made of, the label's or the answer's last."""
        shown = dict.fromkeys((*self.text_columns, *self.group))
        if isinstance(self.candidates, GeneratedAnswer):
            return (*shown, self.candidates.column.partition(".")[0])
        lists = (self.candidates.column,) if isinstance(self.candidates, ListCandidates) else ()
        return (*shown, *lists, self.label)
