"""The table of a comparison."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from math import isclose

from smezo_pl.comparing.reading import RunFacts
from smezo_pl.sweeping.summary import table


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
