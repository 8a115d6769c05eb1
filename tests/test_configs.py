"""Every file in configs/ names real arguments and starts a run, and so does every task."""

import re
from pathlib import Path

import pytest
import yaml

from smezo_pl.cli import main
from smezo_pl.tasks import TASKS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
STARTS = dict(re.findall(r"^\| (\w+) \|.*?\| `(\w+\.yaml)` \|", PAGES, re.MULTILINE))
"""The file that docs/tasks.md starts a task from, by the task's name."""


def test_the_configs_that_are_promised() -> None:
    names = {"quickstart", "fast", "sst2", "boolq", "sst2-16shot", "squad-f1", "lora"}
    assert names | {"opt-13b-rte", "llama-7b-boolq", "roberta-large-sst2"} == {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_command_of_the_pages_uses_it(path: Path) -> None:
    make = {"quickstart": "make quickstart", "fast": "make quickstart CONFIG=configs/fast.yaml"}
    command = make.get(path.stem, f"smezo fit --config configs/{path.name}")
    assert any(line.startswith(command) for line in PAGES.splitlines())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_head_gives_command_and_expectation(path: Path) -> None:
    head = path.read_text().split("\nmodel:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"smezo fit --config configs/{path.name}" in head
    for promised in ("expected", "hardware", "time", "memory"):
        assert re.search(rf"^# ([a-z]+, )*{promised}(, [a-z]+)*: ", head, re.MULTILINE), promised
    assert max(map(len, path.read_text().splitlines())) <= 125


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dev_is_looked_at_as_often_as_the_protocol_says(path: Path) -> None:
    """Five times a run; ten for masked models; the quickstart's two, which are no protocol, four."""
    trainer = yaml.safe_load(path.read_text())["trainer"]
    often = {"quickstart": 4, "fast": 4, "roberta-large-sst2": 10}.get(path.stem, 5)
    assert trainer["max_steps"] == often * trainer["val_check_interval"]
    assert trainer["check_val_every_n_epoch"] is None


def started(config: Path, model: Path, data: Path, *more: str) -> None:
    """One step of fit with a tiny model."""
    few_shot = "  k_shot" in config.read_text()
    main(
        [
            "fit",
            f"--config={config}",
            f"--model.pretrained={model}",
            "--model.optimizer.kernel=torch",
            f"--data.data_dir={data}",
            *(("--data.k_shot=4",) if few_shot else ("--data.num_train=32", "--data.num_dev=16")),
            "--trainer.accelerator=cpu",
            "--trainer.fast_dev_run=1",
            *more,
        ]
    )


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
    started(path, tiny_roberta_folder if "roberta" in path.stem else tiny_folder, task_folder)


@pytest.mark.parametrize("task", TASKS)
def test_task_parses_and_runs(
    task: str, tiny_folder: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started(ROOT / "configs" / STARTS[task], tiny_folder, task_folder, f"--data.task={task}")
