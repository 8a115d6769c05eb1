"""Which tensors are optimized, and checks of the arguments."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor

from smezo_pl.optim.masks import MASK_RULES

Patterns = str | Sequence[str] | None
"""One or several patterns of parameter names, or None."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def as_patterns(argument: str, patterns: Patterns) -> tuple[str, ...]:
    """Patterns as a tuple.

    Raises:
        TypeError: If they are not strings.
    """
    if patterns is None:
        return ()
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be parameter-name patterns (strings), got {pattern!r}")
    return listed


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a shell-style pattern fits the name, or is the name of a module that contains it."""
    return any(fnmatchcase(name, pattern) or name.startswith(pattern + ".") for pattern in patterns)


def require_matches(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a pattern that fits no parameter.

    Raises:
        ValueError: Says which names exist and which is near.
    """
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            near = get_close_matches(pattern.strip("*"), names, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
            raise ValueError(f"{argument} pattern {pattern!r} matches no parameter{hint} Names: {shown}")


def named(params: Iterable[Any]) -> tuple[list[tuple[str | None, Tensor]], bool]:
    """Pairs of name (None where none was given) and tensor, and whether names were given.

    Raises:
        TypeError: If an item is neither a tensor nor a pair of name and tensor.
    """
    pairs: list[tuple[str | None, Tensor]] = []
    with_names = False
    for item in [params] if isinstance(params, Tensor) else params:
        if isinstance(item, tuple):
            name, tensor = item
            with_names = True
        else:
            name, tensor = None, item
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params must hold tensors or (name, tensor) pairs, got {type(tensor).__name__}")
        pairs.append((name, tensor))
    return pairs, with_names


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a parameter that the fused passes cannot walk.

    Raises:
        TypeError: For a dtype or kind of tensor that has no element-wise float arithmetic here.
        ValueError: For a layout that is not one contiguous block, or a tensor without data.
    """
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"parameter {name!r} is a DTensor; sharded parameters are not supported, use the forward_ddp strategy"
        )
    if tensor.dtype not in _DTYPES or tensor.is_quantized:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(
            f"parameter {name!r} has dtype {str(tensor.dtype).removeprefix('torch.')}; allowed: {allowed}. "
            "Leave it out with exclude or requires_grad=False"
        )
    if tensor.layout != torch.strided:
        raise ValueError(
            f"parameter {name!r} has layout {tensor.layout}; only dense (strided) tensors can be perturbed"
        )
    if tensor.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device and has no values; load the model's weights first")
    if not tensor.is_contiguous():
        raise ValueError(
            f"parameter {name!r} is not contiguous (strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}); "
            "replace it by its .contiguous() copy before building the optimizer"
        )


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
