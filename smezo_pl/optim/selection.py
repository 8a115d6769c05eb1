"""The masks of a run: thresholds and constant masks of every tensor that takes part, and when they were made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smezo_pl.optim.kernels import Kernel
from smezo_pl.optim.masks import DENSE, WORD_RANGE, Mask, find_threshold
from smezo_pl.optim.noise import Stream
from smezo_pl.optim.parameters import check_tensor, some

logger = logging.getLogger(__name__)


class MaskStat(NamedTuple):
    """How one tensor is masked today.

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


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter that takes part.

    Attributes:
        name: Its name.
        parameter: The parameter.
        number: Its number among all parameters given, which addresses its noise.
        position: Its position in its group.
        dense: Whether all of its weights are active whatever the rule.
        group: Its parameter group; thresholds are kept there, as plain numbers.
    """

    name: str
    parameter: nn.Parameter
    number: int
    position: int
    dense: bool
    group: dict[str, Any]

    @property
    def flat(self) -> Tensor:
        """The weights as one dimension, without a graph."""
        return self.parameter.detach().view(-1)

    @property
    def threshold(self) -> float | None:
        """Threshold of its mask, None where it has none."""
        value = self.group["thresholds"][self.position]
        return None if value is None else float(value)


class Selection:
    """Makes, keeps and hands out the masks of an optimizer's parameters.

    Args:
        members: Gives the parameters that take part.
        kernel: Gives the kernel for a tensor.
        groups: Gives the optimizer's parameter groups.
    """

    def __init__(
        self,
        members: Callable[[], Sequence[Member]],
        kernel: Callable[[Tensor], Kernel],
        groups: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self._members, self._kernel, self._groups = members, kernel, groups
        self.bits: dict[int, Tensor] = {}

    def prepare(self, step: int) -> bool:
        """Make the masks of the groups that have none yet; whether there were such groups."""
        waiting = [group for group in self._groups() if not group["ready"]]
        if waiting:
            self.make(waiting, step)
        return bool(waiting)

    @torch.no_grad()
    def make(self, groups: Sequence[dict[str, Any]], step: int) -> None:
        """Compute thresholds, and constant masks, of some groups from today's weights."""
        uneven, single = [], []
        for member in self._members():
            group = member.group
            if not any(group is wanted for wanted in groups):
                continue
            check_tensor(member.name, member.parameter)
            group["thresholds"][member.position] = None
            self.bits.pop(member.number, None)
            if group["mask"] not in ("small", "large") or group["sparsity"] == 0.0 or member.dense:
                continue
            kernel, numel, active = self._kernel(member.parameter), member.parameter.numel(), 1.0 - group["sparsity"]
            wanted = max(1, round(active * numel))
            large = group["mask"] == "large"
            found = find_threshold(member.flat, numel - wanted if large else wanted, kernel.histogram, leave_one=large)
            if found.magnitudes < 2:
                single.append(member.name)
                continue
            group["thresholds"][member.position] = found.value
            got = (numel - found.at_most if large else found.at_most) / numel
            if abs(got - active) > max(0.01, 1 / numel):
                uneven.append(f"{member.name} {got:.3g}")
            if group["mask_update"] == "constant":
                self.bits[member.number] = kernel.pack(member.flat, Mask(group["mask"], threshold=found.value))
        for group in groups:
            group["ready"], group["mask_step"] = True, step
        if uneven:
            logger.info("masks: ties keep %d tensors from the density asked for: %s", len(uneven), some(uneven))
        if single:
            logger.info(
                "masks: %d tensors have a single magnitude and take part whole until a refresh: %s",
                len(single),
                some(single),
            )

    def mask(self, member: Member, seed: int, step: int) -> Mask:
        """The mask of a tensor at a step, to be evaluated on its unperturbed weights.

        Raises:
            RuntimeError: If a constant mask was not saved with the state that was loaded.
        """
        group = member.group
        if group["mask"] == "random" and group["sparsity"] > 0.0 and not member.dense:
            drawn = step if group["mask_update"] == "dynamic" else group["mask_step"]
            level = max(1, round((1.0 - group["sparsity"]) * WORD_RANGE))
            return Mask("random", stream=Stream(seed, drawn, 0, member.number), level=level)
        threshold = member.threshold
        if threshold is None:
            return DENSE
        if group["mask_update"] == "dynamic":
            return Mask(group["mask"], threshold=threshold)
        if member.number not in self.bits:
            raise RuntimeError(
                f"the constant mask of {member.name!r} is missing: the loaded state holds no masks; call adopt_masks "
                "or refresh_masks"
            )
        return Mask("packed", bits=self.bits[member.number])

    def load_bits(self, bits: dict[int, Tensor]) -> None:
        """Take packed masks over, on the devices of the parameters."""
        devices = {member.number: member.parameter.device for member in self._members()}
        self.bits = {number: packed.to(devices[number]) for number, packed in bits.items()}

    def thresholds(self) -> dict[str, float]:
        """Threshold of every tensor, by name; infinity where it has none."""
        return {m.name: inf if m.threshold is None else m.threshold for m in self._members()}

    @torch.no_grad()
    def packed(self, seed: int, step: int, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Masks as one bit a weight, by name."""
        wanted = None if names is None else set(names)
        return {
            member.name: self._kernel(member.parameter).pack(member.flat, self.mask(member, seed, step))
            for member in self._members()
            if wanted is None or member.name in wanted
        }

    def stats(self, seed: int, step: int) -> list[MaskStat]:
        """Size, number of active weights and threshold of every tensor."""
        ones = torch.tensor([bin(byte).count("1") for byte in range(256)])
        packed = self.packed(seed, step)
        counts = {name: torch.bincount(bits.cpu(), minlength=256) for name, bits in packed.items()}
        return [
            MaskStat(m.name, m.parameter.numel(), int((counts[m.name] * ones).sum()), m.threshold)
            for m in self._members()
        ]
