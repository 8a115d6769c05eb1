"""What a zeroth-order run does, in scalars and figures for its loggers."""

from __future__ import annotations

import math
import sys
from collections import deque
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from smezo_pl.callbacks.common import log_scalars, zeroth_order_optimizer
from smezo_pl.callbacks.figures import density_figure, gradient_figure
from smezo_pl.callbacks.mask_refresh import churn, density, sampled_names
from smezo_pl.data.batch import batch_size
from smezo_pl.optim import SparseMeZO, StepRecord
from smezo_pl.optim.parameters import float32


class ZerothOrderMonitor(Callback):
    """Logs what the optimizer does.

    To every logger, every ``trainer.log_every_n_steps`` steps:

    | name | value |
    |---|---|
    | ``zo/loss_plus``, ``zo/loss_minus`` | loss at ``theta + eps m z`` and ``theta - eps m z`` |
    | ``zo/projected_gradient`` | ``g = (l+ - l-) / (2 eps)``, mean over the samples; not with a direction per row |
    | ``zo/gradient_rms`` | with one: root mean square of ``g`` over samples and rows |
    | ``zo/rows_without_signal`` | with one: fraction of them in which ``g`` is 0 |
    | ``zo/no_signal_steps`` | with one: steps so far in which all of them were 0 |
    | ``zo/gradient_abs_q10``, ``_q50``, ``_q90`` | quantiles of the magnitude of ``g`` over the last ``window`` steps |
    | ``zo/lr``, ``zo/eps`` | of the first parameter group |
    | ``zo/skipped_steps`` | steps so far without an update, as a loss was not finite |
    | ``zo/forward_share`` | fraction of the step's time spent in forwards, since last logged |
    | ``zo/examples_per_second`` | of training without validation, since last logged |
    | ``zo/peak_memory_gib`` | of the device; on a CPU, of the process |

    Every ``masks_every_n_steps`` steps: ``zo/mask_density``, the fraction of active weights, and ``zo/mask_churn``, the
    fraction that became active or inactive since last logged (over a sample of the tensors in models of more than 67
    million weights). Every ``figures_every_n_steps`` steps, if the logger takes figures (TensorBoard does):
    ``zo/projected_gradients``, their histogram over the window, and ``zo/density_by_layer``.

    Args:
        window: Number of last steps in quantiles and histogram, at least 1.
        masks_every_n_steps: Steps between two readings of the masks, at least 1; each reads the sampled weights once.
        figures_every_n_steps: Steps between two figures, at least 1; None for no figures.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, window: int = 200, masks_every_n_steps: int = 200, figures_every_n_steps: int | None = 500
    ) -> None:
        super().__init__()
        for name, value in (
            ("window", window),
            ("masks_every_n_steps", masks_every_n_steps),
            ("figures_every_n_steps", figures_every_n_steps),
        ):
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.masks_every_n_steps, self.figures_every_n_steps = masks_every_n_steps, figures_every_n_steps
        self._gradients: deque[list[float]] = deque(maxlen=window)  # of each step
        self._masks: dict[str, torch.Tensor] = {}
        self._reset()

    def _reset(self) -> None:
        self._forward = self._total = 0.0
        self._examples, self._seconds, self._clock = 0, 0.0, perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start measuring."""
        self._reset()
        self._gradients.clear()
        self._masks = {}
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the time of the validation out."""
        self._clock = perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the step, and log what is due."""
        optimizer = zeroth_order_optimizer(trainer, self)
        record, step = optimizer.last_step, trainer.global_step
        self._seconds += perf_counter() - self._clock
        self._examples += batch_size(batch) * trainer.world_size
        self._forward += record.forward_seconds
        self._total += record.total_seconds
        if not record.skipped:
            self._gradients.append(_gradients_of(record))
        if not trainer.loggers:
            return
        scalars: dict[str, float] = {}
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            scalars = self._scalars(optimizer, pl_module.device)
            self._reset()
        if step % self.masks_every_n_steps == 0:
            masks = optimizer.packed_masks(sampled_names(optimizer))
            scalars["zo/mask_density"] = density(masks, optimizer)
            if self._masks:
                scalars["zo/mask_churn"] = churn(self._masks, masks, optimizer)
            self._masks = masks
        if scalars:
            log_scalars(trainer, scalars)
        if self.figures_every_n_steps is not None and step % self.figures_every_n_steps == 0:
            self._draw(trainer, optimizer)
        self._clock = perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures of the last step."""
        if self.figures_every_n_steps is not None and trainer.global_step % self.figures_every_n_steps != 0:
            self._draw(trainer, zeroth_order_optimizer(trainer, self))

    def _scalars(self, optimizer: SparseMeZO, device: torch.device) -> dict[str, float]:
        record = optimizer.last_step
        pairs = len(record.losses)
        scalars = {
            "zo/loss_plus": sum(plus for plus, _ in record.losses) / pairs,
            "zo/loss_minus": sum(minus for _, minus in record.losses) / pairs,
            "zo/lr": record.lr[0],
            "zo/eps": record.eps[0],
            "zo/skipped_steps": float(optimizer.skipped_steps),
            "zo/forward_share": self._forward / self._total,
            "zo/examples_per_second": self._examples / self._seconds,
        }
        if not record.skipped:
            gradients = _gradients_of(record)
            if optimizer.directions == "shared":
                scalars["zo/projected_gradient"] = sum(gradients) / pairs
            else:
                scalars["zo/gradient_rms"] = math.sqrt(sum(g * g for g in gradients) / pairs)
                scalars["zo/rows_without_signal"] = gradients.count(0.0) / pairs
                scalars["zo/no_signal_steps"] = float(optimizer.no_signal_steps)
        if self._gradients:
            magnitudes = torch.tensor([g for step in self._gradients for g in step], dtype=torch.float64).abs()
            scalars |= {f"zo/gradient_abs_q{q}": float(magnitudes.quantile(q / 100)) for q in (10, 50, 90)}
        if (peak := peak_memory(device)) is not None:
            scalars["zo/peak_memory_gib"] = peak / 2**30
        return scalars

    def _draw(self, trainer: Trainer, optimizer: SparseMeZO) -> None:
        experiments: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        writers = [experiment for experiment in experiments if hasattr(experiment, "add_figure")]
        if not writers or not self._gradients:
            return
        figures = {
            "zo/projected_gradients": gradient_figure([g for step in self._gradients for g in step]),
            "zo/density_by_layer": density_figure(optimizer.mask_stats()),
        }
        for writer in writers:
            for name, figure in figures.items():
                writer.add_figure(name, figure, trainer.global_step, close=False)


def _gradients_of(record: StepRecord) -> list[float]:
    """The projected gradients, also where the update multiplied with other coefficients."""
    return [float32((plus - minus) / (2.0 * record.eps[0])) for plus, minus in record.losses]


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: on CUDA of torch's allocator, elsewhere of the process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    from resource import RUSAGE_SELF, getrusage

    # kilobytes on Linux, bytes on macOS
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
