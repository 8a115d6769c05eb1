"""Each row of a forward sees its own direction, without a perturbed copy of the weights."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.perturbation import rowwise as rowwise_module
from smezo_pl.optim.rows import at_rows, rows
from tests.optim.changed import build_optimizer, check_rows, losses_of_changed
from tests.optim.networks import (
    NETWORKS,
    Attention,
    Experts,
    FunctionalHead,
    ReturnsItsWeight,
    SharedTwice,
    TiedLanguageModel,
    build,
)

ROWS = 4
FAST = [(TiedLanguageModel, 1), (FunctionalHead, 1), (Experts, None), (SharedTwice, 3)]
RANKS = [1, pytest.param(2, marks=pytest.mark.slow), None]
CASES = [
    pytest.param(kind, rank, marks=[] if (kind, rank) in FAST else pytest.mark.slow)
    for kind in NETWORKS
    for rank in (1, 3, None)
]


def batch(count: int = ROWS, length: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(0, 11, (count, length), generator=generator) for _ in range(2))


def row_losses(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none").mean(1)


def closure_of(model: nn.Module, count: int = ROWS, length: int = 5):
    ids, targets = batch(count, length)
    return lambda: row_losses(model, ids, targets)


@pytest.mark.parametrize(("kind", "rank"), CASES)
def test_losses_are_those_of_changed_weights(kind: type[nn.Module], rank: int | None) -> None:
    model = build(kind, torch.float64)
    check_rows(model, closure_of(model), ROWS, rank, num_samples=2)


@pytest.mark.parametrize("kind", [TiedLanguageModel, FunctionalHead, Experts, ReturnsItsWeight])
def test_a_shared_direction_of_low_rank(kind: type[nn.Module]) -> None:
    model = build(kind, torch.float64)
    losses = closure_of(model)
    optimizer = build_optimizer(model, rank=2)
    optimizer.step(lambda: losses().sum())
    expected = losses_of_changed(optimizer, lambda: losses().sum().view(1), 1)
    assert optimizer.last_step.losses[0] == pytest.approx(expected[0], rel=1e-12)
    assert optimizer.unread() == []


class Various(nn.Module):
    """Functions of torch that models give their weights to."""

    class GemmaNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return (F.rms_norm(x.double(), (8,)) * (1.0 + self.weight.double())).type_as(x)

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 2.0

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            flat = torch.addmm(self.bias, x.view(-1, 8), self.weight).view(x.shape)
            return (flat @ self.weight.T).add_(self.bias) - self.bias.to(x.dtype) * 0.5

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.positions = self.Scaled(11, 8, padding_idx=0), nn.Embedding(16, 8)
        self.norm, self.crossed = self.GemmaNorm(), self.Crossed()
        self.plain, self.rms = nn.LayerNorm(8, bias=False), nn.RMSNorm(8)
        self.full = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.router = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids) + self.positions(torch.arange(ids.shape[1]).unsqueeze(0))
        h = self.rms(self.plain(self.crossed(self.norm(h))) * self.gain)
        flat = self.full(h.view(-1, 8))
        routed = F.linear(flat.double(), self.router.weight.double(), self.router.bias.to(torch.float64))
        return self.head(h + routed.view(h.shape).to(h.dtype))


@pytest.mark.parametrize("rank", RANKS)
def test_functions_that_weights_are_given_to(rank: int | None) -> None:
    model = build(Various, torch.float64)
    optimizer = check_rows(model, closure_of(model), ROWS, rank)
    assert optimizer.last_step.shared == 0
    assert optimizer.unread() == []


@pytest.mark.parametrize("rank", RANKS)
def test_subsets_and_orders_of_rows(rank: int | None) -> None:
    model = build(Various, torch.float64)
    ids, targets = batch()

    def in_parts() -> Tensor:
        losses = torch.empty(ROWS, dtype=torch.float64)
        for part in ([3, 1], [0], [2]):
            with rows(torch.tensor(part)):
                losses[part] = row_losses(model, ids[part], targets[part])
        return losses

    def micro_batches() -> Tensor:
        return torch.cat([row_losses(model, ids[:3], targets[:3]), row_losses(model, ids[3:], targets[3:])])

    found = []
    for closure in (lambda: row_losses(model, ids, targets), in_parts, micro_batches):
        optimizer = build_optimizer(model, directions="per_row", rank=rank)
        optimizer.participation.shared = 0
        optimizer.step(closure)
        found.append(torch.tensor(optimizer.last_step.losses))
        optimizer.detach()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", RANKS)
def test_positions_that_were_picked_out(rank: int | None) -> None:
    class Picks(TiedLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8)
            self.gain = Various.GemmaNorm()

        def forward(self, ids: Tensor, picked: bool = True) -> Tensor:
            h = torch.tanh(self.hidden(self.embedding(ids)))
            row, position = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([1, 2, 0, 4, 3, 1])
            if picked:
                h = at_rows(h[row, position], row)
                return self.head(self.gain(self.norm(self.up(self.down(h)))))
            return self.head(self.gain(self.norm(self.up(self.down(h)))))[row, position]

    model = build(Picks, torch.float64)
    ids, _ = batch()

    def losses(picked: bool) -> Tensor:
        sums = model(ids, picked).pow(2).sum(1)
        return torch.stack([sums[:2].sum(), sums[2], sums[3], sums[4:].sum()])

    found = []
    for picked in (True, False):
        optimizer = check_rows(model, lambda picked=picked: losses(picked), ROWS, rank)
        assert optimizer.last_step.shared == 0
        found.append(torch.tensor(optimizer.last_step.losses))
        optimizer.detach()
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


class _Allocations(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for leaf in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("directions", ["shared", "per_row"])
def test_nothing_of_the_size_of_a_weight_is_allocated(directions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise_module, "FACTOR_BYTES", 0)  # which bounds what is drawn ahead
    model = nn.Sequential(nn.Embedding(2048, 256), nn.Linear(256, 512), nn.Linear(512, 256))
    ids = torch.zeros(2, 3, dtype=torch.long)
    optimizer = SparseMeZO(model.named_parameters(), directions=directions, rank=1)
    optimizer.attach(model)
    watch = _Allocations()

    def closure() -> Tensor:
        with watch:
            losses = model(ids).sum((1, 2))
        return losses if directions == "per_row" else losses.mean()

    optimizer.step(closure)
    optimizer.step(closure)
    assert 0 < watch.largest <= 2 * 3 * 512 * 4  # what a layer makes of the batch
    assert optimizer.extra_bytes() <= 512 * 4


class Routed(nn.Module):
    """Experts as modules, each of which gets as many tokens as the batch has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.ffn = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.head = nn.Linear(8, 11)
        self.uneven = False

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        flat = h.view(-1, 8)
        order, sizes = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0)), [4] * 5
        if self.uneven:  # the first gets one token of each row, in order, as if these were the rows
            first = torch.arange(0, len(flat), ids.shape[1])
            order, sizes = torch.cat([first, order[~torch.isin(order, first)]]), [4, 3, 5, 4, 4]
        out = torch.zeros_like(flat)
        for expert, chosen in zip(self.ffn, order.split(sizes), strict=True):
            out[chosen] = expert(flat[chosen])
        return self.head(h + out.view(h.shape))


@pytest.mark.parametrize("uneven", [False, True])
def test_experts_have_one_direction_for_the_batch(uneven: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = build(Routed, torch.float64)
    model.uneven = uneven
    caplog.set_level(logging.INFO, "smezo_pl")
    optimizer = check_rows(model, closure_of(model), ROWS, 1)
    shared = {name for name in optimizer.param_groups[0]["names"] if name.startswith("ffn")}
    numbers = dict(zip(optimizer.param_groups[0]["names"], optimizer.param_groups[0]["numbers"], strict=True))
    assert optimizer.last_step.shared == sum(1 << numbers[name] for name in shared)
    assert all(repr(name) in caplog.text for name in shared)


@pytest.mark.parametrize(("kind", "name"), [(Experts, "'experts'"), (Attention, "'attention.in_proj_weight'")])
def test_strict_refuses_by_name(kind: type[nn.Module], name: str) -> None:
    model = build(kind, torch.float64)
    optimizer = build_optimizer(model, directions="per_row", rank=1, strict=True)
    with pytest.raises(ValueError, match=f"strict=True refuses parameters whose rows cannot be told: .*{name}"):
        optimizer.step(closure_of(model))
    assert optimizer.steps_done == 0


def test_strict_refuses_what_is_read_for_the_first_time_later() -> None:
    model, use = build(TiedLanguageModel), []
    model.spare = nn.Linear(8, 8)
    model.hidden.register_forward_hook(lambda _, __, out: model.spare(out) if use else None)
    closure = closure_of(model)
    optimizer = build_optimizer(model, directions="per_row", rank=1, strict=True)
    optimizer.step(closure)
    use.append(1)
    with pytest.raises(ValueError, match=r"did not read them: 'spare.weight', 'spare.bias'; leave them out"):
        optimizer.step(closure)
    assert optimizer.steps_done == 1 and len(optimizer.unread()) == 2
    optimizer.strict = False
    optimizer.step(closure)
    assert optimizer.unread() == [] and optimizer.shared() == ["spare.weight", "spare.bias"]


def test_a_table_over_pairs_of_positions_is_no_batch() -> None:
    class Biased(TiedLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Embedding(9, 1)

        def forward(self, ids: Tensor) -> Tensor:
            place = torch.arange(ids.shape[1])
            weights = self.bias(place[:, None] - place + 4).squeeze(-1).softmax(-1)
            return super().forward(ids) + torch.einsum("st,rtv->rsv", weights, super().forward(ids))

    model = build(Biased, torch.float64)
    optimizer = check_rows(model, closure_of(model, 5, 5), 5, 1)  # as many positions as rows
    assert optimizer.last_step.shared >> 5 & 1


class Twofold(TiedLanguageModel):
    """The embedding is read row by row, and where rows cannot be told; the head has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head.bias = nn.Parameter(torch.rand(11))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.embedding(ids) + self.embedding(torch.arange(ids.shape[1])))))


@pytest.mark.parametrize("rank", RANKS)
def test_a_layer_with_a_shared_weight_and_a_bias_of_each_row(rank: int | None) -> None:
    model = build(Twofold, torch.float64)
    assert check_rows(model, closure_of(model), ROWS, rank).shared() == ["embedding.weight"]


def test_convolutions_beside_layers_are_no_experts() -> None:
    model = nn.Sequential(nn.Conv1d(5, 6, 3), nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model = model.double().eval()
    images = torch.randn(ROWS, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = check_rows(model, lambda: model(images).pow(2).sum(1), ROWS, 1)
    assert optimizer.shared() == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_positions_that_were_chosen_are_no_rows() -> None:
    """Without padding they are those of the rows, in order; with it the rows have other numbers of them."""

    class Unpadded(TiedLanguageModel):
        def forward(self, ids: Tensor) -> Tensor:
            h, read = self.embedding(ids), ids != 0
            return self.head(self.norm(torch.zeros_like(h).masked_scatter(read.unsqueeze(-1), self.hidden(h[read]))))

    model = build(Unpadded, torch.float64)
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [2, 3, 4, 5, 6], [7, 8, 9, 1, 2]])
    optimizer = check_rows(model, lambda: row_losses(model, ids, ids), ROWS, 1)
    assert optimizer.shared() == []
    ids[0, 1:] = 0
    with pytest.raises(RuntimeError, match=r"'hidden.bias' is read where its rows cannot be told.*or use directions="):
        optimizer.step(lambda: row_losses(model, ids, ids))
    optimizer.detach()
    optimizer = check_rows(model, lambda: row_losses(model, ids, ids), ROWS, 1)
    assert optimizer.shared() == ["hidden.weight", "hidden.bias"]


def test_pieces_of_a_longer_batch_are_no_rows() -> None:
    class InPieces(TiedLanguageModel):
        def forward(self, ids: Tensor) -> Tensor:
            pieces = torch.cat(self.embedding(ids).split(5, 1))  # all rows' first pieces, then all rows' second ones
            return self.head(self.norm(torch.cat(self.hidden(pieces).split(len(ids)), 1)))

    model = build(InPieces, torch.float64)
    check_rows(model, closure_of(model, length=10), ROWS, 1)
    optimizer = build_optimizer(model, directions="per_row", rank=1)
    optimizer.step(closure_of(model))
    with pytest.raises(RuntimeError, match=r"'hidden.bias' is read where its rows cannot be told"):
        optimizer.step(closure_of(model, length=10))


def test_a_prompt_that_is_repeated_for_each_row_is_shared() -> None:
    class Prompted(TiedLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = nn.Embedding(2, 8)

        def forward(self, ids: Tensor) -> Tensor:
            prompt = self.prompt(torch.arange(2)[None]).repeat(len(ids), 1, 1)
            h = torch.cat([prompt, self.embedding(ids)], 1)
            return self.head(self.norm(self.hidden(h).cumsum(1)))[:, 2:]

    model = build(Prompted, torch.float64)
    assert check_rows(model, closure_of(model), ROWS, 1).shared() == ["prompt.weight"]
    optimizer = build_optimizer(model, directions="per_row", rank=1, include="prompt")
    with pytest.raises(RuntimeError, match="the rows of a batch cannot be told where any of the parameters is used"):
        optimizer.step(closure_of(model))


def test_rows_of_losses_are_those_of_the_forwards() -> None:
    model = build(TiedLanguageModel)
    losses = closure_of(model)
    optimizer = build_optimizer(model, directions="per_row", rank=1)
    for closure, count, rows_ in ((lambda: losses()[:3], 3, 4), (lambda: losses().repeat(2), 8, 4),
                                  (lambda: losses() - losses(), 4, 8)):  # fmt: skip
        with pytest.raises(ValueError, match=f"returned {count} losses for the {rows_} rows of its forwards"):
            optimizer.step(closure)


def test_a_network_that_turns_its_rows_around_is_refused() -> None:
    class Reversed(TiedLanguageModel):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.hidden(self.embedding(ids).flip(0)).flip(0)))

    model = build(Reversed, torch.float64)
    for count in (2, 3, 4, 16):
        with pytest.raises(RuntimeError, match="mixes the rows of a batch"):
            build_optimizer(model, directions="per_row", rank=1).step(closure_of(model, count))


def test_a_network_that_mixes_rows_is_refused() -> None:
    model = build(TiedLanguageModel, torch.float64)
    losses = closure_of(model)
    optimizer = build_optimizer(model, directions="per_row", rank=1)
    with pytest.raises(RuntimeError, match=r"mixes the rows of a batch .* use directions='shared'"):
        optimizer.step(lambda: (found := losses()) + found.mean() * 1e-3)
    model.hidden = nn.Sequential(model.hidden, nn.BatchNorm1d(5, track_running_stats=False).double())
    optimizer = build_optimizer(model, directions="per_row", rank=1)
    with pytest.raises(RuntimeError, match="mixes the rows"):
        optimizer.step(losses)


def test_one_row_works(caplog: pytest.LogCaptureFixture) -> None:
    model = build(Various, torch.float64)
    caplog.set_level(logging.INFO, "smezo_pl")
    check_rows(model, closure_of(model, 1), 1, 1)
    assert "the first batch has one row at a time" in caplog.text


def test_a_use_that_was_not_learned_is_refused_by_name() -> None:
    model = build(TiedLanguageModel)
    losses = closure_of(model)
    optimizer = build_optimizer(model, directions="per_row", rank=1)
    optimizer.step(losses)
    for extra in (lambda: model.norm.weight.sum(), lambda: model.norm.weight.exp().sum()):
        with pytest.raises(RuntimeError, match="parameter 'norm.weight' is read where its rows cannot be told"):
            optimizer.step(lambda extra=extra: losses() + extra())
    with pytest.raises(RuntimeError, match="parameter 'hidden.bias' is read where its rows cannot be told"):
        optimizer.step(lambda: losses() + model.hidden(torch.ones(3, 8)).sum())
    optimizer.step(losses)


def test_a_closure_must_run_the_network() -> None:
    model = build(TiedLanguageModel)
    optimizer = build_optimizer(model, directions="per_row", rank=1)
    ids, _ = batch()
    with pytest.raises(RuntimeError, match="must run the attached module itself"):
        optimizer.step(lambda: model.embedding(ids).sum((1, 2)))
    with rows(torch.arange(ROWS)):
        optimizer.step(lambda: model.embedding(ids).sum((1, 2)))
    refusal = pytest.raises(RuntimeError, match=r"rows\(...\) numbers 2 rows, the forward inside the block has 4")
    with refusal, rows(torch.arange(2)):
        optimizer.step(closure_of(model))
    with pytest.raises(RuntimeError, match="must be at least 0, got -1"), rows(torch.tensor([1, 0, -1, 2])):
        optimizer.step(closure_of(model))
    for numbers in ([0, 1], torch.ones(4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.long)):
        with pytest.raises(TypeError, match="an int64 tensor of one dimension, got"), rows(numbers):
            pass


def test_writes_are_refused() -> None:
    model = build(TiedLanguageModel)
    losses = closure_of(model)
    optimizer = build_optimizer(model, directions="per_row", rank=1)
    optimizer.step(losses)
    before = model.hidden.weight.detach().clone()
    with pytest.raises(RuntimeError, match="a forward writes 'hidden.weight'"):
        optimizer.step(lambda: losses() + model.hidden.weight.mul_(2.0).sum())
    with pytest.raises(RuntimeError, match="a forward writes 'hidden.bias'"):
        optimizer.step(lambda: losses() + model.hidden.bias.add_(1.0).sum())
    model.embedding.max_norm = 0.1
    with pytest.raises(RuntimeError, match="a forward writes 'embedding.weight'"):
        optimizer.step(losses)
    assert torch.equal(model.hidden.weight, before)


def test_a_forward_that_fails_leaves_the_network_as_it_was() -> None:
    model = build(SharedTwice)
    losses, broken = closure_of(model), []
    optimizer = build_optimizer(model, directions="per_row", rank=1)
    optimizer.step(losses)
    expected = optimizer.last_step.losses
    model.block.register_forward_hook(lambda *_: 1 / 0 if broken else None)
    broken.append(1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(losses)
    broken.clear()
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    again = build_optimizer(model, directions="per_row", rank=1)
    again.step(losses)
    assert again.last_step.losses == expected


def test_what_no_forward_reads_is_left_alone() -> None:
    model = build(TiedLanguageModel)
    model.spare = nn.Linear(8, 8)
    optimizer = build_optimizer(model, directions="per_row", rank=1)
    optimizer.step(closure_of(model))
    assert optimizer.unread() == ["spare.weight", "spare.bias"]


@pytest.mark.parametrize("rank", RANKS)
def test_inference_mode_and_autocast(rank: int | None) -> None:
    found = []
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        model = build(Various, torch.float32)
        losses = closure_of(model)
        optimizer = build_optimizer(model, directions="per_row", rank=rank)

        def closure(losses=losses, mode=mode) -> Tensor:
            with mode:
                return losses()

        optimizer.step(closure)
        found.append(torch.tensor(optimizer.last_step.losses))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0], rtol=0.1, atol=0.1)
    assert (found[2][:, 0] != found[2][:, 1]).all()
