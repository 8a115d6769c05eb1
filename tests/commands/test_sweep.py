"""A sweep as its user sees it: planned, checked, killed, resumed, summed up."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from smezo_pl.__main__ import main
from smezo_pl.commands.sweep import run_all
from smezo_pl.commands.sweep_plan import Run, plan
from smezo_pl.commands.tables import summarize, write_summary
from smezo_pl.trajectory.files import lock_file

ROOT = Path(__file__).parent.parent.parent


def base(folder: Path, **model: Any) -> dict[str, Any]:
    return {
        "model": {"pretrained": str(folder), "optimizer": {"kernel": "torch", "lr": 0.01}, **model},
        "data": {"task": "demo", "num_train": 32, "num_dev": 16, "num_test": 16, "batch_size": 8},
        "trainer": {"accelerator": "cpu", "max_steps": 6, "log_every_n_steps": 1},
    }


def files(tmp_path: Path, config: dict[str, Any], grid: Any) -> list[str]:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return [
        "sweep",
        f"--config={tmp_path / 'base.yaml'}",
        f"--grid={tmp_path / 'grid.yaml'}",
        f"--out={tmp_path / 'out'}",
    ]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that find this package, and the tests."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.usefixtures("here")
def test_killed_resumed_skipped_and_summed_up(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = base(tiny_folder, method="s-mezo")
    config["trainer"]["callbacks"] = [
        {"class_path": "smezo_pl.SeedCheckpoint", "init_args": {"every_n_steps": 2}},
        {
            "class_path": "tests.commands.kill_once.KillOnce",
            "init_args": {"marker": str(tmp_path / "killed"), "step": 5},
        },
    ]
    words = files(tmp_path, config, {"model.optimizer.seed": [0, 1]})
    with pytest.raises(SystemExit) as stop:
        main([*words, "--jobs=2"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "[1/2] seed=0: FAILED in `smezo fit` (status -9)" in printed
    assert "[2/2] seed=1: loss " in printed
    assert "1 of 2 runs failed: seed=0" in printed
    untouched = (tmp_path / "out/seed=1/metrics.json").stat().st_mtime_ns

    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert (
        "[1/2] seed=0: resumes from its checkpoint" in printed and "[2/2] seed=1: finished before, skipped" in printed
    )
    assert (tmp_path / "out/seed=1/metrics.json").stat().st_mtime_ns == untouched
    resumed = json.loads((tmp_path / "out/seed=0/metrics.json").read_text())
    assert resumed["steps"] == 6 and len(resumed["curve"]["train_loss"]) == 6
    assert "restored the weights after 4 steps" in (tmp_path / "out/seed=0/log.txt").read_text()

    # A run that was never killed comes to the same weights, so to the same numbers.
    main(["fit", f"--config={tmp_path / 'out/seed=0/run.yaml'}", f"--trainer.logger.init_args.save_dir={tmp_path}"])
    assert json.loads((tmp_path / "seed=0/metrics.json").read_text())["after"] == resumed["after"]

    summed = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [row["runs"] for row in summed["rows"]] == [2]
    losses = [run["result"]["after"]["loss"] for run in summed["runs"]]
    spread = summed["rows"][0]["measurements"]["loss"]
    assert spread["mean"] == pytest.approx(sum(losses) / 2)
    assert spread["std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert {"accuracy", "step_seconds", "peak_memory_bytes"} <= set(summed["rows"][0]["measurements"])


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_other_methods_and_a_run_that_fails(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [
        {"model.method": ["lora"], "model.first_order.lr": [0.02]},
        {"model.pretrained": ["./nowhere"]},
    ]
    words = files(tmp_path, base(tiny_folder), grid)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--jobs=2", "--test=best"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "method=lora,lr=0.02: loss " in printed and ", test_loss " in printed
    assert "FAILED in `smezo fit` (status 1): smezo: error: pretrained='./nowhere'" in printed
    rows = json.loads((tmp_path / "out/sweep.json").read_text())["rows"]
    assert [row["runs"] for row in rows] == [1, 0]
    assert {"test_loss", "test_accuracy"} <= set(rows[0]["measurements"])
    scored = json.loads((tmp_path / "out/method=lora,lr=0.02/test/test.json").read_text())
    assert scored["checkpoint"].endswith("best.ckpt") and scored["examples"] == 16
    table = (tmp_path / "out/sweep.md").read_text()
    assert "| lora" in table and "0 of 1" in table


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"model.optimizer.lrr": [1]}, "run 'lrr=1': .*did you mean 'model.optimizer.lr'?"),
        ({"data.taks": ["demo"]}, "run 'taks=demo': .*did you mean 'data.task'?"),
        ({"model.optimizer.lr": ["high"]}, "run 'lr=high': .*Got value: high"),
        ({"model.optimizer.lr": [1e-3, -1.0]}, r"run 'lr=-1.0': lr must be in \[0, inf\), got -1.0"),
        ({"data.task": ["sst3"]}, "run 'task=sst3': .*sst3"),
        ({"model.method": ["full"], "model.first_order.lr": [-1.0]}, r"first_order.lr must be in \[0, inf\), got -1.0"),
        ({"model.method": ["adam"]}, "run 'method=adam': .*value: adam"),
        ({"data.task": ["a b", "a-b"]}, "two points of the grid have the same name 'task=a-b'"),
    ],
)
def test_nothing_runs_when_a_point_is_wrong(
    grid: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    words = files(tmp_path, base(tiny_folder), grid)
    import smezo_pl.commands.sweep as command

    with pytest.raises(ValueError, match=message):
        command.sweep(tmp_path / "base.yaml", tmp_path / "grid.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1


def test_dry_run_lists_and_runs_nothing(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = files(tmp_path, base(tiny_folder), {"model.optimizer.seed": [0, 1]})
    with pytest.raises(SystemExit) as stop:
        main([*words, "--dry-run"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines() == ["seed=0: new", "seed=1: new"]
    assert not (tmp_path / "out").exists()


def done(tmp_path: Path, config: dict[str, Any], point: dict[str, Any], after: dict[str, float]) -> Run:
    (run,) = plan(config, [point], tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.json").write_text(json.dumps({"after": after, "steps": 6, "seed": point.get("seed")}))
    return run


def test_a_folder_with_other_settings_is_refused(tmp_path: Path) -> None:
    config = base(tmp_path)
    (run,) = plan(config, [{"model.optimizer.seed": 0}], tmp_path / "out")
    run.folder.mkdir(parents=True)
    (run.folder / "run.yaml").write_text(yaml.safe_dump(run.config))
    plan(config, [{"model.optimizer.seed": 0}], tmp_path / "out")
    config["trainer"]["max_steps"] = 7
    with pytest.raises(ValueError, match=r"holds a run with other settings \(trainer.max_steps: 6 there, 7 now\)"):
        plan(config, [{"model.optimizer.seed": 0}], tmp_path / "out")


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = plan(base(tmp_path), [{"model.optimizer.seed": 0}], tmp_path)
    run.folder.mkdir()
    handle = lock_file(run.folder / "lock")
    assert handle is not None
    assert run_all([run], 1) == []
    assert capsys.readouterr().out == "[1/1] seed=0: another process is working on it, left to that\n"
    os.close(handle)
    handle = lock_file(run.folder / "lock")
    assert handle is not None and os.get_inheritable(handle) is False
    os.close(handle)


def test_mean_and_deviation_by_hand(tmp_path: Path) -> None:
    config = base(tmp_path)
    runs = [
        done(tmp_path, config, {"model.optimizer.lr": lr, "seed": seed}, {"loss": loss, "accuracy": 0.5})
        for lr, seed, loss in ((0.1, 0, 1.0), (0.1, 1, 2.0), (0.1, 2, 6.0), (0.2, 0, 4.0))
    ]
    first, second = summarize(runs)
    assert first["values"] == {"model.optimizer.lr": 0.1} and first["runs"] == first["of"] == 3
    assert first["measurements"]["loss"] == {"mean": 3.0, "std": pytest.approx(7**0.5)}
    assert second["measurements"]["loss"] == {"mean": 4.0, "std": None}
    text = write_summary(runs, tmp_path)
    assert "| 0.1 | 3 of 3 | 3.0000 ± 2.6458 |" in " ".join(text.split())
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [row["loss_mean"] for row in rows] == ["3.0", "4.0"] and rows[1]["loss_std"] == ""


def test_a_dead_run_and_a_metric_that_is_not_finite_are_in_no_mean(tmp_path: Path) -> None:
    config = base(tmp_path)
    runs = [
        done(tmp_path, config, {"model.optimizer.lr": lr, "seed": seed}, {"loss": loss, "accuracy": 0.5})
        for lr, seed, loss in ((0.1, 0, 1.0), (0.1, 1, 2.0), (0.2, 0, None), (0.2, 1, 3.0))
    ]
    path = runs[1].folder / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dead": "no weight is active"}))
    text = " ".join(write_summary(runs, tmp_path).split())
    assert "| 0.1 | 2 of 2, 1 dead | 1.0000 |" in text
    assert "| 0.2 | 2 of 2 | nan ± nan |" in text
    summary = json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert [row["dead"] for row in summary["rows"]] == [1, 0]
    assert [run["result"].get("dead") for run in summary["runs"]] == [None, "no weight is active", None, None]
    assert "dead ones, which did nothing, are left out" in (tmp_path / "sweep.md").read_text()
