"""``smezo sweep``: a grid of runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

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
    from smezo_pl.sweeping.grid import read_grid, read_yaml
    from smezo_pl.sweeping.plan import plan

    base = read_yaml(config)
    if not isinstance(base, dict):
        raise ValueError(f"{config} must hold a configuration as `smezo fit --config` takes it, got {base!r}")
    runs = plan(base, read_grid(grid), out, test)  # type: ignore[arg-type]
    from smezo_pl.sweeping.checks import check_runs
    from smezo_pl.sweeping.running import run_all
    from smezo_pl.sweeping.summary import write_tables

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
