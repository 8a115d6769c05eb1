"""Tables as Markdown and CSV, for all commands and benchmarks; the summary of a sweep, as mean and deviation."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from smezo_pl.commands.sweep_plan import Run, short_names
from smezo_pl.trajectory.files import write_json


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of equal keys as an aligned Markdown table, the keys as its head; None is shown as a dash."""
    # `pandas.DataFrame.to_markdown` needs another package (tabulate).
    if not rows:
        return ""
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts) + "\n"


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows of equal keys as CSV, the keys as its head; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _text(value: object) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for the runs that differ in seeds alone.

    A row has the grid's values by their keys, the numbers of ``runs`` finished and planned (``of``) and of those that
    are ``dead``, which did nothing and are in no mean, their ``seeds``,
    and for each measurement its ``mean`` and ``std`` (of a sample; null for a single run).
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.without_seeds, sort_keys=True, default=str), []).append(run)
    rows = []
    for group in groups.values():
        finished = [(run, run.result()) for run in group if run.state == "finished"]
        done = [(run, result) for run, result in finished if not result.get("dead")]
        measured: dict[str, list[float]] = {}
        for run, result in done:
            costs = {name: result.get(name) for name in ("steps", "step_seconds", "peak_memory_bytes")}
            for name, value in {**run.scores(), **costs}.items():
                if value is not None:
                    measured.setdefault(name, []).append(float(value))
        rows.append(
            {
                "values": group[0].without_seeds,
                "runs": len(finished),
                "of": len(group),
                "dead": len(finished) - len(done),
                "seeds": [{**run.seeds, "seed": result.get("seed")} for run, result in finished],
                "measurements": {
                    name: {"mean": fmean(values), "std": _deviation(values)} for name, values in measured.items()
                },
            }
        )
    return rows


def _deviation(values: Sequence[float]) -> float | None:
    if not all(map(isfinite, values)):  # `stdev` fails
        return nan
    return stdev(values) if len(values) > 1 else None


def write_summary(runs: Sequence[Run], out: Path) -> str:
    """Write ``sweep.md``, ``sweep.csv`` and ``sweep.json`` into the sweep's folder; returns the table in Markdown."""
    rows = summarize(runs)
    names = short_names([run.point for run in runs])
    keys = [key for key in names if any(key in row["values"] for row in rows)]
    measured = list(dict.fromkeys(name for row in rows for name in row["measurements"]))
    shown, plain = [], []
    for row in rows:
        values = {key: _text(row["values"].get(key)) for key in keys}
        spreads = {name: row["measurements"].get(name, {"mean": None, "std": None}) for name in measured}
        shown.append(
            {names[key]: value for key, value in values.items()}
            | {"runs": f"{row['runs']} of {row['of']}" + (f", {row['dead']} dead" if row["dead"] else "")}
            | {name: _spread(name, **spread) for name, spread in spreads.items()}
        )
        plain.append(
            {**values, "runs": row["runs"], "dead": row["dead"]}
            | {f"{name}_{part}": value for name, spread in spreads.items() for part, value in spread.items()}
        )
    table = markdown(shown)
    head = "Mean ± standard deviation (of a sample) over the finished runs that differ in seeds alone"
    head += "; dead ones, which did nothing, are left out.\n\n" if any(row["dead"] for row in rows) else ".\n\n"
    (out / "sweep.md").write_text(head + table, encoding="utf-8")
    (out / "sweep.csv").write_text(as_csv(plain), encoding="utf-8")
    states = [{"name": r.name, "values": r.point, "state": r.state, "result": r.result() or None} for r in runs]
    document = {"rows": rows, "runs": states}
    write_json(out / "sweep.json", document)
    return table


def _spread(name: str, mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    if name == "peak_memory_bytes":
        return f"{mean / 2**30:.2f} GiB"
    if name == "steps":
        return f"{mean:g}"
    return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")
