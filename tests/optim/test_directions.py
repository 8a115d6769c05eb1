"""Steps along low-rank directions and sign flips, shared by a batch or one per row."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from smezo_pl.optim import NonFiniteLossError, SparseMeZO
from smezo_pl.optim import step as step_module
from smezo_pl.optim.coefficients import rounded
from smezo_pl.optim.noise import Stream
from smezo_pl.optim.parameters import float32
from smezo_pl.optim.standstill import PATIENCE
from tests.optim.kernels.cases import needs_two_threads
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


def build(model, shared=(), loss=row_loss, **settings) -> SparseMeZO:
    """An optimizer that sees the network row by row where each row has a direction."""
    settings = {"lr": 1e-2, "eps": 1e-3, "seed": 3, "directions": "per_row", **settings}
    optimizer = SparseMeZO(model.named_parameters(), **settings)
    if optimizer.directions == "per_row":
        optimizer._layerwise = RowByRow(model, loss, shared)
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


@pytest.mark.parametrize("shared", [(), ("cube", "linear.bias")], ids=["apart", "some shared"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_a_step_is_the_written_out_one(dtype, case, shared):
    kernels = ("torch",) if dtype == torch.float64 else ("torch", "numba")
    for kernel in kernels:
        model, data = network(dtype), batch()
        own = {"num_samples": 2, "weight_decay": 0.1, "kernel": kernel, "eps": 1e-3 if dtype.itemsize > 2 else 3e-2}
        optimizer = build(model, shared, **own, **CASES[case])
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
                direction = step_module.Direction(perturbation, sample, 1.0)
                ((left, right, scale),) = direction.factors(parameters[-1:], [0, 1, 7])
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
        some, all_rows = (direction.factors([parameter, vector], rows)[0] for rows in ([6, 2], range(8)))
        assert torch.equal(some[0], all_rows[0][[6, 2]]) and torch.equal(some[1], all_rows[1][[6, 2]])
        assert some[0].shape == (2, rank or 1, 18) and some[1].shape == (2, rank or 1, 5)
        ((left, right, scale),) = direction.factors([vector], [3])
        assert left is None and right.shape == (1, 1, 7) and scale == -1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 1},
        pytest.param({"rank": 1, "noise": "rademacher"}, marks=pytest.mark.slow),
        pytest.param({"rank": 3}, marks=pytest.mark.slow),
        pytest.param({"mask": "dense"}, marks=pytest.mark.slow),
        {"mask": "dense", "noise": "rademacher"},
        {"directions": "shared", "rank": 2},
    ],
)
def test_the_expected_update_is_the_gradient(settings):
    """The mean of c Z over many directions against autograd's gradient.

    Of N directions the squared error is that of d weights with variance ``|g|^2 / N`` each, and of a few more. Along
    the gradient it is the variance of ``g^2``, at most 3^2 - 1 times ``|g|^4``. All rows of a step flip the signs of
    one ``z``, so that each step sees the gradient times ``z^2``.
    """
    model, data, samples, steps = network(), batch(), 16, 32
    outputs = model(data[0])
    losses = torch.stack([row_loss(output, y) for output, y in zip(outputs, data[1], strict=True)])
    own = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters(), retain_graph=True)])
        for loss in losses
    ]
    gradient, square = torch.stack(own).mean(0), torch.stack(own).square().sum(1).mean()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build(model, lr=1.0, num_samples=samples, **settings)
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
    of_z = 2 * gradient.square().sum() / steps if optimizer.rank is None and optimizer.noise == "gaussian" else 0
    expected = power * len(mean) / directions + of_z
    assert 0.6 < float((mean - gradient).square().sum() / expected) < 1.5


class Linear(nn.Module):
    """A loss that is linear in the weights, with another gradient for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 32))

    def forward(self, x):
        return (self.weight * x).sum((1, 2))


@pytest.mark.parametrize("settings", [{"rank": 1}, {"mask": "dense"}])
@pytest.mark.parametrize("directions", ["per_row", "shared"])
def test_the_size_of_an_estimate(directions, settings):
    """Its expected square: ``d (|g|^2 + sigma^2) / R`` with a direction per row, else ``d |g|^2`` of the batch's ``g``.

    The tolerance is that of the mean over the steps, and the terms without the factor d.
    """
    torch.manual_seed(0)
    model, rows, steps = Linear(), 16, 60 if directions == "per_row" else 200
    examples = torch.randn(rows, 24, 32)
    optimizer = build(model, loss=lambda output, _: output, lr=1.0, directions=directions, **settings)
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


def run(optimizer, model, steps, first=0):
    for step in range(first, first + steps):
        optimizer.step(closure_of(optimizer, model, batch(seed=step)))
    return optimizer.last_step


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


RUNS = {
    "shared": {"directions": "shared", "rank": 2, "coefficients": "moving", "num_samples": 2},
    "rows": {"rank": 2, "coefficients": "moving", "shared": ("cube",)},
    "flips": {"mask_update": "constant", "sparsity": 0.5, "coefficients": "ranks", "num_samples": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_states_copies_and_records_continue_to_the_same_bits(name, tmp_path):
    settings, model = RUNS[name], network(torch.bfloat16)
    optimizer = build(model, **settings)
    start = copy.deepcopy(model)
    records = [run(optimizer, model, 1, step) for step in range(2)]
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    records += [run(optimizer, model, 1, step) for step in range(2, 4)]

    state, learned = torch.load(tmp_path / "state.pt", weights_only=True), 1
    resumed = network(torch.bfloat16)
    again = build(resumed, **settings)
    resumed.load_state_dict(state[0])
    again.load_state_dict(state[1])
    for own, of_own in [(resumed, again), *copies]:
        if of_own._layerwise is None and of_own.directions == "per_row":
            of_own._layerwise = RowByRow(own, row_loss, settings.get("shared", ()))
        assert run(of_own, own, 2, 2) == records[-1] and same(own, model)
        if of_own._layerwise is not None:
            learned += of_own._layerwise.learned
    assert learned == 1  # by the first step alone

    replayed = SparseMeZO(start.named_parameters(), **optimizer.settings())
    replayed.replay_steps(records)
    assert same(start, model)
    ours, theirs = optimizer.state_dict()["smezo"], replayed.state_dict()["smezo"]
    assert all(ours[key] == theirs[key] for key in ours if key != "bits")
    assert ours["noise_scheme"] == 2 and ours.get("shared", [1]) == ([1] if name != "flips" else [])
    assert ("mean_square" in ours) == (settings["coefficients"] == "moving")


def test_a_state_of_other_directions_is_refused():
    model = network()
    states = {name: build(model, **own).state_dict() for name, own in RUNS.items()}
    states["papers"] = SparseMeZO(model.named_parameters()).state_dict()
    assert states["papers"]["smezo"]["noise_scheme"] == 1
    message = "made with directions='per_row' and rank=2, the optimizer has directions='shared' and rank=None"
    with pytest.raises(ValueError, match=message):
        SparseMeZO(model.named_parameters()).load_state_dict(states["rows"])
    for name in ("shared", "flips", "papers"):
        with pytest.raises(ValueError, match="give those of the state"):
            build(model, rank=2).load_state_dict(states[name])
    rules = {name: state["smezo"].get("coefficients", "raw") for name, state in states.items()}
    assert rules == {name: RUNS.get(name, {}).get("coefficients", "raw") for name in states}
    for given, own in (("moving", "raw"), ("raw", "ranks")):
        state = SparseMeZO(model.named_parameters(), coefficients=given).state_dict()
        with pytest.raises(ValueError, match=f"made with coefficients='{given}', the optimizer has '{own}'"):
            SparseMeZO(model.named_parameters(), coefficients=own).load_state_dict(state)
    states["rows"]["smezo"]["noise_scheme"] = 3
    with pytest.raises(ValueError, match="noise scheme 3, this version has scheme 2 for directions='per_row'"):
        build(model, rank=2).load_state_dict(states["rows"])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"directions": "rows"}, ValueError, "directions must be 'shared' or 'per_row', got 'rows'"),
        ({"coefficients": "signs"}, ValueError, "coefficients must be 'raw', 'normalized', 'moving' or 'ranks', got"),
        ({"rank": 0}, ValueError, r"rank must be in \[1, 65\), got 0"),
        ({"rank": 65}, ValueError, r"rank must be in \[1, 65\), got 65"),
        ({"rank": 1.0}, TypeError, "rank must be an integer, got 1.0"),
        ({"rank": 1, "mask": "small"}, ValueError, "rank=1 needs mask='dense', got 'small'.*Leave out the mask"),
    ],
)
def test_settings_that_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        SparseMeZO(network().named_parameters(), **settings)


def test_a_rank_and_its_mask():
    model = network()
    optimizer = SparseMeZO(model.named_parameters(), rank=2)
    assert "mask" not in optimizer.given and optimizer.settings()["mask"] == "dense"
    assert SparseMeZO(model.named_parameters(), mask=None).settings()["mask"] == "small"
    assert optimizer.settings()["rank"] == 2 and optimizer.settings()["directions"] == "shared"
    optimizer.refresh_masks(0.5)
    assert set(optimizer.thresholds().values()) == {math.inf}
    with pytest.raises(ValueError, match="rank=2 needs mask='dense', got 'large'"):
        optimizer.adopt({"mask": "large"})
    other = SparseMeZO(model.named_parameters(), rank=2)
    other.param_groups[0]["mask"] = "random"
    with pytest.raises(ValueError, match="rank=2 needs mask='dense', got 'random'"):
        other.step(lambda: 0.0)
    with pytest.raises(ValueError, match="rank=2 needs mask='dense', got 'small'"):
        SparseMeZO([{"params": model.parameters(), "mask": "small"}], rank=2)


def test_closures_of_rows_that_are_refused():
    model, data = network(), batch()
    optimizer = build(model, rank=1)
    before = copy.deepcopy(model)
    for result in (torch.tensor(0.5), 0.5, torch.zeros(2, 3), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="per_row.*(one real number|losses) for each row"):
            optimizer.step(lambda result=result: result)
    lengths = iter((3, 4))
    with pytest.raises(ValueError, match=r"the same number of losses each time, got \[3, 4\]"):
        optimizer.step(lambda: torch.zeros(next(lengths)))
    optimizer._layerwise = None
    with pytest.raises(RuntimeError, match=r"directions='per_row' needs attach\(module\)"):
        optimizer.step(closure_of(build(model, rank=1), model, data))
    assert same(model, before) and optimizer.steps_done == 0
    records = [run(build(copy.deepcopy(model), rank=rank, directions="per_row"), model, 1) for rank in (None, 1)]
    with pytest.raises(ValueError, match="a direction for each of 5 rows, the optimizer one for all"):
        SparseMeZO(model.named_parameters()).replay_steps(records[:1])


def test_rows_come_in_one_read_and_may_be_one():
    model = network()
    optimizer = build(model, rank=1, coefficients="normalized")
    record = run(optimizer, model, 1)
    optimizer.step(lambda: optimizer._layerwise.losses(*batch(1)))
    one = optimizer.last_step
    assert record.rows == 5 and one.rows == one.samples == 1
    assert abs(one.projected_gradients[0]) == pytest.approx(1.0)
    assert record.loss == pytest.approx(sum(sum(pair) for pair in record.losses) / 10)


def test_a_step_with_a_loss_that_is_not_finite_is_skipped():
    model = network()
    before, optimizer = copy.deepcopy(model), build(model, rank=1, max_skipped=2, coefficients="moving")
    values = torch.tensor([1.0, math.nan, 2.0])
    optimizer.step(lambda: values)
    record = optimizer.last_step
    assert record.skipped and record.rows == 3 and record.projected_gradients == () and len(record.losses) == 3
    with pytest.raises(NonFiniteLossError, match=r"not finite in 2 steps in a row \(last pair \(nan, nan\)\)"):
        optimizer.step(lambda: values)
    assert same(model, before) and optimizer.skipped_steps == 2 and optimizer.no_signal_steps == 0


@pytest.mark.parametrize("coefficients", ["raw", "normalized", "moving", "ranks"])
def test_steps_without_a_signal_are_counted_and_said(coefficients, caplog):
    model = network()
    before, optimizer = copy.deepcopy(model), build(model, rank=1, coefficients=coefficients)
    with caplog.at_level("WARNING", logger="smezo_pl"):
        for _ in range(PATIENCE):
            optimizer.step(lambda: torch.tensor([1.0, 0.0, 1.0]))
    assert optimizer.no_signal_steps == PATIENCE and same(model, before)
    assert "both losses were equal, so no weight was updated" in caplog.text and optimizer.standstill.reason
    run(optimizer, model, 1)
    assert optimizer.no_signal_steps == PATIENCE and not same(model, before) and optimizer.standstill.reason is None


@pytest.mark.parametrize("settings", [{"directions": "shared", "rank": 3}, {"rank": 2}, {"mask": "small"}])
def test_the_update_in_parts_is_the_whole_one(settings, monkeypatch):
    """A large tensor's factors are drawn for some rows at a time."""
    results, drawn = [], []
    for limit in (1 << 30, 1):
        torch.manual_seed(0)
        table, vector = nn.Parameter(torch.randn(2500, 16).bfloat16()), nn.Parameter(torch.randn(1500))
        monkeypatch.setattr(step_module, "FACTOR_BYTES", limit)
        optimizer = SparseMeZO([table, vector], **{"directions": "per_row", "lr": 1e-3, "seed": 5, **settings})
        numbers = [0.3, -2.0, 1.0] if optimizer.directions == "per_row" else [0.3]
        step = optimizer._perturbation(0, 0)
        parts = [len(list(passes.factored_updates(numbers, 0.0))) for passes in step.passes.values()]
        optimizer.replay_step(0, numbers, [1e-3], [0.1])
        results.append([table.detach(), vector.detach()])
        drawn.append(parts)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert drawn == [[1, 1], [3, 2]]


@needs_two_threads
@pytest.mark.parametrize("name", ["rows", "flips", pytest.param("shared", marks=pytest.mark.slow)])
def test_steps_do_not_depend_on_threads_or_the_kernel(name):
    results = []
    for threads, kernel in ((1, "numba"), (2, "numba"), (2, "torch")):
        torch.set_num_threads(threads)
        model = network(torch.bfloat16)
        optimizer = build(model, **RUNS[name], kernel=kernel)
        results.append((model, run(optimizer, model, 2)))
    assert all(same(results[0][0], model) and record == results[0][1] for model, record in results)


def test_a_tensor_that_no_forward_reads_takes_no_part():
    model = network()
    model.spare = nn.Parameter(torch.ones(3, 3))
    optimizer = build(model, directions="shared", rank=1)
    run(optimizer, model, 2)
    assert optimizer.unread() == ["spare"] and torch.equal(model.spare, torch.ones(3, 3))


def test_in_place_the_weights_come_back_to_the_same_bits():
    model, data = network(torch.bfloat16), batch()
    before, optimizer = copy.deepcopy(model), build(model, directions="shared", rank=2, lr=0.0)
    losses = []
    for _ in range(2):
        optimizer.step(closure_of(optimizer, model, data))
        losses.append(optimizer.last_step.losses)
    assert same(model, before) and losses[0] != losses[1]


def test_rows_of_a_table_are_perturbed_as_the_whole_table_is():
    model = nn.Embedding(40, 8)
    for dtype in (torch.float32, torch.bfloat16):
        table, rows = model.to(dtype).weight, torch.tensor([7, 0, 39, 7])
        optimizer = SparseMeZO([table], rank=3, num_samples=2)
        direction = step_module.Direction(optimizer._perturbation(2, 0), 1, -1.0)
        whole, part = torch.empty(320, dtype=dtype), torch.empty(4, 8, dtype=dtype)
        direction.perturb(table, whole)
        direction.perturb_rows(table, rows, part)
        assert torch.equal(whole.view(40, 8)[rows], part) and not torch.equal(part, table[rows])
    optimizer = SparseMeZO([table], rank=3, directions="per_row")
    with pytest.raises(RuntimeError, match="'parameter 0' is read where its rows cannot be told"):
        step_module.Direction(optimizer._perturbation(0, 0), 0, 1.0).perturb(table, whole)
