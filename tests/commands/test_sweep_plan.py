from pathlib import Path
from typing import Any

import pytest

from smezo_pl.commands.sweep_plan import is_seed, read_grid, read_yaml, run_name, short_names, with_point


def grid_of(tmp_path: Path, text: str) -> list[dict[str, Any]]:
    (tmp_path / "grid.yaml").write_text(text)
    return read_grid(tmp_path / "grid.yaml")


def test_every_combination_in_order(tmp_path: Path) -> None:
    points = grid_of(tmp_path, "a.lr: [1e-4, 2.0E-3]\nseed: [0, 1]\n")
    assert points == [
        {"a.lr": 1e-4, "seed": 0},
        {"a.lr": 1e-4, "seed": 1},
        {"a.lr": 2e-3, "seed": 0},
        {"a.lr": 2e-3, "seed": 1},
    ]


def test_several_grids_and_no_point_twice(tmp_path: Path) -> None:
    points = grid_of(tmp_path, "- m: [x]\n  lr: [1]\n- m: [x, y]\n  lr: [1]\n")
    assert points == [{"m": "x", "lr": 1}, {"m": "y", "lr": 1}]


def test_keys_that_change_together(tmp_path: Path) -> None:
    points = grid_of(tmp_path, "task, length: [[sst2, 8], [rte, 9]]\ns.seed, d.data_seed: [3]\n")
    assert points == [
        {"task": "sst2", "length": 8, "s.seed": 3, "d.data_seed": 3},
        {"task": "rte", "length": 9, "s.seed": 3, "d.data_seed": 3},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", r"grid.yaml: 'a' must be a list with at least one value, got 1"),
        ("a: []", r"'a' must be a list with at least one value, got \[\]"),
        ("- a: [1]\n- 3", r"grid.yaml, grid 2 must map keys such as model.optimizer.lr to lists of values, got 3"),
        ("", "must map keys"),
        ("a: [1]\na, b: [2]", "key 'a, b' is there twice"),
        ("'a,': [2]", "key 'a,' has an empty part"),
        ("a, b: [[1, 2, 3]]", r"'a, b' names 2 keys, and \[1, 2, 3\] holds 3 values"),
        ("a: [1\nb: 2", r"grid.yaml is not YAML: .*line 2"),
    ],
)
def test_a_wrong_grid_says_where(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        grid_of(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.yaml cannot be read"):
        read_yaml(tmp_path / "nothing.yaml")


def test_values_go_where_their_keys_say() -> None:
    base = {"model": {"optimizer": {"class_path": "X", "init_args": {"lr": 1}}, "adapter": None}, "n": 3}
    config = with_point(base, {"model.optimizer.lr": 2, "model.adapter.r": 4, "data.task": "rte"})
    assert config["model"] == {"optimizer": {"class_path": "X", "init_args": {"lr": 2}}, "adapter": {"r": 4}}
    assert config["data"] == {"task": "rte"} and base["model"]["adapter"] is None  # type: ignore[index]
    with pytest.raises(ValueError, match="key 'n.x': 'n' is 3 in the base configuration and has no keys"):
        with_point(base, {"n.x": 1})


def test_names_are_short_and_tell_apart() -> None:
    point = {"model.optimizer.lr": 1e-4, "model.first_order.lr": 0.5, "data.task": "a/b c", "seed_everything": None}
    names = short_names([point])
    assert list(names.values()) == ["optimizer.lr", "first_order.lr", "task", "seed_everything"]
    assert run_name(point, names) == "optimizer.lr=0.0001,first_order.lr=0.5,task=a-b-c,seed_everything=None"


def test_seeds() -> None:
    seeds = ("model.optimizer.seed", "data.data_seed", "seed_everything", "seed")
    assert [is_seed(key) for key in (*seeds, "model.optimizer.lr", "data.seeds")] == [True] * 4 + [False] * 2
