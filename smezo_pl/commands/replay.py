"""``smezo replay``: the weights of any step of a run, as a Hugging Face folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from smezo_pl.commands.making import add_arguments, make_folder
from smezo_pl.trajectory.tune import load


def main(args: Sequence[str]) -> None:
    """Make the weights of a step and write them.

    Args:
        args: ``replay`` and the words after it.
    """
    parser = argparse.ArgumentParser(
        prog="smezo replay",
        description="The weights of any step of a run, made from its record and the starting weights, as a Hugging "
        "Face folder with the tokenizer. It needs no data and runs no model.",
    )
    parser.add_argument("run", help="a run's folder or its trajectory.smezo")
    parser.add_argument("--step", type=int, default=None, help="how many steps of the run; all if left out")
    add_arguments(parser)
    given = parser.parse_args(args[1:])
    make_folder(load(given.run, given.step), given)
