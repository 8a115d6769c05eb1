"""One step: its record, its perturbations and its update, handed to the kernels tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smezo_pl.optim.directions import SHARED, Directions, Factors, both, matrix_shape
from smezo_pl.optim.kernels import Draw, Factored, FactoredUpdate, Kernel, Update
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import BLOCK, Distribution, Stream
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


_LATER = ("no_signal", "mean_square")


@dataclass(slots=True)
class Progress:
    """What the steps of a run leave behind, beside the weights.

    Attributes:
        steps_done: Steps done, skipped ones included.
        skipped: Steps skipped.
        skipped_in_row: Those of them since the last other one.
        no_signal: Steps in which no direction was followed, as the losses on both sides of each were equal.
        mean_square: As in `StepRecord`.
    """

    steps_done: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    no_signal: int = 0
    mean_square: float = 0.0

    @property
    def signals(self) -> int:
        """Steps in which some direction was followed."""
        return self.steps_done - self.skipped - self.no_signal

    def count(self, record: StepRecord) -> None:
        """Count a step."""
        self.steps_done += 1
        self.skipped += record.skipped
        self.skipped_in_row = self.skipped_in_row + 1 if record.skipped else 0
        self.no_signal += not record.skipped and not any(record.projected_gradients)
        self.mean_square = record.mean_square

    def check(self, max_skipped: int, losses: Sequence[tuple[float, float]]) -> None:
        """Raise if too many steps in a row were skipped; ``losses`` are the pairs of the last."""
        if self.skipped_in_row >= max_skipped:
            pair = next((pair for pair in losses if not all(map(math.isfinite, pair))), losses[-1])
            what = f"the loss was not finite in {self.skipped_in_row} steps in a row (last pair {pair})"
            raise NonFiniteLossError(f"{what}; the weights are those before them. {NON_FINITE_ADVICE}")

    def state(self) -> dict[str, Any]:
        """The numbers by their names; those that an earlier version did not have where they are not 0."""
        return {name: value for name, value in asdict(self).items() if value or name not in _LATER}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`, in which there may be more."""
        for name in asdict(self):
            setattr(self, name, state.get(name, 0) if name in _LATER else state[name])


def rates_of(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a record has for each parameter group."""
    names = ("lr", "weight_decay", "eps", "sparsity")
    return {name: tuple(float(group[name]) for group in groups) for name in names}


def check_record(record: StepRecord, step: int, groups: int, samples: int, per_row: bool) -> None:
    """Refuse a record that does not fit an optimizer at step ``step``, of so many groups and samples per step."""
    if record.step != step:
        raise ValueError(f"step {record.step} cannot be made now: the next step is {step}")
    if not len(record.lr) == len(record.weight_decay) == groups:
        raise ValueError(f"lr and weight_decay need one number for each of the {groups} groups")
    if record.rows != 1 and not per_row:
        raise ValueError(
            f"step {record.step} has a direction for each of {record.rows} rows, the optimizer one for all"
        )
    if not record.skipped and len(record.projected_gradients) != samples * record.rows:
        raise ValueError(
            f"step {record.step} has {len(record.projected_gradients)} projected gradients, expected "
            f"{samples * record.rows}"
        )


FACTOR_BYTES = 1 << 20
"""About as much memory as the factors of several tensors take at a time, in an update and in a forward."""


@dataclass(frozen=True, slots=True)
class TensorPasses:
    """What the passes over one tensor take in one step.

    Attributes:
        tensor: The tensor.
        kernel: What makes them.
        mask: Which weights are active.
        streams: Streams of scheme 1, one for each sample.
        factors: Of each sample; empty for full noise that all rows share.
        rows_apart: Whether each row of the batch has its own direction.
        rank: The rank of the directions; None for full noise.
    """

    tensor: OptimizedTensor
    kernel: Kernel
    mask: Mask
    streams: list[Stream]
    factors: list[Factors]
    rows_apart: bool
    rank: int | None

    @property
    def norm(self) -> float:
        """What makes the elements of a direction have variance 1."""
        return 1.0 / math.sqrt(self.factors[0].count)

    def update(self, scales: Sequence[float], decay: float) -> Update:
        """The update by full noise."""
        return Update(self.tensor.flat, self.mask, self.streams, scales, decay, self.streams[0])

    def factored_updates(self, scales: Sequence[float], decay: float) -> Iterator[tuple[list[Draw], FactoredUpdate]]:
        """The update by sums of outer products, in parts whose factors take about `FACTOR_BYTES`.

        Args:
            scales: One for each sample and row.
            decay: Learning rate times weight decay.

        Returns:
            Of each part what is drawn before it.
        """
        theta, one = self.tensor.flat, self.factors[0]
        n, m = matrix_shape(one.shape)
        norm = self.norm
        scales = [scale * norm for scale in scales for _ in range(one.count)]
        vectors = len(scales) // len(self.factors)

        def drawn(side: Literal["left", "right"], numel: int, first: int = 0) -> tuple[Tensor, list[Draw]]:
            out = torch.empty(len(scales), numel, dtype=torch.bfloat16, device=theta.device)
            parts = torch.split(out, vectors)
            return out, [f.draw(side, part, first) for f, part in zip(self.factors, parts, strict=True)]

        length, width = (n, m) if one.is_matrix else (m, 1)
        other, before = torch.ones(len(scales), 1, dtype=torch.bfloat16, device=theta.device), list[Draw]()
        if one.is_matrix:
            other, before = drawn("right", m)
        step = max(BLOCK, FACTOR_BYTES // (2 * len(scales)) // BLOCK * BLOCK)
        for first in range(0, length, step):
            part = min(step, length - first)
            along, draws = drawn("left" if one.is_matrix else "right", part, first)
            factors = (along, other) if one.is_matrix else (other, along)
            start, numel = first * width, part * width
            noise = None if self.rank is not None else self.streams[0].part(start)
            yield (
                before + draws,
                FactoredUpdate(
                    theta[start : start + numel],
                    self.mask.part(start, numel),
                    Factored(*factors, scales, noise),
                    decay,
                    self.streams[0].part(start),
                ),
            )
            before = []


class StepPerturbation:
    """Perturbs and updates the weights of one step along its directions, under its masks.

    Args:
        tensors: The parameters that are optimized.
        selection: Their masks.
        noise: Distribution of the noise.
        seed: Base seed.
        step: Index of the step.
        samples: Number of samples.
        directions: Which directions the weights have.
        shared: Tensors that have one direction for the batch in any case, as in `StepRecord`.

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
        directions: Directions = SHARED,
        shared: int = 0,
    ) -> None:
        self.noise, self.directions, rank = noise, directions, directions.rank
        self.drawn: Distribution = noise if rank is not None else "rademacher"
        self.passes: dict[int, TensorPasses] = {}
        for tensor in tensors:
            streams = [Stream(seed, step, sample, tensor.number) for sample in range(samples)]
            mask, kernel = selection.mask(tensor, seed, step), tensor.kernel
            rows_apart = directions.per_row and not shared >> tensor.number & 1
            drawn, shape = self.drawn, tensor.parameter.shape
            wanted = streams if rows_apart or rank is not None else []
            factors = [Factors(kernel, stream, shape, rank or 1, drawn) for stream in wanted]
            self.passes[id(tensor.parameter)] = TensorPasses(tensor, kernel, mask, streams, factors, rows_apart, rank)

    def update(self, record: StepRecord, groups: Sequence[dict[str, Any]]) -> None:
        """Subtract ``lr * (c * Z + decay * m * theta)`` from the weights, averaged over samples and rows.

        Args:
            record: The step.
            groups: The parameter groups.
        """
        first_eps, rows, apart = groups[0]["eps"], record.rows, record.projected_gradients
        means = apart  # over the rows of each sample
        if rows > 1:
            means = tuple(math.fsum(apart[i : i + rows]) / rows for i in range(0, len(apart), rows))
        exact, rounded = {}, {}  # by group and whether rows are apart
        for group, lr, weight_decay in zip(groups, record.lr, record.weight_decay, strict=True):
            rate, ratio = -lr if group["maximize"] else lr, first_eps / group["eps"]
            decay = lr * weight_decay
            for rows_apart, numbers in ((False, means), (True, apart)):
                scales = [rate * c / len(numbers) * ratio for c in numbers]
                exact[id(group), rows_apart] = scales, decay
                rounded[id(group), rows_apart] = [float32(scale) for scale in scales], float32(decay)
        updates: dict[Kernel, list[Update]] = {}
        factored: dict[Kernel, list[tuple[list[Draw], FactoredUpdate]]] = {}
        held = 0
        for passes in self.passes.values():
            if record.unread >> passes.tensor.number & 1 or not passes.tensor.parameter.numel():
                continue
            is_exact = passes.tensor.parameter.dtype == torch.float64 or passes.factors  # whose kernels round
            scales, decay = (exact if is_exact else rounded)[id(passes.tensor.group), passes.rows_apart]
            if not passes.factors:
                updates.setdefault(passes.kernel, []).append(passes.update(scales, decay))
                continue
            for draws, update in passes.factored_updates(scales, decay):
                factored.setdefault(passes.kernel, []).append((draws, update))
                held += sum(draw.out.nbytes for draw in draws)
                if held >= FACTOR_BYTES:
                    self._update_factored(factored)
                    held = 0
        self._update_factored(factored)
        for kernel, of_kernel in updates.items():
            kernel.update_all(of_kernel, self.noise)
        # The kernels write past torch, which counts the writes to a tensor.
        torch.autograd.graph.increment_version([passes.tensor.parameter for passes in self.passes.values()])

    def _update_factored(self, updates: dict[Kernel, list[tuple[list[Draw], FactoredUpdate]]]) -> None:
        for kernel, of_kernel in updates.items():
            kernel.draw_rows([draw for draws, _ in of_kernel for draw in draws], self.drawn)
            kernel.update_all_factored([update for _, update in of_kernel], self.noise)
        updates.clear()


class Direction:
    """One of the two opposite perturbations of a sample: what a forward is to see.

    Args:
        step: The step.
        sample: Number of the sample.
        sign: 1 or -1.
    """

    def __init__(self, step: StepPerturbation, sample: int, sign: float) -> None:
        self._step, self._sample, self._sign = step, sample, sign

    def rows_apart(self, parameter: nn.Parameter) -> bool:
        """Whether each row of the batch has its own direction of a parameter."""
        return self._step.passes[id(parameter)].rows_apart

    def is_outside(self, parameter: nn.Parameter) -> bool:
        """Whether layers add the direction of a parameter to what they make of it, in place of a perturbed copy."""
        passes = self._step.passes[id(parameter)]
        return passes.rows_apart or (bool(passes.factors) and parameter.dim() <= 2)

    @property
    def rank(self) -> int | None:
        """The rank of the directions; None where rows flip the signs of full noise."""
        return self._step.directions.rank

    def factors(
        self, parameters: Sequence[nn.Parameter], rows: Sequence[int]
    ) -> list[tuple[Tensor | None, Tensor, float]]:
        """The factors of the directions of some rows of the global batch; the signs, where these flip the noise.

        Row ``r`` sees ``theta + scale * sum over j of left[r, j] right[r, j]^T``, with sign flips this times `draw`.
        Directions that all rows share are those of row 0.

        Args:
            parameters: Parameters on one device, drawn at once; all have a direction for each row, or none.
            rows: Numbers of the rows.

        Returns:
            Of each parameter ``left``, bfloat16 ``[len(rows), k, n]``, or None for what is no matrix; ``right``,
            ``[len(rows), k, m]``, with ``k = 1`` for what is no matrix; and ``scale``.
        """
        listed = [self._step.passes[id(parameter)] for parameter in parameters]
        rows = rows if listed[0].rows_apart else [0] * len(rows)
        drawn = both([passes.factors[self._sample] for passes in listed], rows, parameters[0].device)
        return [(*factors, self._scale(passes) * passes.norm) for factors, passes in zip(drawn, listed, strict=True)]

    def factor_bytes(self, parameter: nn.Parameter) -> int:
        """Bytes of the factors of one row."""
        factors = self._step.passes[id(parameter)].factors[self._sample]
        return 2 * factors.count * factors.widths()[1]

    def draw(self, parameter: nn.Parameter, out: Tensor) -> None:
        """Put the noise whose signs the rows flip, under its mask, into ``out``, which is flat: ``m * z``."""
        passes = self._step.passes[id(parameter)]
        passes.kernel.draw(passes.tensor.flat, out, passes.mask, self._step.noise, passes.streams[0], 1.0)

    def perturb(self, parameter: nn.Parameter, out: Tensor, mask: Mask | None = None) -> None:
        """Put a parameter's perturbed weights into ``out``, which is flat; ``mask`` replaces that of the step."""
        passes, mask = self._shared(parameter, mask)
        theta = passes.tensor.flat
        if passes.factors:
            passes.kernel.perturb_factored(theta, out, self._factored(passes))
        else:
            stream = passes.streams[self._sample]
            passes.kernel.perturb(theta, out, mask, self._step.noise, stream, self._scale(passes))

    def perturb_rows(self, parameter: nn.Parameter, rows: Tensor, out: Tensor) -> None:
        """Put the perturbed rows of these numbers into ``out``."""
        passes, mask = self._shared(parameter, None)
        if passes.factors:
            factored, chosen = self._factored(passes), parameter.detach()[rows].view(-1)
            factored = factored._replace(left=factored.left[:, rows].contiguous())
            passes.kernel.perturb_factored(chosen, out.view(-1), factored)
        else:
            stream, scale = passes.streams[self._sample], self._scale(passes)
            passes.kernel.perturb_rows(parameter.detach(), out, rows, mask, self._step.noise, stream, scale)

    def _shared(self, parameter: nn.Parameter, mask: Mask | None) -> tuple[TensorPasses, Mask]:
        passes = self._step.passes[id(parameter)]
        if passes.rows_apart:
            raise RuntimeError(
                f"parameter {passes.tensor.name!r} is read where its rows cannot be told, and has a direction for each "
                "row of the batch: leave it out with exclude, or use directions='shared'"
            )
        return passes, passes.mask if mask is None else mask

    def _factored(self, passes: TensorPasses) -> Factored:
        ((left, right, scale),) = self.factors([passes.tensor.parameter], [0])
        right = right[0].contiguous()
        left = torch.ones_like(right[:, :1]) if left is None else left[0].contiguous()
        return Factored(left, right, [-scale] * len(right))

    def _scale(self, passes: TensorPasses) -> float:
        return self._sign * float(passes.tensor.group["eps"])
