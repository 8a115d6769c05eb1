"""One Sparse MeZO step written out in the plainest way, to hold the optimizer against."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from smezo_pl.optim.noise import MASK, ROUNDING, Stream, normals, signs, words16
from smezo_pl.optim.perturbation.forward_rows import ForwardRows


def sorted_threshold(theta: Tensor, active: float) -> float | None:
    """Midway between the two neighboring magnitudes whose split is nearest to the active share; None: all weights."""
    values, counts = theta.double().abs().flatten().unique(return_counts=True)
    below = counts.cumsum(0)
    pick = int((below - max(1, round(active * theta.numel()))).abs().argmin())
    return None if pick == len(values) - 1 else float((values[pick] + values[pick + 1]) / 2)


def select(theta: Tensor, mask: str, sparsity: float, threshold: float | None, stream: Stream) -> Tensor:
    if mask == "dense" or sparsity == 0.0 or (threshold is None and mask != "random"):
        return torch.ones_like(theta, dtype=torch.bool)
    if mask == "random":
        words = words16(stream, MASK, theta.numel(), theta.device)
        return (words < max(1, round((1 - sparsity) * 65536))).view(theta.shape)
    inside = theta.double().abs() <= threshold
    return inside if mask == "small" else ~inside


def draw(noise: str, stream: Stream, theta: Tensor) -> Tensor:
    make = normals if noise == "gaussian" else signs
    return make(stream, theta.numel(), theta.device).view(theta.shape)


def stochastic_round(value: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """The neighbor above in magnitude with the probability of the remainder, by float64 arithmetic and 16 bits."""
    toward_zero = torch.empty_like(value, dtype=dtype)
    nearest = value.to(dtype)
    too_big = nearest.double().abs() > value.double().abs()
    integers = nearest.view(torch.int16) - too_big.to(torch.int16)
    toward_zero = integers.view(dtype)
    above = (integers + 1).view(dtype)
    gap = (above.double() - toward_zero.double()).abs()
    share = (value.double() - toward_zero.double()).abs() / gap
    # the kernels add the word to the bits that are cut off: up when share + word / 2**16 reaches 1
    up = share + words.double().view(value.shape) / 65536 >= 1.0
    return torch.where(up, above, toward_zero)


@torch.no_grad()
def reference_step(
    parameters: dict[str, nn.Parameter],
    closure,
    *,
    step: int,
    lr: float,
    eps: float,
    sparsity: float,
    mask: str,
    thresholds: dict[str, float | None],
    seed: int,
    masks: dict[str, Tensor] | None = None,
    num_samples: int = 1,
    weight_decay: float = 0.0,
    noise: str = "gaussian",
) -> tuple[list[tuple[float, float]], list[float]]:
    """Perturbs whole tensors from copies, then updates. Returns losses and projected gradients."""
    start = {name: p.detach().clone() for name, p in parameters.items()}
    numbers = {name: k for k, name in enumerate(parameters)}
    chosen = masks or {
        name: select(theta, mask, sparsity, thresholds[name], Stream(seed, step, 0, numbers[name]))
        for name, theta in start.items()
    }
    losses, gradients = [], []
    for sample in range(num_samples):
        pair = []
        for sign in (1.0, -1.0):
            for name, p in parameters.items():
                work = torch.float64 if p.dtype == torch.float64 else torch.float32
                z = draw(noise, Stream(seed, step, sample, numbers[name]), p).to(work)
                moved = (start[name].to(work) + torch.tensor(sign * eps, dtype=work) * z).to(p.dtype)
                p.copy_(torch.where(chosen[name], moved, start[name]))
            pair.append(float(closure()))
        losses.append((pair[0], pair[1]))
        gradients.append(float(torch.tensor((pair[0] - pair[1]) / (2 * eps), dtype=torch.float32)))
    for name, p in parameters.items():
        work = torch.float64 if p.dtype == torch.float64 else torch.float32
        theta = start[name].to(work)
        delta = torch.zeros_like(theta)
        for sample, g in enumerate(gradients):
            z = draw(noise, Stream(seed, step, sample, numbers[name]), p).to(work)
            term = torch.tensor(lr * g / num_samples, dtype=work) * z
            delta = term if sample == 0 else delta + term
        if weight_decay:
            delta = delta + torch.tensor(lr * weight_decay, dtype=work) * theta
        moved = theta - delta
        if p.element_size() == 2:
            words = words16(Stream(seed, step, 0, numbers[name]), ROUNDING, p.numel(), p.device)
            rounded = stochastic_round(moved, p.dtype, words)
        else:
            rounded = moved.to(p.dtype)
        p.copy_(torch.where(chosen[name], rounded, start[name]))
    return losses, gradients


FACTORS = 1 << 23
"""Samples from here on are those of factors and signs."""


@cache
def factor(noise: str, stream: Stream, numel: int) -> Tensor:
    return (normals if noise == "gaussian" else signs)(stream, numel).bfloat16()


def row_direction(shape: torch.Size, where: Stream, row: int, rank: int | None, noise: str) -> list[tuple]:
    """The outer products ``(a, b)`` of a row's direction: bfloat16; without a rank its signs."""
    n, m = (shape[:-1].numel(), shape[-1]) if len(shape) > 1 else (1, shape[-1])
    padded_n, padded_m = (-(-size // 1024) * 1024 for size in (n, m))
    noise = "rademacher" if rank is None else noise
    terms = []
    for j in range(rank or 1) if len(shape) > 1 else range(1):
        start = (row * (rank or 1) + j) * (padded_n + padded_m) if len(shape) > 1 else row * padded_m
        stream = Stream(where.seed, where.step, where.sample + FACTORS, where.tensor, start)
        a = torch.ones(1, dtype=torch.bfloat16) if len(shape) < 2 else factor(noise, stream, n)
        terms.append((a, factor(noise, stream if len(shape) < 2 else stream.part(padded_n), m)))
    return terms


def direction_of(theta: Tensor, where: Stream, row: int, rank: int | None, noise: str) -> Tensor:
    """``Z_r`` in float64, without the mask and the noise that sign flips multiply with."""
    terms = row_direction(theta.shape, where, row, rank, noise)
    total = sum(torch.outer(a.double(), b.double()) for a, b in terms)
    return (total / len(terms) ** 0.5).view(theta.shape)


@torch.no_grad()
def reference_update(
    theta: Tensor,
    where: list[Stream],
    coefficients: list[float],
    *,
    lr: float,
    rank: int | None,
    noise: str,
    rows_apart: bool,
    rows: int,
    weight_decay: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The weights after a step along directions of low rank or flipped signs, element by element as documented.

    ``where`` are the streams of scheme 1, one for each sample; ``coefficients`` are ordered by sample, then row.
    """
    work = torch.float64 if theta.dtype == torch.float64 else torch.float32
    wide, delta = theta.to(work), None
    if not rows_apart:
        coefficients = [math.fsum(coefficients[i : i + rows]) / rows for i in range(0, len(coefficients), rows)]
        rows = 1
    flat = wide.reshape(-1, theta.shape[-1]) if theta.dim() > 1 else wide.view(1, -1)
    for index, c in enumerate(coefficients):
        sample, row = divmod(index, rows)
        if rank is None and not rows_apart:
            z = draw(noise, where[sample], flat).to(work)
            term = z * torch.tensor(lr * c / len(coefficients), dtype=work)
            delta = term if delta is None else delta + term
            continue
        terms = row_direction(theta.shape, where[sample], row, rank, noise)
        scale = torch.tensor(lr * c / len(coefficients) * (1.0 / math.sqrt(len(terms))), dtype=work)
        for a, b in terms:
            term = (scale * a.to(work))[:, None] * b.to(work)[None, :]
            delta = term if delta is None else delta + term
    if rank is None and rows_apart:
        delta = delta * draw(noise, where[0], flat).to(work)
    if weight_decay:
        delta = delta + torch.tensor(lr * weight_decay, dtype=work) * flat
    moved = (flat - delta).view(theta.shape)
    if theta.element_size() == 2:
        words = words16(where[0], ROUNDING, theta.numel())
        moved = stochastic_round(moved, theta.dtype, words)
    moved = moved.to(theta.dtype)
    return moved if mask is None else torch.where(mask, moved, theta)


class RowByRow:
    """Stands for an attached network: every row of a batch is run on weights that were really changed for it.

    Args:
        model: The network.
        row_loss: The loss of one row, from what the network makes of it and the row's target.
        shared: Names of the parameters that all rows share.
    """

    write_seconds = 0.0

    def __init__(self, model: nn.Module, row_loss, shared=()) -> None:
        self.module, self.row_loss, self.read, self.learned = model, row_loss, set(), 0
        self.named = dict(model.named_parameters())
        self.shared, self.direction = {id(self.named[name]) for name in shared}, None

    def learn(self, closure, step, strict, anywhere) -> set[int]:
        self.learned += 1
        return self.shared

    def check(self, losses) -> Tensor:
        return ForwardRows().check(losses)

    def watch(self, parameters) -> None:
        self.read = {id(parameter) for parameter in parameters}

    def extra_bytes(self) -> int:
        return 0

    @contextmanager
    def perturbed(self, direction):
        self.direction = direction
        yield
        self.direction = None

    def changed(self, parameter: nn.Parameter, rows: int) -> Tensor:
        """The perturbed weights of every row, ``[rows, ...]``."""
        theta, direction = parameter.detach(), self.direction
        if not direction.rows_apart(parameter):
            out = torch.empty(theta.numel(), dtype=theta.dtype)
            direction.perturb(parameter, out)
            return out.view(theta.shape).expand(rows, *theta.shape)
        ((left, right, scale),) = direction.factors([parameter], range(rows))
        left = torch.ones(rows, right.shape[1], 1) if left is None else left
        work = torch.promote_types(theta.dtype, torch.float32)
        delta = torch.einsum("rjn,rjm->rnm", left.to(work), right.to(work)).reshape(rows, *theta.shape)
        if direction._step.directions.rank is None:
            z = torch.empty(theta.numel(), dtype=theta.dtype)
            direction.draw(parameter, z)
            delta = delta * z.view(theta.shape).to(work)
        return (theta.to(work) + scale * delta).to(theta.dtype)

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The closure's result: one loss per row."""
        weights = {name: self.changed(parameter, len(inputs)) for name, parameter in self.named.items()}

        def one(own, x, y):
            return self.row_loss(functional_call(self.module, own, (x[None],))[0], y)

        return vmap(one)(weights, inputs, targets)
