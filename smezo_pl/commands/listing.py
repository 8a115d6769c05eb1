"""Runs and exported fine-tunes below a folder, a line each, by what they start from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smezo_pl.trajectory.errors import TrajectoryError
from smezo_pl.trajectory.reader import FILE_NAME


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
