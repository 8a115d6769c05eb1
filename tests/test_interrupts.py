"""Runs that end before their time: status, checkpoint, and a last line that resumes them to the same bits."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from smezo_pl import __main__ as script
from smezo_pl.trajectory.log import Trajectory
from tests.test_cli import words

pytestmark = pytest.mark.filterwarnings("ignore:.*not resumable")


class Ends(Callback):
    """At a batch of the first start of a run a signal comes, or an error."""

    def __init__(self, at: int, kind: str, hook: str = "on_train_batch_start") -> None:
        self.at, self.kind = at, kind
        setattr(self, hook, self.end)

    def end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.at and trainer.is_global_zero and not os.environ.get("RESUMED"):
            if self.kind == "error":
                raise KeyError("a bug")
            if self.kind == "refusal":
                Trajectory.read("nowhere")
            signal.raise_signal(getattr(signal, self.kind))


def fit(model: Path, *more: str) -> None:
    script.main(
        words(
            "fit",
            model,
            "--trainer.max_steps=7",
            "--data.batch_size=8",
            "--data.eval_batch_size=4",
            "--trainer.val_check_interval=3",
            *more,
        )
    )


def ending(at: int, kind: str, hook: str = "on_train_batch_start") -> str:
    arguments = {"at": at, "kind": kind, "hook": hook}
    return "--trainer.callbacks+=" + json.dumps({"class_path": "tests.test_interrupts.Ends", "init_args": arguments})


def outcome(run: Path) -> tuple[str | None, Any]:
    """Hash of the weights after the last step, and the curve."""
    trajectory = Trajectory.read(run)
    assert trajectory.next_step == 7
    return trajectory.final_root, json.loads((run / "metrics.json").read_text())["curve"]


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str | None, Any]:
    """What comes of a run that nothing ends."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(tiny_folder, "--name=whole")
    return outcome(folder / "runs" / "whole" / "version_0")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a folder"  # to be quoted
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder / "runs"


@pytest.fixture(autouse=True)
def obeyed_interrupts() -> Iterator[None]:
    """A shell lets its background jobs ignore SIGINT, and then `Interrupts` does too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("at", "kind", "hook", "steps", "status"),
    [
        (4, "SIGTERM", "on_train_batch_start", 5, 143),
        (4, "SIGINT", "on_train_batch_start", 5, 130),
        (2, "SIGTERM", "on_train_batch_start", 0, 143),  # a validation is due after that step
        (3, "SIGINT", "on_validation_start", 0, 130),
        (5, "error", "on_train_batch_start", 4, 1),
        (4, "refusal", "on_train_batch_end", 3, 1),
    ],
)
def test_the_last_line_resumes_the_run(
    at: int,
    kind: str,
    hook: str,
    steps: int,
    status: int,
    tiny_folder: Path,
    here: Path,
    whole: tuple[str | None, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        fit(tiny_folder, "--name=the run", ending(at, kind, hook))
    assert stop.value.code == status
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    *_, line = capsys.readouterr().err.strip().splitlines()
    command = shlex.split(line)
    assert command[-5:] == [
        "fit",
        "--config",
        "runs/the run/version_0/config.yaml",
        "--ckpt_path",
        "runs/the run/version_0/checkpoints/last.ckpt",
    ]
    assert Trajectory.read(here / "the run" / "version_0").events_of("checkpoint")[-1].steps == steps
    monkeypatch.setenv("RESUMED", "1")
    script.main(command[-5:])
    assert outcome(here / "the run" / "version_1") == whole


def test_a_second_signal_ends_it_at_once(tiny_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(tiny_folder, ending(4, "SIGINT"), ending(4, "SIGINT"))
    assert stop.value.code == 130
    assert Trajectory.read(here / "demo" / "version_0").next_step == 4
    assert "--ckpt_path runs/demo/version_0/checkpoints/last.ckpt" in capsys.readouterr().err.splitlines()[-1]


def test_sigterm_to_one_of_two_processes_ends_both(tiny_folder: Path, here: Path) -> None:
    devices = "--trainer.strategy=forward_ddp", "--trainer.devices=2", "--trainer.val_check_interval=1.0"
    end = ending(3, "SIGTERM", "on_train_batch_end")
    command = [sys.executable, "-m", "smezo_pl", *words("fit", tiny_folder, *devices, "--data.batch_size=4", end)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-2] == "stopped at step 3; to resume:"
    assert done.stderr.endswith(
        "fit --config runs/demo/version_0/config.yaml --ckpt_path runs/demo/version_0/checkpoints/last.ckpt\n"
    )
    assert Trajectory.read(here / "demo" / "version_0").next_step == 3


@pytest.mark.parametrize(("kind", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_predict_ends_at_once(kind: str, status: int, tiny_folder: Path, here: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(words("predict", tiny_folder, ending(0, kind, "on_predict_batch_start")))
    assert stop.value.code == status
    assert not here.exists() or not list(here.rglob("*"))


def test_a_run_without_checkpoints_has_no_such_line(
    tiny_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError, match="a bug"):
        fit(tiny_folder, "--trainer.enable_checkpointing=false", ending(2, "error"))
    assert "resume" not in capsys.readouterr().err
