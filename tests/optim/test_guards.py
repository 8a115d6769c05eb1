"""Wherever a forward reads a weight, it reads it perturbed: layer by layer gives the losses of in place."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.perturbation import layerwise
from tests.optim.networks import Attention, FunctionalHead


class Net(nn.Module):
    """Two layers. Inputs of more than eight positions take the path that a subclass defines in `long`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)).mean(1)
        return self.head(h if x.shape[1] <= 8 else self.long(h))

    def long(self, h: Tensor) -> Tensor:
        return F.linear(h, self.a.weight)


class Twice(Net):
    def long(self, h: Tensor) -> Tensor:
        w, b = self.a.weight, self.a.bias
        return F.linear(torch.addmm(b, h, w.t()), w[:, :8].repeat(1, 2)) + torch.stack([b, b]).sum(0) + w.reshape(-1)[3]


class InAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.a.weight]

    def long(self, h: Tensor) -> Tensor:
        return h @ self.kept[0] + torch.cat(self.kept).sum(0)


class Partial(Net):
    def __init__(self) -> None:
        super().__init__()
        self.long = functools.partial(F.linear, weight=self.a.weight, bias=self.a.bias)


class Closure(Net):
    def __init__(self) -> None:
        super().__init__()
        weight = self.a.weight
        self.long = lambda h: h @ weight


class StaleView(Net):
    def __init__(self) -> None:
        super().__init__()
        self.views = {"t": self.a.weight.detach().t(), "data": self.a.weight.data, "row": self.a.weight[3]}

    def long(self, h: Tensor) -> Tensor:
        return h @ self.views["t"] + h @ self.views["data"] + self.views["row"]


class BufferView(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("view", self.a.weight.detach().t())

    def long(self, h: Tensor) -> Tensor:
        return h @ self.view


class FlatBuffer(Net):
    """A vector of all weights, of which the parameters are views with gaps between them."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, start = torch.linspace(-0.3, 0.3, 400), 8
        for parameter in self.parameters():
            parameter.data = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel() + 8

    def long(self, h: Tensor) -> Tensor:
        return h @ self.flat[:256].view(16, 16) + self.flat.sum()


class LazyView(Net):
    """A view of a weight that the first forward makes and later ones use."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "view"):
            self.view = self.a.weight.t()
        return super().forward(x)

    def long(self, h: Tensor) -> Tensor:
        return h @ self.view


class LazyInside(Net):
    class Keeps(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "view"):
                self.view = self.weight.t()
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.a = self.Keeps(16, 16)

    def long(self, h: Tensor) -> Tensor:
        return h @ self.a.view


@dataclasses.dataclass
class Parts:
    weight: Tensor


class Handed(Net):
    """A module that hands its weight out in an object, which the batch that follows overwrites if it is not kept."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-0.2, 0.3, 256).view(16, 16))

        def forward(self) -> Parts:
            return Parts(self.weight.t())

    def __init__(self) -> None:
        super().__init__()
        self.holder = self.Holder()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.holder()
        return self.head(torch.tanh(self.a(x).mean(1)) @ parts.weight)


class Recurrent(Net):
    """`nn.LSTM` keeps its parameters in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.lstm(x)[0])


class Parameters(Net):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.full((16,), 0.1 * n) for n in range(3))

    def long(self, h: Tensor) -> Tensor:
        return h * torch.stack(list(self.parts)).sum(0)


class Encoder(Net):
    """`nn.TransformerEncoderLayer` has a path of its own for inference, which runs no submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.encoder(x))


class Padded(Net):
    """With a mask for padding that path packs a batch into a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.encoder(x, src_key_padding_mask=torch.arange(x.shape[1]).expand(x.shape[:2]) > 3))


class OldNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.spectral_norm(self.a)


class Functional(Net):
    def long(self, h: Tensor) -> Tensor:
        return torch.func.functional_call(self.a, dict(self.a.named_parameters()), h)


class Copied(Net):
    def long(self, h: Tensor) -> Tensor:
        states = [copy.deepcopy(self.a).state_dict(), pickle.loads(pickle.dumps(self.a.weight)), self.state_dict()]
        values = [states[0]["weight"], states[1], states[2]["a.weight"], torch.tensor(self.a.weight.tolist())]
        return h @ sum(values) + torch.from_numpy(self.a.weight.detach().numpy()).sum(0)


def losses(kind: type[nn.Module], attach: bool, batches: list[Tensor], between: Callable[..., None] | None = None):
    """The losses of a step on each batch."""
    torch.manual_seed(0)
    model = kind().eval()
    optimizer, found = SparseMeZO(model.named_parameters(), lr=0.0, eps=1e-2), []
    if attach:
        optimizer.attach(model)
    for batch in batches:
        optimizer.step(lambda batch=batch: model(batch).square().sum())
        found.append(optimizer.last_step.losses)
        if between is not None:
            between(model, batch)
    return found


KINDS = [Net, Twice, InAList, Partial, Closure, StaleView, BufferView, FlatBuffer, LazyView, LazyInside, Handed]
KINDS += [Recurrent, Parameters, Encoder, Padded, OldNorm, Functional, Copied]
BATCHES = [torch.randn(4, length, 16, generator=torch.Generator().manual_seed(length)) for length in (5, 9, 12)]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_layer_by_layer_gives_the_losses_of_in_place(kind):
    assert losses(kind, True, BATCHES) == losses(kind, False, BATCHES)


@pytest.mark.parametrize("kind", [FunctionalHead, Attention])
def test_so_does_a_model_of_tokens(kind):
    ids = [torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))]
    assert losses(kind, True, ids) == losses(kind, False, ids)


def test_closures_in_inference_mode(monkeypatch):
    monkeypatch.setattr(layerwise, "ROW_COST", 0)
    ids, found = torch.tensor([[1, 9, 9, 2]]), []
    for attach in (True, False):
        torch.manual_seed(0)
        with torch.inference_mode():
            model = nn.Sequential(nn.Embedding(11, 16), Twice()).eval()
        optimizer = SparseMeZO(model.named_parameters(), lr=0.0)
        if attach:
            optimizer.attach(model)
        with torch.inference_mode():
            for _ in range(2):
                optimizer.step(lambda model=model: model(ids.repeat(1, 3)).sum())
        found.append(optimizer.last_step.losses)
    assert found[0] == found[1]


def test_a_view_that_an_evaluation_makes_between_two_steps():
    def evaluate(model: nn.Module, batch: Tensor) -> None:
        model.view = model.a.weight.t()

    class Evaluated(Net):
        def long(self, h: Tensor) -> Tensor:
            return h @ self.view

    expected = losses(Evaluated, False, BATCHES, evaluate)
    assert losses(Evaluated, True, BATCHES, evaluate) == expected


def test_what_is_kept_past_a_step_reads_the_weights_as_they_are():
    model, seen = Net().eval(), []
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2)
    optimizer.attach(model)
    model.register_forward_pre_hook(lambda *_: seen.append((model.a.weight, model.a.weight.t())))
    for batch in BATCHES:
        optimizer.step(lambda batch=batch: model(batch).sum())
    for weight, view in seen:
        assert torch.equal(weight, model.a.weight) and torch.equal(view, model.a.weight.t())
    assert type(model.a.weight) is nn.Parameter


def test_a_weight_read_outside_every_module_is_perturbed():
    found = []
    for attach in (True, False):
        torch.manual_seed(0)
        model = Net().eval()
        optimizer, weight = SparseMeZO(model.named_parameters(), lr=0.0), model.a.weight
        if attach:
            optimizer.attach(model)
        optimizer.step(lambda model=model, weight=weight: model(BATCHES[0]).sum() + weight.square().sum())
        found.append(optimizer.last_step.losses)
    assert found[0] == found[1]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", ["slot", "data", "view", "kept"])
def test_a_weight_cannot_be_written_outside_its_module(write, inference):
    class Writes(InAList):
        def long(self, h: Tensor) -> Tensor:
            weight = {"kept": self.kept[0], "data": self.a.weight.data, "view": self.a.weight.detach().t()[1:]}
            weight.get(write, self.a.weight).clamp_(-1, 1)
            return h

    model = Writes().eval()
    optimizer = SparseMeZO(model.named_parameters())
    optimizer.attach(model)
    before = model.a.weight.detach().clone()
    with (
        torch.inference_mode(inference),
        pytest.raises(RuntimeError, match=r"a forward writes 'a.weight' \(aten.clamp_"),
    ):
        optimizer.step(lambda: model(BATCHES[1]).sum())
    assert torch.equal(model.a.weight, before)


def test_an_address_outside_the_forward_is_refused_by_name():
    model = Net().eval()
    optimizer = SparseMeZO(model.named_parameters())
    optimizer.attach(model)
    with pytest.raises(RuntimeError, match="the address of parameter 'a.weight' is taken outside the forward"):
        optimizer.step(lambda: model(BATCHES[0]).sum() + model.a.weight.data_ptr())


def test_a_step_inside_the_closure_of_another_is_refused():
    model, other = Net().eval(), Net().eval()
    optimizers = [SparseMeZO(net.named_parameters()) for net in (model, other)]
    for optimizer, net in zip(optimizers, (model, other), strict=True):
        optimizer.attach(net)
    with pytest.raises(RuntimeError, match="inside the closure of another"):
        optimizers[0].step(lambda: model(BATCHES[0]).sum() + optimizers[1].step(lambda: other(BATCHES[0]).sum()))


class MaxNorm(nn.Module):
    """`nn.Embedding` writes the rows that it looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(50, 16, max_norm=0.5), nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


class Clamps(MaxNorm):
    """Writes that torch does not count, of a kind that is often seen: constraints on weights."""

    class Clamped(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            self.weight.data.clamp_(-0.1, 0.1)
            return super().forward(ids)

    def __init__(self) -> None:
        super().__init__()
        self.emb = self.Clamped(50, 16)


class Replaces(MaxNorm):
    class Renormalized(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
            return super().forward(ids)

    def __init__(self) -> None:
        super().__init__()
        self.emb = self.Renormalized(50, 16)


class Assigns(MaxNorm):
    class Assigned(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            self.weight = nn.Parameter(self.weight / 2)
            return super().forward(ids)

    def __init__(self) -> None:
        super().__init__()
        self.emb = self.Assigned(50, 16)


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("kind", [MaxNorm, Clamps, Replaces])
def test_a_forward_that_writes_its_weight_is_refused(kind, attach):
    model = kind().eval()
    optimizer = SparseMeZO(model.named_parameters(), lr=0.0)
    before = model.head.weight.detach().clone()
    if attach:
        optimizer.attach(model)
    with pytest.raises(RuntimeError, match=r"a forward writes 'emb.weight' \(in (place|\w+\.forward)\): the forwards"):
        optimizer.step(lambda: model(torch.arange(8)).square().sum())
    assert torch.equal(model.head.weight, before)


def test_a_forward_that_puts_another_parameter_in_the_slot_is_refused():
    model = Assigns().eval()
    optimizer, weight = SparseMeZO(model.named_parameters()), model.emb.weight
    optimizer.attach(model)
    with pytest.raises(RuntimeError, match=r"puts another tensor in the place of parameter 'emb.weight'"):
        optimizer.step(lambda: model(torch.arange(8)).square().sum())
    assert model.emb.weight is weight


def test_a_write_of_a_later_batch_is_refused():
    model = MaxNorm().eval()
    model.emb.max_norm = None
    optimizer = SparseMeZO(model.named_parameters(), exclude="emb")
    optimizer.attach(model)
    optimizer.step(lambda: model(torch.arange(8)).sum())
    model.emb.max_norm = 0.5
    with pytest.raises(RuntimeError, match=r"a forward writes 'emb.weight' \(in Embedding.forward\)"):
        optimizer.step(lambda: model(torch.arange(8)).sum())


@pytest.mark.parametrize("norm", ["spectral", "batch"])
def test_norms_in_training_mode_are_refused(norm):
    model = Net()
    if norm == "spectral":
        nn.utils.parametrizations.spectral_norm(model.head)
    else:
        model.head = nn.Sequential(nn.BatchNorm1d(16), model.head)
    optimizer = SparseMeZO(model.named_parameters())
    optimizer.attach(model)
    name = "head.parametrizations.weight.0._u" if norm == "spectral" else "head.0.num_batches_tracked"
    with pytest.raises(RuntimeError, match=rf"a forward writes '{name}' .*training mode"):
        optimizer.step(lambda: model(BATCHES[0]).sum())
    model.eval()
    optimizer.step(lambda: model(BATCHES[0]).sum())


def test_a_buffer_that_eval_mode_writes_is_named_once(caplog):
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    losses(Counts, True, BATCHES)
    assert caplog.text.count("a forward writes buffer 'calls'") == 1


def test_a_forward_in_another_thread_is_refused():
    model = InAList().eval()
    optimizer = SparseMeZO(model.named_parameters())
    optimizer.attach(model)
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(RuntimeError, match="a forward runs in another thread than the step"),
    ):
        optimizer.step(lambda: pool.submit(model, BATCHES[1]).result().sum())


def test_another_thread_saves_the_weights_as_they_are():
    model, saved = Net().eval(), io.BytesIO()
    optimizer = SparseMeZO(model.named_parameters())
    optimizer.attach(model)
    state, parameter = model.state_dict(), model.a.weight
    with ThreadPoolExecutor(1) as pool:
        model.head.register_forward_pre_hook(
            lambda *_: pool.submit(torch.save, [state, parameter], saved.seek(0) or saved).result()
        )
        weight = parameter.detach().clone()
        optimizer.step(lambda: model(BATCHES[0]).sum())
    saved.seek(0)
    loaded, loaded_parameter = torch.load(saved)
    assert type(loaded_parameter) is nn.Parameter and type(loaded["a.weight"]) is Tensor
    assert torch.equal(loaded["a.weight"], weight) and torch.equal(loaded_parameter, weight)


def test_scripted_modules_are_refused():
    model = Net()
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        model.head = torch.jit.script(model.head)
    with pytest.raises(ValueError, match=r"module 'head' is compiled by torch.compile or torch.jit"):
        SparseMeZO(model.named_parameters()).attach(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch raises some while it imports its own compiler
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_modules_that_a_compiled_function_runs_are_refused():
    model = Net().eval()
    optimizer = SparseMeZO(model.named_parameters())
    model.forward = torch.compile(model.forward, backend="eager")
    optimizer.attach(model)
    with pytest.raises(RuntimeError, match=r"a function compiled by torch.compile runs Linear.*do not call attach"):
        optimizer.step(lambda: model(BATCHES[0]).sum())


def test_a_step_that_fails_leaves_the_network_as_it_was():
    model = InAList().eval()
    optimizer, weight = SparseMeZO(model.named_parameters()), model.a.weight
    optimizer.attach(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: model(BATCHES[0]).sum())
    assert model.a.weight is weight is model.kept[0] and type(weight) is nn.Parameter
    handle.remove()
    optimizer.step(lambda: model(BATCHES[0]).sum())


def test_detach_lets_go_of_the_weights():
    model = Net().eval()
    optimizer = SparseMeZO(model.named_parameters())
    optimizer.attach(model)
    optimizer.step(lambda: model(BATCHES[0]).sum())
    optimizer.detach()
    alive = weakref.ref(model.a.weight)
    gc.disable()
    try:
        optimizer = model = None
        assert alive() is None
    finally:
        gc.enable()
