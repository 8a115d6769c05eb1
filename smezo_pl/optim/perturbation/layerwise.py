"""Layer by layer: while a module runs, its parameter slots hold perturbed copies; the weights are never written."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from smezo_pl.optim.parameters import some
from smezo_pl.optim.perturbation.reads import Reading, ReadWatch
from smezo_pl.optim.step import Direction

Closure = Callable[[], "Tensor | float"]

_ALIGNMENT = 64
"""Elements. Keeps every copy on the 64-byte boundary that torch's own allocations have."""


def _padded(numel: int) -> int:
    """Elements that a buffer of ``numel`` elements occupies."""
    return -(-numel // _ALIGNMENT) * _ALIGNMENT


class _Chunk:
    """Memory of which buffers are taken, and released in the opposite order."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.memory = torch.empty(numel, dtype=dtype, device=device)
        self.address = self.memory.untyped_storage().data_ptr()
        self.used = 0
        self._views: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}

    def take(self, shape: torch.Size, numel: int) -> tuple[Tensor, Tensor]:
        """The next buffer, flat and in a shape."""
        key = (self.used, shape)
        views = self._views.get(key)
        if views is None:  # kept: a model has few shapes, and making a view takes as long as perturbing a small tensor
            with torch.inference_mode(False):
                flat = self.memory[self.used : self.used + numel]
                views = self._views[key] = flat, flat.view(shape)
        self.used += _padded(numel)
        return views


class ScratchStack:
    """A stack of buffers for each dtype and device.

    Modules run nested, so the copy made last is released first. The stack grows to the largest sum of copies held at
    one time, which is the largest single module when no module with parameters of its own encloses another.
    """

    def __init__(self) -> None:
        self._chunks: dict[tuple[torch.dtype, torch.device], list[_Chunk]] = {}

    def __iter__(self) -> Iterator[_Chunk]:
        return chain.from_iterable(self._chunks.values())

    def reserve(self, dtype: torch.dtype, device: torch.device, numel: int) -> None:
        """Make the first chunk large enough for ``numel`` elements, before anything is taken."""
        chunks = self._chunks.setdefault((dtype, device), [])
        if not chunks or chunks[0].memory.numel() < numel:
            chunks[:] = [_Chunk(numel, dtype, device)]

    def chunk_for(self, like: Tensor, numel: int) -> _Chunk:
        """A chunk that has so many elements left, of the dtype and on the device of ``like``."""
        chunks, size = self._chunks.setdefault((like.dtype, like.device), []), _padded(numel)
        for chunk in chunks:
            if chunk.used + size <= chunk.memory.numel():
                return chunk
        chunks.append(_Chunk(size, like.dtype, like.device))
        return chunks[-1]


ROW_COST = 1 << 11
"""Weights that a pass perturbs in the time that one row of an embedding costs: blocks of noise at both of its ends."""


@dataclass(slots=True)
class _Slot:
    """Where a module keeps a parameter: ``owner._parameters[name]``."""

    owner: nn.Module
    name: str
    parameter: nn.Parameter


@dataclass(slots=True)
class _Holding:
    """What a running module holds perturbed."""

    depth: int = 0
    taken: list[tuple[_Slot, _Chunk | None]] = field(default_factory=list)


class _Hook:
    """A forward hook that a copy of the module does not inherit: copied or pickled, it does nothing."""

    def __init__(self, target: Layerwise | None, action: str) -> None:
        self._target = weakref.ref(target) if target is not None else None
        self._action = action

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        target = self._target() if self._target is not None else None
        return getattr(target, self._action)(module, *args) if target is not None else None

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None, self._action)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._action)


class Layerwise:
    """Gives every module perturbed copies of its own parameters while it runs.

    A forward pre-hook fills a scratch buffer and puts it into the module's parameter slots; a forward hook puts the
    untouched parameters back. The weights themselves are never written, so they are exact in every dtype, and the extra
    memory is the largest single module. A parameter that is read outside its module's forward is found by `watched`
    and from then on held by the nearest running module that contains it.

    Args:
        module: The network. It must contain every parameter, and must not be compiled.
        parameters: The parameters to perturb, by name.

    Attributes:
        read: Ids of the parameters whose perturbed copies were handed out to forwards since the caller cleared the set.

    Raises:
        ValueError: If the module does not hold a parameter, or is compiled.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.module = module
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._slots: dict[int, list[_Slot]] = {}
        for path, owner in module.named_modules():
            if type(owner).__name__ == "OptimizedModule" or owner._compiled_call_impl is not None:
                raise ValueError(
                    f"attach: module {path or type(owner).__name__!r} is compiled by torch.compile, whose graph keeps "
                    "the weights it was traced with; attach the module that was compiled, or do not attach (in place)"
                )
            for name, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) in self._names:
                    self._slots.setdefault(id(parameter), []).append(_Slot(owner, name, parameter))
        missing = [name for key, name in self._names.items() if key not in self._slots]
        if missing:
            raise ValueError(
                f"attach: {type(module).__name__} does not hold {len(missing)} of the optimizer's {len(self._names)} "
                f"parameters, among them {missing[0]!r}; attach the module whose parameters the optimizer was given"
            )
        # which slots a module fills while it runs; a weight used elsewhere moves to an ancestor's list
        self._held_by: dict[nn.Module, list[_Slot]] = {}
        for slots in self._slots.values():
            for slot in slots:
                self._held_by.setdefault(slot.owner, []).append(slot)
        self._links = [(parent, name, child) for parent in module.modules() for name, child in parent._modules.items()]
        self._holdings: dict[nn.Module, _Holding] = {}
        self._scratch = ScratchStack()
        self._reserved = False
        self._direction: Direction | None = None
        self._watch: ReadWatch | None = None
        self._handles: dict[nn.Module, tuple[RemovableHandle, RemovableHandle]] = {}
        self._watched_once = False
        self.read: set[int] = set()
        self.write_seconds = 0.0
        for owner in self._held_by:
            self._hook(owner)

    def detach(self) -> None:
        """Remove every hook."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    def extra_bytes(self) -> int:
        """Bytes of scratch allocated so far."""
        return sum(chunk.memory.nbytes for chunk in self._scratch)

    @contextmanager
    def perturbed(self, direction: Direction) -> Iterator[None]:
        """Forwards inside the block run on the copies that ``direction`` makes."""
        self._check_structure()
        if not self._reserved:
            self._reserve()
        self._direction, self.write_seconds = direction, 0.0
        try:
            yield
        finally:
            self._direction = None
            self._put_all_back()

    def run(self, closure: Closure, log_once: Callable[[str], None]) -> Tensor | float:
        """Run the closure inside `perturbed`: the first time again and again, until no weight is read unperturbed.

        Raises:
            RuntimeError: If no running module can hold a weight that is read.
        """
        while not self._watched_once:
            self._watch = ReadWatch(slots[0].parameter for slots in self._slots.values())
            try:
                with self._watch.active():
                    loss = closure()
            finally:
                readings, self._watch = self._watch.readings, None
            if not readings:
                self._watched_once = True
                return loss
            held = some([self._hold(reading) for reading in readings])
            log_once(f"attach: weights used outside their module's forward, held by an enclosing module: {held}")
        return closure()

    def _hold(self, reading: Reading) -> str:
        """Let an ancestor hold a weight that was read unperturbed, from now on; its name."""
        name, slots = self._names[id(reading.parameter)], self._slots[id(reading.parameter)]
        owners, contained = {slot.owner for slot in slots}, set(self.module.modules())
        running = (module for module in reversed(reading.running) if module in contained)
        holder = next((module for module in running if not owners.isdisjoint(module.modules())), None)
        if holder is None or any(s.parameter is reading.parameter for s in self._held_by.get(holder, ())):
            raise RuntimeError(
                f"parameter {name!r} is read by {reading.operator} outside the forward of any module that holds "
                "it, so a layer-by-layer perturbation would miss it; use the in-place perturbation (do not call "
                "attach) or leave the parameter out with exclude"
            )
        inside = set(holder.modules())
        for slot in slots:
            if slot.owner in inside:
                self._held_by[slot.owner] = [s for s in self._held_by.get(slot.owner, []) if s is not slot]
        self._reserved = False
        self._held_by.setdefault(holder, []).extend(slot for slot in slots if slot.owner in inside)
        self._hook(holder)
        return name

    def _hook(self, module: nn.Module) -> None:
        if module not in self._handles:
            self._handles[module] = (
                module.register_forward_pre_hook(_Hook(self, "_enter")),
                module.register_forward_hook(_Hook(self, "_leave"), always_call=True),
            )

    def _reserve(self) -> None:
        self._reserved = True
        largest: Counter[tuple[torch.dtype, torch.device]] = Counter()
        for slots in self._held_by.values():
            sizes: Counter[tuple[torch.dtype, torch.device]] = Counter()
            for parameter in {id(slot.parameter): slot.parameter for slot in slots}.values():
                sizes[parameter.dtype, parameter.device] += _padded(parameter.numel())
            largest |= sizes  # the greater of each
        for (dtype, device), size in largest.items():
            self._scratch.reserve(dtype, device, size)

    def _check_structure(self) -> None:
        for parent, name, child in self._links:
            if parent._modules.get(name) is not child:
                raise RuntimeError(
                    f"module {name!r} of {type(parent).__name__} was replaced after attach; call attach again"
                )
        for slots in self._slots.values():
            for slot in slots:
                if slot.owner._parameters.get(slot.name) is not slot.parameter:
                    raise RuntimeError(
                        f"parameter {self._names[id(slot.parameter)]!r} was replaced in its module after attach; "
                        "build the optimizer again from the current parameters"
                    )

    def _enter(self, module: nn.Module, args: Any) -> Any:
        direction = self._direction
        if direction is None:
            return None
        holding = self._holdings.setdefault(module, _Holding())
        holding.depth += 1
        if holding.depth > 1:
            return None
        if self._watch is not None:
            self._watch.paused = True
        started = perf_counter()
        if type(module) is nn.Embedding and (rows := self._rows(module, args)) is not None:
            args = (self._enter_rows(holding, self._held_by[module][0], rows, direction),)
        else:
            args = None
            self._enter_whole(holding, module, direction)
        self.write_seconds += perf_counter() - started
        if self._watch is not None:
            self._watch.paused = False
        return args

    def _rows(self, module: nn.Embedding, args: Any) -> tuple[Tensor, Tensor] | None:
        """The rows of an embedding that a batch looks up, and the batch counted in them, where that saves work."""
        slots, weight = self._held_by[module], module.weight
        plain = len(slots) == 1 and slots[0].parameter is weight and len(args) == 1 and isinstance(args[0], Tensor)
        # any other pre-hook could look at the weight or the indices; unique() would make a GPU wait for the host
        alone = len(module._forward_pre_hooks) == 1 and module.max_norm is None and weight.device.type == "cpu"
        if not (plain and alone) or weight.shape[1] % 8:
            return None
        rows, inverse = torch.unique(args[0], return_inverse=True)
        if rows.numel() == 0 or rows.numel() * ROW_COST >= weight.numel():
            return None
        # an index out of range is left to the embedding's own error
        return None if rows[0] < 0 or rows[-1] >= weight.shape[0] else (rows, inverse)

    def _enter_rows(self, holding: _Holding, slot: _Slot, rows: tuple[Tensor, Tensor], direction: Direction) -> Tensor:
        table = torch.empty(rows[0].numel(), slot.parameter.shape[1], dtype=slot.parameter.dtype)
        direction.perturb_rows(slot.parameter, rows[0], table)
        holding.taken.append((slot, None))
        self.read.add(id(slot.parameter))
        slot.owner._parameters[slot.name] = nn.Parameter(table, requires_grad=slot.parameter.requires_grad)
        return rows[1]

    def _enter_whole(self, holding: _Holding, module: nn.Module, direction: Direction) -> None:
        copies: dict[int, nn.Parameter] = {}
        for slot in self._held_by[module]:
            if slot.owner._parameters[slot.name] is not slot.parameter:
                continue  # an enclosing module holds it already
            parameter, chunk = slot.parameter, None
            copy = copies.get(id(parameter))
            if copy is None:
                numel = parameter.numel()
                chunk = self._scratch.chunk_for(parameter, numel)
                flat, buffer = chunk.take(parameter.shape, numel)
                direction.perturb(parameter, flat)
                # torch.matmul folds or not by requires_grad, also under no_grad: the copy must look like the original
                copy = copies[id(parameter)] = nn.Parameter(buffer, requires_grad=parameter.requires_grad)
            holding.taken.append((slot, chunk))
            self.read.add(id(parameter))
            slot.owner._parameters[slot.name] = copy

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        holding = self._holdings.get(module)
        if holding is None or holding.depth == 0:
            return None
        holding.depth -= 1
        if holding.depth:
            return None
        if holding.taken:
            output = self._own_memory(output)
        self._put_back(holding)
        return output

    def _put_back(self, holding: _Holding) -> None:
        while holding.taken:
            slot, chunk = holding.taken.pop()
            slot.owner._parameters[slot.name] = slot.parameter
            if chunk is not None:
                chunk.used -= _padded(slot.parameter.numel())

    def _put_all_back(self) -> None:
        for holding in self._holdings.values():
            self._put_back(holding)
        self._holdings.clear()
        for chunk in self._scratch:
            chunk.used = 0

    def _own_memory(self, output: Any) -> Any:
        """The output with a copy of whatever lies in the scratch: a module may return a weight, or a view of one."""
        addresses = [chunk.address for chunk in self._scratch]

        def owned(value: Tensor) -> Tensor:
            try:
                address = value.untyped_storage().data_ptr()
            except (RuntimeError, NotImplementedError):
                return value
            return value.clone() if address in addresses else value

        return owned(output) if isinstance(output, Tensor) else tree_map_only(Tensor, owned, output)
