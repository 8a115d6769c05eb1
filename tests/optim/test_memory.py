"""Which tensors can be optimized, and those that share memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from smezo_pl import record, replay
from smezo_pl.optim import SparseMeZO


def tied(seed: int = 0) -> nn.Sequential:
    """Two layers whose weights are one memory, but two parameters."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Linear(16, 2))
    model[2].weight.data = model[0].weight.data
    return model.eval()


@pytest.mark.parametrize("attach", [True, False])
def test_parameters_of_one_memory_are_one_tensor(attach, tmp_path):
    model, again = tied(), tied()
    same = tied()
    same[2].weight = same[0].weight
    x, losses = torch.randn(4, 16), []
    for network in (model, same):
        named = dict(network.named_parameters())
        named.setdefault("2.weight", named["0.weight"])  # so that the tensors after it have the same numbers
        order = ["0.weight", "2.weight", "3.weight", "3.bias"]
        optimizer = SparseMeZO([(name, named[name]) for name in order], lr=1e-2, sparsity=0.5)
        assert optimizer.param_groups[0]["names"] == ["0.weight", "3.weight", "3.bias"]
        if attach:
            optimizer.attach(network)
        with record(optimizer, tmp_path / f"{len(losses)}.smezo", network) as recorder:
            for _ in range(3):
                optimizer.step(lambda network=network: network(x).square().mean())
            recorder.mark_weights()
        losses.append(optimizer.last_step.losses)
    assert losses[0] == losses[1]
    replay(tmp_path / "0.smezo", again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def overlapping() -> list[tuple[str, nn.Parameter]]:
    flat = torch.randn(400)
    return [("a", nn.Parameter(flat[:256])), ("b", nn.Parameter(flat[144:].view(16, 16)))]


def transposed() -> list[tuple[str, nn.Parameter]]:
    flat = torch.randn(256)
    return [("a", nn.Parameter(flat)), ("b", nn.Parameter(flat.view(16, 16)))]


def one_frozen() -> list[tuple[str, nn.Parameter]]:
    flat = torch.randn(256)
    return [("a", nn.Parameter(flat)), ("b", nn.Parameter(flat, requires_grad=False))]


def frozen_around() -> list[tuple[str, nn.Parameter]]:
    flat = torch.randn(256)
    return [("b", nn.Parameter(flat[8:16])), ("a", nn.Parameter(flat, requires_grad=False))]


@pytest.mark.parametrize("make", [overlapping, transposed, one_frozen, frozen_around])
def test_parameters_that_share_memory_in_another_way_are_refused(make):
    with pytest.raises(ValueError, match=r"parameters 'a' and 'b' \(.*\) share memory"):
        SparseMeZO(make())


def test_ties_that_are_treated_differently_are_refused():
    model = tied()
    with pytest.raises(ValueError, match=r"'0.weight' and '2.weight' \(optimized, not optimized\) share memory"):
        SparseMeZO(model.named_parameters(), exclude="2")
    with pytest.raises(ValueError, match=r"'0.weight' and '2.weight' \(optimized, dense\) share memory"):
        SparseMeZO(model.named_parameters(), dense="2.*")
    with pytest.raises(ValueError, match="optimized by another group, optimized"):
        SparseMeZO([{"params": [("a", model[0].weight)]}, {"params": [("b", model[2].weight)]}])


def test_neighbors_in_one_memory_are_not_ties():
    flat = torch.randn(64)
    optimizer = SparseMeZO([(str(n), nn.Parameter(flat[16 * n : 16 * n + 16])) for n in range(4)])
    assert optimizer.param_groups[0]["names"] == ["0", "1", "2", "3"]


class Packed(Tensor):
    """A tensor whose values lie elsewhere, as those of quantized weights."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, requires_grad=True)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Packed(torch.zeros(4, 4))
        raise NotImplementedError(func)


class Named(nn.Parameter):
    """A parameter with a name for its kind, whose values are its own."""


def test_tensors_that_cannot_be_perturbed_are_refused_by_name():
    with pytest.raises(TypeError, match=r"parameter 'w' is a tests.optim.test_memory.Packed, whose values"):
        SparseMeZO([("w", Packed(torch.zeros(4, 4)))])
    with pytest.raises(ValueError, match="parameter '0.weight' is not initialized: run the network once"):
        SparseMeZO(nn.Sequential(nn.LazyLinear(4)).named_parameters())


def test_a_named_kind_of_parameter_is_optimized():
    torch.manual_seed(0)
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.load_state_dict(model.state_dict())
    model.weight = Named(model.weight.detach())
    x, weights = torch.randn(3, 4), []
    for network in (model, other):
        optimizer = SparseMeZO(network.named_parameters(), lr=1e-2)
        optimizer.attach(network)
        optimizer.step(lambda network=network: network(x).sum())
        weights.append(network.weight.detach())
    assert torch.equal(*weights) and type(model.weight) is Named


def test_a_network_with_packed_weights_that_are_frozen_is_trained_around_them(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.register_buffer("packed", Packed(torch.zeros(4, 4)).requires_grad_(False))
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2)
    optimizer.attach(model)
    optimizer.step(lambda: model(torch.ones(2, 4)).sum())
    with pytest.raises(TypeError, match="'packed' is a Packed without memory of its own"):
        record(optimizer, tmp_path / "trajectory.smezo")
