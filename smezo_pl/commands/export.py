"""``smezo export``: a whole fine-tune in one file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from smezo_pl.trajectory.tune import export, load


def main(args: Sequence[str]) -> None:
    """Write a run to one safetensors file.

    Args:
        args: ``export`` and the words after it.
    """
    parser = argparse.ArgumentParser(
        prog="smezo export",
        description="The whole fine-tune in one safetensors file: 4 bytes a step and a header, no pickle. From it and "
        "the base model `smezo apply` makes the trained one.",
    )
    parser.add_argument("run", help="a run's folder or its trajectory.smezo")
    parser.add_argument("--out", required=True, help="file to write, for instance tune.safetensors")
    parser.add_argument("--step", type=int, default=None, help="how many steps of the run; all if left out")
    given = parser.parse_args(args[1:])
    trajectory = load(given.run, given.step)
    written = export(trajectory, given.out)
    each = written.size / max(1, len(trajectory.rows))
    print(f"{written.path}: {written.steps:,} steps, {written.size:,} bytes ({each:.1f} a step)")
    if written.verified:
        print("it holds a hash of the final weights, so `smezo apply` can tell whether it gets the same")
    else:
        print("the run noted no hash of the weights of this step: `smezo apply` cannot tell whether it gets the same")
