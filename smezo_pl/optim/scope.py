"""Which of the parameters given to the optimizer take part, and under which name and number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

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
