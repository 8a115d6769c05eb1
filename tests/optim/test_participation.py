"""Weights that no forward reads are left alone, in both perturbations, until one reads them."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_pl.optim import SparseMeZO


class Routed(nn.Module):
    """Runs one of several experts at a time; nothing runs ``spare``."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.spare = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 2)
        self.token = nn.Parameter(torch.ones(8))  # its module runs, but reads it if ``is_masked`` alone
        self.chosen, self.is_masked = 0, False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token if self.is_masked else x
        return self.head(torch.tanh(self.experts[self.chosen](x)))


def routed(dtype: torch.dtype = torch.float32) -> Routed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Routed().to(dtype).eval()


def train(model: Routed, attach: bool, experts: list[int], **settings: Any) -> SparseMeZO:
    optimizer = SparseMeZO(
        model.named_parameters(), **{"lr": 5e-2, "weight_decay": 0.1, "sparsity": 0.5, "kernel": "torch", **settings}
    )
    if attach:
        optimizer.attach(model)
    take(optimizer, model, experts)
    return optimizer


def take(optimizer: SparseMeZO, model: Routed, experts: list[int]) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(model.head.weight.dtype)
    for model.chosen in experts:
        optimizer.step(lambda: model(x).float().square().mean())


def changed(model: nn.Module, start: nn.Module | None = None) -> set[str]:
    before = dict((start or routed(next(model.parameters()).dtype)).named_parameters())
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def left_alone(optimizer: SparseMeZO) -> list[str]:
    unread = optimizer.last_step.unread
    group = optimizer.param_groups[0]
    return [name for name, number in zip(group["names"], group["numbers"], strict=True) if unread >> number & 1]


def of(*modules: str) -> set[str]:
    return {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}


NEVER = {"spare.weight", "token"}

both = pytest.mark.parametrize("attach", [True, False], ids=["layerwise", "in place"])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"mask": "dense"}, {"mask_update": "constant"}, {"num_samples": 2}], ids=str)
def test_only_what_is_read_is_changed(attach: bool, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    model = routed(dtype)
    optimizer = train(model, attach, [0] * 4, **settings)
    assert changed(model) == of("experts.0", "head")
    assert set(left_alone(optimizer)) == of("experts.1", "experts.2") | NEVER


@both
def test_what_is_read_later_takes_part_from_there(attach: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = routed()
    with caplog.at_level(logging.INFO, logger="smezo_pl"):
        optimizer = train(model, attach, [0, 0])
        assert changed(model) == of("experts.0", "head")
        take(optimizer, model, [2])
        assert changed(model) == of("experts.0", "experts.2", "head")
        assert set(left_alone(optimizer)) == of("experts.1") | NEVER
        third = copy.deepcopy(model)
        take(optimizer, model, [0])  # from there on at every step
    assert of("experts.2") <= changed(model, third)
    lines = [message for message in caplog.messages if "left alone" in message]
    cost = "in place: each step watches for reads of what is left alone; exclude saves that and its copies"
    assert (cost in lines) is not attach
    lines = [line for line in lines if line != cost]
    assert lines == [
        "no forward of step 0 reads 6 of 10 tensors, which are left alone until one does: token, experts.1.weight, "
        "experts.1.bias, experts.2.weight and 2 more",
        "step 2 reads 2 tensors that were left alone before: experts.2.weight, experts.2.bias",
    ]


def test_both_perturbations_make_the_same_weights() -> None:
    models = [routed(torch.bfloat16), routed(torch.bfloat16)]
    for model, attach in zip(models, (True, False), strict=True):
        optimizer = train(model, attach, [0, 0, 1, 0])
        model.is_masked = True
        take(optimizer, model, [0, 1])
    assert changed(models[0], models[1]) == set()


@both
def test_a_weight_that_its_running_module_does_not_read(attach: bool) -> None:
    model = routed()
    optimizer = train(model, attach, [0, 0])
    assert "token" in left_alone(optimizer)
    model.is_masked = True
    take(optimizer, model, [0])
    assert "token" not in left_alone(optimizer) and "token" in changed(model)


@both
def test_a_kernel_that_asks_for_the_address_reads(attach: bool) -> None:
    """As those of Triton do, which no operator of torch announces."""
    model = routed()
    model.spare.forward = lambda: model.spare.weight.data_ptr() and 0.0  # type: ignore[method-assign]
    optimizer = train(model, attach, [0])
    assert "spare.weight" in left_alone(optimizer)
    optimizer.step(lambda: model(torch.ones(2, 8)).sum() + model.spare())
    assert set(left_alone(optimizer)) == of("experts.1", "experts.2") | {"token"}
    assert all("data_ptr" not in vars(parameter) for parameter in model.parameters())


@both
def test_numbers_that_a_forward_takes_out_are_read_and_what_has_no_elements_takes_part(attach: bool) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.empty(0))
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) * self.scale.tolist()[0]

    model = Listed()
    optimizer = SparseMeZO(model.named_parameters(), lr=5e-2, kernel="torch")
    if attach:
        optimizer.attach(model)
    optimizer.step(lambda: model(torch.ones(3, 8)).square().mean())
    assert optimizer.last_step.unread == 0


@both
def test_a_weight_that_is_handed_out_and_read_elsewhere(attach: bool) -> None:
    model = routed()
    model.spare.forward = lambda: {"kept": model.spare.weight}  # type: ignore[method-assign]
    optimizer = train(model, attach, [])
    for _ in range(2):
        optimizer.step(lambda: model(model.spare()["kept"][:2]).sum())
        assert set(left_alone(optimizer)) == of("experts.1", "experts.2") | {"token"}


@both
def test_a_refresh_finds_out_again(attach: bool) -> None:
    model = routed()
    optimizer = train(model, attach, [0, 1])
    optimizer.refresh_masks()
    take(optimizer, model, [2])
    assert set(left_alone(optimizer)) == of("experts.0", "experts.1") | NEVER


@both
def test_a_skipped_step_counts_as_any_other(attach: bool) -> None:
    model = routed()
    optimizer = train(model, attach, [])
    optimizer.step(lambda: model(torch.full((1, 8), torch.nan)).sum())
    assert optimizer.last_step.skipped and of("experts.1") <= set(left_alone(optimizer))


def test_a_state_and_a_copy_keep_what_is_left_alone() -> None:
    whole, first = routed(), routed()
    train(whole, True, [0, 0, 0, 2])
    optimizer = train(first, True, [0, 0])
    copied, by_state = copy.deepcopy((first, optimizer)), copy.deepcopy(first)
    again = train(by_state, True, [])
    again.load_state_dict(optimizer.state_dict())
    for model, of_model in (copied, (by_state, again)):
        of_model.attach(model)
        take(of_model, model, [0, 2])
        assert changed(model, whole) == set()
    old = optimizer.state_dict()
    del old["smezo"]["unread"]  # a state of version 0.1.0: all take part until a refresh
    again.load_state_dict(old)
    take(again, by_state, [0])
    assert not left_alone(again)


def test_masks_are_adopted_with_what_is_left_alone() -> None:
    model, other = routed(), routed()
    optimizer = train(model, True, [0, 0])
    adopting = train(other, True, [0, 1])
    adopting.adopt_masks(optimizer)
    take(adopting, other, [0])
    assert set(left_alone(adopting)) == of("experts.1", "experts.2") | NEVER


def test_a_record_makes_the_step_again() -> None:
    model, again = routed(), routed()
    optimizer, other = train(model, True, []), train(again, False, [])
    for expert in (0, 1):
        take(optimizer, model, [expert])
        record = optimizer.last_step
        other.replay_step(record.step, record.projected_gradients, record.lr, record.weight_decay, False, record.unread)
    assert changed(again, model) == set() and not changed(again) & of("experts.2")


def test_where_no_read_is_seen_all_take_part(caplog: pytest.LogCaptureFixture) -> None:
    model, values = routed(), iter(range(4))
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, kernel="torch")
    optimizer.step(lambda: float(next(values)))
    assert not left_alone(optimizer)
    assert changed(model) == set(dict(model.named_parameters()))
    assert "step 0: no forward was seen to read a weight that is optimized; all take part" in caplog.text


def test_what_another_process_reads_takes_part() -> None:
    model = routed()
    optimizer = train(model, True, [])
    asked = []

    def maximum(flags: Tensor) -> Tensor:
        asked.append(flags.tolist())
        return torch.maximum(flags, torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 0, 0], dtype=flags.dtype))

    optimizer.participation.over_processes = maximum
    take(optimizer, model, [0])
    assert set(left_alone(optimizer)) == of("experts.2") | NEVER
    assert asked == [[0, 1, 1, 0, 0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("before", [True, False], ids=["compiled before", "compiled after"])
def test_a_compiled_module_in_place_stays_compiled(before: bool) -> None:
    ran = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*values: Any) -> Any:
            ran.append(1)
            return graph.forward(*values)

        return run

    model, x = routed(), torch.ones(2, 8)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        if before:
            compiled(x)
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, exclude=["experts.1", "experts.2", "spare", "token"])
    ran.clear()
    optimizer.step(lambda: compiled(x).sum())
    assert not ran and not optimizer.last_step.unread  # watched once, without the graph
    optimizer.step(lambda: compiled(x).sum())
    assert len(ran) == 2
    torch.compiler.reset()
