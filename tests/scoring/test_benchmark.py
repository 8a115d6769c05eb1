"""`benchmarks/scoring.py` measures every kind of task, and its two ways agree."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scoring import main


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A few questions with answers to generate, and sentences with labels."""
    answers = {"text": ["good food"], "answer_start": [0]}
    questions = [
        {"title": "food", "context": "The food was good. " * i, "question": f"What was good {i}?", "answers": answers}
        for i in range(1, 9)
    ]
    sentences = [{"sentence": "the story was nice " * i, "label": i % 2} for i in range(1, 9)]
    for task, rows in (("squad", questions), ("sst2", sentences)):
        (tmp_path / task).mkdir()
        for split in ("train", "validation"):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / task / f"{split}.parquet")
    return tmp_path


def test_a_small_run_prints_and_writes_its_figures(
    data_dir: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = data_dir / "scoring.json"
    words = f"--data-dir {data_dir} --model {tiny_folder} --tasks sst2 squad --json {file}"
    main(["--small", *words.split()])
    written = json.loads(file.read_text())
    scored, generated = written["rows"]
    assert (scored["task"], scored["examples"], scored["plain_examples"]) == ("sst2", 6, 2)
    assert (generated["task"], generated["examples"], generated["plain_examples"]) == ("squad", 6, 3)
    assert scored["max_difference"] < 1e-4 and generated["max_difference"] == 0
    # A shared prompt is read once; an answer has a token at least.
    assert 0 < scored["tokens"] < scored["plain_tokens"] and generated["tokens"] >= 6
    assert written["model"] == "tiny-llama"
    assert f"geometric mean {written['geometric_mean']:.2f}" in capsys.readouterr().out
