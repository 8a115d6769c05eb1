"""Layer by layer: while a module runs, its parameter slots hold perturbed copies; the weights are never written."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smezo_pl.optim.memory import identity, memory_of, stamp
from smezo_pl.optim.perturbation.guards import Guard, Guards, refusal_of_write
from smezo_pl.optim.perturbation.learning import Probe, Trial, Uses, learn
from smezo_pl.optim.perturbation.reads import ReadWatch, is_compiled_caller
from smezo_pl.optim.perturbation.rowwise import Rowwise, Seen
from smezo_pl.optim.perturbation.slots import Held, Kind, Scratch, Slot
from smezo_pl.optim.step import Direction, StepPerturbation

logger = logging.getLogger(__name__)

Closure = Callable[[], "Tensor | float"]

ROW_COST = 1 << 11
"""Weights that a pass perturbs in the time that one row of an embedding costs: blocks of noise at both of its ends."""


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

    A forward pre-hook fills a scratch buffer and puts it into the module's parameter slots; a forward hook takes it out
    again. The weights themselves are never written, so they are exact in every dtype, and the extra memory is the
    largest single module. Elsewhere, and in everything else that lies in the memory of a weight, `Guards` stand: a
    weight that is read outside its module's forward is perturbed for that read. Of weights whose direction is a sum of
    outer products there are no copies (see `smezo_pl.optim.perturbation.rowwise`).

    Args:
        module: The network. It must contain every parameter, and must not be compiled.
        parameters: The parameters to perturb, by name.

    Attributes:
        read: Ids of those parameters given to `watch` that a forward read since then.

    Raises:
        ValueError: If the module does not hold a parameter, or is compiled.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.module = module
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        by_memory = {identity(parameter): parameter for parameter in parameters.values()}
        self._held = {module: Held()}  # of the whole network, too, a call is noticed
        for path, owner in module.named_modules():
            is_compiled = type(owner).__name__ == "OptimizedModule" or owner._compiled_call_impl is not None
            if is_compiled or isinstance(owner, torch.jit.ScriptModule):
                raise ValueError(
                    f"attach: module {path or type(owner).__name__!r} is compiled by torch.compile or torch.jit, whose "
                    "graph keeps the weights it was traced with; attach the module that was compiled, or do not attach "
                    "(in place)"
                )
            for name, parameter in owner._parameters.items():
                weight = None if parameter is None else by_memory.get(identity(parameter))
                if parameter is not None and weight is not None:
                    self._held.setdefault(owner, Held()).slots.append(Slot(owner, name, parameter, weight))
        self._slots = [slot for held in self._held.values() for slot in held.slots]
        found = {id(slot.weight) for slot in self._slots}
        missing = [name for key, name in self._names.items() if key not in found]
        if missing:
            raise ValueError(
                f"attach: {type(module).__name__} does not hold {len(missing)} of the optimizer's {len(self._names)} "
                f"parameters, among them {missing[0]!r}; attach the module whose parameters the optimizer was given"
            )
        self._links = [(parent, name, child) for parent in module.modules() for name, child in parent._modules.items()]
        own = {id(slot.original) for slot in self._slots}
        self._others = {
            f"{path}.{name}".removeprefix("."): (owner, tensor)
            for path, owner in module.named_modules()
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
            if tensor is not None and id(tensor) not in own and memory_of(tensor) is not None
        }
        self._scratch: dict[Kind, list[Scratch]] = {}
        self._direction: Direction | None = None
        self.read: set[int] = set()
        self._watched: set[int] = set()
        self._is_thorough = False
        self._guards = Guards(parameters, [slot.original for slot in self._slots], self.read)
        self._rowwise, self._outside = Rowwise(self.read), set[int]()
        self._probe: Probe | None = None
        self._logged: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._handles.append(module.register_forward_pre_hook(_Hook(self, "_begin"), with_kwargs=True))
        for owner in self._held:
            self._handles.append(owner.register_forward_pre_hook(_Hook(self, "_enter")))
            self._handles.append(owner.register_forward_hook(_Hook(self, "_leave"), always_call=True))

    def detach(self) -> None:
        """Remove every hook, and let go of the weights."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._guards.clear()

    def extra_bytes(self) -> int:
        """Bytes of scratch kept for the next forward."""
        copies = sum(scratch.memory.nbytes for of_kind in self._scratch.values() for scratch in of_kind)
        return copies + self._rowwise.extra_bytes()

    @property
    def write_seconds(self) -> float:
        """Seconds of perturbing within the closure."""
        return self._rowwise.seconds

    def check(self, losses: object) -> Tensor:
        """A closure's result as one real number for each of the rows that it has run, float64."""
        return self._rowwise.rows.check(losses)

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Find out which of some parameters the forwards from now on read.

        A module that holds some of them runs under a `ReadWatch`. Elsewhere their guards notice a read.
        """
        self.read.clear()
        self._watched = {id(parameter) for parameter in parameters}
        self._is_thorough = len(self._watched) == len(self._names)  # as in the first step

    def learn(
        self, closure: Closure, step: StepPerturbation, strict: bool, anywhere: Callable[[bool], bool]
    ) -> set[int]:
        """Find out which weights get one direction for the batch; see `smezo_pl.optim.perturbation.learning`.

        Args:
            closure: As for a step.
            step: The perturbation, with a direction for each row of every tensor.
            strict: Whether to refuse such weights.
            anywhere: Whether something holds in any process.

        Returns:
            Ids of the parameters.
        """
        paths: dict[int, list[str]] = {}
        prefixes = {owner: path for path, owner in self.module.named_modules()}
        for slot in self._slots:
            path = f"{prefixes[slot.owner]}.{slot.name} {type(slot.owner).__name__} {tuple(slot.weight.shape)}"
            paths.setdefault(id(slot.weight), []).append(path)

        noted: list[Uses] = []

        def run(trial: Trial, uses: Uses | None) -> Probe:
            self._probe, self._rowwise.note = Probe(), uses.note if uses is not None else None
            noted.extend(() if uses is None else (uses,))
            try:
                with self.perturbed(trial):
                    self._probe.losses = self.check(closure())
                    self._probe.calls = self._rowwise.rows.calls
                return self._probe
            finally:
                self._probe = self._rowwise.note = None

        self._rowwise.proved = None
        shared = learn(run, step, paths, self._names, strict, anywhere)
        self._rowwise.proved = noted[0].doubtful()
        return shared

    @contextmanager
    def perturbed(self, direction: Direction) -> Iterator[None]:
        """Forwards inside the block run on the copies that ``direction`` makes.

        Raises:
            RuntimeError: If a module or parameter was replaced since `attach`, or a forward writes a weight.
        """
        self._check_structure()
        others = [stamp(tensor) for _, tensor in self._others.values()]
        outside = {id(slot.weight) for slot in self._slots if direction.is_outside(slot.weight)}
        if self._guards.refresh() or outside != self._outside:
            self._outside = outside
            for held in self._held.values():
                held.place(outside)
            for slot in self._slots:
                slot.guard = guard = self._guards[slot.original]
                if id(slot.weight) in outside and isinstance(guard, Guard):
                    slot.guard = Seen.of(guard, slot.original, slot.weight, self._rowwise)
        self._direction, replaced = direction, list[Slot]()
        try:
            self._rowwise.start(direction)
            with self._guards.standing(direction):
                for slot in self._slots:
                    slot.owner._parameters[slot.name] = slot.guard
                yield
        finally:
            self._direction = self._rowwise.direction = None
            for held in reversed(self._held.values()):  # inner modules first
                self._empty(held)
            for slot in self._slots:
                if slot.owner._parameters.get(slot.name) is not slot.guard:
                    replaced.append(slot)
                slot.owner._parameters[slot.name] = slot.original
        for (name, (owner, tensor)), before in zip(self._others.items(), others, strict=True):
            if stamp(tensor) != before:
                self._refuse_write_of_state(name, owner, tensor)
        if replaced:
            raise RuntimeError(
                f"a forward puts another tensor in the place of parameter {self._names[id(replaced[0].weight)]!r}; "
                "leave the parameter out with exclude"
            )

    def _refuse_write_of_state(self, name: str, owner: nn.Module, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter) or owner.training:
            raise RuntimeError(refusal_of_write(repr(name), f"in {type(owner).__name__}.forward"))
        if name not in self._logged:
            self._logged.add(name)
            logger.warning("a forward writes buffer %r, which no trajectory or checkpoint without weights holds", name)

    def _check_structure(self) -> None:
        for parent, name, child in self._links:
            if parent._modules.get(name) is not child:
                raise RuntimeError(
                    f"module {name!r} of {type(parent).__name__} was replaced after attach; call attach again"
                )
        for slot in self._slots:
            if slot.owner._parameters.get(slot.name) is not slot.original:
                raise RuntimeError(
                    f"parameter {self._names[id(slot.weight)]!r} was replaced in its module after attach; "
                    "build the optimizer again from the current parameters"
                )

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._direction is not None and self._outside:
            self._rowwise.rows.begin(module, args, kwargs)

    def _enter(self, module: nn.Module, args: Any) -> Any:
        if self._direction is None:
            return None
        if not self._guards.are_standing_here():
            raise RuntimeError(
                "a forward runs in another thread than the step, where no perturbation reaches it; run it in the "
                "closure's own thread, or use the in-place perturbation (do not call attach)"
            )
        if is_compiled_caller():
            raise RuntimeError(
                f"a function compiled by torch.compile runs {type(module).__name__}, and its graph would keep the "
                "copies of weights that it was traced with; compile what runs no module, or use the in-place "
                "perturbation (do not call attach)"
            )
        held = self._held[module]
        self._rowwise.rows.enter(module, args)
        held.depth += 1
        if held.depth > 1:
            return None
        self._guards.forget_copies()
        if not held.copied:
            return None
        started, result = perf_counter(), None
        with torch._C.DisableTorchFunctionSubclass():
            if type(module) is nn.Embedding and (rows := self._rows(module, held, args)) is not None:
                result = (self._fill_rows(module, held, rows),)
            else:
                self._fill(held)
            held.stamps = [stamp(copy, self._is_thorough) for _, copy in held.filled]
        if self._watched:
            self._watch_copies(held)
        self._rowwise.seconds += perf_counter() - started
        return result

    def _rows(self, module: nn.Embedding, held: Held, args: Any) -> tuple[Tensor, Tensor] | None:
        """The rows of an embedding that a batch looks up, and the batch counted in them, where that saves work."""
        weight = module.weight
        plain = len(held.slots) == len(held.copied) == 1 and held.slots[0].guard is weight and len(args) == 1
        # any other pre-hook could look at the weight or the indices; unique() would make a GPU wait for the host
        alone = all(isinstance(hook, _Hook) for hook in module._forward_pre_hooks.values())
        alone &= module.max_norm is None and weight.device.type == "cpu"
        if not (plain and alone and isinstance(args[0], Tensor)) or weight.shape[1] % 8:
            return None
        rows, inverse = torch.unique(args[0], return_inverse=True)
        if rows.numel() == 0 or rows.numel() * ROW_COST >= weight.numel():
            return None
        # an index out of range is left to the embedding's own error
        return None if rows[0] < 0 or rows[-1] >= weight.shape[0] else (rows, inverse)

    def _fill_rows(self, module: nn.Embedding, held: Held, rows: tuple[Tensor, Tensor]) -> Tensor:
        assert self._direction is not None
        weight = held.slots[0].weight
        table = torch.empty(rows[0].numel(), weight.shape[1], dtype=weight.dtype)
        self._direction.perturb_rows(weight, rows[0], table)
        # the table is too short for its number, which matters to gradients alone
        held.padding_idx, module.padding_idx = module.padding_idx, None
        self._put(held, held.slots[0], nn.Parameter(table, requires_grad=held.slots[0].original.requires_grad))
        return rows[1]

    def _fill(self, held: Held) -> None:
        assert self._direction is not None
        for kind, numel in held.sizes.items():
            held.memories[kind] = self._take(kind, numel, held.hands_out)
        done: set[tuple[Kind, int]] = set()
        for slot, (kind, start) in zip(held.copied, held.places, strict=True):
            if slot.owner._parameters[slot.name] is not slot.guard:
                continue  # as in torch.func.functional_call
            flat, buffer = held.memories[kind].views(start, slot.weight.shape)
            if (kind, start) not in done:
                self._direction.perturb(slot.weight, flat)
                done.add((kind, start))
            # torch.matmul folds or not by requires_grad, also under no_grad: the copy must look like the original
            self._put(held, slot, nn.Parameter(buffer, requires_grad=slot.original.requires_grad))

    def _put(self, held: Held, slot: Slot, copy: nn.Parameter) -> None:
        held.filled.append((slot, copy))
        slot.owner._parameters[slot.name] = copy

    def _watch_copies(self, held: Held) -> None:
        wanted = [(copy, id(slot.weight)) for slot, copy in held.filled if id(slot.weight) in self._watched - self.read]
        if wanted:
            watch = ReadWatch(self.read)
            for copy, key in wanted:
                watch.add(copy, key)
            held.watching.enter_context(watch.watching())

    def _take(self, kind: Kind, numel: int, alone: bool) -> Scratch:
        """Memory for so many elements: the last that was given back, which a larger one replaces if it is too small."""
        free = self._scratch.setdefault(kind, [])
        scratch = free.pop() if free and not alone else None
        if scratch is None or scratch.memory.numel() < numel:
            del scratch
            scratch = Scratch(numel, *kind)
        return scratch

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self.module and self._probe is not None and self._rowwise.rows.calls:
            self._probe.look(output, self._rowwise.rows.numbers())
        self._rowwise.rows.leave(module, output)
        held = self._held[module]
        held.depth -= held.depth > 0
        if held.depth == 0 and held.copied and (written := self._empty(held)):
            raise RuntimeError(refusal_of_write(self._guards.names_of(written), f"in {type(module).__name__}.forward"))

    def _empty(self, held: Held) -> list[nn.Parameter]:
        """Take the copies of a module out of its slots, and give its memory back if nobody holds a part of it.

        Returns:
            The weights whose copies were written.
        """
        held.watching.close()
        stamps = [stamp(copy, self._is_thorough) for _, copy in held.filled]
        written = [slot.weight for (slot, _), a, b in zip(held.filled, stamps, held.stamps, strict=False) if a != b]
        held.depth = 0
        while held.filled:
            slot, copy = held.filled.pop()
            if slot.owner._parameters.get(slot.name) is copy:
                slot.owner._parameters[slot.name] = slot.guard
            del copy
        if held.padding_idx is not None:
            held.slots[0].owner.padding_idx, held.padding_idx = held.padding_idx, None  # type: ignore[assignment]
        held.hands_out = False
        for kind, scratch in held.memories.items():
            if scratch.is_kept():
                held.hands_out = True
                places = [
                    (s.weight, start) for s, (k, start) in zip(held.copied, held.places, strict=True) if k == kind
                ]
                copies = [(scratch.views(start, weight.shape)[1], weight) for weight, start in places]
                self._guards.keep(scratch.storage, copies)
                self.read.update(id(weight) for _, weight in copies)  # by whoever keeps them
            else:
                self._scratch[kind].append(scratch)
        held.memories.clear()
        return written
