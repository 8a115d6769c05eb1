"""The Trainer's verbs as a LightningCLI over one module and one data module."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from smezo_pl.callbacks import (
    MaskRefresh,
    PredictionWriter,
    RunMetrics,
    ScoreWriter,
    SeedCheckpoint,
    WeightCheckpoint,
    ZerothOrderMonitor,
)
from smezo_pl.data import PromptDataModule
from smezo_pl.module import SparseMeZOModule
from smezo_pl.parsing import SuggestingParser
from smezo_pl.progress import RunProgressBar

logger = logging.getLogger(__name__)

DEFAULT_CALLBACKS: dict[str | None, tuple[type[Callback], ...]] = {
    "fit": (ZerothOrderMonitor, RunMetrics, SeedCheckpoint),
    "validate": (ScoreWriter,),
    "test": (ScoreWriter,),
    "predict": (PredictionWriter,),
    None: (ZerothOrderMonitor, RunMetrics, SeedCheckpoint),
}
"""Callbacks that a verb adds where the configuration names none of that class; None is `build`."""

ZEROTH_ORDER_CALLBACKS = (MaskRefresh, SeedCheckpoint, ZerothOrderMonitor)
"""Callbacks that a run by backpropagation has no use for, and does without."""

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "enable_model_summary": False,
    "log_every_n_steps": 10,
    "max_steps": 20_000,
    "num_sanity_val_steps": 0,
}
"""The papers train for 20,000 steps. The sanity check would come twice, as the run is measured before it starts; the
summary tells less than the line that is logged when the model is there."""


class SmezoCLI(LightningCLI):
    """``smezo fit | validate | test | predict``.

    What the configuration and the command line say counts, also with ``--ckpt_path``: the hyperparameters that a
    checkpoint holds do not override them. Logs go to ``runs/<name>/version_<n>`` unless ``trainer.logger`` is given.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="The run's folder is runs/<name>/version_<n>; the task's name if null.",
        )

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Make the parser; without verbs it also takes the configuration that a verb saved."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        if not add_subcommands:
            for key in ("ckpt_path", "weights_only", "verbose", "return_predictions"):
                self.parser.add_argument(f"--{key}", type=Any, default=None, help="Of a verb; not used here.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, without Lightning's warning that ``sys.argv`` is not empty (in a notebook it never is)."""
        self.config = parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args)

    def _parse_ckpt_path(self) -> None:
        pass

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with a logger in ``runs/`` and the default callbacks that are not configured."""
        given = self._get(self.config_init, "trainer")
        if given["logger"] in (None, True):
            name = self._get(self.config_init, "name") or self._get(self.config_init, "data").task.name
            kwargs.setdefault("logger", TensorBoardLogger("runs", name=name, default_hp_metric=False))
        callbacks = given["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        default = DEFAULT_CALLBACKS.get(self.subcommand, ())
        if not getattr(self.model, "zeroth_order", True):
            left_out = [callback for callback in callbacks if isinstance(callback, ZEROTH_ORDER_CALLBACKS)]
            callbacks = [callback for callback in callbacks if callback not in left_out]
            if left_out:
                names = ", ".join(type(callback).__name__ for callback in left_out)
                logger.info("left out, as method %s is not zeroth-order: %s", self.model.method, names)
            default = tuple(WeightCheckpoint if kind is SeedCheckpoint else kind for kind in default)
            default = tuple(kind for kind in default if kind not in ZEROTH_ORDER_CALLBACKS)
        for kind in default:
            wanted = given["enable_checkpointing"] is not False or kind not in (SeedCheckpoint, WeightCheckpoint)
            if wanted and not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.append(kind())
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RunProgressBar())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)


def build(config: str | Path | dict[str, Any] | None = None, *overrides: str, run: bool = False) -> SmezoCLI:
    """Build everything that a configuration names, without running it.

    Args:
        config: A YAML file, the same as a dict, or None.
        overrides: Further words of the command line, such as ``"--trainer.max_steps=10"``.
        run: Whether the words begin with a verb, which is run.

    Returns:
        An object with ``model``, ``datamodule`` and ``trainer``.

    Example:
        >>> run = build("configs/quickstart.yaml", "--model.pretrained=facebook/opt-125m")  # doctest: +SKIP
        >>> run.trainer.fit(run.model, run.datamodule)  # doctest: +SKIP
    """
    if isinstance(config, dict) and overrides:
        raise ValueError("overrides go with a file; change the dict instead")
    file = [] if config is None or isinstance(config, dict) else ["--config", str(config)]
    return SmezoCLI(
        SparseMeZOModule,
        PromptDataModule,
        subclass_mode_data=False,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=SuggestingParser,
        parser_kwargs={"prog": "smezo"},
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults=TRAINER_DEFAULTS,
        args=config if isinstance(config, dict) else [*file, *overrides],
        run=run,
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run one of the Trainer's verbs.

    Args:
        args: The words after ``smezo``, the verb first; None: those of the command line.
    """
    show_log()
    build(None, *(sys.argv[1:] if args is None else args), run=True)


def show_log() -> None:
    """Print what the package logs, one line a message, on the first process."""
    log = logging.getLogger("smezo_pl")
    if getattr(rank_zero_only, "rank", 0) == 0 and not any(isinstance(handler, _Terminal) for handler in log.handlers):
        log.addHandler(_Terminal())
        log.setLevel(logging.INFO)
    # Lightning advertises a logger of its own at every start.
    advertiser = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _no_advertising not in advertiser.filters:
        advertiser.addFilter(_no_advertising)


def _no_advertising(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


class _Terminal(logging.Handler):
    """Prints to the ``sys.stderr`` of the moment, which a progress bar puts its own writer in front of."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        print(f"{record.name.removeprefix('smezo_pl.')}: {level}{record.getMessage()}", file=sys.stderr)
