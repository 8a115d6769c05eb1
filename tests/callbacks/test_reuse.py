"""Callbacks, modules and Trainers that are used again, and callbacks of others that write weights."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from smezo_pl.callbacks import MaskRefresh, RunMetrics, SeedCheckpoint, WeightCheckpoint, ZerothOrderMonitor
from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.recorder import record
from smezo_pl.trajectory.replaying import replay
from tests.trajectory.runs import Classifier, Examples, bits, fit, make_trainer, network, same

LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"


def test_callbacks_begin_anew_with_a_second_trainer(tmp_path: Path) -> None:
    """What the second run leaves is what callbacks of its own leave, and the first run's files stay."""
    again = [SeedCheckpoint(every_n_steps=3), RunMetrics(table=False), ZerothOrderMonitor(), MaskRefresh(5)]
    fit(tmp_path / "first", Classifier(), *again)
    kept = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*.ckpt")}
    fit(tmp_path / "second", Classifier(seed=1, lr=1e-3), *again, max_steps=8)
    own = [SeedCheckpoint(every_n_steps=3), RunMetrics(table=False), ZerothOrderMonitor(), MaskRefresh(5)]
    fit(tmp_path / "own", Classifier(seed=1, lr=1e-3), *own, max_steps=8)
    assert {path: path.read_bytes() for path in (tmp_path / "first").rglob("*.ckpt")} == kept
    assert again[0].state_dict() | {"place": 0} == own[0].state_dict() | {"place": 0}
    assert list(again[2]._gradients) == list(own[2]._gradients)  # type: ignore[attr-defined]
    one, other = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("second", "own"))
    assert all(one[key] == other[key] for key in ("before", "after", "curve", "steps"))


def test_a_callback_of_a_resumed_run_begins_a_new_one(tmp_path: Path) -> None:
    fit(tmp_path / "first", Classifier(), max_steps=6)
    again = SeedCheckpoint(every_n_steps=3)
    fit(tmp_path / "first", Classifier(), again, max_steps=9, ckpt_path=tmp_path / "first" / LAST)
    fit(tmp_path / "second", Classifier(seed=1), again, max_steps=4)
    assert len(Trajectory.read(tmp_path / "second").records) == 4


def test_a_trainer_makes_one_run(tmp_path: Path) -> None:
    trainer, module = make_trainer(tmp_path, SeedCheckpoint(), max_steps=4), Classifier()
    trainer.fit(module, Examples())
    for other in (module, Classifier()):
        before = bits(other)
        with pytest.raises(MisconfigurationException, match="this Trainer has made 4 steps .* make another Trainer"):
            trainer.fit(other, Examples())
        assert all(torch.equal(a, b) for a, b in zip(before, bits(other), strict=True))


def fitted(folder: Path, module: Classifier) -> None:
    fit(folder, module, max_steps=7)


def without_a_record(folder: Path, module: Classifier) -> None:
    make_trainer(folder, max_steps=5, enable_checkpointing=False).fit(module, Examples())


def restored(folder: Path, module: Classifier) -> None:
    fit(folder, Classifier(), max_steps=7)
    make_trainer(folder).validate(module, Examples(), ckpt_path=folder / LAST, verbose=False)


def written(folder: Path, module: Classifier) -> None:
    with torch.no_grad():
        module.model[0].weight.mul_(0.5)


@pytest.mark.parametrize("change", [fitted, without_a_record, restored, written])
@pytest.mark.parametrize("settings", [{}, {"kernel": "auto"}, {"include": "3.*"}])
def test_a_run_from_changed_weights_can_be_restored(
    tmp_path: Path, change: Callable[..., None], settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    module = Classifier(**settings)
    change(tmp_path / "before", module)
    start = bits(module)
    with caplog.at_level(logging.INFO):
        fit(tmp_path / "run", module, max_steps=8)
    assert "the weights were changed since the network was built" in caplog.text
    trained = bits(module)
    for checkpoint in (LAST, BEST):
        fresh = Classifier(seed=5, **settings)
        make_trainer(tmp_path).validate(fresh, Examples(), ckpt_path=tmp_path / "run" / checkpoint, verbose=False)
    resumed, model = Classifier(**settings), network()
    fit(tmp_path / "elsewhere", resumed, max_steps=11, ckpt_path=tmp_path / "run" / LAST)
    replay(tmp_path / "elsewhere", model, steps=8)
    assert all(torch.equal(a, b) for a, b in zip(bits(model), trained, strict=True))
    model = network()
    replay(tmp_path / "run", model, steps=0)
    assert all(torch.equal(a, b) for a, b in zip(bits(model), start, strict=True))
    straight = Classifier(**settings)
    replay(tmp_path / "run", straight.model)
    assert same(straight, module)


def test_a_run_from_weights_as_built_keeps_none(tmp_path: Path) -> None:
    module = Classifier()
    make_trainer(tmp_path).validate(module, Examples(), verbose=False)
    fit(tmp_path, module, max_steps=3)
    assert not (tmp_path / "anchors").exists()


class Average(Callback):
    """Somebody's own average, scored in place of the weights."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = [p.detach().clone() for p in pl_module.parameters()]
        for p in pl_module.parameters():
            p.data.mul_(0.9)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for p, kept in zip(pl_module.parameters(), self.kept, strict=True):
            p.data.copy_(kept)


class Clip(Callback):
    """Writes weights after the step, or when training ends."""

    def __init__(self, hook: str, write: Callable[[torch.nn.Parameter], None]) -> None:
        setattr(self, hook, lambda trainer, module, *_: trainer.global_step >= 3 and write(module.model[3].weight))


def in_place(parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        parameter[0, 1] = 7.0  # not one of the few elements that are compared


def past_torch(parameter: torch.nn.Parameter) -> None:
    parameter.data.clamp_(-1e-3, 1e-3)


def replaced(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data * 0.5


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("write", [in_place, past_torch, replaced])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_batch_start", "on_train_end"])
def test_weights_that_somebody_else_writes_are_noticed(
    tmp_path: Path, kernel: str, hook: str, write: Callable[..., None]
) -> None:
    with pytest.raises(TrajectoryError, match=r"steps something other than the optimizer wrote '3.weight'"):
        fit(tmp_path, Classifier(kernel=kernel), Clip(hook, write), max_steps=8)
    last = Trajectory.read(tmp_path).next_step
    assert last == (8 if hook == "on_train_end" else 3)
    replay(tmp_path, network())


def test_other_weights_are_not_scored(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="after 4 steps something other than the optimizer wrote"):
        fit(tmp_path, Classifier(), Average())


def test_a_loop_of_ones_own_notices_them_too(tmp_path: Path) -> None:
    model = network()
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-2, kernel="torch")
    with record(optimizer, tmp_path / "run.smezo"):
        optimizer.step(lambda: model[0].weight.sum())
        past_torch(model[0].weight)
        with pytest.raises(TrajectoryError, match=r"after 1 steps something other than the optimizer wrote '0.weight'"):
            optimizer.step(lambda: model[0].weight.sum())


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (EMAWeightAveraging(decay=0.5), "EMAWeightAveraging gives .* use WeightCheckpoint in place of SeedCheckpoint"),
        (StochasticWeightAveraging(1e-2), "StochasticWeightAveraging writes weights after they were validated"),
        (ModelPruning("l1_unstructured", amount=0.5), "ModelPruning writes weights after they were validated"),
    ],
)
def test_averages_and_pruning_are_refused(tmp_path: Path, other: Callback, reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=reason):
        fit(tmp_path, Classifier(), other)
    assert not any(tmp_path.rglob("*.*"))


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_an_average_is_saved_scored_and_resumed_with_whole_weights(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [EMAWeightAveraging(decay=0.5), RunMetrics(table=False), WeightCheckpoint(every_n_steps=3)]

    module = Classifier()
    make_trainer(tmp_path, *callbacks()).fit(module, Examples())
    after = json.loads((tmp_path / "metrics.json").read_text())["after"]
    fresh = Classifier(seed=3)
    scores = make_trainer(tmp_path).validate(fresh, Examples(), ckpt_path=tmp_path / LAST, verbose=False)
    assert same(fresh, module)
    assert scores[0]["val/loss"] == pytest.approx(after["loss"])
    make_trainer(tmp_path / "part", *callbacks(), max_steps=10).fit(Classifier(), Examples())
    resumed = Classifier(seed=3)
    make_trainer(tmp_path / "rest", *callbacks()).fit(resumed, Examples(), ckpt_path=tmp_path / "part" / BEST)
    assert json.loads((tmp_path / "rest" / "metrics.json").read_text())["steps"] == 20


class Keeps(Callback):
    """Has a copy of the weights in its state."""

    def __init__(self, value: Callable[[LightningModule], Any]) -> None:
        self.value = value

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.module = pl_module

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.value(self.module)}


def test_a_checkpoint_without_weights_never_holds_weights(tmp_path: Path) -> None:
    copies: list[Callable[[LightningModule], Any]] = [
        lambda module: module.state_dict(),
        lambda module: [(p.detach().half(),) for p in module.parameters()],
        lambda module: torch.zeros(1 << 17),
    ]
    for number, copy in enumerate(copies):
        with pytest.raises(
            TrajectoryError, match=r"would hold a tensor of shape .*\['callbacks'\]\['Keeps'\]\['kept'\]"
        ):
            fit(tmp_path / str(number), Classifier(), Keeps(copy))
        assert not list((tmp_path / str(number)).rglob("*.ckpt"))
    fit(tmp_path / "few", Classifier(), Keeps(lambda module: [torch.zeros(9), 1.0]), max_steps=2)
