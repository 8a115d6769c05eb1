"""A key-value cache with room to grow, whose rows can leave."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM_BYTES = 1 << 30
"""Most bytes of the caches of rows that are generated together on a CPU."""


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values ``[R, heads, room, width of a head]``, of which the first ones are filled.

    transformers' own layer copies all that is there for every new token.
    """

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._fill(keys, values, filled)

    def _fill(self, keys: Tensor, values: Tensor, filled: int) -> None:
        self._all_keys, self._all_values, self._filled = keys, values, filled
        self.keys, self.values = keys[:, :, :filled], values[:, :, :filled]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put in the next ones; what is there so far."""
        end = self._filled + key_states.shape[-2]
        self._all_keys[:, :, self._filled : end] = key_states
        self._all_values[:, :, self._filled : end] = value_states
        self._fill(self._all_keys, self._all_values, end)
        return self._all_keys[:, :, :end], self._all_values[:, :, :end]

    def keep(self, rows: Tensor, unused: int) -> None:
        """Keep these rows alone, without so many tokens at their start."""
        self._fill(self._all_keys[rows, :, unused:], self._all_values[rows, :, unused:], self._filled - unused)


class Rows(DynamicCache):
    """The cache of rows that are padded on the left.

    Args:
        layers: For each layer keys and values with room.
        filled: How many tokens are there.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], filled: int) -> None:
        super().__init__()
        self._own = [_Layer(keys, values, filled) for keys, values in layers]
        self.layers = list(self._own)

    def keep(self, rows: Tensor, unused: int) -> None:
        """Keep these rows alone, without so many tokens at their start."""
        for layer in self._own:
            layer.keep(rows, unused)


def layers_of(past: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of each layer, ``[R, heads, T, width of a head]``; None if a layer keeps something else."""
    layers = getattr(past, "layers", None)
    if not layers or not all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
        return None
    return [(layer.keys, layer.values) for layer in layers]


def joined(parts: list[list[tuple[Tensor, Tensor]]], width: int, more: int) -> Rows:
    """The caches of parts as one, padded on the left to ``width`` tokens, with room for ``more``."""

    def join(tensors: list[Tensor]) -> Tensor:
        rows, (_, heads, _, size) = sum(map(len, tensors)), tensors[0].shape
        room = tensors[0].new_zeros(rows, heads, width + more, size)
        first = 0
        for tensor in tensors:
            room[first : first + len(tensor), :, width - tensor.shape[2] : width] = tensor
            first += len(tensor)
        return room

    layers = []
    for number in range(len(parts[0])):
        layers.append((join([part[number][0] for part in parts]), join([part[number][1] for part in parts])))
    return Rows(layers, width)
