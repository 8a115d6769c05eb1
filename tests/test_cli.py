"""The command line: quick to answer, clear about mistakes, and whole runs of every subcommand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from smezo_pl import SparseMeZO, __version__, build, record
from smezo_pl import __main__ as script
from smezo_pl.callbacks import WeightCheckpoint
from smezo_pl.cli import main
from smezo_pl.commands import SUBCOMMANDS
from smezo_pl.parser import suggestion

ROOT = Path(__file__).parent.parent


def words(subcommand: str, model: Path, *more: str) -> list[str]:
    return [
        subcommand,
        f"--model.pretrained={model}",
        "--model.optimizer.kernel=torch",
        "--data.task=demo",
        "--data.num_train=32",
        "--data.num_dev=16",
        "--data.num_test=16",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
        *more,
    ]


# ---------------------------------------------------------------------- dispatch


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from smezo_pl.__main__ import main; main(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in SUBCOMMANDS)


def test_python_m(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smezo_pl", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"smezo_pl {__version__}\n"


def test_misspelt_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["fitt"])
    assert stop.value.code == 2
    assert "unknown subcommand 'fitt'; did you mean 'fit'?" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    """``smezo show RUN --json | head``."""
    model = torch.nn.Linear(4, 4)
    with record(SparseMeZO(model.named_parameters(), kernel="torch"), tmp_path / "trajectory.smezo", model):
        pass
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "smezo_pl", "show", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_public_names_exist() -> None:
    import smezo_pl

    for name in smezo_pl.__all__:
        assert getattr(smezo_pl, name) is not None
    assert set(smezo_pl.__all__) <= set(dir(smezo_pl))
    with pytest.raises(AttributeError, match="module 'smezo_pl' has no attribute 'nothing'"):
        smezo_pl.nothing  # noqa: B018


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"pretraind": "x"}}, "did you mean 'model.pretrained'?"),
        ({"modle": {"pretrained": "x"}}, "did you mean 'model.pretrained'?"),
        ({"model": {"pretrained": "x"}, "data": {"taks": "sst2"}}, "did you mean 'data.task'?"),
        ({"model": {"pretrained": "x"}, "trainer": {"max_stesp": 4}}, "did you mean 'trainer.max_steps'?"),
        ({"model": {"pretrained": "x", "optimizer": {"sparsty": 0.5}}}, "did you mean 'model.optimizer.sparsity'?"),
        (
            {"model": {"pretrained": "x", "optimizer": {"class_path": "smezo_pl.SparseMeZO", "init_args": {"lrr": 1}}}},
            "did you mean 'model.optimizer.lr'?",
        ),
        (
            {"model": {"pretrained": "x", "perturbation": "layer"}},
            "one of 'layerwise', 'in_place'. Got value: layer",
        ),
        (
            {"model": {"pretrained": "x", "optimizer": {"mask": "smal"}}},
            "'random', 'dense' or null. Got value: smal; did you mean 'small'?",
        ),
        (
            {"model": {"pretrained": "x", "optimizer": {"class_path": "torch.optim.Adam"}}},
            "Expected 'torch.optim.Adam' to be a subclass of SparseMeZO",
        ),
        ({"data": {"class_path": "smezo_pl.PromptDataModule"}, "model": {"pretrained": "x"}}, "does not accept option"),
    ],
)
def test_wrong_config(
    config: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={file}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "`smezo fit --help` lists all keys" in error
    assert len(error.splitlines()) <= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.pretraind=x"], "unrecognized arguments: --model.pretraind=x; did you mean 'model.pretrained'?"),
        (
            ["--model.pretrained=x", "--model.optimizer.epz=1"],
            "Option 'epz' is not accepted; did you mean 'model.optimizer.eps'?",
        ),
        (["--model.pretrained=x", "--model.optimizer.lr=abc"], "Expected float. Got value: abc"),
        ([], "smezo: error: --model.pretrained must be given\n`smezo fit --help` lists all keys"),
        (["--model.pretrained=x", "--model.method=lor"], "'zero-shot' or null. Got value: lor; did you mean 'lora'?"),
        (["--model.pretrained=x", "--model.micro_batch_size=abc"], "Expected int or null. Got value: abc"),
        (["--model.pretrained=x", "--model.adapter=5"], "Expected dict or null. Got value: 5"),
        (
            ["--model.pretrained=x", "--model.lr_scheduler=LambdaLR"],
            "the following arguments are required: lr_lambda\n",
        ),
        (["--model.pretrained=x", "--model.lr_scheduler=ReduceLROnPlateau"], "- Multiple subclasses with name ReduceL"),
        (["--config=nowhere.yaml"], "File does not exist"),
    ],
)
def test_wrong_words(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.optimizer.sparsity=1.5"], "sparsity must be in [0, 1), got 1.5"),
        (["--model.optimizer.num_samples=0"], "num_samples must be in [1, 8388608), got 0"),
        (["--model.optimizer.rank=65"], "rank must be in [1, 65), got 65"),
        (["--model.method=s-mezo", "--model.optimizer.rank=1"], "rank=1 needs mask='dense', got 'small'"),
        (["--model.method=r-mezo", "--model.optimizer.rank=1"], "rank=1 needs mask='dense', got 'random'"),
        (
            ["--model.perturbation=in_place", "--model.optimizer.directions=per_row"],
            "perturbation='in_place' perturbs the weights themselves",
        ),
        (["--trainer.strategy=fsdp"], "strategy='fsdp': sharded weights and gradients have no use"),
        (["--trainer.strategy=deepspeed_stage_3"], "'forward_ddp' on several"),
        (["--trainer.strategy=lightning.pytorch.strategies.DeepSpeedStrategy"], "DeepSpeedStrategy': sharded weights"),
        (["--trainer.accelerator=nothing"], "trainer: You selected an invalid accelerator name"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(words("fit", Path("no/model/here"), *arguments))
    assert stop.value.code == 1 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [None, "mezo"])
def test_directions_from_a_file(method: str | None, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    settings = "{rank: 1, directions: per_row, coefficients: moving}"
    file.write_text(f"model: {{pretrained: {tiny_folder}, optimizer: {settings}, method: {method or 'null'}}}")
    cli = build(file, "--data.task=demo", "--trainer.accelerator=cpu")
    cli.model.configure_model()
    found = cli.model.configure_optimizers().settings()
    expected = {"rank": 1, "directions": "per_row", "coefficients": "moving", "mask": "dense"}
    assert {name: found[name] for name in expected} == expected


def test_no_suggestion_where_nothing_is_near() -> None:
    assert suggestion("unrecognized arguments: --qqq=1", ["model.pretrained"]) == ""
    assert suggestion("some other error", ["model.pretrained"]) == ""


def test_errors_of_the_package_come_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(words("fit", Path("./nowhere")))
    assert stop.value.code == 1
    assert "smezo: error: pretrained='nowhere'" in capsys.readouterr().err
    monkeypatch.setenv("SMEZO_TRACEBACK", "1")
    with pytest.raises((FileNotFoundError, OSError), match="nowhere"):
        script.main(words("fit", Path("./nowhere")))


def test_mistakes_in_the_package_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(args: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("smezo_pl.cli.main", wrong)
    with pytest.raises(KeyError):
        script.main(["fit"])


# ---------------------------------------------------------------------- runs


def test_fit_validate_test_predict(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(words("fit", tiny_folder, "--trainer.max_steps=4", "--model.optimizer.lr=0.01", "--name=mine"))
    run = tmp_path / "runs" / "mine" / "version_0"
    assert (run / "config.yaml").is_file()
    assert any(path.name.startswith("events.out.tfevents") for path in run.iterdir())
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["before"] != metrics["after"]
    assert set(metrics["before"]) == {"loss", "accuracy"}
    assert not [path for path in run.rglob("*") if path.is_file() and path.stat().st_size > 300_000]
    printed = capsys.readouterr()
    assert f"models: {tiny_folder}: LlamaForCausalLM" in printed.err
    assert "tensorboard --logdir" in printed.out + printed.err

    # The saved configuration is a configuration, and the checkpoint gives the trained weights.
    checkpoint = next((run / "checkpoints").glob("last*.ckpt"))
    config = ["--config", str(run / "config.yaml")]
    main(["validate", *config, f"--ckpt_path={checkpoint}"])
    trained = next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line)
    main(["validate", *config])
    untrained = next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line)
    assert f"{metrics['after']['loss']:.4f}"[:5] in trained
    assert f"{metrics['before']['loss']:.4f}"[:5] in untrained
    main(["test", *config, f"--ckpt_path={checkpoint}"])
    assert "test/accuracy" in capsys.readouterr().out
    main(["predict", *config, f"--ckpt_path={checkpoint}", "--name=out"])
    lines = (tmp_path / "runs" / "out" / "version_0" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 16
    assert {"index", "prompt", "candidates", "scores", "prediction", "label"} == set(rows[0])


def test_command_line_wins_over_the_checkpoint(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(words("fit", tiny_folder, "--trainer.max_steps=2", "--model.micro_batch_size=2"))
    checkpoint = next(tmp_path.rglob("last*.ckpt"))
    capsys.readouterr()
    main(words("fit", tiny_folder, "--trainer.max_steps=3", "--model.micro_batch_size=5", f"--ckpt_path={checkpoint}"))
    again = yaml.safe_load((tmp_path / "runs" / "demo" / "version_1" / "config.yaml").read_text())
    assert again["model"]["micro_batch_size"] == 5
    assert "not given, so as in" not in capsys.readouterr().err  # the mask neither, which none given stands for


def test_optimizer_by_class_path_and_in_short(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"lr": 0.5, "mask": "dense", "include": ["*q_proj*"]}
    for optimizer in (settings, {"class_path": "smezo_pl.SparseMeZO", "init_args": settings}):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"model": {"pretrained": str(tiny_folder), "optimizer": optimizer}}))
        cli = build(file, "--model.optimizer.eps=0.25", "--data.task=demo", "--trainer.accelerator=cpu")
        cli.model.configure_model()
        group = cli.model.configure_optimizers().param_groups[0]
        assert (group["lr"], group["eps"], group["mask"]) == (0.5, 0.25, "dense")
        assert all("q_proj" in name for name in group["names"])


def test_scheduler_from_the_config(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {
            "pretrained": str(tiny_folder),
            "optimizer": {"kernel": "torch", "lr": 0.1},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": 2}},
        },
        "data": {"task": "demo", "num_train": 32, "num_dev": 8},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_progress_bar": False},
    }
    config["trainer"] |= {"enable_checkpointing": False, "enable_model_summary": False, "log_every_n_steps": 1}
    cli = build(config)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_build_takes_overrides_with_a_file_only() -> None:
    with pytest.raises(ValueError, match="overrides go with a file; change the dict instead"):
        build({"model": {"pretrained": "x"}}, "--data.task=demo")


def test_print_config_is_a_config(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", f"--model.pretrained={tiny_folder}", "--model.optimizer.lr=0.25", "--print_config"])
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    cli = build(tmp_path / "printed.yaml", "--trainer.accelerator=cpu")
    assert cli.model.pretrained == str(tiny_folder)
    assert yaml.safe_load(text)["model"]["optimizer"]["init_args"]["lr"] == 0.25


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_ci_script_parses() -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_whole_weights_take_the_place_of_a_seed_checkpoint(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = {"class_path": "smezo_pl.callbacks.WeightCheckpoint"}
    cli = build({"model": {"pretrained": str(tiny_folder)}, "trainer": {"accelerator": "cpu", "callbacks": [callback]}})
    assert [type(c) for c in cli.trainer.checkpoint_callbacks] == [WeightCheckpoint]
