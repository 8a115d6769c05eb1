"""Every file in configs/ names real arguments and starts a run."""

from pathlib import Path

import pytest

from smezo_pl.cli import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_the_configs_that_are_promised() -> None:
    names = {"quickstart", "sst2", "rte", "boolq", "opt-13b-rte", "llama-7b-boolq", "ablations", "lora"}
    names |= {"roberta-large-sst2"}
    names |= {"copa", "trec", "multirc", "cola", "squad", "squad-f1", "sst2-16shot"}
    assert names <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_head_gives_command_and_expectation(path: Path) -> None:
    head = path.read_text().split("\nmodel:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"smezo fit --config configs/{path.name}" in head
    assert "expected: " in head
    assert max(map(len, path.read_text().splitlines())) <= 125


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
