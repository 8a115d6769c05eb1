"""S-MeZO beside MeZO, LoRA (AdamW) and zero-shot with SmolLM2-135M on four tasks: one command, resumable.

    python benchmarks/study.py --data-dir DIR [--work runs/study] [--jobs 2]

1. Learning rates: 100 steps on sst2 and rte for each rate of `RATES`; of each method the rate with the lowest mean dev
   loss over the two tasks is taken, for all four tasks.
2. 300 steps of each method on each task at that rate, and zero-shot; the test set is scored with the checkpoint of the
   lowest dev loss, looked at every 100 steps.
3. Table and figure: `benchmarks/results/study.md`, `study.csv`, `study.json`, `study.png`, of what is finished.

Both sweeps are `smezo sweep`: given again, the command skips what is finished and goes on with what was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from common import smollm2_file

RESULTS = Path(__file__).parent / "results"
SEED = 0
BATCH_SIZE = 4
RATES = {"s-mezo": [3e-5, 1e-4], "mezo": [1e-5, 3e-5], "lora": [3e-4, 1e-3]}
# Small batches, few dev examples (all there are of copa) and rte's long texts cut (what is longer than max_length loses
# its beginning): what two cores do in two hours.
TASKS: dict[str, dict[str, int]] = {
    "sst2": {"num_dev": 200, "max_length": 128},
    "copa": {"num_dev": 100, "max_length": 128},
    "trec": {"num_dev": 200, "max_length": 128},
    "rte": {"num_dev": 200, "max_length": 80},
}
TUNED_ON = ("sst2", "rte")
TUNE_STEPS, STEPS = 100, 300


def rate_key(method: str) -> str:
    return "model.first_order.lr" if method == "lora" else "model.optimizer.lr"


def base(data_dir: str, steps: int, callbacks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": {
            "pretrained": str(smollm2_file()),
            "optimizer": {"eps": 1e-3, "sparsity": 0.8, "seed": SEED},
            "first_order": {"seed": SEED},
        },
        "data": {"data_dir": data_dir, "batch_size": BATCH_SIZE, "data_seed": SEED},
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "max_steps": steps,
            "val_check_interval": 100,
            "check_val_every_n_epoch": None,
            "callbacks": callbacks,
        },
    }


def grid(task: str, method: str, rates: list[float]) -> dict[str, list[Any]]:
    lines: dict[str, list[Any]] = {
        ", ".join(["data.task", *(f"data.{name}" for name in TASKS[task])]): [[task, *TASKS[task].values()]],
        "model.method": [method],
    }
    return {**lines, rate_key(method): rates} if rates else lines


def sweep(work: Path, name: str, config: dict[str, Any], grids: list[dict[str, Any]], jobs: int, *more: str) -> Any:
    """Run a sweep, and give its sweep.json."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in (("base.yaml", config), ("grid.yaml", grids)):
        (folder / file).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    words = ["--config", folder / "base.yaml", "--grid", folder / "grid.yaml", "--out", folder, "--jobs", jobs, *more]
    # Two runs of one thread each get more done than one of two threads; the noise does not depend on threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, "-m", "smezo_pl", "sweep", *map(str, words)], env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"the sweep {folder} is not done (status {done.returncode}): the same command goes on")
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))


def tune(work: Path, data_dir: str, jobs: int) -> dict[str, float]:
    """The learning rate of each method, by mean dev loss over `TUNED_ON`."""
    # What there was before training is the same for all.
    callbacks = [
        {"class_path": "smezo_pl.RunMetrics", "init_args": {"before": False}},
        {"class_path": "smezo_pl.SeedCheckpoint", "init_args": {"every_n_steps": 25}},
    ]
    grids = [grid(task, method, rates) for task in TUNED_ON for method, rates in RATES.items()]
    tuned = sweep(work, "tune", base(data_dir, TUNE_STEPS, callbacks), grids, jobs)
    losses: dict[str, dict[float, list[float]]] = {method: {} for method in RATES}
    for run in tuned["runs"]:
        method = run["values"]["model.method"]
        losses[method].setdefault(run["values"][rate_key(method)], []).append(run["result"]["after"]["loss"])
    return {method: min(rates, key=lambda lr: sum(rates[lr])) for method, rates in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with {task}/{split}*.parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    given = parser.parse_args()
    rates = tune(given.work, given.data_dir, given.jobs)
    print(f"learning rates: {rates}", flush=True)
    grids = [
        grid(task, method, [rates[method]] if method in rates else [])
        for task in TASKS
        for method in ("zero-shot", *RATES)
    ]
    callbacks = [{"class_path": "smezo_pl.SeedCheckpoint", "init_args": {"every_n_steps": 50}}]
    sweep(given.work, "final", base(given.data_dir, STEPS, callbacks), grids, given.jobs, "--test", "best")


if __name__ == "__main__":
    main()
