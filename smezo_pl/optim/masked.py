"""The masks of an optimizer, as those who use it see them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from smezo_pl.optim.kernels import KernelName
from smezo_pl.optim.masks import count_ones
from smezo_pl.optim.parameters import OptimizedTensor, check_group, matches
from smezo_pl.optim.participation import Participation
from smezo_pl.optim.selection import MaskStat, Selection
from smezo_pl.optim.step import Progress


class Masked:
    """What `SparseMeZO` offers to see its masks, to make them anew, and to see which tensors take part."""

    param_groups: list[dict[str, Any]]
    seed: int
    kernel: KernelName
    participation: Participation
    _selection: Selection
    _progress: Progress
    _scope: dict[str, tuple[str, ...]]
    _listed: list[OptimizedTensor]

    @property
    def steps_done(self) -> int:
        """Steps done, skipped ones included; the index of the next step."""
        return self._progress.steps_done

    def _tensors(self) -> list[OptimizedTensor]:
        """The parameters with their groups: listed once, and again when a group was added or replaced."""
        owned = [(id(tensor), id(group)) for group in self.param_groups for tensor in group["params"]]
        if owned != [(id(entry.parameter), id(entry.group)) for entry in self._listed]:
            dense, kernel = self._scope["dense"], self.kernel
            self._listed = [
                OptimizedTensor(name, group["params"][index], number, index, matches(name, dense), group, kernel)
                for group in self.param_groups
                for index, (name, number) in enumerate(zip(group["names"], group["numbers"], strict=True))
            ]
        return self._listed

    def prepare_masks(self) -> None:
        """Compute the thresholds that are not there yet. The first step does it; call it to see them before."""
        if waiting := [group for group in self.param_groups if not group["ready"]]:
            self._selection.make(self._tensors(), waiting, self.steps_done)

    def refresh_masks(self, sparsity: float | None = None) -> None:
        """Compute thresholds, and constant masks, again from the current weights.

        Args:
            sparsity: New sparsity of every group, in ``[0, 1)``; None keeps each group's own.

        Raises:
            ValueError: If the sparsity is out of range.
        """
        if sparsity is not None:
            for group in self.param_groups:
                check_group({**group, "sparsity": sparsity})
            for group in self.param_groups:
                group["sparsity"] = sparsity
        self._selection.make(self._tensors(), self.param_groups, self.steps_done)

    def adopt_masks(self, other: Masked) -> None:
        """Take masks, and which tensors take part, from an optimizer of the same parameters, as after a replay.

        Raises:
            ValueError: If it has other parameters.
        """
        if [group["names"] for group in other.param_groups] != [group["names"] for group in self.param_groups]:
            raise ValueError("adopt_masks needs an optimizer of the same parameters in the same groups")
        for own, theirs in zip(self.param_groups, other.param_groups, strict=True):
            own.update(thresholds=list(theirs["thresholds"]), ready=theirs["ready"], mask_step=theirs["mask_step"])
        self._selection.load_bits(self._tensors(), other._selection.bits)
        self.participation.load(other.participation.state())

    def thresholds(self) -> dict[str, float]:
        """Threshold of every optimized tensor, by name; infinity where it has none."""
        self.prepare_masks()
        return {t.name: math.inf if t.threshold is None else t.threshold for t in self._tensors()}

    def packed_masks(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Current masks by parameter name, one bit per weight (see `smezo_pl.optim.masks.Mask`).

        Args:
            names: Parameters to look at; None for all.
        """
        self.prepare_masks()
        wanted = None if names is None else set(names)
        tensors = [tensor for tensor in self._tensors() if wanted is None or tensor.name in wanted]
        return self._selection.packed(tensors, self.seed, self.steps_done)

    def mask_stats(self) -> list[MaskStat]:
        """Size, number of active weights and threshold of every optimized tensor."""
        packed = self.packed_masks()
        return [MaskStat(t.name, t.parameter.numel(), count_ones(packed[t.name]), t.threshold) for t in self._tensors()]

    def unread(self) -> list[str]:
        """Names of the tensors that are left alone now.

        The first step, and the first after each refresh of the masks, finds out which tensors its forwards read. The
        others take no part until a forward reads them. Kernels are seen to read what they get through an operator of
        torch or by its address.
        """
        return [tensor.name for tensor in self.participation.unread_of(self._tensors())]

    def shared(self) -> list[str]:
        """Names of the tensors with one direction for the batch where the others have one for each row.

        The first step finds out of which tensors the layers that read them do not tell rows apart.
        """
        bits = self.participation.shared or 0
        return [tensor.name for tensor in self._tensors() if bits >> tensor.number & 1]
