"""`benchmarks/squad_f1.py` goes on where it was ended, and its figures are what they are called."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smezo_pl import PromptDataModule, SparseMeZOModule

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "squad_f1.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return runpy.run_path(str(SCRIPT))


def write(folder: Path, right: str) -> Path:
    (folder / "squad").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 20), ("validation", 9)):
        rows = [
            {
                "title": "",
                "context": f"It is {i // 2}." + " room" * (100 if i == 5 else 0),
                "question": f"What is it, {i}?",
                "answers": {"text": [right], "answer_start": [0]},
            }
            for i in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "squad" / f"{split}.parquet")
    return folder


@pytest.fixture
def data_dir(script: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> Path:
    """Questions whose right answer is what the random model writes to one of them, so that steps differ in F1."""
    folder = write(tmp_path / "data", "x")
    file = str(folder / "squad" / "validation.parquet")
    data = PromptDataModule("squad", tokenizer=str(tiny_folder), test_file=file, max_new_tokens=8)
    module = SparseMeZOModule(str(tiny_folder))
    module.configure_model()
    return write(folder, script["measured"](module, data, "test")[0]["answer"])


def test_a_run_in_two_parts_is_the_run_in_one(
    script: dict[str, Any], data_dir: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, steps: int) -> dict[str, Any]:
        work, file = tmp_path / name, tmp_path / f"{name}.json"
        words = f"--data-dir {data_dir} --model {tiny_folder} --work {work} --json {file} --steps {steps} --dev 4"
        words += " --batch-size 4 --rates 0.1 0.2 --tune-steps 3 --eps 0.2"
        monkeypatch.setattr(sys, "argv", ["squad_f1.py", *words.split()])
        script["main"]()
        result: dict[str, Any] = json.loads(file.read_text())
        return result

    run("parts", 4)
    parts, whole = run("parts", 8), run("whole", 8)
    for key in ("tuning", "lr", "train_f1", "before", "after", "held_out"):
        assert parts[key] == whole[key]
    assert whole["steps"] == len(whole["train_f1"]) == 8
    assert {name for row in (*whole["before"], *whole["after"]) for name in row} == {"f1", "em"}  # no text of the data
    assert len(whole["after"]) == whole["held_out"]["f1"]["questions"] == 8  # that on the long passage is left out
    assert whole["held_out"]["f1"]["passages"] == 5
    assert whole["lr"] in (0.1, 0.2) and set(whole["tuning"]) == {"0.1", "0.2"}
    assert len(set(whole["train_f1"])) > 1 and whole["before"] != whole["after"]


def test_the_error_of_a_gain_is_that_of_a_mean_over_passages(script: dict[str, Any]) -> None:
    before, after = np.random.default_rng(1).random((2, 400))
    alone = script["gain"](list(before), list(after), [str(i) for i in range(400)])
    expected = (after - before).std(ddof=1) / 20
    assert alone["gain"] == pytest.approx((after - before).mean(), abs=1e-4)
    assert alone["standard_error"] == pytest.approx(expected, rel=0.05)
    low, high = alone["interval_95"]
    assert (high - low) / 2 == pytest.approx(1.96 * expected, rel=0.1)
    assert alone["better"] + alone["worse"] == 400
    # Questions that rise and fall together count once for their passage.
    copied = script["gain"](list(before.repeat(4)), list(after.repeat(4)), [str(i // 4) for i in range(1600)])
    assert copied["standard_error"] == pytest.approx(expected, rel=0.05) and copied["passages"] == 400
