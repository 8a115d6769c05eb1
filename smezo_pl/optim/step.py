"""One step: its record, its perturbations and its update, handed to the kernels tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from smezo_pl.optim.kernels import Kernel, Update
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Distribution, Stream
from smezo_pl.optim.parameters import OptimizedTensor, float32
from smezo_pl.optim.selection import Selection


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record of one step: with the base seed it is all that is needed to make the step again.

    Attributes:
        step: Index of the step, counted from 0; the noise of the step is drawn with it.
        losses: ``(l+, l-)`` of each sample; empty where they were not kept, as in an exported run.
        projected_gradients: ``(l+ - l-) / (2 eps)`` of each sample, rounded to float32, with the ``eps`` of the first
            parameter group. Empty when the step was skipped.
        lr: Learning rate of each parameter group.
        weight_decay: Weight decay of each parameter group.
        eps: Perturbation scale of each parameter group.
        sparsity: Sparsity of each parameter group.
        skipped: Whether a loss was not finite, so that no weight was changed.
        refreshed: Whether masks were refreshed since the step before.
        thresholds: The thresholds of that refresh as a trajectory stores them; empty where they are not kept.
        forward_seconds: Wall-clock seconds in the closure, without the writing of perturbed copies on a CPU. On an
            accelerator launches return early and the time of the perturbations inside a layer counts here.
        total_seconds: Wall-clock seconds of the whole step. Neither of the two is compared or stored.
    """

    step: int
    losses: tuple[tuple[float, float], ...]
    projected_gradients: tuple[float, ...]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    eps: tuple[float, ...]
    sparsity: tuple[float, ...]
    skipped: bool = False
    refreshed: bool = False
    thresholds: bytes = b""
    forward_seconds: float = field(default=0.0, compare=False)
    total_seconds: float = field(default=0.0, compare=False)

    @property
    def loss(self) -> float:
        """Mean of ``l+`` and ``l-`` over the samples."""
        return sum(plus + minus for plus, minus in self.losses) / (2 * len(self.losses))


def check_record(record: StepRecord, step: int, groups: int, samples: int) -> None:
    """Refuse a record that does not fit an optimizer at step ``step``, of so many groups and samples per step.

    Raises:
        ValueError: If it is not the next one, or numbers are missing.
    """
    if record.step != step:
        raise ValueError(f"step {record.step} cannot be made now: the next step is {step}")
    if not len(record.lr) == len(record.weight_decay) == groups:
        raise ValueError(f"lr and weight_decay need one number for each of the {groups} groups")
    if not record.skipped and len(record.projected_gradients) != samples:
        raise ValueError(
            f"step {record.step} has {len(record.projected_gradients)} projected gradients, expected {samples}"
        )


class StepPerturbation:
    """Perturbs and updates the weights of one step along its noise, under its masks.

    Args:
        tensors: The parameters that are optimized.
        selection: Their masks.
        noise: Distribution of the noise.
        seed: Base seed.
        step: Index of the step.
    """

    def __init__(
        self, tensors: Sequence[OptimizedTensor], selection: Selection, noise: Distribution, seed: int, step: int
    ) -> None:
        self.tensors, self.noise = tensors, noise
        self._selection, self._seed, self._step = selection, seed, step
        self._by_id = {id(tensor.parameter): tensor for tensor in tensors}
        self._masks: dict[int, Mask] = {}

    def tensor(self, parameter: nn.Parameter) -> OptimizedTensor:
        """The entry of a parameter."""
        return self._by_id[id(parameter)]

    def mask(self, parameter: nn.Parameter) -> Mask:
        """The mask of a parameter at this step."""
        mask = self._masks.get(id(parameter))
        if mask is None:
            mask = self._selection.mask(self.tensor(parameter), self._seed, self._step)
            self._masks[id(parameter)] = mask
        return mask

    def stream(self, tensor: OptimizedTensor, sample: int) -> Stream:
        """Where the noise of a tensor comes from."""
        return Stream(self._seed, self._step, sample, tensor.number)

    def update(self, record: StepRecord, groups: Sequence[dict[str, Any]]) -> None:
        """Subtract ``lr * (g * m * z + decay * m * theta)`` from the weights, averaged over the samples.

        Args:
            record: The step.
            groups: The parameter groups.
        """
        coefficients = {id(g): each for g, each in zip(groups, _coefficients(groups, record), strict=True)}
        updates: dict[Kernel, list[Update]] = {}
        for tensor in self.tensors:
            scales, decay = coefficients[id(tensor.group)]
            parameter = tensor.parameter
            if not tensor.double:
                scales, decay = [float32(scale) for scale in scales], float32(decay)
            if not any(scales) and not decay:
                continue  # nothing to add: adding a zero could still turn the sign of a zero
            streams = [self.stream(tensor, sample) for sample in range(len(scales))]
            rounding = streams[0] if parameter.element_size() == 2 else None
            update = Update(tensor.flat, self.mask(parameter), streams, scales, decay, rounding)
            updates.setdefault(tensor.kernel, []).append(update)
        for kernel, of_kernel in updates.items():
            kernel.update_all(of_kernel, self.noise)


def _coefficients(groups: Sequence[dict[str, Any]], record: StepRecord) -> list[tuple[list[float], float]]:
    """For each group the factor of each sample's noise, and the decay, in float64."""
    first_eps, gradients = groups[0]["eps"], record.projected_gradients
    coefficients = []
    for group, rate, decay in zip(groups, record.lr, record.weight_decay, strict=True):
        sign = -1.0 if group["maximize"] else 1.0
        scales = [sign * rate * g / len(gradients) * (first_eps / group["eps"]) for g in gradients]
        coefficients.append((scales, rate * decay))
    return coefficients


class Direction:
    """One of the two opposite perturbations of a sample: what a forward is to see.

    Args:
        step: The step.
        sample: Number of the sample.
        sign: 1 or -1.
    """

    def __init__(self, step: StepPerturbation, sample: int, sign: float) -> None:
        self._step, self._sample, self._sign = step, sample, sign

    def whole(self, parameter: nn.Parameter, out: Tensor) -> None:
        """Put a parameter's perturbed weights into ``out``, which has its shape."""
        self._perturb(parameter, out, self._step.mask(parameter))

    def in_place(self, parameter: nn.Parameter, mask: Mask) -> None:
        """Perturb the parameter itself under a packed mask of its unperturbed weights."""
        self._perturb(parameter, parameter.detach(), mask)

    def rows(self, parameter: nn.Parameter, rows: Tensor, out: Tensor) -> None:
        """Put the perturbed rows of these numbers into ``out``."""
        tensor, step = self._step.tensor(parameter), self._step
        stream, scale = step.stream(tensor, self._sample), self._scale(tensor)
        tensor.kernel.perturb_rows(parameter.detach(), out, rows, step.mask(parameter), step.noise, stream, scale)

    def _perturb(self, parameter: nn.Parameter, out: Tensor, mask: Mask) -> None:
        tensor, step = self._step.tensor(parameter), self._step
        stream, scale = step.stream(tensor, self._sample), self._scale(tensor)
        tensor.kernel.perturb(tensor.flat, out.view(-1), mask, step.noise, stream, scale)

    def _scale(self, tensor: OptimizedTensor) -> float:
        """``sign * eps``, in the precision that the noise is added in."""
        value = self._sign * float(tensor.group["eps"])
        return value if tensor.double else float32(value)
