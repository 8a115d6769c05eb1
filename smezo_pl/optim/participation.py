"""Which tensors take part in a step: weights that no forward reads are left alone.

A vision tower under a text, a pooler, a spare adapter, an expert that is never chosen: the loss says nothing of them,
and an update would be noise. The first step, and the first after each refresh of the masks, finds out which tensors its
forwards read. The others take no part until a forward reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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

    def watched(self, tensors: Sequence[OptimizedTensor], fresh: bool) -> list[nn.Parameter]:
        """The parameters to watch in a step: all if the masks are ``fresh``, else those that were not read."""
        if not fresh and not self.unread:
            return []
        return [tensor.parameter for tensor in tensors if fresh or self.unread >> tensor.number & 1]

    def after_forwards(self, tensors: Sequence[OptimizedTensor], fresh: bool, read: set[int], step: int) -> int:
        """The tensors, as in `unread`, that take no part in a step whose forwards read the parameters ``read``, by id.

        Where no read at all was seen, as of a closure that hands the weights to another program, all take part.
        """
        if not fresh and not self.unread:
            return 0
        flags = [id(tensor.parameter) in read for tensor in tensors]
        if self.over_processes is not None:
            both = torch.tensor(flags, dtype=torch.int32, device=tensors[0].parameter.device)
            flags = self.over_processes(both).bool().tolist()
        if fresh and not any(flags):
            logger.warning("step %d: no forward was seen to read a weight that is optimized; all take part", step)
            return 0
        without = [
            t for t, is_read in zip(tensors, flags, strict=True) if not is_read and (fresh or self._is_unread(t))
        ]
        joining = [t.name for t, is_read in zip(tensors, flags, strict=True) if is_read and self._is_unread(t)]
        if joining:
            logger.info("step %d reads %d tensors that were left alone before: %s", step, len(joining), some(joining))
        unread = sum(1 << tensor.number for tensor in without)
        if unread & ~self.unread:
            logger.info(
                "no forward reads %d of %d tensors: they are left alone until one does. Every step watches for that; "
                "exclude saves it: %s",
                len(without),
                len(tensors),
                some(tensor.name for tensor in without),
            )
        return unread

    def _is_unread(self, tensor: OptimizedTensor) -> bool:
        return bool(self.unread >> tensor.number & 1)
