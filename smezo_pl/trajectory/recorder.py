"""From an optimizer to its trajectory: what is in the header, and one record after each step."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.directions import Directions
from smezo_pl.optim.kernels import get_kernel
from smezo_pl.optim.parameters import matches
from smezo_pl.trajectory.fingerprint import (
    TENSOR_DIGEST_SIZE,
    fingerprint,
    machine,
    model_tensors,
    root_digest,
    versions,
)
from smezo_pl.trajectory.header import (
    COUNTERS,
    DIRECTION_FIELDS,
    GroupInfo,
    Header,
    TensorInfo,
    TrajectoryError,
    format_of_header,
)
from smezo_pl.trajectory.log import Trajectory, TrajectoryWriter
from smezo_pl.trajectory.records import pack_thresholds
from smezo_pl.trajectory.writes import WriteWatch, tensors_in


def record(
    optimizer: SparseMeZO,
    path: str | Path,
    model: nn.Module | None = None,
    *,
    pretrained: str | None = None,
    revision: str | None = None,
) -> Recorder:
    """Record every step that an optimizer takes from now on.

    Call it before the first step: the trajectory starts from the present weights, of which it keeps a fingerprint.
    Where the file holds the beginning of this optimizer's run, it is continued, and steps that are about to be taken
    again are removed from it.

    Args:
        optimizer: The optimizer.
        path: File to write, by convention ``<run>/trajectory.smezo``; its folder is made.
        model: The network whose tensors are recorded under their names; by default the one that the optimizer is
            attached to, else its parameters alone.
        pretrained: Name of the starting weights, as `smezo_pl.load_model` takes it.
        revision: Their revision, if known.

    Returns:
        The recorder. `Recorder.close` it after the last step, or use it as a context.

    Raises:
        TrajectoryError: If another run is recorded in the file, or it cannot be written.

    Examples:
        >>> with record(optimizer, "runs/one/trajectory.smezo"):
        ...     for batch in batches:
        ...         optimizer.step(lambda: loss(batch))
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        earlier = Trajectory.read(path)
        if earlier.records and optimizer.steps_done <= earlier.header.first_step:
            raise TrajectoryError(
                f"{path} holds a run of {len(earlier.records)} steps, and this optimizer has not taken its first: give "
                "another path"
            )
        return Recorder(optimizer, TrajectoryWriter.resume(path, optimizer.steps_done), model)
    header = describe(optimizer, model, pretrained=pretrained, revision=revision)
    return Recorder(optimizer, TrajectoryWriter.create(path, header), model)


class Recorder:
    """Appends to a trajectory after each step of an optimizer.

    Args:
        optimizer: The optimizer; its next step must be the trajectory's next.
        writer: The trajectory.
        model: The network, as for `record`.

    Raises:
        TrajectoryError: If the trajectory is at another step, or of an optimizer with other groups.
    """

    def __init__(self, optimizer: SparseMeZO, writer: TrajectoryWriter, model: nn.Module | None = None) -> None:
        self.optimizer, self.writer, self.model = optimizer, writer, model
        network = model if model is not None else optimizer.attached
        self._watch = WriteWatch(_own_parameters(optimizer) if network is None else tensors_in(network))
        wrong = None
        if writer.steps != optimizer.steps_done:
            done = f"holds {writer.steps} steps, the optimizer has done {optimizer.steps_done}"
            wrong = f"{done}: replay the trajectory first, or record to another file"
        elif not _fits(optimizer, writer.header):
            settings = "seed, noise, directions, rank, coefficients, mask or groups"
            wrong = f"is of an optimizer with other settings ({settings}): record to another file"
        if wrong is not None:
            writer.close()
            raise TrajectoryError(f"{writer.path} {wrong}")
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self.refuse_writes),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def catch_up(self) -> None:
        """Record the last step if it is missing: after `NonFiniteLossError` torch runs no hook."""
        if self.optimizer.steps_done > self.writer.steps:
            self._after_step(self.optimizer)

    def refuse_writes(self, *_: Any) -> None:
        """Raise a `TrajectoryError` if something other than the optimizer wrote weights after its last step."""
        if (name := self._watch.written()) is not None:
            raise TrajectoryError(
                f"{self.writer.path}: after {self.writer.steps} steps something other than the optimizer wrote "
                f"{name!r}, so no replay gives the weights of this run from there on. Leave out what writes weights, "
                "such as a callback that averages, clips or prunes them, or save whole weights: WeightCheckpoint in "
                "place of SeedCheckpoint"
            )

    def mark_weights(self) -> None:
        """Note the hash of the present weights, so that a replay can be checked against it; reads all weights."""
        self.refuse_writes()
        digests = fingerprint(named_tensors(self.optimizer, self.model))
        self.writer.add_event("weights", root=root_digest(digests).hex())

    def close(self) -> None:
        """Stop recording; the file is left complete in itself. Harmless when closed already."""
        if not self._handles:
            return
        while self._handles:
            self._handles.pop().remove()
        with self.writer:
            self.catch_up()

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if not _fits(self.optimizer, self.writer.header):
            raise TrajectoryError(
                f"{self.writer.path}: the optimizer's groups, seed, noise, directions or mask changed during the run; "
                "a trajectory holds them once: start another one"
            )
        step = self.optimizer.last_step
        # the group's own number says the same as step.refreshed, and outlives a resume between refresh and step
        refreshed = step.refreshed or any(group["mask_step"] == step.step for group in self.optimizer.param_groups)
        thresholds = pack_thresholds(tuple(self.optimizer.thresholds().values())) if refreshed else b""
        self.writer.append(replace(step, refreshed=refreshed, thresholds=thresholds))
        self._watch.note()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe(
    optimizer: SparseMeZO,
    model: nn.Module | None = None,
    *,
    pretrained: str | None = None,
    revision: str | None = None,
    adapter: Mapping[str, Any] | None = None,
    adapter_seed: int = 0,
) -> Header:
    """The header of a trajectory that begins now. The first arguments are those of `record`.

    ``adapter`` is the PEFT adapter on the starting weights, as `smezo_pl.SparseMeZOModule` takes it, ``adapter_seed``
    the seed of its own.
    """
    tensors = named_tensors(optimizer, model)
    names = {_identity(tensor): name for name, tensor in reversed(tensors.items())}  # of tied ones the first
    groups = []
    for group in optimizer.param_groups:
        for label, parameter in zip(group["names"], group["params"], strict=True):
            if _identity(parameter) not in names:
                raise TrajectoryError(f"the optimizer's parameter {label!r} is not one of the model's: pass its model")
        groups.append(_group_info(optimizer, group, [names[_identity(parameter)] for parameter in group["params"]]))
    digests = fingerprint(tensors)
    device = optimizer.param_groups[0]["params"][0].device
    state = optimizer.state_dict()["smezo"]
    directions = Directions(optimizer.directions == "per_row", optimizer.rank)
    about = {"name": pretrained, "revision": revision}
    if adapter is not None:
        about |= {"adapter": json.dumps(dict(adapter)), "adapter_seed": str(adapter_seed)}
    return Header(
        run=uuid.uuid4().hex,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seed=optimizer.seed,
        noise=optimizer.noise,
        num_samples=optimizer.num_samples,
        first_step=optimizer.steps_done,
        groups=tuple(groups),
        tensors=tuple(
            TensorInfo(
                name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), digests[name][:TENSOR_DIGEST_SIZE]
            )
            for name, tensor in tensors.items()
        ),
        root=root_digest(digests),
        settings={
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity
            for key, value in optimizer.settings().items()
        },
        model={key: value for key, value in about.items() if value},
        versions=versions(),
        machine={**machine(device), "kernel": get_kernel(optimizer.kernel, device).name},
        noise_scheme=directions.scheme,
        format=format_of_header(directions, optimizer.coefficients),
        directions=optimizer.directions,
        rank=optimizer.rank,
        coefficients=optimizer.coefficients,
        counters={name: state[name] for name in COUNTERS if state.get(name)},
    )


def named_tensors(optimizer: SparseMeZO, model: nn.Module | None) -> dict[str, Tensor]:
    """The tensors that are recorded, by name: the model's, else the optimizer's own."""
    model = model if model is not None else optimizer.attached
    if model is not None:
        return model_tensors(model)
    return {name: parameter.detach() for name, parameter in _own_parameters(optimizer).items()}


def _own_parameters(optimizer: SparseMeZO) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def _identity(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """What two handles of one tensor share."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _group_info(optimizer: SparseMeZO, group: dict[str, Any], names: Sequence[str]) -> GroupInfo:
    dense = optimizer.settings()["dense"] or ()
    fresh = not group["ready"] or group["mask_step"] == optimizer.steps_done
    if not fresh and group["mask_update"] == "constant" and group["mask"] in ("small", "large"):
        raise TrajectoryError(
            "a trajectory begins before the first step or right after refresh_masks(): these constant masks were made "
            "from earlier weights, which no file holds"
        )
    return GroupInfo(
        names=tuple(names),
        numbers=tuple(group["numbers"]),
        dense=tuple(name for name, label in zip(names, group["names"], strict=True) if matches(label, dense)),
        mask=group["mask"],
        mask_update=group["mask_update"],
        maximize=group["maximize"],
        thresholds=None if fresh else tuple(group["thresholds"]),
        mask_step=group["mask_step"],
    )


def _fits(optimizer: SparseMeZO, header: Header) -> bool:
    """Whether an optimizer has the settings that a header holds once for the whole run."""
    fields = ("mask", "mask_update", "maximize")
    return (
        all(getattr(optimizer, name) == getattr(header, name) for name in ("seed", "noise", *DIRECTION_FIELDS))
        and len(optimizer.param_groups) == len(header.groups)
        and all(
            tuple(group["numbers"]) == info.numbers and all(group[field] == getattr(info, field) for field in fields)
            for group, info in zip(optimizer.param_groups, header.groups, strict=True)
        )
    )
