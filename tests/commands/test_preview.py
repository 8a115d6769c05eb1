import json
import re
from pathlib import Path

import pytest
import torch

from smezo_pl import models
from smezo_pl.__main__ import main


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a network fails the test."""

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("preview loaded a model")

    # The module first: imported after the other is replaced, it would keep the replacement.
    monkeypatch.setattr("smezo_pl.module.load_network", load)
    monkeypatch.setattr(models, "load_network", load)


def preview(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    main(["preview", f"--model.pretrained={folder}", *words])
    return capsys.readouterr().out


@pytest.mark.usefixtures("no_model")
def test_what_the_model_sees(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"title": f"Story {i}", "topic": int(i % 4 == 0)} for i in range(20)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "data": {
            "task": {"prompt": "{title}\nTopic:", "candidates": {0: " good", 1: " not bad"}, "label": "topic"},
            "train_file": "mine.jsonl",
            "num_train": 12,
            "num_dev": 8,
            "max_length": 8,
        }
    }
    Path("mine.yaml").write_text(json.dumps(config))
    out = preview(capsys, tiny_folder, "--config=mine.yaml", "--examples=2")
    assert out.startswith("task mine: candidates, objective classification, metrics accuracy\n")
    shown = re.findall(r"--- train, line (\d+) of mine.jsonl, (\d+) tokens cut\n(.*?)\n\n", out, re.DOTALL)
    assert len(shown) == 2
    for line, cut, text in shown:
        gold = rows[int(line) - 1]["topic"]
        assert int(cut) > 0
        assert text.startswith("<s>") and "Story" not in text
        assert ("⟧*" in text.split(" ⟦ not")[0]) == (gold == 0)
        assert text.endswith("⟦ not| bad⟧" + "*" * (gold == 1))
    assert re.search(r"train +12 +\d+ +8 +12   *\n|train +12 +\d+ +\d+ +12\n", out)
    counts = re.search(r"labels of train: 0 ' good' (\d+) \((\d+)%\), 1 ' not bad' (\d+)", out)
    assert counts is not None and int(counts[1]) + int(counts[3]) == 12
    assert re.search(r"' not bad': 2 tokens ⟦ not\| bad⟧ \[\d+, \d+\]", out)
    assert not Path("runs").exists()


@pytest.mark.usefixtures("no_model")
def test_what_came_of_the_labels(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"title": f"Story {i}", "label": i % 2} for i in range(8)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for candidates, told in (
        ([" good", " bad"], ['labels of mine.jsonl: 0 -> " good", 1 -> " bad"']),
        ({0: "a", 1: "b"}, []),
    ):
        task = json.dumps({"prompt": "{title}\nTopic:", "candidates": candidates})
        out = preview(capsys, tiny_folder, f"--data.task={task}", "--data.train_file=mine.jsonl")
        assert [line for line in out.splitlines() if line.startswith("labels of mine")] == told


@pytest.mark.usefixtures("no_model")
def test_demonstrations_and_free_text(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("q,a\n" + "".join(f"what is {i},number {i}\n" for i in range(10)))
    task = {"prompt": "{q}?\nAnswer:", "target": "a"}
    words = (f"--data.task={json.dumps(task)}", "--data.train_file=mine.csv", "--data.num_demonstrations=2")
    out = preview(capsys, tiny_folder, *words, "--examples=1")
    assert "task mine: generated text, objective lm, metrics em, f1" in out
    text = out.split("of mine.csv\n")[1].split("\n\n⟦ ⟧")[0]
    assert len(re.findall(r"what is \d\?\nAnswer: number \d\n\n", text)) == 2
    assert text.endswith("⏎⟧*")
    assert "labels of" not in out


def test_without_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["preview", "--model.pretrained=/nowhere/at/all"])
    assert "there is no such folder" in capsys.readouterr().err
    assert torch.get_default_dtype() == torch.float32
