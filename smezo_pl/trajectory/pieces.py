"""A number that changes rarely, or at every step, over the steps of a run, as few bytes as losslessly possible.

Values that hold for many steps are kept as pieces, ``[first step, value of each group]``, in JSON. A schedule that
changes them at every step is kept as a column of float64: each value's bits are subtracted from those of the one before
it, twice (a straight line leaves next to nothing), and the bytes of equal weight are deflated together.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from smezo_pl.trajectory.header import inflate

MOST_VALUES = 1 << 26
"""Most values that are unpacked: bounds what a damaged file can make a reader allocate."""

# A piece costs about as much JSON as this many steps of a column.
_STEPS_A_PIECE = 6


def pack(values: Sequence[tuple[float, ...]]) -> tuple[list[list[Any]], bytes]:
    """Values of each step as pieces, or as a column.

    Args:
        values: For each step one value a group.

    Returns:
        Pieces and nothing, or no pieces and a column.
    """
    pieces: list[list[Any]] = []
    for index, value in enumerate(values):
        if not pieces or tuple(pieces[-1][1:]) != value:
            pieces.append([index, *value])
    if len(pieces) * _STEPS_A_PIECE <= len(values) or len(pieces) <= 1:
        return pieces, b""
    return [], _pack_column(np.array(values, dtype="<f8"))


def unpack(pieces: object, column: bytes, steps: int, groups: int) -> list[tuple[float, ...]]:
    """The values again.

    Args:
        pieces: Pieces of `pack`.
        column: Column of `pack`.
        steps: Number of steps.
        groups: Number of parameter groups.

    Raises:
        ValueError: If they are not the values of so many steps and groups.
    """
    if not isinstance(pieces, list):
        raise ValueError("pieces are no list")
    if steps * groups > MOST_VALUES:
        raise ValueError(f"{steps} steps of {groups} groups are too many")
    if not pieces:
        return [tuple(row) for row in _unpack_column(column, steps, groups).tolist()] if steps else []
    values: list[tuple[float, ...]] = []
    for piece, after in zip(pieces, [*pieces[1:], [steps]], strict=True):
        if not isinstance(piece, list) or len(piece) != groups + 1 or piece[0] != len(values):
            raise ValueError("a piece does not begin where the one before it ends")
        if (
            not isinstance(after, list)
            or not after
            or not isinstance(after[0], int)
            or not piece[0] < after[0] <= steps
        ):
            raise ValueError("a piece ends before it begins, or after the last step")
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in piece[1:]):
            raise ValueError("a piece holds something that is no number")
        values += [tuple(float(value) for value in piece[1:])] * (after[0] - piece[0])
    return values


def _pack_column(values: npt.NDArray[np.float64]) -> bytes:
    bits = np.ascontiguousarray(values.T).view("<u8")
    for _ in range(2):
        bits = np.diff(bits, prepend=np.uint64(0))
    planes = np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 8).T
    return zlib.compress(planes.tobytes(), 9)


def _unpack_column(data: bytes, steps: int, groups: int) -> npt.NDArray[np.float64]:
    try:
        plain = inflate(data, 8 * steps * groups)
    except zlib.error as error:
        raise ValueError(f"a column is damaged: {error}") from None
    if len(plain) != 8 * steps * groups:
        raise ValueError(f"a column has {len(plain)} bytes for {steps} steps and {groups} groups")
    planes = np.frombuffer(plain, np.uint8).reshape(8, -1)
    bits = np.ascontiguousarray(planes.T).view("<u8").reshape(groups, steps)
    for _ in range(2):
        bits = np.cumsum(bits, axis=1, dtype=np.uint64)
    return np.ascontiguousarray(bits).view("<f8").T
