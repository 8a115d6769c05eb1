"""A key-value cache with room to grow, whose rows can leave."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from smezo_pl.scoring.logits import has_virtual_tokens, logits_at, parameters_of

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


_CPU_PART = 1024
"""Tokens of prompts that are read at once on a CPU: more do not stay in its caches."""

_LEAVE = 0.75
"""Rows that have ended leave the others when no more than this part of them still runs: leaving copies the cache."""


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Tensor:
    """The most likely next tokens after each prompt, one after the other.

    The prompts are read once, the longest first and those of similar length together; every further token reads the
    key-value cache, of all prompts together. A row ends at its first stop token and then leaves the others, the call
    when all rows have ended. A model without such a cache, or behind an adapter of virtual tokens, reads the whole text
    again for every token.

    Args:
        model: A causal language model of transformers, or one that is called alike.
        input_ids: int64 ``[R, T]``, padded on the left.
        attention_mask: int64 ``[R, T]``, 0 on padding.
        max_new_tokens: Most tokens of an answer, at least 1.
        stop_ids: Tokens that end an answer; they are part of what is returned.
        pad_id: What stands after a stop token.

    Returns:
        int64 ``[R, max_new_tokens]``, in the order of the prompts.

    Raises:
        ValueError: If ``max_new_tokens`` is below 1.
    """
    if not max_new_tokens >= 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    answers = input_ids.new_full((input_ids.shape[0], max_new_tokens), pad_id)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=input_ids.device)
    lengths = attention_mask.sum(1)
    waiting: list[_Part] = []
    for rows in _parts(lengths):
        width = int(lengths[rows].max())
        ids, mask = input_ids[rows, -width:], attention_mask[rows, -width:]
        part = None if has_virtual_tokens(model) else _read(model, rows, ids, mask)
        if part is None:
            _write_uncached(model, answers, rows, ids, lengths[rows], stops)
        elif (layers := layers_of(part.past)) is None:
            _write(model, answers, part.rows, part.token, mask, part.past, stops)
        else:
            part.layers = layers
            # On a CPU so many rows go on together that their caches stay within bounds.
            if waiting and sum(len(p.rows) for p in (*waiting, part)) * part.bytes_of(max_new_tokens) > ROOM_BYTES:
                _write_joined(model, answers, waiting, lengths, stops)
                waiting = []
            waiting.append(part)
    if waiting:
        _write_joined(model, answers, waiting, lengths, stops)
    return answers


@dataclass
class _Part:
    """Prompts that were read: their numbers, the token after each, what is kept of them."""

    rows: Tensor
    token: Tensor
    past: Any
    width: int
    layers: list[tuple[Tensor, Tensor]] | None = None

    def bytes_of(self, more: int) -> int:
        """Bytes of the cache of a row with room for so many more tokens."""
        assert self.layers is not None
        each = sum(keys[0, :, 0].nbytes + values[0, :, 0].nbytes for keys, values in self.layers)
        return each * (self.width + more)


def _parts(lengths: Tensor) -> Iterator[Tensor]:
    """Numbers of the rows that are read at once, the longest first."""
    order = lengths.argsort(descending=True, stable=True)
    if lengths.device.type != "cpu":
        yield order
        return
    while len(order):
        count = max(1, _CPU_PART // max(1, int(lengths[order[0]])))
        yield order[:count]
        order = order[count:]


def _read(model: nn.Module, rows: Tensor, ids: Tensor, mask: Tensor) -> _Part | None:
    """Read prompts that are padded on the left; None if the model keeps no cache."""
    inputs: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    output = _call(model, ids, mask, inputs)
    past = getattr(output, "past_key_values", None)
    return None if past is None else _Part(rows, output.logits[:, -1].argmax(-1), past, ids.shape[1])


def _call(model: nn.Module, ids: Tensor, mask: Tensor, inputs: dict[str, Any]) -> Any:
    takes = parameters_of(model)
    given = {name: value for name, value in inputs.items() if name in takes}
    return model(input_ids=ids, attention_mask=mask, **given)


def _write_joined(model: nn.Module, answers: Tensor, parts: list[_Part], lengths: Tensor, stops: Tensor) -> None:
    rows = torch.cat([part.rows for part in parts])
    width, more = max(part.width for part in parts), answers.shape[1]
    past = joined([part.layers or [] for part in parts], width, more)
    place = torch.arange(width, device=rows.device)
    mask = (place >= width - lengths[rows].unsqueeze(1)).long()
    for part in parts:
        part.past = part.layers = None
    _write(model, answers, rows, torch.cat([part.token for part in parts]), mask, past, stops)


def _write(
    model: nn.Module, answers: Tensor, rows: Tensor, token: Tensor, mask: Tensor, past: Any, stops: Tensor
) -> None:
    """Write answers, of which the first token is known, from a cache of the prompts."""
    answers[rows, 0] = token
    going = ~torch.isin(token, stops)
    for place in range(1, answers.shape[1]):
        running = int(going.sum())
        if not running:
            return
        if isinstance(past, Rows) and running <= _LEAVE * len(rows):
            kept = going.nonzero().squeeze(1)
            rows, token, mask = rows[kept], token[kept], mask[kept]
            unused = int((mask.cumsum(1) == 0).sum(1).min())
            mask = mask[:, unused:]
            past.keep(kept, unused)
            going = going[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        inputs: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1, "past_key_values": past}
        inputs["position_ids"] = mask.sum(1, keepdim=True) - 1
        output = _call(model, token.unsqueeze(1), mask, inputs)
        past = output.past_key_values
        token = output.logits[:, -1].argmax(-1)
        answers[rows[going], place] = token[going]
        going &= ~torch.isin(token, stops)


def _write_uncached(
    model: nn.Module, answers: Tensor, rows: Tensor, ids: Tensor, lengths: Tensor, stops: Tensor
) -> None:
    """Write answers to prompts that are padded on the left, reading the whole text for every token."""
    width, most = ids.shape[1], answers.shape[1]
    # Padded on the right: no mask is needed, and every position is that of a text alone.
    text = ids.new_zeros(len(rows), width + most)
    for number, (row, length) in enumerate(zip(ids, lengths.tolist(), strict=True)):
        text[number, :length] = row[width - length :]
    takes = parameters_of(model)
    for place in range(most):
        if not len(rows):
            return
        inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        fed = text[:, : int(lengths.max()) + place]
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones_like(fed)
        at = lengths + place
        each = torch.arange(len(rows), device=rows.device)
        token = logits_at(model, fed, each, at - 1, inputs).argmax(-1)
        answers[rows, place] = token
        text[each, at] = token
        going = ~torch.isin(token, stops)
        rows, text, lengths = rows[going], text[going], lengths[going]
