"""Where a module keeps its parameters, and the memory for the perturbed copies that are there while it runs."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smezo_pl.optim.perturbation.guards import use_count

_ALIGNMENT = 64
"""Elements. Keeps every copy on the 64-byte boundary that torch's own allocations have."""


def _padded(numel: int) -> int:
    """Elements that a buffer of ``numel`` elements occupies."""
    return -(-numel // _ALIGNMENT) * _ALIGNMENT


class Scratch:
    """Memory for the copies of the weights of one module, used again by the modules after it."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.memory = torch.empty(numel, dtype=dtype, device=device)
        self.storage = self.memory.untyped_storage()
        self._views: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
        self._own = use_count(self.storage)

    def views(self, start: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """The buffer for a tensor that begins there, flat and in its shape."""
        views = self._views.get((start, shape))
        if views is None:  # kept: a model has few shapes, and making a view takes as long as perturbing a small tensor
            with torch.inference_mode(False):
                flat = self.memory[start : start + shape.numel()]
                views = self._views[start, shape] = flat, flat.view(shape)
        return views

    def is_kept(self) -> bool:
        """Whether somebody holds a tensor that lies in it."""
        return use_count(self.storage) > self._own + 2 * len(self._views)


@dataclass(slots=True)
class Slot:
    """Where a module keeps a parameter: ``owner._parameters[name]``.

    Attributes:
        owner: The module.
        name: The parameter's name in it.
        original: The parameter.
        weight: The parameter that is optimized: the same, or one tied to it by its memory.
        guard: What the slot holds during a step, outside the module's forward.
    """

    owner: nn.Module
    name: str
    original: nn.Parameter
    weight: nn.Parameter
    guard: Any = None


Kind = tuple[torch.dtype, torch.device]


@dataclass(slots=True)
class Held:
    """The slots that a module fills while it runs, and the copies in them.

    Attributes:
        slots: The slots of its weights.
        copied: Those of them that are filled.
        places: Where the copy for each slot begins in the memory of its kind.
        sizes: Elements of the memory of each kind.
        hands_out: Whether copies outlived its forward the last time: then its memory is not one that others use.
        depth: Number of its forwards that run, one within the other.
        filled: The slots that hold copies now, and the copies.
        memories: Their memory by kind.
        stamps: Of the copies, once all were made.
        padding_idx: Of an embedding of which only some rows are perturbed.
        watching: What is left when the module ends.
    """

    slots: list[Slot] = field(default_factory=list)
    copied: list[Slot] = field(default_factory=list)
    places: list[tuple[Kind, int]] = field(default_factory=list)
    sizes: Counter[Kind] = field(default_factory=Counter)
    hands_out: bool = False
    depth: int = 0
    filled: list[tuple[Slot, nn.Parameter]] = field(default_factory=list)
    memories: dict[Kind, Scratch] = field(default_factory=dict)
    stamps: list[tuple[int, int, int]] = field(default_factory=list)
    padding_idx: int | None = None
    watching: ExitStack = field(default_factory=ExitStack)

    def place(self, outside: set[int]) -> None:
        """Give each weight its place, but those of which layers need no copy; again when a weight has moved."""
        self.copied = [slot for slot in self.slots if id(slot.weight) not in outside]
        self.sizes, starts = Counter(), dict[int, tuple[Kind, int]]()
        for weight in (slot.weight for slot in self.copied):
            if id(weight) not in starts:
                kind = weight.dtype, weight.device
                starts[id(weight)] = kind, self.sizes[kind]
                self.sizes[kind] += _padded(weight.numel())
        self.places = [starts[id(slot.weight)] for slot in self.copied]
