"""Greedy generation for many prompts at once, over one key-value cache with room to grow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache, DynamicLayer

from smezo_pl.optim.rows import rows as forward_of
from smezo_pl.scoring.logits import depends_on_length, has_virtual_tokens, logits_at, parameters_of
from smezo_pl.scoring.neighbors import row_by_row

ROOM_BYTES = 1 << 30
"""Largest joined cache on a CPU, in bytes."""

_CPU_PART = 1024
"""Prompt tokens read at once on a CPU: more do not stay in its caches."""

NO_TOKEN = -1
"""Stands in an answer for a token that cannot be chosen, as the logits are not finite; the answer ends with it."""

_LEAVE = 0.75
"""Finished rows leave when at most this fraction of the rows is still running, since leaving copies the cache."""


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

    The prompts, int64 ``[R, T]`` padded on the left, are read once, the longest first and those of similar length
    together; every further token reads the key-value cache, of all prompts together. A row ends at its first stop token
    and then leaves the others. A model without such a cache, or behind an adapter of virtual tokens, reads the whole
    text again for every token.

    Returns:
        int64 ``[R, max_new_tokens]``, in the order of the prompts: stop tokens included (`NO_TOKEN` is one), then
        ``pad_id``.
    """
    if not max_new_tokens >= 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    answers = input_ids.new_full((input_ids.shape[0], max_new_tokens), pad_id)
    stops = torch.tensor([NO_TOKEN, *stop_ids], dtype=torch.long, device=input_ids.device)
    lengths = attention_mask.sum(1)
    waiting: list[_Part] = []
    for rows in _parts(lengths):
        width = int(lengths[rows].max())
        ids, mask = input_ids[rows, -width:], attention_mask[rows, -width:]
        part = None if has_virtual_tokens(model) else _read(model, rows, ids, mask)
        if part is None:
            _decode_uncached(model, answers, rows, ids, lengths[rows], stops)
        elif not part.joinable:
            _decode(model, answers, part, stops)
        else:
            joined = sum(len(other.rows) for other in waiting) + len(rows)
            if waiting and joined * waiting[0].bytes_per_row(max_new_tokens) > ROOM_BYTES:
                _decode_joined(model, answers, waiting, stops)
            waiting.append(part)
    if waiting:
        _decode_joined(model, answers, waiting, stops)
    return answers


@dataclass
class _Part:
    """Prompts that were read: their row numbers, the token after each, their mask, their key-value cache."""

    rows: Tensor
    token: Tensor
    mask: Tensor
    past: Any

    @property
    def layers(self) -> Sequence[Any]:
        return getattr(self.past, "layers", ())

    @property
    def joinable(self) -> bool:
        """Whether every layer keeps all keys and values: none has a sliding window or a state of another kind."""
        return bool(self.layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in self.layers)

    def bytes_per_row(self, new_tokens: int) -> int:
        """Bytes of the cache of a row with room for so many new tokens."""
        per_token = sum(int(layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes) for layer in self.layers)
        return per_token * (self.mask.shape[1] + new_tokens)


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
    output = _call(model, rows, ids, mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    past = getattr(output, "past_key_values", None)
    return None if past is None else _Part(rows, _best(output.logits[:, -1]), mask, past)


def _best(logits: Tensor) -> Tensor:
    """The token of the largest logit, `NO_TOKEN` where it is not finite."""
    token = logits.argmax(-1, keepdim=True)  # NaN counts as the largest
    return token.masked_fill(~logits.gather(-1, token).isfinite(), NO_TOKEN).squeeze(-1)


def _call(model: nn.Module, rows: Tensor, ids: Tensor, mask: Tensor, **inputs: Any) -> Any:
    takes = parameters_of(model)
    inputs |= {"use_cache": True, "logits_to_keep": 1}
    given = {name: value for name, value in inputs.items() if name in takes}
    with row_by_row(model, depends_on_length(model)), forward_of(rows):
        return model(input_ids=ids, attention_mask=mask, **given)


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values ``[R, heads, room, head size]`` of the parts' rows, padded on the left, the first ones filled.

    transformers' own layer copies all keys and values for every new token.
    """

    def __init__(self, parts: Sequence[Any], width: int, new_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device, self.is_initialized = parts[0].dtype, parts[0].device, True
        keys, values = (
            _joined([getattr(layer, name) for layer in parts], width, new_tokens) for name in ("keys", "values")
        )
        self._fill(keys, values, width)

    def _fill(self, keys: Tensor, values: Tensor, filled: int) -> None:
        self._all_keys, self._all_values, self._filled = keys, values, filled
        self.keys, self.values = keys[:, :, :filled], values[:, :, :filled]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of them."""
        end = self._filled + key_states.shape[-2]
        self._all_keys[:, :, self._filled : end] = key_states
        self._all_values[:, :, self._filled : end] = value_states
        self._fill(self._all_keys, self._all_values, end)
        return self._all_keys[:, :, :end], self._all_values[:, :, :end]

    def keep(self, rows: Tensor, unused: int) -> None:
        """Keep only these rows, without their first ``unused`` tokens."""
        self._fill(self._all_keys[rows, :, unused:], self._all_values[rows, :, unused:], self._filled - unused)


def _joined(tensors: list[Tensor], width: int, new_tokens: int) -> Tensor:
    _, heads, _, size = tensors[0].shape
    room = tensors[0].new_zeros(sum(map(len, tensors)), heads, width + new_tokens, size)
    first = 0
    for tensor in tensors:
        room[first : first + len(tensor), :, width - tensor.shape[2] : width] = tensor
        first += len(tensor)
    return room


def _decode_joined(model: nn.Module, answers: Tensor, parts: list[_Part], stops: Tensor) -> None:
    width = max(part.mask.shape[1] for part in parts)
    layers = [_Layer(same, width, answers.shape[1]) for same in zip(*(part.layers for part in parts), strict=True)]
    past = DynamicCache()
    past.layers = list(layers)
    mask = torch.cat([nn.functional.pad(part.mask, (width - part.mask.shape[1], 0)) for part in parts])
    joined = _Part(torch.cat([part.rows for part in parts]), torch.cat([part.token for part in parts]), mask, past)
    for part in parts:
        part.past = None  # frees the parts' caches
    parts.clear()
    _decode(model, answers, joined, stops)


def _decode(model: nn.Module, answers: Tensor, part: _Part, stops: Tensor) -> None:
    """Fill in the answers, whose first token is known, from the cache of the prompts."""
    rows, token, mask, past = part.rows, part.token, part.mask, part.past
    layers = [layer for layer in part.layers if isinstance(layer, _Layer)]
    answers[rows, 0] = token
    running = ~torch.isin(token, stops)
    for position in range(1, answers.shape[1]):
        count = int(running.sum())
        if not count:
            return
        if layers and count <= _LEAVE * len(rows):
            kept = running.nonzero().squeeze(1)
            rows, token, mask, running = rows[kept], token[kept], mask[kept], running[kept]
            unused = int((mask.cumsum(1) == 0).sum(1).min())
            mask = mask[:, unused:]
            for layer in layers:
                layer.keep(kept, unused)
        mask = nn.functional.pad(mask, (0, 1), value=1)
        positions = mask.sum(1, keepdim=True) - 1
        ids = token.clamp_min(0).unsqueeze(1)
        output = _call(model, rows, ids, mask, past_key_values=past, position_ids=positions)
        past = output.past_key_values
        token = _best(output.logits[:, -1])
        answers[rows[running], position] = token[running]
        running &= ~torch.isin(token, stops)


def _decode_uncached(
    model: nn.Module, answers: Tensor, rows: Tensor, ids: Tensor, lengths: Tensor, stops: Tensor
) -> None:
    """Fill in the answers to prompts padded on the left, reading the whole text for every token."""
    most = answers.shape[1]
    # Padded on the right: no mask is needed, and every position is that of a text alone.
    prompts = [row[len(row) - length :] for row, length in zip(ids, lengths.tolist(), strict=True)]
    text = nn.functional.pad(pad_sequence(prompts, batch_first=True), (0, most))
    takes = parameters_of(model)
    for position in range(most):
        if not len(rows):
            return
        inputs: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        fed = text[:, : int(lengths.max()) + position]
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones_like(fed)
        end = lengths + position
        if depends_on_length(model):
            column = torch.arange(fed.shape[1], device=fed.device)
            inputs["position_ids"] = column * (column < end.unsqueeze(1))
        each = torch.arange(len(rows), device=rows.device)
        with forward_of(rows):
            token = _best(logits_at(model, fed, each, end - 1, inputs))
        answers[rows, position] = token
        text[each, end] = token
        running = ~torch.isin(token, stops)
        rows, text, lengths = rows[running], text[running], lengths[running]
