"""A parser that answers a misspelt key with the nearest known one."""

import inspect
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
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
from smezo_pl.callbacks.common import RunProgressBar
from smezo_pl.data import PromptDataModule
from smezo_pl.module import SparseMeZOModule
from smezo_pl.optim import SparseMeZO

# How jsonargparse names a key that it does not know: on the command line, in a group of a file, in a class's arguments.
_UNKNOWN = (
    re.compile(r"[Uu]nrecognized arguments: --([\w.+-]+)"),
    re.compile(r"does not accept (?:option|nested key|key) '([\w.+-]+)'"),
    re.compile(r"[Oo]ption '([\w.+-]+)' is not accepted"),
    re.compile(r"[Kk]ey [\"']?([\w.+-]+)[\"']? is not expected"),
)


# What jsonargparse says around an error in the arguments of a class: the type's full name, and the value a second time.
_AROUND = re.compile(r"Type \S*Callable\[.*?\] expects a function or a callable class: |\.* Got value: Namespace\(.*\)")


class SuggestingParser(LightningArgumentParser):
    """Lightning's parser, with short errors: what is wrong, what may have been meant, where help is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        message = _AROUND.sub("", message)
        # The usage line, which would come first, names all of the Trainer's hundred options.
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        hint = suggestion(message, known_keys(self))
        sys.stderr.write(f"smezo: error: {message}{hint}\n`{program} --help` lists all keys\n")
        self.exit(2)


def known_keys(parser: ArgumentParser) -> list[str]:
    """Every key that a configuration may hold, in dots, those of the optimizer included."""
    keys: set[str] = set()
    parsers = [parser]
    for current in parsers:
        for action in current._actions:
            if action.dest not in ("help", "subcommand"):
                keys.add(action.dest)
            # Sub-commands hold parsers of their own.
            if isinstance(choices := action.choices, dict):
                parsers.extend(p for p in choices.values() if isinstance(p, ArgumentParser) and p not in parsers)
    keys |= {f"model.optimizer.{name}" for name in inspect.signature(SparseMeZO).parameters if name != "params"}
    return sorted(keys)


def suggestion(message: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` for an error about an unknown key, else nothing."""
    for pattern in _UNKNOWN:
        if found := pattern.search(message):
            key = found.group(1).replace(".init_args.", ".")
            by_last = {name.rpartition(".")[2]: name for name in known}
            options = {name: name for name in known} if "." in key else by_last
            near = get_close_matches(key, options, n=1, cutoff=0.6)
            return f"; did you mean {options[near[0]]!r}?" if near else ""
    return ""


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
"""The papers train for 20,000 steps. `RunMetrics` asks for the sanity check itself, to measure the starting weights.
The summary tells less than the line that is logged when the model is there."""


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

    Examples:
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
