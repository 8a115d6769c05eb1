"""Files of every format that was ever written open and give the same bits. A new format adds a folder here.

``format1`` was written by version 0.1.0: 8 steps in bfloat16 with 2 samples, weight decay, a changing learning rate and
a mask refresh. ``format2`` is `recorded_detour` in bfloat16: tensors that take no part, and a number of samples that
changes. They are never made anew: what they hold is what users' files hold.
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

FOLDERS = {number: Path(__file__).parent / f"format{number}" for number in (1, 2)}
WEIGHTS = {
    1: "a57ddd2b78251fe97da2f8fa12edd90125638449de4f44fa233c1e2c862ddbf2",
    2: "733f400b764a5e068dafae343078b1237b88a9aef9f9f7d1a03e8792ae1dce9c",
}


def start(number: int) -> torch.nn.Module:
    model = network(dtype=torch.bfloat16)
    model.load_state_dict(load_file(FOLDERS[number] / "start.safetensors"))
    return model


@pytest.mark.parametrize("number", FOLDERS)
@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_a_trajectory_of_every_format(tmp_path: Path, kernel: str, number: int) -> None:
    (tmp_path / "trajectory.smezo").write_bytes((FOLDERS[number] / "trajectory.smezo").read_bytes())
    trajectory = Trajectory.read(tmp_path)
    assert (trajectory.header.format, trajectory.next_step, trajectory.damage) == (1, 8, None)
    model = start(number)
    replay(trajectory, model, kernel=kernel)  # type: ignore[arg-type]
    assert digest_of(model) == WEIGHTS[number]


@pytest.mark.parametrize("number", FOLDERS)
def test_an_exported_run_of_every_format(number: int) -> None:
    model = start(number)
    applied = apply(model, FOLDERS[number] / "tune.safetensors")
    assert (applied.steps, applied.identical) == (8, True)
    assert digest_of(model) == WEIGHTS[number]


def test_format_2_is_for_what_format_1_cannot_say(tmp_path: Path) -> None:
    """A reader of format 1 would apply updates to all tensors; it must refuse the file by its number instead."""
    recorded_run(tmp_path / "plain", network())
    recorded_detour(tmp_path / "detour", network())
    for name, number in (("plain", 1), ("detour", 2)):
        assert (tmp_path / name).read_bytes()[60:64] == number.to_bytes(4, "big")  # SQLite's user_version
        export(tmp_path / name, tmp_path / "t.safetensors")
        with safe_open(tmp_path / "t.safetensors", framework="numpy") as file:
            assert file.metadata()["format"] == str(number)


def test_every_format_has_its_files() -> None:
    assert (FORMAT, LATEST_FORMAT) == (1, 3), "a new format: keep reading the old ones, and add its files and a test"
