"""``smezo evaluate``, and the listing of a folder of runs by ``smezo show``."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_pl import PromptDataModule, build
from smezo_pl.cli import main
from smezo_pl.commands import evaluate, show
from smezo_pl.commands.evaluate import ReplayTo
from smezo_pl.commands.weights import apply_main, export_main, replay_main
from smezo_pl.trajectory import TrajectoryError
from smezo_pl.trajectory.log import Trajectory
from tests.test_cli import words
from tests.trajectory.runs import Classifier, Examples, fit, make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run with a validation every second step, and its configuration."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.precision=bf16-true")
        main(words("fit", tiny_folder, *options, "--model.optimizer.lr=1e-2", "--name=one"))
    return folder / "runs" / "one" / "version_0"


def test_the_scores_are_those_of_the_run(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    evaluate.main(["evaluate", str(run), "--every", "2", "--out", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["split"] == "validation" and [row["step"] for row in scores["scores"]] == [0, 2, 4]
    metrics = json.loads((run / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    for name in ("val/loss", "val/accuracy"):
        key = next(k for k in before if name.split("/")[1] in k)
        assert scores["scores"][0][name] == before[key]
        assert scores["scores"][-1][name] == after[key]
    assert len({row["val/loss"] for row in scores["scores"]}) == 3
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["|", "step"] for line in lines)
    assert any(line.endswith("scores.json") for line in lines)


def test_other_data_and_the_test_split(run: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "scores.json"))
    evaluate.main(["evaluate", str(run), "--every", "4", "--split", "test", *out, "--data.num_test=8"])
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert [set(row) >= {"step", "test/loss", "test/accuracy"} for row in scores] == [True, True]
    assert scores[0]["test/accuracy"] * 8 == pytest.approx(round(scores[0]["test/accuracy"] * 8))


def test_an_exported_run_with_a_configuration(run: Path, tmp_path: Path) -> None:
    export_main(["export", str(run), "--out", str(tmp_path / "exported.safetensors")])
    with pytest.raises(TrajectoryError, match=r"config\.yaml: there is no such file; pass --config FILE"):
        evaluate.main(["evaluate", str(tmp_path / "exported.safetensors"), "--every", "4"])
    evaluate.main(
        ["evaluate", str(tmp_path / "exported.safetensors"), "--every", "4", "--config", str(run / "config.yaml")]
    )
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["scores"]) == 2


def test_other_starting_weights_are_refused(
    run: Path, tmp_path: Path, make_tiny_model: Any, tiny_tokenizer: Any
) -> None:
    make_tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(TrajectoryError, match="starts from other weights than these"):
        evaluate.main(["evaluate", str(run), "--every", "2", f"--model.pretrained={tmp_path / 'other'}"])


def test_away_from_home(run: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that the run names is somewhere else on this machine."""
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    shutil.copytree(tiny_folder, home / "models" / "tiny")
    monkeypatch.chdir(home)
    main(words("fit", Path("models/tiny"), "--trainer.max_steps=2", "--model.optimizer.lr=1e-2", "--name=one"))
    shutil.copytree(home / "runs" / "one" / "version_0", tmp_path / "away" / "run")
    monkeypatch.chdir(tmp_path / "away")
    message = r"pretrained='models/tiny'.*run/trajectory\.smezo starts from models/tiny: pass --model with where"
    with pytest.raises(TrajectoryError, match=message):
        evaluate.main(["evaluate", "run", "--every", "2"])
    with pytest.raises(TrajectoryError, match=message):
        replay_main(["replay", "run", "--out", "out"])
    export_main(["export", "run", "--out", "exported.safetensors"])  # it needs no model
    with pytest.raises(TrajectoryError, match="starts from models/tiny: pass --model with where"):
        apply_main(["apply", "exported.safetensors", "--out", "out"])
    with pytest.raises(TrajectoryError, match=r"pretrained='\./nowhere'.*starts from models/tiny"):
        evaluate.main(["evaluate", "run", "--every", "2", "--model", "./nowhere"])
    evaluate.main(["evaluate", "run", "--every", "2", "--model", str(tiny_folder)])
    assert not Path("runs").exists()
    scores = json.loads(Path("run/evaluation.json").read_text())["scores"]
    assert scores[-1]["val/loss"] == json.loads(Path("run/metrics.json").read_text())["after"]["loss"]


@pytest.mark.parametrize("every", ["0", "-3"])
def test_every_must_be_a_number_of_steps(run: Path, every: str) -> None:
    with pytest.raises(ValueError, match=f"--every must be at least 1, got {every}"):
        evaluate.main(["evaluate", str(run), "--every", every])


def test_steps_that_are_scored(run: Path) -> None:
    trajectory = Trajectory.read(run)
    assert evaluate.steps_to_score(trajectory, 3) == [0, 3, 4]
    assert evaluate.steps_to_score(trajectory, 100) == [0, 4]


@pytest.mark.parametrize("settings", [{"mask_update": "constant"}, {"dtype": "bfloat16"}, {"num_samples": 2}], ids=str)
def test_each_score_is_the_validation_of_its_step(tmp_path: Path, settings: dict[str, Any]) -> None:
    from smezo_pl.callbacks import MaskRefresh

    watch = fit(tmp_path, Classifier(**settings), MaskRefresh(every_n_steps=6))
    steps = [0, *sorted(watch.val)]
    scores = evaluate.evaluate(
        Trajectory.read(tmp_path), make_trainer(tmp_path), Classifier(**settings), Examples(), steps, "validation"
    )
    assert {row["step"]: {k: v for k, v in row.items() if k != "step"} for row in scores[1:]} == watch.val


def test_steps_only_go_up(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), max_steps=4)
    replayed = ReplayTo(Trajectory.read(tmp_path))
    trainer, module = make_trainer(tmp_path, replayed), Classifier()
    replayed.target = 3
    trainer.validate(module, Examples(), verbose=False)
    replayed.target = 2
    with pytest.raises(ValueError, match="target must not go down, got 2 after 3"):
        trainer.validate(module, Examples(), verbose=False)


class TestListing:
    """Runs and exported runs below a folder."""

    def test_by_what_they_start_from(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(run, tmp_path / "runs" / "a")
        fit(tmp_path / "runs" / "b", Classifier(), max_steps=4)
        export_main(["export", str(run), "--out", str(tmp_path / "runs" / "exported.safetensors")])
        (tmp_path / "runs" / "model.safetensors").write_bytes(b"something else")
        capsys.readouterr()
        show.main(["show", str(tmp_path / "runs")])
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split(" | ") for line in lines if ".s" in line]
        assert [row[0].strip("| ") for row in rows] == [
            "a/trajectory.smezo",
            "exported.safetensors",
            "b/trajectory.smezo",
        ]
        assert sum("fingerprint" in line for line in lines) == 2
        assert all(row[1].strip() == "4" and row[-1].strip("| ") == "valid" for row in rows)
        show.main(["show", str(tmp_path / "runs"), "--json"])
        assert len(json.loads(capsys.readouterr().out)["runs"]) == 3

    def test_an_unreadable_trajectory_does_not_hide_the_others(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(run, tmp_path / "b")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "trajectory.smezo").write_bytes(b"something else")
        with pytest.raises(SystemExit) as left:
            show.main(["show", str(tmp_path)])
        assert left.value.code == 1
        lines = capsys.readouterr().out.splitlines()
        head, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[2], lines[4]))
        assert head == ["run", "steps", "mask", "lr", "seed", "loss", "bytes", "state"]
        assert row[:5] == ["b/trajectory.smezo", "4", "small 0.8", "0.01", "0"] and " -> " in row[5]
        assert lines[6].startswith(f"{tmp_path / 'a' / 'trajectory.smezo'}") and len(lines) == 7
        with pytest.raises(SystemExit):
            show.main(["show", str(tmp_path), "--json"])
        listed = json.loads(capsys.readouterr().out)
        assert len(listed["runs"]) == len(listed["unreadable"]) == 1

    def test_a_folder_without_any(self, tmp_path: Path) -> None:
        with pytest.raises(TrajectoryError, match=r"hold no trajectory\.smezo and no exported run"):
            show.main(["show", str(tmp_path)])


def test_at_the_top_level(run: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """`smezo_pl.apply` on a loaded model, in one call."""
    import smezo_pl
    from smezo_pl.trajectory.fingerprint import fingerprint, model_tensors

    smezo_pl.export(run, tmp_path / "exported.safetensors")
    model, _ = smezo_pl.load_model(tiny_folder, dtype=torch.bfloat16)
    before = fingerprint(model_tensors(model))
    applied = smezo_pl.apply(model, tmp_path / "exported.safetensors")
    assert (applied.steps, applied.identical) == (4, True)
    assert fingerprint(model_tensors(model)) != before
    with pytest.raises(TrajectoryError, match="starts from other weights"):
        smezo_pl.apply(model, tmp_path / "exported.safetensors")


def test_build_takes_the_configuration_of_a_run(run: Path) -> None:
    assert isinstance(build(run / "config.yaml").datamodule, PromptDataModule)


def test_nan_is_never_the_best_and_an_error_is_best_when_small() -> None:
    nan = float("nan")
    scores = [
        {"step": 0, "val/loss": nan, "val/accuracy": nan, "val/mae": 2.0, "val/f1": nan},
        {"step": 4, "val/loss": 0.7, "val/accuracy": 0.5, "val/mae": nan, "val/f1": nan},
        {"step": 8, "val/loss": 0.6, "val/accuracy": 0.6, "val/mae": 1.0, "val/f1": nan},
    ]
    first, second, last = evaluate.marked(scores)
    assert list(last.values()) == ["8", "0.6000*", "0.6000*", "1.0000*", "nan"]
    assert not any("*" in text for text in (*first.values(), *second.values()))
