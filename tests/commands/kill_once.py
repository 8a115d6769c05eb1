"""A callback that ends the process of the run with seed 0 as ``kill -9`` does, the first time."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class KillOnce(Callback):
    def __init__(self, marker: str, step: int) -> None:
        self.marker, self.step = Path(marker), step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        first = trainer.optimizers[0].seed == 0  # runs beside each other come to the step in any order
        if first and trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
