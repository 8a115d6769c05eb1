"""One Sparse MeZO step written out in the plainest way, to hold the optimizer against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smezo_pl.optim.noise import MASK, ROUNDING, Stream, normals, signs, words16


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
