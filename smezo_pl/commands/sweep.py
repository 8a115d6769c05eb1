"""Run `smezo fit` at every point of a grid, each run in a process and a folder of its own, and sum up over seeds.

The grid is YAML: keys of the configuration with lists of values; every combination is a run. A list of such mappings
gives several grids. Keys with commas between them change together.

  model.method: [s-mezo, mezo]
  model.optimizer.lr: [1e-5, 1e-4]
  data.task, data.max_length: [[sst2, 128], [rte, 256]]
  model.optimizer.seed, data.data_seed: [0, 1, 2]

Give the same command again after an interruption of any kind: finished runs are skipped, interrupted ones resume from
their last checkpoint. Runs that differ only in keys named `seed`, `..._seed` or `seed_everything` are repetitions;
mean and standard deviation over them are in OUT/sweep.md, sweep.csv and sweep.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock
from time import perf_counter
from typing import Any, Literal, get_args

import yaml

from smezo_pl.cli import SmezoCLI, check_settings
from smezo_pl.commands.sweep_plan import CONFIG, Run, Tested, plan, read_grid, read_yaml
from smezo_pl.commands.tables import write_summary
from smezo_pl.parser import known_keys, readable, suggestion
from smezo_pl.trajectory.files import lock_file

LOG = "log.txt"

say = partial(print, flush=True)  # also where standard output is a file


class _ParserOnly(SmezoCLI):
    """The command line's parser; nothing is parsed, seeded or built."""

    def _skip(self, *args: Any, **kwargs: Any) -> None:
        pass

    parse_arguments = _set_seed = instantiate_classes = _skip


def check_runs(runs: Iterable[Run]) -> None:
    """Parse each run's configuration and build what needs no weights and no data; an error names run and key."""
    parser = _ParserOnly(parser_kwargs={"prog": "smezo", "exit_on_error": False}, run=False).parser
    for run in runs:
        try:
            check_settings(parser.instantiate_classes(parser.parse_object(run.config)).model)
        except (argparse.ArgumentError, TypeError, ValueError) as error:
            message = " ".join(readable(str(error)).split())
            raise ValueError(f"run {run.name!r}: {message}{suggestion(message, known_keys(parser))}") from error


def run_all(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Run what is not finished, at most ``jobs`` at once; returns the runs that failed.

    A run that fails is reported, and the others continue. A run that another sweep is working on is left to it. On
    Ctrl-C or a termination signal the runs are ended too; each has its last checkpoint.
    """
    work = _Work()
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = [
            pool.submit(work.run, run, f"[{number}/{len(runs)}] {run.name}") for number, run in enumerate(runs, 1)
        ]
        try:
            return [run for run, future in zip(runs, futures, strict=True) if not future.result()]
        except BaseException:
            work.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Work:
    """The running processes."""

    def __init__(self) -> None:
        self._stopped = Event()
        self._lock = Lock()
        self._processes: list[subprocess.Popen[bytes]] = []  # ended ones too

    def stop(self) -> None:
        """End all of them; no further one starts."""
        self._stopped.set()
        with self._lock:
            for process in self._processes:
                process.terminate()

    def run(self, run: Run, title: str) -> bool:
        """Train where that is not done, then test where that is asked for; whether both succeeded."""
        if run.state == "finished":
            say(f"{title}: finished before, skipped")
            return True
        run.folder.mkdir(parents=True, exist_ok=True)
        handle = lock_file(run.folder / "lock")
        if handle is None:
            say(f"{title}: another process is working on it, left to that")
            return True
        try:
            (run.folder / CONFIG).write_text(yaml.safe_dump(run.config, sort_keys=False), encoding="utf-8")
            began = perf_counter()
            if run.state in ("new", "interrupted"):
                say(f"{title}: {'begins' if run.checkpoint is None else 'resumes from its checkpoint'}")
                if not self._smezo(run, title, handle, "fit"):
                    return False
            if run.state == "fitted" and not self._smezo(run, title, handle, "test"):
                return False
            scores = ", ".join(f"{name} {value:.4f}" for name, value in run.scores().items())
            dead = f"; DEAD: {reason}" if (reason := run.result().get("dead")) else ""
            say(f"{title}: {scores or 'done'} ({perf_counter() - began:.0f} s){dead}")
            return True
        finally:
            os.close(handle)

    def _smezo(self, run: Run, title: str, handle: int, subcommand: Literal["fit", "test"]) -> bool:
        command = [sys.executable, "-m", "smezo_pl", subcommand, f"--config={run.folder / CONFIG}"]
        checkpoint, result = run.checkpoint, run.folder / "metrics.json"
        if subcommand == "test":
            checkpoint, result = run.tested_checkpoint, run.test_result
            command.append("--trainer.logger.init_args.version=test")
        if checkpoint is not None:
            command.append(f"--ckpt_path={checkpoint}")
        # The child inherits the lock: if this process is killed, a new sweep sees that the run is still running.
        kept = () if sys.platform == "win32" else (handle,)
        with open(run.folder / LOG, "ab") as log:
            with self._lock:
                if self._stopped.is_set():
                    return False
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=kept
                )
                self._processes.append(process)
            code = process.wait()
        if code == 0 and result.is_file():
            return True
        if not self._stopped.is_set():
            reason = _last_line(run.folder / LOG)
            say(f"{title}: FAILED in `smezo {subcommand}` (status {code}): {reason} (see {run.folder / LOG})")
        return False


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line and "SMEZO_TRACEBACK" not in line]
    return (errors or lines or ["no output"])[-1].strip()


def main(args: Sequence[str]) -> None:
    """Plan, check, run, sum up."""
    parser = argparse.ArgumentParser(
        prog="smezo sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the configuration that all runs share (YAML)")
    parser.add_argument("--grid", required=True, help="the grid (YAML)")
    parser.add_argument("--out", required=True, help="folder of the sweep, created if needed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument("--test", choices=get_args(Tested), help="score this checkpoint on the test set after training")
    parser.add_argument("--dry-run", action="store_true", help="only check and list the runs, with their progress")
    given = parser.parse_args(args[1:])
    if given.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {given.jobs}")
    sys.exit(sweep(Path(given.config), Path(given.grid), Path(given.out), given.jobs, given.test, given.dry_run))


def sweep(config: Path, grid: Path, out: Path, jobs: int = 1, test: Tested | None = None, dry_run: bool = False) -> int:
    """Run a grid; the arguments are those of the command line.

    Returns the exit status: 0, or 1 if a run failed, or 130 if the sweep was interrupted. A file, a key or a value that
    is wrong is a ``ValueError`` before anything has been run.
    """
    base = read_yaml(config)
    if not isinstance(base, dict):
        raise ValueError(f"{config} must hold a configuration as `smezo fit --config` takes it, got {base!r}")
    runs = plan(base, read_grid(grid), out, test)
    check_runs(run for run in runs if run.state != "finished")
    if dry_run:
        for run in runs:
            print(f"{run.name}: {run.state}")
        return 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed = run_all(runs, jobs)
    except KeyboardInterrupt:
        say("stopped: the same command resumes it")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{write_summary(runs, out)}\nalso in {out / 'sweep.md'}, sweep.csv and sweep.json")
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(run.name for run in failed)}")
    return 1 if failed else 0
