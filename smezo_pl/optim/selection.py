"""The masks of a run: thresholds and constant masks of every optimized tensor, and when they were made."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smezo_pl.optim.masks import DENSE, WORD_RANGE, Mask, find_threshold
from smezo_pl.optim.memory import check_tensor
from smezo_pl.optim.noise import Stream
from smezo_pl.optim.parameters import OptimizedTensor, some

logger = logging.getLogger(__name__)


class MaskStat(NamedTuple):
    """How one tensor is masked.

    Attributes:
        name: Name of the parameter.
        numel: Its number of weights.
        selected: How many of them are active.
        threshold: Magnitude ``h`` of its mask; None where all weights or a random choice are active.
    """

    name: str
    numel: int
    selected: int
    threshold: float | None


class Selection:
    """The masks of a run: thresholds, which are kept in the parameter groups, and the bits of constant masks.

    Attributes:
        bits: Packed constant masks, by number of the tensor.
        refreshed: Whether masks were made since the last step.
    """

    def __init__(self) -> None:
        self.bits: dict[int, Tensor] = {}
        self.refreshed = False

    @torch.no_grad()
    def make(self, tensors: Sequence[OptimizedTensor], groups: Sequence[dict[str, Any]], step: int) -> None:
        """Compute thresholds, and constant masks, of some groups from the current weights."""
        uneven, single = [], []
        for tensor in tensors:
            group = tensor.group
            if not any(group is wanted for wanted in groups):
                continue
            check_tensor(tensor.name, tensor.parameter)
            group["thresholds"][tensor.position] = None
            self.bits.pop(tensor.number, None)
            if group["mask"] not in ("small", "large") or group["sparsity"] == 0.0 or tensor.dense:
                continue
            kernel, numel, active = tensor.kernel, tensor.parameter.numel(), 1.0 - group["sparsity"]
            wanted = max(1, round(active * numel))
            large = group["mask"] == "large"
            found = find_threshold(tensor.flat, numel - wanted if large else wanted, kernel.histogram, leave_one=large)
            if found.magnitudes < 2:
                single.append(tensor.name)
                continue
            group["thresholds"][tensor.position] = found.value
            density = (numel - found.at_most if large else found.at_most) / numel
            if abs(density - active) > max(0.01, 1 / numel):
                uneven.append(f"{tensor.name} {density:.3g}")
            if group["mask_update"] == "constant":
                self.bits[tensor.number] = kernel.pack(tensor.flat, Mask(group["mask"], threshold=found.value))
        for group in groups:
            group["ready"], group["mask_step"] = True, step
            self.refreshed = True
        if uneven:
            logger.info("masks: ties keep %d tensors from the density asked for: %s", len(uneven), some(uneven))
        if single:
            logger.info(
                "masks: %d tensors have a single magnitude and are dense until a refresh: %s", len(single), some(single)
            )

    def mask(self, tensor: OptimizedTensor, seed: int, step: int) -> Mask:
        """The mask of a tensor at a step, to be evaluated on its unperturbed weights.

        Raises:
            RuntimeError: If a constant mask was not saved with the state that was loaded.
        """
        group = tensor.group
        if group["mask"] == "random" and group["sparsity"] > 0.0 and not tensor.dense:
            drawn = step if group["mask_update"] == "dynamic" else group["mask_step"]
            level = max(1, round((1.0 - group["sparsity"]) * WORD_RANGE))
            return Mask("random", stream=Stream(seed, drawn, 0, tensor.number), level=level)
        threshold = tensor.threshold
        if threshold is None:
            return DENSE
        if group["mask_update"] == "dynamic":
            return Mask(group["mask"], threshold=threshold)
        if tensor.number not in self.bits:
            raise RuntimeError(
                f"the constant mask of {tensor.name!r} is missing: the loaded state holds no masks; call adopt_masks "
                "or refresh_masks"
            )
        return Mask("packed", bits=self.bits[tensor.number])

    def load_bits(self, tensors: Iterable[OptimizedTensor], bits: dict[int, Tensor]) -> None:
        """Take packed masks over, on the devices of the parameters."""
        devices = {tensor.number: tensor.parameter.device for tensor in tensors}
        self.bits = {number: packed.to(devices[number]) for number, packed in bits.items()}

    @torch.no_grad()
    def packed(self, tensors: Iterable[OptimizedTensor], seed: int, step: int) -> dict[str, Tensor]:
        """Masks as one bit per weight, by name."""
        return {tensor.name: tensor.kernel.pack(tensor.flat, self.mask(tensor, seed, step)) for tensor in tensors}
