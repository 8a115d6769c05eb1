"""While a step perturbs the weights, nothing that lies in their memory can be read unperturbed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from smezo_pl.optim.memory import extent, memory_of
from smezo_pl.optim.parameters import some
from smezo_pl.optim.step import Direction


class Guard(Tensor):
    """A tensor without memory: an operator that reads it gets the weights perturbed, one that writes it is refused.

    Its shape, dtype and device are those of what it stands for, and a view of it is a guard too. Kept past the step, it
    reads the weights as they are.
    """

    # so that operators take the paths that they take for a weight
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    guards: Guards
    memory: Memory

    @staticmethod
    def __new__(cls, guards: Guards, memory: Memory, like: Tensor, requires_grad: bool = False) -> Guard:
        """A guard of the shape, strides and offset of ``like``."""
        make: Any = Tensor._make_wrapper_subclass
        sizes = {"strides": like.stride(), "storage_offset": like.storage_offset()}
        kind = {"dtype": like.dtype, "device": memory.storage.device, "requires_grad": requires_grad}
        guard: Guard = make(cls, like.size(), **sizes, **kind)
        guard.guards, guard.memory = guards, memory
        return guard

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, viewed = kwargs or {}, None
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            leaves = tree_leaves(named.get(argument.name)) if argument.alias_info is not None else ()
            for guard in (leaf for leaf in leaves if isinstance(leaf, Guard)):
                if argument.alias_info.is_write:
                    raise RuntimeError(refusal_of_write(guard.memory.names(guard), str(func)))
                viewed = guard
        if viewed is not None:
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
            views = func(*tree_map_only(Guard, Guard._shape, args), **kwargs)
            return tree_map_only(Tensor, lambda view: Guard(viewed.guards, viewed.memory, view), views)
        args, kwargs = tree_map_only(Guard, Guard.read, (args, kwargs))
        return func(*args, **kwargs)

    def read(self) -> Tensor:
        """What it stands for, as a plain tensor."""
        return self.guards.read(self).requires_grad_(self.requires_grad)

    def _shape(self) -> Tensor:
        """A tensor of the same shape, strides and offset, without values."""
        flat = torch.empty(self.memory.storage.nbytes() // self.element_size(), dtype=self.dtype, device="meta")
        return flat.as_strided(self.size(), self.stride(), self.storage_offset())

    def data_ptr(self) -> int:
        """Refused: there is no memory at an address."""
        raise RuntimeError(
            f"the address of parameter {self.memory.names(self)} is taken outside the forward of its module, where no "
            "perturbed copy of it exists; use the in-place perturbation (do not call attach)"
        )

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """What it stands for, as an array."""
        return self.guards.read(self).numpy(*args, **kwargs)

    def tolist(self) -> Any:
        """What it stands for, as numbers."""
        return self.guards.read(self).tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        copy = self.guards.read(self).clone()
        return nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({}).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


_standing = threading.local()
"""In ``guard_of``, by id: the guards of the tensors whose class is `_Guarded`, in the thread that runs the step."""


class _Guarded(Tensor):
    """The class that a tensor in the weights' memory has during a step: every use of it goes to its guard.

    Another thread, such as one that saves, sees what it saw before.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not hasattr(_standing, "guard_of"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*_guards_in(args), **{name: _guards_in(value) for name, value in kwargs.items()})

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = self.detach()  # a guard in the thread of the step
        with torch._C.DisableTorchFunctionSubclass():
            plain = nn.Parameter(plain, self.requires_grad) if isinstance(self, nn.Parameter) else plain
        return plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class _GuardedParameter(_Guarded, nn.Parameter):
    pass


def _guards_in(value: Any) -> Any:
    """A value, or a list of values, with guards in the place of what they stand for."""
    if isinstance(value, _Guarded):
        return _standing.guard_of[id(value)]
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(map(_guards_in, value))
    return value


class _Weight(NamedTuple):
    """A weight, or a copy of it, and the bytes of a memory that it takes."""

    first: int
    last: int
    parameter: nn.Parameter


class _Alias(NamedTuple):
    """A tensor in a memory, and the class that it has outside a step."""

    tensor: weakref.ref[Tensor]
    kind: type[Tensor]
    guard: Guard


class Memory:
    """A storage that weights lie in, or copies of them that are kept.

    Args:
        storage: The storage.
        guards: What it belongs to.
        is_copy: Whether it holds copies.

    Attributes:
        weights: What lies in it.
        aliases: The Python tensors that lie in it.
        others: Other references to the storage.
    """

    def __init__(self, storage: torch.UntypedStorage, guards: Guards, is_copy: bool = False) -> None:
        self.storage, self.guards, self.is_copy = storage, guards, is_copy
        self.weights: list[_Weight] = []
        self.aliases: list[_Alias] = []
        self.others = int(is_copy)

    def count_others(self) -> int:
        """Other references to the storage now."""
        return use_count(self.storage) - sum(alias.tensor() is not None for alias in self.aliases)

    def overlapping(self, first: int, last: int) -> list[_Weight]:
        """The weights in these bytes."""
        return [weight for weight in self.weights if weight.first < last and first < weight.last]

    def names(self, guard: Guard) -> str:
        """Names of the weights that a guard stands for."""
        return self.guards.names_of(weight.parameter for weight in self.overlapping(*extent(guard)))


class Guards:
    """Puts a guard in the place of every tensor that lies in the memory of the weights.

    Parameters that are kept in lists, closures or partial functions are such tensors, and so are views that were made
    before. They are looked for among all objects of the interpreter, and again when references to a memory are new.

    Args:
        parameters: The weights, by name.
        tensors: Tensors that are guarded in any case.
        read: Ids of parameters, to which those are added of which a copy is read.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], tensors: Sequence[Tensor], read: set[int]) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters, self._tensors, self._read = list(parameters.values()), tensors, read
        self._memories: dict[int, Memory] = {}
        self._guard_of: dict[int, Guard] = {}
        self._known: list[tuple[int, bool]] = []
        self._direction: Direction | None = None
        self._copies: dict[int, Tensor] = {}

    def __getitem__(self, tensor: Tensor) -> Tensor:
        """What stands for one of ``tensors``: its guard, or itself if it has no elements."""
        return self._guard_of[id(tensor)] if tensor.numel() else tensor

    def names_of(self, parameters: Iterable[nn.Parameter]) -> str:
        """Names for a message."""
        return some(repr(self._names[id(parameter)]) for parameter in parameters)

    def refresh(self) -> bool:
        """Look for the tensors in the weights' memory if there may be new ones; whether a weight has moved."""
        known = [(parameter.data_ptr(), parameter.requires_grad) for parameter in self._parameters]
        if has_moved := known != self._known:
            self._known = known
            self._memories = {key: memory for key, memory in self._memories.items() if memory.is_copy}
            for parameter in self._parameters:
                address, first, last = memory_of(parameter) or (0, 0, 0)
                memory = self._memories.setdefault(address, Memory(parameter.untyped_storage(), self))
                memory.weights.append(_Weight(first, last, parameter))
        self._forget()
        if has_moved or any(memory.count_others() > memory.others for memory in self._memories.values()):
            self._find()
        return has_moved

    def _find(self) -> None:
        for memory in self._memories.values():
            memory.aliases = []
        self._guard_of = {}
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in chain(self._tensors, gc.get_objects()):
                if not issubclass(type(tensor), Tensor) or id(tensor) in self._guard_of:
                    continue
                address, first, last = memory_of(tensor) or (0, 0, 0)
                holder = self._memories.get(address)
                if holder is not None and holder.overlapping(first, last):
                    guard = Guard(self, holder, tensor, tensor.requires_grad)
                    guard._is_param = isinstance(tensor, nn.Parameter)
                    holder.aliases.append(_Alias(weakref.ref(tensor), type(tensor), guard))
                    self._guard_of[id(tensor)] = guard
        for memory in self._memories.values():
            memory.others = memory.count_others()

    def keep(self, storage: torch.UntypedStorage, copies: Iterable[tuple[Tensor, nn.Parameter]]) -> None:
        """Guard the tensors in a memory of copies that outlived the forward for which these were made."""
        self._forget()
        memory = self._memories[storage.data_ptr()] = Memory(storage, self, is_copy=True)
        for copy, parameter in copies:
            memory.weights.append(_Weight(*extent(copy), parameter))

    def _forget(self) -> None:
        """Let go of copies that nothing else refers to."""
        for key in [key for key, memory in self._memories.items() if memory.is_copy and use_count(memory.storage) == 1]:
            del self._memories[key]

    def forget_copies(self) -> None:
        """Free the copies that were made for reads; they serve until another module runs."""
        self._copies.clear()

    def clear(self) -> None:
        """Let go of the weights."""
        for memory in self._memories.values():
            memory.weights, memory.aliases = [], []
        self._parameters, self._tensors, self._memories, self._guard_of = [], [], {}, {}

    @contextmanager
    def standing(self, direction: Direction) -> Iterator[None]:
        """Inside the block the guards stand in the place of the tensors."""
        if hasattr(_standing, "guard_of"):
            raise RuntimeError("a step of one optimizer cannot be taken inside the closure of another: take it before")
        found = chain.from_iterable(memory.aliases for memory in self._memories.values())
        living = [(tensor, alias) for alias in found if (tensor := alias.tensor()) is not None]
        try:
            self._direction, _standing.guard_of = direction, {id(tensor): alias.guard for tensor, alias in living}
            for tensor, alias in living:
                tensor.__class__ = _GuardedParameter if issubclass(alias.kind, nn.Parameter) else _Guarded
            yield
        finally:
            for tensor, alias in living:
                tensor.__class__ = alias.kind
            del _standing.guard_of
            self._direction = None
            self._copies.clear()

    def are_standing_here(self) -> bool:
        """Whether this is the thread in which they stand."""
        return hasattr(_standing, "guard_of")

    def read(self, guard: Guard) -> Tensor:
        """What a guard stands for: perturbed inside a step, the memory itself outside of it."""
        (first, last), memory, origin = extent(guard), guard.memory, 0
        storage = memory.storage
        with torch._C.DisableTorchFunctionSubclass():
            weights = memory.overlapping(first, last) if self._direction is not None else []
            if len(weights) == 1 and weights[0].first <= first and last <= weights[0].last:
                origin, storage = weights[0].first, self._copy(weights[0].parameter).untyped_storage()
            elif weights:  # several weights, and what lies between them
                around = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
                    storage, first, (last - first,), (1,)
                )
                origin, around = first, around.clone()
                for weight in weights:
                    low, high = max(first, weight.first), min(last, weight.last)
                    copy = self._copy(weight.parameter).view(torch.uint8)
                    around[low - first : high - first] = copy[low - weight.first : high - weight.first]
                storage = around.untyped_storage()
            offset = guard.storage_offset() - origin // guard.element_size()
            empty = torch.empty(0, dtype=guard.dtype, device=guard.device)
            return empty.set_(storage, offset, guard.size(), guard.stride())

    def _copy(self, parameter: nn.Parameter) -> Tensor:
        copy = self._copies.get(id(parameter))
        if copy is None:
            copy = self._copies[id(parameter)] = torch.empty(
                parameter.numel(), dtype=parameter.dtype, device=parameter.device
            )
            assert self._direction is not None
            self._direction.perturb(parameter, copy)
            self._read.add(id(parameter))
        return copy


def use_count(storage: torch.UntypedStorage) -> int:
    """Number of tensors, and of handles as this one, that refer to a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def refusal_of_write(names: str, writer: str) -> str:
    """Why a forward may not write weights."""
    return (
        f"a forward writes {names} ({writer}): the forwards of a step would see different functions, and a trajectory "
        "could not be replayed. Turn off what writes (max_norm; a norm in training mode, by model.eval()), or write "
        "before training"
    )
