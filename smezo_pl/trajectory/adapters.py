"""The adapter that a record names. A record may come from a stranger, so only settings that do no harm are taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from smezo_pl.trajectory.errors import TrajectoryError
from smezo_pl.trajectory.header import Header

_LORA = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "fan_in_fan_out", "use_rslora", "use_dora", "init_lora_weights", "modules_to_save"),
)
_PREFIX = ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size")

# PEFT has others that import a module or run code of the hub by a name (megatron_core, tokenizer_kwargs, adapters).
HARMLESS: Mapping[str, tuple[str, ...]] = {"LORA": _LORA, "PREFIX_TUNING": _PREFIX}
"""Arguments that are taken from a record, for each type of adapter."""

MOST = 1 << 14
"""Largest rank, number of virtual tokens or width that is taken from a record."""


def recorded_adapter(header: Header, source: str) -> tuple[dict[str, Any], int] | None:
    """The adapter of a run and the seed of its starting weights; None for a run without one.

    Args:
        header: The record's header.
        source: The file, for messages.

    Raises:
        TrajectoryError: If the record is damaged there, or names what a file may not ask for.
    """
    text = header.model.get("adapter")
    if text is None:
        return None
    try:
        adapter, seed = json.loads(text), int(header.model.get("adapter_seed", 0))
    except (TypeError, ValueError, OverflowError, RecursionError):
        adapter, seed = None, 0
    if not isinstance(adapter, dict) or not 0 <= seed < 1 << 64:
        raise TrajectoryError(f"{source}: the adapter in the header is damaged: {text!s:.80}")
    kind = str(adapter.get("peft_type", "")).upper()
    known = HARMLESS.get(kind, ())
    odd = sorted(str(key) for key in adapter if key not in (*known, "peft_type", "task_type"))
    if not known or odd:
        what = f"arguments {', '.join(odd):.80}" if known else f"the type {kind:.40}"
        raise TrajectoryError(
            f"{source}: the run has an adapter with {what}, and from a file only {', '.join(HARMLESS)} with plain "
            "arguments are built: make the starting network in Python and give it to smezo_pl.apply or smezo_pl.replay"
        )
    for key, value in adapter.items():
        plain = value is None or isinstance(value, bool | int | float | str) or _is_list(value)
        large = isinstance(value, int | float) and not abs(value) <= MOST
        if not plain or large:
            raise TrajectoryError(f"{source}: the adapter's {key} cannot be {value!s:.80}")
    if not isinstance(adapter.get("init_lora_weights", True), bool) and adapter["init_lora_weights"] != "gaussian":
        raise TrajectoryError(
            f"{source}: the adapter's init_lora_weights cannot be {adapter['init_lora_weights']!s:.80}"
        )
    return adapter, seed


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST and all(isinstance(item, str | int) for item in value)
