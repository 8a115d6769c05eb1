"""Steps along low-rank directions and sign flips, shared by a batch or one per row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from smezo_pl.optim import SparseMeZO
from smezo_pl.optim import step as step_module
from smezo_pl.optim.coefficients import rounded
from smezo_pl.optim.noise import Stream
from smezo_pl.optim.parameters import float32
from tests.optim.reference import RowByRow, direction_of, draw, reference_update

ROWS = 5


class Network(nn.Module):
    """A table, a matrix with a bias, a vector that multiplies, and a tensor of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.cube = nn.Parameter(torch.randn(2, 4, 3) * 0.3)

    def forward(self, ids):
        hidden = torch.tanh(self.linear(self.table(ids))) * self.scale
        return torch.einsum("btd,sde->bse", hidden, self.cube)


def network(dtype=torch.float32) -> Network:
    torch.manual_seed(0)
    return Network().to(dtype)


def batch(rows=ROWS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (rows, 3), generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def row_loss(output, target):
    return F.cross_entropy(output.double().sum(0), target)


def per_row(model, shared=(), **settings) -> SparseMeZO:
    """An optimizer that sees the network row by row."""
    settings = {"lr": 1e-2, "eps": 1e-3, "seed": 3, "directions": "per_row", **settings}
    optimizer = SparseMeZO(model.named_parameters(), **settings)
    optimizer._layerwise = RowByRow(model, row_loss, shared)
    return optimizer


def closure_of(optimizer, model, data):
    if optimizer.directions == "per_row":
        return lambda: optimizer._layerwise.losses(*data)
    return lambda: torch.stack([row_loss(one, y) for one, y in zip(model(data[0]), data[1], strict=True)]).mean()


def unpacked(bits, like):
    positions = torch.arange(like.numel())
    return (bits[positions // 8] >> (positions % 8) & 1).bool().view(like.shape)


CASES = {
    "shared": {"directions": "shared", "rank": 2},
    "rows": {"rank": 1},
    "rows, rank 3": {"rank": 3, "noise": "rademacher"},
    "flips": {"mask": "small", "sparsity": 0.5},
    "flips of all": {"mask": "dense", "noise": "rademacher"},
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("shared", [(), ("cube", "linear.bias")])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_step_is_the_written_out_one(dtype, case, shared):
    kernels = ("torch",) if dtype == torch.float64 else ("torch", "numba")
    for kernel in kernels:
        model, data = network(dtype), batch()
        own = {"num_samples": 2, "weight_decay": 0.1, "kernel": kernel, "eps": 1e-3 if dtype.itemsize > 2 else 3e-2}
        optimizer = per_row(model, shared, **own, **CASES[case])
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        masks = {name: unpacked(bits, before[name]) for name, bits in optimizer.packed_masks().items()}
        optimizer.step(closure_of(optimizer, model, data))
        record, rank = optimizer.last_step, optimizer.rank
        rows = ROWS if optimizer.directions == "per_row" else 1
        assert record.rows == rows and record.samples == 2 and len(record.losses) == 2 * rows

        streams = {name: [Stream(3, 0, sample, n) for sample in (0, 1)] for n, name in enumerate(before)}
        apart = {name: rows > 1 and name not in shared for name in before}
        assert record.shared == sum(1 << n for n, name in enumerate(before) if rows > 1 and name in shared)
        for index, losses in enumerate(record.losses):
            sample, row = divmod(index, rows)
            for sign, loss in zip((1, -1), losses, strict=True):
                changed = {}
                for name, theta in before.items():
                    if rank is None and not apart[name]:
                        z = draw(optimizer.noise, streams[name][sample], theta).double()
                    else:
                        number = row if apart[name] else 0
                        z = direction_of(theta, streams[name][sample], number, rank, optimizer.noise)
                        z = z if rank else z * draw(optimizer.noise, streams[name][0], theta)
                    changed[name] = (theta.double() + sign * optimizer.defaults["eps"] * z * masks[name]).to(dtype)
                outputs = functional_call(model, changed, (data[0],))
                expected = [row_loss(output, y) for output, y in zip(outputs, data[1], strict=True)]
                expected = expected[row] if rows > 1 else torch.stack(expected).mean()
                assert loss == pytest.approx(float(expected), abs=TOLERANCE[dtype])
        gradients = [float32((plus - minus) / (2 * optimizer.defaults["eps"])) for plus, minus in record.losses]
        assert record.projected_gradients == (rounded(gradients) if rows > 1 else tuple(gradients))
        assert any(gradients)
        for name, theta in before.items():
            expected = reference_update(
                theta,
                streams[name],
                list(record.projected_gradients),
                lr=1e-2,
                rank=rank,
                noise=optimizer.noise,
                rows_apart=apart[name],
                rows=rows,
                weight_decay=0.1,
                mask=masks[name],
            )
            after = dict(model.named_parameters())[name]
            assert torch.equal(after.detach(), expected), (name, kernel)
            assert not torch.equal(after, theta)


def test_factors_are_uncorrelated_between_rows_samples_steps_tensors_and_sides():
    for noise in ("gaussian", "rademacher"):
        vectors = []
        for step, number in ((0, 0), (1, 0), (0, 1)):
            parameters = [nn.Parameter(torch.zeros(4, 4)) for _ in range(number)] + [
                nn.Parameter(torch.zeros(2048, 2048))
            ]
            optimizer = SparseMeZO(parameters, directions="per_row", rank=2, num_samples=2, noise=noise)
            perturbation = optimizer._perturbation(step, 0)
            for sample in (0, 1):
                left, right, scale = step_module.Direction(perturbation, sample, 1.0).factors(parameters[-1], [0, 1, 7])
                assert scale == pytest.approx(1e-3 / math.sqrt(2))
                vectors += [left.float().flatten(0, 1), right.float().flatten(0, 1)]
                vectors.append(draw(noise, Stream(0, step, sample, number), torch.empty(1, 2048)))
        drawn = torch.cat(vectors)
        assert len(drawn) == 3 * 2 * (6 + 6 + 1)
        correlation = torch.corrcoef(drawn) - torch.eye(len(drawn))
        assert correlation.abs().max() < 5.5 / math.sqrt(2048)
        assert (drawn.mean(1).abs() < 5.5 / math.sqrt(2048)).all()
        assert (drawn.square().mean(1) - 1).abs().max() < 5.5 * math.sqrt(2 / 2048)


def test_factors_of_rows_are_the_same_whatever_rows_are_asked_for():
    parameter = nn.Parameter(torch.zeros(6, 3, 5))
    vector = nn.Parameter(torch.zeros(7))
    for rank in (None, 1, 3):
        optimizer = SparseMeZO([parameter, vector], directions="per_row", rank=rank)
        direction = step_module.Direction(optimizer._perturbation(4, 0), 0, -1.0)
        some, all_rows = (direction.factors(parameter, rows) for rows in ([6, 2], range(8)))
        assert torch.equal(some[0], all_rows[0][[6, 2]]) and torch.equal(some[1], all_rows[1][[6, 2]])
        assert some[0].shape == (2, rank or 1, 18) and some[1].shape == (2, rank or 1, 5)
        left, right, scale = direction.factors(vector, [3])
        assert left is None and right.shape == (1, 1, 7) and scale == -1e-3


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("settings", [{"rank": 1}, {"rank": 3}, {"mask": "dense"}, {"directions": "shared", "rank": 2}])
def test_the_expected_update_is_the_gradient(settings, noise):
    """The mean of c Z over many directions against autograd's gradient.

    Of N directions the squared error is that of d weights with variance |g|^2 / N each, beside a term for each weight
    of the size of its own share; that along the gradient has the variance of g^2, at most 3^2 - 1 times |g|^4.
    """
    model, data, samples, steps = network(torch.float64), batch(), 48, 4
    outputs = model(data[0])
    losses = torch.stack([row_loss(output, y) for output, y in zip(outputs, data[1], strict=True)])
    own = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters(), retain_graph=True)])
        for loss in losses
    ]
    gradient, square = torch.stack(own).mean(0), torch.stack(own).square().sum(1).mean()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = per_row(model, lr=1.0, eps=1e-5, num_samples=samples, noise=noise, **settings)
    estimates = []
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, model, data))
        estimates.append(torch.cat([(start[n] - p.detach()).flatten() for n, p in model.named_parameters()]))
        model.load_state_dict(start)
    rows = optimizer.last_step.rows
    directions = steps * samples * rows
    mean = torch.stack(estimates).mean(0)
    power = square if rows > 1 else gradient.square().sum()  # of the gradient that a direction sees
    along = float(mean @ gradient / gradient.square().sum())
    assert along == pytest.approx(1.0, abs=5 * math.sqrt(8 * float(power / gradient.square().sum()) / directions))
    error = float((mean - gradient).square().sum() / (power * len(mean) / directions))
    assert 0.5 < error < 2.0


class Linear(nn.Module):
    """A loss that is linear in the weights, with another gradient for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 32, dtype=torch.float64))

    def forward(self, x):
        return (self.weight * x).sum((1, 2))


@pytest.mark.parametrize("settings", [{"rank": 1}, {"mask": "dense"}])
@pytest.mark.parametrize("directions", ["per_row", "shared"])
def test_the_size_of_an_estimate(directions, settings):
    """``E |estimate|^2``: ``d (|g|^2 + sigma^2) / R`` with a direction per row, else ``d |g|^2`` of the batch's ``g``.

    The tolerance is that of the mean over the steps, and the terms without the factor d.
    """
    torch.manual_seed(0)
    model, rows, steps = Linear(), 16, 60
    examples = torch.randn(rows, 24, 32, dtype=torch.float64) + 0.5
    optimizer = per_row(model, lr=1.0, directions=directions, kernel="torch", **settings)
    optimizer._layerwise.row_loss = lambda output, target: output
    data, squares = (examples, torch.zeros(rows)), []
    for _ in range(steps):
        closure = (lambda: model(examples).mean()) if directions == "shared" else closure_of(optimizer, model, data)
        optimizer.step(closure)
        squares.append(float(model.weight.detach().square().sum()))
        model.weight.data.zero_()
    d, gradient, square = 24 * 32, examples.mean(0).square().sum(), examples.square().sum((1, 2)).mean()
    expected = float(d * (square / rows if directions == "per_row" else gradient))
    tolerance = 5 * float(torch.tensor(squares).std()) / math.sqrt(steps) + 0.02 * expected
    assert tolerance < 0.9 * expected and sum(squares) / steps == pytest.approx(expected, abs=tolerance)
