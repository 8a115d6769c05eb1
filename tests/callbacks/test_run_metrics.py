"""What is measured around a run, what it leaves, and the bar that shows it."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.callbacks import RunMetrics, SeedCheckpoint
from smezo_pl.callbacks.common import RunProgressBar
from tests.trajectory.runs import (
    Classifier,
    Examples,
    KillAfter,
    KilledError,
    examples,
    fit,
    loss_of,
    make_trainer,
    network,
    same,
)


def score(model: Any, count: int = 16) -> dict[str, float]:
    held_out = examples(2, 16)[:count]
    x, y = torch.stack([e[0] for e in held_out]), torch.tensor([e[1] for e in held_out])
    with torch.no_grad():
        loss = float(loss_of(model, x, y))
    return {"loss": loss, "accuracy": float((model(x).argmax(1) == y).float().mean())}


@pytest.fixture
def result(tmp_path: Path) -> tuple[Path, Classifier, dict[str, Any]]:
    module = Classifier()
    logger = TensorBoardLogger(tmp_path, name="name", version="v")
    fit(tmp_path, module, RunMetrics(), logger=logger, log_every_n_steps=1)
    return tmp_path / "name" / "v", module, json.loads((tmp_path / "name" / "v" / "metrics.json").read_text())


def test_it_measures_the_same_examples_before_and_after(result: tuple[Path, Classifier, dict[str, Any]]) -> None:
    _, module, metrics = result
    assert metrics["before"] == pytest.approx(score(network()), rel=1e-5)
    assert metrics["after"] == pytest.approx(score(module.model), rel=1e-5)
    assert metrics["before"] != metrics["after"]
    assert list(metrics)[:6] == ["task", "model", "steps", "seconds", "before", "after"]
    assert metrics["steps"] == 20 and metrics["model"] == "Sequential" and metrics["seed"] == 7
    assert 0.0 < metrics["seconds"] < 60.0
    assert metrics["hyperparameters"]["lr"] == 1e-2
    assert {"smezo_pl", "torch", "lightning"} <= set(metrics["versions"])
    assert metrics["machine"]["processor"] and metrics["machine"]["kernel"] in ("numba", "torch")
    assert metrics["trained_parameters"] == sum(p.numel() for p in module.parameters())
    assert (
        metrics["parameters"] == {"float32": metrics["trained_parameters"]} and metrics["perturbation"] == "layerwise"
    )


def test_it_leaves_a_picture_and_says_how_to_see_more(
    result: tuple[Path, Classifier, dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, _, _ = result
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    fit(
        tmp_path / "again",
        Classifier(),
        RunMetrics(),
        logger=TensorBoardLogger(tmp_path, name="x"),
        log_every_n_steps=1,
    )
    printed = capsys.readouterr().out
    assert "20 steps in " in printed and "before" in printed and "accuracy" in printed
    assert f"tensorboard --logdir {tmp_path / 'x'}\n" in printed
    assert str(tmp_path / "x" / "version_0" / "metrics.json") in printed


def test_the_training_does_not_notice(tmp_path: Path) -> None:
    with_it, without = Classifier(), Classifier()
    torch.manual_seed(0)
    seen = fit(tmp_path / "a", with_it, RunMetrics())
    state = torch.get_rng_state()
    torch.manual_seed(0)
    other = fit(tmp_path / "b", without)
    assert torch.equal(state, torch.get_rng_state())
    assert same(with_it.model, without.model)
    assert (seen.train, seen.val, seen.seen) == (other.train, other.val, other.seen)


def test_a_resumed_run_keeps_what_was_before(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        fit(tmp_path, Classifier(), KillAfter(13), RunMetrics())
    callback = RunMetrics()
    fit(tmp_path, Classifier(), callback, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    straight = RunMetrics()
    fit(tmp_path / "straight", Classifier(), straight)
    assert callback.result is not None and straight.result is not None
    assert callback.result["before"] == straight.result["before"]
    assert callback.result["after"] == straight.result["after"]
    assert callback._curve.state_dict() == straight._curve.state_dict()


def test_the_last_weights_are_measured_and_no_other_callback_sees_it(tmp_path: Path) -> None:
    module, callback, keep = Classifier(), RunMetrics(table=False), SeedCheckpoint(every_n_steps=3)
    seen = fit(tmp_path, module, callback, keep, max_steps=18)
    assert list(seen.val) == [4, 8, 12, 16]
    assert keep.best_step in seen.val
    assert callback.result is not None and callback.result["after"] == pytest.approx(score(module.model), rel=1e-5)
    assert [point["step"] for point in callback.result["curve"]["held_out"]] == [0, 4, 8, 12, 16, 18]


def test_nothing_is_measured_before_if_not_asked_for(tmp_path: Path) -> None:
    callback = RunMetrics(before=False, table=False)
    fit(tmp_path, Classifier(), callback)
    assert callback.result is not None and callback.result["before"] is None and callback.result["after"] is not None


def test_without_validation_data_there_is_nothing_to_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, Classifier(), RunMetrics(), limit_val_batches=0)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["before"] is metrics["after"] is None
    assert "no validation data to measure with" in capsys.readouterr().out


def test_a_limit_holds_here_too(tmp_path: Path) -> None:
    callback = RunMetrics(table=False)
    fit(tmp_path, Classifier(), callback, limit_val_batches=1)
    assert callback.result is not None
    assert callback.result["before"] == pytest.approx(score(network(), 4), rel=1e-5)


def test_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), RunMetrics(), fast_dev_run=2)
    assert not list(tmp_path.iterdir())


def test_testing_alone_is_left_alone(tmp_path: Path) -> None:
    make_trainer(tmp_path, RunMetrics()).test(Classifier(), Examples())
    assert not list(tmp_path.iterdir())


class Recorder(RunProgressBar):
    """Takes down what bars there are and how far they come."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: dict[Any, tuple[str, float]] = {}
        self.seen: dict[Any, list[int]] = {}

    def _add_task(self, total_batches: float, description: str, visible: bool = True) -> Any:
        task = super()._add_task(total_batches, description, visible)
        self.bars[task] = (description.strip(), total_batches)
        return task

    def _update(self, progress_bar_id: Any, current: int, visible: bool = True, hard: bool = False) -> None:
        self.seen.setdefault(progress_bar_id, []).append(current)
        super()._update(progress_bar_id, current, visible, hard)


@pytest.mark.parametrize("num_dev", [20, 0])
def test_what_is_measured_around_a_run_has_a_bar(
    num_dev: int, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bar = Recorder()
    module = SparseMeZOModule(str(tiny_folder), optimizer=partial(SparseMeZO, lr=1e-4, kernel="torch"))
    data = PromptDataModule("demo", num_train=16, num_dev=num_dev, batch_size=8, eval_batch_size=4)
    trainer = Trainer(
        max_steps=2,
        limit_val_batches=None if num_dev else 0,
        accelerator="cpu",
        callbacks=[RunMetrics(table=False), bar],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    with caplog.at_level(logging.ERROR):
        trainer.fit(module, data)
    measured = [task for task, (name, _) in bar.bars.items() if name == "Measuring"]
    if not num_dev:
        assert not measured
        return
    assert bar.bars[measured[0]] == ("Measuring", 5)
    assert bar.seen[measured[0]] == [1, 2, 3, 4, 5]
    assert bar.progress is not None and not bar.progress.tasks[measured[0]].visible
    assert ("Training", 2) in bar.bars.values()


def test_a_run_that_does_nothing_is_marked(tmp_path: Path) -> None:
    """A metric that rests at the end, after steps that moved it, does not make a run dead; a loss does."""

    class Resting(Classifier):
        begin = 0

        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss(batch) if self.trainer.global_step < self.begin else torch.tensor(0.7)

    def dead(folder: Path, begin: int, objective: str | None, steps: int = 24) -> str | None:
        module, data = Resting(), Examples()
        module.begin, data.objective = begin, objective  # type: ignore[attr-defined]
        make_trainer(folder, RunMetrics(table=False), max_steps=steps).fit(module, data)
        return json.loads((folder / "metrics.json").read_text()).get("dead")  # type: ignore[no-any-return]

    for number, (begin, objective) in enumerate([(0, None), (0, "accuracy"), (3, "lm")]):
        assert "The loss was 0.7 in each" in str(dead(tmp_path / str(number), begin, objective))
    assert dead(tmp_path / "rests", 3, "accuracy") is None
    assert dead(tmp_path / "moves", 24, None) is None
    # a short one
    assert dead(tmp_path / "short", 0, None, 5) == "in none of its 5 steps were the losses finite and different"
    assert dead(tmp_path / "short moves", 1, None, 5) is None
