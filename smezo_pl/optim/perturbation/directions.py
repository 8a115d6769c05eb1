"""The perturbations and the update of one step, handed to the kernels tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smezo_pl.optim.kernels import Kernel, Update
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Law, Stream
from smezo_pl.optim.parameters import float32
from smezo_pl.optim.selection import Member, Selection


class StepMoves:
    """Moves the weights of one step along its noise, under its masks.

    Args:
        members: The parameters that take part.
        selection: Gives their masks.
        kernel: Gives the kernel for a tensor.
        law: Distribution of the noise.
        seed: Base seed.
        step: Index of the step.
    """

    def __init__(
        self,
        members: Sequence[Member],
        selection: Selection,
        kernel: Callable[[Tensor], Kernel],
        law: Law,
        seed: int,
        step: int,
    ) -> None:
        self.members, self.law, self.seed, self.step = members, law, seed, step
        self._selection, self._kernel = selection, kernel
        self._by_id = {id(member.parameter): member for member in members}
        self._masks: dict[int, Mask] = {}

    def mask(self, parameter: nn.Parameter) -> Mask:
        """The mask of a parameter at this step."""
        mask = self._masks.get(id(parameter))
        if mask is None:
            mask = self._selection.mask(self._by_id[id(parameter)], self.seed, self.step)
            self._masks[id(parameter)] = mask
        return mask

    def side(self, sample: int, sign: float) -> Side:
        """Perturbations of a sample to one side.

        Args:
            sample: Number of the sample.
            sign: 1 or -1.
        """
        return Side(self, sample, sign)

    def update(self, scaled: Sequence[tuple[list[float], float]], groups: Sequence[dict[str, Any]]) -> None:
        """Subtract ``m * (scale * z + decay * theta)`` from the weights, summed over the samples' scales.

        Args:
            scaled: For each group the factor of each sample's noise, and the decay.
            groups: The parameter groups.
        """
        coefficients = {id(group): each for group, each in zip(groups, scaled, strict=True)}
        updates: dict[Kernel, list[Update]] = {}
        for member in self.members:
            scales, decay = coefficients[id(member.group)]
            parameter = member.parameter
            if parameter.dtype != torch.float64:
                scales, decay = [float32(scale) for scale in scales], float32(decay)
            if not any(scales) and not decay:
                continue  # nothing to add: adding a zero could still turn the sign of a zero
            streams = [Stream(self.seed, self.step, sample, member.number) for sample in range(len(scales))]
            rounding = Stream(self.seed, self.step, 0, member.number) if parameter.element_size() == 2 else None
            listed = updates.setdefault(self._kernel(parameter), [])
            listed.append(Update(member.flat, self.mask(parameter), streams, scales, decay, rounding))
        for kernel, listed in updates.items():
            kernel.update_all(listed, self.law)

    def perturb(self, parameter: nn.Parameter, out: Tensor, mask: Mask | None, sample: int, scale: float) -> None:
        """Put ``theta + scale * m * z`` into ``out``; ``mask`` stands for the parameter's own where it is given."""
        stream = Stream(self.seed, self.step, sample, self._by_id[id(parameter)].number)
        chosen = self.mask(parameter) if mask is None else mask
        flat = parameter.detach().view(-1)
        self._kernel(parameter).perturb(flat, out.view(-1), chosen, self.law, stream, scale)

    def perturb_rows(self, parameter: nn.Parameter, rows: Tensor, out: Tensor, sample: int, scale: float) -> None:
        """Put some rows of ``theta + scale * m * z`` into ``out``."""
        stream = Stream(self.seed, self.step, sample, self._by_id[id(parameter)].number)
        kernel = self._kernel(parameter)
        kernel.perturb_rows(parameter.detach(), out, rows, self.mask(parameter), self.law, stream, scale)

    def scale(self, parameter: nn.Parameter, sign: float) -> float:
        """``sign * eps`` of a parameter, in the precision that its noise is added in."""
        value = sign * float(self._by_id[id(parameter)].group["eps"])
        return value if parameter.dtype == torch.float64 else float32(value)


class Side:
    """One side of a sample's perturbation: what a forward is to see (see `layerwise.Write`)."""

    def __init__(self, moves: StepMoves, sample: int, sign: float) -> None:
        self._moves, self._sample, self._sign = moves, sample, sign

    def whole(self, parameter: nn.Parameter, out: Tensor) -> None:
        """Put a parameter's perturbed weights into ``out``."""
        moves = self._moves
        moves.perturb(parameter, out, None, self._sample, moves.scale(parameter, self._sign))

    def rows(self, parameter: nn.Parameter, rows: Tensor, out: Tensor) -> None:
        """Put some rows of a parameter's perturbed weights into ``out``."""
        moves = self._moves
        moves.perturb_rows(parameter, rows, out, self._sample, moves.scale(parameter, self._sign))

    def in_place(self, parameter: nn.Parameter, mask: Mask) -> None:
        """Perturb the parameter itself under a packed mask of its unperturbed weights."""
        moves = self._moves
        moves.perturb(parameter, parameter.detach(), mask, self._sample, moves.scale(parameter, self._sign))
