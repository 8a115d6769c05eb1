"""Figures for TensorBoard and ``curve.png``, and the points of a run's curve."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from math import isfinite, nan
from statistics import fmean, pstdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from smezo_pl.data.loaders import logged_name
from smezo_pl.optim import MaskStat

BLUE, ORANGE, GREY = "#2f6fb0", "#d9772b", "#9aa3ad"

Points = Sequence[tuple[float, float]]


def gradient_figure(gradients: Sequence[float]) -> Figure:
    """Histogram of projected gradients."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(gradients, bins=min(60, max(8, len(gradients) // 5)), color=BLUE, alpha=0.85)
    axes.axvline(0.0, color="black", linewidth=0.8)
    mean, deviation = fmean(gradients), pstdev(gradients)
    axes.set_title(f"Projected gradients, last {len(gradients)}: mean {mean:.3g}, spread {deviation:.3g}", fontsize=10)
    axes.set(xlabel="g = (l+ - l-) / (2 eps)", ylabel="number of them")
    plain_axes(axes)
    return figure


def density_figure(stats: Sequence[MaskStat]) -> Figure:
    """Fraction of active weights: over the layers by kind of tensor; by tensor in a model without numbered layers."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    others: list[tuple[str, float]] = []
    for stat in stats:
        number = re.search(r"\.(\d+)\.", stat.name)
        fraction = stat.selected / max(1, stat.numel)
        if number is None:
            others.append((stat.name, fraction))
        else:
            kinds.setdefault(stat.name[number.end() :].removesuffix(".weight"), []).append((int(number[1]), fraction))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title("Density: fraction of active weights", fontsize=10)
    if kinds:
        for kind, points in sorted(kinds.items()):
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=kind, alpha=0.85)
        for (name, fraction), style in zip(others[:8], cycle(("--", ":", "-.")), strict=False):
            axes.axhline(fraction, color=GREY, linewidth=1.2, linestyle=style, label=name.removesuffix(".weight"))
        axes.set(xlabel="layer", ylim=(-0.02, 1.05))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    else:
        axes.barh([name for name, _ in others[:30]], [share for _, share in others[:30]], color=BLUE, alpha=0.85)
        axes.set_xlim(0.0, 1.05)
        axes.invert_yaxis()
    plain_axes(axes)
    return figure


def curve_figure(title: str, train: Points, loss: Points, accuracy: Points, metric: str = "accuracy") -> Figure:
    """Training loss and held-out loss over the steps of a run, and another held-out ``metric`` if there is one."""
    panels = 2 if accuracy else 1
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained", dpi=130)
    figure.suptitle(title, fontsize=11)
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    axes = all_axes[0]
    if train:
        axes.plot(*zip(*train, strict=True), color=GREY, linewidth=0.8, alpha=0.6, label="training batches")
        if len(train) >= 8:
            axes.plot(*zip(*running_mean(train), strict=True), color=BLUE, linewidth=1.8, label="their running mean")
    held_out = {"color": ORANGE, "marker": "o", "markersize": 4.5, "linewidth": 1.4}
    if loss:
        axes.plot(*zip(*loss, strict=True), label="held out", **held_out)
    axes.set_ylabel("loss")
    if train or loss:
        axes.legend(fontsize=8, frameon=False)
    if accuracy:
        axes = all_axes[1]
        steps, values = zip(*accuracy, strict=True)
        axes.plot(steps, values, **held_out)
        for point in (accuracy[0], accuracy[-1]):
            axes.annotate(f"{point[1]:.3f}", point, textcoords="offset points", xytext=(0, 8), ha="center", fontsize=9)
        limits = max(0.0, min(values) - 0.08), min(1.02, max(values) + 0.06)
        axes.set(ylabel=f"{metric}, held out", ylim=limits)
    for axes in all_axes:
        axes.set_xlabel("step")
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain_axes(axes)
    return figure


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Mean over a window of a tenth of the points."""
    half = max(1, len(points) // 20)
    smoothed = []
    for index, (step, _) in enumerate(points):
        # As many on either side, so that the ends are not pulled inwards.
        reach = min(half, index, len(points) - 1 - index)
        window = points[index - reach : index + reach + 1]
        smoothed.append((step, fmean(value for _, value in window)))
    return smoothed


def plain_axes(axes: Any) -> None:
    """Draw a light grid behind the curves, and no frame at the top and the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


MOST_POINTS = 256  # of the training loss; few, as a checkpoint holds them

# The metric beside the loss is the first of these that the task has. All of them lie in [0, 1].
_SHOWN = ("accuracy", "f1", "rougeL", "rouge1", "rouge2", "drop_f1", "em")


class Curve:
    """Training losses as means over equally many steps, and every measurement on held-out examples."""

    def __init__(self) -> None:
        self._span = 1
        self._means: list[float] = []
        self._sum, self._count = 0.0, 0
        self._held_out: dict[int, dict[str, float]] = {}

    def add_train(self, loss: float) -> None:
        """Add the loss of the next training step; a loss that is not finite is left out."""
        self._count += 1
        self._sum += loss if isfinite(loss) else (self._means[-1] if self._means else 0.0)
        if self._count == self._span:
            self._means.append(self._sum / self._span)
            self._sum, self._count = 0.0, 0
        if len(self._means) == MOST_POINTS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._span *= 2

    def add_held_out(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a measurement: ``loss`` and the task's metrics, of which the figure shows one."""
        self._held_out[step] = dict(metrics)

    def points(self) -> dict[str, Any]:
        """Step and training loss (means over equally many steps), and step and metrics on the held-out examples."""
        return {
            "train_loss": [(self._span * (index + 0.5) + 0.5, mean) for index, mean in enumerate(self._means)],
            "held_out": [{"step": step, **values} for step, values in sorted(self._held_out.items())],
        }

    def draw(self, title: str) -> Figure:
        """The figure."""
        points = self.points()
        held_out = points["held_out"]
        names = {name for values in held_out for name in values}
        shown = next((known for name in _SHOWN if (known := logged_name(name, names)) in names), "accuracy")
        loss, accuracy = (
            [(v["step"], v[name]) for v in held_out if isfinite(v.get(name, nan))]
            for name in (logged_name("loss", names), shown)
        )
        return curve_figure(title, points["train_loss"], loss, accuracy, shown)

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
        """Continue from a state."""
        self._span, self._means = state["span"], list(state["means"])
        self._sum, self._count = state["sum"], state["count"]
        self._held_out = {int(step): dict(values) for step, values in state["held_out"].items()}
