"""How the tensors take part in a step: weights that no forward reads are left alone.

A vision tower under a text, a pooler, a spare adapter, an expert that is never chosen: the loss says nothing of them,
and an update would be noise. The first step, and the first after each refresh of the masks, finds out which tensors its
forwards read. The others take no part until a forward reads them.

With a direction for each row of the batch, those have one for all whose rows the network does not tell apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smezo_pl.optim.parameters import OptimizedTensor, some

logger = logging.getLogger(__name__)


class Participation:
    """Finds out which tensors the forwards of a step read.

    Attributes:
        unread: The tensors that take no part: bit ``n`` stands for the tensor of number ``n``.
        shared: The same for those with one direction for all rows of the batch; None before it is known.
        over_processes: Gives the maximum of each of some integers over all processes; None in a single one.
    """

    def __init__(self) -> None:
        self.unread = 0
        self.shared: int | None = None
        self.over_processes: Callable[[Tensor], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "over_processes": None}

    def unread_of(self, tensors: Sequence[OptimizedTensor]) -> list[OptimizedTensor]:
        """Those of some tensors that take no part."""
        return [tensor for tensor in tensors if self.unread >> tensor.number & 1] if self.unread else []

    def state(self) -> dict[str, list[int]]:
        """What is known, in plain types."""
        known = {"shared": self.shared, **({"unread": self.unread} if self.unread else {})}
        return {name: _numbers(bits) for name, bits in known.items() if bits is not None}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`, in which there may be more."""
        self.unread, self.shared = _bits(state.get("unread", ())), None
        if "shared" in state:
            self.shared = _bits(state["shared"])

    def share(self, tensors: Sequence[OptimizedTensor], parameters: set[int]) -> None:
        """Those of some tensors whose parameters, by id, are given have one direction for all rows."""
        flags = [id(tensor.parameter) in parameters for tensor in tensors]
        flags = self._in_any_process(flags, tensors[0].parameter.device)
        self.shared = _bits(tensor.number for tensor, flag in zip(tensors, flags, strict=True) if flag)

    def watched(self, tensors: Sequence[OptimizedTensor], fresh: bool) -> Sequence[OptimizedTensor]:
        """The tensors to watch in a step: all if the masks are ``fresh``, else those that take no part."""
        return tensors if fresh else self.unread_of(tensors)

    def after_forwards(self, watched: Sequence[OptimizedTensor], fresh: bool, read: set[int], step: int) -> int:
        """The tensors, as in `unread`, that take no part in a step whose forwards read the parameters ``read``, by id.

        Where no read at all was seen, as of a closure that hands the weights to another program, all take part.
        """
        if not watched:
            return 0
        flags = [id(tensor.parameter) in read or not tensor.parameter.numel() for tensor in watched]
        flags = self._in_any_process(flags, watched[0].parameter.device)
        if fresh and not any(flags):
            logger.warning("step %d: no forward was seen to read a weight that is optimized; all take part", step)
            return 0
        left = [tensor for tensor, is_read in zip(watched, flags, strict=True) if not is_read]
        unread = _bits(tensor.number for tensor in left)
        if joining := [tensor.name for tensor in self.unread_of(watched) if not unread >> tensor.number & 1]:
            logger.info("step %d reads %d tensors that were left alone before: %s", step, len(joining), some(joining))
        if unread & ~self.unread:
            logger.info(
                "no forward of step %d reads %d of %d tensors, which are left alone until one does: %s",
                step,
                len(left),
                len(watched),
                some(tensor.name for tensor in left),
            )
        return unread

    def anywhere(self, flag: bool, device: torch.device) -> bool:
        """Whether something holds in any process."""
        return self._in_any_process([flag], device)[0]

    def _in_any_process(self, flags: list[bool], device: torch.device) -> list[bool]:
        if self.over_processes is None:
            return flags
        return self.over_processes(torch.tensor(flags, dtype=torch.int32, device=device)).bool().tolist()


def _bits(numbers: Iterable[int]) -> int:
    return sum(1 << number for number in numbers)


def _numbers(bits: int) -> list[int]:
    return [number for number in range(bits.bit_length()) if bits >> number & 1]
