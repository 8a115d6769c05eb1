"""The Trainer's subcommands: configuration, default callbacks and log. ``build`` is the way in from Python."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

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
from smezo_pl.interrupts import Interrupts, command, resume_command
from smezo_pl.methods import build_zeroth_order, scheduler_of
from smezo_pl.module import SparseMeZOModule
from smezo_pl.parser import SuggestingParser
from smezo_pl.run_folder import RunLogger, find_checkpoint, held
from smezo_pl.strategies import check_strategy

log = logging.getLogger(__name__)

DEFAULT_CALLBACKS: dict[str, tuple[type[Callback], ...]] = {
    "fit": (ZerothOrderMonitor, RunMetrics, SeedCheckpoint),
    "validate": (ScoreWriter,),
    "test": (ScoreWriter,),
    "predict": (PredictionWriter,),
}
"""Callbacks that a subcommand, and `build` as ``fit``, adds where the configuration names none of that class."""

ZEROTH_ORDER_CALLBACKS = (MaskRefresh, SeedCheckpoint, ZerothOrderMonitor)
"""Callbacks that a run without SparseMeZO has no use for."""

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "enable_model_summary": False,  # the line that is logged with the model says more
    "log_every_n_steps": 10,
    "max_steps": 20_000,  # as in the papers
    "num_sanity_val_steps": 0,  # `RunMetrics` turns the check on, to evaluate the starting weights
}


class SaveConfig(SaveConfigCallback):
    """Saves a run's configuration when its settings are decided: a refused resume leaves the file as it was."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save that of a subcommand that does not train."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save that of a training run, whose optimizer has taken what stays from the checkpoint."""
        super().setup(trainer, pl_module, "fit")


class SmezoCLI(LightningCLI):
    """``smezo fit | validate | test | predict``.

    Keys of the model that are given, in a configuration or on the command line, take precedence over the checkpoint of
    ``--ckpt_path``; those that are not given are the checkpoint's. `smezo_pl.trajectory.settings` has what can change.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            SparseMeZOModule,
            PromptDataModule,
            subclass_mode_data=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=SuggestingParser,
            save_config_kwargs={"overwrite": True},
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            **{"parser_kwargs": {"prog": "smezo"}, **settings},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name."""
        help_text = "Name of the run, whose folder is runs/<name>/version_<n>. If null, the name of the task."
        parser.add_argument("--name", type=str | None, default=None, help=help_text)

    def setup_parser(self, add_subcommands: bool, *settings: dict[str, Any]) -> None:
        """Set up the parser; without subcommands it also accepts the configuration that a subcommand saved."""
        super().setup_parser(add_subcommands, *settings)
        if not add_subcommands:
            for key in ("ckpt_path", "weights_only", "verbose", "return_predictions"):
                self.parser.add_argument(f"--{key}", type=Any, default=None, help="Key of a subcommand; not used here.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, without Lightning's warning that ``sys.argv`` is not empty (in a notebook it never is)."""
        parse: Any = parser.parse_args if isinstance(args, list) else parser.parse_object
        self.config = parse(args)
        if self.config.get("fit.ckpt_path"):
            self._given = parse(args, defaults=False).fit.model

    def _parse_ckpt_path(self) -> None:
        pass

    def _take_settings(self, checkpoint: str) -> bool:
        """Give the model's keys that were not given the checkpoint's values; whether that changed any."""
        try:
            then = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True).get("hyper_parameters", {})
        except Exception:  # no file, or a corrupted one: refused by what loads it, with the reason
            return False
        model, taken = self.config.fit.model, {}
        if (schedule := then.get("schedule")) is not None:
            namespace: Any = Namespace  # jsonargparse does not type its arguments
            then["lr_scheduler"] = namespace({**schedule, "init_args": namespace(schedule.get("init_args", {}))})
        parts = [("", model, then)]
        if "sparse_mezo" in then and (settings := model.optimizer.get("init_args")) is not None:
            own = {**then["sparse_mezo"], "kernel": settings.get("kernel")}
            if own["mask"] == ("small" if own.get("rank") is None else "dense"):
                del own["mask"]  # what none given stands for
            parts.append(("optimizer", settings, own))
        if "adamw" in then:
            parts.append(("first_order", model.first_order, then["adamw"]))
        for name, now, values in parts:
            given = self._given.get(name, {}) if name else self._given
            given = given.get("init_args", given)
            for key in sorted({*values} & {*now.keys()} - {*given.keys()}):
                if now[key] != values[key]:
                    now[key] = taken[".".join(filter(None, ["model", name, key]))] = values[key]
        if taken:
            log.info(
                "not given, so as in %s: %s", checkpoint, ", ".join(f"{k} {_plain(v)!r}" for k, v in taken.items())
            )
        return bool(taken)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with a logger in ``runs/`` and the default callbacks that are not configured."""
        if (schedule := self._get(self.config, "model").lr_scheduler) is not None:
            self.model.save_hyperparameters({"schedule": schedule.as_dict()})  # for `_take_settings`
        given = self._get(self.config_init, "trainer")
        self._logger = given["logger"]
        if self._logger in (None, True):
            name = self._get(self.config_init, "name") or self._get(self.config_init, "data").task.name
            kwargs["logger"] = self._logger = RunLogger("runs", name=name, default_hp_metric=False)
        callbacks = given["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        default = DEFAULT_CALLBACKS[self.subcommand or "fit"]
        if not self.model.zeroth_order:
            if left_out := [type(c).__name__ for c in callbacks if isinstance(c, ZEROTH_ORDER_CALLBACKS)]:
                log.info("left out, as method %s does not use SparseMeZO: %s", self.model.method, ", ".join(left_out))
            callbacks = [c for c in callbacks if not isinstance(c, ZEROTH_ORDER_CALLBACKS)]
            default = tuple(WeightCheckpoint if kind is SeedCheckpoint else kind for kind in default)
            default = tuple(kind for kind in default if kind not in ZEROTH_ORDER_CALLBACKS)
        if given["enable_checkpointing"] is False:
            default = tuple(kind for kind in default if not issubclass(kind, Checkpoint))
        if any(isinstance(c, WeightCheckpoint) for c in callbacks):
            default = tuple(kind for kind in default if not issubclass(kind, WeightCheckpoint))
        callbacks += [kind() for kind in default if not any(isinstance(c, kind) for c in callbacks)]
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RunProgressBar())
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (ValueError, ImportError, MisconfigurationException) as error:  # of Lightning, about arguments
            raise ValueError(f"trainer: {error}") from error

    def instantiate_classes(self) -> None:
        """Build everything; a strategy that cannot be is refused first, as Lightning would with a traceback."""
        check_strategy(self._get(self.config, "trainer").strategy)
        super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it in a folder of its own, with the checkpoint that is meant; the last line says how to resume."""
        checkpoint, fit = self._checkpoint(subcommand), subcommand == "fit"
        if fit:
            check_settings(self.model)
        folder = None
        with Interrupts(graceful=fit and self.trainer.world_size == 1) as interrupts:
            try:
                with held(self.trainer, checkpoint, fit=fit) as folder:
                    super()._run_subcommand(subcommand)
            except BaseException as error:
                resume = resume_command(self.trainer, folder, checkpoint) if fit else None
                if interrupts.received is None or not isinstance(error, KeyboardInterrupt | SystemExit):
                    error.__dict__["resume_command"] = resume  # `smezo_pl.__main__` prints it after the error
                    raise
                if resume:
                    step = self.trainer.global_step  # 0 also where spawned processes train
                    print(f"stopped{f' at step {step}' if step else ''}; to resume:\n{resume}", file=sys.stderr)
                raise SystemExit(128 + interrupts.received) from None

    def _checkpoint(self, subcommand: str) -> str | None:
        """Replace ``--ckpt_path`` by the file that is meant, say which weights are used; ends with status 2 without."""
        given = self.config[subcommand].get("ckpt_path")
        if given is not None:
            try:
                file = find_checkpoint(str(given), self.trainer, self._logger)
            except ValueError as error:
                self.parser.exit(2, f"smezo: error: {error}\n")
            self.config[subcommand]["ckpt_path"] = self.config_init[subcommand]["ckpt_path"] = file
            log.info("checkpoint: %s", file)
            if subcommand == "fit" and self._take_settings(file):
                self.instantiate_classes()
            return file
        if subcommand != "fit":
            log.info("no --ckpt_path: the weights are as pretrained")
            for config in self.config[subcommand].get("config") or ():
                beside = Path(config.relative).parent / "checkpoints"
                trained = [path for name in ("best", "last") if (path := beside / f"{name}.ckpt").is_file()]
                if trained:
                    log.warning("for the trained ones: %s", command(subcommand, Path(config.relative), trained[0]))
        return None


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value


def check_settings(module: SparseMeZOModule) -> None:
    """Build optimizer and scheduler for one small weight: what is out of range is refused before a model is loaded."""
    if module.zeroth_order:
        try:
            scheduler_of(module, build_zeroth_order(module, [("weight", nn.Parameter(torch.zeros(2, 2)))]))
        except ValueError as error:
            # Patterns of parameters are for the model's own.
            if "matches no parameter" not in str(error) and "no parameter is optimized" not in str(error):
                raise


def build(config: str | Path | dict[str, Any] | None = None, *overrides: str, run: bool = False) -> SmezoCLI:
    """Build everything that a configuration names, without running it.

    Args:
        config: A YAML file, the same as a dict, or None.
        overrides: Further arguments of the command line, such as ``"--trainer.max_steps=10"``.
        run: Whether the arguments begin with a subcommand, which is run.

    Returns:
        An object with ``model``, ``datamodule`` and ``trainer``.

    Examples:
        >>> run = build("configs/quickstart.yaml", "--model.pretrained=facebook/opt-125m")  # doctest: +SKIP
        >>> run.trainer.fit(run.model, run.datamodule)  # doctest: +SKIP
    """
    if isinstance(config, dict) and overrides:
        raise ValueError("overrides go with a file; change the dict instead")
    file = [] if config is None else ["--config", str(config)]
    return SmezoCLI(args=config if isinstance(config, dict) else [*file, *overrides], run=run)


def main(args: Sequence[str]) -> None:
    """Run the subcommand that the arguments begin with, one of the Trainer's."""
    show_log()
    SmezoCLI(args=list(args))


def show_log() -> None:
    """Print what the package logs to standard error, one line per message, on the first process."""
    package = logging.getLogger("smezo_pl")
    if getattr(rank_zero_only, "rank", 0) == 0 and not package.handlers:
        package.addHandler(_Terminal())
        package.setLevel(logging.INFO)
        # Lightning advertises a logger of its own at every start.
        lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        lightning.addFilter(lambda record: "litlogger" not in record.getMessage())


class _Terminal(logging.Handler):
    """Prints to the current ``sys.stderr``, which a progress bar replaces with a writer of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        print(f"{record.name.removeprefix('smezo_pl.')}: {level}{record.getMessage()}", file=sys.stderr)
