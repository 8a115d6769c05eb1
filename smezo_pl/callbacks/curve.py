"""The curve of a run in a few hundred points, however long it is."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from matplotlib.figure import Figure

from smezo_pl.callbacks.figures import curve_figure

MOST_POINTS = 256
"""Points kept of the training loss. A checkpoint holds them, so there are few."""

_SHOWN = ("accuracy", "f1", "rougeL", "rouge1", "rouge2", "drop_f1", "em")
"""The metric beside the loss: the first of these that the task has. All of them lie in [0, 1]."""


class Curve:
    """Training losses as means over equally many steps, and every measurement on held-out examples."""

    def __init__(self) -> None:
        self._span = 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0
        self._held_out: dict[int, dict[str, float]] = {}

    def add_train(self, step: int, loss: float) -> None:
        """Add the loss of a training step, the next one; a loss that is not finite is left out."""
        self._count += 1
        self._sum += loss if isfinite(loss) else (self._means[-1] if self._means else 0.0)
        if self._count == self._span:
            self._means.append(self._sum / self._span)
            self._sum, self._count = 0.0, 0
        if len(self._means) == MOST_POINTS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._span *= 2

    def add_held_out(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a measurement: ``loss`` and the task's metrics, of which the picture shows one."""
        self._held_out[step] = dict(metrics)

    def draw(self, title: str) -> Figure:
        """The picture."""
        train = [(self._span * (index + 0.5) + 0.5, mean) for index, mean in enumerate(self._means)]
        held_out = sorted(self._held_out.items())
        shown = next((name for name in _SHOWN if any(name in values for _, values in held_out)), "accuracy")
        return curve_figure(
            title,
            train,
            [(step, values["loss"]) for step, values in held_out if "loss" in values],
            [(step, values[shown]) for step, values in held_out if shown in values],
            shown,
        )

    def points(self) -> dict[str, Any]:
        """Step and training loss (means over equally many steps), and step and metrics on the held-out examples."""
        return {
            "train_loss": [(self._span * (index + 0.5) + 0.5, mean) for index, mean in enumerate(self._means)],
            "held_out": [{"step": step, **values} for step, values in sorted(self._held_out.items())],
        }

    def state_dict(self) -> dict[str, Any]:
        """The points, in plain types."""
        return {
            "span": self._span,
            "means": list(self._means),
            "sum": self._sum,
            "count": self._count,
            "held_out": {step: dict(values) for step, values in self._held_out.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the points of a state."""
        self._span, self._means = state["span"], list(state["means"])
        self._sum, self._count = state["sum"], state["count"]
        self._held_out = {int(step): dict(values) for step, values in state["held_out"].items()}
