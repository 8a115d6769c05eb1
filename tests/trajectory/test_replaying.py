import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smezo_pl.optim import NonFiniteLossError, SparseMeZO
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.recorder import record
from smezo_pl.trajectory.replaying import replay as replay_with
from smezo_pl.trajectory.writes import WriteWatch
from tests.trajectory.runs import examples, loss_of, network, recorded_detour, recorded_run, same

replay = partial(replay_with, kernel="torch")  # nothing to compile

SETTINGS: list[dict[str, Any]] = [
    {},
    {"mask_update": "constant"},
    {"mask": "large"},
    {"mask": "random"},
    {"mask": "random", "mask_update": "constant"},
    {"mask": "dense"},
    {"num_samples": 3, "noise": "rademacher"},
    {"weight_decay": 0.1, "maximize": True},
    {"include": ["0", "3.*"], "dense": "3.bias"},
    {"exclude": "2"},
]


def name_of(settings: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in settings.items()) or "default"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_a_replay_gives_the_weights_of_the_run_bit_for_bit(
    tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    trained, again = network(dtype=dtype), network(dtype=dtype)
    optimizer = recorded_run(tmp_path / "t", trained, **settings)
    replayed = replay(tmp_path / "t", again)
    assert same(trained, again)
    assert not same(trained, network(dtype=dtype))
    assert replayed.thresholds() == optimizer.thresholds()
    assert replayed.steps_done == optimizer.steps_done == 8
    masks = optimizer.packed_masks()
    assert all(torch.equal(bits, masks[name]) for name, bits in replayed.packed_masks().items())


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7])
def test_the_weights_of_any_step(tmp_path: Path, steps: int) -> None:
    recorded_run(tmp_path / "long", network())
    short, again = network(), network()
    recorded_run(tmp_path / "short", short, steps=steps)
    replay(tmp_path / "long", again, steps)
    assert same(short, again)


def test_a_step_that_was_not_taken_cannot(tmp_path: Path) -> None:
    recorded_run(tmp_path / "t", network())
    with pytest.raises(TrajectoryError, match="after 0 to 8 steps, not after 9"):
        replay(tmp_path / "t", network(), 9)


def test_every_kernel_gives_the_same(tmp_path: Path) -> None:
    trained, again = network(dtype=torch.bfloat16), network(dtype=torch.bfloat16)
    recorded_run(tmp_path / "t", trained, kernel="torch")
    replay(tmp_path / "t", again, kernel="auto")
    assert same(trained, again)


@pytest.mark.parametrize("attach", [True, False], ids=["layerwise", "in place"])
@pytest.mark.parametrize("settings", [{}, {"mask_update": "constant"}, {"mask": "random"}], ids=name_of)
def test_tensors_that_take_no_part_and_samples_that_change(
    tmp_path: Path, attach: bool, settings: dict[str, Any]
) -> None:
    trained, again, start = network(), network(), network()
    optimizer = recorded_detour(tmp_path / "t", trained, attach=attach, **settings)
    replayed = replay(tmp_path / "t", again)
    assert same(trained, again)
    assert replayed.num_samples == 2 and replayed.unread() == optimizer.unread() == ["2.weight", "2.bias"]
    for steps, changed in ((3, False), (4, True), (5, True)):
        early = network()
        replay(tmp_path / "t", early, steps)
        assert same(early[2], start[2]) is not changed
    records = Trajectory.read(tmp_path / "t").records
    assert [record.unread for record in records] == [12, 12, 12, 0, 0, 12, 12, 12]
    assert [record.samples for record in records] == [1, 1, 1, 1, 1, 2, 2, 2]


def test_a_trajectory_that_begins_while_tensors_take_no_part(tmp_path: Path) -> None:
    trained, again = network(), network()
    optimizer = recorded_detour(tmp_path / "early", trained, steps=2)
    again.load_state_dict(trained.state_dict())
    x = torch.ones(2, 12)
    with record(optimizer, tmp_path / "late"):
        optimizer.step(lambda: trained[3](torch.tanh(trained[0](x))).square().mean())
    assert [step.unread for step in Trajectory.read(tmp_path / "late").records] == [12]
    replay(tmp_path / "late", again)
    assert same(trained, again)


def test_frozen_and_inference_tensors_are_written_too(tmp_path: Path) -> None:
    trained, again = network(), network()
    recorded_run(tmp_path / "t", trained)
    again.requires_grad_(False)
    with torch.inference_mode():
        replay(tmp_path / "t", again)
    assert same(trained, again)


def test_tensors_by_name_do_as_well(tmp_path: Path) -> None:
    trained, again = network(), network()
    recorded_run(tmp_path / "t", trained)
    replay(tmp_path / "t", dict(again.state_dict()))
    assert same(trained, again)


def test_tied_weights_and_frozen_ones(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        model = network()
        model.append(nn.Linear(3, 3)).append(nn.Linear(3, 3))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            nn.init.normal_(model[4].weight)
            nn.init.zeros_(model[4].bias)
            nn.init.ones_(model[5].bias)
        model[5].weight = model[4].weight
        model[0].weight.requires_grad_(False)
        return model

    trained, again = build(), build()
    recorded_run(tmp_path / "t", trained)
    header = Trajectory.read(tmp_path / "t").header
    assert "0.weight" not in header.active and "0.weight" in {info.name for info in header.tensors}
    replay(tmp_path / "t", again)
    assert same(trained, again)


def test_groups_with_their_own_rates(tmp_path: Path) -> None:
    x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])

    def run(model: nn.Sequential) -> None:
        named = list(model.named_parameters())
        groups = [{"params": named[:2], "eps": 1e-3}, {"params": named[2:], "eps": 3e-3, "lr": 1e-3, "mask": "random"}]
        optimizer = SparseMeZO(groups, lr=1e-2, kernel="torch")
        with record(optimizer, tmp_path / "t", model):
            for step in range(6):
                optimizer.param_groups[1]["eps"] = 3e-3 / (step + 1)
                optimizer.param_groups[1]["sparsity"] = 0.5 + 0.05 * step
                optimizer.step(lambda: loss_of(model, x, y))

    trained, again = network(), network()
    run(trained)
    replay(tmp_path / "t", again)
    assert same(trained, again)


def test_skipped_steps_are_recorded_and_skipped_again(tmp_path: Path) -> None:
    x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
    trained, again = network(), network()
    optimizer = SparseMeZO(trained.named_parameters(), lr=1e-2, kernel="torch", max_skipped=2)
    with record(optimizer, tmp_path / "t", trained):
        optimizer.step(lambda: loss_of(trained, x, y))
        optimizer.step(lambda: float("nan"))
        optimizer.step(lambda: loss_of(trained, x, y))
        optimizer.step(lambda: float("inf"))
        with pytest.raises(NonFiniteLossError):
            optimizer.step(lambda: float("nan"))
    records = Trajectory.read(tmp_path / "t").records
    assert [step.skipped for step in records] == [False, True, False, True, True]  # the last one too, whose step raised
    assert math.isnan(records[1].losses[0][0])
    replay(tmp_path / "t", again)
    assert same(trained, again)


def test_projected_gradients_are_the_ones_that_were_used(tmp_path: Path) -> None:
    model = network()
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, kernel="torch", num_samples=2)
    x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
    used = []
    with record(optimizer, tmp_path / "t", model):
        for _ in range(3):
            optimizer.step(lambda: loss_of(model, x, y))
            used.append(optimizer.last_step)
    records = Trajectory.read(tmp_path / "t").records
    assert [step.projected_gradients for step in records] == [report.projected_gradients for report in used]
    assert [step.losses for step in records] == [report.losses for report in used]


class TestWrongStart:
    """What must not be trained upon is refused, by name."""

    @pytest.fixture(autouse=True)
    def run(self, tmp_path: Path) -> None:
        recorded_run(tmp_path / "t", network())
        self.path = tmp_path / "t"

    def test_other_weights(self) -> None:
        model = network()
        with torch.no_grad():
            model[3].bias.view(torch.int32)[0] ^= 1
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(TrajectoryError, match=r"other weights than these.*1 of 6 tensors differ.*'3\.bias'"):
            replay(self.path, model)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_weights_that_are_left_alone(self, tmp_path: Path) -> None:
        recorded_run(tmp_path / "u", network(), exclude="2")
        model = network()
        nn.init.zeros_(model[2].weight)
        with pytest.raises(TrajectoryError, match=r"'2\.weight'"):
            replay(tmp_path / "u", model)

    def test_other_weights_where_a_person_knows_better(self, caplog: pytest.LogCaptureFixture) -> None:
        model = network(seed=1)
        before = [p.clone() for p in model.parameters()]
        replay(self.path, model, force=True)
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert "starts from other weights than these, applied as asked" in caplog.text

    def test_other_shapes(self) -> None:
        with pytest.raises(
            TrajectoryError, match=r"another model: '0\.weight' has shape \[24, 12\] there, \[8, 12\] here"
        ):
            replay(self.path, network(width=8))

    def test_other_names(self) -> None:
        with pytest.raises(TrajectoryError, match=r"6 of its 6 tensors are not in this one, the first '0\.weight'"):
            replay(self.path, nn.Sequential(network()))

    def test_another_dtype(self) -> None:
        with pytest.raises(TrajectoryError, match=r"'0\.weight' was trained in float32 and is bfloat16 here"):
            replay(self.path, network(dtype=torch.bfloat16))

    def test_weights_that_were_trained_already(self) -> None:
        model = network()
        replay(self.path, model)
        with pytest.raises(TrajectoryError, match="must be built again"):
            replay(self.path, model)


def unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a write through ``.data`` to elements that are not compared."""
    monkeypatch.setattr(WriteWatch, "written", lambda _: None)


def test_weights_that_something_else_changed_are_found_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnoticed(monkeypatch)
    model = network()
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, kernel="torch")
    x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
    with record(optimizer, tmp_path / "t", model) as recorder:
        optimizer.step(lambda: loss_of(model, x, y))
        with torch.no_grad():
            model[3].bias.add_(1.0)
        optimizer.step(lambda: loss_of(model, x, y))
        recorder.mark_weights()
    with pytest.raises(TrajectoryError, match="something other than the optimizer changed weights"):
        replay(tmp_path / "t", network())


def test_and_at_a_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unnoticed(monkeypatch)
    model = network()
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, kernel="torch")
    x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
    with record(optimizer, tmp_path / "t", model):
        optimizer.step(lambda: loss_of(model, x, y))
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        optimizer.refresh_masks()
        optimizer.step(lambda: loss_of(model, x, y))
    with pytest.raises(TrajectoryError, match=r"refresh before step 1 gives '0\.weight' the threshold"):
        replay(tmp_path / "t", network())


class TestRecorder:
    """How a plain loop records."""

    def test_a_loop_resumes_its_trajectory(self, tmp_path: Path) -> None:
        x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
        straight, trained, again = network(), network(), network()
        recorded_run(tmp_path / "straight", straight, steps=8, refresh_at=None)

        def run(model: nn.Sequential, optimizer: SparseMeZO, steps: range) -> None:
            with record(optimizer, tmp_path / "t", model):
                for step in steps:
                    optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step // 3)
                    optimizer.step(lambda: loss_of(model, x, y))

        optimizer = SparseMeZO(trained.named_parameters(), lr=1e-2, seed=7, kernel="torch")
        run(trained, optimizer, range(6))
        replayed = replay(tmp_path / "t", again, 5)
        run(again, replayed, range(5, 8))  # the optimizer that a replay gives trains on
        assert same(again, straight)
        assert Trajectory.read(tmp_path / "t").next_step == 8

    def test_the_trajectory_of_another_run_is_not_continued(self, tmp_path: Path) -> None:
        recorded_run(tmp_path / "t", network())
        model = network()
        with pytest.raises(TrajectoryError, match="holds a run of 8 steps, and this optimizer has not taken its first"):
            record(SparseMeZO(model.named_parameters(), kernel="torch"), tmp_path / "t", model)

    def test_other_settings_are_not_either(self, tmp_path: Path) -> None:
        recorded_run(tmp_path / "t", network())
        model = network()
        optimizer = replay(tmp_path / "t", model)
        optimizer.seed += 1
        with pytest.raises(TrajectoryError, match="with other settings"):
            record(optimizer, tmp_path / "t", model)
        assert Trajectory.read(tmp_path / "t").next_step == 8

    def test_a_setting_that_is_held_once_must_not_change(self, tmp_path: Path) -> None:
        model = network()
        optimizer = SparseMeZO(model.named_parameters(), kernel="torch")
        x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
        with record(optimizer, tmp_path / "t", model):
            optimizer.step(lambda: loss_of(model, x, y))
            optimizer.param_groups[0]["mask"] = "large"
            with pytest.raises(TrajectoryError, match="changed during the run"):
                optimizer.step(lambda: loss_of(model, x, y))
            optimizer.param_groups[0]["mask"] = "small"

    def test_a_trajectory_may_begin_in_the_middle(self, tmp_path: Path) -> None:
        x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
        model = network()
        optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, kernel="torch")
        for _ in range(3):
            optimizer.step(lambda: loss_of(model, x, y))
        middle = network()
        middle.load_state_dict(model.state_dict())
        with record(optimizer, tmp_path / "t", model):
            for _ in range(3):
                optimizer.step(lambda: loss_of(model, x, y))
        replay(tmp_path / "t", middle)
        assert same(model, middle)

    def test_but_not_with_masks_of_weights_that_are_gone(self, tmp_path: Path) -> None:
        x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
        model = network()
        optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, kernel="torch", mask_update="constant")
        optimizer.step(lambda: loss_of(model, x, y))
        with pytest.raises(TrajectoryError, match=r"right after refresh_masks"):
            record(optimizer, tmp_path / "t", model)
        optimizer.refresh_masks()
        record(optimizer, tmp_path / "t", model).close()

    def test_parameters_without_a_model_go_by_the_optimizers_names(self, tmp_path: Path) -> None:
        x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
        trained, again = network(), network()
        optimizer = SparseMeZO(trained.parameters(), lr=1e-2, kernel="torch")
        with record(optimizer, tmp_path / "t"):
            optimizer.step(lambda: loss_of(trained, x, y))
        names = optimizer.param_groups[0]["names"]
        replay(tmp_path / "t", dict(zip(names, (p.detach() for p in again.parameters()), strict=True)))
        assert same(trained, again)

    def test_names_are_the_models_even_if_the_optimizer_has_others(self, tmp_path: Path) -> None:
        x, y = torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()])
        trained, again = network(), network()
        optimizer = SparseMeZO(nn.Sequential(trained).named_parameters(), lr=1e-2, kernel="torch", dense="0.3")
        with record(optimizer, tmp_path / "t", trained):
            optimizer.step(lambda: loss_of(trained, x, y))
        assert Trajectory.read(tmp_path / "t").header.groups[0].dense == ("3.weight", "3.bias")
        replay(tmp_path / "t", again)
        assert same(trained, again)

    def test_a_parameter_that_the_model_does_not_hold_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(TrajectoryError, match=r"'0\.weight' is not one of the model's"):
            record(SparseMeZO(network().named_parameters(), kernel="torch"), tmp_path / "t", network())
