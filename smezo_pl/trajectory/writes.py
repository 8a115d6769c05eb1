"""Weights that something other than the optimizer wrote, which no replay would give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_FIRST_SEEN: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
_ELEMENTS = 8
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # so that NaN equals itself


def remember(network: nn.Module) -> list[int]:
    """Take a network's present weights for those that it is built or loaded with, unless it was remembered before."""
    return _FIRST_SEEN.setdefault(network, _versions(tensors_in(network)))


def is_written(network: nn.Module) -> bool:
    """Whether a network's weights were written since it was remembered."""
    return remember(network) != _versions(tensors_in(network))


def tensors_in(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers themselves, by name."""
    return {name: value for name, value in network.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


class WriteWatch:
    """Notices writes to tensors after `note`.

    torch counts the writes to a tensor, but not those through ``.data``: a few elements of each are compared too,
    enough for what averages, decays, clips or prunes weights.

    Args:
        tensors: The tensors by name, not detached, so that new memory in a parameter's place is noticed.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._memory: list[int] = []
        self.note()

    def note(self) -> None:
        """Take the present weights for right."""
        memory = [tensor.data_ptr() for tensor in self._tensors.values()]
        if memory != self._memory:
            self._memory, self._views = memory, _few_elements(self._tensors)
        self._versions, self._elements = _versions(self._tensors), self._read()

    def written(self) -> str | None:
        """Name of a tensor that was written since `note`; None if none was."""
        for name, tensor, memory, then, now in zip(
            self._tensors, self._tensors.values(), self._memory, self._versions, _versions(self._tensors), strict=True
        ):
            if then != now or memory != tensor.data_ptr():
                return name
        for then_all, now_all, views in zip(self._elements, self._read(), self._views, strict=True):
            if not torch.equal(then_all, now_all):
                lengths = [len(view) for view in views.values()]
                parts = zip(views, torch.split(then_all, lengths), torch.split(now_all, lengths), strict=True)
                return next(name for name, one, other in parts if not torch.equal(one, other))
        return None

    def _read(self) -> list[Tensor]:
        return [torch.cat(list(views.values())) for views in self._views]


def _versions(tensors: Mapping[str, Tensor]) -> list[int]:
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors.values()]


def _few_elements(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Views of a few elements of each tensor, by name; those that `torch.cat` takes together in one entry."""
    views: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.is_contiguous() and tensor.numel():
            flat = tensor.detach().view(-1)[:: max(1, tensor.numel() // _ELEMENTS)]
            views[tensor.device, tensor.dtype][name] = flat.view(_AS_INTEGERS[tensor.element_size()])
    return list(views.values())
