import os
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from smezo_pl.optim import SparseMeZO, StepRecord
from smezo_pl.trajectory import database, log
from smezo_pl.trajectory.header import Header, TrajectoryError
from smezo_pl.trajectory.log import Trajectory, TrajectoryWriter
from smezo_pl.trajectory.recorder import describe
from tests.trajectory.runs import network


@pytest.fixture
def header() -> Header:
    model = network()
    return describe(SparseMeZO(model.named_parameters(), kernel="torch"), model)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "a run, ünïcödé ?#%"
    folder.mkdir()
    return folder / "trajectory.smezo"


def record(step: int, thresholds: bytes = b"") -> StepRecord:
    rates = {"lr": (1e-3,), "weight_decay": (0.0,), "eps": (1e-3,), "sparsity": (0.8,)}
    losses = ((1.0 + step, 1.0),)
    return StepRecord(step, losses, (step / 8,), **rates, refreshed=bool(thresholds), thresholds=thresholds)


def written(path: Path, header: Header, steps: int = 10) -> Path:
    with TrajectoryWriter.create(path, header) as writer:
        for step in range(steps):
            writer.append(record(step, b"thresholds" if step % 4 == 0 else b""))
        writer.add_event("checkpoint", file="last.ckpt", sha256="00")
    return path


def test_what_is_written_is_read(path: Path, header: Header) -> None:
    trajectory = Trajectory.read(written(path, header))
    assert trajectory.header == header
    assert list(trajectory.records) == [record(step, b"thresholds" if step % 4 == 0 else b"") for step in range(10)]
    assert [(event.steps, event.kind, event.facts["file"]) for event in trajectory.events] == [
        (10, "checkpoint", "last.ckpt")
    ]
    assert trajectory.damage is None
    assert trajectory.next_step == 10


def test_a_closed_trajectory_is_one_file(path: Path, header: Header) -> None:
    written(path, header)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_stands_for_its_trajectory(path: Path, header: Header) -> None:
    written(path, header)
    assert Trajectory.read(path.parent).path == path


def test_it_is_small(path: Path, header: Header) -> None:
    with TrajectoryWriter.create(path, header) as writer:
        for step in range(3000):
            writer.append(record(step))
    assert path.stat().st_size / 3000 < 36


def test_steps_come_in_order(path: Path, header: Header) -> None:
    with TrajectoryWriter.create(path, header) as writer:
        writer.append(record(0))
        for step in (0, 2):
            with pytest.raises(TrajectoryError, match="the next one is 1"):
                writer.append(record(step))
    assert Trajectory.read(path).next_step == 1


def test_a_trajectory_is_never_overwritten(path: Path, header: Header) -> None:
    written(path, header)
    with pytest.raises(TrajectoryError, match="is there already"):
        TrajectoryWriter.create(path, header)
    assert Trajectory.read(path).next_step == 10


@pytest.mark.parametrize("steps", [None, 10, 7, 0])
def test_a_trajectory_is_resumed(path: Path, header: Header, steps: int | None) -> None:
    straight = Trajectory.read(written(path.with_name("straight"), header, 12))
    with TrajectoryWriter.resume(written(path, header), steps) as writer:
        assert writer.steps == (10 if steps is None else steps)
        for step in range(writer.steps, 12):
            writer.append(record(step, b"thresholds" if step % 4 == 0 else b""))
    trajectory = Trajectory.read(path)
    assert trajectory.check == straight.check
    assert len(trajectory.events) == (1 if steps in (None, 10) else 0)


def test_it_cannot_be_resumed_after_its_end(path: Path, header: Header) -> None:
    written(path, header)
    with pytest.raises(TrajectoryError, match="after 0 to 10 steps, not after 11"):
        TrajectoryWriter.resume(path, 11)
    assert Trajectory.read(path).next_step == 10


def test_a_second_writer_is_refused(path: Path, header: Header) -> None:
    with TrajectoryWriter.create(path, header) as writer:
        writer.append(record(0))
        with pytest.raises(TrajectoryError, match=f"written by another run .process {os.getpid()}."):
            TrajectoryWriter.resume(path)
        code = "import sys; from smezo_pl.trajectory.log import TrajectoryWriter; TrajectoryWriter.resume(sys.argv[1])"
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        assert "is being written by another run" in other.stderr
        writer.append(record(1))
    assert Trajectory.read(path).next_step == 2
    with TrajectoryWriter.resume(path) as writer:
        assert writer.steps == 2


def test_a_reader_sees_a_consistent_run_while_it_is_written(path: Path, header: Header) -> None:
    seen: list[int] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                seen.append(Trajectory.read(path).next_step)
        except BaseException as error:
            failures.append(error)

    with TrajectoryWriter.create(path, header) as writer:
        reader = threading.Thread(target=read)
        reader.start()
        for step in range(600):
            writer.append(record(step, b"x" if step % 50 == 0 else b""))
        done.set()
        reader.join()
    assert not failures
    assert seen == sorted(seen)
    assert Trajectory.read(path).next_step == 600


def test_what_was_appended_is_there_before_the_writer_ends(path: Path, header: Header) -> None:
    writer = TrajectoryWriter.create(path, header)
    for step in range(5):
        writer.append(record(step))
        assert Trajectory.read(path).next_step == step + 1
    writer.close()
    writer.close()


def test_the_disk_is_waited_for_in_groups(path: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "SYNC_STEPS", 10)
    waited: list[int] = []
    with TrajectoryWriter.create(path, header) as writer:
        monkeypatch.setattr(writer, "sync", lambda: waited.append(writer.steps))
        for step in range(9):
            writer.append(record(step))
        assert not waited
        writer.append(record(9))
        assert waited == [10]


def test_a_clock_that_goes_back_does_not_matter(path: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: -1e9)
    assert Trajectory.read(written(path, header)).next_step == 10


def test_a_full_disk_ends_with_a_clear_error_and_a_valid_trajectory(path: Path, header: Header) -> None:
    writer = TrajectoryWriter.create(path, header)
    pages = writer._connection.execute("PRAGMA page_count").fetchone()[0]
    writer._connection.execute(f"PRAGMA max_page_count = {pages + 3}")

    def fill() -> None:
        for step in range(1000):
            writer.append(record(step))

    with pytest.raises(TrajectoryError, match=r"the disk is full.*is intact: make space and resume"):
        fill()
    reached = writer.steps
    assert reached > 20
    writer.close()
    assert Trajectory.read(path).next_step == reached
    with TrajectoryWriter.resume(path) as writer:
        writer.append(record(reached))


def test_a_folder_that_cannot_be_written_is_named(path: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrajectoryError, match="nowhere cannot be written"):
        TrajectoryWriter.create(path.parent / "nowhere" / "trajectory.smezo", header)


def test_a_file_system_that_cannot_lock_is_named(path: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("smezo_pl.trajectory.files._lock", refuse)
    with pytest.raises(TrajectoryError, match=r"this file system cannot lock .No locks available.*local disk"):
        TrajectoryWriter.create(path, header)
    assert not path.exists()


def test_a_file_system_without_a_log_is_named(path: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLog(sqlite3.Connection):
        def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
            return super().execute("SELECT 'delete'" if sql == "PRAGMA journal_mode = WAL" else sql, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=NoLog))
    with pytest.raises(TrajectoryError, match=r"cannot hold SQLite's write-ahead log.*local disk"):
        TrajectoryWriter.create(path, header)


@pytest.mark.skipif(os.name == "nt", reason="permissions")
@pytest.mark.parametrize("with_log", [False, True])
def test_a_trajectory_is_read_where_nothing_can_be_written(
    path: Path, header: Header, with_log: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TrajectoryWriter.resume(written(path, header))
    if not with_log:
        writer.close()
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as a user who can write everywhere
    before = sorted(file.name for file in path.parent.iterdir())
    assert Trajectory.read(path).next_step == 10
    assert sorted(file.name for file in path.parent.iterdir()) == before
    writer.close()


def test_other_files_are_told_apart(path: Path, header: Header) -> None:
    with pytest.raises(TrajectoryError, match="no such file or folder"):
        Trajectory.read(path)
    with pytest.raises(TrajectoryError, match=r"holds no trajectory\.smezo"):
        Trajectory.read(path.parent)
    path.write_bytes(b"something else entirely")
    with pytest.raises(TrajectoryError, match="corrupted or no trajectory"):
        Trajectory.read(path)
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE steps (step, data)").connection.commit()
    with pytest.raises(TrajectoryError, match="no trajectory of smezo_pl"):
        Trajectory.read(path)


def test_a_later_format_is_refused(path: Path, header: Header) -> None:
    connection = sqlite3.connect(written(path, header))
    connection.execute("PRAGMA user_version = 4")
    connection.close()
    with pytest.raises(TrajectoryError, match="format 4; this version of smezo_pl reads formats up to 3"):
        Trajectory.read(path)


def test_a_step_that_leaves_unknown_tensors_alone_is_corrupted(path: Path, header: Header) -> None:
    with TrajectoryWriter.create(path, header) as writer:
        writer.append(record(0))
        writer.append(replace(record(1), unread=1 << 1000))
    with pytest.raises(TrajectoryError, match="step 1 is corrupted: it names a tensor that is not optimized"):
        Trajectory.read(path)


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE more (x)",
        "CREATE TRIGGER t AFTER INSERT ON steps BEGIN DELETE FROM steps; END",
        "DROP TABLE marks",
        "CREATE VIEW v AS SELECT 1",
    ],
)
def test_a_file_with_other_tables_is_refused(path: Path, header: Header, change: str) -> None:
    connection = sqlite3.connect(written(path, header))
    connection.execute(change)
    connection.commit()
    connection.close()
    with pytest.raises(TrajectoryError, match="its tables are not those of a trajectory"):
        Trajectory.read(path)


@pytest.mark.parametrize(
    ("change", "message", "valid"),
    [
        ("DELETE FROM steps WHERE step = 6", "step 6 is missing", 6),
        ("UPDATE steps SET step = 60 WHERE step = 6", "step 6 is missing", 6),
        ("UPDATE steps SET data = (SELECT data FROM steps WHERE step = 3) WHERE step = 6", "step 6 is corrupted", 6),
        ("UPDATE steps SET data = 'text' WHERE step = 6", "step 6 is corrupted: not bytes", 6),
        ("UPDATE steps SET data = zeroblob(9) WHERE step = 6", "step 6 is corrupted", 6),
        ("UPDATE steps SET data = x'' WHERE step = 6", "step 6 is corrupted", 6),
        ("DELETE FROM refreshes WHERE step = 4", "step 4 is corrupted", 4),
        ("UPDATE refreshes SET data = x'00' WHERE step = 4", "step 4 is corrupted", 4),
        ("INSERT INTO refreshes VALUES (6, x'00')", "step 6 is corrupted", 6),
        ("INSERT INTO refreshes VALUES (99, x'00')", "a mask refresh belongs to step 99", 10),
        ("UPDATE marks SET steps = 9", "an event is corrupted", 10),
        ("UPDATE marks SET data = zeroblob(30)", "an event is corrupted", 10),
        ("UPDATE marks SET steps = 11", "an event is after 11 steps, and only 10", 10),
        ("UPDATE marks SET steps = 'x'", "is corrupted", 10),
    ],
)
def test_corruption_is_found_and_what_is_valid_is_kept(
    path: Path, header: Header, change: str, message: str, valid: int
) -> None:
    connection = sqlite3.connect(written(path, header))
    connection.execute(change)
    connection.commit()
    connection.close()
    with pytest.raises(TrajectoryError, match=message) as caught:
        Trajectory.read(path)
    assert f"valid up to {valid} steps" in str(caught.value)
    saved = Trajectory.read(path, damaged=True)
    assert saved.next_step == valid and saved.damage is not None and message in saved.damage
    assert saved.upto(valid).damage is None
    with pytest.raises(TrajectoryError, match=message):
        saved.upto(11)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE header SET data = zeroblob(100)",
        "UPDATE header SET digest = zeroblob(32)",
        "DELETE FROM header",
        "INSERT INTO header SELECT 1, data, digest FROM header",
        "UPDATE header SET data = 'text'",
    ],
)
def test_without_its_header_nothing_is_read(path: Path, header: Header, change: str) -> None:
    connection = sqlite3.connect(written(path, header))
    connection.execute(change)
    connection.commit()
    connection.close()
    with pytest.raises(TrajectoryError, match=r"header is.*nothing can be replayed from it"):
        Trajectory.read(path, damaged=True)


def test_steps_of_another_run_are_found(path: Path, header: Header) -> None:
    """Same steps, another header: the steps of one file are put into the other."""
    from dataclasses import replace

    written(path, header)
    other = written(path.with_name("other"), replace(header, seed=header.seed + 1))
    connection = sqlite3.connect(path)
    connection.execute("ATTACH ? AS other", (str(other),))
    connection.execute("DELETE FROM steps")
    connection.execute("INSERT INTO steps SELECT * FROM other.steps")
    connection.commit()
    connection.close()
    with pytest.raises(TrajectoryError, match=r"step 0 is corrupted.*No step can be saved"):
        Trajectory.read(path)


def test_a_copy_holds_what_the_log_holds(path: Path, header: Header) -> None:
    with TrajectoryWriter.resume(written(path, header)) as writer:
        writer.append(record(10))
        database.copy(path, path.with_name("copy"))
    copy = Trajectory.read(path.with_name("copy"))
    assert copy.next_step == 11
    assert not path.with_name("copy-wal").exists()


def test_the_log_of_a_replaced_trajectory_is_not_taken_for_the_new_ones(path: Path, header: Header) -> None:
    """A run that was killed before its first step leaves a log; it must not come into the next trajectory."""
    writer = TrajectoryWriter.create(path, header)
    writer.add_event("checkpoint", file="last.ckpt", sha256="of the first run")
    left = {name: path.with_name(path.name + name).read_bytes() for name in ("", "-wal")}
    writer.close()
    for name, data in left.items():
        path.with_name(path.name + name).write_bytes(data)
    assert len(Trajectory.read(path).events) == 1
    from dataclasses import replace

    with TrajectoryWriter.create(path, replace(header, seed=header.seed + 1)) as writer:
        writer.append(record(0))
    trajectory = Trajectory.read(path)
    assert trajectory.header.seed == header.seed + 1
    assert trajectory.next_step == 1 and not trajectory.events


def test_the_log_of_another_run_is_refused(path: Path, header: Header) -> None:
    from dataclasses import replace

    other = path.with_name("other")
    writers = [
        TrajectoryWriter.create(path, header),
        TrajectoryWriter.create(other, replace(header, seed=header.seed + 1)),
    ]
    for writer in writers:
        for step in range(4):
            writer.append(record(step))
    logs = [file.with_name(file.name + "-wal").read_bytes() for file in (path, other)]
    data = path.read_bytes()
    for writer in writers:
        writer.close()
    path.write_bytes(data)
    path.with_name(path.name + "-wal").write_bytes(logs[0])
    assert Trajectory.read(path).next_step == 4
    path.write_bytes(data)
    path.with_name(path.name + "-wal").write_bytes(logs[1])
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    with pytest.raises(TrajectoryError, match="belongs to another run"):
        Trajectory.read(path)


def test_a_corrupted_schema_that_is_no_text_is_an_error_like_any_other(path: Path, header: Header) -> None:
    """SQLite quotes it in its message, which Python then cannot decode."""
    data = written(path, header).read_bytes()
    corrupted = data.replace(b"stepssteps", b"st\xf4psst\xf4ps").replace(b"CREATE TABLE steps", b"CREATE TABLX steps")
    assert corrupted.count(b"\xf4ps") >= 2
    path.write_bytes(corrupted)
    with pytest.raises(TrajectoryError, match="the file is corrupted"):
        Trajectory.read(path, damaged=True)


def test_what_the_log_holds_of_it_is_still_read(path: Path, header: Header) -> None:
    writer = TrajectoryWriter.create(path, header)
    for step in range(200):  # the file grows, so that the log holds the page of the schema
        writer.append(record(step))
    data, beside = path.read_bytes(), path.with_name(path.name + "-wal").read_bytes()
    writer.close()
    corrupted = data.replace(b"stepssteps", b"st\xf4psst\xf4ps").replace(b"CREATE TABLE steps", b"CREATE TABLX steps")
    path.write_bytes(corrupted)
    path.with_name(path.name + "-wal").write_bytes(beside)
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    assert corrupted != data
    assert Trajectory.read(path).next_step == 200
