"""Folders of runs: each is one run's own, ``last`` and ``best`` mean its files, and a refused run leaves nothing."""

import json
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from smezo_pl import __main__ as script
from smezo_pl.run_folder import RunLogger
from smezo_pl.trajectory.database import WriterLock
from smezo_pl.trajectory.log import Trajectory
from tests.test_cli import words

TWO_STEPS = ("--trainer.max_steps=2", "--trainer.limit_val_batches=1")


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    return stop.value.code, capsys.readouterr().err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one name, and a test after them."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script.main(words("fit", tiny_folder, *TWO_STEPS, "--name=a"))
        script.main(words("fit", tiny_folder, *TWO_STEPS, "--name=a", "--trainer.max_steps=3"))
        script.main(words("test", tiny_folder, "--name=a"))
    return folder


# ---------------------------------------------------------------------- checkpoints by name


@pytest.mark.parametrize(
    ("subcommand", "name"), [("fit", "last"), ("validate", "last"), ("test", "best"), ("predict", "last")]
)
def test_last_and_best_are_files_of_the_newest_run_that_has_them(
    subcommand: str,
    name: str,
    trained: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained)
    script.main(words(subcommand, tiny_folder, "--name=a", f"--ckpt_path={name}", "--trainer.fast_dev_run=1"))
    lines = capsys.readouterr().err.splitlines()
    assert f"cli: checkpoint: runs/a/version_1/checkpoints/{name}.ckpt" in lines
    assert any("restored the weights after" in line for line in lines) or subcommand == "fit"


def test_a_resume_of_last_has_its_file_in_its_configuration(
    trained: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    script.main(words("fit", tiny_folder, "--trainer.max_steps=4", "--name=a", "--ckpt_path=last"))
    newest = max((trained / "runs" / "a").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))
    config = yaml.safe_load((newest / "config.yaml").read_text())
    assert config["ckpt_path"] == "runs/a/version_1/checkpoints/last.ckpt"
    assert Trajectory.read(newest).next_step == 4


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("last", "--ckpt_path last: there is no checkpoints/last.ckpt in runs/a; pass a file, or with --name"),
        ("best", "--ckpt_path best: there is no checkpoints/best.ckpt in runs/a; pass a file, or with --name"),
        ("nowhere.ckpt", "--ckpt_path nowhere.ckpt is no file: pass a file, or last or best"),
        (".", "--ckpt_path . is a folder: pass checkpoints/some.ckpt, or last or best"),
        ("hpc", "--ckpt_path hpc: runs holds no hpc_ckpt_<n>.ckpt"),
        ("registry:model", "--ckpt_path registry:model needs Lightning's model registry: pip install litmodels"),
    ],
)
def test_no_such_checkpoint(
    subcommand: str, given: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "checkpoints").mkdir()
    (here / "checkpoints" / "some.ckpt").write_bytes(b"")
    code, error = refused(words(subcommand, Path("no/model/here"), "--name=a", f"--ckpt_path={given}"), capsys)
    assert code == 2 and f"smezo: error: {message}" in error
    assert not (here / "runs").exists()


def test_the_files_that_there_are_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = here / "runs" / "a" / "version_10" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (here / "runs" / "a" / "version_9").mkdir()
    (checkpoints / "step=3.ckpt").write_bytes(b"")
    code, error = refused(words("fit", Path("no/model"), "--name=a", "--ckpt_path=best"), capsys)
    assert code == 2
    assert "in runs/a/version_10, runs/a/version_9; pass one of runs/a/version_10/checkpoints/step=3.ckpt" in error


def test_a_file_named_last_has_two_readings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "last").write_bytes(b"")
    code, error = refused(words("fit", Path("no/model"), "--ckpt_path=last"), capsys)
    assert code == 2 and "--ckpt_path last could also be the file ./last: pass it with its folder" in error


def test_a_configured_folder_is_the_runs_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs" / "a" / "version_0" / "checkpoints").mkdir(parents=True)
    (here / "runs" / "a" / "version_0" / "checkpoints" / "last.ckpt").write_bytes(b"")
    logger = {"save_dir": "runs", "name": "a", "version": 7}
    for option in (
        "--trainer.logger="
        + json.dumps({"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger}),
        "--trainer.callbacks="
        + json.dumps([{"class_path": "smezo_pl.SeedCheckpoint", "init_args": {"dirpath": "mine"}}]),
        "--trainer.logger=false",
    ):
        code, error = refused(words("fit", Path("no/model"), "--name=a", "--ckpt_path=last", option), capsys)
        assert code == 2 and "there is no checkpoints/last.ckpt in" in error


def test_without_a_checkpoint_it_is_said(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    script.main(["test", "--config=runs/a/version_0/config.yaml", "--trainer.fast_dev_run=1"])
    error = capsys.readouterr().err
    assert "cli: no --ckpt_path: the weights are as pretrained" in error
    assert (
        "smezo_pl test --config runs/a/version_0/config.yaml --ckpt_path runs/a/version_0/checkpoints/best.ckpt"
    ) in error


# ---------------------------------------------------------------------- one folder, one run


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "name" / "version_3").mkdir(parents=True)
    (tmp_path / "name" / "version_4-lock").touch()
    loggers = [RunLogger(tmp_path, name="name") for _ in range(16)]
    threads = [threading.Thread(target=lambda logger=logger: logger.log_dir) for logger in loggers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(logger.version) for logger in loggers) == list(range(4, 20))


def test_variables_in_a_name_are_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER_NAME", "me")
    assert [RunLogger(tmp_path, name="$USER_NAME").log_dir for _ in range(2)] == [
        str(tmp_path / "me" / "version_0"),
        str(tmp_path / "me" / "version_1"),
    ]


FIXED = "--trainer.logger=" + json.dumps(
    {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "logs", "version": "x"}}
)
OWN = "--trainer.callbacks=" + json.dumps([{"class_path": "smezo_pl.SeedCheckpoint", "init_args": {"dirpath": "own"}}])


@pytest.mark.parametrize(
    ("option", "folder"), [(FIXED, "logs/lightning_logs/x"), (OWN, "own"), ("--trainer.logger=false", "runs")]
)
def test_a_folder_that_a_run_writes_is_refused_before_anything_is_written(
    option: str, folder: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / folder).mkdir(parents=True)
    with ExitStack() as stack:
        lock = WriterLock(here / folder)
        stack.callback(lock.close)
        before = files(here)
        code, error = refused(words("fit", Path("no/model"), "--name=a", option), capsys)
        assert code == 1 and f"{folder} is being written by another run" in error
        assert files(here) == before and not (here / "runs" / "a").exists()


@pytest.mark.parametrize("method", ["s-mezo", "linear-probe"])
def test_a_folder_that_holds_a_run_takes_only_that(
    method: str, tiny_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (FIXED, f"--model.method={method}", "--trainer.num_sanity_val_steps=0")
    script.main(words("fit", tiny_folder, *options, *TWO_STEPS))
    script.main(words("fit", tiny_folder, *options[1:], *TWO_STEPS))
    folder = here / "logs" / "lightning_logs" / "x"
    before = files(here)
    for more in ((), ("--ckpt_path=runs/demo/version_0/checkpoints/last.ckpt",)):
        code, error = refused(words("fit", tiny_folder, *options, *more), capsys)
        assert code == 1 and "logs/lightning_logs/x holds another run: resume that with --ckpt_path" in error
        assert files(here) == before
    script.main(words("fit", tiny_folder, *options, "--trainer.max_steps=3", "--ckpt_path=last"))
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 3


@pytest.mark.parametrize("option", ["--data.task=nothing", "--trainer.precision=16-mixed"])
def test_a_run_that_never_began_leaves_no_folder(
    option: str, tiny_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "runs" / "a" / "version_0").mkdir(parents=True)
    with pytest.raises((SystemExit, Exception)):
        script.main(words("fit", tiny_folder, "--name=a", option))
    with pytest.raises((SystemExit, Exception)):
        script.main(words("test", tiny_folder, "--name=b", "--data.test_file=nowhere.jsonl"))
    assert [path.relative_to(here) for path in here.rglob("*")] == [
        Path("runs"),
        Path("runs/a"),
        Path("runs/a/version_0"),
    ]


def test_a_resume_that_is_refused_when_weights_are_restored_leaves_no_folder(
    tiny_folder: Path, trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = trained / "runs" / "a" / "version_1" / "checkpoints" / "last.ckpt"
    more = "--trainer.max_steps=5", "--trainer.precision=bf16-true", f"--ckpt_path={last}"
    status, error = refused(words("fit", tiny_folder, *more), capsys)
    assert status == 1 and "was trained in float32 and is bfloat16 here" in error
    assert "to resume" not in error  # by the same command, which would be refused again
    assert list(here.rglob("*")) == [here / "runs"]


@pytest.mark.slow
def test_two_processes_under_one_name(tiny_folder: Path, here: Path) -> None:
    arguments = [
        words("fit", tiny_folder, *TWO_STEPS, "--name=two", f"--model.optimizer.seed={seed}") for seed in (1, 2)
    ]
    processes = [subprocess.Popen([sys.executable, "-m", "smezo_pl", *each]) for each in arguments]
    assert [process.wait() for process in processes] == [0, 0]
    seeds = set()
    for run in sorted((here / "runs" / "two").iterdir()):
        config = yaml.safe_load((run / "config.yaml").read_text())
        seed = config["model"]["optimizer"]["init_args"]["seed"]
        assert json.loads((run / "metrics.json").read_text())["seed"] == seed
        seeds.add(seed)
    assert seeds == {1, 2}
