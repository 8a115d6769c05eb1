"""From starting weights and a trajectory to the weights of any step, bit for bit, without data or a forward.

A full-weight snapshot beside a trajectory lets a resume replay only the steps after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from glob import escape
from hashlib import sha256
from math import isinf
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smezo_pl.optim import SparseMeZO, StepRecord
from smezo_pl.optim.kernels import KernelName, get_kernel
from smezo_pl.trajectory.exports import load
from smezo_pl.trajectory.files import atomic_path
from smezo_pl.trajectory.fingerprint import TENSOR_DIGEST_SIZE, fingerprint, model_tensors, root_digest
from smezo_pl.trajectory.header import Header, TrajectoryError
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.records import RATES, Event, unpack_thresholds

log = logging.getLogger(__name__)

_OTHER_WEIGHTS = (
    "something other than the optimizer changed weights during the run, or a kernel gives other bits on this machine "
    "(try kernel='torch')"
)


def replay(
    source: Trajectory | str | Path,
    model: nn.Module | Mapping[str, Tensor],
    steps: int | None = None,
    *,
    force: bool = False,
    kernel: KernelName = "auto",
    progress: Callable[[int], None] | None = None,
    verify: bool = True,
) -> SparseMeZO:
    """Make the weights that a run had after some steps, in place.

    Args:
        source: The trajectory, its file, the run's folder, or an exported run.
        model: The network with the starting weights, or its tensors by name; written in place.
        steps: How many steps of the optimizer; None for all that are recorded.
        force: Whether to continue when the starting weights are not the run's (the result is then no run's).
        kernel: What makes the updates; all kernels give the same bits.
        progress: Called after each step with the number of steps done so far.
        verify: Whether to compare the result with the hash that the run noted after this step, if it did.

    Returns:
        An optimizer of these weights in the state that the run's was in.

    Raises:
        TrajectoryError: If the trajectory is corrupted, of another model or of other starting weights, or the result
            is not what the run had.
    """
    trajectory = source.upto(steps) if isinstance(source, Trajectory) else load(source, steps)
    tensors = tensors_of(trajectory.header, model, str(trajectory.path))
    if not force:
        _load_own_start(trajectory, tensors)
    check_start(trajectory.header, tensors, str(trajectory.path), force=force)
    optimizer = rebuild(trajectory.header, tensors, kernel)
    replay_records(optimizer, trajectory.records, str(trajectory.path), check_masks=not force, progress=progress)
    if verify and not force and matches_run(trajectory, tensors) is False:
        raise TrajectoryError(
            f"{trajectory.path}: the weights after {trajectory.next_step} steps are not those that the run had, though "
            f"they start from the same: {_OTHER_WEIGHTS}"
        )
    return optimizer


@dataclass(frozen=True, slots=True)
class Applied:
    """What was applied to a model.

    Attributes:
        steps: Steps of the optimizer that the weights have behind them.
        identical: Whether they are the run's to the last bit; None where the run stored no hash.
        made_by: Kernel of the run.
        applied_by: Kernel that applied it here.
    """

    steps: int
    identical: bool | None
    made_by: str
    applied_by: str


def apply(model: nn.Module, path: str | Path, *, force: bool = False, kernel: KernelName = "auto") -> Applied:
    """Make a trained model of a loaded one, in place, from an exported run or a trajectory.

    Args:
        model: The network with the starting weights, in the dtype that was trained.
        path: What `export` wrote, or a run's folder.
        force: Whether to continue when the starting weights are not the run's.
        kernel: What makes the updates; all kernels give the same bits.

    Raises:
        TrajectoryError: If the file is corrupted or the model another one; the model is then as it was.

    Examples:
        >>> model, tokenizer = smezo_pl.load_model("facebook/opt-1.3b")  # doctest: +SKIP
        >>> smezo_pl.apply(model, "tune.safetensors")  # doctest: +SKIP
        Applied(steps=20000, identical=True, made_by='numba', applied_by='numba')
    """
    trajectory = load(path)
    replay(trajectory, model, force=force, kernel=kernel, verify=False)
    tensors = tensors_of(trajectory.header, model, str(path))
    identical = matches_run(trajectory, tensors)
    made_by = str(trajectory.header.machine.get("kernel", "unknown"))
    applied_by = get_kernel(kernel, next(iter(tensors.values())).device).name
    if identical is False and not force:
        log.warning("%s: not the run's weights; kernel %s made them, %s applied them", path, made_by, applied_by)
    return Applied(trajectory.next_step, identical, made_by, applied_by)


def tensors_of(
    header: Header, model: nn.Module | Mapping[str, Tensor], source: str, *, check_dtypes: bool = True
) -> dict[str, Tensor]:
    """The recorded tensors of a model; refuses other names or shapes, and other dtypes if ``check_dtypes``."""
    found = model_tensors(model) if isinstance(model, nn.Module) else dict(model)
    missing = [info.name for info in header.tensors if info.name not in found]
    if missing:
        raise TrajectoryError(
            f"{source} is for another model: {len(missing)} of its {len(header.tensors)} tensors are not in this one, "
            f"the first {missing[0]!r}{_called(header)}"
        )
    for info in header.tensors:
        shape, dtype = tuple(found[info.name].shape), str(found[info.name].dtype).removeprefix("torch.")
        if shape != info.shape:
            raise TrajectoryError(
                f"{source} is for another model: {info.name!r} has shape {list(info.shape)} there, {list(shape)} here"
                f"{_called(header)}"
            )
        if check_dtypes and dtype != info.dtype:
            raise TrajectoryError(
                f"{source}: {info.name!r} was trained in {info.dtype} and is {dtype} here: load the model in that "
                "dtype (in the Trainer: the same --trainer.precision)"
            )
    return {info.name: found[info.name] for info in header.tensors}


def check_start(header: Header, tensors: Mapping[str, Tensor], source: str, *, force: bool = False) -> None:
    """Refuse starting weights of which a bit differs from the run's, unless forced."""
    digests = fingerprint(tensors)
    if root_digest(digests) == header.root:
        return
    differing = [info.name for info in header.tensors if digests[info.name][:TENSOR_DIGEST_SIZE] != info.digest]
    what = (
        f"{len(differing)} of {len(header.tensors)} tensors differ, the first {differing[:1] or '?'}{_called(header)}"
    )
    if not force:
        raise TrajectoryError(
            f"{source} starts from other weights than these (a network that was trained must be built again): {what}"
        )
    log.warning("%s starts from other weights than these, applied as asked: %s", source, what)


def rebuild(header: Header, tensors: Mapping[str, Tensor], kernel: KernelName = "auto") -> SparseMeZO:
    """An optimizer that makes a run's updates on these tensors, in the state of its first recorded step."""
    groups = []
    for group in header.groups:
        # parameters of its own on the same memory: those of the model may be frozen where nothing is trained
        named = [(name, nn.Parameter(tensors[name], requires_grad=True)) for name in group.names]
        settings = {"mask": group.mask, "mask_update": group.mask_update, "maximize": group.maximize}
        groups.append({"params": named, **settings})
    optimizer = SparseMeZO(
        groups,
        num_samples=header.num_samples,
        seed=header.seed,
        dense=[escape(name) for group in header.groups for name in group.dense] or None,
        noise=header.noise,
        kernel=kernel,
        directions=header.directions,
        rank=header.rank,
        coefficients=header.coefficients,
    )
    for own, info in zip(optimizer.param_groups, header.groups, strict=True):
        own.update(numbers=list(info.numbers), mask_step=info.mask_step)
        if info.thresholds is not None:
            own.update(thresholds=list(info.thresholds), ready=True)
    state = optimizer.state_dict()
    state["smezo"] |= {"steps_done": header.first_step, **header.counters}
    optimizer.load_state_dict(state)
    return optimizer


def replay_records(
    optimizer: SparseMeZO,
    records: Iterable[StepRecord],
    source: str,
    *,
    check_masks: bool = True,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Make the updates of some steps, the optimizer's next ones, and refresh masks where the run did.

    Thresholds that are not the run's are refused if ``check_masks``.
    """
    for record in records:
        set_rates(optimizer, record)
        if record.refreshed:
            optimizer.refresh_masks()
            if check_masks and record.thresholds:  # an exported run has none
                _check_thresholds(optimizer, record, source)
        optimizer.replay_steps([record])
        if progress is not None:
            progress(record.step + 1)


def set_rates(optimizer: SparseMeZO, record: StepRecord) -> None:
    """Give each group the learning rate, weight decay, eps and sparsity of a step, and the optimizer its samples."""
    optimizer.num_samples = record.samples or optimizer.num_samples
    for name in RATES:
        for group, value in zip(optimizer.param_groups, getattr(record, name), strict=True):
            group[name] = value


def matches_run(trajectory: Trajectory, tensors: Mapping[str, Tensor]) -> bool | None:
    """Whether weights are those that the run had at its last step; None if it stored no hash of them."""
    root = trajectory.final_root
    return None if root is None else root_digest(fingerprint(tensors)).hex() == root


def _check_thresholds(optimizer: SparseMeZO, record: StepRecord, source: str) -> None:
    found = optimizer.thresholds()
    recorded = unpack_thresholds(record.thresholds, len(found))
    for (name, now), then in zip(found.items(), recorded, strict=True):
        if now != then:
            raise TrajectoryError(
                f"{source}: the mask refresh before step {record.step} gives {name!r} the threshold {now!r}, the run "
                f"had {then!r}: {_OTHER_WEIGHTS}"
            )


def _called(header: Header) -> str:
    name = header.model.get("name")
    return f" (the run's model was {name!s:.200})" if name else ""


_MASK = "mask."


START_FILE = Path("anchors", "start.safetensors")
"""Where a run's folder holds its starting weights, if no other file does."""


def write_snapshot(path: Path, optimizer: SparseMeZO, header: Header, tensors: Mapping[str, Tensor]) -> str:
    """Write the present weights and the optimizer's constant masks; returns the file's hash, for the trajectory."""
    names = {number: name for group in header.groups for number, name in zip(group.numbers, group.names, strict=True)}
    bits: Mapping[int, Tensor] = optimizer.state_dict()["smezo"]["bits"]
    masks = {_MASK + names[number]: packed for number, packed in bits.items()}
    return write_tensors(path, {name: tensors[name] for name in header.active} | masks)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a safetensors file, whole or not at all; returns its hash."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as part:
        save_file(content, part)
        return _file_digest(part)


def replay_from_snapshot(trajectory: Trajectory, tensors: Mapping[str, Tensor]) -> SparseMeZO | None:
    """Like `replay`, from the last full-weight snapshot of a run, whatever the tensors hold; None if none is valid."""
    for event in reversed(trajectory.events_of("anchor")):
        path = trajectory.path.parent / str(event.facts.get("file"))
        if _is_valid(path, event):
            break
    else:
        return None
    optimizer = _load_snapshot(path, trajectory.upto(event.steps), tensors)
    after = trajectory.records[event.steps - trajectory.header.first_step :]
    replay_records(optimizer, after, str(trajectory.path))
    if matches_run(trajectory, tensors) is False:
        raise TrajectoryError(
            f"{trajectory.path}: the weights made from {path} are not those that the run had; without that file "
            "they are made from the start"
        )
    log.info("replayed %d steps from the full-weight snapshot %s", len(after), path)
    return optimizer


def _load_snapshot(path: Path, before: Trajectory, tensors: Mapping[str, Tensor]) -> SparseMeZO:
    """Put the weights of a snapshot, taken after the steps of ``before``, into tensors; the optimizer as it was."""
    header, records, content = before.header, before.records, load_file(path)
    for name in (name for name in content if not name.startswith(_MASK)):
        tensors[name].copy_(content[name])
    optimizer = rebuild(header, tensors)
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
    state["smezo"]["steps_done"] = before.next_step
    state["smezo"]["bits"] = {
        numbers[name.removeprefix(_MASK)]: packed for name, packed in content.items() if name.startswith(_MASK)
    }
    if records:
        masks = {"unread": records[-1].unread, "shared": records[-1].shared}
        known = masks if header.directions == "per_row" else ["unread"]
        state["smezo"] |= {name: [n for n in numbers.values() if masks[name] >> n & 1] for name in known}
    optimizer.load_state_dict(state)
    return optimizer


def own_start(trajectory: Trajectory) -> Event | None:
    """The event of the starting weights that a run kept, as no model has them; None if it kept none."""
    first = trajectory.header.first_step
    return next((event for event in trajectory.events_of("anchor") if event.steps == first), None)


def _load_own_start(trajectory: Trajectory, tensors: Mapping[str, Tensor]) -> None:
    """Put the starting weights that a run kept into tensors; does nothing if it kept none."""
    if (event := own_start(trajectory)) is None:
        return
    path = trajectory.path.parent / str(event.facts.get("file"))
    if _is_valid(path, event):
        with torch.no_grad():
            for name, value in load_file(path).items():
                tensors[name].copy_(value)
    else:
        log.warning("%s, where the run keeps its starting weights, is missing or corrupted", path)


def _is_valid(path: Path, event: Event) -> bool:
    """Whether the file of an ``anchor`` is there, and what was written."""
    if not path.is_file():
        return False
    valid = _file_digest(path) == event.facts.get("sha256")
    if not valid:
        log.warning("%s is corrupted; the weights are made without it", path)
    return valid


def _file_digest(path: Path) -> str:
    digest = sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
