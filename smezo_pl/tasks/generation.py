"""Greedy generation of answers."""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


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

    The prompts are read once; every further token reads the key-value cache. A row ends at its first stop token, the
    call when all rows have ended.

    Args:
        model: A causal language model of transformers, or one that is called alike.
        input_ids: int64 ``[R, T]``, padded on the left.
        attention_mask: int64 ``[R, T]``, 0 on padding.
        max_new_tokens: Most tokens of an answer, at least 1.
        stop_ids: Tokens that end an answer; they are part of what is returned.
        pad_id: What stands after a stop token.

    Returns:
        int64 ``[R, max_new_tokens]``.

    Raises:
        ValueError: If ``max_new_tokens`` is below 1.
    """
    if not max_new_tokens >= 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    rows = input_ids.shape[0]
    answers = input_ids.new_full((rows, max_new_tokens), pad_id)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=input_ids.device)
    running = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    takes = _parameters(_forward(model))
    position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
    fed, past = input_ids, None
    for place in range(max_new_tokens):
        given: dict[str, Any] = {"position_ids": position_ids, "use_cache": True, "logits_to_keep": 1}
        given = {name: value for name, value in given.items() if name in takes}
        if past is not None:
            given["past_key_values"] = past
        output = model(input_ids=fed, attention_mask=attention_mask, **given)
        token = output.logits[:, -1].argmax(-1)
        answers[:, place] = torch.where(running, token, answers[:, place])
        running &= ~torch.isin(token, stops)
        if not running.any():
            break
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(rows, 1)], 1)
        past = getattr(output, "past_key_values", None)
        if past is not None:
            fed, position_ids = token.unsqueeze(1), position_ids[:, -1:] + 1
        else:
            fed = torch.cat([fed, token.unsqueeze(1)], 1)
            position_ids = torch.cat([position_ids, position_ids[:, -1:] + 1], 1)
    return answers


def _forward(model: nn.Module) -> Callable[..., Any]:
    """The forward whose signature counts: PEFT's wrappers hand on arguments that they do not name."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    function: Callable[..., Any] = getattr(type(inner), "forward", inner.forward)
    return function


@lru_cache(maxsize=64)
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
