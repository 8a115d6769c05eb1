"""Which tensors take part in a step: weights that no forward reads are left alone.

A vision tower under a text, a pooler, a spare adapter, an expert that is never chosen: the loss says nothing of them,
and an update would be noise. The first step, and the first after each refresh of the masks, finds out which tensors its
forwards read. The others take no part until a forward reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smezo_pl.optim.parameters import OptimizedTensor, some

logger = logging.getLogger(__name__)


class Participation:
    """Finds out which tensors the forwards of a step read.

    Attributes:
        unread: The tensors that take no part: bit ``n`` stands for the tensor of number ``n``.
        over_processes: Gives the maximum of each of some integers over all processes; None in a single one.
    """

    def __init__(self) -> None:
        self.unread = 0
        self.over_processes: Callable[[Tensor], Tensor] | None = None

    def unread_of(self, tensors: Sequence[OptimizedTensor]) -> list[OptimizedTensor]:
        """Those of some tensors that take no part."""
        return [tensor for tensor in tensors if self.unread >> tensor.number & 1] if self.unread else []

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
        flags = self.in_any_process(flags, watched[0].parameter.device)
        if fresh and not any(flags):
            logger.warning("step %d: no forward was seen to read a weight that is optimized; all take part", step)
            return 0
        left = [tensor for tensor, is_read in zip(watched, flags, strict=True) if not is_read]
        unread = sum(1 << tensor.number for tensor in left)
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

    def in_any_process(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Whether each of some flags is set in any process."""
        if self.over_processes is None:
            return flags
        return self.over_processes(torch.tensor(flags, dtype=torch.int32, device=device)).bool().tolist()
