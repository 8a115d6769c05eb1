"""Files of every format that was ever written open and give the same bits. A new format adds a folder here.

``format1`` was written by version 0.1.0: 8 steps in bfloat16 with 2 samples, weight decay, a changing learning rate and
a mask refresh. ``format2`` is `recorded_detour` in bfloat16: tensors that take no part, and a number of samples that
changes. ``format3`` and ``format3-flips`` are `recorded_rows` in bfloat16: a direction per row, of rank 2 with moving
coefficients, and by sign flips with ranks. They are never made anew: what they hold is what users' files hold.
"""

from pathlib import Path

import pytest
import torch
from campaigns import digest_of
from safetensors import safe_open
from safetensors.torch import load_file

from smezo_pl.trajectory import apply, export, replay
from smezo_pl.trajectory.header import FORMAT, LATEST_FORMAT
from smezo_pl.trajectory.log import Trajectory
from tests.trajectory.runs import network, recorded_detour, recorded_run

WEIGHTS = {
    "format1": "a57ddd2b78251fe97da2f8fa12edd90125638449de4f44fa233c1e2c862ddbf2",
    "format2": "733f400b764a5e068dafae343078b1237b88a9aef9f9f7d1a03e8792ae1dce9c",
    "format3": "0c15b30910ddd6605e1c3af22eaf44bedac3141f537a025ef2e21a2ec856b2d4",
    "format3-flips": "979fca0f51976bf37e98a88dbc42fe88be302205ce90f248b174f47e02dab843",
}


def file_of(name: str, file: str) -> Path:
    return Path(__file__).parent / name / file


def start(name: str) -> torch.nn.Module:
    model = network(dtype=torch.bfloat16)
    model.load_state_dict(load_file(file_of(name, "start.safetensors")))
    return model


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_a_trajectory_of_every_format(tmp_path: Path, kernel: str, name: str) -> None:
    (tmp_path / "trajectory.smezo").write_bytes(file_of(name, "trajectory.smezo").read_bytes())
    trajectory = Trajectory.read(tmp_path)
    assert (trajectory.next_step, trajectory.damage) == (8, None)
    model = start(name)
    replay(trajectory, model, kernel=kernel)  # type: ignore[arg-type]
    assert digest_of(model) == WEIGHTS[name]


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_exported_run_of_every_format(name: str) -> None:
    model = start(name)
    applied = apply(model, file_of(name, "tune.safetensors"))
    assert (applied.steps, applied.identical) == (8, True)
    assert digest_of(model) == WEIGHTS[name]


def test_a_format_is_for_what_those_before_it_cannot_say(tmp_path: Path) -> None:
    """A reader of format 1 would apply updates to all tensors; it must refuse the file by its number instead."""
    recorded_run(tmp_path / "plain", network())
    recorded_detour(tmp_path / "detour", network())
    recorded_detour(tmp_path / "one of low rank", network(), rank=1)
    recorded_run(tmp_path / "normalized", network(), coefficients="normalized")
    for name, number in (("plain", 1), ("detour", 2), ("one of low rank", 3), ("normalized", 3)):
        assert (tmp_path / name).read_bytes()[60:64] == number.to_bytes(4, "big")  # SQLite's user_version
        export(tmp_path / name, tmp_path / "t.safetensors")
        with safe_open(tmp_path / "t.safetensors", framework="numpy") as file:
            assert file.metadata()["format"] == str(number)


def test_every_format_has_its_files() -> None:
    assert (FORMAT, LATEST_FORMAT) == (1, 3), "a new format: keep reading the old ones, and add its files and a test"
