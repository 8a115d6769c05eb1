"""SQuAD with F1 itself as the objective: does the F1 of held-out questions rise?

    python benchmarks/squad_f1.py --data-dir DIR --model MODEL --json benchmarks/results/squad_f1.json

Training and held-out questions are those on passages of at most ``--longest`` characters, so that a step takes seconds
on a CPU. Every step generates the answers of one batch twice and takes the difference of their F1; no gradient, and no
loss that has one, is involved. Written out: F1, exact match and LM loss of the held-out questions along the run, and
some answers before and after.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback, Trainer

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.callbacks.run_metrics import evaluate
from smezo_pl.evaluation import answers_of
from smezo_pl.trajectory.machine import machine, versions


def short_questions(data_dir: Path, split: str, longest: int, folder: Path) -> Path:
    """A Parquet file of the split's questions on short passages."""
    found = sorted((data_dir / "squad").glob(f"{split}*.parquet"))
    table = pq.read_table(found[0])
    rows = [number for number, text in enumerate(table.column("context").to_pylist()) if len(text) <= longest]
    path = folder / f"squad_{split}.parquet"
    pq.write_table(table.take(rows), path)
    return path


class Curve(Callback):
    """Measures the held-out questions every so many steps and keeps what it found in a file."""

    def __init__(self, every: int, result: dict[str, Any], path: Path) -> None:
        self.every, self.result, self.path = every, result, path
        self.seconds = 0.0
        self.clock = 0.0

    def measure(self, trainer: Trainer, module: pl.LightningModule) -> None:
        values = evaluate(trainer, module)
        point = {"step": trainer.global_step, "seconds": round(self.seconds, 1), **(values or {})}
        self.result["curve"].append({k: round(v, 4) if isinstance(v, float) else v for k, v in point.items()})
        print(self.result["curve"][-1], flush=True)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def answers(self, module: SparseMeZOModule, trainer: Trainer, when: str) -> None:
        batch = next(iter(trainer.val_dataloaders))
        self.result[when] = [
            {"answer": answer.text, "right": list(answer.references)}
            for answer in answers_of(module.model, batch, module.text_tokenizer)[:8]
        ]

    def on_train_start(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        self.answers(pl_module, trainer, "answers_before")
        self.measure(trainer, pl_module)
        self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.clock
        self.result["train_f1"].append(round(1 - float(trainer.callback_metrics["train/loss"]), 4))
        if trainer.global_step % self.every == 0:
            self.measure(trainer, pl_module)
        self.clock = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: pl.LightningModule) -> None:
        self.answers(pl_module, trainer, "answers_after")
        if trainer.global_step % self.every:
            self.measure(trainer, pl_module)
        else:
            self.write()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with squad/train*.parquet")
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--held-out", type=int, default=200, help="held-out questions")
    parser.add_argument("--longest", type=int, default=400, help="most characters of a passage")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--eps", type=float, default=2e-3)
    parser.add_argument("--objective", default="f1")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    folder = given.json.parent / ".squad"
    folder.mkdir(parents=True, exist_ok=True)
    data = PromptDataModule(
        "squad",
        train_file=str(short_questions(given.data_dir, "train", given.longest, folder)),
        dev_file=str(short_questions(given.data_dir, "validation", given.longest, folder)),
        num_dev=given.held_out,
        batch_size=given.batch_size,
        max_new_tokens=given.max_new_tokens,
        objective=given.objective,
        eval_batch_size=given.batch_size,
        data_seed=given.seed,
    )
    module = SparseMeZOModule(
        given.model,
        optimizer=lambda parameters: SparseMeZO(parameters, lr=given.lr, eps=given.eps, seed=given.seed),
        perturbation="in_place",
    )
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    arguments["model"] = Path(given.model).name
    result: dict[str, Any] = {
        "arguments": {name: arguments[name] for name in arguments if name not in ("data_dir", "json")},
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "curve": [],
        "train_f1": [],
    }
    trainer = Trainer(
        max_steps=given.steps,
        accelerator="cpu",
        precision=given.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=10**9,  # measured by the callback
        callbacks=[Curve(given.every, result, given.json)],
    )
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
