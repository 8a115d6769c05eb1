"""What a forward sees while weights are perturbed, and what stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.perturbation import layerwise
from tests.optim.networks import Attention, ReturnsItsWeight, TiedLanguageModel, build, loss_closure


def attached(model: nn.Module, **settings) -> SparseMeZO:
    optimizer = SparseMeZO(model.named_parameters(), **{"lr": 0.0, "eps": 1e-1, **settings})
    optimizer.attach(model)
    return optimizer


def test_a_later_pre_hook_sees_the_perturbed_copy_in_named_parameters():
    model = build(TiedLanguageModel)
    optimizer = attached(model)
    seen = []
    model.hidden.register_forward_pre_hook(
        lambda module, args: seen.append({k: v.detach().clone() for k, v in module.named_parameters()})
    )
    original = model.hidden.weight.detach().clone()
    optimizer.step(loss_closure(model))
    plus, minus = seen[-2]["weight"], seen[-1]["weight"]
    active = plus != original
    assert 0 < active.sum() < active.numel()
    assert torch.equal(active, minus != original)
    assert torch.allclose(plus - original, original - minus, atol=1e-6)
    assert model.hidden.weight is dict(model.named_parameters())["hidden.weight"]
    assert torch.equal(model.hidden.weight, original)


def test_tied_weights_are_perturbed_alike():
    model = build(TiedLanguageModel)
    optimizer = attached(model)
    seen = {}
    for name in ("embedding", "head"):
        getattr(model, name).register_forward_pre_hook(
            lambda m, a, name=name: seen.setdefault(name, []).append(m.weight.detach().clone())
        )
    optimizer.step(loss_closure(model))
    assert torch.equal(seen["head"][-1], seen["embedding"][-1])


def test_a_returned_weight_keeps_its_value():
    model = build(ReturnsItsWeight)
    optimizer = attached(model)
    seen = []
    model.positions.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    optimizer.step(loss_closure(model))
    late, early = seen[-1]
    assert torch.equal(late, early)


def test_the_parameters_that_forwards_read_are_known():
    model = build(TiedLanguageModel)
    model.spare = nn.Linear(8, 8)
    optimizer = attached(model)
    optimizer.step(loss_closure(model))
    spare = {id(parameter) for parameter in model.spare.parameters()}
    assert optimizer._layerwise.read == {id(parameter) for parameter in model.parameters()} - spare


def test_detach_leaves_no_trace():
    model = build(Attention)
    pristine = build(Attention)
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_always_called",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    )
    optimizer = attached(model)
    optimizer.step(loss_closure(model))
    optimizer.detach()
    for mine, its in zip(model.modules(), pristine.modules(), strict=True):
        assert [getattr(mine, hook) for hook in hooks] == [getattr(its, hook) for hook in hooks]
        assert mine.__dict__.keys() == its.__dict__.keys()


def test_outside_a_step_the_forward_is_the_plain_one():
    model = build(TiedLanguageModel)
    ids = torch.arange(5).view(1, 5)
    expected = model(ids)
    optimizer = attached(model)
    optimizer.step(loss_closure(model))
    assert torch.equal(model(ids), expected)


def test_a_copy_of_an_attached_model_is_free():
    model = build(TiedLanguageModel)
    optimizer = attached(model)
    twin = copy.deepcopy(model)
    inputs = torch.arange(5).view(1, 5)
    plain = twin(inputs)
    outputs = []

    def closure():
        outputs.append(twin(inputs))
        return model(inputs).sum()

    optimizer.step(closure)
    assert all(torch.equal(output, plain) for output in outputs)


def test_nested_attach_and_submodules():
    model = build(TiedLanguageModel)
    optimizer = SparseMeZO(model.hidden.named_parameters(), lr=0.0, eps=1e-1)
    optimizer.attach(model.hidden)
    other = SparseMeZO([("norm.weight", model.norm.weight)], lr=0.0, eps=1e-1)
    other.attach(model)
    closure = loss_closure(model)
    optimizer.step(closure)
    other.step(closure)
    assert optimizer.last_step.losses != other.last_step.losses


def test_attach_of_a_module_without_the_parameters():
    model = build(TiedLanguageModel)
    with pytest.raises(
        ValueError, match=r"Linear does not hold 3 of the optimizer's 5 parameters, among them 'embedding.weight'"
    ):
        SparseMeZO(model.named_parameters()).attach(model.hidden)


def test_a_module_or_parameter_replaced_after_attach_is_noticed():
    model = build(TiedLanguageModel)
    optimizer = attached(model)
    model.hidden = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match="module 'hidden' of TiedLanguageModel was replaced after attach"):
        optimizer.step(loss_closure(model))
    model = build(TiedLanguageModel)
    optimizer = attached(model)
    model.hidden.weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(RuntimeError, match=r"parameter 'hidden.weight' was replaced in its module after attach"):
        optimizer.step(loss_closure(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch raises some while it imports its own compiler
def test_compiled_modules_are_refused():
    model = build(TiedLanguageModel)
    model.hidden = torch.compile(model.hidden)
    with pytest.raises(ValueError, match=r"compiled by torch\.compile"):
        SparseMeZO(model.named_parameters()).attach(model)


def test_inference_mode_and_checkpoint_flags():
    model = build(TiedLanguageModel)
    optimizer = attached(model)
    inner = loss_closure(model)

    def closure():
        with torch.inference_mode():
            return inner()

    optimizer.step(inner)
    expected = optimizer.last_step.losses
    again = attached(model)
    again.step(closure)
    assert again.last_step.losses == expected


def test_scratch_is_the_largest_module():
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 32, bias=False))
    optimizer = attached(model, mask="dense")
    optimizer.step(lambda: model(torch.ones(1, 64)).sum())
    assert optimizer.extra_bytes() == 64 * 128 * 4


def test_autocast_sees_the_perturbation():
    model = build(TiedLanguageModel)
    optimizer = attached(model)
    inner = loss_closure(model)

    def closure():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return inner()

    optimizer.step(closure)
    plus, minus = optimizer.last_step.losses[0]
    assert plus != minus


@pytest.mark.parametrize("mask", ["small", "random", "dense"])
@pytest.mark.parametrize("mask_update", ["dynamic", "constant"])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_only_the_rows_that_a_batch_looks_up_are_perturbed(mask, mask_update, noise, monkeypatch):
    def run(cost: int) -> tuple[object, list[tuple[int, ...]]]:
        monkeypatch.setattr(layerwise, "ROW_COST", cost)
        model = build(TiedLanguageModel)
        optimizer = attached(model, mask=mask, mask_update=mask_update, noise=noise, lr=1e-2)
        shapes = []
        original = F.embedding
        monkeypatch.setattr(
            F, "embedding", lambda ids, weight, *a: (shapes.append(weight.shape), original(ids, weight, *a))[1]
        )
        for step in range(3):
            optimizer.step(loss_closure(model, seed=step, rows=1, length=4))
        monkeypatch.setattr(F, "embedding", original)
        return (optimizer.last_step.losses, model.embedding.weight.detach().clone()), shapes

    (rows_losses, rows_weight), rows_shapes = run(0)
    (whole_losses, whole_weight), whole_shapes = run(1 << 30)
    assert rows_losses == whole_losses
    assert torch.equal(rows_weight, whole_weight)
    assert all(shape[0] < 11 for shape in rows_shapes) and all(shape[0] == 11 for shape in whole_shapes)


@pytest.mark.parametrize("padding_idx", [0, 9, -1])
def test_a_padding_index_beyond_the_rows_of_a_batch(padding_idx, monkeypatch):
    monkeypatch.setattr(layerwise, "ROW_COST", 0)
    losses = []
    for attach in (True, False):
        model = build(TiedLanguageModel)
        model.embedding = nn.Embedding(11, 8, padding_idx=padding_idx, _weight=torch.linspace(-1, 1, 88).view(11, 8))
        optimizer = SparseMeZO(model.named_parameters(), lr=0.0, eps=1e-1)
        if attach:
            optimizer.attach(model)
        optimizer.step(loss_closure(model, rows=1, length=3))
        assert model.embedding.padding_idx == padding_idx % 11
        losses.append(optimizer.last_step.losses)
    assert losses[0] == losses[1]


def test_an_index_out_of_range_is_the_embeddings_own_error(monkeypatch):
    monkeypatch.setattr(layerwise, "ROW_COST", 0)
    model = build(TiedLanguageModel)
    optimizer = attached(model)
    with pytest.raises(IndexError):
        optimizer.step(lambda: model(torch.tensor([[3, 11]])).sum())


def test_parametrized_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for mode in ("layerwise", "in_place"):
        optimizer = SparseMeZO(model.named_parameters(), lr=0.0, eps=1e-1)
        if mode == "layerwise":
            optimizer.attach(model)
        optimizer.step(lambda: F.mse_loss(model(x), torch.zeros(3, 2)))
        losses.append(optimizer.last_step.losses)
        optimizer.detach()
    assert losses[0] == losses[1]
