"""A grid of values over keys of the configuration.

A product of lists is all there is to it. Optuna's grid sampler holds one product only, while learning rates belong to
methods, and it starts an interrupted trial anew instead of going on from its checkpoint; so there is no library here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

Point = dict[str, Any]
"""A value for each key of a grid, keys in dots."""

_SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def read_yaml(path: str | Path) -> Any:
    """A YAML file, in which ``1e-4`` is a number, as everywhere on the command line.

    Raises:
        ValueError: If there is no such file, or it is no YAML (with the line).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        return _numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


def _numbers(value: Any) -> Any:
    """YAML 1.1 takes ``1e-4`` for a string, as it has no dot."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def read_grid(path: str | Path) -> list[Point]:
    """The points of a grid file.

    The file holds a mapping of keys to lists of values, of which every combination is a point; or a list of such
    mappings, whose points follow each other. Several keys with commas between them change together: a value is for all
    of them, or a list of as many values.

    Raises:
        ValueError: Names the file, the key, and what is allowed.
    """
    content = read_yaml(path)
    grids = content if isinstance(content, list) else [content]
    points: list[Point] = []
    for number, grid in enumerate(grids, 1):
        where = str(path) if len(grids) == 1 else f"{path}, grid {number}"
        if not isinstance(grid, Mapping) or not grid:
            raise ValueError(f"{where} must map keys such as model.optimizer.lr to lists of values, got {grid!r}")
        for point in _product(grid, where):
            if point not in points:
                points.append(point)
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
        choices.append([_together(keys, value, where, given) for value in values])
    return [{key: value for part in parts for key, value in part.items()} for parts in product(*choices)]


def _together(keys: Sequence[str], value: Any, where: str, given: Any) -> Point:
    if len(keys) == 1:
        return {keys[0]: value}
    values = value if isinstance(value, list) else [value] * len(keys)
    if len(values) != len(keys):
        raise ValueError(f"{where}: {given!r} names {len(keys)} keys, and {value!r} holds {len(values)} values")
    return dict(zip(keys, values, strict=True))


def with_point(base: Mapping[str, Any], point: Point) -> dict[str, Any]:
    """A copy of a configuration with the values of a point.

    Raises:
        ValueError: If a key leads through something that has no keys.
    """
    config = copy.deepcopy(dict(base))
    for key, value in point.items():
        node = config
        *path, last = key.split(".")
        for part in path:
            if part not in node or node[part] is None:
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
    return last == "seed_everything" or last == "seed" or last.endswith("_seed")


def short_names(points: Sequence[Point]) -> dict[str, str]:
    """A short name for each key: its last part, with as much before it as tells it from the others."""
    keys = list(dict.fromkeys(key for point in points for key in point))
    names = {}
    for key in keys:
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            if sum(other == name or other.endswith("." + name) for other in keys) == 1:
                break
        names[key] = name
    return names


def run_name(point: Point, names: Mapping[str, str]) -> str:
    """The folder of a point: ``method=lora,lr=0.0001``."""
    words = []
    for key, value in point.items():
        text = re.sub(r"[^\w.+-]+", "-", str(value)) or "empty"
        words.append(f"{names[key]}={text}")
    return ",".join(words)
