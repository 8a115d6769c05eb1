"""The optimizer's step against the reference step, and its properties."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from smezo_pl.optim import NonFiniteLossError, SparseMeZO
from smezo_pl.optim.noise import Stream
from tests.optim.kernels.cases import needs_two_threads
from tests.optim.networks import NETWORKS, TiedLanguageModel, build, loss_closure
from tests.optim.reference import reference_step, select, sorted_threshold

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a[name].element_size()]
        assert torch.equal(a[name].view(integer), b[name].view(integer)), name


def eps_for(dtype: torch.dtype) -> float:
    return 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["small", "large", "random", "dense"])
@pytest.mark.parametrize("mode", ["layerwise", "in_place"])
@pytest.mark.parametrize("mask_update", ["dynamic", "constant"])
def test_step_equals_the_reference_step(dtype, mask, mode, mask_update):
    settings = {"lr": 1e-2, "eps": eps_for(dtype), "sparsity": 0.7, "seed": 2**40 + 5, "weight_decay": 0.1}
    model, other = build(TiedLanguageModel, dtype), build(TiedLanguageModel, dtype)
    optimizer = SparseMeZO(
        model.named_parameters(), mask=mask, mask_update=mask_update, num_samples=2, kernel="torch", **settings
    )
    if mode == "layerwise":
        optimizer.attach(model)
    parameters = dict(other.named_parameters())
    active = 0.7 if mask == "large" else 0.3
    thresholds = {name: sorted_threshold(p.detach(), active) for name, p in parameters.items()}
    masks = None
    if mask_update == "constant":
        masks = {
            name: select(p.detach(), mask, 0.7, thresholds[name], Stream(settings["seed"], 0, 0, k))
            for k, (name, p) in enumerate(parameters.items())
        }
    for step in range(3):
        loss = optimizer.step(loss_closure(model, seed=step))
        losses, gradients = reference_step(
            parameters,
            loss_closure(other, seed=step),
            step=step,
            mask=mask,
            thresholds=thresholds,
            masks=masks,
            num_samples=2,
            **settings,
        )
        assert optimizer.last_step.losses == tuple(losses)
        assert optimizer.last_step.projected_gradients == tuple(gradients)
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert float(loss) == pytest.approx(sum(map(sum, losses)) / 4, rel=1e-6)
        assert_same_bits(bits(model), bits(other))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layerwise_and_in_place_give_the_same_losses_and_weights(kind, dtype):
    reports, weights = [], []
    for mode in ("layerwise", "in_place"):
        model = build(kind, dtype)
        optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, eps=1e-2, sparsity=0.5)
        if mode == "layerwise":
            optimizer.attach(model)
        for step in range(4):
            optimizer.step(loss_closure(model, seed=step))
            reports.append((mode, optimizer.last_step.losses))
        weights.append(bits(model))
    assert [r for m, r in reports if m == "layerwise"] == [r for m, r in reports if m == "in_place"]
    assert_same_bits(*weights)
    plus, minus = reports[0][1][0]
    assert plus != minus


@pytest.mark.parametrize("mask", ["small", "dense"])
def test_projected_gradient_is_autograds_in_expectation(mask):
    """E[g z] is the masked gradient of a quadratic loss; the tolerance is from the samples' own spread."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2, bias=False).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)

    def closure():
        return ((model(x) - y) ** 2).mean()

    closure().backward()
    gradient = model.weight.grad.clone()
    optimizer = SparseMeZO(model.named_parameters(), lr=0.0, eps=1e-4, sparsity=0.5, mask=mask, kernel="torch")
    threshold = sorted_threshold(model.weight.detach(), 0.5)
    chosen = select(model.weight.detach(), mask, 0.5, threshold, Stream(0, 0, 0, 0))
    from smezo_pl.optim.noise import normals

    estimates = []
    for step in range(1500):
        optimizer.step(closure)
        z = normals(Stream(0, step, 0, 0), 12, torch.device("cpu")).view(2, 6).double()
        estimates.append(optimizer.last_step.projected_gradients[0] * z * chosen)
    stacked = torch.stack(estimates)
    error = (stacked.mean(0) - gradient * chosen).abs()
    standard_error = stacked.std(0) / len(estimates) ** 0.5
    assert (error <= 4.5 * standard_error + 1e-12).all()
    assert (gradient * chosen).abs().max() > 10 * standard_error.max()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("mode", ["layerwise", "in_place"])
def test_lr_zero_leaves_every_bit_of_1000_steps(dtype, mode):
    model = build(TiedLanguageModel, dtype)
    with torch.no_grad():
        model.hidden.weight.view(-1)[:2] = torch.tensor([-0.0, 0.0])
    before = bits(model)
    optimizer = SparseMeZO(model.named_parameters(), lr=0.0, eps=1e-2)
    if mode == "layerwise":
        optimizer.attach(model)
    closure = loss_closure(model)
    for _ in range(1000):
        optimizer.step(closure)
    assert_same_bits(before, bits(model))
    assert optimizer.last_step.losses[0][0] != optimizer.last_step.losses[0][1]


@pytest.mark.parametrize("mode", ["layerwise", "in_place"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_interrupted_closure_leaves_the_weights(mode, error, call):
    model = build(TiedLanguageModel, torch.bfloat16)
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, eps=1e-1, num_samples=2)
    if mode == "layerwise":
        optimizer.attach(model)
    inner = loss_closure(model)
    optimizer.step(inner)
    before, identities = bits(model), [id(p) for p in model.parameters()]
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == call:
            handle = model.norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error("stop")))
            try:
                return inner()
            finally:
                handle.remove()
        return inner()

    with pytest.raises(error):
        optimizer.step(closure)
    assert_same_bits(before, bits(model))
    assert [id(p) for p in model.parameters()] == identities
    assert optimizer.steps_done == 1
    optimizer.step(inner)
    assert optimizer.steps_done == 2


def test_two_runs_are_equal_and_the_global_generator_is_untouched():
    state = torch.get_rng_state()
    results = []
    for _ in range(2):
        model = build(TiedLanguageModel)
        optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, num_samples=2)
        optimizer.attach(model)
        for step in range(5):
            optimizer.step(loss_closure(model, seed=step))
        results.append(bits(model))
    assert_same_bits(*results)
    assert torch.equal(state, torch.get_rng_state())


def test_another_seed_gives_another_run():
    reports = []
    for seed in (0, 1):
        model = build(TiedLanguageModel)
        optimizer = SparseMeZO(model.named_parameters(), seed=seed)
        optimizer.step(loss_closure(model))
        reports.append(optimizer.last_step.losses)
    assert reports[0] != reports[1]


def test_leaving_a_tensor_out_does_not_change_the_noise_of_the_others():
    whole, part = build(TiedLanguageModel), build(TiedLanguageModel)
    frozen = build(TiedLanguageModel)
    frozen.hidden.requires_grad_(False)
    optimizers = [
        SparseMeZO(whole.named_parameters()),
        SparseMeZO(part.named_parameters(), exclude="hidden.*"),
        SparseMeZO(frozen.named_parameters()),
    ]
    numbers = [dict(zip(o.param_groups[0]["names"], o.param_groups[0]["numbers"], strict=True)) for o in optimizers]
    assert numbers[1] == numbers[2] == {k: v for k, v in numbers[0].items() if not k.startswith("hidden")}
    optimizers[1].step(loss_closure(part))
    optimizers[2].step(loss_closure(frozen))
    assert optimizers[1].last_step.losses == optimizers[2].last_step.losses
    assert torch.equal(part.hidden.weight, whole.hidden.weight)


@pytest.mark.parametrize("mask", ["small", "random"])
def test_mask_follows_the_weights_when_dynamic_and_stays_when_constant(mask):
    model = build(TiedLanguageModel)
    dynamic = SparseMeZO(model.named_parameters(), lr=0.3, mask=mask)
    constant = SparseMeZO(model.named_parameters(), lr=0.3, mask=mask, mask_update="constant")
    before = dynamic.packed_masks(), constant.packed_masks()
    for _ in range(5):
        dynamic.step(loss_closure(model))
        constant.step(loss_closure(model))
    after = dynamic.packed_masks(), constant.packed_masks()
    assert any(not torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])
    constant.refresh_masks()
    assert any(not torch.equal(after[1][k], v) for k, v in constant.packed_masks().items())


def test_single_magnitude_takes_part_dense_until_a_refresh(caplog):
    model = build(TiedLanguageModel)
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, sparsity=0.75)
    with caplog.at_level("INFO"):
        optimizer.step(loss_closure(model))
    assert "2 tensors have a single magnitude and are dense until a refresh: norm.weight, norm.bias" in caplog.text
    stats = {stat.name: stat for stat in optimizer.mask_stats()}
    assert stats["norm.weight"].selected == 8 and stats["norm.weight"].threshold is None
    optimizer.refresh_masks()
    assert {s.name: s.selected for s in optimizer.mask_stats()}["norm.weight"] == 2
    optimizer.step(loss_closure(model))
    assert optimizer.last_step.refreshed


def test_ties_are_named_and_the_mask_does_not_empty_itself(caplog):
    model = nn.Linear(64, 16, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randint(-3, 4, (16, 64), generator=torch.Generator().manual_seed(0)) / 8)
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-3, sparsity=0.8)
    with caplog.at_level("INFO"):
        (before,) = optimizer.mask_stats()
    assert "ties keep 1 tensors from the density asked for: weight 0.1" in caplog.text
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(50):
        optimizer.step(lambda: model(x).square().mean())
    (after,) = optimizer.mask_stats()
    assert abs(after.selected - before.selected) <= 0.02 * before.numel


def test_dense_patterns_and_sparsity_zero():
    model = build(TiedLanguageModel)
    optimizer = SparseMeZO(model.named_parameters(), dense="hidden")
    stats = {s.name: s for s in optimizer.mask_stats()}
    assert stats["hidden.weight"].selected == 64
    assert stats["embedding.weight"].selected == round(0.2 * 88)
    assert all(s.selected == s.numel for s in SparseMeZO(model.named_parameters(), sparsity=0.0).mask_stats())


def test_groups_have_their_own_hyperparameters():
    model, other = build(TiedLanguageModel), build(TiedLanguageModel)
    groups = [
        {"params": [("embedding.weight", model.embedding.weight)], "lr": 1e-1, "eps": 1e-2, "sparsity": 0.0},
        {"params": [("hidden.weight", model.hidden.weight)], "lr": 0.0},
    ]
    optimizer = SparseMeZO(groups, lr=1e-3)
    before = bits(model)
    optimizer.step(loss_closure(model))
    after = bits(model)
    assert not torch.equal(before["embedding.weight"], after["embedding.weight"])
    assert torch.equal(before["hidden.weight"], after["hidden.weight"])
    assert optimizer.last_step.lr == (1e-1, 0.0) and optimizer.last_step.eps == (1e-2, 1e-3)
    optimizer.add_param_group({"params": [("norm.bias", model.norm.bias)], "lr": 1.0})
    optimizer.step(loss_closure(model))
    assert not torch.equal(model.norm.bias, other.norm.bias)
    assert optimizer.param_groups[2]["numbers"] == [2]


def test_a_group_may_lose_all_its_parameters():
    model = build(TiedLanguageModel)
    groups = [{"params": [pair]} for pair in model.named_parameters()]
    optimizer = SparseMeZO(groups, exclude="hidden.bias")
    assert [group["names"] for group in optimizer.param_groups][2] == []
    optimizer.step(loss_closure(model))


def test_groups_with_another_eps_take_the_same_step_for_a_linear_loss():
    """g belongs to the first group's eps: the step of a linear loss must not depend on the eps of its group."""
    steps = []
    for eps in (1e-2, 1e-4):
        a, b = nn.Parameter(torch.zeros(1, dtype=torch.float64)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = SparseMeZO([{"params": [a]}, {"params": [b], "eps": eps}], lr=1.0, eps=1e-3, mask="dense")
        optimizer.step(lambda b=b: 3.0 * b.sum())
        steps.append(b.item())
    assert steps[0] == pytest.approx(steps[1], rel=1e-5) and steps[0] < 0


def test_schedulers_and_maximize():
    values = []
    for maximize in (False, True):
        weight = nn.Parameter(torch.full((8,), 0.5, dtype=torch.float64))
        optimizer = SparseMeZO([weight], lr=0.05, mask="dense", maximize=maximize)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for expected in (0.05, 0.025, 0.0125):
            optimizer.step(lambda w=weight: w.square().sum())
            assert optimizer.last_step.lr == (expected,)
            scheduler.step()
        values.append(weight.square().sum().item())
    assert values[0] < 2.0 < values[1]


@pytest.mark.parametrize("mask_update", ["dynamic", "constant"])
def test_state_dict_continues_to_the_same_bits(mask_update, tmp_path):
    def make(model):
        return SparseMeZO(model.named_parameters(), lr=1e-1, mask_update=mask_update, num_samples=2, seed=3)

    model = build(TiedLanguageModel, torch.bfloat16)
    optimizer = make(model)
    for step in range(3):
        optimizer.step(loss_closure(model, seed=step))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for step in range(3, 6):
        optimizer.step(loss_closure(model, seed=step))

    resumed = build(TiedLanguageModel, torch.bfloat16, seed=9)
    again = make(resumed)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    for step in range(3, 6):
        again.step(loss_closure(resumed, seed=step))
    assert_same_bits(bits(model), bits(resumed))
    assert again.steps_done == 6


def test_replay_makes_the_weights_again():
    model, other = build(TiedLanguageModel, torch.bfloat16), build(TiedLanguageModel, torch.bfloat16)
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-1, num_samples=2, weight_decay=0.01)
    optimizer.attach(model)
    records = []
    for step in range(6):
        if step == 3:
            optimizer.refresh_masks(sparsity=0.5)
        optimizer.step(loss_closure(model, seed=step))
        records.append(optimizer.last_step)
    replayed = SparseMeZO(other.named_parameters(), **optimizer.settings() | {"sparsity": 0.8})
    for record in records:
        if record.refreshed:
            replayed.refresh_masks(sparsity=0.5 if record.step == 3 else None)
        replayed.replay_step(record.step, record.projected_gradients, record.lr, record.weight_decay, record.skipped)
    assert_same_bits(bits(model), bits(other))
    with pytest.raises(ValueError, match="the next step is 6"):
        replayed.replay_step(0, (0.0, 0.0), (0.1,), (0.0,))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_non_finite_losses_are_skipped_counted_and_end_the_run(loss):
    model = build(TiedLanguageModel)
    before = bits(model)
    optimizer = SparseMeZO(model.named_parameters(), lr=1.0, max_skipped=3)
    for count in (1, 2):
        optimizer.step(lambda: loss)
        assert optimizer.last_step.skipped and optimizer.last_step.projected_gradients == ()
        assert optimizer.skipped_steps == count and optimizer.steps_done == count
    with pytest.raises(NonFiniteLossError, match=r"not finite in 3 steps in a row .* Try a smaller lr"):
        optimizer.step(lambda: loss)
    assert_same_bits(before, bits(model))
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-3, max_skipped=2)
    optimizer.step(lambda: loss)
    optimizer.step(loss_closure(model))
    optimizer.step(lambda: loss)
    assert optimizer.skipped_steps == 2


def test_closure_may_return_any_number():
    model = build(TiedLanguageModel)
    optimizer = SparseMeZO(model.named_parameters())
    for value in (
        1,
        2.5,
        torch.tensor([[3.0]]),
        torch.tensor(4, dtype=torch.int64),
        torch.tensor(1.5, dtype=torch.bfloat16),
    ):
        assert float(optimizer.step(lambda value=value: value)) == float(value)
        assert optimizer.last_step.projected_gradients == (0.0,)


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (None, "needs a closure"),
        (lambda: None, "returned None"),
        (lambda: torch.zeros(2), r"one number, got a tensor of shape \(2,\)"),
        (lambda: "0.3", "a number, got str"),
        (lambda: torch.zeros((), dtype=torch.complex64), "real number"),
    ],
)
def test_bad_closures(closure, message):
    model = build(TiedLanguageModel)
    before = bits(model)
    with pytest.raises(TypeError, match=message):
        SparseMeZO(model.named_parameters()).step(closure)
    assert_same_bits(before, bits(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"lr must be in \[0, inf\), got -1.0"),
        ({"lr": float("nan")}, r"lr must be in \[0, inf\), got nan"),
        ({"eps": 0.0}, r"eps must be in \(0, inf\), got 0.0"),
        ({"eps": float("nan")}, "eps must be in"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be in"),
        ({"sparsity": float("nan")}, "sparsity must be in"),
        ({"weight_decay": -0.1}, "weight_decay must be in"),
        ({"num_samples": 0}, r"num_samples must be in \[1, "),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"mask": "smal"}, "mask must be one of small, large, random, dense, got 'smal'"),
        ({"mask_update": "static"}, "mask_update must be 'dynamic' or 'constant'"),
        ({"noise": "uniform"}, "noise must be 'gaussian' or 'rademacher'"),
        ({"kernel": "cuda"}, "kernel must be"),
        ({"include": "nothing.*"}, r"include pattern 'nothing.\*' matches no parameter.*Names: embedding.weight"),
        ({"exclude": "hiden.weight"}, "did you mean 'hidden.weight'"),
        ({"exclude": "*"}, "no parameter is optimized"),
    ],
)
def test_bad_arguments(arguments, message):
    model = build(TiedLanguageModel)
    with pytest.raises(ValueError, match=message):
        SparseMeZO(model.named_parameters(), **arguments)


def test_bad_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        SparseMeZO([])
    with pytest.raises(ValueError, match="no parameter is optimized: of 1 given, none has requires_grad=True"):
        SparseMeZO([nn.Parameter(torch.zeros(3), requires_grad=False)])
    with pytest.raises(TypeError, match="'w' has dtype complex64; allowed: float32"):
        SparseMeZO([("w", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])
    with pytest.raises(ValueError, match=r"parameter 0' is not contiguous \(strides \(1, 3\)"):
        SparseMeZO([nn.Parameter(torch.zeros(3, 3).t()[:, :2])])
    with pytest.raises(ValueError, match=r"need names: pass model\.named_parameters"):
        SparseMeZO([nn.Parameter(torch.zeros(3))], include="w")
    with pytest.raises(TypeError, match="lr must be a number, got '1e-3'"):
        SparseMeZO([nn.Parameter(torch.zeros(3))], lr="1e-3")
    with pytest.raises(ValueError, match="meta device"):
        SparseMeZO([("w", nn.Parameter(torch.zeros(3, device="meta")))]).step(lambda: 0.0)


def test_copies_and_pickles_step_like_the_original():
    model = build(TiedLanguageModel)
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, mask_update="constant")
    optimizer.attach(model)
    optimizer.step(loss_closure(model))
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    optimizer.step(loss_closure(model, seed=1))
    for other, its in pairs:
        assert its.attached is None
        its.attach(other)
        its.step(loss_closure(other, seed=1))
        assert_same_bits(bits(model), bits(other))


@needs_two_threads
def test_updates_do_not_depend_on_the_thread_count():
    start = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))

    def updated(threads, kernel):
        torch.set_num_threads(threads)
        weight = nn.Parameter(start.clone())
        optimizer = SparseMeZO([weight], lr=1e-3, kernel=kernel)
        values = iter([1.0, 0.5, 2.0, 0.1])
        optimizer.step(lambda: next(values))
        optimizer.step(lambda: next(values))
        return weight.detach()

    one, two = updated(1, "numba"), updated(2, "numba")
    assert not torch.equal(one, start)
    assert torch.equal(one, two)
    assert torch.equal(one, updated(2, "torch"))
