"""Replays a record before each validation, as far as it is told."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from smezo_pl.trajectory.reader import Trajectory
from smezo_pl.trajectory.replaying import check_start, rebuild, replay_rows, tensors_of
from smezo_pl.trajectory.resume import network_of


class ReplayTo(Callback):
    """Gives the module's network the weights of a step before they are scored; steps may only go up.

    Args:
        trajectory: The record; the network must hold its starting weights at the first validation.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.target = trajectory.header.first_step
        self._state: dict[str, Any] | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replay up to `target`."""
        header, source = self.trajectory.header, str(self.trajectory.path)
        with torch.inference_mode(False), torch.no_grad():
            tensors = tensors_of(header, network_of(pl_module, header), source)
            if self._state is None:
                check_start(header, tensors, source)
            # built anew each time: the Trainer moves the network from the device and back between validations
            optimizer = rebuild(header, tensors)
            if self._state is not None:
                optimizer.load_state_dict(self._state)
            done = optimizer.steps_done
            if self.target < done:
                raise ValueError(f"target must not go down, got {self.target} after {done}")
            rows = self.trajectory.rows[done - header.first_step : self.target - header.first_step]
            replay_rows(optimizer, rows, source)
            self._state = optimizer.state_dict()

    on_test_start = on_validation_start
