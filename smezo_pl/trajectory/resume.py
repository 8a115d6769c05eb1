"""Checkpoints without weights in the Trainer: written and read where Lightning does it, completed by replay.

When Lightning reads a checkpoint the weights may still be on another device and in another dtype. So a module calls
`install` in ``setup``, and `restore` in ``on_train_start``, ``on_validation_start``, ``on_test_start`` and
``on_predict_start``. `SeedCheckpoint` calls both as well, so a Trainer with it needs nothing of the module.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory.database import copy, move
from smezo_pl.trajectory.files import atomic_path, write_atomically
from smezo_pl.trajectory.fingerprint import fingerprint, machine, root_digest
from smezo_pl.trajectory.header import Header, TrajectoryError
from smezo_pl.trajectory.log import FILE_NAME, Trajectory, TrajectoryWriter, rewrite
from smezo_pl.trajectory.recorder import Recorder, describe
from smezo_pl.trajectory.replaying import START_FILE, replay, replay_from_snapshot, tensors_of, write_tensors
from smezo_pl.trajectory.settings import Resumed, Training
from smezo_pl.trajectory.writes import is_written, remember

log = logging.getLogger(__name__)

SEED_KEY = "smezo_pl"
"""Entry of a checkpoint that stands for its weights: ``run``, ``steps``, ``check`` and ``record`` (a path from the
checkpoint's folder to the trajectory)."""


def position_of(writer: TrajectoryWriter) -> dict[str, Any]:
    """What identifies the present position of a trajectory: its run, its number of steps, and their checksum."""
    return {"run": writer.header.run, "steps": writer.steps, "check": writer.check.hex()}


@dataclass(frozen=True)
class Atomic:
    """``storage_options`` of a file written whole or not at all; ``writer``'s trajectory takes the place of weights."""

    writer: TrajectoryWriter | None


class SeedCheckpointIO(CheckpointIO):
    """Writes and reads checkpoints without weights; all others as ``inner``, which the strategy used before."""

    def __init__(self, inner: CheckpointIO, trainer: Trainer) -> None:
        self.inner, self.trainer = inner, trainer
        self.trajectory: Trajectory | None = None  # up to the checkpoint that was read last, if it had no weights
        self.is_restored = False
        self.resumed: Resumed | None = None  # settings of the checkpoint that a fit read last
        self._is_checked = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; raise `TrajectoryError` if it cannot be written, or could not be read back."""
        if not isinstance(storage_options, Atomic):
            self.inner.save_checkpoint(checkpoint, path, storage_options)
            return
        path, writer = Path(path), storage_options.writer
        without = {name: value for name, value in checkpoint.items() if name != "state_dict"}
        if writer is not None:
            checkpoint = without
            checkpoint[SEED_KEY] = {**position_of(writer), "record": os.path.relpath(writer.path, path.parent)}
            for state in checkpoint["optimizer_states"]:
                if "smezo" in state:
                    state["smezo"]["bits"] = {}  # constant masks: the replay makes them again
            _refuse_weights(checkpoint, {info.shape for info in writer.header.tensors})
        if not self._is_checked:
            try:  # before training, what could not be read back after it
                torch.load(io.BytesIO(_serialized(without)), weights_only=True)
            except Exception as error:
                raise TrajectoryError(
                    "a checkpoint of this run could not be read back: a hyperparameter, or the state of a callback, "
                    "scheduler or data loader is of no plain type; in the module, "
                    f"self.save_hyperparameters(ignore=[...]) ({error})"
                ) from error
            self._is_checked = True
        data = _serialized(checkpoint)
        if writer is not None:
            # before the file is there: without the event it would be taken for corrupted
            writer.add_event("checkpoint", file=path.name, sha256=sha256(data).hexdigest())
        write_atomically(path, data)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; one without weights gets the present ones in their place until `restore`.

        Refused if it is corrupted, or belongs to another model or to a trajectory that is not there.
        """
        self.trajectory = None
        try:
            checkpoint = self.inner.load_checkpoint(path, weights_only=weights_only)
        except FileNotFoundError:
            raise
        except Exception as error:  # a corrupted pickle can raise anything
            [reason, *_] = str(error).strip().splitlines() or [type(error).__name__]
            raise TrajectoryError(
                f"{path}: the checkpoint cannot be read, it is corrupted or truncated ({reason})"
            ) from error
        if not isinstance(checkpoint, dict) or not checkpoint.keys() & {"state_dict", SEED_KEY}:
            raise TrajectoryError(
                f"{path}: the checkpoint is corrupted: it holds neither weights nor a position in a trajectory"
            )
        resumes, settings = self.trainer.state.fn == TrainerFn.FITTING, None
        if not resumes:
            # their states are of no use here, and Lightning would warn of each callback that is not there
            checkpoint.pop("callbacks", None)
        if "state_dict" not in checkpoint:
            trajectory = find_trajectory(Path(path), checkpoint[SEED_KEY])
            module = self.trainer.lightning_module
            tensors_of(trajectory.header, network_of(module, trajectory.header), str(path), check_dtypes=False)
            self.trajectory, self.is_restored, settings = trajectory, False, trajectory.settings
            # Lightning loads this onto itself; the weights of the checkpoint come in restore()
            checkpoint = {**checkpoint, "state_dict": module.state_dict()}
        self.resumed = Resumed(checkpoint, settings) if resumes and "optimizer_states" in checkpoint else None
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        self.inner.remove_checkpoint(path)


def _serialized(checkpoint: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


_MOST_ELEMENTS = 1 << 16  # of a tensor in a checkpoint without weights


def _refuse_weights(value: Any, shapes: set[tuple[int, ...]], *keys: Any) -> None:
    """Raise a `TrajectoryError` for a tensor that is as large as weights or has the shape of a matrix of them."""
    if isinstance(value, Tensor):
        if value.numel() > _MOST_ELEMENTS or (value.dim() > 1 and tuple(value.shape) in shapes):
            raise TrajectoryError(
                f"a checkpoint without weights would hold a tensor of shape {list(value.shape)}, under "
                f"{''.join(f'[{key!r}]' for key in keys)}: leave out the callback or hyperparameter that keeps it, or "
                "use WeightCheckpoint in place of SeedCheckpoint, which saves whole weights"
            )
    elif isinstance(value, Mapping | list | tuple):
        for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            _refuse_weights(child, shapes, *keys, key)


def install(trainer: Trainer) -> SeedCheckpointIO:
    """Let the Trainer write and read checkpoints without weights. Call it in ``setup``; again, it does nothing."""
    remember(network_of(trainer.lightning_module))
    present = trainer.strategy.checkpoint_io
    if not isinstance(present, SeedCheckpointIO):
        present = SeedCheckpointIO(present, trainer)
        trainer.strategy.checkpoint_io = present
    return present


def resumed_settings(trainer: Trainer) -> Resumed | None:
    """The settings of the checkpoint that the Trainer resumes from; None for a new run."""
    return install(trainer).resumed if trainer.ckpt_path is not None else None


def settle(trainer: Trainer, training: Training, optimizer: Optimizer) -> Resumed | None:
    """`Resumed.settle` with the checkpoint that the Trainer resumes from, if it does and this was not done before."""
    resumed = resumed_settings(trainer)
    refreshes = any(getattr(callback, "keeps_sparsity", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return resumed if resumed is not None and resumed.settle(training, optimizer, refreshes) else None


def restore(trainer: Trainer) -> None:
    """Bring the weights of a checkpoint without weights back by replay; does nothing if none was read."""
    checkpoints, module, began = install(trainer), trainer.lightning_module, perf_counter()
    trajectory = checkpoints.trajectory
    if trajectory is None or checkpoints.is_restored:
        return
    with torch.inference_mode(False), torch.no_grad():
        tensors = tensors_of(trajectory.header, network_of(module, trajectory.header), str(trajectory.path))
        replayed = replay_from_snapshot(trajectory, tensors)
        if replayed is None:
            _load_starting_weights(trajectory.header, tensors, trainer)
            replayed = replay(trajectory, tensors)
        if trainer.state.fn == TrainerFn.FITTING:  # else the optimizer is that of a fit before
            _hand_over(replayed, trainer)
    checkpoints.is_restored = True
    steps, seconds = trajectory.next_step, perf_counter() - began
    log.info("restored the weights after %d steps, by replay of %s in %.1f s", steps, trajectory.path, seconds)
    then, now = trajectory.header.machine, machine(next(iter(tensors.values())).device)
    differing = [f"{key} {then[key]} then, {now[key]} now" for key in now if key in then and then[key] != now[key]]
    if differing:
        what = "the weights are exact, but the model's forward may differ in its last bits from the run's: %s"
        log.info(what, "; ".join(differing))


def refuse_unrestored(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without weights outside a Trainer, where nobody would bring them back."""
    if SEED_KEY in checkpoint and module._trainer is None:
        raise TrajectoryError(
            "this checkpoint holds no weights, they come back by replay: give it to the Trainer (fit, validate, test "
            "or predict with ckpt_path=...), or make a model of it with smezo_pl.replay"
        )


def find_trajectory(path: Path, seed: Mapping[str, Any]) -> Trajectory:
    """The trajectory of the checkpoint ``path``, up to it; ``seed`` is its entry `SEED_KEY`."""
    try:
        run, steps, check = seed["run"], int(seed["steps"]), str(seed["check"])
        named = Path(os.path.normpath(path.parent / str(seed["record"])))
    except (KeyError, TypeError, ValueError) as error:
        raise TrajectoryError(
            f"{path}: the checkpoint is corrupted: its position in the trajectory is unreadable ({error})"
        ) from None
    candidates = [named, path.parent / named.name, path.parent / FILE_NAME, path.parent.parent / FILE_NAME]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise TrajectoryError(
            f"{path} holds no weights; they come back from the run's trajectory, which is not at {named}: put the "
            f"run's {FILE_NAME} there or beside the checkpoint"
        )
    trajectory = Trajectory.read(file, damaged=True)
    if trajectory.header.run != run:
        raise TrajectoryError(f"{path} belongs to another run than {file}: put that run's {FILE_NAME} beside it")
    if steps > trajectory.next_step:
        reason = trajectory.damage or f"{file.name}-wal, the log beside it, is missing or corrupted"
        left = f"`smezo replay --step {trajectory.next_step}` gives the weights so far"
        raise TrajectoryError(
            f"{path} is the checkpoint after {steps} steps, and {file} holds only {trajectory.next_step}: {reason}. "
            + (left if trajectory.records else "No step is left")
        )
    known = {event.facts.get("sha256") for event in trajectory.events_of("checkpoint")}
    trajectory = trajectory.upto(steps)
    if sha256(path.read_bytes()).hexdigest() not in known or trajectory.check.hex() != check:
        raise TrajectoryError(
            f"{path} is not a checkpoint that {file} knows: it is corrupted, or the run was resumed from an earlier "
            "one and went another way"
        )
    return trajectory


def network_of(module: LightningModule, header: Header | None = None) -> nn.Module:
    """The network of a trajectory: the module's ``model`` if it has the trajectory's tensors, else the module."""
    network = getattr(module, "model", None)
    if isinstance(network, nn.Module):
        names = network.state_dict()
        if header is None or header.tensors[0].name in names or header.active[0] in names:
            return network
    return module


def _load_starting_weights(header: Header, tensors: Mapping[str, Tensor], trainer: Trainer) -> None:
    """Give the network its starting weights again if it was trained in this process."""
    reload = getattr(trainer.lightning_module, "starting_network", None)
    if reload is None or root_digest(fingerprint(tensors)) == header.root:
        return
    with trainer.precision_plugin.module_init_context():
        network = reload()
    start = {} if network is None else network.state_dict()
    for name, tensor in tensors.items():
        if name in start and start[name].shape == tensor.shape:
            tensor.copy_(start[name])


def _hand_over(replayed: SparseMeZO, trainer: Trainer) -> None:
    """Give the masks to the optimizer that continues; its other state is in the checkpoint."""
    for optimizer in trainer.optimizers:
        if not isinstance(optimizer, SparseMeZO):
            continue
        if not all(group["ready"] for group in optimizer.param_groups):
            continue  # another sparsity was given: the next step computes all masks
        if any(group["mask_step"] == optimizer.steps_done for group in optimizer.param_groups):
            optimizer.refresh_masks()  # as was done after the last step and before the checkpoint
            continue
        for own, other in zip(optimizer.param_groups, replayed.param_groups, strict=True):
            other["names"] = list(own["names"])  # the trajectory's are the network's, which may differ by a prefix
        optimizer.adopt_masks(replayed)


def earlier_trajectory(trainer: Trainer, place: Mapping[str, Any]) -> Trajectory | None:
    """The trajectory that a resumed run continues, up to where it does; None for a new run.

    Call it when the checkpoint was read. ``place`` is the position in the callback's state, empty if there is none.
    """
    restored = install(trainer).trajectory
    if restored is not None or not place:
        return restored
    # a checkpoint with weights: the trajectory is where it was
    path, steps = Path(place["record"]), place["steps"]
    trajectory = Trajectory.read(path, damaged=True) if path.is_file() else None
    if trajectory is not None and trajectory.header.run == place["run"] and trajectory.next_step >= steps:
        trajectory = trajectory.upto(steps)
        if trajectory.check.hex() == place["check"]:
            return trajectory
    log.warning(
        "the trajectory of the run's first %d steps is not in %s: a new one begins with the weights of the "
        "checkpoint, and can be replayed on those alone",
        steps,
        path,
    )
    return None


def open_trajectory(optimizer: SparseMeZO, module: LightningModule, path: Path, earlier: Trajectory | None) -> Recorder:
    """Begin a trajectory, or continue an earlier one in this run's folder, which may hold no other run's."""
    if earlier is not None:
        writer = _continue(earlier, path)
        if (resumed := resumed_settings(module.trainer)) is not None and resumed.changes:
            writer.add_event("settings", changes=resumed.changes)
        log.info("the run resumes after %d steps, recorded in %s", writer.steps, path)
        return Recorder(optimizer, writer, network_of(module, writer.header))
    network = network_of(module)
    known = [name for name in ("pretrained", "revision", "adapter", "adapter_seed") if hasattr(module, name)]
    header = describe(optimizer, network, **{name: getattr(module, name) for name in known})
    recorder = Recorder(optimizer, TrajectoryWriter.create(path, header), network)
    if is_written(network):
        _keep_start(recorder, network)
    return recorder


def _keep_start(recorder: Recorder, network: nn.Module) -> None:
    """Keep the starting weights beside the trajectory, where building or loading the network would give others."""
    writer = recorder.writer
    path = writer.path.parent / START_FILE
    log.info(
        "the weights were changed since the network was built: the run begins with those that it keeps in %s", path
    )
    digest = write_tensors(path, tensors_of(writer.header, network, str(writer.path)))
    writer.add_event("anchor", file=str(START_FILE), sha256=digest)


def _continue(earlier: Trajectory, path: Path) -> TrajectoryWriter:
    steps = earlier.next_step
    if not path.exists():
        copy(earlier.path, path)
        if (start := earlier.path.parent / START_FILE).is_file():
            with atomic_path(path.parent / START_FILE) as part:
                shutil.copyfile(start, part)
    elif not os.path.samefile(earlier.path, path):
        raise TrajectoryError(f"{path} is the trajectory of another run: give SeedCheckpoint another dirpath")
    whole = Trajectory.read(path, damaged=True)
    later = [event.steps for event in whole.events_of("checkpoint") if event.steps > steps]
    if whole.damage is not None:
        kept, anew = _free_name(path, "damaged"), _free_name(path, "valid")
        log.warning(
            "%s is corrupted (%s): its valid part is rewritten, the file is kept as %s", path, whole.damage, kept
        )
        rewrite(whole.upto(steps), anew)
        move(path, kept)
        os.replace(anew, path)
    elif later:
        kept = _free_name(path, f"until-{max(later)}")
        copy(path, kept)
        log.info("the run resumes from step %d of %d; the trajectory so far is kept as %s", steps, max(later), kept)
    return TrajectoryWriter.resume(path, steps)


def _free_name(path: Path, why: str) -> Path:
    names = (path.with_name(f"{path.stem}-{why}{number or ''}{path.suffix}") for number in range(1 << 20))
    return next(name for name in names if not name.exists())
