"""The methods that one key chooses between, so that they share data, scoring and ``metrics.json``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from smezo_pl.optim import SparseMeZO

logger = logging.getLogger(__name__)

MethodName = Literal["s-mezo", "mezo", "r-mezo", "full", "lora", "prefix", "linear-probe", "zero-shot"]
"""Names of the methods, see `METHODS`."""


@dataclass(frozen=True, slots=True)
class Method:
    """What distinguishes a method.

    Attributes:
        summary: What it does, in a few words.
        order: 0 for forwards alone (`SparseMeZO`), 1 for backpropagation (`smezo_pl.first_order`), None for no
            training.
        mask: The optimizer's mask, for order 0.
        adapter: The adapter where the configuration names none; ``peft_type`` is also what a given one must have.
        lr: AdamW's learning rate where the configuration names none, for order 1.
    """

    summary: str
    order: Literal[0, 1] | None
    mask: str | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.0


METHODS: dict[str, Method] = {
    "s-mezo": Method("Sparse MeZO: forwards alone, the smallest weights of each tensor", 0, "small"),
    "mezo": Method("MeZO: forwards alone, all weights", 0, "dense"),
    "r-mezo": Method("R-MeZO: forwards alone, a random choice of weights", 0, "random"),
    "full": Method("full fine-tuning by backpropagation", 1, lr=1e-5),
    # MeZO's adapters; which matrices LoRA goes to is PEFT's choice by architecture (query and value for most).
    "lora": Method("LoRA by backpropagation", 1, adapter={"peft_type": "LORA", "r": 8, "lora_alpha": 16}, lr=1e-4),
    "prefix": Method(
        "prefix tuning by backpropagation",
        1,
        adapter={"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "init_weights": "zero"},
        lr=1e-2,
    ),
    "linear-probe": Method("a linear layer on frozen features of the last position", 1, lr=1e-2),
    "zero-shot": Method("no training", None),
}
"""Every method by name. The learning rates of order 1 are starting points, not tuned ones."""


def method_of(name: str | None) -> Method | None:
    """The method of a name, None for none.

    Raises:
        ValueError: If there is no such method.
    """
    if name is None:
        return None
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def adapter_of(name: str | None, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The adapter that a method trains: the given one, the method's own, or None.

    Raises:
        ValueError: If an adapter is given to a method that trains something else.
    """
    method = method_of(name)
    if method is None or method.order == 0:
        return None if given is None else dict(given)
    wanted = method.adapter.get("peft_type")
    if given is None:
        return dict(method.adapter) or None
    kind = str(given.get("peft_type", wanted)).upper()
    if wanted is None or kind != wanted:
        allowed = f"an adapter of peft_type {wanted}" if wanted else "no adapter"
        raise ValueError(f"method {name!r} takes {allowed}, got adapter={dict(given)}")
    return {**given, "peft_type": kind}


def use_mask(optimizer: SparseMeZO, name: str | None) -> None:
    """Give the optimizer the mask of its method; to be called before its first step.

    Raises:
        ValueError: If the configuration asks for a mask that is another method's.
    """
    method = method_of(name)
    if method is None or method.mask is None:
        return
    for group in optimizer.param_groups:
        if group["mask"] not in ("small", method.mask):  # small is the default, so it was perhaps not asked for
            raise ValueError(f"method {name!r} has mask {method.mask!r}, but the optimizer was given {group['mask']!r}")
        group["mask"] = method.mask
    optimizer.defaults["mask"] = method.mask


def say(name: str | None, parameters: Iterable[tuple[str, nn.Parameter]], details: str) -> None:
    """One line of the log: the method, what is learned, what is frozen."""
    learned = frozen = 0
    for _, parameter in parameters:
        if parameter.requires_grad:
            learned += parameter.numel()
        else:
            frozen += parameter.numel()
    summary = METHODS[name].summary if name else "the configured optimizer"
    logger.info(
        "method %s (%s): %s weights are learned, %s are frozen%s",
        *(name or "none", summary, f"{learned:,}", f"{frozen:,}", details),
    )
