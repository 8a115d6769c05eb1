"""Runs that do nothing: said within 20 steps, with the reason, and only then."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.standstill import PATIENCE


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2))


X = torch.randn(40, 4, 8, generator=torch.Generator().manual_seed(1))


def run(
    net: nn.Module, loss: Callable[[int], object], steps: int = PATIENCE, attach: bool = True, **settings: object
) -> SparseMeZO:
    optimizer = SparseMeZO(net.named_parameters(), **{"kernel": "torch", **settings})
    if attach:
        optimizer.attach(net)
    optimizer.prepare_masks()
    for step in range(steps):
        optimizer.step(lambda step=step: loss(step))
    return optimizer


def empty_masks() -> SparseMeZO:
    net = nn.Linear(8, 2)
    optimizer = SparseMeZO(net.named_parameters(), kernel="torch")
    optimizer.attach(net)
    optimizer.prepare_masks()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(100.0)
    for step in range(PATIENCE):
        optimizer.step(lambda step=step: net(X[step]).square().mean())
    return optimizer


def huge_weights() -> SparseMeZO:
    net = nn.Linear(8, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1e30)
    return run(net, lambda step: torch.tanh(net(X[step])).mean(), mask="dense")


def constant() -> SparseMeZO:
    net = network()
    return run(net, lambda step: net(X[step]).argmax(1).float().mean() * 0 + 0.7)


def left_behind() -> SparseMeZO:
    """An update puts every weight above the threshold of its mask."""
    net = nn.Linear(8, 2)
    optimizer = SparseMeZO(net.named_parameters(), lr=1e9, kernel="torch")
    for step in range(1 + PATIENCE):
        optimizer.step(lambda step=step: net(X[step]).square().mean().clamp(max=9.0))
    return optimizer


def small_eps() -> SparseMeZO:
    net = nn.Linear(8, 2)
    net.empty = nn.Parameter(torch.empty(0))
    return run(net, lambda step: net(X[step]).square().mean(), eps=1e-30)


def diverged() -> SparseMeZO:
    net, losses = network(), iter([1.0, 0.0])
    return run(net, lambda step: net(X[step]).mean() * 0 + next(losses, 0.7), 1 + PATIENCE)


def decayed() -> SparseMeZO:
    net = network()
    return run(net, lambda step: net(X[step]).mean() * 0 + 0.7, weight_decay=0.1)


def not_read() -> SparseMeZO:
    net = network()
    return run(net, lambda step: X[step].mean())


def rounded_away(dtype: torch.dtype = torch.float32, **settings: object) -> SparseMeZO:
    net = network().to(dtype)
    return run(
        net, lambda step: net(X[step].to(dtype)).float().square().mean(), **{"lr": 1e-30, "mask": "dense", **settings}
    )


CASES = [
    (empty_masks, "No weight is active: refresh the masks"),
    (left_behind, "No weight is active any more: lower lr, and begin again"),
    (huge_weights, "Beside weights of up to 1e.30, eps is rounded away: lower lr"),
    (small_eps, "Beside weights of up to 0.* eps is rounded away: raise eps"),
    (decayed, "both losses were equal, so only weight decay changed weights. The loss was 0.7"),
    (constant, "The loss was 0.7 in each: the model's output is constant, or does not depend"),
    (diverged, "The loss was 0.7 in each: the model has diverged to a constant output .lower lr"),
    (not_read, "The loss changes with the batch, and not with the weights"),
    (rounded_away, "Updates of lr 1e-30 times .* are rounded away: raise lr"),
]


@pytest.mark.parametrize(("make", "reason"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_a_run_that_does_nothing_says_so_once_and_why(make, reason, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = make()
    said = [record.getMessage() for record in caplog.records if "did nothing" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"the last 20 steps (to {optimizer.steps_done}) did nothing: ")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(optimizer.standstill.reason)


@pytest.mark.parametrize("settings", [{"lr": 1e-3}, {"lr": 0.0}, {"lr": 1e-30, "mask": "small", "sparsity": 0.999}])
def test_a_run_that_does_something_or_is_not_to_is_left_alone(settings, caplog: pytest.LogCaptureFixture) -> None:
    """The last one has no active weight among those that are looked at, so nothing can be said of its updates."""
    net = nn.Sequential(nn.Linear(8, 640), nn.Linear(640, 2))
    with torch.no_grad():
        net[0].weight.flatten()[-6:] = 1e-9  # beyond the sample
        for parameter in (net[0].bias, net[1].weight, net[1].bias):
            parameter.requires_grad_(False)
    optimizer = run(net, lambda step: net(X[step]).square().mean(), 2 * PATIENCE, **settings)
    assert optimizer.standstill.reason is None and "did nothing" not in caplog.text


def test_a_warmup_from_lr_0_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    optimizer = SparseMeZO(net.named_parameters(), lr=0.0, kernel="torch")
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 0.0 if step < 25 else 1e-3
        optimizer.step(lambda step=step: net(X[step]).square().mean())
    assert optimizer.standstill.reason is None and "did nothing" not in caplog.text


def test_a_run_that_moves_again_is_not_dead_and_a_loss_of_0_is_the_goal(caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    optimizer = run(net, lambda step: 0.5, lr=1e-3)
    assert optimizer.standstill.reason and not optimizer.standstill.moved
    optimizer.step(lambda: net(X[0]).square().mean())
    assert optimizer.standstill.reason is None and optimizer.standstill.moved
    for _ in range(PATIENCE):
        optimizer.step(lambda: 0.0)
    assert optimizer.standstill.reason is None


@pytest.mark.parametrize("mask", ["small", "random", "dense"])
@pytest.mark.parametrize("mask_update", ["dynamic", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_looked_at_is_found_under_any_mask(mask, mask_update, dtype) -> None:
    optimizer = rounded_away(dtype, mask=mask, mask_update=mask_update)
    assert "rounded away" in str(optimizer.standstill.reason)


def test_stochastic_rounding_of_small_updates_is_progress() -> None:
    assert rounded_away(torch.bfloat16, lr=1e-6).standstill.reason is None


def test_a_run_copied_in_its_middle_starts_to_look_anew() -> None:
    logging.getLogger("smezo_pl").setLevel(logging.CRITICAL)
    import pickle

    optimizer = empty_masks()
    assert pickle.loads(pickle.dumps(optimizer)).standstill.reason is None
