"""The table of a comparison."""

from __future__ import annotations

import argparse
import csv
import io
from collections import Counter
from collections.abc import Sequence
from math import isclose
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from smezo_pl.callbacks.figures import running_mean
from smezo_pl.commands.runs import RunFacts
from smezo_pl.commands.tables import table


def labels(runs: Sequence[RunFacts]) -> list[str]:
    """A label for each run that tells it from the others of its task: method, then lr, then seed, then folder."""
    names = [run.method or run.folder.name for run in runs]
    for part in ("lr", "seed"):
        counts = Counter(zip((run.task for run in runs), names, strict=True))
        values = {key: set() for key in counts}  # type: dict[tuple[str | None, str], set[object]]
        for run, name in zip(runs, names, strict=True):
            values[run.task, name].add(getattr(run, part))
        names = [
            f"{name}, {part} {getattr(run, part)}" if len(values[run.task, name]) > 1 else name
            for run, name in zip(runs, names, strict=True)
        ]
    counts = Counter(zip((run.task for run in runs), names, strict=True))
    return [
        f"{name} ({run.folder.name})" if counts[run.task, name] > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]


def steps_to(run: RunFacts, metric: str, value: float) -> int | None:
    """The step of the first measurement that reaches a value; None if none does.

    A loss reaches a value from above, everything else from below.
    """
    for step, metrics in run.held_out:
        if metric in metrics:
            there = metrics[metric]
            if isclose(there, value) or (there <= value if metric == "loss" else there >= value):
                return step
    return None


def rows_of(runs: Sequence[RunFacts], metric: str, targets: Sequence[float]) -> list[dict[str, object]]:
    """One row a run, numbers as numbers, None where there is none yet.

    Seconds to a value are steps times the median seconds of a step: pauses, validations and checkpoints do not count.
    """
    rows: list[dict[str, object]] = []
    for run, label in zip(runs, labels(runs), strict=True):
        first = run.held_out[0][1] if run.held_out and run.held_out[0][0] == 0 else {}
        last = run.held_out[-1][1] if run.held_out else {}
        best = [values[metric] for _, values in run.held_out if metric in values]
        row: dict[str, object] = {
            "task": run.task,
            "run": label,
            "lr": run.lr,
            "seed": run.seed,
            "steps": run.steps,
            "of": run.max_steps if not run.finished else run.steps,
        }
        for name in dict.fromkeys((metric, "loss")):
            row |= {f"{name} before": first.get(name), name: last.get(name)}
        if metric != "loss":
            row[f"best {metric}"] = max(best) if best else None
        row |= {f"test {name}": run.test.get(name) for name in dict.fromkeys((metric, "loss"))}
        for target in targets:
            steps = steps_to(run, metric, target)
            seconds = None if steps is None else 0.0 if steps == 0 else None
            if steps and run.step_seconds is not None:
                seconds = steps * run.step_seconds
            row |= {f"steps to {target:g}": steps, f"seconds to {target:g}": seconds}
        row |= {
            "seconds a step": run.step_seconds,
            "peak GiB": None if run.peak_memory is None else run.peak_memory / 2**30,
        }
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """The rows as Markdown, without columns that nobody has a value in."""
    names = [name for name in rows[0] if name != "of" and any(row[name] is not None for row in rows)]
    return table(names, [[_shown(row, name) for name in names] for row in rows])


def as_csv(rows: Sequence[dict[str, object]]) -> str:
    """The rows as CSV, with every column."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _shown(row: dict[str, object], name: str) -> str:
    value = row[name]
    if name == "steps":
        return f"{value}" if row["of"] in (value, None) else f"{value} of {row['of']}"
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if name == "lr":
        return f"{value:g}"
    return f"{value:.0f}" if name.startswith("seconds to") else f"{value:.2f}" if name == "peak GiB" else f"{value:.3f}"


COLOURS = ("#2a6fdb", "#e07b1a", "#2f9e62", "#a34fc4", "#c83e4d", "#5b6b7b", "#b08900", "#0f9aa8")
"""Of the runs of a task, in their order; a method keeps its colour over the tasks."""


def comparison_figure(runs: Sequence[RunFacts], metric: str, targets: Sequence[float] = ()) -> Figure:
    """One line of panels a task: the metric over steps, the loss over steps, and the metric over seconds of training.

    Args:
        runs: The runs, of one task or of several.
        metric: The metric of the first and last panel.
        targets: Values of it that are drawn as lines.
    """
    tasks = list(dict.fromkeys(run.task for run in runs))
    names = labels(runs)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    figure = Figure(figsize=(13.5, 3.5 * len(tasks) + 0.4), layout="constrained", dpi=110)
    grid = figure.subplots(len(tasks), 3, squeeze=False)
    for task, (over_steps, losses, over_seconds) in zip(tasks, grid, strict=True):
        for run, name in zip(runs, names, strict=True):
            if run.task == task:
                _draw(run, name, colours[name], metric, over_steps, losses, over_seconds)
        for axes in (over_steps, over_seconds):
            for target in targets:
                axes.axhline(target, color="#8a94a0", linewidth=0.9, linestyle="--")
            axes.set_ylabel(f"{metric}, held out")
        losses.set_ylabel("loss: held out (dots), training (thin)")
        over_steps.set_title(str(task), loc="left", fontsize=11, fontweight="bold")
        for axes, label in (
            (over_steps, "step"),
            (losses, "step"),
            (over_seconds, "seconds of steps (median x steps)"),
        ):
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.margins(x=0.04, y=0.1)
            if axes.has_data():
                axes.set_xlim(left=0)
            else:
                axes.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=axes.transAxes)
                axes.set_xticks([])
                axes.set_yticks([])
            axes.grid(True, color="#e6e8eb", linewidth=0.8)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        handles, texts = losses.get_legend_handles_labels()
        if handles:
            over_seconds.legend(handles, texts, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw(
    run: RunFacts, name: str, colour: str, metric: str, over_steps: object, losses: object, over_seconds: object
) -> None:
    score = [(step, values[metric]) for step, values in run.held_out if metric in values]
    loss = [(step, values["loss"]) for step, values in run.held_out if "loss" in values]
    # a method without steps is a level to compare with, not a curve
    if not run.steps and run.finished:
        for axes, points in ((over_steps, score), (losses, loss), (over_seconds, score)):
            if points:
                axes.axhline(points[-1][1], color=colour, linewidth=1.3, linestyle=":", label=name)  # type: ignore[attr-defined]
        return
    if run.train_loss:
        smooth = running_mean(run.train_loss)
        losses.plot([x for x, _ in smooth], [y for _, y in smooth], color=colour, linewidth=0.9, alpha=0.45)  # type: ignore[attr-defined]
    style = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.5}
    for axes, points in ((over_steps, score), (losses, loss)):
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, **style)  # type: ignore[attr-defined]
    if run.step_seconds is not None:
        seconds = [step * run.step_seconds for step, _ in score]
        over_seconds.plot(seconds, [y for _, y in score], label=name, **style)  # type: ignore[attr-defined]


def main(args: Sequence[str]) -> None:
    """Print the table, and write it and the curves.

    Args:
        args: ``compare`` and the words after it.

    Raises:
        ValueError: If there is nothing to compare.
    """
    parser = argparse.ArgumentParser(
        prog="smezo compare",
        description="Puts runs beside each other: metrics, steps and seconds to given values, seconds a step, peak "
        "memory; prints a table and writes OUT.md, OUT.csv and OUT.png. Runs that go on are shown as far as they are, "
        "those of several tasks in a line of panels each. Seconds to a value are steps times the median seconds of a "
        "step, so that pauses, validations and checkpoints do not count.",
    )
    parser.add_argument("run", nargs="+", help="a run's folder; of a sweep's folder, all its runs")
    parser.add_argument("--out", default="compare", help="where to write, without the ending (default: compare)")
    parser.add_argument("--metric", default=None, help="accuracy if not given, else the task's own")
    parser.add_argument(
        "--to", type=float, action="append", default=[], metavar="VALUE", help="a value to reach; may be given often"
    )
    given = parser.parse_args(args[1:])
    print(compare(given.run, Path(given.out), given.metric, given.to))


def compare(paths: Sequence[str | Path], out: Path, metric: str | None = None, targets: Sequence[float] = ()) -> str:
    """Compare runs, and write the table and the curves.

    Args:
        paths: Folders of runs or of sweeps.
        out: Where to write, without the ending.
        metric: The metric to compare; None: accuracy where a run has it, else the first that is no loss.
        targets: Values of it, to tell the steps and seconds they took.

    Returns:
        What is printed.

    Raises:
        ValueError: If there is no run, or no run has the metric.
    """
    from smezo_pl.commands.runs import read_run, run_folders

    runs = [read_run(folder) for folder in run_folders(paths)]
    known = list(dict.fromkeys(name for run in runs for _, values in run.held_out for name in values))
    if metric is None:
        metric = "accuracy" if "accuracy" in known else next((name for name in known if name != "loss"), "loss")
    elif known and metric not in known:
        raise ValueError(f"--metric {metric!r} was measured in none of these runs; there are {', '.join(known)}")
    rows = rows_of(runs, metric, targets)
    text = markdown(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(out.name + ".md").write_text(text, encoding="utf-8")
    out.with_name(out.name + ".csv").write_text(as_csv(rows), encoding="utf-8")
    comparison_figure(runs, metric, targets).savefig(out.with_name(out.name + ".png"))
    going_on = sum(not run.finished for run in runs)
    note = f"{going_on} of {len(runs)} runs are not finished\n" if going_on else ""
    return f"{text}\n{note}also in {out}.md, {out}.csv and, as curves, {out}.png"
