"""Checkpoints without weights in the Trainer: read in Lightning's own place, completed by replay when a stage starts.

A module calls `install` in ``setup`` and `restore` in ``on_train_start``, ``on_validation_start``, ``on_test_start``
and ``on_predict_start``: when Lightning reads the file the weights may still be on another device and in another dtype.
`SeedCheckpoint` calls both as well, so a Trainer with it needs nothing of the module.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory.fingerprint import fingerprint, machine, root_digest
from smezo_pl.trajectory.header import Header, TrajectoryError
from smezo_pl.trajectory.log import FILE_NAME, Trajectory
from smezo_pl.trajectory.replaying import check_shapes, matches_run, replay, replay_rows, tensors_of
from smezo_pl.trajectory.snapshots import load_anchor, nearest_anchor

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

log = logging.getLogger(__name__)

SEED_KEY = "smezo_pl"
"""Entry of a checkpoint that stands for its weights: ``run``, ``steps``, ``check`` and ``record`` (a path from the
checkpoint's folder)."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint without weights that was read.

    Attributes:
        trajectory: The run up to the checkpoint.
        done: Whether its weights are back.
    """

    trajectory: Trajectory
    done: bool = False


class SeedCheckpointIO(CheckpointIO):
    """Reads checkpoints with and without weights; writes as the strategy did before.

    Args:
        inner: What the strategy used before.
        trainer: The Trainer.
    """

    def __init__(self, inner: CheckpointIO, trainer: Trainer) -> None:
        self.inner, self.trainer = inner, trainer
        self.restored: Restored | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; one without weights gets today's weights in their place until `restore`.

        Raises:
            TrajectoryError: If it is damaged, or belongs to another model or to a record that is not there.
        """
        self.restored = None
        try:
            checkpoint = self.inner.load_checkpoint(path, weights_only=weights_only)
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TrajectoryError(
                f"{path}: the checkpoint cannot be read, it is damaged or cut short ({reason})"
            ) from error
        if isinstance(checkpoint, dict) and self.trainer.state.fn != TrainerFn.FITTING:
            # their states are of no use here, and Lightning would warn of each callback that is not there
            checkpoint.pop("callbacks", None)
        if isinstance(checkpoint, dict) and "state_dict" in checkpoint:
            return checkpoint
        if not isinstance(checkpoint, dict) or SEED_KEY not in checkpoint:
            raise TrajectoryError(
                f"{path}: the checkpoint is damaged: it holds neither weights nor a place in a record"
            )
        trajectory = find_record(Path(path), checkpoint[SEED_KEY])
        module = self.trainer.lightning_module
        check_shapes(trajectory.header, network_of(module, trajectory.header), str(path))
        self.restored = Restored(trajectory)
        # Lightning loads this onto itself; the weights of the checkpoint come in restore()
        return {**checkpoint, "state_dict": module.state_dict()}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        self.inner.remove_checkpoint(path)


def install(trainer: Trainer) -> SeedCheckpointIO:
    """Let the Trainer read checkpoints without weights. To be called in ``setup``; calling it again does nothing."""
    present = trainer.strategy.checkpoint_io
    if not isinstance(present, SeedCheckpointIO):
        present = SeedCheckpointIO(present, trainer)
        trainer.strategy.checkpoint_io = present
    return present


def restore(trainer: Trainer) -> None:
    """Bring the weights of a checkpoint without weights back by replay; does nothing if none was read.

    Raises:
        TrajectoryError: If they cannot be brought back.
    """
    checkpoints = trainer.strategy.checkpoint_io
    if not isinstance(checkpoints, SeedCheckpointIO) or checkpoints.restored is None or checkpoints.restored.done:
        return
    trajectory, module = checkpoints.restored.trajectory, trainer.lightning_module
    began = perf_counter()
    with torch.inference_mode(False), torch.no_grad():
        tensors = tensors_of(trajectory.header, network_of(module, trajectory.header), str(trajectory.path))
        replayed = _from_anchor(trajectory, tensors)
        if replayed is None:
            _start_again(trajectory.header, tensors, trainer)
            replayed = replay(trajectory, tensors)
        _hand_over(replayed, trainer)
    checkpoints.restored = Restored(trajectory, done=True)
    log.info(
        "the weights after %d steps are back, by replay of %s in %.1f s",
        trajectory.next_step,
        trajectory.path,
        perf_counter() - began,
    )
    _compare_machines(trajectory.header, next(iter(tensors.values())).device)


def refuse_unrestored(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint without weights where nobody would bring them back. For ``on_load_checkpoint``.

    Raises:
        TrajectoryError: If the module is not in a Trainer that reads such checkpoints.
    """
    if SEED_KEY not in checkpoint:
        return
    trainer = module._trainer if hasattr(module, "_trainer") else None
    if trainer is None or not isinstance(trainer.strategy.checkpoint_io, SeedCheckpointIO):
        raise TrajectoryError(
            "this checkpoint holds no weights, they come back by replay: give it to the Trainer (fit, validate, test "
            "or predict with ckpt_path=...), or make a model of it with smezo_pl.replay"
        )


def find_record(path: Path, seed: Mapping[str, Any]) -> Trajectory:
    """The record that a checkpoint speaks of, up to the checkpoint.

    Args:
        path: The checkpoint's file.
        seed: Its entry `SEED_KEY`.

    Raises:
        TrajectoryError: If the record is missing, of another run or too short, or the checkpoint is damaged.
    """
    try:
        run, steps, check, named = (
            seed["run"],
            int(seed["steps"]),
            str(seed["check"]),
            Path(os.path.normpath(path.parent / str(seed["record"]))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TrajectoryError(
            f"{path}: the checkpoint is damaged: its place in the record is unreadable ({error})"
        ) from None
    candidates = dict.fromkeys(
        [named, path.parent / named.name, path.parent / FILE_NAME, path.parent.parent / FILE_NAME]
    )
    record = next((candidate for candidate in candidates if candidate.is_file()), None)
    if record is None:
        raise TrajectoryError(
            f"{path} holds no weights; they come back from the run's record, which is not at {named}: put the run's "
            f"{FILE_NAME} there or beside the checkpoint"
        )
    trajectory = Trajectory.read(record, damaged=True)
    digest = sha256(path.read_bytes()).hexdigest()
    known = digest in {mark.facts.get("sha256") for mark in trajectory.marked("checkpoint")}
    if trajectory.header.run != run:
        raise TrajectoryError(f"{path} belongs to another run than {record}: put that run's {FILE_NAME} beside it")
    if steps > trajectory.next_step:
        left = trajectory.next_step - trajectory.header.first_step
        raise TrajectoryError(
            f"{path} is the checkpoint after {steps} steps, and {record} holds only {trajectory.next_step}: "
            + (trajectory.damage or f"{record.name}-wal, the log beside it, is gone or damaged")
            + (
                f". `smezo replay --step {trajectory.next_step}` gives the weights so far"
                if left
                else ". No step is left"
            )
        )
    upto = trajectory.upto(steps)
    if not known or upto.check.hex() != check:
        raise TrajectoryError(
            f"{path} is not a checkpoint that {record} knows: it is damaged, or the run was resumed from an earlier "
            "one and went another way"
        )
    return upto


def network_of(module: LightningModule, header: Header | None = None) -> nn.Module:
    """The network that a record speaks of: the module's ``model`` if it has the record's tensors, else the module."""
    network = getattr(module, "model", None)
    if not isinstance(network, nn.Module):
        return module
    if header is None or header.tensors[0].name in network.state_dict() or header.active[0] in network.state_dict():
        return network
    return module


def _from_anchor(trajectory: Trajectory, tensors: Mapping[str, Tensor]) -> SparseMeZO | None:
    """The weights by way of the last anchor; None if there is none that holds."""
    found = nearest_anchor(trajectory)
    if found is None:
        return None
    mark, path = found
    optimizer = load_anchor(trajectory, mark, path, tensors)
    after = trajectory.rows[mark.steps - trajectory.header.first_step :]
    replay_rows(optimizer, after, str(trajectory.path))
    if matches_run(trajectory, tensors) is False:
        raise TrajectoryError(
            f"{trajectory.path}: the weights made from {path} are not those that the run had; without that file "
            "they are made from the start"
        )
    log.info("replayed %d steps from the anchor %s", len(after), path)
    return optimizer


def _start_again(header: Header, tensors: Mapping[str, Tensor], trainer: Trainer) -> None:
    """Give the network its starting weights again if it was trained in this process."""
    if root_digest(fingerprint(tensors)) == header.root:
        return
    reload = getattr(trainer.lightning_module, "starting_network", None)
    if reload is None:
        return
    with trainer.precision_plugin.module_init_context():
        network = reload()
    if network is None:
        return
    start = network.state_dict()
    for name, tensor in tensors.items():
        if name in start and start[name].shape == tensor.shape:
            tensor.copy_(start[name])


def _hand_over(replayed: SparseMeZO, trainer: Trainer) -> None:
    """Give the masks to the optimizer that trains on; its other state is in the checkpoint."""
    for optimizer in trainer.optimizers:
        if not isinstance(optimizer, SparseMeZO):
            continue
        if optimizer.steps_done != replayed.steps_done:
            raise TrajectoryError(
                f"the checkpoint's optimizer has done {optimizer.steps_done} steps, its record {replayed.steps_done}"
            )
        if any(group["mask_step"] == optimizer.steps_done for group in optimizer.param_groups):
            optimizer.refresh_masks()  # as was done after the last step and before the checkpoint
            continue
        for own, its in zip(optimizer.param_groups, replayed.param_groups, strict=True):
            its["names"] = list(own["names"])  # the record's are the network's, which may differ by a prefix
        optimizer.adopt_masks(replayed)


def _compare_machines(header: Header, device: torch.device) -> None:
    here = machine(device)
    differing = [
        f"{key} {header.machine[key]} then, {value} now"
        for key, value in here.items()
        if key in header.machine and header.machine[key] != value
    ]
    if differing:
        log.info(
            "the weights are exact, but the model's forward may differ in its last bits from the run's: %s",
            "; ".join(differing),
        )
