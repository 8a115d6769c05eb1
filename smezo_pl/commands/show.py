"""Show the settings, progress and loss of a run, and whether its trajectory is valid.

For several runs: the first step where each differs from the first run. For a folder of runs: one row per run, grouped
by starting weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from math import isfinite, prod
from operator import attrgetter
from pathlib import Path
from typing import Any

from smezo_pl.commands.tables import markdown
from smezo_pl.optim import StepRecord
from smezo_pl.trajectory.database import is_written
from smezo_pl.trajectory.exports import load
from smezo_pl.trajectory.header import DIRECTION_FIELDS, FORMAT, Header, TrajectoryError
from smezo_pl.trajectory.log import FILE_NAME, Trajectory, is_trajectory, locate
from smezo_pl.trajectory.settings import listed


def main(args: Sequence[str]) -> None:
    """Print a summary of one run or several, and where others differ from the first."""
    parser = argparse.ArgumentParser("smezo show", description=__doc__)
    help_text = "folder of a run, its trajectory.smezo, an exported run, or a folder that contains any of these"
    parser.add_argument("run", nargs="+", help=help_text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(args[1:])
    folder = Path(given.run[0])
    listed = len(given.run) == 1 and folder.is_dir() and not (folder / FILE_NAME).exists()
    trajectories, unreadable = read_below(folder) if listed else ([read(path) for path in given.run], [])
    summaries = [summary(trajectory) for trajectory in trajectories]
    if listed:
        shown: Any = {"runs": summaries, "unreadable": unreadable}
        text = "\n".join([*listing(folder, summaries), *unreadable])
    else:
        first, *others = trajectories
        pairs = [comparison(first, other) for other in others]
        shown = {"runs": summaries, "compared_with_the_first": pairs} if pairs else summaries[0]
        texts = [as_text(trajectory, facts) for trajectory, facts in zip(trajectories, summaries, strict=True)]
        texts += [f"{first.path} and {o.path}: {pair['text']}" for o, pair in zip(others, pairs, strict=True)]
        text = "\n\n".join(texts)
    print(json.dumps(shown, indent=2) if given.json else printable(text))
    if unreadable or any(trajectory.damage for trajectory in trajectories):
        sys.exit(1)


def read(path: str | Path) -> Trajectory:
    """A trajectory, as far as it is valid, or an exported run."""
    file = locate(path)
    return Trajectory.read(file, damaged=True) if is_trajectory(file) or file.name == FILE_NAME else load(file)


def read_below(folder: Path) -> tuple[list[Trajectory], list[str]]:
    """Trajectories and exported runs below a folder, by name, and the errors of trajectories that cannot be read."""
    trajectories, unreadable = [], []
    for path in sorted({*folder.rglob(FILE_NAME), *folder.rglob("*.safetensors")}):
        try:
            trajectories.append(read(path))
        except TrajectoryError as error:
            if path.name == FILE_NAME:  # other safetensors files are snapshots and models
                unreadable.append(str(error))
    if not trajectories and not unreadable:
        raise TrajectoryError(f"{folder} and the folders in it hold no {FILE_NAME} and no exported run")
    return trajectories, unreadable


def summary(trajectory: Trajectory) -> dict[str, Any]:
    """Everything that is shown of a run, in plain types."""
    header, records = trajectory.header, trajectory.records
    losses = [row.loss for row in records if row.losses and not row.skipped]
    recorded = is_trajectory(trajectory.path)
    unread = records[-1].unread.bit_count() if records else 0
    no_signal = sum(not row.skipped and not any(row.projected_gradients) for row in records)
    changes = {event.steps: event.facts["changes"] for event in trajectory.events_of("settings")}
    samples = list(dict.fromkeys([header.num_samples, *(row.samples for row in records if row.samples)]))
    return {
        "path": str(trajectory.path),
        "kind": "record" if recorded else "export",
        "bytes": trajectory.path.stat().st_size,
        "run": header.run,
        "created": header.created,
        "model": header.model.get("name"),
        "revision": header.model.get("revision"),
        "tensors": len(header.tensors),
        "weights": sum(prod(info.shape) for info in header.tensors),
        "dtypes": sorted({info.dtype for info in header.tensors}),
        "seed": header.seed,
        "noise": header.noise,
        "samples": samples[0] if len(samples) == 1 else samples,
        "settings": trajectory.settings,
        "steps": trajectory.next_step,
        "skipped": sum(row.skipped for row in records),
        "refreshes": [row.step for row in records if row.refreshed],
        "lr": list(records[-1].lr) if records else None,
        "loss": {"first": losses[0], "last": losses[-1], "least": min(losses)} if losses else None,
        "sound": trajectory.damage is None,
        "damage": trajectory.damage,
        "writing": recorded and is_written(trajectory.path),
        "checkpoints": sorted({event.steps for event in trajectory.events_of("checkpoint")}),
        "starting_weights": header.root.hex(),
        "final_weights": trajectory.final_root,
        "versions": header.versions,
        "machine": header.machine,
        **(_directions(header, records) if header.format > FORMAT else {}),
        **({"no_signal": no_signal} if no_signal else {}),
        **({"unread": unread} if unread else {}),
        **({"changes": changes} if changes else {}),
    }


def _directions(header: Header, records: Sequence[StepRecord]) -> dict[str, Any]:
    rows = [row.rows for row in records if not row.skipped]
    return {
        **{name: getattr(header, name) for name in DIRECTION_FIELDS},
        **({"rows": [min(rows), max(rows)]} if rows else {}),
        "shared": records[-1].shared.bit_count() if records else 0,
    }


def as_text(trajectory: Trajectory, facts: dict[str, Any]) -> str:
    """The summary of one run for a reader."""
    setting, machine = facts["settings"].get, facts["machine"].get
    refreshes, done = max(0, len(facts["refreshes"]) - 1), len(trajectory.records)
    lines = {
        "model": f"{facts['model'] or 'given in Python'}: {facts['weights']:,} weights in {facts['tensors']} tensors, "
        + ", ".join(facts["dtypes"]),
        "created": f"{facts['created']} by smezo_pl {facts['versions'].get('smezo_pl')}, kernel {machine('kernel')}, "
        f"{machine('threads')} {'thread' if machine('threads') == 1 else 'threads'} of {machine('processor')}",
        "optimizer": f"mask {setting('mask')} ({setting('mask_update')}), sparsity {setting('sparsity')}, "
        f"lr {setting('lr')}, eps {setting('eps')}, noise {facts['noise']}, seed {facts['seed']}, "
        f"samples {facts['samples']}",
        "steps": f"{facts['steps']:,} ({facts['skipped']} skipped, {refreshes} mask refreshes)"
        + (f"; {facts['no_signal']} without signal, {facts['no_signal'] / done:.1%}" if "no_signal" in facts else "")
        + ("; a run is writing it" if facts["writing"] else ""),
    }
    if "directions" in facts:
        lines["directions"] = described_directions(trajectory, facts)
    if "unread" in facts:
        lines["unread"] = (
            f"{facts['unread']} of {len(trajectory.header.active)} tensors take no part: no forward reads them"
        )
    if "changes" in facts:
        each = (f"after step {steps} {listed(changes)}" for steps, changes in facts["changes"].items())
        lines["changed"] = "; ".join(each)
    if facts["loss"]:
        lines["loss"] = f"{sparkline(trajectory.records)}  {facts['loss']['first']:.4f} -> {facts['loss']['last']:.4f}"
    if facts["checkpoints"]:
        lines["checkpoints"] = f"last at step {facts['checkpoints'][-1]}, {len(facts['checkpoints'])} in all"
    lines["size"] = f"{facts['bytes']:,} bytes"
    if len(trajectory.records) >= 1000:  # nearly all of a short run is its header
        lines["size"] += f", {facts['bytes'] / len(trajectory.records):.1f} per step"
    if facts["sound"]:
        lines["valid"] = "yes, every step" + (", with a hash of the last weights" if facts["final_weights"] else "")
    else:
        lines["valid"] = f"up to step {facts['steps']}, which `smezo replay --step` can make; then {facts['damage']}"
    # A line break in a name that the file holds would look like a line of this summary.
    return "\n".join([facts["path"], *(f"  {name:<12} {line.replace(chr(10), '?')}" for name, line in lines.items())])


def described_directions(trajectory: Trajectory, facts: dict[str, Any]) -> str:
    """What directions a run has, in words."""
    kind = "full noise" if facts["rank"] is None else f"rank {facts['rank']}"
    if facts["directions"] == "shared":
        return f"one for the batch, {kind}; coefficients {facts['coefficients']}"
    low, high = facts.get("rows", [0, 0])
    rows = f"{low} to {high} rows" if low < high else f"{high} row{'s' * (high != 1)}"
    kind = "sign flips" if facts["rank"] is None else kind
    line = f"one per row, {kind}; {rows} per step; coefficients {facts['coefficients']}"
    if facts["shared"]:
        line += f"; {facts['shared']} of {len(trajectory.header.active)} tensors have one for the batch"
    return line


def listing(folder: Path, summaries: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the runs of each base model: those can be compared, and exported runs applied to the same weights."""
    bases: dict[str, list[dict[str, Any]]] = {}
    for facts in summaries:
        bases.setdefault(facts["starting_weights"], []).append(facts)
    lines = []
    for root, members in bases.items():
        first = members[0]
        dtypes = ", ".join(first["dtypes"])
        lines.append(
            f"{first['model'] or 'given in Python'}: {first['weights']:,} weights, {dtypes}, fingerprint {root[:16]}\n"
        )
        lines.append(markdown([_row(folder, facts) for facts in members]))
    return lines


def _row(folder: Path, facts: dict[str, Any]) -> dict[str, object]:
    setting, loss = facts["settings"].get, facts["loss"]
    return {
        "run": str(Path(facts["path"]).relative_to(folder)),
        "steps": f"{facts['steps']:,}",
        "mask": ("dense" if setting("mask") == "dense" else f"{setting('mask')} {setting('sparsity')}")
        + (", rank {rank}".format(**facts) if facts.get("rank") else "")
        + (", per row" if facts.get("directions") == "per_row" else ""),
        "lr": setting("lr"),
        "seed": facts["seed"],
        "loss": f"{loss['first']:.4f} -> {loss['last']:.4f}" if loss else None,
        "bytes": f"{facts['bytes']:,}",
        "state": "being written" if facts["writing"] else "valid" if facts["sound"] else "CORRUPTED",
    }


def printable(text: str) -> str:
    """Text with control characters replaced, so that what a file holds cannot steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def sparkline(records: Sequence[StepRecord]) -> str:
    """The losses as up to 40 bars: means over equal parts of the run."""
    losses = [row.loss for row in records if row.losses and isfinite(row.loss)]
    if not losses:
        return ""
    width = min(40, len(losses))
    edges = [len(losses) * i // width for i in range(width + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join("▁▂▃▄▅▆▇█"[round((mean - low) * scale)] for mean in means)


def comparison(one: Trajectory, other: Trajectory) -> dict[str, Any]:
    """Whether two runs start from the same weights, and the first step where they differ."""
    same_start = one.header.root == other.header.root
    fields = ("seed", "noise", "num_samples", "groups", "first_step", *DIRECTION_FIELDS)
    differing = [name for name in fields if getattr(one.header, name) != getattr(other.header, name)]
    names = ("projected_gradients", "lr", "weight_decay", "eps", "sparsity", "skipped", "refreshed", "unread", "shared")
    update = attrgetter(*names)
    pairs = zip(one.records, other.records, strict=False)
    step = next((a.step for a, b in pairs if update(a) != update(b)), None)
    if not same_start:
        step, text = None, "they start from different weights"
    elif differing:
        step, text = one.header.first_step, f"the same starting weights, but another {', '.join(differing)}"
    elif step is not None:
        text = f"the same until step {step}, which differs"
    else:
        end = "" if one.next_step == other.next_step else ", where one of them ends"
        text = f"the same in all {min(one.next_step, other.next_step)} steps{end}"
    return {"same_start": same_start, "first_difference": step, "text": text}
