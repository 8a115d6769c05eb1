"""Every configuration of a sweep looked at before the first run starts."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from torch import nn

from smezo_pl.cli import TRAINER_DEFAULTS, SmezoCLI
from smezo_pl.data import PromptDataModule
from smezo_pl.module import SparseMeZOModule
from smezo_pl.parsing import SuggestingParser, known_keys, suggestion
from smezo_pl.sweeping.plan import Run


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
