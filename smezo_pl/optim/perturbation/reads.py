"""Notice which weights a forward reads."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smezo_pl.optim.memory import memory_of

UNDISPATCHED = ("data_ptr", "tolist")
"""Methods of a tensor that read it past torch's operators: kernels such as those of Triton ask for the address."""


def is_compiled_caller() -> bool:
    """Whether a function compiled by torch.compile is running."""
    # without torch._dynamo, which takes a second to import, nothing is compiled
    return "torch._dynamo" in sys.modules and callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


class ReadWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the tensors of which an operator takes memory, also through views, while the mode is active.

    Slower than a plain forward.

    Args:
        read: The keys of tensors that are read are added to it.
    """

    def __init__(self, read: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = read
        self._unread: dict[int, list[tuple[int, int, int]]] = {}

    def add(self, tensor: Tensor, key: int) -> None:
        """Watch a tensor."""
        if key in self._read or (memory := memory_of(tensor)) is None:
            return
        self._unread.setdefault(memory[0], []).append((*memory[1:], key))
        for name in UNDISPATCHED:
            # a method of the class: a bound one would keep the tensor in a cycle
            setattr(tensor, name, self._noting(getattr(Tensor, name), weakref.ref(tensor), key))

    def _noting(self, method: Callable[[Any], Any], tensor: weakref.ref[Tensor], key: int) -> Callable[[], Any]:
        def noted() -> Any:
            self._read.add(key)
            return method(tensor())

        return noted

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The mode is active in the block, and compiled functions run as they were written."""
        # A compiled graph reads weights unseen, and torch would give it up for good once it met the mode.
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(), self:
            yield

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
