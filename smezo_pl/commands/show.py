"""Runs and exported fine-tunes below a folder, a line each, by what they start from."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from math import isfinite, prod
from pathlib import Path
from typing import Any

from smezo_pl.optim import StepRecord
from smezo_pl.trajectory.database import is_written
from smezo_pl.trajectory.exports import load
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import FILE_NAME, Trajectory, is_record, locate


def found_below(folder: Path) -> list[Path]:
    """Records and safetensors files below a folder, in the order of their names."""
    return sorted({*folder.rglob(FILE_NAME), *folder.rglob("*.safetensors")})


def table(folder: Path, summaries: Sequence[dict[str, Any]]) -> str:
    """Summaries as lines, those of one base together: they can be compared, and applied to the same weights."""
    bases: dict[str, list[dict[str, Any]]] = {}
    for facts in summaries:
        bases.setdefault(facts["starting_weights"], []).append(facts)
    lines = []
    for root, members in bases.items():
        name = members[0]["model"] or "given in Python"
        dtypes = ", ".join(members[0]["dtypes"])
        lines.append(f"{name}: {members[0]['weights']:,} weights, {dtypes}, fingerprint {root[:16]}")
        for facts in members:
            of, loss = facts["settings"].get, facts["loss"]
            moved = f"loss {loss['first']:.4f} -> {loss['last']:.4f}" if loss else "loss not kept"
            state = "being written" if facts["writing"] else "sound" if facts["sound"] else "DAMAGED"
            mask = "dense" if of("mask") == "dense" else f"{of('mask')} {of('sparsity')}"
            path = Path(facts["path"]).relative_to(folder)
            lines.append(
                f"  {path}: {facts['steps']:,} steps, {mask}, lr {of('lr')}, seed {facts['seed']}, {moved}, "
                f"{facts['bytes']:,} bytes, {state}"
            )
    return "\n".join(lines)


def readable(folder: Path, read: Any) -> tuple[list[Any], list[str]]:
    """What of a folder can be read, and what is said of records that cannot.

    Other safetensors files, such as anchors and models, are passed over.

    Raises:
        TrajectoryError: If there is no record and no exported run.
    """
    found, refused = [], []
    for path in found_below(folder):
        try:
            found.append(read(str(path)))
        except TrajectoryError as error:
            if path.name == FILE_NAME:
                refused.append(str(error))
    if not found and not refused:
        raise TrajectoryError(f"{folder} and the folders in it hold no {FILE_NAME} and no exported run")
    return found, refused


_BARS = "▁▂▃▄▅▆▇█"


def main(args: Sequence[str]) -> None:
    """Print what is known of one run or several, and where two of them part.

    Args:
        args: ``show`` and the words after it.
    """
    parser = argparse.ArgumentParser(
        prog="smezo show",
        description="What a run is, how far it is, its loss, whether its record is sound. Of several: the first step "
        "where each differs from the first. Of a folder of runs: a line each, by what they start from.",
    )
    parser.add_argument(
        "run", nargs="+", help="a run's folder, its trajectory.smezo, an exported file, or a folder with such in it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(args[1:])
    folder = Path(given.run[0])
    if len(given.run) == 1 and folder.is_dir() and not (folder / FILE_NAME).exists():
        found, refused = readable(folder, read)
        listed = [summary(trajectory) for trajectory in found]
        if given.json:
            print(json.dumps({"runs": listed, "unreadable": refused}, indent=2))
        else:
            print(cleaned("\n".join([table(folder, listed), *refused]).strip()))
        if refused or any(trajectory.damage for trajectory in found):
            sys.exit(1)
        return
    trajectories = [read(path) for path in given.run]
    summaries = [summary(trajectory) for trajectory in trajectories]
    pairs = [comparison(trajectories[0], other) for other in trajectories[1:]]
    if given.json:
        shown: Any = summaries[0] if len(summaries) == 1 else {"runs": summaries, "compared_with_the_first": pairs}
        print(json.dumps(shown, indent=2))
    else:
        print("\n\n".join(text(trajectory, facts) for trajectory, facts in zip(trajectories, summaries, strict=True)))
        for other, pair in zip(trajectories[1:], pairs, strict=True):
            print(f"\n{trajectories[0].path} and {other.path}: {pair['text']}")
    if any(trajectory.damage for trajectory in trajectories):
        sys.exit(1)


def read(path: str) -> Trajectory:
    """A record with what is sound of it, or an exported file."""
    file = locate(path)
    return Trajectory.read(file, damaged=True) if is_record(file) or file.name == FILE_NAME else load(file)


def summary(trajectory: Trajectory) -> dict[str, Any]:
    """What there is to say, in plain types."""
    header, rows = trajectory.header, trajectory.rows
    losses = [row.loss for row in rows if row.losses and not row.skipped]
    recorded = is_record(trajectory.path)
    noted = [mark for mark in trajectory.marked("weights") if mark.steps == trajectory.next_step]
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
        "samples": header.num_samples,
        "settings": header.settings,
        "steps": trajectory.next_step,
        "skipped": sum(row.skipped for row in rows),
        "refreshes": [row.step for row in rows if row.refreshed],
        "lr": list(rows[-1].lr) if rows else None,
        "loss": {"first": losses[0], "last": losses[-1], "least": min(losses)} if losses else None,
        "sound": trajectory.damage is None,
        "damage": trajectory.damage,
        "writing": recorded and is_written(trajectory.path),
        "checkpoints": sorted({mark.steps for mark in trajectory.marked("checkpoint")}),
        "starting_weights": header.root.hex(),
        "final_weights": noted[-1].facts.get("root") if noted else None,
        "versions": header.versions,
        "machine": header.machine,
    }


def text(trajectory: Trajectory, facts: dict[str, Any]) -> str:
    """The summary for a person."""
    of, machine = facts["settings"].get, facts["machine"].get
    state = "; a run is writing it" if facts["writing"] else ""
    refreshes = max(0, len(facts["refreshes"]) - 1)
    lines = {
        "model": f"{facts['model'] or 'given in Python'}: {facts['weights']:,} weights in {facts['tensors']} tensors, "
        + ", ".join(facts["dtypes"]),
        "made": f"{facts['created']} by smezo_pl {facts['versions'].get('smezo_pl')}, kernel {machine('kernel')}, "
        f"{machine('threads')} {'thread' if machine('threads') == 1 else 'threads'} of {machine('processor')}",
        "optimizer": f"mask {of('mask')} ({of('mask_update')}), sparsity {of('sparsity')}, lr {of('lr')}, "
        f"eps {of('eps')}, noise {facts['noise']}, seed {facts['seed']}, samples {facts['samples']}",
        "steps": f"{facts['steps']:,} ({facts['skipped']} skipped, {refreshes} mask refreshes){state}",
    }
    if facts["loss"]:
        lines["loss"] = f"{sparkline(trajectory.rows)}  {facts['loss']['first']:.4f} -> {facts['loss']['last']:.4f}"
    if facts["checkpoints"]:
        lines["checkpoints"] = f"last at step {facts['checkpoints'][-1]}, {len(facts['checkpoints'])} in all"
    # of a short run nearly all is the header
    long = len(trajectory.rows) >= 1000
    per_step = f", {facts['bytes'] / len(trajectory.rows):.1f} a step" if long else ""
    lines["size"] = f"{facts['bytes']:,} bytes{per_step}"
    if facts["sound"]:
        lines["sound"] = "yes, every step" + (", with a hash of the last weights" if facts["final_weights"] else "")
    else:
        lines["sound"] = f"up to step {facts['steps']}, which `smezo replay --step` can make; then {facts['damage']}"
    return "\n".join(
        [facts["path"], *(f"  {name:<12} {cleaned(line.replace(chr(10), '?'))}" for name, line in lines.items())]
    )


def cleaned(text: str) -> str:
    """What a file says of itself as it is, but unable to steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def sparkline(rows: Sequence[StepRecord], width: int = 40) -> str:
    """The losses as bars: means over equal parts of the run."""
    losses = [row.loss for row in rows if row.losses and isfinite(row.loss)]
    width = min(width, len(losses))
    edges = [len(losses) * i // width for i in range(width + 1)] if width else [0]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def comparison(one: Trajectory, other: Trajectory) -> dict[str, Any]:
    """Where two runs part."""
    if one.header.root != other.header.root:
        return {"same_start": False, "first_difference": None, "text": "they start from different weights"}
    fields = ("seed", "noise", "num_samples", "groups", "first_step")
    differing = [name for name in fields if getattr(one.header, name) != getattr(other.header, name)]
    if differing:
        words = f"the same starting weights, but another {', '.join(differing)}"
        return {"same_start": True, "first_difference": one.header.first_step, "text": words}
    compared = ("projected_gradients", "lr", "weight_decay", "eps", "sparsity", "skipped", "refreshed")
    for a, b in zip(one.rows, other.rows, strict=False):
        if any(getattr(a, name) != getattr(b, name) for name in compared):
            return {
                "same_start": True,
                "first_difference": a.step,
                "text": f"the same until step {a.step}, which differs",
            }
    steps = min(one.next_step, other.next_step)
    end = "" if one.next_step == other.next_step else ", where one of them ends"
    return {"same_start": True, "first_difference": None, "text": f"the same in all {steps} steps{end}"}
