"""Which row of the batch each row of a forward is.

With a direction for each row of the batch, a layer must know whose input it sees. What is given to the network has
its rows in the first dimension, and a layer that sees that many takes them for the same. Code that runs the network on
other rows than all of the batch's, in order, says so::

    with rows(torch.tensor([4, 2])):  # as when the others have left
        logits = model(ids[[4, 2]])

    hidden = at_rows(hidden[row, position], row)  # as when positions of several rows are picked out

Without a direction for each row both do nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Current(threading.local):
    numbers: Tensor | None = None


_current = _Current()


@contextmanager
def rows(numbers: Tensor) -> Iterator[None]:
    """Inside the block row ``i`` of a forward is row ``numbers[i]`` of the batch, or of the enclosing block's rows.

    Args:
        numbers: int64 ``[R]``, at least 0.

    Raises:
        TypeError: If they are none.
    """
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.int64 or numbers.dim() != 1:
        found = f"{numbers.dtype} {list(numbers.shape)}" if isinstance(numbers, Tensor) else type(numbers).__name__
        raise TypeError(f"rows needs numbers of rows, an int64 tensor of one dimension, got {found}")
    before = _current.numbers
    _current.numbers = numbers if before is None else before[numbers]
    try:
        yield
    finally:
        _current.numbers = before


def current_rows() -> Tensor | None:
    """The numbers that the innermost block says, int64 ``[R]``; None outside of all."""
    return _current.numbers


def at_rows(tensor: Tensor, row: Tensor) -> Tensor:
    """Say that the entries of a tensor along its dimension before the last belong to these rows of the forward.

    Args:
        tensor: ``[..., P, H]``, about to be given to a layer.
        row: int64 ``[P]``, in ``[0, R)``.

    Returns:
        The same tensor.
    """
    tensor.forward_rows = row  # type: ignore[attr-defined]
    return tensor


def rows_at(tensor: Tensor) -> Tensor | None:
    """What `at_rows` said of a tensor; None if nothing."""
    return getattr(tensor, "forward_rows", None)
