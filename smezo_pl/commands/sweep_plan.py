"""The plan of a sweep: the points of its grid, and a folder, a configuration and a state for each run."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

Point = dict[str, Any]  # a value for each key of a grid, keys in dots
Tested = Literal["best", "last"]  # the checkpoint that is scored on the test set after training
CONFIG = "run.yaml"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which ``1e-4`` is a number, as on the command line; in YAML 1.1 it is a string, as it has no dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file; an error names the file and the line."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def read_grid(path: str | Path) -> list[Point]:
    """The points of a grid file (see the help of ``smezo sweep``), in its order and each once.

    A value for several keys, those with commas between them, is for all of them, or a list of as many values.
    """
    content = read_yaml(path)
    grids = content if isinstance(content, list) else [content]
    points: list[Point] = []
    for number, grid in enumerate(grids, 1):
        where = str(path) if len(grids) == 1 else f"{path}, grid {number}"
        if not isinstance(grid, Mapping) or not grid:
            raise ValueError(f"{where} must map keys such as model.optimizer.lr to lists of values, got {grid!r}")
        points.extend(point for point in _product(grid, where) if point not in points)
    return points


def _product(grid: Mapping[Any, Any], where: str) -> list[Point]:
    choices: list[list[Point]] = []
    seen: set[str] = set()
    for given, values in grid.items():
        keys = [key.strip() for key in str(given).split(",")]
        for key in keys:
            if not key or key in seen:
                raise ValueError(f"{where}: key {given!r} {'is there twice' if key else 'has an empty part'}")
            seen.add(key)
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: {given!r} must be a list with at least one value, got {values!r}")
        choices.append([])
        for value in values:
            each = value if isinstance(value, list) and len(keys) > 1 else [value] * len(keys)
            if len(each) != len(keys):
                raise ValueError(f"{where}: {given!r} names {len(keys)} keys, and {value!r} holds {len(each)} values")
            choices[-1].append(dict(zip(keys, each, strict=True)))
    return [{key: value for part in parts for key, value in part.items()} for parts in product(*choices)]


def with_point(base: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """A copy of a configuration with the values of a point."""
    config = copy.deepcopy(dict(base))
    for key, value in point.items():
        node = config
        *path, last = key.split(".")
        for part in path:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise ValueError(f"key {key!r}: {part!r} is {node!r} in the base configuration and has no keys")
            if "class_path" in node:
                node = node.setdefault("init_args", {})
        node[last] = copy.deepcopy(value)
    return config


def is_seed(key: str) -> bool:
    """Whether runs that differ in this key alone are repetitions of each other."""
    last = key.rpartition(".")[2]
    return last in ("seed", "seed_everything") or last.endswith("_seed")


def short_names(points: Sequence[Point]) -> dict[str, str]:
    """A short name for each key: its last part, with as much before it as tells it from the others."""
    keys = list(dict.fromkeys(key for point in points for key in point))
    names = {}
    for key in keys:
        parts = key.split(".")
        endings = (".".join(parts[-length:]) for length in range(1, len(parts)))
        names[key] = next((end for end in endings if sum(f".{k}".endswith(f".{end}") for k in keys) == 1), key)
    return names


def run_name(point: Point, names: Mapping[str, str]) -> str:
    """The folder of a point: ``method=lora,lr=0.0001``."""
    texts = {key: re.sub(r"[^\w.+-]+", "-", str(value)) or "empty" for key, value in point.items()}
    return ",".join(f"{names[key]}={text}" for key, text in texts.items())


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    name: str
    folder: Path
    point: Point
    config: dict[str, Any]
    test: Tested | None = None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that an interrupted run resumes from, if there is one."""
        path = self.folder / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None

    @property
    def tested_checkpoint(self) -> Path | None:
        """The checkpoint for the test set: the best if asked for and there is one (there was a validation)."""
        best = self.folder / "checkpoints" / "best.ckpt"
        return best if self.test == "best" and best.is_file() else self.checkpoint

    @property
    def test_result(self) -> Path:
        """Where the metrics on the test set are written."""
        return self.folder / "test" / "test.json"

    @property
    def state(self) -> Literal["new", "interrupted", "fitted", "finished"]:
        """How far it is; ``fitted``: its test is still to come."""
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

    def result(self) -> dict[str, Any]:
        """``metrics.json``, with ``test`` as an entry where it was measured; empty before the run is done."""
        metrics = self.folder / "metrics.json"
        result: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {}
        if result and self.test_result.is_file():
            result["test"] = json.loads(self.test_result.read_text(encoding="utf-8"))
        return result

    def scores(self) -> dict[str, float]:
        """The metrics of a finished run, after training and, as ``test_...``, on the test set."""
        result = self.result()
        test = result.get("test", {}).get("metrics", {})
        scores = {**(result.get("after") or {}), **{f"test_{name}": value for name, value in test.items()}}
        return {name: number(value) for name, value in scores.items()}


def number(value: float | None) -> float:
    """A metric as a report holds it: NaN and infinity are null there."""
    return math.nan if value is None else float(value)


def plan(base: Mapping[str, Any], points: Sequence[Point], out: Path, test: Tested | None = None) -> list[Run]:
    """The runs of a grid, in its order. Refused: two points with one name, a folder with a run of other settings."""
    names = short_names(points)
    runs: dict[str, Run] = {}
    for point in points:
        name = run_name(point, names)
        if name in runs:
            raise ValueError(f"two points of the grid have the same name {name!r}: {runs[name].point} and {point}")
        config = with_point(base, point)
        logger = {"save_dir": str(out), "name": name, "version": "", "default_hp_metric": False, "flush_secs": 10}
        trainer = config.setdefault("trainer", {})
        trainer["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger}
        trainer.setdefault("enable_progress_bar", False)
        runs[name] = run = Run(name, out / name, point, config, test)
        if (run.folder / CONFIG).is_file():
            before = yaml.safe_load((run.folder / CONFIG).read_text(encoding="utf-8"))
            changes = "; ".join(text for text in _changes(before, config) if not text.startswith("trainer.logger."))
            if changes:
                raise ValueError(
                    f"{run.folder} holds a run with other settings ({changes}): pass another --out, or remove it"
                )
    return list(runs.values())


def _changes(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [change for k in keys for change in _changes(before.get(k), now.get(k), f"{key}.{k}".lstrip("."))]
    return [] if before == now else [f"{key}: {before!r} there, {now!r} now"]
