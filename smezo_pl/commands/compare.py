"""Compare runs: metrics, steps and seconds to given values, seconds per step, peak memory.

Prints a table and writes OUT.md, OUT.csv and OUT.png, with a row of panels per task. Unfinished runs are shown as far
as they are. Seconds to a value are steps times the median seconds per step, so that pauses, validations and checkpoints
do not count.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose, isfinite, nan
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from smezo_pl.callbacks.figures import plain_axes, running_mean
from smezo_pl.callbacks.run_metrics import PEAK_MEMORY, STEP_SECONDS
from smezo_pl.commands.sweep_plan import number
from smezo_pl.commands.tables import as_csv, markdown
from smezo_pl.data.loaders import logged_name
from smezo_pl.methods import METHODS
from smezo_pl.optim.standstill import PATIENCE
from smezo_pl.tasks.metrics import lower_is_better
from smezo_pl.tasks.task import LOSSES
from smezo_pl.trajectory.log import FILE_NAME, Trajectory


@dataclass(frozen=True)
class RunFacts:
    """What a comparison needs of a run."""

    folder: Path
    task: str | None = None
    method: str | None = None  # where none is configured, the mask of the optimizer
    lr: float | None = None
    seed: int | None = None
    steps: int = 0  # done so far
    max_steps: int | None = None  # planned, if known
    finished: bool = False
    held_out: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # step and metrics of each evaluation
    train_loss: list[tuple[float, float]] = field(default_factory=list)  # step and loss
    step_seconds: float | None = None  # median
    peak_memory: float | None = None  # bytes in training
    test: dict[str, float] = field(default_factory=dict)
    dead: str | None = None  # why its last steps did nothing; then nothing of it is the best or reaches a value


def run_folders(paths: Iterable[str | Path]) -> list[Path]:
    """The folders of runs that are meant: a run's own, or those of all runs anywhere below a folder."""
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is no folder: pass a run's folder, such as runs/sst2/version_0")
        if not (inside := _runs_below(path)):
            raise ValueError(
                f"{path} holds no run: neither in it nor below it is a metrics.json, or a config.yaml of `smezo fit`"
            )
        folders |= dict.fromkeys(inside)
    return list(folders)


def _runs_below(path: Path) -> list[Path]:
    if (path / "metrics.json").is_file():
        return [path]
    # The other subcommands save their configurations too, with keys of their own.
    if (config := _read(path / "config.yaml", yaml.safe_load)) and not config.keys() & {
        "verbose",
        "return_predictions",
    }:
        return [path]
    return [run for child in sorted(path.iterdir()) if child.is_dir() for run in _runs_below(child)]


def _task_name(data: Mapping[str, Any]) -> str | None:
    """The task's name in a configuration, as `PromptDataModule` gives it."""
    task, file = data.get("task"), data.get("train_file") or data.get("dev_file") or data.get("test_file")
    own = Path(file).stem if file else "own"
    return str(task.get("name") or own) if isinstance(task, Mapping) else task


def read_run(folder: Path) -> RunFacts:
    """What a run's folder holds at this moment: ``metrics.json`` once it is done, else events and trajectory."""
    config = _read(folder / "config.yaml", yaml.safe_load)
    metrics = _read(folder / "metrics.json", json.loads)
    tests = [_read(path, json.loads) for path in (folder / "test.json", folder / "test" / "test.json")]
    test = {name: number(value) for result in tests for name, value in result.get("metrics", {}).items()}
    finished = bool(metrics)
    metrics = metrics or _metrics_so_far(folder, config)
    settings, curve = metrics.get("hyperparameters") or {}, metrics["curve"]
    return RunFacts(
        folder,
        task=metrics.get("task"),
        method=metrics.get("method") or settings.get("mask"),
        lr=settings.get("lr"),
        seed=metrics.get("seed"),
        steps=metrics["steps"],
        max_steps=(config.get("trainer") or {}).get("max_steps"),
        finished=finished,
        held_out=[(int(p["step"]), {k: number(v) for k, v in p.items() if k != "step"}) for p in curve["held_out"]],
        train_loss=[(float(step), float(loss)) for step, loss in curve["train_loss"]],
        step_seconds=metrics.get("step_seconds"),
        peak_memory=metrics.get("peak_memory_bytes"),
        test=test,
        dead=metrics.get("dead"),
    )


def _metrics_so_far(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``metrics.json`` of an unfinished run would hold, from its configuration, events and trajectory."""
    scalars = _scalars(folder)
    model = config.get("model") or {}
    method = model.get("method")
    first_order = method in METHODS and METHODS[method].order == 1
    settings = model.get("first_order" if first_order else "optimizer") or {}
    settings = settings.get("init_args", settings)
    held_out: dict[int, dict[str, float]] = defaultdict(dict)
    for tag, values in scalars.items():
        if tag.startswith("val/"):
            for step, value in values.items():
                held_out[step][tag.removeprefix("val/")] = value
    train = scalars.get("train/loss", {})
    steps = max([0, *train, *held_out])
    train_loss: list[tuple[float, float]] = sorted(train.items())
    dead = None
    if (folder / FILE_NAME).is_file():
        rows = Trajectory.read(folder / FILE_NAME, damaged=True).records
        steps = max(steps, len(rows))
        moves, data = [any(row.projected_gradients) for row in rows], config.get("data") or {}
        # as in `RunMetrics`: a metric that rests, or a loss of 0, may have been learned
        may_rest = (data.get("objective") or data.get("reward") or LOSSES[0]) not in LOSSES
        may_rest |= not any(loss for row in rows[-PATIENCE:] for pair in row.losses for loss in pair)
        if len(rows) >= PATIENCE and not any(moves[-PATIENCE:]) and not (may_rest and any(moves)):
            dead = f"both losses were equal, or not finite, in the last {PATIENCE} steps"
        train_loss = [(row.step + 1.0, row.loss) for row in rows if row.losses and not row.skipped] or train_loss
    seconds, peak = scalars.get(STEP_SECONDS, {}), scalars.get(PEAK_MEMORY, {})
    return {
        "task": _task_name(config.get("data") or {}),
        "method": method,
        "hyperparameters": settings,
        "seed": settings.get("seed"),
        "steps": steps,
        "step_seconds": seconds[max(seconds)] if seconds else None,
        "peak_memory_bytes": max(peak.values(), default=None),
        "dead": dead,
        "curve": {
            "train_loss": train_loss,
            "held_out": [{"step": step, **held_out[step]} for step in sorted(held_out)],
        },
    }


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Values by step of each of TensorBoard's scalars; of a step that was made twice the later one."""
    if not any(folder.glob("events.out.tfevents*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        for tag in events.Tags()["scalars"]
    }


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The content of a YAML or JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return parse(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def labels(runs: Sequence[RunFacts]) -> list[str]:
    """A label for each run that tells it from the others of its task: method, then lr, then seed, then folder."""
    names = [run.method or run.folder.name for run in runs]
    for part in ("lr", "seed"):
        values: dict[tuple[str | None, str], set[object]] = defaultdict(set)
        for run, name in zip(runs, names, strict=True):
            values[run.task, name].add(getattr(run, part))
        names = [
            f"{name}, {part} {getattr(run, part)}" if len(values[run.task, name]) > 1 else name
            for run, name in zip(runs, names, strict=True)
        ]
    counts = Counter((run.task, name) for run, name in zip(runs, names, strict=True))
    return [
        f"{name} ({run.folder.name})" if counts[run.task, name] > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]


def steps_to(run: RunFacts, metric: str, value: float) -> int | None:
    """The step of the first evaluation that reaches a value, an error from above, everything else from below."""
    sign = -1.0 if lower_is_better(metric) else 1.0
    measured = ((step, metrics[metric]) for step, metrics in run.held_out if metric in metrics)
    return next((step for step, found in measured if isclose(found, value) or sign * found >= sign * value), None)


def rows_of(runs: Sequence[RunFacts], metric: str, targets: Sequence[float]) -> list[dict[str, object]]:
    """One row per run, numbers as numbers, None where there is none yet."""
    rows: list[dict[str, object]] = []
    for run, label in zip(runs, labels(runs), strict=True):
        first = run.held_out[0][1] if run.held_out and run.held_out[0][0] == 0 else {}
        last = run.held_out[-1][1] if run.held_out else {}
        row: dict[str, object] = {"task": run.task, "run": label, "lr": run.lr, "seed": run.seed, "steps": run.steps}
        row["of"] = run.steps if run.finished else run.max_steps
        for name in dict.fromkeys((metric, "loss")):
            row |= {f"{name} before": first.get(name), name: last.get(name)}
        if metric != "loss":
            found = (values.get(metric, nan) for _, values in run.held_out)
            best = min if lower_is_better(metric) else max
            row[f"best {metric}"] = None if run.dead else best(filter(isfinite, found), default=None)
        row |= {f"test {name}": run.test.get(name) for name in dict.fromkeys((metric, "loss"))}
        for target in targets:
            steps = None if run.dead else steps_to(run, metric, target)
            seconds = 0.0 if steps == 0 else steps * run.step_seconds if steps and run.step_seconds else None
            row |= {f"steps to {target:g}": steps, f"seconds to {target:g}": seconds}
        row["seconds a step"] = run.step_seconds
        row["peak GiB"] = None if run.peak_memory is None else run.peak_memory / 2**30
        if any(run.dead for run in runs):
            row["note"] = run.dead and f"dead: {run.dead}"
        rows.append(row)
    return rows


def shown(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """The rows with numbers as text of a fitting precision, without columns that are empty for all runs."""
    names = [name for name in rows[0] if name != "of" and any(row[name] is not None for row in rows)]
    return [{name: _cell(row, name) for name in names} for row in rows]


def _cell(row: Mapping[str, object], name: str) -> object:
    value = row[name]
    if name == "steps" and row["of"] not in (value, None):
        return f"{value} of {row['of']}"
    if not isinstance(value, float) or name == "lr":
        return value
    return f"{value:.0f}" if name.startswith("seconds to") else f"{value:.2f}" if name == "peak GiB" else f"{value:.3f}"


COLORS = ("#2a6fdb", "#e07b1a", "#2f9e62", "#a34fc4", "#c83e4d", "#5b6b7b", "#b08900", "#0f9aa8")
"""Of the runs of a task, in their order; a method keeps its color over the tasks."""


def comparison_figure(runs: Sequence[RunFacts], metric: str, targets: Sequence[float] = ()) -> Figure:
    """One row of panels per task: the metric over steps, the loss over steps, the metric over seconds of training."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    names = labels(runs)
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(dict.fromkeys(names))}
    figure = Figure(figsize=(13.5, 3.5 * len(tasks) + 0.4), layout="constrained", dpi=110)
    for task, panels in zip(tasks, figure.subplots(len(tasks), 3, squeeze=False), strict=True):
        over_steps, losses, over_seconds = panels
        for run, name in zip(runs, names, strict=True):
            if run.task == task:
                _draw(run, name, colors[name], metric, panels)
        for axes in (over_steps, over_seconds):
            for target in targets:
                axes.axhline(target, color="#8a94a0", linewidth=0.9, linestyle="--")
            axes.set_ylabel(f"{metric}, held out")
        losses.set_ylabel("loss: held out (dots), training (thin)")
        over_steps.set_title(str(task), loc="left", fontsize=11, fontweight="bold")
        for axes, label in zip(panels, ("step", "step", "seconds of steps (median x steps)"), strict=True):
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.margins(x=0.04, y=0.1)
            if axes.has_data():
                axes.set_xlim(left=0)
            else:
                axes.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=axes.transAxes)
                axes.set(xticks=[], yticks=[])
            plain_axes(axes)
        handles, texts = losses.get_legend_handles_labels()
        over_seconds.legend(handles, texts, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw(run: RunFacts, name: str, color: str, metric: str, panels: Sequence[Axes]) -> None:
    over_steps, losses, over_seconds = panels
    score = [(step, values[metric]) for step, values in run.held_out if metric in values]
    loss = [(step, values["loss"]) for step, values in run.held_out if "loss" in values]
    if run.finished and not run.steps:  # a method without steps is a level to compare with, not a curve
        for axes, points in zip(panels, (score, loss, score), strict=True):
            if points:
                axes.axhline(points[-1][1], color=color, linewidth=1.3, linestyle=":", label=name)
        return
    if run.train_loss:
        losses.plot(*zip(*running_mean(run.train_loss), strict=True), color=color, linewidth=0.9, alpha=0.45)
    curves = [(over_steps, score, 1.0), (losses, loss, 1.0)]
    if run.step_seconds is not None:
        curves.append((over_seconds, score, run.step_seconds))
    for axes, points, unit in curves:
        x, y = [step * unit for step, _ in points], [value for _, value in points]
        axes.plot(x, y, label=name, color=color, marker="o", markersize=3.5, linewidth=1.5)


def main(args: Sequence[str]) -> None:
    """Print the table, and write it and the curves."""
    parser = argparse.ArgumentParser("smezo compare", description=__doc__)
    parser.add_argument("run", nargs="+", help="folder of a run, or one with runs anywhere below it, as of a sweep")
    parser.add_argument("--out", default="compare", help="where to write, without the suffix (default: compare)")
    parser.add_argument("--metric", default=None, help="default: accuracy, or else the task's own metric")
    help_text = "a value to reach; can be repeated"
    parser.add_argument("--to", type=float, action="append", default=[], metavar="VALUE", help=help_text)
    given = parser.parse_args(args[1:])
    print(compare(given.run, Path(given.out), given.metric, given.to))


def compare(paths: Sequence[str | Path], out: Path, metric: str | None = None, targets: Sequence[float] = ()) -> str:
    """Write the table and the curves of runs to ``out`` with suffixes; returns what is printed."""
    runs = [read_run(folder) for folder in run_folders(paths)]
    known = list(dict.fromkeys(name for run in runs for _, values in run.held_out for name in values))
    if metric is None:
        metric = logged_name("accuracy", known)
        if metric not in known:
            metric = next((name for name in known if not name.startswith("loss")), logged_name("loss", known))
    elif known and metric not in known:
        raise ValueError(f"--metric {metric!r} was measured in none of these runs; there are {', '.join(known)}")
    rows = rows_of(runs, metric, targets)
    table = markdown(shown(rows))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(out.name + ".md").write_text(table, encoding="utf-8")
    out.with_name(out.name + ".csv").write_text(as_csv(rows), encoding="utf-8")
    comparison_figure(runs, metric, targets).savefig(out.with_name(out.name + ".png"))
    unfinished = sum(not run.finished for run in runs)
    note = f"{unfinished} of {len(runs)} runs are not finished\n" if unfinished else ""
    return f"{table}\n{note}also in {out}.md, {out}.csv and, as curves, {out}.png"
