"""From an optimizer to its record: what stands in the header, and one row after each step."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

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
from smezo_pl.trajectory.header import GroupInfo, Header, TensorInfo, TrajectoryError
from smezo_pl.trajectory.log import Trajectory, TrajectoryWriter
from smezo_pl.trajectory.records import pack_thresholds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smezo_pl.optim import SparseMeZO

log = logging.getLogger(__name__)


def record(
    optimizer: SparseMeZO,
    path: str | Path,
    model: nn.Module | None = None,
    *,
    pretrained: str | None = None,
    revision: str | None = None,
) -> Recorder:
    """Record every step that an optimizer takes from now on.

    Call it before the first step: the record starts from today's weights, of which it keeps a fingerprint. Where the
    file holds the beginning of this optimizer's run, it is continued, and steps that are about to be taken again are
    removed from it.

    Args:
        optimizer: The optimizer.
        path: File to write, by convention ``<run>/trajectory.smezo``; its folder is made.
        model: The network whose names and tensors the record speaks of; by default the one that the optimizer is
            attached to, else its parameters alone.
        pretrained: Name of the starting weights, as `smezo_pl.load_model` takes it.
        revision: Their revision, if known.

    Returns:
        The recorder. `Recorder.close` it after the last step, or use it as a context.

    Raises:
        TrajectoryError: If another run is recorded there, or it cannot be written.

    Examples:
        >>> with record(optimizer, "runs/one/trajectory.smezo"):
        ...     for batch in batches:
        ...         optimizer.step(lambda: loss(batch))
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        earlier = Trajectory.read(path)
        if earlier.rows and optimizer.steps_done <= earlier.header.first_step:
            raise TrajectoryError(
                f"{path} holds a run of {len(earlier.rows)} steps, and this optimizer has not taken its first: give "
                "another path"
            )
        return Recorder(optimizer, TrajectoryWriter.resume(path, optimizer.steps_done), model)
    header = describe(optimizer, model, pretrained=pretrained, revision=revision)
    return Recorder(optimizer, TrajectoryWriter.create(path, header), model)


class Recorder:
    """Appends a row to a record after each step of an optimizer.

    Args:
        optimizer: The optimizer; its next step must be the record's next.
        writer: The record.
        model: The network of the record, as for `record`.

    Raises:
        TrajectoryError: If the record is at another step, or of an optimizer with other groups.
    """

    def __init__(self, optimizer: SparseMeZO, writer: TrajectoryWriter, model: nn.Module | None = None) -> None:
        self.optimizer, self.writer, self.model = optimizer, writer, model
        self._handle: Any = None
        try:
            if writer.steps != optimizer.steps_done:
                raise TrajectoryError(
                    f"{writer.path} holds {writer.steps} steps, the optimizer has done {optimizer.steps_done}: replay "
                    "the record first, or record to another file"
                )
            self._constant = _constant_settings(optimizer)
            if self._constant != _recorded_settings(writer.header):
                raise TrajectoryError(
                    f"{writer.path} is the record of an optimizer with other settings (seed, noise, mask, num_samples "
                    "or groups): record to another file"
                )
        except BaseException:
            writer.close()
            raise
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def catch_up(self) -> None:
        """Record the last step if its row is missing: after `NonFiniteLossError` torch runs no hook."""
        if self.optimizer.steps_done > self.writer.steps:
            self._after_step(self.optimizer)

    def mark_weights(self) -> None:
        """Note the fingerprint of today's weights, so that a replay can be checked against it; reads all weights."""
        digests = fingerprint(named_tensors(self.optimizer, self.model))
        self.writer.mark("weights", root=root_digest(digests).hex())

    def close(self) -> None:
        """Stop recording; the file is left complete in itself. Harmless when closed already."""
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        try:
            self.catch_up()
        finally:
            self.writer.close()

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        record = self.optimizer.last_step
        groups = self.optimizer.param_groups
        if _constant_settings(self.optimizer) != self._constant:
            raise TrajectoryError(
                f"{self.writer.path}: the optimizer's groups, seed, noise, mask or num_samples changed during the run; "
                "a record holds them once: start another one"
            )
        # the group's own number says the same as record.refreshed, and outlives a resume between refresh and step
        refreshed = record.refreshed or any(group["mask_step"] == record.step for group in groups)
        thresholds = tuple(self.optimizer.thresholds().values()) if refreshed else ()
        self.writer.append(
            replace(record, refreshed=refreshed, thresholds=pack_thresholds(thresholds) if refreshed else b"")
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
    """The header of a record that begins now (see `record`).

    Args:
        optimizer: The optimizer.
        model: The network.
        pretrained: Name of the starting weights.
        revision: Their revision.
        adapter: The PEFT adapter that was put on them, as `smezo_pl.SparseMeZOModule` takes it.
        adapter_seed: Seed of the adapter's own starting weights.

    Raises:
        TrajectoryError: If the optimizer holds a parameter that the model does not, or masks of earlier weights.
    """
    tensors = named_tensors(optimizer, model)
    names = {id_of(tensor): name for name, tensor in tensors.items()}
    groups = []
    for group in optimizer.param_groups:
        strangers = [label for label, p in zip(group["names"], group["params"], strict=True) if id_of(p) not in names]
        if strangers:
            raise TrajectoryError(
                f"the optimizer's parameter {strangers[0]!r} is not one of the model's: give its model"
            )
        groups.append(_group_info(optimizer, group, [names[id_of(parameter)] for parameter in group["params"]]))
    digests = fingerprint(tensors)
    device = optimizer.param_groups[0]["params"][0].device
    kernel = get_kernel(optimizer.kernel, device).name
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
        settings=_plain(optimizer.settings()),
        model={
            key: value
            for key, value in (
                ("name", pretrained),
                ("revision", revision),
                ("adapter", None if adapter is None else json.dumps(dict(adapter))),
                ("adapter_seed", None if adapter is None else str(adapter_seed)),
            )
            if value
        },
        versions=versions(),
        machine={**machine(device), "kernel": kernel},
    )


def named_tensors(optimizer: SparseMeZO, model: nn.Module | None) -> dict[str, Tensor]:
    """The tensors that a record of the optimizer speaks of, by name: the model's, else the optimizer's own."""
    model = model if model is not None else optimizer.attached
    if model is not None:
        return model_tensors(model)
    return {
        name: parameter.detach()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def id_of(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """What two handles of one tensor share."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _group_info(optimizer: SparseMeZO, group: dict[str, Any], names: Sequence[str]) -> GroupInfo:
    dense = optimizer.settings()["dense"] or ()
    fresh = not group["ready"] or group["mask_step"] == optimizer.steps_done
    if not fresh and group["mask_update"] == "constant" and group["mask"] in ("small", "large"):
        raise TrajectoryError(
            "a record begins before the first step or right after refresh_masks(): these constant masks were made from "
            "earlier weights, which no file holds"
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


def _constant_settings(optimizer: SparseMeZO) -> tuple[Any, ...]:
    groups = tuple(
        (tuple(group["numbers"]), group["mask"], group["mask_update"], group["maximize"])
        for group in optimizer.param_groups
    )
    return optimizer.seed, optimizer.noise, optimizer.num_samples, groups


def _recorded_settings(header: Header) -> tuple[Any, ...]:
    groups = tuple((group.numbers, group.mask, group.mask_update, group.maximize) for group in header.groups)
    return header.seed, header.noise, header.num_samples, groups


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them."""
    return {
        key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for key, value in settings.items()
    }
