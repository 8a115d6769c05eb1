"""Prompt templates: text with columns in braces, ``"{sentence|strip} It was"``."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
