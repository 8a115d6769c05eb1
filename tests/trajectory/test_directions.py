"""Runs with directions of low rank, sign flips and coefficients: recorded, replayed and resumed to the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_pl.callbacks import MaskRefresh, SeedCheckpoint
from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.perturbation.layerwise import Layerwise
from smezo_pl.trajectory import TrajectoryError, apply, export, record, replay
from smezo_pl.trajectory.log import Trajectory
from tests.trajectory.runs import (
    Classifier,
    KillAfter,
    KilledError,
    fit,
    more_rows,
    network,
    recorded_detour,
    recorded_rows,
    same,
)

BY_ROWS: dict[str, dict[str, Any]] = {
    "rank 1": {"rank": 1},
    "rank 3, moving": {"rank": 3, "coefficients": "moving", "noise": "rademacher"},
    "flips, normalized": {"coefficients": "normalized"},
    "flips of constant random masks, ranks": {"coefficients": "ranks", "mask": "random", "mask_update": "constant"},
    "flips, moving": {"coefficients": "moving", "maximize": True},
}


SLOW = pytest.mark.slow
NAMES = list(BY_ROWS)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in NAMES[1:3]),
        *(pytest.param(name, torch.bfloat16, marks=SLOW) for name in (NAMES[0], *NAMES[3:])),
        *(pytest.param(name, torch.float32, marks=SLOW) for name in NAMES[:3]),
        *((name, torch.float32) for name in NAMES[3:]),
    ],
)
def test_a_replay_gives_the_weights_and_the_optimizer(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    trained, threads = network(dtype=dtype), torch.get_num_threads()
    optimizer = recorded_rows(tmp_path / "t", trained, kernel="numba", **BY_ROWS[name])
    records = Trajectory.read(tmp_path / "t").records
    assert [(r.rows, r.samples, r.skipped, r.shared) for r in records] == [
        *((rows, 1, False, 0b10) for rows in (4, 3, 4, 4)),
        *((4, 2, skipped, 0b10) for skipped in (False, True, False, False)),
    ]
    own = optimizer.state_dict()
    for kernel, count in (("torch", 2), ("numba", 1), ("numba", 2)):
        torch.set_num_threads(count)
        try:
            model = network(dtype=dtype)
            replayed = replay(tmp_path / "t", model, kernel=kernel)  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(threads)
        assert same(model, trained)
        found = replayed.state_dict()["smezo"]
        bits = own["smezo"]["bits"]
        assert all(torch.equal(found["bits"][number], packed) for number, packed in bits.items())
        assert {**found, "bits": 0} == {**own["smezo"], "bits": 0}
    assert own["smezo"]["no_signal"] == own["smezo"]["skipped"] == 1
    model = network(dtype=dtype)
    export(tmp_path / "t", tmp_path / "tune")
    assert apply(model, tmp_path / "tune").identical
    assert same(model, trained)


@pytest.mark.parametrize("name", [NAMES[1], *(pytest.param(name, marks=SLOW) for name in (NAMES[0], *NAMES[2:]))])
def test_a_run_that_continues_from_a_replay_is_the_one_that_did_not_stop(tmp_path: Path, name: str) -> None:
    straight = network()
    recorded_rows(tmp_path / "straight", straight, kernel="numba", **BY_ROWS[name])
    recorded_rows(tmp_path / "t", network(), 7, kernel="numba", **BY_ROWS[name])
    for source in ("t", "tune"):
        model = network()
        if source == "tune":
            export(tmp_path / "straight", tmp_path / source)
        optimizer = replay(tmp_path / source, model, 7)
        optimizer.attach(model)
        more_rows(optimizer, model, 8)
        assert same(model, straight)


def test_a_trajectory_that_begins_in_mid_run_gives_the_optimizer_too(tmp_path: Path) -> None:
    model = network()
    first = recorded_rows(tmp_path / "t", model, 7, **BY_ROWS["flips, moving"])
    first.refresh_masks()  # else the file could not say what constant masks were made from
    start, state = {name: value.clone() for name, value in model.state_dict().items()}, first.state_dict()
    assert (state["smezo"]["skipped"], state["smezo"]["no_signal"]) == (1, 1)
    with record(first, tmp_path / "later", model):
        more_rows(first, model, 8)
    again = network()
    again.load_state_dict(start)
    assert Trajectory.read(tmp_path / "later").header.counters == {
        name: state["smezo"][name] for name in ("skipped", "no_signal", "mean_square")
    }
    assert replay(tmp_path / "later", again).state_dict()["smezo"] == first.state_dict()["smezo"]
    assert same(again, model)


def test_one_direction_of_low_rank_is_replayed_too(tmp_path: Path) -> None:
    for attach in (True, False):
        trained, model = network(dtype=torch.bfloat16), network(dtype=torch.bfloat16)
        path = tmp_path / f"{attach}"
        recorded_detour(path, trained, rank=2, coefficients="moving", attach=attach)
        replay(path, model)
        assert same(model, trained)
        assert {record.rows for record in Trajectory.read(path).records} == {1}


@pytest.mark.parametrize(
    "settings", [{"rank": 1}, {"rank": 2}, {"rank": 1, "directions": "shared"}, {"coefficients": "ranks", "rank": 1}]
)
def test_a_trajectory_of_other_directions_is_not_continued(tmp_path: Path, settings: dict[str, Any]) -> None:
    optimizer = recorded_rows(tmp_path / "t", network(), rank=1)
    model = network()
    other = SparseMeZO(model.named_parameters(), **{"directions": "per_row", "seed": 7, "kernel": "torch", **settings})
    state = other.state_dict()
    state["smezo"]["steps_done"] = optimizer.steps_done
    other.load_state_dict(state)
    if settings == {"rank": 1}:
        record(other, tmp_path / "t", model).close()
        return
    with pytest.raises(TrajectoryError, match=r"other settings \(seed, noise, directions, rank, coefficients"):
        record(other, tmp_path / "t", model)


RUNS: dict[str, dict[str, Any]] = {
    "rank 1, moving": {
        "directions": "per_row",
        "rank": 1,
        "coefficients": "moving",
        "dtype": "bfloat16",
        "kernel": "numba",
    },
    "flips, ranks, 2 samples": {"directions": "per_row", "coefficients": "ranks", "num_samples": 2, "kernel": "numba"},
    "one of rank 4, normalized": {"rank": 4, "coefficients": "normalized"},
    "one, moving": {"coefficients": "moving"},
}


OTHERS = [(name, anchors) for name in RUNS for anchors in (None, 3)]
FAST = [("rank 1, moving", 3), ("flips, ranks, 2 samples", None)]


@pytest.mark.parametrize(
    ("name", "anchors"), [*FAST, *(pytest.param(*run, marks=SLOW) for run in OTHERS if run not in FAST)]
)
def test_a_killed_run_ends_like_the_undisturbed_one(
    tmp_path: Path, name: str, anchors: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"kernel": "numba", **RUNS[name]}

    def callbacks() -> list[Any]:
        refresh = [] if "rank" in run else [MaskRefresh(every_n_steps=4)]
        return [*refresh, SeedCheckpoint(every_n_steps=3, anchor_every_n_steps=anchors)]

    straight, resumed = Classifier(**run), Classifier(**run)
    fit(tmp_path / "straight", straight, *callbacks(), max_steps=9)
    with pytest.raises(KilledError):
        fit(tmp_path / "killed", Classifier(**run), KillAfter(7), *callbacks(), max_steps=9)
    monkeypatch.setattr(Layerwise, "learn", lambda *_: pytest.fail("which tensors are shared was known"))
    fit(tmp_path / "killed", resumed, *callbacks(), max_steps=9, ckpt_path=tmp_path / "killed/checkpoints/last.ckpt")
    assert same(straight.model, resumed.model)
    one, other = (Trajectory.read(tmp_path / run) for run in ("straight", "killed"))
    assert one.records == other.records
    assert one.header.format == 3
    states = [module.optimizers(use_pl_optimizer=False).state_dict()["smezo"] for module in (straight, resumed)]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4}, "cannot change rank 1 -> 4"),
        ({"directions": "shared"}, "cannot change directions 'per_row' -> 'shared'"),
        ({"coefficients": "raw"}, "cannot change coefficients 'moving' -> 'raw'"),
    ],
)
def test_what_a_resume_cannot_change_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    run = RUNS["rank 1, moving"]
    fit(tmp_path, Classifier(**run), max_steps=3)
    with pytest.raises(ValueError, match=f"a resumed run {message}: give what the checkpoint has"):
        fit(tmp_path, Classifier(**{**run, **settings}), max_steps=6, ckpt_path=tmp_path / "checkpoints/last.ckpt")


def test_directions_that_are_not_given_stay(tmp_path: Path) -> None:
    run = RUNS["rank 1, moving"]
    fit(tmp_path, Classifier(**run), max_steps=3)
    module = Classifier(dtype="bfloat16", strict=True)
    fit(tmp_path, module, max_steps=6, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert (optimizer.directions, optimizer.rank, optimizer.coefficients) == ("per_row", 1, "moving")
    [changes] = Trajectory.read(tmp_path).events_of("settings")
    assert json.loads(json.dumps(changes.facts)) == {"changes": {"strict": [False, True]}}
