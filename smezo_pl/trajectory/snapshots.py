"""Full-weight snapshots beside a trajectory, so that a resume replays only the steps after the last of them."""

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
from smezo_pl.trajectory.records import Event, unpack_thresholds
from smezo_pl.trajectory.replaying import rebuild, set_rates

log = logging.getLogger(__name__)

_MASK = "mask."


def write_snapshot(path: Path, optimizer: SparseMeZO, header: Header, tensors: Mapping[str, Tensor]) -> str:
    """Write the present weights, whole or not at all.

    Args:
        path: The file.
        optimizer: The optimizer, for its constant masks.
        header: The trajectory's header.
        tensors: The network's tensors by their recorded names.

    Returns:
        The file's hash, for the trajectory.

    Raises:
        TrajectoryError: If it cannot be written.
    """
    content = {name: tensors[name].detach().cpu().contiguous() for name in header.active}
    numbers = [number for group in header.groups for number in group.numbers]
    names = dict(zip(numbers, header.active, strict=True))
    bits: Mapping[int, Tensor] = optimizer.state_dict()["smezo"]["bits"]
    content |= {_MASK + names[number]: packed.cpu() for number, packed in bits.items()}
    with atomic_path(path) as part:
        save_file(content, part)
        return _file_digest(part)


def nearest_snapshot(trajectory: Trajectory) -> tuple[Event, Path] | None:
    """The last snapshot of a run whose file is there and valid."""
    for event in reversed(trajectory.events_of("anchor")):
        path = trajectory.path.parent / str(event.facts.get("file"))
        if not path.is_file():
            continue
        if _file_digest(path) == event.facts.get("sha256"):
            return event, path
        log.warning("%s is corrupted; the weights are made without it", path)
    return None


def load_snapshot(
    trajectory: Trajectory, event: Event, path: Path, tensors: Mapping[str, Tensor], kernel: KernelName = "auto"
) -> SparseMeZO:
    """Put a snapshot's weights into a network.

    Args:
        trajectory: The trajectory.
        event: The snapshot's event.
        path: Its file, as `nearest_snapshot` found it.
        tensors: The network's tensors by their recorded names; written in place.
        kernel: What makes the updates that follow.

    Returns:
        The optimizer in the state that it had then.

    Raises:
        TrajectoryError: If the file does not hold what the trajectory says.
    """
    content = load_file(path)
    header = trajectory.header
    for name in header.active:
        found, wanted = content.get(name), tensors[name]
        if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise TrajectoryError(f"{path}: the snapshot does not hold {name!r} as {trajectory.path} says")
    with torch.no_grad():
        for name in header.active:
            tensors[name].copy_(content[name])
    optimizer = rebuild(header, tensors, kernel)
    records = trajectory.records[: event.steps - header.first_step]
    refresh = next((record for record in reversed(records) if record.refreshed), None)
    if refresh is not None:
        thresholds = iter(unpack_thresholds(refresh.thresholds, len(header.active)))
        for group in optimizer.param_groups:
            own = [next(thresholds) for _ in group["names"]]
            group.update(thresholds=[None if isinf(h) else h for h in own], ready=True, mask_step=refresh.step)
    if records:
        set_rates(optimizer, records[-1])
    numbers = dict(zip(header.active, (number for group in header.groups for number in group.numbers), strict=True))
    state = optimizer.state_dict()
    state["smezo"]["steps_done"] = event.steps
    state["smezo"]["bits"] = {
        numbers[name.removeprefix(_MASK)]: packed for name, packed in content.items() if name.startswith(_MASK)
    }
    optimizer.load_state_dict(state)
    return optimizer


def _file_digest(path: Path) -> str:
    digest = sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
