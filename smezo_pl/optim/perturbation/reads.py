"""Notice when a forward reads weights that no running module holds perturbed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True, slots=True)
class Reading:
    """An unperturbed weight was read: which one, by which operator, while which modules ran (outermost first)."""

    parameter: nn.Parameter
    operator: str
    running: tuple[nn.Module, ...]


class ReadWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operator that takes memory of the watched parameters while the mode is active.

    Slower than a plain forward, so it is meant for the first step. Reads through views count; reads made while
    `paused` (the making of perturbed copies) do not.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.readings: list[Reading] = []
        self.paused = False
        self.running: list[nn.Module] = []
        self._seen: set[int] = set()
        self._by_storage: dict[int, list[nn.Parameter]] = {}
        for parameter in parameters:
            self._by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.paused:
            for value in tree_flatten((args, kwargs))[0]:
                if isinstance(value, Tensor):
                    self._check(value, str(func))
        return func(*args, **kwargs)

    def _check(self, value: Tensor, operator: str) -> None:
        try:
            address = value.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # sparse, meta and wrapper tensors have no storage to read
            return
        for parameter in self._by_storage.get(address, ()):
            if id(parameter) not in self._seen and _overlap(value, parameter):
                self._seen.add(id(parameter))
                self.readings.append(Reading(parameter, operator, tuple(self.running)))

    @contextmanager
    def active(self) -> Iterator[ReadWatch]:
        """Watch a forward: the mode is on and the stack of running modules is kept."""

        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if module in self.running:
                while self.running.pop() is not module:
                    pass

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self.running.clear()


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_first, a_last), (b_first, b_last) = _extent(a), _extent(b)
    return a_first < b_last and b_first < a_last


def _extent(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    first = int(tensor.storage_offset()) * tensor.element_size()
    reach = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * tensor.element_size()
