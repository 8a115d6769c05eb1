"""Prompt templates: text with columns in braces, ``"{sentence|strip} It was"``."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def _question(text: str) -> str:
    text = text.strip().rstrip("?").rstrip() + "?"
    return text[:1].upper() + text[1:]


def _lower_first(text: str) -> str:
    first, space, rest = text.strip().partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def _no_period(text: str) -> str:
    text = text.rstrip()
    return text.removesuffix(".")


def _bullets(text: str) -> str:
    return text.replace("@highlight\n", "- ")


def _option(text: str) -> str:
    return re.sub(r"^\s*[A-Z]\s*\)\s*", "", text).strip()


def _first_lower(text: str) -> str:
    return text[:1].lower() + text[1:]


FILTERS: Mapping[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "question": _question,
    "lower_first": _lower_first,
    "no_period": _no_period,
    "bullets": _bullets,
    "option": _option,
    "[:-1]": lambda text: text[:-1],
    "lc": _first_lower,
}
"""What ``{column|name}`` does to the column's text.

``strip``: no white space at either end. ``lower``: lower case. ``question``: stripped, first letter a capital, one
``?`` at the end. ``lower_first``: stripped, first word in lower case unless it is exactly ``I``. ``no_period``: white
space and one full stop off the end. ``bullets``: ReCoRD's ``@highlight`` lines as ``- `` lines. ``option``: AQuA's
``A)`` off the front. ``[:-1]``: without the last character. ``lc``: first character in lower case.
"""


@dataclass(frozen=True)
class _Field:
    column: str
    filters: tuple[str, ...]


class Template:
    r"""Text with columns in braces and, after a bar, what is done to them.

    ``{{`` and ``}}`` stand for braces. Braces in a column's own text are text.

    Args:
        text: The template, for instance ``"{premise}\nQuestion: {question|strip}\n"``.

    Raises:
        ValueError: For a lone brace, empty braces, or a filter that is not one of :data:`FILTERS`.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._pieces: list[str | _Field] = []
        end = 0
        for match in _FIELD.finditer(text):
            self._pieces.append(text[end : match.start()])
            end = match.end()
            if match[0] in ("{{", "}}"):
                self._pieces.append(match[0][0])
            elif match[1] is None:
                raise ValueError(f"template {text!r} has a lone {match[0]!r} at {match.start()}; write it twice")
            else:
                self._pieces.append(self._field(match[1]))
        self._pieces.append(text[end:])
        self.columns = tuple(dict.fromkeys(piece.column for piece in self._pieces if isinstance(piece, _Field)))

    def _field(self, inside: str) -> _Field:
        column, *filters = (part.strip() for part in inside.split("|"))
        if not column:
            raise ValueError(f"template {self.text!r} has braces without a column name; write {{{{ for a brace")
        for name in filters:
            if name not in FILTERS:
                raise ValueError(f"template {self.text!r}: unknown filter {name!r}; there are {', '.join(FILTERS)}")
        return _Field(column, tuple(filters))

    def render(self, values: Mapping[str, str]) -> str:
        """The text with every column's value in its place."""
        parts = []
        for piece in self._pieces:
            if isinstance(piece, str):
                parts.append(piece)
                continue
            value = values[piece.column]
            for name in piece.filters:
                value = FILTERS[name](value)
            parts.append(value)
        return "".join(parts)

    def __repr__(self) -> str:
        return f"Template({self.text!r})"


Loss = Literal["classification", "lm"]
LOSSES: tuple[Loss, ...] = get_args(Loss)


MASK = "<mask>"
"""Stands in a prompt where a masked language model fills in the label word, whatever its tokenizer's mask is called."""


@dataclass(frozen=True)
class Source:
    """Where a task's data set lies.

    Args:
        path: Name on the Hugging Face hub, ``None`` if the data set is not there.
        config: The hub's configuration of it.
        revision: Branch or commit on the hub. ``refs/convert/parquet`` is the hub's own conversion of a data set that
            is kept there as a loading script, which ``datasets`` no longer runs.
        folder: Name of its folder in a local ``data_dir``; the task's name if ``None``.
        train: Name of the training split.
        dev: Name of the split that the dev set is drawn from; ``None`` draws it from the training split, as MeZO does.
        test: Name of the labelled split that the test set is drawn from (MeZO: the validation split).
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
    """Candidates made from a column that holds a list: one for each different element.

    Args:
        column: The column with the list.
        text: Template of a candidate; ``slot`` in it stands for the element.
        slot: The characters in the rendered ``text`` that the element takes the place of.
        filter: Name of a template filter that each element goes through first.
        names: Label values that name an element by its place (``A``, ``B``, ...). Without them a label is an element's
            place as an integer, its text, or a list of texts of which each is right (the first one is trained on).
    """

    column: str
    text: str
    slot: str
    filter: str | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.filter is not None and self.filter not in FILTERS:
            raise ValueError(f"unknown filter {self.filter!r}; there are {', '.join(FILTERS)}")


@dataclass(frozen=True)
class GeneratedAnswer:
    r"""An answer that the model writes itself, token by token; it is compared with the right ones as text.

    Args:
        column: The column with the right answer, or with a list of answers of which each is right; ``answers.text`` is
            the part ``text`` of a structured column ``answers``.
        text: Template of what is trained on; ``{answer}`` is the first right answer. It ends in what ends an answer.
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
        if Template(self.text).columns != ("answer",):
            raise ValueError(f"text of a free answer must hold {{answer}} and no other column, got {self.text!r}")
        if not self.stop or not all(self.stop):
            raise ValueError(f"stop must name at least one text, none of them empty, got {self.stop!r}")

    @property
    def root(self) -> str:
        """The column's own name, without the part of it."""
        return self.column.partition(".")[0]


@dataclass(frozen=True)
class Task:
    """A task as data: what the model is shown, what it may answer, which answer is right.

    The space between prompt and candidate belongs to the candidate (``" great"``). A prompt that ends in a newline is
    followed by the candidate at once (``"Yes"``).

    Args:
        name: Name in the registry and of the local folder.
        prompt: Template of the prompt. Spaces at its end and white space at its start are dropped once it is filled in.
            One that holds ``<mask>`` is for a masked language model, which fills the candidate in there.
        candidates: For each label value, in the data set's own order, the template of its text; or a
            `ListCandidates`; or a `GeneratedAnswer`, which the model writes itself.
        label: Column of the label: the name of a label, its place as an integer, or a boolean.
        objective: ``"classification"``: cross-entropy over the candidates' mean log-probabilities. ``"lm"``: token
            cross-entropy on the right candidate alone.
        metrics: Names of what is measured beside the loss (and the accuracy, where there are candidates), the first
            one first; see ``smezo_pl.tasks.metrics``.
        source: Where the data set lies; ``None`` for one that comes from elsewhere.
        words: For a column, its values in the data set and what stands for them in the prompt.
        named_labels: Integers in the label column mean something only together with the data set's own label names
            (numberings differ between copies).
        may_be_empty: Columns of the prompt that may be blank.
        group: Columns that the answers to one question share (MultiRC), for metrics over whole questions.
        calibration: Template of a prompt without content, for calibrated scores; ``None`` where there is none.
        num_train: Training examples by default.
        num_dev: Dev examples by default.
        num_test: Test examples by default, at most.
    """

    name: str
    prompt: str
    candidates: Mapping[str, str] | ListCandidates | GeneratedAnswer
    label: str = "label"
    objective: Loss = "classification"
    metrics: tuple[str, ...] = ("accuracy",)
    source: Source | None = None
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    named_labels: bool = False
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
        # Parsed now, so that a misspelt template is refused where it is written.
        _ = self.prompt_template, self.candidate_templates, self.calibration_template
        if isinstance(self.candidates, GeneratedAnswer) and self.objective == "classification":
            raise ValueError(f"task {self.name!r} has no candidates to classify: objective must be 'lm'")
        if not isinstance(self.candidates, Mapping):
            return
        texts = list(self.candidates.values())
        if len(texts) < 2:
            raise ValueError(f"candidates must be at least two, got {texts}")
        for text in texts:
            if not text.strip():
                raise ValueError(f"candidates must not be blank, got {text!r}")
            if texts.count(text) > 1:
                raise ValueError(f"candidates must differ, got {text!r} more than once")

    @cached_property
    def prompt_template(self) -> Template:
        """The prompt, parsed."""
        return Template(self.prompt)

    @cached_property
    def candidate_templates(self) -> tuple[Template, ...]:
        """The candidates' texts, parsed: one for each label, or the one of a `ListCandidates`."""
        if isinstance(self.candidates, ListCandidates):
            return (Template(self.candidates.text),)
        if isinstance(self.candidates, GeneratedAnswer):
            return ()
        return tuple(Template(text) for text in self.candidates.values())

    @cached_property
    def calibration_template(self) -> Template | None:
        """The prompt without content, parsed; None where there is none."""
        return None if self.calibration is None else Template(self.calibration)

    @property
    def is_masked(self) -> bool:
        """Whether the prompt holds a mask."""
        return MASK in self.prompt

    @property
    def is_generation(self) -> bool:
        """Whether the model writes the answer itself."""
        return isinstance(self.candidates, GeneratedAnswer)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, in the data set's order; empty when a label is the text of a candidate."""
        if isinstance(self.candidates, ListCandidates):
            return self.candidates.names
        if isinstance(self.candidates, GeneratedAnswer):
            return ()
        return tuple(str(name) for name in self.candidates)

    @cached_property
    def text_columns(self) -> tuple[str, ...]:
        """The columns whose text the prompt and the candidates show."""
        optional = () if self.calibration_template is None else (self.calibration_template,)
        templates = (self.prompt_template, *self.candidate_templates, *optional)
        return tuple(dict.fromkeys(column for template in templates for column in template.columns))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every column that an example is made of, the label's or the answer's last."""
        shown = dict.fromkeys((*self.text_columns, *self.group))
        if isinstance(self.candidates, GeneratedAnswer):
            return (*shown, self.candidates.root)
        lists = (self.candidates.column,) if isinstance(self.candidates, ListCandidates) else ()
        return (*shown, *lists, self.label)
