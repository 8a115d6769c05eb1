"""Comparisons of runs from their files alone, finished and not."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from smezo_pl.__main__ import main
from smezo_pl.callbacks import RunMetrics, SeedCheckpoint
from smezo_pl.callbacks.run_metrics import PEAK_MEMORY, STEP_SECONDS
from smezo_pl.commands.compare import RunFacts, compare, labels, read_run, rows_of, run_folders, steps_to
from tests.trajectory.runs import Classifier, KillAfter, KilledError, fit


def finished(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    held_out = [
        {"step": 0, "loss": 0.9, "accuracy": 0.5},
        {"step": 100, "loss": 0.7, "accuracy": 0.8},
        {"step": 200, "loss": 0.6, "accuracy": 0.7},
    ]
    metrics = {
        "task": "sst2",
        "method": "s-mezo",
        "steps": 200,
        "step_seconds": 0.5,
        "peak_memory_bytes": 3 * 2**30,
        "before": {"loss": 0.9, "accuracy": 0.5},
        "after": {"loss": 0.6, "accuracy": 0.7},
        "seed": 0,
        "hyperparameters": {"lr": 1e-4, "mask": "small"},
        "curve": {"train_loss": [[1.0, 1.0], [2.0, 0.9]], "held_out": held_out},
        **changes,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def running(folder: Path) -> Path:
    """What a first-order run leaves until it is done."""
    folder.mkdir(parents=True)
    config = {
        "model": {"method": "lora", "first_order": {"lr": 0.01, "seed": 3}},
        "data": {"task": "sst2"},
        "trainer": {"max_steps": 300},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with SummaryWriter(str(folder)) as writer:
        for step, accuracy in ((0, 0.5), (100, 0.75)):
            writer.add_scalar("val/accuracy", accuracy, step)
            writer.add_scalar("val/loss", 1.0 - accuracy, step)
        for step in (10, 20, 110):
            writer.add_scalar("train/loss", 1.0 / step, step)
            writer.add_scalar(STEP_SECONDS, 0.25, step)
            writer.add_scalar(PEAK_MEMORY, 1.5 * 2**30, step)
    return folder


def test_a_finished_run(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a")
    (folder / "test").mkdir()
    (folder / "test" / "test.json").write_text(json.dumps({"metrics": {"accuracy": 0.66, "loss": 0.61}}))
    run = read_run(folder)
    assert run.finished and run.steps == 200 and run.lr == 1e-4 and run.test == {"accuracy": 0.66, "loss": 0.61}
    (row,) = rows_of([run], "accuracy", [0.8, 0.9, 0.5])
    assert row["accuracy before"] == 0.5 and row["accuracy"] == 0.7 and row["best accuracy"] == 0.8
    assert row["steps to 0.8"] == 100 and row["seconds to 0.8"] == 50.0
    assert row["steps to 0.9"] is None and row["seconds to 0.9"] is None
    assert row["steps to 0.5"] == 0 and row["seconds to 0.5"] == 0.0
    assert row["peak GiB"] == 3.0 and row["test accuracy"] == 0.66


def test_an_unfinished_run(tmp_path: Path) -> None:
    run = read_run(running(tmp_path / "a"))
    assert not run.finished and (run.steps, run.max_steps) == (110, 300)
    assert (run.task, run.method, run.lr, run.seed) == ("sst2", "lora", 0.01, 3)
    assert [step for step, _ in run.held_out] == [0, 100]
    assert run.held_out[1][1] == pytest.approx({"accuracy": 0.75, "loss": 0.25})
    assert run.step_seconds == 0.25 and run.peak_memory == 1.5 * 2**30
    assert len(run.train_loss) == 3


def test_a_run_that_has_not_ended_shows_what_its_callback_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    with pytest.raises(KilledError):
        fit(tmp_path, Classifier(), RunMetrics(), KillAfter(7), logger=logger, log_every_n_steps=1)
    (tmp_path / "run" / "config.yaml").write_text("trainer: {max_steps: 20}\n")
    run = read_run(tmp_path / "run")
    assert not run.finished
    assert run.step_seconds is not None and 0.0 < run.step_seconds < 10.0
    assert run.peak_memory is not None and 2**24 < run.peak_memory < 2**36  # bytes
    assert rows_of([run], "accuracy", [])[0]["peak GiB"] == run.peak_memory / 2**30


def test_a_loss_is_reached_from_above(tmp_path: Path) -> None:
    run = read_run(finished(tmp_path / "a"))
    assert steps_to(run, "loss", 0.7) == 100 and steps_to(run, "loss", 0.5) is None
    assert steps_to(run, "accuracy", 0.8) == 100 and steps_to(run, "f1", 0.1) is None


def test_labels_are_as_short_as_possible() -> None:
    def run(method: str, lr: float, seed: int, task: str = "a") -> RunFacts:
        return RunFacts(Path(f"{method}{lr}{seed}"), task=task, method=method, lr=lr, seed=seed)

    assert labels([run("x", 1.0, 0), run("y", 1.0, 0), run("x", 2.0, 0, "b")]) == ["x", "y", "x"]
    assert labels([run("x", 1.0, 0), run("x", 2.0, 0), run("y", 1.0, 0)]) == ["x, lr 1.0", "x, lr 2.0", "y"]
    assert labels([run("x", 1.0, 0), run("x", 1.0, 1)]) == ["x, seed 0", "x, seed 1"]
    assert labels([run("x", 1.0, 0), run("x", 1.0, 0)]) == ["x (x1.00)", "x (x1.00)"]


def test_table_and_curves_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "runs" / "a")
    finished(tmp_path / "runs" / "z", method="zero-shot", steps=0, step_seconds=None, task="rte")
    running(tmp_path / "runs" / "b")
    out = tmp_path / "new" / "compare"
    main(["compare", str(tmp_path / "runs"), f"--out={out}", "--to=0.75"])
    printed = capsys.readouterr().out
    assert "| s-mezo " in printed and "| 110 of 300 |" in printed and "1 of 3 runs are not finished" in printed
    assert (tmp_path / "new" / "compare.md").read_text() in printed
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "new" / "compare.csv").read_text().splitlines())}
    assert rows["lora"]["seconds to 0.75"] == "25.0" and rows["s-mezo"]["steps to 0.75"] == "100"
    assert (tmp_path / "new" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_trajectory_has_the_steps_before_there_are_events(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        fit(tmp_path, Classifier(), SeedCheckpoint(str(tmp_path / "run")), KillAfter(7))
    (tmp_path / "run" / "config.yaml").write_text("trainer: {max_steps: 20}\n")
    run = read_run(tmp_path / "run")
    assert (run.steps, run.max_steps, run.finished) == (7, 20, False)
    assert [step for step, _ in run.train_loss] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("begin", "level", "objective", "dead"),
    [(0, 0.7, None, True), (3, 0.7, None, True), (3, 0.7, "accuracy", False), (3, 0.0, None, False)],
)
def test_an_unfinished_run_is_dead_as_a_finished_one(
    begin: int, level: float, objective: str | None, dead: bool, tmp_path: Path
) -> None:
    class Resting(Classifier):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss(batch) if self.trainer.global_step < begin else torch.tensor(level)

    with pytest.raises(KilledError):
        fit(tmp_path, Resting(), SeedCheckpoint(str(tmp_path / "run")), KillAfter(begin + 20), max_steps=40)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": {"objective": objective}}))
    assert (read_run(tmp_path / "run").dead is not None) == dead


def test_runs_anywhere_below_a_folder_and_no_other_subcommands(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "runs" / "a" / "version_0"), running(tmp_path / "runs" / "b" / "sweep" / "lr=1")]
    for name, keys in {"version_1": {"verbose": True}, "version_2": {"return_predictions": None}}.items():
        (tmp_path / "runs" / "a" / name).mkdir()
        (tmp_path / "runs" / "a" / name / "config.yaml").write_text(yaml.safe_dump({"model": {}, **keys}))
    (runs[0] / "test").mkdir()
    (runs[0] / "test" / "config.yaml").write_text("verbose: true\n")
    assert run_folders([tmp_path / "runs"]) == run_folders(runs) == runs
    with pytest.raises(ValueError, match="holds no run"):
        run_folders([tmp_path / "runs" / "a" / "version_1"])


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"task": "sst2"}, "sst2"),
        ({"task": {"prompt": "{text}", "name": "mine"}, "train_file": "data/films.jsonl"}, "mine"),
        ({"task": {"prompt": "{text}", "name": None}, "train_file": "data/films.jsonl"}, "films"),
        ({"task": {"prompt": "{text}"}}, "own"),
        ({}, None),
    ],
)
def test_the_name_of_an_unfinished_runs_task(data: dict[str, Any], name: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data, "model": {}}))
    assert read_run(tmp_path).task == name


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is no folder: pass a run's folder"):
        run_folders([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="holds no run"):
        run_folders([tmp_path])
    finished(tmp_path / "a")
    with pytest.raises(ValueError, match=r"--metric 'f1' was measured in none of these runs; there are loss, accuracy"):
        compare([tmp_path / "a"], tmp_path / "out", "f1")
    (tmp_path / "a" / "metrics.json").write_text('{"task": ')
    with pytest.raises(ValueError, match=r"metrics.json cannot be read"):
        read_run(tmp_path / "a")


def test_a_dead_run_is_marked_and_never_the_best(tmp_path: Path) -> None:
    finished(tmp_path / "alive")
    finished(tmp_path / "dead", dead="both losses were equal, so no weight was updated. No weight is active")
    table = compare([tmp_path / "alive", tmp_path / "dead"], tmp_path / "out", targets=[0.8])
    assert "dead: both losses were equal" in table
    with open(tmp_path / "out.csv", newline="") as file:
        alive, dead = csv.DictReader(file)
    assert (alive["best accuracy"], alive["steps to 0.8"], alive["note"]) == ("0.8", "100", "")
    assert (dead["best accuracy"], dead["steps to 0.8"]) == ("", "")


def test_a_metric_that_is_not_finite_is_not_the_best(tmp_path: Path) -> None:
    held_out = [{"step": 0, "loss": 0.9, "accuracy": 0.5}, {"step": 200, "loss": None, "accuracy": None}]
    finished(tmp_path / "run", curve={"train_loss": [], "held_out": held_out})
    compare([tmp_path / "run"], tmp_path / "out", targets=[0.8])
    with open(tmp_path / "out.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["accuracy"], row["best accuracy"], row["steps to 0.8"]) == ("nan", "0.5", "")


def test_an_error_is_best_when_small(tmp_path: Path) -> None:
    held_out = [{"step": 0, "loss": 0.9, "mae": 3.0}, {"step": 100, "loss": 0.8, "mae": 1.0}, {"step": 200, "mae": 2.0}]
    finished(tmp_path / "run", curve={"train_loss": [], "held_out": held_out})
    compare([tmp_path / "run"], tmp_path / "out", "mae", targets=[1.5])
    with open(tmp_path / "out.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["best mae"], row["steps to 1.5"]) == ("1.0", "100")
