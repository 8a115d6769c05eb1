import json
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from smezo_pl.optim import SparseMeZO, StepRecord
from smezo_pl.optim.coefficients import coefficients as coefficients_of
from smezo_pl.optim.coefficients import rounded
from smezo_pl.trajectory import TrajectoryError, apply, export, load
from smezo_pl.trajectory.exports import KIND, _seal, pack_columns, unpack_columns
from smezo_pl.trajectory.log import Trajectory, TrajectoryWriter
from smezo_pl.trajectory.recorder import describe
from tests.trajectory.runs import network, recorded_detour, recorded_run, same
from tests.trajectory.test_records import f32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Sequential]:
    trained = network(dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("run") / "trajectory.smezo"
    recorded_run(path, trained, num_samples=2, weight_decay=0.1, mask_update="constant")
    return path, trained


@pytest.fixture
def exported(run: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> Path:
    return export(run[0], tmp_path / "tune.safetensors").path


def test_an_exported_run_gives_the_trained_weights(run: tuple[Path, torch.nn.Sequential], exported: Path) -> None:
    model = network(dtype=torch.bfloat16)
    applied = apply(model, exported, kernel="torch")
    assert (applied.steps, applied.identical) == (8, True)
    assert same(model, run[1])


def test_a_trajectory_can_be_applied_as_well(run: tuple[Path, torch.nn.Sequential]) -> None:
    model = network(dtype=torch.bfloat16)
    assert apply(model, run[0].parent, kernel="torch").identical
    assert same(model, run[1])


def test_an_earlier_step_can_be_exported(run: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    written = export(run[0], tmp_path / "early.safetensors", 5)
    assert (written.steps, written.verified) == (5, False)
    model = network(dtype=torch.bfloat16)
    assert apply(model, written.path, kernel="torch").identical is None


def test_an_export_holds_the_recorded_steps(run: tuple[Path, torch.nn.Sequential], exported: Path) -> None:
    recorded, found = Trajectory.read(run[0]), load(exported)
    assert found.header == recorded.header
    assert found.records == [replace(row, losses=(), thresholds=b"") for row in recorded.records]


def test_any_tool_can_read_it(run: tuple[Path, torch.nn.Sequential], exported: Path) -> None:
    with safe_open(exported, framework="numpy") as file:
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


def test_other_starting_weights_are_refused(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network(seed=1, dtype=torch.bfloat16)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TrajectoryError, match="starts from other weights than these"):
        apply(model, exported, kernel="torch")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert apply(model, exported, force=True, kernel="torch").identical is False


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


def test_a_later_format_is_named(exported: Path) -> None:
    with pytest.raises(TrajectoryError, match="export format 4; this version reads formats up to 3"):
        load(changed(exported, {"format": "4"}))


@pytest.mark.parametrize(
    "arrays",
    [
        {"projected_gradients": np.zeros((8, 2), dtype=np.float32)},
        {"projected_gradients": np.zeros((8, 2), dtype=np.float64)},
        {"header": np.zeros(10, dtype=np.uint8)},
        {"columns": np.zeros(10, dtype=np.uint8)},
    ],
)
def test_content_that_was_changed_is_found(exported: Path, arrays: dict[str, Any]) -> None:
    with pytest.raises(TrajectoryError, match="its hash is not that of its content"):
        load(changed(exported, **arrays))


def test_every_corrupted_byte_is_found_or_harmless(run: tuple[Path, torch.nn.Sequential], exported: Path) -> None:
    data, right = exported.read_bytes(), load(exported)
    noise = random.Random(0)
    found = 0
    for _ in range(400):
        wrong = bytearray(data)
        wrong[noise.randrange(len(wrong))] ^= 1 << noise.randrange(8)
        exported.write_bytes(wrong)
        try:
            assert load(exported).records == right.records
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
        ({"pieces": {"lr": [[0, 10**400]]}}, "corrupted: int too large"),
        ({"columns": [1 << 80, 0, 0, 0]}, "columns do not have the lengths"),
        ({"final": "00"}, "wrong length"),
        ({"header": {}}, "header is corrupted"),
        ({"header": None}, "header is corrupted"),
    ],
)
def test_content_that_cannot_be_is_refused(exported: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        load(resealed(exported, {**content_of(exported), **changes}))


@pytest.fixture
def detour(tmp_path: Path) -> Path:
    recorded_detour(tmp_path / "t", network())
    return export(tmp_path / "t", tmp_path / "tune.safetensors").path


def test_an_export_of_format_2_holds_the_recorded_steps(detour: Path) -> None:
    recorded, found = Trajectory.read(detour.parent / "t"), load(detour)
    assert found.records == [replace(row, losses=(), thresholds=b"") for row in recorded.records]
    again = export(found, detour.parent / "again.safetensors")
    assert load(again.path).records == found.records


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unread": [[8, "c"]]}, "a step is named that does not exist"),
        ({"unread": [[0, "1" + 100 * "0"]]}, "a tensor is named that is not optimized"),
        ({"unread": [[0, "-1"]]}, "a tensor is named that is not optimized"),
        ({"unread": [[0, 3]]}, "corrupted"),
        ({"unread": [[[], "c"]]}, "corrupted"),
        ({"unread": 5}, "corrupted"),
        ({"columns": [0, 0, 0, 0]}, "columns do not have the lengths"),
        ({"pieces": {"samples": [[0, 1.0], [5, 1e9]]}}, "gradients are float32"),
        ({"pieces": {"samples": [[0, 0.0], [5, 2.0]]}}, "a step has no samples"),
        ({"pieces": {"samples": [[0, float("nan")], [5, 2.0]]}}, "corrupted"),
        ({"pieces": {"samples": [[0, 1.0, 1.0]]}}, "run-length encoding"),
    ],
)
def test_content_of_format_2_that_cannot_be_is_refused(detour: Path, changes: dict[str, Any], message: str) -> None:
    content = content_of(detour)
    pieces = {**content["pieces"], **changes.get("pieces", {})}
    with pytest.raises(TrajectoryError, match=message):
        load(resealed(detour, {**content, **changes, "pieces": pieces}))


def by_rows(path: Path, steps: int, rows: Callable[[int], int], coefficients: str = "raw", **changes: Any) -> Path:
    """A recorded run of made-up losses with a direction of rank 1 per row."""
    noise, model = random.Random(0), network()
    settings: dict[str, Any] = {"directions": "per_row", "rank": 1, "coefficients": coefficients, **changes}
    optimizer = SparseMeZO(model.named_parameters(), kernel="torch", **settings)
    rates = {"lr": (1e-6,), "weight_decay": (0.0,), "eps": (1e-3,), "sparsity": (0.0,)}
    numbers: tuple[float, ...]
    with TrajectoryWriter.create(path, describe(optimizer, model)) as writer:
        for step in range(steps):
            samples, of = 1 + (step in (5, 6)), rows(step)
            losses = tuple((f32(noise.gauss(3, 0.1)), f32(noise.gauss(3, 0.1))) for _ in range(samples * of))
            numbers, mean = coefficients_of(losses, 1e-3, coefficients, 0.5, 9)
            skipped = step == 3
            numbers = () if skipped else rounded(numbers) if optimizer.directions == "per_row" else numbers
            how = {"rows": of, "shared": 5 * (step > 1), "unread": 2 * (step > 4), "mean_square": mean}
            writer.append(StepRecord(step, losses, numbers, **rates, skipped=skipped, **how))
    return path


@pytest.mark.parametrize("settings", [{}, {"coefficients": "ranks"}, {"coefficients": "moving", "rank": None}])
def test_rows_take_a_byte_each_and_come_back_to_the_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    recorded = Trajectory.read(by_rows(tmp_path / "t", 9, lambda step: 16 - step % 3, **settings))
    exported = export(recorded, tmp_path / "tune.safetensors").path
    with safe_open(exported, framework="numpy") as file:
        assert (file.metadata()["format"], file.get_tensor("projected_gradients").dtype) == ("3", np.int8)
    found = load(exported)
    assert found.records == [replace(row, losses=(), thresholds=b"") for row in recorded.records]
    assert found.header == recorded.header
    again = export(found, tmp_path / "again.safetensors", 7)
    assert load(again.path).records == found.records[:7]


def test_numbers_of_more_than_8_bits_are_kept_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded = Trajectory.read(by_rows(tmp_path / "t", 9, lambda step: 16))
    odd = recorded.records[8].projected_gradients
    rows = [*recorded.records[:8], replace(recorded.records[8], projected_gradients=(f32(odd[0] / 3), *odd[1:]))]
    with caplog.at_level("INFO", "smezo_pl"):
        exported = export(replace(recorded, records=rows), tmp_path / "tune.safetensors").path
    assert "numbers are not of 8 bits" in caplog.text
    with safe_open(exported, framework="numpy") as file:
        assert file.get_tensor("projected_gradients").dtype == np.float32
    assert load(exported).records == [replace(row, losses=()) for row in rows]


def test_one_direction_of_low_rank_is_kept_as_it_is(tmp_path: Path) -> None:
    recorded = Trajectory.read(by_rows(tmp_path / "t", 9, lambda step: 1, directions="shared"))
    found = load(export(recorded, tmp_path / "tune.safetensors").path)
    assert found.records == [replace(row, losses=()) for row in recorded.records]


@pytest.mark.parametrize(("coefficients", "most"), [("raw", 400_000), ("ranks", 330_000)])
def test_20000_steps_of_16_rows_take_20_bytes_each(tmp_path: Path, coefficients: str, most: int) -> None:
    recorded = Trajectory.read(by_rows(tmp_path / "t", 200, lambda step: 16, coefficients))
    rows = [replace(recorded.records[10 + step % 190], step=step) for step in range(20_000)]
    written = export(replace(recorded, records=rows), tmp_path / "t.safetensors")
    assert written.size < most
    assert [r.projected_gradients for r in load(written.path).records] == [r.projected_gradients for r in rows]


@pytest.fixture
def rows_of_9(tmp_path: Path) -> Path:
    return export(by_rows(tmp_path / "t", 9, lambda step: 4), tmp_path / "tune.safetensors").path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 8}, "corrupted"),
        ({"steps": -1}, "a step is named that does not exist"),
        ({"steps": 1 << 40}, "numbers are too few for 1099511627776 steps"),
        ({"steps": "9" * 5000}, "corrupted"),
        ({"shared": [[0, "1" + 100 * "0"]]}, "a tensor is named that is not optimized"),
        ({"shared": 5}, "corrupted"),
        ({"pieces": {"rows": [[0, 5.0]]}}, r"gradients are int8 \(40,\) for 50 directions"),
        ({"pieces": {"rows": [[0, 0.0]]}}, "a step has no samples"),
        ({"pieces": {"rows": [[0, -4.0], [1, 4.0]]}}, "a step has no samples"),
        ({"pieces": {"rows": [[0, float("inf")]]}}, "corrupted"),
        ({"pieces": {"unit": [[0, "x"]]}}, "run-length encoding"),
        ({"skipped": []}, "gradients are int8"),
    ],
)
def test_content_of_format_3_that_cannot_be_is_refused(rows_of_9: Path, changes: dict[str, Any], message: str) -> None:
    content = content_of(rows_of_9)
    pieces = {**content["pieces"], **changes.get("pieces", {})}
    with pytest.raises(TrajectoryError, match=message):
        load(resealed(rows_of_9, {**content, **changes, "pieces": pieces}))


def test_rows_of_a_run_with_one_direction_are_refused(rows_of_9: Path) -> None:
    content = content_of(rows_of_9)
    content["header"]["directions"] = "shared"
    with pytest.raises(TrajectoryError, match="a step has rows with a direction each"):
        load(resealed(rows_of_9, content))


def test_an_export_that_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smezo_pl.trajectory.exports.MAX_FILE_BYTES", 100)
    with pytest.raises(TrajectoryError, match=r"would have [\d,]+ bytes, more than the 100 that are read"):
        export(by_rows(tmp_path / "t", 1, lambda step: 4), tmp_path / "tune.safetensors")
    assert not (tmp_path / "tune.safetensors").exists()


def test_samples_must_fit(exported: Path) -> None:
    content = content_of(exported)
    content["header"]["num_samples"] = 3
    with pytest.raises(TrajectoryError, match="for 3 samples"):
        load(resealed(exported, content))


@pytest.mark.parametrize("name", ["exported", "detour", "rows_of_9"])
def test_mutated_content_is_read_or_refused_cleanly(name: str, request: pytest.FixtureRequest) -> None:
    exported, noise = request.getfixturevalue(name), random.Random(1)
    text = json.dumps(content_of(exported)).encode()
    refused = 0
    for _ in range(500):
        wrong = bytearray(text)
        for _ in range(noise.randint(1, 3)):
            place = noise.randrange(len(wrong))
            wrong[place : place + noise.randint(0, 3)] = noise.randbytes(noise.randint(0, 3))
        try:
            load(resealed(exported, bytes(wrong)))
        except TrajectoryError:
            refused += 1
    assert refused > 250


def test_a_file_that_is_too_large_is_not_opened(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smezo_pl.trajectory.exports.MAX_FILE_BYTES", 100)
    with pytest.raises(TrajectoryError, match="is no exported run: it has"):
        load(exported)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.999])
def test_a_cut_file_is_refused(exported: Path, share: float) -> None:
    data = exported.read_bytes()
    exported.write_bytes(data[: int(share * len(data))])
    with pytest.raises(TrajectoryError, match="no safetensors file, corrupted or cut short"):
        load(exported)


def test_a_folder_that_cannot_be_written_is_named(run: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajectoryError, match="cannot be written"):
        export(run[0], tmp_path / "file" / "tune.safetensors")


STEPS = 20_000


def linear() -> list[tuple[float, ...]]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-6)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    values = []
    for _ in range(STEPS):
        values.append((float(optimizer.param_groups[0]["lr"]),))
        optimizer.step()
        scheduler.step()
    return values


CASES: dict[str, tuple[list[tuple[float, ...]], int]] = {
    "constant": ([(1e-6,)] * STEPS, 100),
    "two groups": ([(1e-6, 3e-5)] * STEPS, 100),
    "a few runs": ([(1e-6 / (1 + i // 5000),) for i in range(STEPS)], 200),
    "cosine": ([(0.5e-6 * (1 + math.cos(math.pi * i / STEPS)),) for i in range(STEPS)], 8 * STEPS),
    "linear": (linear(), 5 * STEPS),
    "noise": ([(random.Random(i).random(),) for i in range(1000)], 9 * 1000),
    "nothing": ([], 10),
    "one": ([(0.0, math.pi)], 40),
    "odd values": ([(v,) for v in (math.inf, -0.0, 5e-324, 1.7e308, 0.1)], 200),
}


@pytest.mark.parametrize("name", CASES)
def test_values_come_back_to_the_bit_and_small(name: str) -> None:
    values, most = CASES[name]
    runs, column = pack_columns(values)
    back = unpack_columns(runs, column, len(values), len(values[0]) if values else 1)
    assert [[v.hex() for v in row] for row in back] == [[v.hex() for v in row] for row in values]
    assert len(str(runs)) + len(column) <= most


@pytest.mark.parametrize(
    "runs",
    [
        None,
        [[1, 0.5]],
        [[0, 0.5], [0, 0.5]],
        [[0, 0.5], [5, 0.5]],
        [[0, 0.5, 0.5]],
        [[0, "x"]],
        [[0, True]],
        [[0]],
        ["x"],
        [[0, 0.5], "x"],
        [[0, 0.5], []],
        [[0, 0.5], [3, 0.5], [2, 0.5]],
    ],
)
def test_a_run_length_encoding_that_does_not_fit_is_refused(runs: object) -> None:
    with pytest.raises(ValueError, match="run-length encoding"):
        unpack_columns(runs, b"", 4, 1)


@pytest.mark.parametrize("column", [b"", b"x", pack_columns(CASES["noise"][0])[1]])
def test_columns_that_do_not_fit_are_refused(column: bytes) -> None:
    with pytest.raises(ValueError, match=r"column|inflates|ends early|no deflated data"):
        unpack_columns([], column, 7, 1)
