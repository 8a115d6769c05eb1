"""The runs of a sweep as processes of their own, so that none can harm another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from time import perf_counter

from smezo_pl.sweeping.plan import CONFIG, Run, dumped

LOG = "log.txt"


def run_all(runs: Sequence[Run], jobs: int, say: Callable[[str], None]) -> list[Run]:
    """Run what is not finished, at most ``jobs`` at once.

    A run that fails is reported and the others go on. A run that another sweep is at work on is left to it. On Ctrl-C
    or a termination signal the runs are ended too; each has its last checkpoint.

    Args:
        runs: The runs.
        jobs: Processes at once.
        say: Given one line for each run that begins, ends or is skipped.

    Returns:
        The runs that failed.
    """
    counter = {run.name: f"[{number}/{len(runs)}] {run.name}" for number, run in enumerate(runs, 1)}
    work = _Work(say)
    failed: list[Run] = []
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = {run.name: pool.submit(work.run, run, counter[run.name]) for run in runs}
        try:
            for run in runs:
                if not futures[run.name].result():
                    failed.append(run)
        except BaseException:
            work.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failed


class _Work:
    """The processes at work."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._stopped = Event()
        self._lock = Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def stop(self) -> None:
        """End all of them; no further one starts."""
        self._stopped.set()
        with self._lock:
            for process in self._processes:
                process.terminate()

    def run(self, run: Run, title: str) -> bool:
        """One run: training where it is not done, then the test where it is asked for."""
        if run.state == "finished":
            self._say(f"{title}: finished before, skipped")
            return True
        run.folder.mkdir(parents=True, exist_ok=True)
        with _held(run.folder / "lock") as handle:
            if handle is None:
                self._say(f"{title}: another process is at work on it, left to that")
                return True
            (run.folder / CONFIG).write_text(dumped(run.config), encoding="utf-8")
            began = perf_counter()
            if run.state in ("new", "interrupted"):
                checkpoint = run.checkpoint
                self._say(f"{title}: {'begins' if checkpoint is None else 'goes on from its checkpoint'}")
                resume = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
                if not self._smezo(run, title, handle, "fit", *resume):
                    return False
            if run.state == "fitted":
                checkpoint = run.tested_checkpoint
                words = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
                words.append("--trainer.logger.init_args.version=test")
                if not self._smezo(run, title, handle, "test", *words):
                    return False
            self._say(f"{title}: {_outcome(run)} ({perf_counter() - began:.0f} s)")
            return True

    def _smezo(self, run: Run, title: str, handle: int, verb: str, *words: str) -> bool:
        command = [sys.executable, "-m", "smezo_pl", verb, f"--config={run.folder / CONFIG}", *words]
        # The lock stays with the child: were this process killed, a new sweep would see that the run goes on.
        kept = () if sys.platform == "win32" else (handle,)
        with open(run.folder / LOG, "ab") as log:
            with self._lock:
                if self._stopped.is_set():
                    return False
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=kept
                )
                self._processes.add(process)
            code = process.wait()
        with self._lock:
            self._processes.discard(process)
        done = run.test_result if verb == "test" else run.folder / "metrics.json"
        if code == 0 and done.is_file():
            return True
        if not self._stopped.is_set():
            tail = _last_line(run.folder / LOG)
            self._say(f"{title}: FAILED in `smezo {verb}` (status {code}): {tail} (see {run.folder / LOG})")
        return False


def _outcome(run: Run) -> str:
    result = run.result() or {}
    after = result.get("after") or {}
    words = [f"{name} {value:.4f}" for name, value in after.items() if isinstance(value, float)]
    test = result.get("test", {}).get("metrics", {})
    words += [f"test {name} {value:.4f}" for name, value in test.items()]
    return ", ".join(words) or "done"


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line and "SMEZO_TRACEBACK" not in line]
    return (errors or lines or ["no output"])[-1].strip()


@contextmanager
def _held(path: Path) -> Iterator[int | None]:
    """A file's lock, or None if another process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield handle if _locked(handle) else None
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
