"""A run as its folder tells it: ``metrics.json`` once it is done, the logger's events and the record until then."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from smezo_pl.callbacks.run_metrics import PEAK_MEMORY, STEP_SECONDS
from smezo_pl.methods import METHODS
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import FILE_NAME, Trajectory


@dataclass(frozen=True)
class RunFacts:
    """What a comparison needs of a run.

    Attributes:
        folder: Where it was read.
        task: Name of its task.
        method: The configured method; for none the optimizer's mask.
        lr: Its learning rate.
        seed: Its seed.
        steps: Steps done so far.
        max_steps: Steps it is to do, if known.
        finished: Whether it is done.
        held_out: Step and metrics of each measurement on the held-out examples, by step.
        train_loss: Step and training loss.
        step_seconds: Median seconds of a step.
        peak_memory: Most bytes held in training.
        test: Metrics on the test set, where they were measured.
    """

    folder: Path
    task: str | None = None
    method: str | None = None
    lr: float | None = None
    seed: int | None = None
    steps: int = 0
    max_steps: int | None = None
    finished: bool = False
    held_out: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    train_loss: list[tuple[float, float]] = field(default_factory=list)
    step_seconds: float | None = None
    peak_memory: float | None = None
    test: dict[str, float] = field(default_factory=dict)


def run_folders(paths: Iterable[str | Path]) -> list[Path]:
    """The runs' folders that are meant: a run's own, or all runs in the folder of a sweep or of a name's versions.

    Raises:
        ValueError: If there is no run.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        if not path.is_dir():
            raise ValueError(f"{path} is no folder: give a run's folder, such as runs/sst2/version_0")
        inside = [path] if _is_run(path) else sorted(child for child in path.iterdir() if _is_run(child))
        if not inside:
            raise ValueError(f"{path} holds no run: neither metrics.json nor config.yaml is there or one folder below")
        found.extend(folder for folder in inside if folder not in found)
    return found


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("metrics.json", "config.yaml"))


def read_run(folder: Path) -> RunFacts:
    """Everything that a run's folder tells at this moment.

    Raises:
        ValueError: If a file of it cannot be read.
    """
    config = _config(folder)
    metrics = _json(folder / "metrics.json")
    tests = [_json(path) for path in (folder / "test.json", folder / "test" / "test.json") if path.is_file()]
    test = {name: float(value) for found in tests for name, value in found["metrics"].items()}
    max_steps = (config.get("trainer") or {}).get("max_steps")
    if metrics:
        settings = metrics.get("hyperparameters") or {}
        curve = metrics.get("curve") or {"held_out": [], "train_loss": []}
        held_out = [(int(p["step"]), {k: v for k, v in p.items() if k != "step"}) for p in curve["held_out"]]
        if not held_out:
            ends = ((0, metrics.get("before")), (metrics["steps"], metrics.get("after")))
            held_out = [(step, values) for step, values in ends if values]
        return RunFacts(
            folder,
            task=metrics.get("task"),
            method=metrics.get("method") or settings.get("mask"),
            lr=settings.get("lr"),
            seed=metrics.get("seed"),
            steps=metrics["steps"],
            max_steps=max_steps,
            finished=True,
            held_out=held_out,
            train_loss=[(float(step), float(loss)) for step, loss in curve["train_loss"]],
            step_seconds=metrics.get("step_seconds"),
            peak_memory=metrics.get("peak_memory_bytes"),
            test=test,
        )
    return _running(folder, config, max_steps, test)


def _running(folder: Path, config: Mapping[str, Any], max_steps: int | None, test: dict[str, float]) -> RunFacts:
    """A run that goes on or was interrupted: its events, and for the number of steps its record."""
    scalars = _scalars(folder)
    model = config.get("model") or {}
    method = model.get("method")
    first_order = method in METHODS and METHODS[method].order == 1
    settings = model.get("first_order" if first_order else "optimizer") or {}
    settings = settings.get("init_args", settings)
    held_out: dict[int, dict[str, float]] = {}
    for tag, values in scalars.items():
        if tag.startswith("val/"):
            for step, value in values.items():
                held_out.setdefault(step, {})[tag.removeprefix("val/")] = value
    train = scalars.get("train/loss", {})
    steps = max([0, *train, *held_out])
    points = [(float(step), value) for step, value in sorted(train.items())]
    if (folder / FILE_NAME).is_file():
        try:
            rows = Trajectory.read(folder / FILE_NAME, damaged=True).rows
        except TrajectoryError as error:
            raise ValueError(str(error)) from error
        steps = max(steps, len(rows))
        points = [(row.step + 1.0, row.loss) for row in rows if row.losses and not row.skipped] or points
    seconds, peak = scalars.get(STEP_SECONDS, {}), scalars.get(PEAK_MEMORY, {})
    return RunFacts(
        folder,
        task=str((config.get("data") or {}).get("task")),
        method=method or settings.get("mask"),
        lr=settings.get("lr"),
        seed=settings.get("seed"),
        steps=steps,
        max_steps=max_steps,
        held_out=sorted(held_out.items()),
        train_loss=points,
        step_seconds=seconds[max(seconds)] if seconds else None,
        peak_memory=max(peak.values()) if peak else None,
        test=test,
    )


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Values by step of each of TensorBoard's scalars; of a step that was made twice the later one."""
    if not any(folder.glob("events.out.tfevents*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
        for tag in events.Tags()["scalars"]
    }


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return content
