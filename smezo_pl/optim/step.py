"""One step: its record, its perturbations and its update, handed to the kernels tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smezo_pl.optim.kernels import Kernel, Update
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Distribution, Stream
from smezo_pl.optim.parameters import OptimizedTensor, float32
from smezo_pl.optim.selection import Selection

NON_FINITE_ADVICE = "Try a smaller lr, a smaller eps, or bfloat16 in place of float16"


class NonFiniteLossError(RuntimeError):
    """Too many losses in a row were infinite or NaN."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record of one step: with the base seed it is all that is needed to make the step again.

    Attributes:
        step: Index of the step, counted from 0; the noise of the step is drawn with it.
        losses: ``(l+, l-)`` of each sample, and in it of each row that has its own direction; empty where they were
            not kept, as in an exported run.
        projected_gradients: Of each pair of losses what the update multiplied its direction with:
            ``(l+ - l-) / (2 eps)``, rounded to float32, with the ``eps`` of the first parameter group, or what the
            optimizer's ``coefficients`` make of it. Empty when the step was skipped.
        lr: Learning rate of each parameter group.
        weight_decay: Weight decay of each parameter group.
        eps: Perturbation scale of each parameter group.
        sparsity: Sparsity of each parameter group.
        skipped: Whether a loss was not finite, so that no weight was changed.
        refreshed: Whether masks were refreshed since the step before.
        thresholds: The thresholds of that refresh as a trajectory stores them; empty where they are not kept.
        unread: Tensors that were left alone because no forward has read them since the last refresh: bit ``n`` stands
            for the tensor of number ``n``.
        rows: Number of rows of the batch that had a direction each; 1 where all shared one.
        shared: Tensors with one direction for the batch where the others have one per row, as the layers that read them
            do not tell rows apart: bits as in ``unread``.
        mean_square: Moving mean of the squared projected gradients after the step, for ``coefficients="moving"``; else
            0.
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
    unread: int = 0
    rows: int = 1
    shared: int = 0
    mean_square: float = 0.0
    forward_seconds: float = field(default=0.0, compare=False)
    total_seconds: float = field(default=0.0, compare=False)

    @property
    def loss(self) -> float:
        """Mean of ``l+`` and ``l-`` over the samples."""
        return sum(plus + minus for plus, minus in self.losses) / (2 * len(self.losses))

    @property
    def samples(self) -> int:
        """Number of samples; 0 if the step was skipped and its losses were not kept."""
        return len(self.losses or self.projected_gradients) // self.rows


def projected_gradients(losses: Sequence[tuple[float, float]], eps: float) -> tuple[float, ...]:
    """``(l+ - l-) / (2 eps)`` of each sample as float32; none if one of them or of the losses is not finite."""
    gradients = tuple(float32((plus - minus) / (2.0 * eps)) for plus, minus in losses)
    finite = all(map(math.isfinite, (*gradients, *(loss for pair in losses for loss in pair))))
    return gradients if finite else ()


def rates_of(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a record has for each parameter group."""
    names = ("lr", "weight_decay", "eps", "sparsity")
    return {name: tuple(float(group[name]) for group in groups) for name in names}


def check_record(record: StepRecord, step: int, groups: int, samples: int) -> None:
    """Refuse a record that does not fit an optimizer at step ``step``, of so many groups and samples per step."""
    if record.step != step:
        raise ValueError(f"step {record.step} cannot be made now: the next step is {step}")
    if not len(record.lr) == len(record.weight_decay) == groups:
        raise ValueError(f"lr and weight_decay need one number for each of the {groups} groups")
    if not record.skipped and len(record.projected_gradients) != samples * record.rows:
        raise ValueError(
            f"step {record.step} has {len(record.projected_gradients)} projected gradients, expected "
            f"{samples * record.rows}"
        )


class TensorPasses(NamedTuple):
    """What the passes over one tensor take in one step."""

    tensor: OptimizedTensor
    kernel: Kernel
    mask: Mask
    streams: list[Stream]


class StepPerturbation:
    """Perturbs and updates the weights of one step along its noise, under its masks.

    Args:
        tensors: The parameters that are optimized.
        selection: Their masks.
        noise: Distribution of the noise.
        seed: Base seed.
        step: Index of the step.
        samples: Number of samples.

    Attributes:
        passes: Kernel, mask and noise of each parameter, by its id; the same for all passes of the step.
    """

    def __init__(
        self,
        tensors: Sequence[OptimizedTensor],
        selection: Selection,
        noise: Distribution,
        seed: int,
        step: int,
        samples: int,
    ) -> None:
        self.noise = noise
        self.passes: dict[int, TensorPasses] = {}
        for tensor in tensors:
            streams = [Stream(seed, step, sample, tensor.number) for sample in range(samples)]
            mask = selection.mask(tensor, seed, step)
            self.passes[id(tensor.parameter)] = TensorPasses(tensor, tensor.kernel, mask, streams)

    def update(self, record: StepRecord, groups: Sequence[dict[str, Any]]) -> None:
        """Subtract ``lr * (g * m * z + decay * m * theta)`` from the weights, averaged over the samples.

        Args:
            record: The step.
            groups: The parameter groups.
        """
        first_eps, gradients = groups[0]["eps"], record.projected_gradients
        exact, rounded = {}, {}  # by group: for float64 weights, and for all others
        for group, lr, weight_decay in zip(groups, record.lr, record.weight_decay, strict=True):
            rate, ratio = -lr if group["maximize"] else lr, first_eps / group["eps"]
            scales, decay = [rate * g / len(gradients) * ratio for g in gradients], lr * weight_decay
            exact[id(group)] = scales, decay
            rounded[id(group)] = [float32(scale) for scale in scales], float32(decay)
        updates: dict[Kernel, list[Update]] = {}
        for tensor, kernel, mask, streams in self.passes.values():
            if record.unread >> tensor.number & 1:
                continue
            theta = tensor.flat
            scales, decay = (exact if theta.dtype == torch.float64 else rounded)[id(tensor.group)]
            updates.setdefault(kernel, []).append(Update(theta, mask, streams, scales, decay, streams[0]))
        for kernel, of_kernel in updates.items():
            kernel.update_all(of_kernel, self.noise)
        # The kernels write past torch, which counts the writes to a tensor.
        torch.autograd.graph.increment_version([entry.tensor.parameter for entry in self.passes.values()])


class Direction:
    """One of the two opposite perturbations of a sample: what a forward is to see.

    Args:
        step: The step.
        sample: Number of the sample.
        sign: 1 or -1.
    """

    def __init__(self, step: StepPerturbation, sample: int, sign: float) -> None:
        self._step, self._sample, self._sign = step, sample, sign

    def perturb(self, parameter: nn.Parameter, out: Tensor, mask: Mask | None = None) -> None:
        """Put a parameter's perturbed weights into ``out``, which is flat; ``mask`` replaces that of the step."""
        tensor, kernel, own, streams = self._step.passes[id(parameter)]
        scale, mask = self._sign * float(tensor.group["eps"]), own if mask is None else mask
        kernel.perturb(tensor.flat, out, mask, self._step.noise, streams[self._sample], scale)

    def perturb_rows(self, parameter: nn.Parameter, rows: Tensor, out: Tensor) -> None:
        """Put the perturbed rows of these numbers into ``out``."""
        tensor, kernel, mask, streams = self._step.passes[id(parameter)]
        scale = self._sign * float(tensor.group["eps"])
        kernel.perturb_rows(parameter.detach(), out, rows, mask, self._step.noise, streams[self._sample], scale)
