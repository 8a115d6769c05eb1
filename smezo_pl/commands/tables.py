"""What came of a sweep: mean and standard deviation over seeds, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smezo_pl.commands.sweep_plan import Run, short_names


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for the runs that differ in seeds alone.

    Returns:
        Rows with the grid's values by their keys, ``runs`` (finished), ``of`` (planned), ``seeds``, and for each
        measurement its ``mean`` and ``std`` (of a sample; null for a single run). Measurements: what ``after`` holds,
        ``best_loss`` and the like on the held-out examples, ``test_...`` where the test set was scored, ``steps``,
        ``step_seconds`` and ``peak_memory_bytes``.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.without_seeds, sort_keys=True, default=str), []).append(run)
    rows = []
    for group in groups.values():
        done = [(run, result) for run in group if run.state == "finished" and (result := run.result()) is not None]
        measured = [measurements(result) for _, result in done]
        names = list(dict.fromkeys(name for values in measured for name in values))
        rows.append(
            {
                "values": group[0].without_seeds,
                "runs": len(done),
                "of": len(group),
                "seeds": [{**run.seeds, "seed": result.get("seed")} for run, result in done],
                "measurements": {
                    name: _spread([values[name] for values in measured if name in values]) for name in names
                },
            }
        )
    return rows


def measurements(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of a run's ``metrics.json``, by name."""
    values: dict[str, float] = {**(result.get("after") or {})}
    values |= {f"test_{name}": value for name, value in result.get("test", {}).get("metrics", {}).items()}
    for name in ("steps", "step_seconds", "peak_memory_bytes"):
        if result.get(name) is not None:
            values[name] = result[name]
    return {name: float(value) for name, value in values.items()}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def write_tables(runs: Sequence[Run], out: Path) -> str:
    """Write ``sweep.md``, ``sweep.csv`` and ``sweep.json`` into the sweep's folder.

    Returns:
        The Markdown.
    """
    rows = summarise(runs)
    names = short_names([run.point for run in runs])
    keys = [key for key in names if any(key in row["values"] for row in rows)]
    measured = list(dict.fromkeys(name for row in rows for name in row["measurements"]))
    head = [*(names[key] for key in keys), "runs", *measured]
    shown = [
        [
            *(_plain(row["values"].get(key)) for key in keys),
            f"{row['runs']} of {row['of']}",
            *(_cell(name, row["measurements"].get(name)) for name in measured),
        ]
        for row in rows
    ]
    markdown = table(head, shown)
    (out / "sweep.md").write_text(
        "Mean ± standard deviation (of a sample) over the finished runs that differ in seeds alone.\n\n" + markdown,
        encoding="utf-8",
    )
    (out / "sweep.csv").write_text(_csv(keys, measured, rows), encoding="utf-8")
    document = {
        "rows": rows,
        "runs": [{"name": run.name, "values": run.point, "state": run.state, "result": run.result()} for run in runs],
    }
    (out / "sweep.json").write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    return markdown


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned."""
    lines = [list(head), *map(list, rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts) + "\n"


def _csv(keys: Sequence[str], measured: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "runs", *(f"{name}_{part}" for name in measured for part in ("mean", "std"))])
    for row in rows:
        cells = [row["measurements"].get(name, {}).get(part) for name in measured for part in ("mean", "std")]
        writer.writerow([*(_plain(row["values"].get(key)) for key in keys), row["runs"], *cells])
    return text.getvalue()


def _plain(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _cell(name: str, spread: dict[str, float | None] | None) -> str:
    if spread is None or spread["mean"] is None:
        return "-"
    mean, std = spread["mean"], spread["std"]
    if name == "peak_memory_bytes":
        return f"{mean / 2**30:.2f} GiB"
    if name == "steps":
        return f"{mean:g}"
    return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")
