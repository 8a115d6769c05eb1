"""``smezo show``, ``replay``, ``export`` and ``apply`` on a run of a tiny language model."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from smezo_pl import PromptDataModule, SeedCheckpoint, SparseMeZOModule
from smezo_pl.commands import SUBCOMMANDS
from smezo_pl.models import add_adapter, load_model
from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory import TrajectoryError
from smezo_pl.trajectory.log import Trajectory, TrajectoryWriter
from smezo_pl.trajectory.recorder import Recorder, describe, record
from tests.trajectory.runs import network, recorded_detour, recorded_rows, same

STEPS = 6


def smezo(*words: str | Path) -> None:
    resolve_name(f"smezo_pl.{SUBCOMMANDS[str(words[0])][0]}")([str(word) for word in words])


def train(
    model: Any, folder: Path, steps: int = STEPS, *, name: str | None = None, adapter: Any = None, seed: int = 0
) -> None:
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-3, seed=seed)
    optimizer.attach(model)
    tokens = torch.arange(24).view(2, 12)
    folder.mkdir(parents=True, exist_ok=True)
    header = describe(optimizer, model, pretrained=name, adapter=adapter)
    with Recorder(optimizer, TrajectoryWriter.create(folder / "trajectory.smezo", header), model) as recorder:
        for _ in range(steps):
            optimizer.step(lambda: model(tokens).logits.float().logsumexp(-1).mean())
        recorder.mark_weights()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, torch.nn.Module]:
    model, _ = load_model(tiny_folder, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("runs") / "one"
    train(model, folder, name=str(tiny_folder))
    return folder, model


class TestShow:
    """What a run is."""

    def test_for_a_person(self, run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
        smezo("show", run[0])
        printed = capsys.readouterr().out
        for part in (
            "tiny-llama",
            "bfloat16",
            "6 (0 skipped, 0 mask refreshes)",
            "lr 0.001",
            "kernel numba",
            "yes, every step",
        ):
            assert part in printed
        assert any(bar in printed for bar in "▁▂▃▄▅▆▇█")

    def test_for_a_program(self, run: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
        smezo("show", run[0], "--json")
        facts = json.loads(capsys.readouterr().out)
        assert facts["steps"] == STEPS and facts["sound"] and not facts["writing"]
        rows = Trajectory.read(run[0]).records
        assert facts["loss"] == {
            "first": rows[0].loss,
            "last": rows[-1].loss,
            "least": min(row.loss for row in rows),
        }
        assert facts["weights"] == sum(p.numel() for p in run[1].parameters())
        assert facts["refreshes"] == [0] and facts["lr"] == [1e-3]

    def test_tensors_that_take_no_part_and_samples_that_changed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recorded_detour(tmp_path / "trajectory.smezo", network())
        smezo("show", tmp_path)
        printed = capsys.readouterr().out
        assert "2 of 6 tensors take no part: no forward reads them" in printed and "samples [1, 2]" in printed
        smezo("show", tmp_path, "--json")
        facts = json.loads(capsys.readouterr().out)
        assert (facts["unread"], facts["samples"]) == (2, [1, 2])

    def test_a_direction_per_row(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        recorded_rows(tmp_path / "a" / "trajectory.smezo", network(), kernel="numba", coefficients="moving")
        recorded_detour(tmp_path / "b" / "trajectory.smezo", network(), rank=3)
        smezo("show", tmp_path / "a", tmp_path / "b")
        printed = capsys.readouterr().out
        assert "(1 skipped, 1 mask refreshes); 1 without signal, 12.5%" in printed
        assert "one per row, sign flips; 3 to 4 rows per step; coefficients moving; 1 of 6 tensors have one" in printed
        assert "one for the batch, rank 3; coefficients raw" in printed
        assert "but another groups, directions, rank, coefficients" in printed
        smezo("show", tmp_path)
        printed = capsys.readouterr().out
        assert "small 0.8, per row" in printed and "dense, rank 3" in printed
        smezo("show", tmp_path / "a", "--json")
        facts = json.loads(capsys.readouterr().out)
        assert (facts["rows"], facts["shared"], facts["no_signal"], facts["directions"]) == ([3, 4], 1, 1, "per_row")

    def test_while_it_is_written(
        self, run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(run[0], tmp_path / "copy")
        with TrajectoryWriter.resume(tmp_path / "copy" / "trajectory.smezo"):
            smezo("show", tmp_path / "copy")
        assert "a run is writing it" in capsys.readouterr().out
        smezo("show", tmp_path / "copy")
        assert "a run is writing it" not in capsys.readouterr().out

    def test_a_corrupted_one(self, run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(run[0], tmp_path / "copy")
        connection = sqlite3.connect(tmp_path / "copy" / "trajectory.smezo")
        connection.execute("UPDATE steps SET data = zeroblob(20) WHERE step = 4")
        connection.commit()
        connection.close()
        with pytest.raises(SystemExit) as left:
            smezo("show", tmp_path / "copy")
        assert left.value.code == 1
        assert "up to step 4, which `smezo replay --step` can make; then step 4 is corrupted" in capsys.readouterr().out
        for words in (("replay",), ("replay", "--step", "5"), ("export",), ("export", "--step", "5")):
            with pytest.raises(TrajectoryError, match="step 4 is corrupted"):
                smezo(words[0], tmp_path / "copy", *words[1:], "--out", tmp_path / "out")
        smezo("export", tmp_path / "copy", "--step", "4", "--out", tmp_path / "exported.safetensors")
        smezo("apply", tmp_path / "exported.safetensors", "--out", tmp_path / "applied")
        smezo("replay", tmp_path / "copy", "--step", "4", "--out", tmp_path / "out")
        smezo("replay", run[0], "--step", "4", "--out", tmp_path / "right")
        made = [load_model(tmp_path / name, dtype=torch.bfloat16)[0] for name in ("out", "applied", "right")]
        assert same(made[0], made[2]) and same(made[1], made[2])

    def test_two_of_them(
        self, run: tuple[Path, Any], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, seed, steps in (("longer", 0, STEPS + 2), ("seed", 1, STEPS)):
            train(load_model(tiny_folder, dtype=torch.bfloat16)[0], tmp_path / name, steps, seed=seed)
        train(load_model(tiny_folder, dtype=torch.float32)[0], tmp_path / "dtype")
        smezo("export", run[0], "--out", tmp_path / "t.safetensors")
        capsys.readouterr()
        smezo("show", run[0], tmp_path / "longer", tmp_path / "seed", tmp_path / "dtype", tmp_path / "t.safetensors")
        lines = capsys.readouterr().out.splitlines()
        said = [line.split(": ", 1)[1] for line in lines if " and " in line and line.startswith(str(run[0]))]
        assert said == [
            f"the same in all {STEPS} steps, where one of them ends",
            "the same starting weights, but another seed",
            "they start from different weights",
            f"the same in all {STEPS} steps",
        ]

    def test_the_first_step_that_differs(
        self, run: tuple[Path, Any], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model, _ = load_model(tiny_folder, dtype=torch.bfloat16)
        optimizer = SparseMeZO(model.named_parameters(), lr=1e-3)
        optimizer.attach(model)
        tokens = torch.arange(24).view(2, 12)
        with record(optimizer, tmp_path / "other" / "trajectory.smezo", model):
            for step in range(STEPS):
                optimizer.step(lambda shift=step // 4: model(tokens + shift).logits.float().logsumexp(-1).mean())
        smezo("show", run[0], tmp_path / "other", "--json")
        facts = json.loads(capsys.readouterr().out)
        assert facts["compared_with_the_first"][0]["first_difference"] == 4

    def test_what_a_file_says_cannot_steer_the_terminal(
        self, run: tuple[Path, Any], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(load_model(tiny_folder)[0], tmp_path / "run", 1, name="\x1b[2Jmodel\r")
        smezo("show", tmp_path / "run")
        printed = capsys.readouterr().out
        assert "?[2Jmodel?" in printed and "\x1b" not in printed

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(TrajectoryError, match="no such file or folder"):
            smezo("show", tmp_path / "nowhere")


class TestReplayAndApply:
    """Weights again, as a folder."""

    def test_the_weights_of_a_run(
        self, run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        smezo("replay", run[0], "--out", tmp_path / "model")
        model, tokenizer = load_model(tmp_path / "model", dtype=torch.bfloat16)
        assert same(model, run[1])
        assert tokenizer("the movie").input_ids
        printed = capsys.readouterr().out
        assert f"the weights after {STEPS} steps" in printed and "identical: every bit is as in the run" in printed

    def test_of_an_earlier_step(
        self, run: tuple[Path, Any], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        smezo("replay", run[0], "--step", "2", "--model", tiny_folder, "--out", tmp_path / "model")
        early, _ = load_model(tiny_folder, dtype=torch.bfloat16)
        train(early, tmp_path / "two", 2)
        assert same(load_model(tmp_path / "model", dtype=torch.bfloat16)[0], early)
        assert "stored no hash of its weights at this step" in capsys.readouterr().out

    def test_of_an_exported_one(
        self, run: tuple[Path, Any], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        smezo("export", run[0], "--out", tmp_path / "exported.safetensors")
        assert f"{STEPS} steps" in capsys.readouterr().out
        smezo("apply", tmp_path / "exported.safetensors", "--model", tiny_folder, "--out", tmp_path / "model")
        assert "identical" in capsys.readouterr().out
        assert same(load_model(tmp_path / "model", dtype=torch.bfloat16)[0], run[1])

    def test_of_an_adapter(self, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("peft")
        adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
        model = add_adapter(load_model(tiny_folder)[0], adapter)
        train(model, tmp_path / "run", name=str(tiny_folder), adapter=adapter)
        smezo("replay", tmp_path / "run", "--out", tmp_path / "adapter")
        assert "identical" in capsys.readouterr().out
        from safetensors.torch import load_file

        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
        assert saved.keys() == trained.keys()
        assert all(torch.equal(saved[name], trained[name]) for name in saved)

    def test_on_other_weights(
        self,
        run: tuple[Path, Any],
        tmp_path: Path,
        make_tiny_model: Callable[..., Any],
        tiny_tokenizer: Any,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        make_tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
        tiny_tokenizer.save_pretrained(tmp_path / "other")
        words = ("replay", run[0], "--model", tmp_path / "other", "--out", tmp_path / "model")
        with pytest.raises(TrajectoryError, match="starts from other weights than these"):
            smezo(*words)
        assert not (tmp_path / "model").exists()
        smezo(*words, "--force")
        assert "not the run's weights: they start from others" in capsys.readouterr().out

    def test_weights_that_do_not_come_out_as_they_were(
        self, run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(run[0], tmp_path / "copy")
        with TrajectoryWriter.resume(tmp_path / "copy" / "trajectory.smezo") as writer:
            writer.add_event("weights", root="0" * 64)
        smezo("replay", tmp_path / "copy", "--out", tmp_path / "model")
        printed = capsys.readouterr().out
        assert "NOT the run's weights. The run was made with kernel numba" in printed
        assert "kernel torch gives others again, and the largest difference to it is 0" in printed

    def test_into_a_folder_that_is_in_use(self, run: tuple[Path, Any], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(TrajectoryError, match=r"--out .* exists and is not empty"):
            smezo("replay", run[0], "--out", tmp_path)
        with pytest.raises(ValueError, match=r"--out .* is below a file"):
            smezo("replay", run[0], "--out", tmp_path / "file" / "model")

    def test_without_a_model(self, tiny_folder: Path, tmp_path: Path) -> None:
        train(load_model(tiny_folder)[0], tmp_path / "run", 1)
        with pytest.raises(TrajectoryError, match=r"does not name the model.*pass --model"):
            smezo("replay", tmp_path / "run", "--out", tmp_path / "model")

    @pytest.mark.parametrize(
        "words", [("replay",), ("apply", "x"), ("export", "x"), ("show",), ("replay", "x", "--step", "y")]
    )
    def test_missing_or_wrong_arguments(self, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            smezo(*words)
        assert left.value.code == 2
        assert f"usage: smezo {words[0]}" in capsys.readouterr().err


def test_a_run_of_a_model_fitted_before_is_replayed_exported_and_applied(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SparseMeZOModule(str(tiny_folder), partial(SparseMeZO, lr=1e-2))
    for name in ("first", "second"):
        callback = SeedCheckpoint(str(tmp_path / name))
        Trainer(max_steps=2, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False).fit(
            module, PromptDataModule(num_train=16, num_dev=8, batch_size=4)
        )
    second = tmp_path / "second"
    smezo("replay", second, "--out", tmp_path / "replayed")
    assert "identical: every bit is as in the run" in capsys.readouterr().out
    smezo("export", second, "--out", tmp_path / "run.safetensors")
    assert f"`smezo replay {second} --step 0 --out FOLDER`" in capsys.readouterr().out
    smezo("replay", second, "--step", 0, "--out", tmp_path / "start")
    smezo("apply", tmp_path / "run.safetensors", "--model", tmp_path / "start", "--out", tmp_path / "applied")
    for name in ("replayed", "applied"):
        model, _ = load_model(tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), module.model.parameters(), strict=True))
    with pytest.raises(TrajectoryError, match="model.safetensors is there already and no exported run"):
        smezo("export", second, "--out", tmp_path / "start" / "model.safetensors")
