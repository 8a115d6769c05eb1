"""How much of a model its masks select, and how much of that changes, from packed bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smezo_pl.optim import SparseMeZO

SAMPLE = 1 << 26
"""Most weights whose masks are kept to be compared later: 8 MiB of bits."""


def sampled_names(optimizer: SparseMeZO, limit: int = SAMPLE) -> list[str]:
    """Names of tensors that together hold at most about ``limit`` weights, spread evenly over the model."""
    sizes = _sizes(optimizer)
    share = min(1.0, limit / max(1, sum(sizes.values())))
    names: list[str] = []
    owed = 0.0
    for name, size in sizes.items():
        owed += size * share
        if size <= owed:
            names.append(name)
            owed -= size
    return names or [min(sizes, key=lambda name: sizes[name])]


def selected(bits: Tensor) -> int:
    """Number of set bits of a packed mask."""
    counts = torch.bincount(bits.flatten(), minlength=256)
    ones = torch.tensor([value.bit_count() for value in range(256)], device=bits.device)
    return int((counts * ones).sum())


def churn(before: Mapping[str, Tensor], after: Mapping[str, Tensor], optimizer: SparseMeZO) -> float:
    """Share of the weights that one mask selects and the other does not, over the tensors of ``before``."""
    sizes = _sizes(optimizer)
    changed = sum(selected(before[name] ^ after[name]) for name in before)
    return changed / sum(sizes[name] for name in before)


def density(masks: Mapping[str, Tensor], optimizer: SparseMeZO) -> float:
    """Share of the weights that the masks select."""
    sizes = _sizes(optimizer)
    return sum(selected(bits) for bits in masks.values()) / sum(sizes[name] for name in masks)


def _sizes(optimizer: SparseMeZO) -> dict[str, int]:
    return {
        name: parameter.numel()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
