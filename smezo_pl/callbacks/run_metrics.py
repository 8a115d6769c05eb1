"""How long a step takes and how much memory a run needs, for any method."""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
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

from smezo_pl.callbacks.common import log_scalars, run_folder, step_loss
from smezo_pl.callbacks.figures import Curve
from smezo_pl.callbacks.monitor import peak_memory
from smezo_pl.callbacks.progress import RunProgressBar
from smezo_pl.optim import SparseMeZO
from smezo_pl.scoring.evaluation import WeightedMeans
from smezo_pl.trajectory.files import write_atomically
from smezo_pl.trajectory.fingerprint import machine, versions

STEP_SECONDS, PEAK_MEMORY = "run/step_seconds", "run/peak_memory"
"""Logged while a run goes on: seconds of a step (median) and bytes held at most."""

KEPT = 256
"""Step times that the median is taken of, the last ones. A checkpoint holds them, so there are few."""


class StepClock:
    """Times of the last steps, without validation and checkpoints, and the peak of memory since training began."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=KEPT)
        self._began: float | None = None
        self._earlier_peak = 0

    def start_training(self, device: torch.device) -> None:
        """Forget the peak of memory that loading the model left."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux: "5" sets the process's high-water mark to what it holds now (man 5 proc_pid_clear_refs).
            with suppress(OSError):
                Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")

    def begin(self) -> None:
        """A step begins."""
        self._began = perf_counter()

    def end(self) -> None:
        """It ends."""
        if self._began is not None:
            self._times.append(perf_counter() - self._began)
        self._began = None

    @property
    def median(self) -> float | None:
        """Median seconds of a step; None before the first."""
        return statistics.median(self._times) if self._times else None

    def peak(self, device: torch.device) -> int | None:
        """Most bytes held at once in training: on CUDA by torch's allocator, elsewhere by the process."""
        now = peak_memory(device)
        if device.type == "cpu":
            with suppress(OSError, StopIteration, ValueError):
                lines = Path("/proc/self/status").read_text().splitlines()
                now = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
        return max(now, self._earlier_peak) if now is not None else self._earlier_peak or None

    def state(self, device: torch.device) -> dict[str, float | int | Sequence[float]]:
        """In plain types."""
        return {"times": [round(seconds, 6) for seconds in self._times], "peak": self.peak(device) or 0}

    def load(self, state: dict[str, float | int | Sequence[float]]) -> None:
        """Go on from a state."""
        times = state["times"]
        assert isinstance(times, Sequence)
        self._times, self._earlier_peak = deque(times, maxlen=KEPT), int(state["peak"])  # type: ignore[arg-type]


log = logging.getLogger(__name__)


class RunMetrics(Callback):
    """Measures the module before and after training on all validation examples, and writes what came of the run.

    In the run's folder (the logger's, else ``default_root_dir``) it leaves

    - ``metrics.json``: ``task``, ``model``, ``steps``, ``seconds`` (of training with its validations and resumes),
      ``step_seconds`` (median of the last 256 steps), ``peak_memory_bytes`` (in training: of the process, on CUDA of
      the allocator), ``method``, ``curve`` (points of ``curve.png``),
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
        self._validated: tuple[int, dict[str, float]] = (-1, {})
        self._curve, self._step_clock = Curve(), StepClock()
        self._device = torch.device("cpu")
        self._earlier_seconds, self._clock = 0.0, perf_counter()
        self._folder: Path | None = None

    @property
    def state_key(self) -> str:
        """One state whatever the arguments."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "before": self._started,
            "seconds": self._seconds(),
            "curve": self._curve.state_dict(),
            "clock": self._step_clock.state(self._device),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._started, self._earlier_seconds = state_dict["before"], state_dict["seconds"]
        self._curve.load_state_dict(state_dict["curve"])
        if "clock" in state_dict:
            self._step_clock.load(state_dict["clock"])

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
                # where validation logs its own: whoever reads the logs while the run goes on sees where it began
                log_scalars(trainer, {f"val/{name}": value for name, value in self._started.items()}, 0)
        self._device = pl_module.device
        self._step_clock.start_training(self._device)
        self._clock = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Time the step."""
        self._step_clock.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step's loss to the curve, and log how long a step takes."""
        self._step_clock.end()
        self._curve.add_train(trainer.global_step, step_loss(trainer, pl_module))
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            scalars = {
                STEP_SECONDS: self._step_clock.median,
                PEAK_MEMORY: self._step_clock.peak(self._device),
            }
            log_scalars(trainer, {n: float(v) for n, v in scalars.items() if v is not None}, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the validation to the curve."""
        if self._folder is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._add_validation(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained module, and write."""
        if self._folder is None:
            return
        seconds = self._seconds()
        after = self._already_measured(trainer.global_step) if hasattr(pl_module, "evaluate_batch") else None
        if after is None:
            after = evaluate(trainer, pl_module)
        if after is not None:
            self._curve.add_held_out(trainer.global_step, after)
        data = getattr(trainer, "datamodule", None)
        task = getattr(data, "task", None)
        self.result = {
            "task": str(getattr(task, "name", task)) if task is not None else None,
            "model": getattr(pl_module, "pretrained", None) or type(getattr(pl_module, "model", pl_module)).__name__,
            "steps": trainer.global_step,
            "seconds": round(seconds, 2),
            "before": self._started,
            "after": after,
            "step_seconds": self._step_clock.median,
            "peak_memory_bytes": self._step_clock.peak(self._device),
            "method": getattr(pl_module, "method", None),
            "data_seed": getattr(data, "data_seed", None),
            "batch_size": getattr(data, "batch_size", None),
            **_settings(trainer, pl_module),
            "precision": str(trainer.precision),
            "perturbation": getattr(pl_module, "perturbation", None),
            "curve": self._curve.points(),
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
            if name.startswith("val/")
        }
        if values:
            self._validated = (trainer.global_step, values)
            self._curve.add_held_out(trainer.global_step, values)

    def _already_measured(self, step: int) -> dict[str, float] | None:
        """The module's metrics at a step, where they were measured there: before a run without steps, or just now."""
        if step == 0:
            return self._started
        last, values = self._validated
        names = values if self._started is None else self._started
        return {name: values[name] for name in names} if last == step and names.keys() <= values.keys() else None

    def _write(self, folder: Path, result: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        model = Path(str(result["model"])).name
        self._curve.draw(f"{model} on {result['task']}" if result["task"] else model).savefig(folder / "curve.png")
        # whole or not at all, and last: where the file is, the run is done
        write_atomically(folder / "metrics.json", (json.dumps(result, indent=2) + "\n").encode())

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


def _settings(trainer: Trainer, module: Any) -> dict[str, Any]:
    """Seed, hyperparameters and skipped steps of whatever trains."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, SparseMeZO):
            settings, skipped = optimizer.settings(), optimizer.skipped_steps
            return {"seed": optimizer.seed, "hyperparameters": settings, "skipped_steps": skipped}
    training = getattr(module, "backpropagation", None)
    if training is None:
        return {"seed": None, "hyperparameters": {}, "skipped_steps": 0}
    settings, skipped = training.hyperparameters(), training.skipped_steps
    return {"seed": training.settings.seed, "hyperparameters": settings, "skipped_steps": skipped}


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
        batches: Iterable[Any] = islice(loader, None if limit == float("inf") else int(limit))
        bar = trainer.progress_bar_callback
        if isinstance(bar, RunProgressBar) and limit != float("inf"):
            batches = bar.measuring(batches, int(limit))
        for batch in batches:
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
