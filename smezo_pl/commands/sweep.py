"""Every configuration of a sweep looked at before the first run starts."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from torch import nn

from smezo_pl.cli import TRAINER_DEFAULTS, SmezoCLI, SuggestingParser, known_keys, suggestion
from smezo_pl.commands.sweep_plan import CONFIG, Run, dumped
from smezo_pl.data import PromptDataModule
from smezo_pl.module import SparseMeZOModule
from smezo_pl.trajectory.files import lock_file


class _ParserOnly(SmezoCLI):
    """The command line's parser, without anything built or seeded."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse nothing yet."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Nothing to do."""

    def instantiate_classes(self) -> None:
        """Nothing to do."""


def check_runs(runs: Iterable[Run]) -> None:
    """Parse each run's configuration and build what needs no weights and no data.

    Raises:
        ValueError: Names the run, the key and what is allowed.
    """
    cli = _ParserOnly(
        SparseMeZOModule,
        PromptDataModule,
        subclass_mode_data=False,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=SuggestingParser,
        parser_kwargs={"prog": "smezo", "exit_on_error": False},
        save_config_callback=None,
        trainer_defaults=TRAINER_DEFAULTS,
        run=False,
    )
    for run in runs:
        try:
            built = cli.parser.instantiate_classes(cli.parser.parse_object(run.config))
            _check_optimizer(built.model)
        except (ArgumentError, TypeError, ValueError) as error:
            message = " ".join(str(error).split())
            hint = suggestion(message, known_keys(cli.parser))
            raise ValueError(f"run {run.name!r}: {message}{hint}") from error


def _check_optimizer(module: Any) -> None:
    """The optimizer's numbers, which are otherwise looked at when the model is there."""
    if not module.zeroth_order:
        return
    try:
        module.build_optimizer([("weight", nn.Parameter(torch.zeros(2, 2)))])
    except ValueError as error:
        if "matches no parameter" not in str(error) and "no parameter takes part" not in str(error):
            raise


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
    handle = lock_file(path)
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


DESCRIPTION = """\
Runs `smezo fit` for every point of a grid, each in a process and a folder of its own, and sums up over seeds.

The grid is YAML: keys of the configuration with lists of values, every combination is a run. A list of such mappings
gives several grids. Keys with commas between them change together.

  model.method: [s-mezo, mezo]
  model.optimizer.lr: [1e-5, 1e-4]
  data.task, data.max_length: [[sst2, 128], [rte, 256]]
  model.optimizer.seed, data.data_seed: [0, 1, 2]

Give the same command again after an interruption of any kind: finished runs are skipped, interrupted ones go on from
their last checkpoint. Runs that differ in keys named `seed`, `..._seed` or `seed_everything` alone are repetitions;
mean and standard deviation over them are in OUT/sweep.md, sweep.csv and sweep.json."""


def main(args: Sequence[str]) -> None:
    """Plan, check, run, sum up.

    Args:
        args: ``sweep`` and the words after it.
    """
    parser = argparse.ArgumentParser(
        prog="smezo sweep", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the configuration that all runs share (YAML)")
    parser.add_argument("--grid", required=True, help="the grid (YAML)")
    parser.add_argument("--out", required=True, help="the sweep's folder, made if it is not there")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument(
        "--test", choices=("best", "last"), default=None, help="score this checkpoint on the test set after training"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs, and how far they are")
    given = parser.parse_args(args[1:])
    if given.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {given.jobs}")
    sys.exit(sweep(Path(given.config), Path(given.grid), Path(given.out), given.jobs, given.test, given.dry_run))


def sweep(config: Path, grid: Path, out: Path, jobs: int = 1, test: str | None = None, dry_run: bool = False) -> int:
    """Run a grid.

    Args:
        config: The configuration that all runs share.
        grid: The grid.
        out: The sweep's folder.
        jobs: Runs at once.
        test: ``best`` or ``last``, the checkpoint that is scored on the test set; None for no test.
        dry_run: Whether to check and list alone.

    Returns:
        The exit status: 0, or 1 if a run failed, or 130 if the sweep was interrupted.

    Raises:
        ValueError: If a file, a key or a value is wrong; nothing has been run then.
    """
    from smezo_pl.commands.sweep_plan import plan, read_grid, read_yaml

    base = read_yaml(config)
    if not isinstance(base, dict):
        raise ValueError(f"{config} must hold a configuration as `smezo fit --config` takes it, got {base!r}")
    runs = plan(base, read_grid(grid), out, test)  # type: ignore[arg-type]
    from smezo_pl.commands.tables import write_tables

    # Finished runs were parsed before they began.
    check_runs(run for run in runs if run.state != "finished")
    if dry_run:
        for run in runs:
            print(f"{run.name}: {run.state}")
        return 0
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        failed = run_all(runs, jobs, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("stopped: the same command goes on", flush=True)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{write_tables(runs, out)}\nalso in {out / 'sweep.md'}, sweep.csv and sweep.json")
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(run.name for run in failed)}")
    return 1 if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
