"""Which row of the batch each entry of a layer's input belongs to, while the network runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smezo_pl.optim.rows import at_rows, current_rows, rows_at


class Place(NamedTuple):
    """How the rows of a forward lie in a tensor.

    Attributes:
        numbers: Numbers of the rows in the global batch.
        each: So many entries of the first dimension, one after the other, belong to each row; 0 if all rows share what
            the tensor holds.
        at: Of each entry of the dimension before the last, its row in the forward; None where that is not how.
        is_plain: Whether nothing else can be meant, so that no proof is needed.
    """

    numbers: Sequence[int]
    each: int = 1
    at: Tensor | None = None
    is_plain: bool = True

    @property
    def is_single(self) -> bool:
        """Whether there is one row."""
        return len(self.numbers) == 1


WHOLE = Place((0,))
"""Of a tensor with one direction for the batch."""


class ForwardRows:
    """Follows the network and its modules while a closure runs.

    What is given to the network has its rows in the first dimension. They are numbered on from one call of the network
    to the next, unless `rows` says their numbers.

    Attributes:
        calls: Number of rows and shape of what was given to the network, call by call.
        total: How many rows of the batch layers have seen.
        are_named: Whether `rows` said a number of them.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, torch.Size]] = []
        self.total, self.are_named = 0, False
        self._numbers: Sequence[int] | Tensor = ()
        self._next = 0
        self._network: nn.Module | None = None
        self._given: Tensor | None = None
        self._running: list[tuple[nn.Module, Tensor | None]] = []

    def restart(self) -> None:
        """Begin with row 0, as each run of a closure does."""
        self.__init__()  # type: ignore[misc]

    def begin(self, network: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """The network is called."""
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)
        self._network, self._given, self._numbers = network, given, ()
        if given is not None:
            count, chosen = given.shape[0], current_rows()
            self.calls.append((count, given.shape))
            if chosen is None:
                self._numbers, self._next = range(self._next, self._next + count), self._next + count
            elif chosen.numel() == count:
                self._numbers, self.are_named = chosen, True
            else:
                raise RuntimeError(f"rows(...) numbers {chosen.numel()} rows, the forward inside the block has {count}")

    def enter(self, module: nn.Module, args: Sequence[Any]) -> None:
        """A module that holds weights runs."""
        self._running.append((module, args[0] if args and isinstance(args[0], Tensor) else None))

    def leave(self, module: nn.Module, output: Any) -> None:
        """A module has run; what it makes of marked positions is at the same rows."""
        while self._running and any(module is running for running, _ in self._running):
            last, given = self._running.pop()
            if last is module:
                mark = rows_at(given) if given is not None else None
                if mark is not None and isinstance(output, Tensor) and output.shape[-2:-1] == mark.shape:
                    at_rows(output, mark)
                return

    def input(self) -> Tensor | None:
        """What the innermost module that runs was given."""
        return self._running[-1][1] if self._running else None

    def place(self, tensor: Tensor, of_indices: bool = False) -> Place | None:
        """How the rows lie in an operand; None if that cannot be told.

        Args:
            tensor: The operand.
            of_indices: Whether it holds indices, and not vectors in its last dimension.
        """
        numbers, inner = self.numbers(), self.input()
        rows = len(numbers)
        if (mark := self._mark(tensor)) is not None and rows > 1:
            return Place(numbers, at=mark)
        count = tensor.shape[0] if tensor.dim() else 1
        has_rows = tensor.dim() + of_indices > 2
        if rows == 1 or (tensor.dim() > 1 and count % rows == 0 and (has_rows or count in self._flattened(rows))):
            if of_indices:
                is_plain = self._given is not None and tensor.data_ptr() == self._given.data_ptr()
            else:
                is_plain = has_rows and count == rows
                is_plain |= inner is not None and inner.dim() > 2 and inner.shape[0] == rows
            return Place(numbers, count // rows or 1, is_plain=is_plain)
        return Place(numbers, 0) if count == 1 and has_rows else None

    def _flattened(self, rows: int) -> set[int]:
        """How many vectors a tensor has that holds one for each row, or those of all positions one after the other.

        What else is a multiple of the number of rows may be a choice of positions, of some rows more than of others.
        """
        inner, given = self.input(), self._given
        known = {rows} if given is None else {rows, given.shape[:2].numel()}
        return known | ({inner.shape[:-1].numel()} if inner is not None and inner.dim() > 2 else set())

    def _mark(self, tensor: Tensor) -> Tensor | None:
        """What was said of a tensor, or of what a module that runs was given, if as many positions are here."""
        if tensor.dim() > 1:
            for marked in (tensor, *(given for _, given in reversed(self._running) if given is not None)):
                if (mark := rows_at(marked)) is not None and mark.numel() == tensor.shape[-2]:
                    return mark
        return None

    def numbers(self) -> Sequence[int]:
        """Numbers of the rows now."""
        is_inside = bool(self._running) and self._running[0][0] is self._network
        if not is_inside and (chosen := current_rows()) is not None:
            self._numbers, self.are_named = chosen, True
        if isinstance(self._numbers, Tensor):
            self._numbers = self._numbers.tolist()
            if min(self._numbers, default=0) < 0:
                raise RuntimeError(f"rows(...) numbers must be at least 0, got {min(self._numbers)}")
        if not self._numbers:
            raise RuntimeError(
                "with directions='per_row' a closure must run the attached module itself, with a tensor whose first "
                "dimension are the rows, or number the rows of its parts by smezo_pl.optim.rows.rows"
            )
        self.total = max(self.total, max(self._numbers) + 1)
        return self._numbers

    def check(self, losses: object) -> Tensor:
        """A closure's result as one real number for each row, float64, left on its device."""
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.numel() or losses.is_complex():
            found = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(
                f"with directions='per_row' the closure must return one real number for each row, a tensor of one "
                f"dimension whose mean is the loss, got {found}"
            )
        count = max(self.total, self._next)
        # where numbers are said, other processes may have run further rows
        if losses.numel() < count or (losses.numel() > count > 0 and not self.are_named):
            raise ValueError(
                f"the closure returned {losses.numel()} losses for the {count} rows of its forwards: rows are the "
                "first dimension of what the network is given; a forward over rows that another has run is numbered by "
                "smezo_pl.optim.rows.rows"
            )
        return losses.detach().double()
