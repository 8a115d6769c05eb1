"""A few of the kills, corruptions and fuzzed headers that `benchmarks/faults.py` tries by the hundred."""

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import campaigns
import faults
import pytest

from smezo_pl.trajectory.log import Trajectory, TrajectoryWriter

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # from Python 3.12 on; the forked processes use none of the parent's threads
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

NAMES = list(campaigns.CONFIGURATIONS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The first configuration, undisturbed, and its seconds."""
    folder = tmp_path_factory.mktemp("campaign") / "straight"
    return folder, campaigns.undisturbed(folder, NAMES[0])


@pytest.mark.parametrize("number", range(1, len(campaigns.POINTS)))
def test_a_killed_run_ends_like_the_undisturbed_one(straight: tuple[Path, float], tmp_path: Path, number: int) -> None:
    found = campaigns.killed(tmp_path / "killed", NAMES[0], *straight, number)
    assert found["point"] == campaigns.POINTS[number]
    assert found["kills"]
    assert found["equal"] is None


@pytest.mark.slow
@pytest.mark.parametrize("which", range(len(NAMES)))
def test_so_it_is_in_every_configuration(tmp_path: Path, which: int) -> None:
    seconds = campaigns.undisturbed(tmp_path / "straight", NAMES[which])
    for number in range(4):
        found = campaigns.killed(
            tmp_path / str(number), NAMES[which], tmp_path / "straight", seconds, 100 + 4 * which + number
        )
        assert found["equal"] is None, found


def test_a_campaign_sees_a_run_that_went_wrong(straight: tuple[Path, float], tmp_path: Path) -> None:
    """The comparison itself: another run is told from the undisturbed one."""
    campaigns.undisturbed(tmp_path / "other", NAMES[2])
    assert campaigns.difference(tmp_path / "other", straight[0]) == "the weights differ"
    assert campaigns.difference(straight[0], straight[0]) is None


@pytest.mark.parametrize(
    ("which", "count"), [(0, 4), (3, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 24), (4, 6)))]
)
def test_corruption_is_found_or_harmless(straight: tuple[Path, float], tmp_path: Path, which: int, count: int) -> None:
    name = NAMES[which]
    if which:
        straight = tmp_path / "straight", campaigns.undisturbed(tmp_path / "straight", name)
        records = Trajectory.read(straight[0]).records
        assert {(record.unread, record.rows) for record in records} == {3: {(0, 1), (12, 1)}, 4: {(0, 4)}}[which]
    campaigns.half_run(tmp_path / "half", name, 17)
    campaigns.half_run(tmp_path / "other", name, 17, seed=8)
    code, said = campaigns.forked(lambda: campaigns.truth_of(straight[0], name))
    assert code == 0, said
    truth = {int(steps): digest for steps, digest in json.loads(said).items()}
    for number in range(count):
        run = tmp_path / f"corrupted{number}"
        shutil.copytree(tmp_path / "half", run)
        done = campaigns.corrupt(run, tmp_path / "other", random.Random(number))
        found = campaigns.outcomes_of(run, straight[0], name, truth)
        assert not [outcome for outcome in found.values() if outcome.startswith("WRONG")], (done, found)


def test_fuzzed_headers_are_read_or_refused(tmp_path: Path) -> None:
    found = faults.headers(range(400), tmp_path)
    assert not found["failures"]
    refused = sum(count for what, count in found["outcomes"].items() if what.endswith("refused"))
    assert refused > 200 and 400 - refused > 10


# 64: the trajectory does not fit, 112: a checkpoint does not
@pytest.fixture(params=[64, 112], ids=["64 kB", "112 kB"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system."""
    folder = tmp_path / "a small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode
    except OSError:
        done = errno.ENOENT
    if done:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_ends_the_run_clearly_and_it_resumes_when_there_is_space(
    straight: tuple[Path, float], small_disk: Path
) -> None:
    code, said = campaigns.forked(lambda: campaigns.train(small_disk, NAMES[0]))
    assert code == 3, said
    assert "disk is full" in said or "No space left on device" in said, said
    assert "Make space" in said or "make space and resume" in said, said
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert 0 < Trajectory.read(small_disk).next_step < campaigns.STEPS
    code, said = campaigns.forked(lambda: campaigns.train(small_disk, NAMES[0]))
    assert code == 0, said
    assert campaigns.difference(small_disk, straight[0]) is None


def test_a_folder_that_is_read_only_is_named(small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, said = campaigns.forked(lambda: campaigns.train(small_disk / "run", NAMES[0]))
    assert code == 3, said
    assert "cannot be written" in said and str(small_disk / "run") in said


def test_a_second_run_in_the_same_folder_is_refused(straight: tuple[Path, float], tmp_path: Path) -> None:
    """Two processes of the Trainer; the first continues undisturbed."""
    campaigns.half_run(tmp_path / "run", NAMES[0], 17)
    with TrajectoryWriter.resume(tmp_path / "run" / campaigns.RECORD):
        code, said = campaigns.forked(lambda: campaigns.train(tmp_path / "run", NAMES[0]))
        assert code == 3 and "is being written by another run" in said
    code, said = campaigns.forked(lambda: campaigns.train(tmp_path / "run", NAMES[0]))
    assert code == 0, said
    assert (tmp_path / "run" / "final").read_text() == (straight[0] / "final").read_text()
