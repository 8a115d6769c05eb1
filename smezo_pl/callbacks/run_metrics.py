"""What came of a run, for any method: metrics before and after, its curve, seconds per step, peak memory."""

from __future__ import annotations

import os
import statistics
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.table import Table

from smezo_pl.callbacks.common import find_zeroth_order, log_scalars, logged_metrics, run_folder, task_and_model
from smezo_pl.callbacks.figures import Curve
from smezo_pl.callbacks.monitor import peak_memory
from smezo_pl.models import precision_of
from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.kernels import get_kernel
from smezo_pl.trajectory.files import write_json
from smezo_pl.trajectory.fingerprint import machine, versions

STEP_SECONDS, PEAK_MEMORY = "run/step_seconds", "run/peak_memory"
"""Logged during a run: median seconds per step, and peak memory in bytes."""

KEPT = 256  # last step times that the median is taken of; few, as a checkpoint holds them


class RunMetrics(Callback):
    """Measures the model before and after training on all validation examples, and writes the results of the run.

    In the run's folder (the logger's, else ``default_root_dir``) it writes

    - ``metrics.json``: ``task``, ``model``, ``steps``, ``seconds`` (of training with its validations and resumes),
      ``step_seconds`` (median of the last 256 steps), ``peak_memory_bytes`` (in training: of the process, on CUDA of
      the allocator), ``method``, ``curve`` (points of ``curve.png``), ``before`` and ``after`` (each
      ``{"accuracy": ..., "loss": ...}``, or what else the module logs as ``val/...``; null without validation data),
      ``dead`` (only if the last steps had no effect: why), ``seed``, ``data_seed``, ``hyperparameters``,
      ``precision``, ``perturbation`` (null for first-order methods), ``directions`` (only with one per row: names of
      the tensors that all rows share, and the number of steps without signal), ``parameters`` (number of weights by
      dtype), ``trained_parameters`` (how many of them were trained), ``versions``, ``machine`` (with the kernel);
    - ``curve.png``: loss and accuracy over the steps;

    and prints a short table and the command that opens TensorBoard.

    ``before`` is measured by the Trainer's sanity check, which is extended to all validation examples. A resumed run
    keeps the ``before`` of its first start. ``after`` is the validation of the last step, run if there was none.

    Args:
        before: Whether to measure before training too.
        table: Whether to print the table.
    """

    def __init__(self, before: bool = True, table: bool = True) -> None:
        super().__init__()
        self.before, self.table = before, table
        self._forget()

    def _forget(self) -> None:
        """Begin without the numbers of a run before, as when the callback goes to a second Trainer."""
        self.result: dict[str, Any] | None = None
        self._started: dict[str, float] | None = None
        self._validated: tuple[int, dict[str, float] | None] = (-1, None)
        self._curve = Curve()
        self._folder: Path | None = None
        self._device = torch.device("cpu")
        self._step_times: deque[float] = deque(maxlen=KEPT)
        self._earlier_seconds, self._earlier_peak = 0.0, 0
        self._training_began = self._step_began = perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "before": self._started,
            "seconds": self._seconds,
            "curve": self._curve.state_dict(),
            "clock": {"times": [round(seconds, 6) for seconds in self._step_times], "peak": self._peak or 0},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self._started = state_dict["before"]
        self._curve.load_state_dict(state_dict["curve"])
        clock = state_dict.get("clock", {})
        self._earlier_seconds, self._earlier_peak = state_dict["seconds"], int(clock.get("peak", 0))
        self._step_times = deque(clock.get("times", ()), maxlen=KEPT)

    @property
    def _seconds(self) -> float:  # of training, those before a resume included
        return self._earlier_seconds + perf_counter() - self._training_began

    @property
    def _step_seconds(self) -> float | None:
        return statistics.median(self._step_times) if self._step_times else None

    @property
    def _peak(self) -> int | None:
        return max(peak_memory(self._device) or 0, self._earlier_peak) or None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Extend the sanity check to all validation examples. Lightning leaves it out of a resumed run."""
        if stage == TrainerFn.FITTING:
            self._forget()  # the state of a checkpoint comes after this
        if self.before and stage == TrainerFn.FITTING and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.num_sanity_val_steps = float("inf")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of the starting weights."""
        if not self.before or trainer.global_step > 0:
            return
        self._started = logged_metrics(trainer, "val/") or None
        if self._started is not None:
            self._curve.add_held_out(0, self._started)
            # As validation logs its own: who reads the logs of a running run sees where it began.
            log_scalars(trainer, {f"val/{name}": value for name, value in self._started.items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the time so far, and the memory that loading the model took."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._folder, self._device, self._training_began = run_folder(trainer), pl_module.device, perf_counter()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Linux: "5" sets the process's peak to what it holds now (man 5 proc_pid_clear_refs).
            with suppress(OSError):
                Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Time the step."""
        self._step_began = perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the step's loss to the curve, and log time and memory."""
        self._step_times.append(perf_counter() - self._step_began)
        optimizer = find_zeroth_order(trainer)
        self._curve.add_train(pl_module.baseline.last_loss if optimizer is None else optimizer.last_step.loss)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            scalars = {STEP_SECONDS: self._step_seconds, PEAK_MEMORY: self._peak}
            log_scalars(trainer, {name: float(value) for name, value in scalars.items() if value is not None})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the validation to the curve."""
        if self._folder is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._add_validation(trainer)

    def _add_validation(self, trainer: Trainer) -> None:
        metrics = logged_metrics(trainer, "val/") or None
        self._validated = trainer.global_step, metrics
        if metrics is not None:
            self._curve.add_held_out(trainer.global_step, metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained model, and write."""
        if self._folder is None:
            return
        seconds = self._seconds
        if trainer.global_step == 0 and self._started is not None:
            self._validated = 0, self._started
        elif self._validated[0] != trainer.global_step:
            # Another sanity check, so that nothing is logged, saved or stopped because of it.
            stage, trainer.num_sanity_val_steps = trainer.state.stage, float("inf")
            trainer.sanity_checking = True
            with isolate_rng():
                trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.state.stage = stage
            self._add_validation(trainer)
        data = getattr(trainer, "datamodule", None)
        task, model = task_and_model(trainer)
        training = find_zeroth_order(trainer) or getattr(pl_module, "baseline", None)
        settings = {} if training is None else training.settings()
        self.result = {
            "task": task,
            "model": model,
            "steps": trainer.global_step,
            "seconds": round(seconds, 2),
            "before": self._started,
            "after": self._validated[1],
            "step_seconds": self._step_seconds,
            "peak_memory_bytes": self._peak,
            "method": getattr(pl_module, "method", None),
            "data_seed": getattr(data, "data_seed", None),
            "batch_size": getattr(data, "batch_size", None),
            "seed": settings.get("seed"),
            "hyperparameters": settings,
            "skipped_steps": getattr(training, "skipped_steps", 0),
            **_dead(training, getattr(data, "objective", None)),
            "precision": precision_of(trainer.precision, pl_module),
            "curve": self._curve.points(),
            "versions": versions(),
            **_in_use(trainer, pl_module),
        }
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            title = f"{Path(model).name} on {task}" if task else Path(model).name
            self._curve.draw(title).savefig(self._folder / "curve.png")
            # Last: where the file is, the run has ended.
            write_json(self._folder / "metrics.json", self.result)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, when the progress bar is gone."""
        result, folder = self.result, self._folder
        if result is None or folder is None or not self.table or not trainer.is_global_zero:
            return
        console, title = Console(), f"{result['steps']} steps in {_duration(result['seconds'])}"
        table = Table(title=title, title_justify="left")
        table.add_column("held-out examples")
        before, after = result["before"] or {}, result["after"] or {}
        for heading, values in (("before", before), ("after", after)):
            if values:
                table.add_column(heading, justify="right")
        for name in after:
            table.add_row(name, *(f"{values[name]:.4f}" for values in (before, after) if name in values))
        console.print(table if after else f"{title}; no validation data to measure with")
        if "dead" in result:
            console.print(f"the run did nothing at its end: {result['dead']}", highlight=False, markup=False)
        lines = [f"metrics  {folder / 'metrics.json'}", f"curve    {folder / 'curve.png'}"]
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            lines.append(f"tensorboard --logdir {folder.parent}")
        # soft_wrap: a path that is broken over two lines cannot be copied.
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _dead(training: Any, objective: str | None) -> dict[str, str]:
    """``dead`` and why the run did nothing at its end; empty if it did something."""
    reason = getattr(training, "dead", None)  # of a first-order baseline
    if isinstance(training, SparseMeZO):
        reason = training.standstill.why_dead(training.steps_done, training.skipped_steps)
        # A metric or a reward is constant until an answer changes: a run that rests may well have learned before.
        if training.standstill.moved and objective not in (None, "classification", "lm"):
            return {}
    return {} if reason is None else {"dead": reason}


def _in_use(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What was trained, and how, from the optimizer and the weights themselves."""
    optimizer, dtypes = find_zeroth_order(trainer), Counter[str]()
    for p in module.parameters():
        dtypes[str(p.dtype).removeprefix("torch.")] += p.numel()
    groups = [group for each in trainer.optimizers for group in each.param_groups]
    trained = [(name, p) for g in groups for name, p in zip(g.get("names", g["params"]), g["params"], strict=True)]
    in_use: dict[str, Any] = {"perturbation": None, "parameters": dict(dtypes), "machine": machine(module.device)}
    if optimizer is not None:
        unread = set(optimizer.unread())
        trained = [(name, p) for name, p in trained if name not in unread]
        # float64 is left to the torch kernel
        kernels = {
            get_kernel("torch" if p.dtype == torch.float64 else optimizer.kernel, p.device).name for _, p in trained
        }
        in_use["perturbation"] = "in_place" if optimizer.attached is None else "layerwise"
        if optimizer.directions == "per_row":
            in_use["directions"] = {"shared": optimizer.shared(), "no_signal_steps": optimizer.no_signal_steps}
        in_use["machine"]["kernel"] = ", ".join(sorted(kernels))
    return in_use | {"trained_parameters": sum(p.numel() for _, p in trained)}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
