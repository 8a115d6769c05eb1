"""Every script of `benchmarks/` runs at its smallest size, and its figures are what they are called."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smezo_pl import PromptDataModule, SparseMeZOModule

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def squad_rows(count: int, answer: str) -> list[dict[str, Any]]:
    return [
        {
            "title": "",
            "context": f"It is {i // 2}." + " room" * (100 if i == 5 else 0),
            "question": f"What is it, {i}?",
            "answers": {"text": [answer], "answer_start": [0]},
        }
        for i in range(count)
    ]


def write(folder: Path, task: str, **splits: list[dict[str, Any]]) -> Path:
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / task / f"{split}.parquet")
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Synthetic questions with answers to generate, and sentences with labels."""
    sentences = [{"sentence": "the story was nice " * (1 + i % 8), "label": i % 2} for i in range(1600)]
    write(tmp_path / "data", "sst2", train=sentences, validation=sentences[:8])
    return write(tmp_path / "data", "squad", train=squad_rows(20, "x"), validation=squad_rows(9, "x"))


@pytest.mark.parametrize(
    ("script", "arguments", "figures"),
    [
        ("passes", "--kernels numba", ["| perturb gaussian", "| update 2 samples, decay", "numba fp32"]),
        ("memory", "", ["| forward", "| in_place, dense", "share_of_weights"]),
        ("scaling", "", ["by model", "by length", "by batch"]),
        ("step", "", ["| two_forwards", "| sparse_reference", "faster than the MeZO loop: "]),
        ("task_step", "--data-dir {data} --model {model}", ["| published", "| our two forwards", "factor "]),
        ("directions", "--data-dir {data} --model {model} --task sst2", ["'step': 1,", "'gain predicted': ", "'s': "]),
        ("trajectory", "--model {model}", ["| replay_equal", "| True", "| resume_seconds"]),
    ],
)
def test_a_small_run_prints_and_writes_its_figures(
    script: str,
    arguments: str,
    figures: list[str],
    data_dir: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "results.json"
    words = arguments.format(data=data_dir, model=tiny_folder).split()
    import_module(script).main(["--small", f"--json={file}", *words])
    printed = capsys.readouterr().out
    assert all(figure in printed for figure in figures)
    written = json.loads(file.read_text())
    assert written["machine"]["threads"] >= 1
    assert not {"goal", "floor", "passed"} & {key for row in written.get("rows", []) for key in row}


def test_runs_that_compare_directions_are_made_once(
    data_dir: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module("direction_runs").main
    words = ["--small", f"--data-dir={data_dir}", f"--model={tiny_folder}", f"--work={tmp_path}"]
    for printed in ("'step': 2", ""):
        main([*words, f"--out={tmp_path / 'out'}"])
        assert printed in (out := capsys.readouterr().out) and bool(printed) == bool(out)
    (file,) = (tmp_path / "out").iterdir()
    assert [point["step"] for point in json.loads(file.read_text())["curve"]] == [0, 1, 2]


def test_zero_shot_resumes(
    data_dir: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = import_module("zero_shot").main
    words = ["--small", f"--data-dir={data_dir}", f"--model={tiny_folder}", f"--out={tmp_path / 'out'}", "--tasks"]
    main([*words, "sst2", "rte"])
    assert "| sst2 | sst2/validation.parquet | 4" in capsys.readouterr().out
    main([*words, "sst2", "squad", "rte"])
    result = json.loads((tmp_path / "out" / "zero_shot.json").read_text())
    assert [row["task"] for row in result["rows"]] == ["sst2", "squad"] and result["without_data"] == ["rte"]
    assert "No data at hand: rte." in (tmp_path / "out" / "zero_shot.md").read_text()


class TestStudy:
    """The sweeps are checked without running; the report is that of the committed runs."""

    def words(self, tmp_path: Path, model: str) -> list[str]:
        return [
            f"--data-dir={tmp_path}",
            f"--model={model}",
            f"--work={tmp_path / 'work'}",
            f"--out={tmp_path / 'out'}",
        ]

    def test_its_sweeps_are_valid(self, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        import_module("study").main(["--small", *self.words(tmp_path, str(tiny_folder))])
        printed = capsys.readouterr().out
        assert printed.count(": new\n") == 12 + 16 and printed.count("not run yet") == 16

    def test_its_report_of_the_committed_runs(self, tmp_path: Path) -> None:
        model = json.loads((RESULTS / "study.json").read_text())["settings"]["model"]
        import_module("study").main(["--report", *self.words(tmp_path, model)])
        for name in ("study.md", "study.csv", "study.json"):
            assert (tmp_path / "out" / name).read_text() == (RESULTS / name).read_text()


class TestSquad:
    """`squad_f1.py` resumes where it was ended."""

    def test_a_run_in_two_parts_is_the_run_in_one(self, tiny_folder: Path, tmp_path: Path) -> None:
        script = import_module("squad_f1")
        data_dir = write(tmp_path / "data", "squad", train=squad_rows(20, "x"), validation=squad_rows(9, "x"))
        # Questions whose gold answer is what the random model writes to one of them, so that steps differ in F1.
        file = str(data_dir / "squad" / "validation.parquet")
        data = PromptDataModule("squad", tokenizer=str(tiny_folder), test_file=file, max_new_tokens=8)
        module = SparseMeZOModule(str(tiny_folder))
        module.configure_model()
        answer = script.measured(module, data, "test")[0]["answer"]
        write(data_dir, "squad", train=squad_rows(20, answer), validation=squad_rows(9, answer))

        def run(name: str, steps: int) -> dict[str, Any]:
            work, file = tmp_path / name, tmp_path / f"{name}.json"
            words = f"--data-dir {data_dir} --model {tiny_folder} --work {work} --json {file} --steps {steps} --dev 4"
            words += " --batch-size 4 --rates 0.1 0.2 --tune-steps 3 --eps 0.2"
            script.main(words.split())
            result: dict[str, Any] = json.loads(file.read_text())
            return result

        run("parts", 4)
        parts, whole = run("parts", 8), run("whole", 8)
        for key in ("tuning", "lr", "train_f1", "before", "after", "held_out"):
            assert parts[key] == whole[key]
        assert whole["steps"] == len(whole["train_f1"]) == 8
        # The results hold no text of the data.
        assert {name for row in (*whole["before"], *whole["after"]) for name in row} == {"f1", "em"}
        assert len(whole["after"]) == whole["held_out"]["f1"]["questions"] == 8  # that on the long passage is left out
        assert whole["held_out"]["f1"]["passages"] == 5
        assert whole["lr"] in (0.1, 0.2) and set(whole["tuning"]) == {"0.1", "0.2"}
        assert len(set(whole["train_f1"])) > 1 and whole["before"] != whole["after"]

    def test_the_error_of_a_gain_is_that_of_a_mean_over_passages(self) -> None:
        gain = import_module("squad_f1").gain
        before, after = np.random.default_rng(1).random((2, 400))
        alone = gain(list(before), list(after), [str(i) for i in range(400)])
        expected = (after - before).std(ddof=1) / 20
        assert alone["gain"] == pytest.approx((after - before).mean(), abs=1e-4)
        assert alone["standard_error"] == pytest.approx(expected, rel=0.05)
        low, high = alone["interval_95"]
        assert (high - low) / 2 == pytest.approx(1.96 * expected, rel=0.1)
        assert alone["better"] + alone["worse"] == 400
        # Questions that rise and fall together count once for their passage.
        copied = gain(list(before.repeat(4)), list(after.repeat(4)), [str(i // 4) for i in range(1600)])
        assert copied["standard_error"] == pytest.approx(expected, rel=0.05) and copied["passages"] == 400
