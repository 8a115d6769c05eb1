"""Notice which weights a forward reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smezo_pl.optim.parameters import memory_of


class ReadWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the parameters of which an operator takes memory, also through views, while the mode is active.

    Slower than a plain forward.

    Args:
        parameters: The parameters to watch.
        read: Their ids are added once they are read.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], read: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = read
        self._unread: dict[int, list[tuple[int, int, int]]] = {}
        for parameter in parameters:
            if id(parameter) not in read and (memory := memory_of(parameter)) is not None:
                self._unread.setdefault(memory[0], []).append((*memory[1:], id(parameter)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and (memory := memory_of(value)) is not None and memory[0] in self._unread:
                _, first, last = memory
                parts = self._unread[memory[0]]
                overlapping = [part for part in parts if part[0] < last and first < part[1]]
                self._read.update(key for _, _, key in overlapping)
                self._unread[memory[0]] = [part for part in parts if part not in overlapping]
        return func(*args, **kwargs)
