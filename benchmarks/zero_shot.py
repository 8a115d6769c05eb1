"""Every task that has data, without training: how well a model does from the prompt alone.

    python benchmarks/zero_shot.py --data-dir DIR --model MODEL --out benchmarks/results

``DIR`` holds ``{task}/{split}*.parquet``. Up to ``--examples`` examples of each task's test split are drawn as MeZO
draws them (seed 0). Written are ``zero_shot.json``, which is added to after every task, so that a second start resumes,
and ``zero_shot.md``. Beside each accuracy stands the share of the most frequent label among the same examples, which
says how much of it a constant answer gets.
"""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import parser_of
from lightning.pytorch import Trainer

from smezo_pl import PromptDataModule, SparseMeZOModule
from smezo_pl.commands.tables import markdown
from smezo_pl.tasks import TASKS
from smezo_pl.trajectory.fingerprint import machine, versions

TEST_FILES = {"drop": "drop/contrast_set.parquet"}
"""Where a folder may hold another labelled set than the task's own test split."""


def data_of(task: str, data_dir: Path, examples: int, rows: int) -> PromptDataModule | None:
    """The task's test examples, None where the folder does not hold them."""
    arguments: dict[str, Any] = {"task": task, "num_test": examples, "eval_batch_size": rows}
    try:
        data = PromptDataModule(data_dir=data_dir, **arguments)
        data.setup("test")
    except FileNotFoundError:
        file = data_dir / TEST_FILES.get(task, "-")
        if not file.is_file():
            return None
        data = PromptDataModule(test_file=str(file), **arguments)
        data.setup("test")
    return data


def measure(task: str, data: PromptDataModule, module: SparseMeZOModule, precision: str) -> dict[str, Any]:
    """One row of the table."""
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begun = time.perf_counter()
    (values,) = trainer.test(module, data, verbose=False)
    examples = data.examples("test")
    labels = Counter(example.label for example in examples)
    fixed = bool(data.task.labels)
    return {
        "task": task,
        "data": "/".join(Path(data.origin("test")).parts[-2:]),
        "examples": len(examples),
        **{name.removeprefix("test/"): round(value, 4) for name, value in values.items()},
        "most_frequent_label": round(max(labels.values()) / len(examples), 4) if fixed else None,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    known = ("task", "data", "examples", "loss", "most_frequent_label", "seconds")
    rows = [
        {name: row[name] for name in ("task", "data", "examples")}
        | {
            "metrics": ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in known),
            "most frequent label": None if row["most_frequent_label"] is None else f"{row['most_frequent_label']:.3f}",
            "loss": f"{row['loss']:.3f}",
        }
        for row in result["rows"]
    ]
    head = f"Zero-shot, {result['model']}, {result['precision']}, seed 0: `python benchmarks/zero_shot.py`\n\n"
    missing = ", ".join(result["without_data"])
    return head + markdown(rows) + (f"\nNo data at hand: {missing}.\n" if missing else "")


def main(args: list[str] | None = None) -> None:
    """Measure every task that is not in the file yet."""
    parser = parser_of(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for zero_shot.json and zero_shot.md")
    parser.add_argument("--examples", type=int, default=200, help="most examples per task")
    parser.add_argument("--written", type=int, default=50, help="most examples per generation task")
    parser.add_argument("--rows", type=int, default=16, help="most rows per forward")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--tasks", nargs="*", default=[name for name in TASKS if name != "demo"])
    parser.add_argument("--again", action="store_true", help="forget what the file holds")
    given = parser.parse_args(args)
    if given.small:
        given.examples = given.written = 4

    path = given.out / "zero_shot.json"
    result: dict[str, Any] = {
        "model": Path(given.model).name,
        "precision": given.precision,
        "asked_examples": given.examples,
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "rows": [],
        "without_data": [],
    }
    if path.is_file() and not given.again:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same = ("model", "precision", "asked_examples")
        if changed := [name for name in same if earlier[name] != result[name]]:
            raise SystemExit(f"{path} was made with another {', '.join(changed)}: --again makes it anew")
        result = earlier
    module = SparseMeZOModule(given.model)
    for task in given.tasks:
        if any(row["task"] == task for row in result["rows"]):
            continue
        count = min(given.examples, given.written) if TASKS[task].is_generation else given.examples
        data = data_of(task, given.data_dir, count, given.rows)
        if data is None:
            result["without_data"] = sorted({*result["without_data"], task})
        else:
            result["rows"].append(measure(task, data, module, given.precision))
            print(result["rows"][-1], flush=True)
        order = list(TASKS)
        result["rows"].sort(key=lambda row: order.index(row["task"]))
        given.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (given.out / "zero_shot.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
