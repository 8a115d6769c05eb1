"""Files of every format that was ever written open and give the same bits. A new format adds a folder here.

``format1`` was written by version 0.1.0: 8 steps in bfloat16 with 2 samples, weight decay, a changing learning rate and
a mask refresh. It is never made anew: what it holds is what users' files hold.
"""

from pathlib import Path

import pytest
import torch
from campaigns import digest_of
from safetensors.torch import load_file

from smezo_pl.trajectory import apply, replay
from smezo_pl.trajectory.header import FORMAT, LATEST_FORMAT
from smezo_pl.trajectory.log import Trajectory
from tests.trajectory.runs import network

FORMAT1 = Path(__file__).parent / "format1"
WEIGHTS1 = "a57ddd2b78251fe97da2f8fa12edd90125638449de4f44fa233c1e2c862ddbf2"


def start() -> torch.nn.Module:
    model = network(dtype=torch.bfloat16)
    model.load_state_dict(load_file(FORMAT1 / "start.safetensors"))
    return model


@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_a_trajectory_of_format_1(tmp_path: Path, kernel: str) -> None:
    (tmp_path / "trajectory.smezo").write_bytes((FORMAT1 / "trajectory.smezo").read_bytes())
    trajectory = Trajectory.read(tmp_path)
    assert (trajectory.header.format, trajectory.next_step, trajectory.damage) == (1, 8, None)
    model = start()
    replay(trajectory, model, kernel=kernel)  # type: ignore[arg-type]
    assert digest_of(model) == WEIGHTS1


def test_an_exported_run_of_format_1() -> None:
    model = start()
    applied = apply(model, FORMAT1 / "tune.safetensors")
    assert (applied.steps, applied.identical) == (8, True)
    assert digest_of(model) == WEIGHTS1


def test_every_format_has_its_files() -> None:
    assert (FORMAT, LATEST_FORMAT) == (1, 2), "a new format: keep reading the old ones, and add its files and a test"
