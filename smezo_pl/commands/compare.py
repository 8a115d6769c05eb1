"""``smezo compare``: runs beside each other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


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
    from smezo_pl.comparing.figure import comparison_figure
    from smezo_pl.comparing.reading import read_run, run_folders
    from smezo_pl.comparing.table import as_csv, markdown, rows_of

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
