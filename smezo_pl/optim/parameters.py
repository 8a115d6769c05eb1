"""Which tensors are optimized, and checks of the arguments."""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from smezo_pl.optim.directions import FACTORS, MAX_RANK, Directions
from smezo_pl.optim.kernels import Kernel, KernelName, get_kernel
from smezo_pl.optim.masks import MASK_RULES
from smezo_pl.optim.memory import Part, check_tensor, ties

Patterns = str | Sequence[str] | None
"""One or several patterns of parameter names, or None."""

_T = TypeVar("_T")


def remembers_given(cls: type[_T]) -> type[_T]:
    """Class decorator: instances have in ``given`` the names of the arguments given, those left at a default apart."""
    build: Any = cls.__init__
    names = list(inspect.signature(build).parameters)[1:]

    @functools.wraps(build)
    def init(self: _T, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "given", frozenset((*names[: len(args)], *kwargs)))
        build(self, *args, **kwargs)

    setattr(cls, "__init__", init)  # noqa: B010 (mypy forbids the assignment)
    return cls


@dataclass(frozen=True, slots=True)
class OptimizedTensor:
    """A parameter that is optimized.

    Attributes:
        name: Its name.
        parameter: The parameter.
        number: Its number among all parameters given, which addresses its noise.
        position: Its position in its group.
        dense: Whether all of its weights are active whatever the rule.
        group: Its parameter group; thresholds are kept there, as plain numbers.
        kernel_name: What makes the passes over it; float64 is left to the torch kernel.
    """

    name: str
    parameter: nn.Parameter
    number: int
    position: int
    dense: bool
    group: dict[str, Any]
    kernel_name: KernelName

    @property
    def flat(self) -> Tensor:
        """The weights as one dimension, without a graph."""
        return self.parameter.detach().view(-1)

    @property
    def kernel(self) -> Kernel:
        """The kernel for its device, which may change."""
        parameter = self.parameter
        return get_kernel("torch" if parameter.dtype == torch.float64 else self.kernel_name, parameter.device)

    @property
    def threshold(self) -> float | None:
        """Threshold of its mask, None where it has none."""
        value = self.group["thresholds"][self.position]
        return None if value is None else float(value)


def as_patterns(argument: str, patterns: Patterns) -> tuple[str, ...]:
    """Patterns as a tuple."""
    if patterns is None:
        return ()
    names = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in names:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be parameter-name patterns (strings), got {pattern!r}")
    return names


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a shell-style pattern fits the name, or is the name of a module that contains it."""
    return any(fnmatchcase(name, pattern) or name.startswith(pattern + ".") for pattern in patterns)


def check_scope(scope: Mapping[str, Iterable[str]], names: Sequence[str], groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a pattern that fits no parameter, and groups without any."""
    for argument, pattern in ((argument, pattern) for argument, patterns in scope.items() for pattern in patterns):
        if not any(matches(name, (pattern,)) for name in names):
            near = get_close_matches(pattern.strip("*"), names, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
            raise ValueError(f"{argument} pattern {pattern!r} matches no parameter{hint} Names: {shown}")
    if not any(group["params"] for group in groups):
        raise ValueError(
            f"no parameter is optimized: of {len(names)} given, none has requires_grad=True and is in include and not "
            "in exclude"
        )


def choose(
    params: Iterable[Any],
    scope: Mapping[str, tuple[str, ...]],
    given: list[str],
    groups: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Choose the parameters of a group that are optimized, by the patterns of ``scope``; tied ones once.

    All names are added to ``given``, whose order numbers the tensors. ``param_names`` of the group stand apart from the
    tensors, because torch takes a group that the filters emptied for one without names. ``groups`` are those before it.
    """
    items = [params] if isinstance(params, Tensor) else list(params)
    with_names = any(isinstance(item, tuple) for item in items)
    if not with_names and any(scope.values()):
        raise ValueError("include, exclude and dense need names: pass model.named_parameters() instead of parameters()")
    group: dict[str, Any] = {"params": [], "names": [], **({"param_names": []} if with_names else {}), "numbers": []}
    parts = [
        Part(name, tensor, "optimized by another group")
        for before in groups
        for name, tensor in zip(before["names"], before["params"], strict=True)
    ]
    entries: dict[int, dict[str, Any]] = {}
    for item in items:
        name, tensor = item if isinstance(item, tuple) else (f"parameter {len(given)}", item)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params must hold tensors or (name, tensor) pairs, got {type(tensor).__name__}")
        given.append(name)
        included = not scope["include"] or matches(name, scope["include"])
        treatment = ""
        if tensor.requires_grad and included and not matches(name, scope["exclude"]):
            treatment = "dense" if matches(name, scope["dense"]) else "optimized"
            if not tensor.is_meta:  # its values may come before the first step
                check_tensor(name, tensor)
            entry = {"params": tensor, "names": name, "param_names": name, "numbers": len(given) - 1}
            entries[len(parts)] = entry
        parts.append(Part(name, tensor, treatment))
    for index in sorted(entries.keys() - ties(parts)):
        for key, values in group.items():
            values.append(entries[index][key])
    return group


def check_group(group: dict[str, Any]) -> None:
    """Refuse hyperparameters of a parameter group that are out of range."""
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


_CHOICES = {
    "noise": ("gaussian", "rademacher"),
    "kernel": ("auto", "numba", "triton", "torch"),
    "directions": ("shared", "per_row"),
    "coefficients": ("raw", "normalized", "moving", "ranks"),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of the optimizer as a whole that are out of range."""
    check_integer("num_samples", settings["num_samples"], 1, FACTORS)
    check_integer("seed", settings["seed"], 0, 1 << 64)
    check_integer("max_skipped", settings["max_skipped"], 1, 1 << 31)
    if settings["rank"] is not None:
        check_integer("rank", settings["rank"], 1, MAX_RANK + 1)
    for name, allowed in _CHOICES.items():
        if settings[name] not in allowed:
            *others, last = map(repr, allowed)
            raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {settings[name]!r}")


def check_rank(rank: int | None, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a rank together with a mask that leaves weights out."""
    for group in groups if rank is not None else ():
        if group["mask"] != "dense":
            raise ValueError(
                f"rank={rank} needs mask='dense', got {group['mask']!r}: a direction of low rank moves all weights. "
                "Leave out the mask (--model.method mezo), or the rank"
            )


def check_state(
    state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], directions: Directions, coefficients: str
) -> None:
    """Refuse a state of another optimizer, other directions or coefficients, or other parameters than ``groups``."""
    own = state.get("smezo")
    if own is None:
        raise ValueError("the state does not come from SparseMeZO: it has no entry 'smezo'")
    saved = Directions(own.get("directions") == "per_row", own.get("rank"))
    if own["noise_scheme"] != saved.scheme:
        raise ValueError(
            f"the state was made with noise scheme {own['noise_scheme']}, this version has scheme {saved.scheme} for "
            f"{saved}; the run cannot be resumed with other noise"
        )
    if saved != directions:
        raise ValueError(f"the state was made with {saved}, the optimizer has {directions}: give those of the state")
    if (rule := own.get("coefficients", "raw")) != coefficients:
        raise ValueError(
            f"the state was made with coefficients={rule!r}, the optimizer has {coefficients!r}: give that one"
        )
    for saved, group in zip(state["param_groups"], groups, strict=False):
        if saved["names"] != group["names"] or saved["numbers"] != group["numbers"]:
            raise ValueError(
                f"the state belongs to other parameters: {len(saved['names'])} saved ({saved['names'][:2]}...), "
                f"{len(group['names'])} here ({group['names'][:2]}...)"
            )


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Refuse anything but an integer in ``[low, high)``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def float32(value: float) -> float:
    """The nearest float32, beyond its range infinity."""
    return ctypes.c_float(value).value


def some(items: Iterable[str], limit: int = 4) -> str:
    """The first few items and how many more there are, for a line of the log."""
    shown = list(items)
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")
