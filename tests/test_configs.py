"""Every file in configs/ names real arguments and starts a run."""

from pathlib import Path

import pytest
import yaml

from smezo_pl.cli import main
from smezo_pl.tasks import TASKS

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_the_configs_that_are_promised() -> None:
    names = {"quickstart", "sst2", "rte", "boolq", "opt-13b-rte", "llama-7b-boolq", "ablations", "lora"}
    names |= {"roberta-large-sst2"}
    names |= {"squad-f1", "sst2-16shot"} | {task for task in TASKS if task != "demo"}
    assert names <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_head_gives_command_and_expectation(path: Path) -> None:
    head = path.read_text().split("\nmodel:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"smezo fit --config configs/{path.name}" in head
    assert "expected: " in head
    assert max(map(len, path.read_text().splitlines())) <= 125


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dev_is_looked_at_as_often_as_the_protocol_says(path: Path) -> None:
    """Five times a run; ten for masked models; the quickstart, which is no protocol, four."""
    trainer = yaml.safe_load(path.read_text())["trainer"]
    often = {"quickstart": 4, "roberta-large-sst2": 10}.get(path.stem, 5)
    assert trainer["max_steps"] == often * trainer["val_check_interval"]
    assert trainer["check_val_every_n_epoch"] is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_runs(
    path: Path,
    tiny_folder: Path,
    tiny_roberta_folder: Path,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tiny_roberta_folder if "roberta" in path.stem else tiny_folder
    main(
        [
            "fit",
            f"--config={path}",
            f"--model.pretrained={folder}",
            "--model.optimizer.kernel=torch",
            f"--data.data_dir={task_folder}",
            *(("--data.k_shot=4",) if "  k_shot" in path.read_text() else ("--data.num_train=32", "--data.num_dev=16")),
            "--trainer.accelerator=cpu",
            "--trainer.fast_dev_run=1",
        ]
    )
