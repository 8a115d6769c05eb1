"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from smezo_pl.__main__ import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- test: ([^>]+) -->\n```python\n(.*?)```", README, re.DOTALL))


def run(name: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "readme"}
    exec(compile(BLOCKS[name], f"README.md ({name})", "exec"), scope)
    return scope


@pytest.mark.parametrize("name", ["plain loop", "Fabric loop"])
def test_loops_train_a_model_in_under_25_lines(name: str) -> None:
    assert len([line for line in BLOCKS[name].splitlines() if line.strip()]) < 25
    scope = run(name)
    assert scope["accuracy"] > 0.85
    assert scope["optimizer"].last_step.loss < 0.6


def test_another_kind_of_model_in_under_30_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS["another model"].splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    scope = run("another model")
    module, x, y = (scope[name] for name in ("module", "x", "y"))
    assert module.loss((x, y)).item() < 0.2 * y.square().mean().item()


def test_a_record_in_any_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run("record")
    assert capsys.readouterr().out.split()[1] == "True"
    trained, again, early = ([p.tolist() for p in scope[n].parameters()] for n in ("model", "again", "early"))
    assert trained == again != early


OWN = dict(re.findall(r"<!-- test: own task, (.+?) -->\n```\w+\n(.*?)```", README, re.DOTALL))


@pytest.mark.parametrize("name", ["mine", "tickets"])
def test_your_own_task(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, text in OWN.items():
        Path(file).write_text(text, encoding="utf-8")
    words = [f"--config={name}.yaml", f"--model.pretrained={tiny_folder}"]
    main(["preview", *words])
    shown = capsys.readouterr().out
    if name == "mine":
        # What the README shows of it, whichever of the two rows is drawn for training.
        assert "Topic:⟦" in shown and "labels of train: 0 ' sports'" in shown
    else:
        assert "This is about⟦" in shown and "labels of train: billing ' billing' 1 (50%)" in shown
    main(["fit", *words, "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--model.optimizer.kernel=torch"])
