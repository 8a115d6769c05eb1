"""Full-weight snapshots beside a trajectory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from hashlib import sha256
from math import isinf
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.kernels import KernelName
from smezo_pl.trajectory.files import atomic_path
from smezo_pl.trajectory.header import Header, TrajectoryError
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.records import Mark, unpack_thresholds
from smezo_pl.trajectory.replaying import rebuild, set_rates

log = logging.getLogger(__name__)

_MASK = "mask."


def write_anchor(path: Path, optimizer: SparseMeZO, header: Header, tensors: Mapping[str, Tensor]) -> str:
    """Write the weights of today, whole or not at all.

    Args:
        path: The file.
        optimizer: The optimizer, for its constant masks.
        header: The record's header.
        tensors: The network's tensors by the record's names.

    Returns:
        The file's hash, for the record.

    Raises:
        TrajectoryError: If it cannot be written.
    """
    content = {name: tensors[name].detach().cpu().contiguous() for name in header.active}
    names = dict(zip((number for group in header.groups for number in group.numbers), header.active, strict=True))
    bits: Mapping[int, Tensor] = optimizer.state_dict()["smezo"]["bits"]
    content |= {_MASK + names[number]: packed.cpu() for number, packed in bits.items()}
    with atomic_path(path) as part:
        save_file(content, part)
        return file_digest(part)


def nearest_anchor(trajectory: Trajectory) -> tuple[Mark, Path] | None:
    """The last anchor of a record whose file is there and sound."""
    for mark in reversed(trajectory.marked("anchor")):
        path = trajectory.path.parent / str(mark.facts.get("file"))
        if not path.is_file():
            continue
        if file_digest(path) == mark.facts.get("sha256"):
            return mark, path
        log.warning("%s is damaged; the weights are made without it", path)
    return None


def load_anchor(
    trajectory: Trajectory, mark: Mark, path: Path, tensors: Mapping[str, Tensor], kernel: KernelName = "auto"
) -> SparseMeZO:
    """Put an anchor's weights into a network.

    Args:
        trajectory: The record.
        mark: The anchor's mark.
        path: The anchor's file, as `nearest_anchor` found it.
        tensors: The network's tensors by the record's names; written in place.
        kernel: What makes the updates that follow.

    Returns:
        The optimizer in the state it had there.

    Raises:
        TrajectoryError: If the file does not hold what the record says.
    """
    content = load_file(path)
    header = trajectory.header
    for name in header.active:
        if (
            name not in content
            or content[name].shape != tensors[name].shape
            or content[name].dtype != tensors[name].dtype
        ):
            raise TrajectoryError(f"{path}: the anchor does not hold {name!r} as {trajectory.path} says")
    with torch.no_grad():
        for name in header.active:
            tensors[name].copy_(content[name])
    optimizer = rebuild(header, tensors, kernel)
    rows = trajectory.rows[: mark.steps - header.first_step]
    refresh = next((row for row in reversed(rows) if row.refreshed), None)
    if refresh is not None:
        thresholds = iter(unpack_thresholds(refresh.thresholds, len(header.active)))
        for group in optimizer.param_groups:
            found = [next(thresholds) for _ in group["names"]]
            group.update(thresholds=[None if isinf(h) else h for h in found], ready=True, mask_step=refresh.step)
    if rows:
        set_rates(optimizer, rows[-1])
    numbers = dict(zip(header.active, (number for group in header.groups for number in group.numbers), strict=True))
    state = optimizer.state_dict()
    state["smezo"]["steps_done"] = mark.steps
    state["smezo"]["bits"] = {
        numbers[name.removeprefix(_MASK)]: packed for name, packed in content.items() if name.startswith(_MASK)
    }
    optimizer.load_state_dict(state)
    return optimizer


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read a piece at a time."""
    digest = sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
