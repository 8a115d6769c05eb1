"""Checks of the optimizer's numbers and of what its closure returns."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from smezo_pl.optim.masks import MASK_RULES

_FLOAT32 = struct.Struct("<f")


def check_group(group: dict[str, Any]) -> None:
    """Refuse hyperparameters of a parameter group that are out of range.

    Raises:
        TypeError: If a number is not one.
        ValueError: Names the argument, the value and what is allowed.
    """
    for name in ("lr", "eps", "sparsity", "weight_decay"):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= group["lr"] < math.inf:
        raise ValueError(f"lr must be in [0, inf), got {group['lr']}")
    if not 0.0 < group["eps"] < math.inf:
        raise ValueError(f"eps must be in (0, inf), got {group['eps']}")
    if not 0.0 <= group["sparsity"] < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), got {group['sparsity']}")
    if not 0.0 <= group["weight_decay"] < math.inf:
        raise ValueError(f"weight_decay must be in [0, inf), got {group['weight_decay']}")
    if group["mask"] not in MASK_RULES:
        raise ValueError(f"mask must be one of {', '.join(MASK_RULES)}, got {group['mask']!r}")
    if group["mask_update"] not in ("dynamic", "constant"):
        raise ValueError(f"mask_update must be 'dynamic' or 'constant', got {group['mask_update']!r}")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Refuse anything but an integer in ``[low, high)``.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def check_loss(loss: object) -> Tensor | float:
    """A closure's result as one real number, left on its device.

    Raises:
        TypeError: If it is not a number or a tensor of one element.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise TypeError(f"the closure must return one number, got a tensor of shape {tuple(loss.shape)}")
        if loss.is_complex():
            raise TypeError("the closure must return a real number, got a complex tensor")
        return loss.detach().reshape(()).double()
    if loss is None:
        raise TypeError("the closure returned None; it must return the loss")
    if isinstance(loss, (bool, str, bytes)) or not hasattr(loss, "__float__"):
        raise TypeError(f"the closure must return a number, got {type(loss).__name__}")
    return float(cast(float, loss))


def read_losses(losses: list[Tensor | float]) -> list[float]:
    """All losses as numbers, with one synchronisation when they lie on one device."""
    tensors = [loss for loss in losses if isinstance(loss, Tensor)]
    if len(tensors) == len(losses) and len({tensor.device for tensor in tensors}) == 1:
        return [float(value) for value in torch.stack(tensors).tolist()]
    return [float(loss) for loss in losses]


def float32(value: float) -> float:
    """The nearest float32, beyond its range infinity."""
    try:
        return float(_FLOAT32.unpack(_FLOAT32.pack(value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def some(items: Iterable[str], limit: int = 4) -> str:
    """The first few items and how many more there are, for a line of the log."""
    listed = list(items)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
