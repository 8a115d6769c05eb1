"""The runs of a sweep: each with its configuration, its folder, and how far it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from smezo_pl.sweeping.grid import Point, is_seed, run_name, short_names, with_point

State = Literal["new", "interrupted", "fitted", "finished"]
"""How far a run is; ``fitted``: its test is still to come."""

CONFIG = "run.yaml"


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: Its folder's name.
        folder: Where it writes.
        point: The grid's values.
        config: The whole configuration.
        test: The checkpoint that is scored on the test set after training, or None.
    """

    name: str
    folder: Path
    point: Point
    config: dict[str, Any]
    test: Literal["best", "last"] | None = None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that an interrupted run goes on from, if it has come to one."""
        path = self.folder / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None

    @property
    def tested_checkpoint(self) -> Path | None:
        """The checkpoint for the test set: the best if asked for and there is one (there was a validation)."""
        best = self.folder / "checkpoints" / "best.ckpt"
        return best if self.test == "best" and best.is_file() else self.checkpoint

    @property
    def test_result(self) -> Path:
        """Where the measurement on the test set is written."""
        return self.folder / "test" / "test.json"

    @property
    def state(self) -> State:
        """How far it is."""
        if (self.folder / "metrics.json").is_file():
            return "fitted" if self.test is not None and not self.test_result.is_file() else "finished"
        return "interrupted" if self.checkpoint is not None else "new"

    @property
    def without_seeds(self) -> Point:
        """The grid's values other than seeds: equal for runs that repeat each other."""
        return {key: value for key, value in self.point.items() if not is_seed(key)}

    @property
    def seeds(self) -> Point:
        """The grid's seeds."""
        return {key: value for key, value in self.point.items() if is_seed(key)}

    def result(self) -> dict[str, Any] | None:
        """``metrics.json``, with ``test`` as an entry where it was measured; None before the run is done."""
        try:
            result: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
            if self.test_result.is_file():
                result["test"] = json.loads(self.test_result.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return result


def plan(
    base: Mapping[str, Any],
    points: Sequence[Point],
    out: Path,
    test: Literal["best", "last"] | None = None,
) -> list[Run]:
    """The runs of a grid, in its order.

    Args:
        base: The configuration that all share.
        points: The grid.
        out: The sweep's folder.
        test: The checkpoint that is scored on the test set after training, or None.

    Raises:
        ValueError: If a key cannot be set, two points have one name, or a folder holds a run with other settings.
    """
    names = short_names(points)
    runs: dict[str, Run] = {}
    for point in points:
        name = run_name(point, names)
        if name in runs:
            raise ValueError(f"two points of the grid have the same name {name!r}: {runs[name].point} and {point}")
        config = with_point(base, point)
        trainer = config.setdefault("trainer", {})
        trainer["logger"] = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {
                "save_dir": str(out),
                "name": name,
                "version": "",
                "default_hp_metric": False,
                "flush_secs": 10,
            },
        }
        trainer.setdefault("enable_progress_bar", False)
        runs[name] = Run(name, out / name, point, config, test)
        _check_same(runs[name])
    return list(runs.values())


def _check_same(run: Run) -> None:
    file = run.folder / CONFIG
    if not file.is_file():
        return
    there = yaml.safe_load(file.read_text(encoding="utf-8"))
    now = yaml.safe_load(dumped(run.config))
    for tree in (there, now):
        tree["trainer"].pop("logger")
    changes = _changes(there, now)
    if changes:
        raise ValueError(
            f"{run.folder} holds a run with other settings ({'; '.join(changes)}): give another --out, or remove it"
        )


def dumped(config: Mapping[str, Any]) -> str:
    """A configuration as YAML."""
    text: str = yaml.safe_dump(dict(config), sort_keys=False)
    return text


def _changes(there: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*there, *now])
        return [change for k in keys for change in _changes(there.get(k), now.get(k), f"{key}.{k}".lstrip("."))]
    return [] if there == now else [f"{key}: {there!r} there, {now!r} now"]
