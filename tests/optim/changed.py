"""What a forward must give: the losses of models whose weights were really changed, written out from the definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn

from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.noise import Stream, draw
from tests.optim.reference import direction_of

EPS = 1e-2


def build_optimizer(model: nn.Module, **settings) -> SparseMeZO:
    """An attached optimizer whose steps change nothing."""
    settings = {"lr": 0.0, "eps": EPS, "sparsity": 0.6, **settings}
    optimizer = SparseMeZO(model.named_parameters(), **settings)
    optimizer.attach(model)
    return optimizer


def direction(optimizer: SparseMeZO, name: str, tensor: Tensor, number: int, row: int, sample: int) -> Tensor:
    """``Z_r`` of a tensor in step 0, float64."""
    stream, rank = Stream(optimizer.seed, 0, sample, number), optimizer.rank
    is_shared = bool((optimizer.participation.shared or 0) >> number & 1) or optimizer.directions == "shared"
    if rank is None:
        noise = Stream(optimizer.seed, 0, sample if is_shared else 0, number)
        z = draw("gaussian", noise, tensor.numel(), "cpu").double()
        bits = optimizer.packed_masks([name])[name].numpy()
        mask = torch.from_numpy(numpy.unpackbits(bits, bitorder="little")[: tensor.numel()])
        z = (z * mask).view(tensor.shape)
        if is_shared:
            return z
    numbers = tensor if tensor.dim() else tensor.view(1)
    outer = direction_of(numbers, stream, 0 if is_shared else row, rank, "gaussian").view(tensor.shape)
    return outer if rank is not None else outer * z


@torch.no_grad()
def losses_of_changed(
    optimizer: SparseMeZO, losses: Callable[[], Tensor], rows: int, samples: int = 1
) -> list[tuple[float, float]]:
    """``(l+, l-)`` of each sample and row, each from a forward of its own with really changed weights."""
    tensors = [
        (name, tensor, number)
        for group in optimizer.param_groups
        for name, tensor, number in zip(group["names"], group["params"], group["numbers"], strict=True)
    ]
    originals = [tensor.clone() for _, tensor, _ in tensors]
    pairs = []
    for sample in range(samples):
        for row in range(rows):
            moves = [direction(optimizer, *tensor, row, sample) for tensor in tensors]
            pair = []
            for sign in (1.0, -1.0):
                for (_, tensor, _), original, move in zip(tensors, originals, moves, strict=True):
                    tensor.copy_(original + sign * EPS * move)
                pair.append(float(losses()[row]))
            pairs.append((pair[0], pair[1]))
            for (_, tensor, _), original in zip(tensors, originals, strict=True):
                tensor.copy_(original)
    return pairs


def check_rows(model: nn.Module, losses: Callable[[], Tensor], rows: int, rank: int | None, **settings) -> SparseMeZO:
    """A step's losses are those of changed models, for every row; all of them differ."""
    optimizer = build_optimizer(model, directions="per_row", rank=rank, **settings)
    optimizer.step(losses)
    expected = torch.tensor(losses_of_changed(optimizer, losses, rows, optimizer.num_samples), dtype=torch.float64)
    actual = torch.tensor(optimizer.last_step.losses, dtype=torch.float64)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert (actual[:, 0] != actual[:, 1]).all()
    return optimizer
