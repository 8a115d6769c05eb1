import json
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from smezo_pl.optim import StepRecord
from smezo_pl.trajectory import TrajectoryError, apply, export, load
from smezo_pl.trajectory.exports import KIND, _seal
from smezo_pl.trajectory.log import Trajectory
from tests.trajectory.runs import network, recorded_run, same


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Sequential]:
    trained = network(dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("run") / "trajectory.smezo"
    recorded_run(path, trained, num_samples=2, weight_decay=0.1, mask_update="constant")
    return path, trained


@pytest.fixture
def tune(run: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> Path:
    return export(run[0], tmp_path / "tune.safetensors").path


def test_an_exported_run_gives_the_trained_weights(run: tuple[Path, torch.nn.Sequential], tune: Path) -> None:
    model = network(dtype=torch.bfloat16)
    applied = apply(model, tune, kernel="torch")
    assert (applied.steps, applied.identical) == (8, True)
    assert same(model, run[1])


def test_a_record_can_be_applied_as_well(run: tuple[Path, torch.nn.Sequential]) -> None:
    model = network(dtype=torch.bfloat16)
    assert apply(model, run[0].parent, kernel="torch").identical
    assert same(model, run[1])


def test_an_earlier_step_can_be_exported(run: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    written = export(run[0], tmp_path / "early.safetensors", 5)
    assert (written.steps, written.verified) == (5, False)
    model = network(dtype=torch.bfloat16)
    assert apply(model, written.path, kernel="torch").identical is None


def test_what_an_export_holds_is_the_record(run: tuple[Path, torch.nn.Sequential], tune: Path) -> None:
    record, exported = Trajectory.read(run[0]), load(tune)
    assert exported.header == record.header
    assert exported.records == [replace(row, losses=(), thresholds=b"") for row in record.records]


def test_any_tool_can_read_it(run: tuple[Path, torch.nn.Sequential], tune: Path) -> None:
    with safe_open(tune, framework="numpy") as file:
        metadata = file.metadata()
        gradients = file.get_tensor("projected_gradients")
    assert metadata["kind"] == KIND and metadata["steps"] == "8" and json.loads(metadata["settings"])["lr"] == 1e-2
    recorded = [row.projected_gradients for row in Trajectory.read(run[0]).records]
    assert np.array_equal(gradients, np.array(recorded, dtype=np.float32))


def test_skipped_steps_stay_skipped(run: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    trajectory = Trajectory.read(run[0])
    rows = [replace(r, projected_gradients=(), skipped=True) if r.step in (0, 4) else r for r in trajectory.records]
    export(replace(trajectory, records=rows, events=[]), tmp_path / "t.safetensors")
    assert [r.skipped for r in load(tmp_path / "t.safetensors").records] == [i in (0, 4) for i in range(8)]


def test_20000_steps_take_less_than_100_kilobytes(run: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    trajectory = Trajectory.read(run[0])
    noise = random.Random(0)
    rates = {"lr": (1e-6,), "weight_decay": (0.0,), "eps": (1e-3,), "sparsity": (0.8,)}
    rows = [
        StepRecord(i, ((1.0, 1.0),), (float(np.float32(noise.gauss(0, 1))),), **rates, refreshed=i % 1000 == 0)
        for i in range(20_000)
    ]
    one_sample = replace(trajectory, records=rows, events=[], header=replace(trajectory.header, num_samples=1))
    written = export(one_sample, tmp_path / "t.safetensors")
    assert written.size < 84_000
    assert [r.projected_gradients for r in load(written.path).records] == [r.projected_gradients for r in rows]


def test_other_starting_weights_are_refused(tune: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network(seed=1, dtype=torch.bfloat16)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TrajectoryError, match="starts from other weights than these"):
        apply(model, tune, kernel="torch")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert apply(model, tune, force=True, kernel="torch").identical is False


def test_a_file_that_is_no_export_is_told_apart(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(TrajectoryError, match="is a safetensors file, but no exported run"):
        load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(TrajectoryError, match="is no safetensors file"):
        load(tmp_path / "text")
    (tmp_path / "trajectory.smezo").write_text("hello")
    with pytest.raises(TrajectoryError, match="the file is corrupted or no trajectory"):
        load(tmp_path)
    with pytest.raises(TrajectoryError, match="no such file"):
        load(tmp_path / "nowhere")


def changed(path: Path, metadata: dict[str, str] | None = None, **arrays: Any) -> Path:
    with safe_open(path, framework="numpy") as file:
        kept = file.metadata()
    save_file({**load_file(path), **arrays}, path, metadata={**kept, **(metadata or {})})
    return path


def test_a_later_format_is_named(tune: Path) -> None:
    with pytest.raises(TrajectoryError, match="export format 2; this version reads 1"):
        load(changed(tune, {"format": "2"}))


@pytest.mark.parametrize(
    "arrays",
    [
        {"projected_gradients": np.zeros((8, 2), dtype=np.float32)},
        {"projected_gradients": np.zeros((8, 2), dtype=np.float64)},
        {"header": np.zeros(10, dtype=np.uint8)},
        {"columns": np.zeros(10, dtype=np.uint8)},
    ],
)
def test_content_that_was_changed_is_found(tune: Path, arrays: dict[str, Any]) -> None:
    with pytest.raises(TrajectoryError, match="its hash is not that of its content"):
        load(changed(tune, **arrays))


def test_every_damaged_byte_is_found_or_harmless(run: tuple[Path, torch.nn.Sequential], tune: Path) -> None:
    data, right = tune.read_bytes(), load(tune)
    noise = random.Random(0)
    found = 0
    for _ in range(400):
        wrong = bytearray(data)
        wrong[noise.randrange(len(wrong))] ^= 1 << noise.randrange(8)
        tune.write_bytes(wrong)
        try:
            assert load(tune).records == right.records
        except TrajectoryError:
            found += 1
    assert found > 200  # the rest are words of the metadata that nothing reads


def resealed(path: Path, content: Any) -> Path:
    """The file of someone who knows how to make its hash."""
    arrays = load_file(path)
    header = zlib.compress(content if isinstance(content, bytes) else json.dumps(content).encode())
    seal = _seal(header, arrays["columns"].tobytes(), arrays["projected_gradients"])
    return changed(path, {"sha256": seal}, header=np.frombuffer(header, np.uint8))


def content_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(zlib.decompress(load_file(path)["header"].tobytes())))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skipped": [8]}, "a step is named that does not exist"),
        ({"refreshed": [-1]}, "a step is named that does not exist"),
        ({"skipped": {}}, "a step is named that does not exist"),
        ({"columns": [0, 0]}, "columns do not have the lengths"),
        ({"columns": [-1, 1, 0, 0]}, "columns do not have the lengths"),
        ({"pieces": {}}, "lr"),
        ({"pieces": []}, "corrupted"),
        ({"final": "00"}, "wrong length"),
        ({"header": {}}, "header is corrupted"),
        ({"header": None}, "header is corrupted"),
    ],
)
def test_content_that_cannot_be_is_refused(tune: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        load(resealed(tune, {**content_of(tune), **changes}))


def test_samples_must_fit(tune: Path) -> None:
    content = content_of(tune)
    content["header"]["num_samples"] = 3
    with pytest.raises(TrajectoryError, match="for 3 samples"):
        load(resealed(tune, content))


def test_mutated_content_is_read_or_refused_cleanly(tune: Path) -> None:
    noise = random.Random(1)
    text = json.dumps(content_of(tune)).encode()
    refused = 0
    for _ in range(500):
        wrong = bytearray(text)
        for _ in range(noise.randint(1, 3)):
            place = noise.randrange(len(wrong))
            wrong[place : place + noise.randint(0, 3)] = noise.randbytes(noise.randint(0, 3))
        try:
            load(resealed(tune, bytes(wrong)))
        except TrajectoryError:
            refused += 1
    assert refused > 250


def test_a_file_that_is_too_large_is_not_opened(tune: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smezo_pl.trajectory.exports.MAX_FILE_BYTES", 100)
    with pytest.raises(TrajectoryError, match="is no exported run: it has"):
        load(tune)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.999])
def test_a_cut_file_is_refused(tune: Path, share: float) -> None:
    data = tune.read_bytes()
    tune.write_bytes(data[: int(share * len(data))])
    with pytest.raises(TrajectoryError, match="no safetensors file, corrupted or cut short"):
        load(tune)


def test_a_folder_that_cannot_be_written_is_named(run: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajectoryError, match="cannot be written"):
        export(run[0], tmp_path / "file" / "tune.safetensors")
