"""``smezo apply``: an exported fine-tune on its base model, as a Hugging Face folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from smezo_pl.commands.making import add_arguments, make_folder
from smezo_pl.trajectory.tune import load


def main(args: Sequence[str]) -> None:
    """Apply a tune and write the model.

    Args:
        args: ``apply`` and the words after it.
    """
    parser = argparse.ArgumentParser(
        prog="smezo apply",
        description="An exported fine-tune on the model it was made from, as a Hugging Face folder with the tokenizer. "
        "Other starting weights are refused. Taking a tune back means loading the base model again.",
    )
    parser.add_argument("tune", help="what `smezo export` wrote")
    add_arguments(parser)
    given = parser.parse_args(args[1:])
    make_folder(load(given.tune), given)
