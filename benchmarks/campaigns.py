"""Killed runs, corrupted files and fuzzed headers: as many as asked for, in forked processes.

The tests take a few of each, `benchmarks/faults.py` the full numbers. A forked process has everything imported, so a
run of a small network takes a second.
"""

import copy
import json
import os
import random
import shutil
import signal
import stat
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from safetensors import safe_open
from safetensors.numpy import load_file, save
from small_runs import Classifier, Examples, make_trainer, network
from torch.optim.lr_scheduler import CosineAnnealingLR

from smezo_pl.callbacks import MaskRefresh, SeedCheckpoint
from smezo_pl.optim import selection
from smezo_pl.trajectory import files as checkpoint_files
from smezo_pl.trajectory.exports import _seal, export, load
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import Trajectory, TrajectoryWriter
from smezo_pl.trajectory.replaying import replay

STEPS = 30

HUNG_SECONDS = 120.0
"""When a forked process is taken for hung."""

LAST, BEST, RECORD = "checkpoints/last.ckpt", "checkpoints/best.ckpt", "trajectory.smezo"

CONFIGURATIONS: dict[str, tuple[dict[str, Any], Callable[[], list[Callback]]]] = {
    "bf16, masks refreshed every 4 steps": (
        {"dtype": "bfloat16", "kernel": "numba"},
        lambda: [MaskRefresh(every_n_steps=4), SeedCheckpoint(every_n_steps=3)],
    ),
    "2 samples, cosine schedule, weight decay": (
        {"num_samples": 2, "weight_decay": 0.1, "scheduler": lambda opt: CosineAnnealingLR(opt, STEPS)},
        lambda: [SeedCheckpoint(every_n_steps=3)],
    ),
    "bf16, constant masks refreshed, anchors": (
        {"dtype": "bfloat16", "mask_update": "constant", "kernel": "numba"},
        lambda: [
            MaskRefresh(every_n_steps=6, sparsity={0: 0.5, 10: 0.9}),
            SeedCheckpoint(every_n_steps=3, anchor_every_n_steps=6),
        ],
    ),
    "a layer read now and then, anchors": (
        {"dtype": "bfloat16", "routed": True, "kernel": "numba"},
        lambda: [MaskRefresh(every_n_steps=7), SeedCheckpoint(every_n_steps=3, anchor_every_n_steps=6)],
    ),
    "bf16, rank 1 per row, moving coefficients, anchors": (
        {"directions": "per_row", "rank": 1, "coefficients": "moving", "dtype": "bfloat16", "kernel": "numba"},
        lambda: [SeedCheckpoint(every_n_steps=3, anchor_every_n_steps=6)],
    ),
    "sign flips per row by ranks, 2 samples, masks refreshed": (
        {"directions": "per_row", "coefficients": "ranks", "num_samples": 2, "kernel": "numba"},
        lambda: [MaskRefresh(every_n_steps=4), SeedCheckpoint(every_n_steps=3)],
    ),
    "random masks, refreshed by epoch": (
        {"mask": "random", "kernel": "numba"},
        lambda: [MaskRefresh(every_n_epochs=1), SeedCheckpoint(every_n_steps=3)],
    ),
}

POINTS = ("at any time", "in a commit", "in a checkpoint", "in a mask refresh")


class Journal(Callback):
    """Writes what a run logs and reads to a file, a line a step, at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, **facts: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        self.note(kind="train", step=trainer.global_step, loss=loss, seen=batch[0][:, 0].tolist())

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.note(kind="val", step=trainer.global_step, **values)


def train(folder: Path, name: str) -> None:
    """One run to its end, or resumed from its last checkpoint; leaves the hash of its weights in ``final``."""
    torch.set_num_threads(1)
    settings, callbacks = CONFIGURATIONS[name]
    module, last = Classifier(**settings), folder / LAST
    trainer = make_trainer(folder, Journal(folder / "journal"), *callbacks(), max_steps=STEPS, val_check_interval=5)
    trainer.fit(module, Examples(), ckpt_path=last if last.exists() else None)
    (folder / "final").write_text(digest_of(module.model))


def digest_of(model: torch.nn.Module) -> str:
    """Hash of every bit of the weights."""
    data = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters())
    return sha256(data).hexdigest()


def warm_up(folder: Path) -> None:
    """A run of each configuration in this process: those that are forked find all imported and compiled."""
    for i, name in enumerate(CONFIGURATIONS):
        (folder / f"warm{i}").mkdir(parents=True)
        train(folder / f"warm{i}", name)
        model = network(dtype=getattr(torch, CONFIGURATIONS[name][0].get("dtype", "float32")))
        replay(folder / f"warm{i}", model)


def forked(work: Callable[[], Any], kill_after: float | None = None) -> tuple[int, str]:
    """Do something in a process of its own.

    Args:
        work: What; its result is given to `json.dumps`.
        kill_after: When to kill it, None for never.

    Returns:
        The exit status (negative: the signal), and the result or the traceback.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                said, status = json.dumps(work()), 0
            except TrajectoryError as error:
                said, status = str(error), 3
            except BaseException:
                said = traceback.format_exc()
            with os.fdopen(write, "w", encoding="utf-8") as file:
                file.write(said[-4000:])
        finally:
            os._exit(status)
    os.close(write)
    ends = time.monotonic() + (HUNG_SECONDS if kill_after is None else kill_after)
    killer = threading.Timer(ends - time.monotonic(), os.kill, (pid, signal.SIGKILL))
    killer.start()
    with os.fdopen(read, encoding="utf-8") as file:
        said = file.read()
    _, status = os.waitpid(pid, 0)
    killer.cancel()
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL and kill_after is None and time.monotonic() >= ends:
        raise TimeoutError(f"a process took more than {HUNG_SECONDS} s")
    return code, said


# ---------------------------------------------------------------------- killed runs


def arm(point: str, noise: random.Random) -> None:
    """Let this process kill itself at a point of the run (not for ``at any time``)."""
    if point == "in a commit":
        _die_in_a_commit(noise.randrange(2, 60), noise.random() * 3e-4)
    elif point == "in a mask refresh":
        _count_down(selection, "find_threshold", noise.randrange(1, 30))
    elif point == "in a checkpoint":
        nth, how = noise.randrange(1, 12), noise.choice(("half written", "before the rename", "after the rename"))
        if how == "half written":
            _count_down(checkpoint_files.os, "fsync", nth, _halve)
        else:
            _count_down(checkpoint_files.os, "replace", nth, after=how == "after the rename")


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _halve(handle: int, *_: Any) -> None:
    if stat.S_ISREG(os.fstat(handle).st_mode):
        os.ftruncate(handle, os.fstat(handle).st_size // 2)


def _count_down(
    place: Any, name: str, calls: int, first: Callable[..., Any] | None = None, after: bool = False
) -> None:
    """Die in the n-th call of a function."""
    original, left = getattr(place, name), [calls]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if first is not None:
                first(*args)
            if after:
                original(*args, **kwargs)
            _die()
        return original(*args, **kwargs)

    setattr(place, name, counted)


def _die_in_a_commit(nth: int, delay: float) -> None:
    """Die some microseconds after SQLite was told to commit: it lets other threads run while it writes."""
    begun, left = threading.Event(), [nth]

    def wait() -> None:
        begun.wait()
        until = time.perf_counter() + delay
        while time.perf_counter() < until:
            pass
        _die()

    def trace(statement: str) -> None:
        if statement.startswith("COMMIT"):
            left[0] -= 1
            if left[0] == 0:
                begun.set()

    threading.Thread(target=wait, daemon=True).start()
    make = TrajectoryWriter.__init__

    def traced(self: TrajectoryWriter, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self._connection.set_trace_callback(trace)

    TrajectoryWriter.__init__ = traced  # type: ignore[method-assign]


def undisturbed(folder: Path, name: str) -> float:
    """A run that nothing disturbs; its seconds."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    code, said = forked(lambda: train(folder, name))
    if code:
        raise RuntimeError(said)
    return time.monotonic() - began


def killed(folder: Path, name: str, straight: Path, seconds: float, number: int) -> dict[str, Any]:
    """A run that is killed one to three times and resumed, compared with the undisturbed one.

    Returns:
        ``point``, ``kills`` (the steps that were recorded at each), and ``equal``: None, or what differs.
    """
    noise = random.Random(number)
    point = POINTS[number % len(POINTS)]
    if point == "in a mask refresh" and not any(isinstance(c, MaskRefresh) for c in CONFIGURATIONS[name][1]()):
        point = "at any time"
    folder.mkdir(parents=True)
    kills: list[int] = []
    wanted = noise.randint(1, 3)
    for _ in range(20):
        if len(kills) == wanted:
            break
        seed = noise.random()

        def disturbed(seed: float = seed) -> None:
            arm(point, random.Random(seed))
            train(folder, name)

        when = noise.uniform(0.0, 1.1 * seconds) if point == "at any time" else None
        code, said = forked(disturbed, kill_after=when)
        if code == -signal.SIGKILL:
            kills.append(Trajectory.read(folder).next_step if (folder / RECORD).exists() else 0)
        elif code:
            return {"point": point, "kills": kills, "equal": said}
        else:  # it came to its end before
            if kills:
                break
            shutil.rmtree(folder)
            folder.mkdir()
    code, said = forked(lambda: train(folder, name))
    return {"point": point, "kills": kills, "equal": said if code else difference(folder, straight)}


def difference(folder: Path, straight: Path) -> str | None:
    """What differs between two finished runs: weights, steps, order of examples, logged values; None if nothing."""
    if (folder / "final").read_text() != (straight / "final").read_text():
        return "the weights differ"
    if Trajectory.read(folder).records != Trajectory.read(straight).records:
        return "the trajectories differ"
    known = {_key(line): line for line in (straight / "journal").read_text().splitlines()}
    for line in (folder / "journal").read_text().splitlines():
        if line.endswith("}") and known.get(_key(line)) != line:
            return f"logged {line}, undisturbed {known.get(_key(line))}"
    return None


def _key(line: str) -> tuple[str, int]:
    facts = json.loads(line)
    return facts["kind"], facts["step"]


# ---------------------------------------------------------------------- corrupted files

CORRUPTIONS = (
    *("bits flipped", "cut short", "a page zeroed", "a page from elsewhere", "random bytes", "file of another run"),
    *("file gone", "the log removed", "the log corrupted", "a checkpoint of another run"),
)


def half_run(folder: Path, name: str, steps: int, seed: int = 7) -> None:
    """A run that was killed after some steps, its log still beside its trajectory."""
    folder.mkdir(parents=True)

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == steps:
                _die()

    def run() -> None:
        torch.set_num_threads(1)
        settings, callbacks = CONFIGURATIONS[name]
        trainer = make_trainer(folder, Stop(), *callbacks(), max_steps=STEPS, val_check_interval=5)
        trainer.fit(Classifier(**settings, noise_seed=seed), Examples())

    code, said = forked(run)
    if code != -signal.SIGKILL:
        raise RuntimeError(said)


def corrupt(folder: Path, other: Path, noise: random.Random) -> str:
    """Corrupt one file of a run; says what was done."""
    kind = noise.choice(CORRUPTIONS)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(("-lock", "-shm")))
    path = noise.choice(files)
    if kind in ("the log removed", "the log corrupted"):
        path = folder / f"{RECORD}-wal"
        if not path.exists():  # a finished run has none
            kind, path = "bits flipped", folder / RECORD
    if kind == "a checkpoint of another run":
        path = folder / LAST
    data = bytearray(path.read_bytes())
    if kind in ("the log removed", "file gone"):
        path.unlink()
    elif kind in ("file of another run", "a checkpoint of another run"):
        twin = other / path.relative_to(folder)
        if not twin.exists():
            return corrupt(folder, other, noise)
        shutil.copy(twin, path)
    else:
        place = noise.randrange(len(data))
        page = place // 1024 * 1024
        if kind == "cut short":
            del data[place:]
        elif kind == "a page zeroed":
            data[page : page + 1024] = bytes(len(data[page : page + 1024]))
        elif kind == "a page from elsewhere":
            source = noise.randrange(len(data)) // 1024 * 1024
            data[page : page + 1024] = data[source : source + len(data[page : page + 1024])]
        elif kind == "random bytes":
            data[place : place + 64] = noise.randbytes(len(data[place : place + 64]))
        else:
            for _ in range(noise.choice((1, 1, 1, 3, 20))):
                data[noise.randrange(len(data))] ^= 1 << noise.randrange(8)
        path.write_bytes(data)
    return f"{kind}: {path.relative_to(folder)}"


def outcomes_of(folder: Path, straight: Path, name: str, truth: dict[int, str]) -> dict[str, str]:
    """What reading, replaying, exporting and resuming make of a corrupted run.

    Args:
        folder: The corrupted run.
        straight: The undisturbed one.
        name: Its configuration.
        truth: Hash of the right weights after each number of steps.

    Returns:
        For each of them ``detected: ...`` (a clear error), ``harmless`` (right to the last bit), or what is wrong.
    """
    rows = Trajectory.read(straight).records
    dtype = getattr(torch, CONFIGURATIONS[name][0].get("dtype", "float32"))

    def read() -> str:
        found = Trajectory.read(folder, damaged=True)
        if list(found.records) != list(rows[: len(found.records)]):
            raise AssertionError("steps were read that were never written")
        if found.damage is None:
            return "harmless"
        if not found.damage.strip():
            raise AssertionError("corruption without a reason")
        return f"detected: {found.damage}; valid up to {found.next_step}"

    def made(source: Path) -> str:
        model = network(dtype=dtype)
        trajectory = load(source)
        replay(trajectory, model, verify=False)
        if digest_of(model) != truth[trajectory.next_step]:
            raise AssertionError("the weights are wrong")
        return "harmless"

    def exported() -> str:
        export(folder, folder / "tune.safetensors")
        return made(folder / "tune.safetensors")

    def resumed() -> str:
        train(folder, name)
        if (folder / "final").read_text() != truth[STEPS]:
            raise AssertionError("the weights are wrong")
        return "harmless"

    found = {}
    for what, work in (("read", read), ("replay", lambda: made(folder)), ("export", exported), ("resume", resumed)):
        code, said = forked(work)
        found[what] = json.loads(said) if code == 0 else f"detected: {said}" if code == 3 else f"WRONG: {said}"
    return found


def truth_of(straight: Path, name: str) -> dict[int, str]:
    """Hash of the weights after each number of steps, made step by step by the reference kernel."""
    dtype = getattr(torch, CONFIGURATIONS[name][0].get("dtype", "float32"))
    found, trajectory = {}, Trajectory.read(straight)
    for steps in range(trajectory.next_step + 1):
        model = network(dtype=dtype)
        replay(trajectory, model, steps, kernel="torch")
        found[steps] = digest_of(model)
    return found


# ---------------------------------------------------------------------- fuzzed headers

_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, -1e308, "", "x" * 5000, "\x00", "../../etc/passwd"),
    *([], {}, [0], [[]], [-1], [1 << 40] * 5, {"a": {}}, [None] * 1000, "NaN", "1e999"),
)


def mutated_header(plain: dict[str, Any], noise: random.Random) -> dict[str, Any]:
    """A header with one to three values, somewhere in it, replaced by odd ones, left out or duplicated."""
    changed: dict[str, Any] = json.loads(json.dumps(plain))
    for _ in range(noise.randint(1, 3)):
        place: Any = changed
        for _ in range(noise.randint(0, 5)):
            values = place.values() if isinstance(place, dict) else place
            inner = [value for value in values if isinstance(value, dict | list) and value]
            if not inner:
                break
            place = noise.choice(inner)
        key = noise.choice(list(place)) if isinstance(place, dict) else noise.randrange(len(place))
        action = noise.random()
        if action < 0.15:
            del place[key]
            if not changed:
                return changed
        elif action < 0.25 and isinstance(place, list):
            place.append(place[key])
        elif action < 0.3 and isinstance(place, dict):
            place[noise.choice(("format", "tensors", "surprise", ""))] = copy.deepcopy(noise.choice(_ODD))
        else:
            place[key] = copy.deepcopy(noise.choice(_ODD))
    return changed


def cheat(path: Path, header: dict[str, Any] | None, noise: random.Random) -> None:
    """Write an exported file with another header, or with bytes of its own header changed, sealed as if by a writer."""
    arrays = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
    if header is not None:
        content = json.loads(zlib.decompress(arrays["header"].tobytes()))
        content["header"] = header
        if noise.random() < 0.5:
            content = mutated_header(content, noise)
        arrays["header"] = np.frombuffer(zlib.compress(json.dumps(content).encode()), np.uint8)
    names = ("header", "columns", "projected_gradients")
    columns = [arrays[name].tobytes() for name in names[:2]]
    metadata["sha256"] = _seal(columns[0], columns[1], arrays["projected_gradients"])
    data = bytearray(save(arrays, metadata=metadata))
    if header is None:
        for _ in range(noise.randint(1, 6)):
            data[noise.randrange(min(len(data), 1500))] = noise.randrange(256)
    path.write_bytes(data)
