"""The curves of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from smezo_pl.callbacks.figures import running_mean
from smezo_pl.comparing.reading import RunFacts
from smezo_pl.comparing.table import labels

COLOURS = ("#2a6fdb", "#e07b1a", "#2f9e62", "#a34fc4", "#c83e4d", "#5b6b7b", "#b08900", "#0f9aa8")
"""Of the runs of a task, in their order; a method keeps its colour over the tasks."""


def comparison_figure(runs: Sequence[RunFacts], metric: str, targets: Sequence[float] = ()) -> Figure:
    """One line of panels a task: the metric over steps, the loss over steps, and the metric over seconds of training.

    Args:
        runs: The runs, of one task or of several.
        metric: The metric of the first and last panel.
        targets: Values of it that are drawn as lines.
    """
    tasks = list(dict.fromkeys(run.task for run in runs))
    names = labels(runs)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}
    figure = Figure(figsize=(13.5, 3.5 * len(tasks) + 0.4), layout="constrained", dpi=110)
    grid = figure.subplots(len(tasks), 3, squeeze=False)
    for task, (over_steps, losses, over_seconds) in zip(tasks, grid, strict=True):
        for run, name in zip(runs, names, strict=True):
            if run.task == task:
                _draw(run, name, colours[name], metric, over_steps, losses, over_seconds)
        for axes in (over_steps, over_seconds):
            for target in targets:
                axes.axhline(target, color="#8a94a0", linewidth=0.9, linestyle="--")
            axes.set_ylabel(f"{metric}, held out")
        losses.set_ylabel("loss: held out (dots), training (thin)")
        over_steps.set_title(str(task), loc="left", fontsize=11, fontweight="bold")
        for axes, label in (
            (over_steps, "step"),
            (losses, "step"),
            (over_seconds, "seconds of steps (median x steps)"),
        ):
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.margins(x=0.04, y=0.1)
            if axes.has_data():
                axes.set_xlim(left=0)
            else:
                axes.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=axes.transAxes)
                axes.set_xticks([])
                axes.set_yticks([])
            axes.grid(True, color="#e6e8eb", linewidth=0.8)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        handles, texts = losses.get_legend_handles_labels()
        if handles:
            over_seconds.legend(handles, texts, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw(
    run: RunFacts, name: str, colour: str, metric: str, over_steps: object, losses: object, over_seconds: object
) -> None:
    score = [(step, values[metric]) for step, values in run.held_out if metric in values]
    loss = [(step, values["loss"]) for step, values in run.held_out if "loss" in values]
    # a method without steps is a level to compare with, not a curve
    if not run.steps and run.finished:
        for axes, points in ((over_steps, score), (losses, loss), (over_seconds, score)):
            if points:
                axes.axhline(points[-1][1], color=colour, linewidth=1.3, linestyle=":", label=name)  # type: ignore[attr-defined]
        return
    if run.train_loss:
        smooth = running_mean(run.train_loss)
        losses.plot([x for x, _ in smooth], [y for _, y in smooth], color=colour, linewidth=0.9, alpha=0.45)  # type: ignore[attr-defined]
    style = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.5}
    for axes, points in ((over_steps, score), (losses, loss)):
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, **style)  # type: ignore[attr-defined]
    if run.step_seconds is not None:
        seconds = [step * run.step_seconds for step, _ in score]
        over_seconds.plot(seconds, [y for _, y in score], label=name, **style)  # type: ignore[attr-defined]
