"""A value of a dataset as text: what may stand in a prompt, in a candidate or in an answer."""

import math
from datetime import date, time
from decimal import Decimal
from numbers import Integral
from typing import Any


class ExampleError(ValueError):
    """A row that cannot be made into an example. The message names the file, the row and what is allowed."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, or NaN where an empty cell became a float."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any, column: str, where: str) -> str:
    """The text of a value, never Python's notation of something that is no text.

    Text is itself, and bytes are what they are in UTF-8. Numbers are written in decimal digits without an exponent, as
    many as they have, a whole float as an integer; dates and times as in ISO 8601, ``2024-01-31 12:00:00``. Truth
    values, lists, structures and all else have no one text.

    Args:
        value: The value, not a missing one.
        column: Its column, for errors.
        where: Its file and line, for errors.

    Raises:
        ExampleError: If it has no one text.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            wrong = f"byte {value[error.start]:#04x} at {error.start}"
            raise ExampleError(f"{where}: column {column!r} holds bytes that are not UTF-8 ({wrong})") from error
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ExampleError(
                f"{where}: column {column!r} holds half a character, {value[error.start]!r} at {error.start}: the text"
                " was cut inside it; bad_rows: skip leaves such rows out"
            ) from error
        return value
    if isinstance(value, bool):
        raise ExampleError(
            f"{where}: column {column!r} holds the truth value {str(value).lower()}, which is no text: write words in"
            f" the file, or, for a column of the prompt, in the task, words: {{{column}: {{true: ..., false: ...}}}}"
        )
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, (float, Decimal)) and math.isfinite(value):
        # An integer beside an empty cell is read as a float.
        return format(Decimal(repr(value)), "f").removesuffix(".0") if isinstance(value, float) else format(value, "f")
    if isinstance(value, (date, time)):
        return str(value)
    raise ExampleError(f"{where}: column {column!r} must hold a text, got {repr(value)[:60]}")
