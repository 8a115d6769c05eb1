"""What a run was worth: metrics before and after training on the same examples, a curve, and a table to end with."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from smezo_pl.callbacks.common import run_folder, zeroth_order_optimizer
from smezo_pl.callbacks.curve import Curve
from smezo_pl.metrics import WeightedMeans
from smezo_pl.trajectory.machine import machine, versions

log = logging.getLogger(__name__)


class RunMetrics(Callback):
    """Measures the module before and after training on all validation examples, and writes what came of the run.

    In the run's folder (the logger's, else ``default_root_dir``) it leaves

    - ``metrics.json``: ``task``, ``model``, ``steps``, ``seconds`` (of training with its validations and resumes),
      ``before`` and ``after`` (each ``{"accuracy": ..., "loss": ...}``, or what the module's ``evaluate_batch`` gives;
      null without validation data), ``seed``, ``data_seed``, ``hyperparameters``, ``precision``, ``versions``,
      ``machine``;
    - ``curve.png``: loss and accuracy over the steps;

    and prints a short table and the line that opens TensorBoard.

    The two measurements run the module's ``evaluate_batch`` over the validation loader and leave the state of the
    training alone. A resumed run keeps the ``before`` of its first start.

    Args:
        before: Whether to measure before training too.
        table: Whether to print the table.
    """

    def __init__(self, before: bool = True, table: bool = True) -> None:
        super().__init__()
        self.before, self.table = before, table
        self.result: dict[str, Any] | None = None
        self._started: dict[str, float] | None = None
        self._curve = Curve()
        self._earlier_seconds, self._clock = 0.0, perf_counter()
        self._folder: Path | None = None

    @property
    def state_key(self) -> str:
        """One state whatever the arguments."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"before": self._started, "seconds": self._seconds(), "curve": self._curve.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._started, self._earlier_seconds = state_dict["before"], state_dict["seconds"]
        self._curve.load_state_dict(state_dict["curve"])

    def _seconds(self) -> float:
        return self._earlier_seconds + perf_counter() - self._clock

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the module as it is before the first step."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._folder = run_folder(trainer)
        if trainer.global_step == 0 and self.before:
            self._started = evaluate(trainer, pl_module)
            if self._started is not None:
                self._curve.add_held_out(0, self._started)
        self._clock = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step's loss to the curve."""
        self._curve.add_train(trainer.global_step, zeroth_order_optimizer(trainer, self).last_step.loss)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the validation to the curve."""
        if self._folder is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._add_validation(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained module, and write."""
        if self._folder is None:
            return
        seconds = self._seconds()
        after = evaluate(trainer, pl_module)
        if after is not None:
            self._curve.add_held_out(trainer.global_step, after)
        optimizer = zeroth_order_optimizer(trainer, self)
        data = getattr(trainer, "datamodule", None)
        task = getattr(data, "task", None)
        self.result = {
            "task": str(getattr(task, "name", task)) if task is not None else None,
            "model": getattr(pl_module, "pretrained", None) or type(getattr(pl_module, "model", pl_module)).__name__,
            "steps": trainer.global_step,
            "seconds": round(seconds, 2),
            "before": self._started,
            "after": after,
            "seed": optimizer.seed,
            "data_seed": getattr(data, "data_seed", None),
            "batch_size": getattr(data, "batch_size", None),
            "hyperparameters": optimizer.settings(),
            "precision": str(trainer.precision),
            "perturbation": getattr(pl_module, "perturbation", None),
            "skipped_steps": optimizer.skipped_steps,
            "versions": versions(),
            "machine": machine(pl_module.device),
        }
        if trainer.is_global_zero:
            self._write(self._folder, self.result)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, when the progress bar is gone."""
        if self.table and self.result is not None and trainer.is_global_zero:
            self._print(trainer, self.result)

    def _add_validation(self, trainer: Trainer) -> None:
        values = {
            name.removeprefix("val/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name in ("val/loss", "val/accuracy")
        }
        if values:
            self._curve.add_held_out(trainer.global_step, values)

    def _write(self, folder: Path, result: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        model = Path(str(result["model"])).name
        self._curve.draw(f"{model} on {result['task']}" if result["task"] else model).savefig(folder / "curve.png")

    def _print(self, trainer: Trainer, result: dict[str, Any]) -> None:
        assert self._folder is not None
        console = Console()
        table = Table(title=f"{result['steps']} steps in {_duration(result['seconds'])}", title_justify="left")
        table.add_column("held-out examples")
        before, after = result["before"] or {}, result["after"] or {}
        for heading, values in (("before", before), ("after", after)):
            if values:
                table.add_column(heading, justify="right")
        for name in after:
            table.add_row(name, *(f"{values[name]:.4f}" for values in (before, after) if name in values))
        if after:
            console.print(table)
        else:
            console.print(
                f"{result['steps']} steps in {_duration(result['seconds'])}; no validation data to measure with"
            )
        lines = [
            f"{name}  {self._folder / file}" for name, file in (("metrics", "metrics.json"), ("curve  ", "curve.png"))
        ]
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            lines.append(f"tensorboard --logdir {self._folder.parent}")
        # soft_wrap: a path that is broken over two lines cannot be copied
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


@torch.no_grad()
def evaluate(trainer: Trainer, module: LightningModule) -> dict[str, float] | None:
    """Metrics of the module on the validation examples, outside the Trainer's loops.

    Args:
        trainer: The Trainer, in ``fit``.
        module: A module with ``evaluate_batch`` (see `smezo_pl.SparseMeZOModule`).

    Returns:
        Means by name, over all processes; None without validation data, or if the module has no ``evaluate_batch``.
    """
    loader: Any = trainer.val_dataloaders
    score: Any = getattr(module, "evaluate_batch", None)
    if loader is None or score is None:
        return None
    limit = trainer.num_val_batches[0]
    means = WeightedMeans()
    strategy = trainer.strategy
    # every loader draws a seed from torch's generator when it starts, which the training must not notice
    with torch.random.fork_rng(devices=[]), trainer.precision_plugin.val_step_context():
        for batch in islice(loader, None if limit == float("inf") else int(limit)):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = strategy.batch_to_device(
                module._on_before_batch_transfer(batch, dataloader_idx=0), dataloader_idx=0
            )
            means.update(score(batch), module.device)
    return {name: float(value) for name, value in means.compute().items()} or None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
