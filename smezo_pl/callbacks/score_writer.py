"""What ``validate`` and ``test`` measured, as a file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from smezo_pl.callbacks.checkpoint_files import write_whole
from smezo_pl.callbacks.common import run_folder
from smezo_pl.trajectory.machine import machine, versions

log = logging.getLogger(__name__)


class ScoreWriter(Callback):
    """Writes ``validate.json`` or ``test.json`` in the run's folder when the measurement is done.

    It holds ``task``, ``split``, ``model``, ``method``, ``checkpoint`` (null: as pretrained), ``metrics`` by name,
    ``examples``, ``data_seed``, ``seconds``, ``precision``, ``versions`` and ``machine``.

    Args:
        path: File to write; by default by the verb's name in the run's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path
        self._began = perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._began = perf_counter()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._began = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, unless it was a validation within ``fit``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "validate", "dev")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self._write(trainer, pl_module, "test", "test")

    def _write(self, trainer: Trainer, module: Any, verb: str, split: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data = getattr(trainer, "datamodule", None)
        task = getattr(data, "task", None)
        prefix = "val/" if verb == "validate" else "test/"
        values = {n.removeprefix(prefix): float(v) for n, v in trainer.callback_metrics.items() if n.startswith(prefix)}
        examples = getattr(data, "examples", None)
        result = {
            "task": str(getattr(task, "name", task)) if task is not None else None,
            "split": split,
            "model": getattr(module, "pretrained", None) or type(getattr(module, "model", module)).__name__,
            "method": getattr(module, "method", None),
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "metrics": values,
            "examples": len(examples(split)) if examples is not None else None,
            "data_seed": getattr(data, "data_seed", None),
            "seconds": round(perf_counter() - self._began, 2),
            "precision": str(trainer.precision),
            "versions": versions(),
            "machine": machine(module.device),
        }
        path = Path(self.path) if self.path is not None else run_folder(trainer) / f"{verb}.json"
        write_whole(path, (json.dumps(result, indent=2) + "\n").encode())
        log.info("the measurement is in %s", path)
