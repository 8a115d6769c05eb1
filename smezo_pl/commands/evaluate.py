"""Replay a run and score its weights every so many steps, although no checkpoint was kept.

Data and model are those of the run's config.yaml; arguments such as --data.task or --data.num_dev change them, and
--config names another file. A step is a number of updates done: 0 is the model before training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from smezo_pl.cli import build, show_log
from smezo_pl.commands.tables import markdown
from smezo_pl.commands.weights import base_model_found
from smezo_pl.tasks.metrics import lower_is_better
from smezo_pl.trajectory.exports import load
from smezo_pl.trajectory.files import write_json
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.replaying import check_start, rebuild, replay_records, tensors_of
from smezo_pl.trajectory.resume import network_of


def main(args: Sequence[str]) -> None:
    """Score some steps of a run."""
    parser = argparse.ArgumentParser(
        prog="smezo evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="further arguments are those of `smezo validate`, for instance --data.num_dev 100",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="folder of a run, its trajectory.smezo, or an exported run")
    parser.add_argument("--every", type=int, required=True, help="steps between two scores, at least 1")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="the split to score on")
    parser.add_argument("--model", default=None, help="base model: hub name, folder or GGUF file (default: the run's)")
    parser.add_argument("--config", default=None, help="the configuration (default: the run's config.yaml)")
    parser.add_argument("--out", default=None, help="JSON file for the scores (default: RUN/evaluation.json)")
    given, overrides = parser.parse_known_args(args[1:])
    trajectory = load(given.run)
    steps = steps_to_score(trajectory, given.every)
    config = Path(given.config) if given.config else trajectory.path.parent / "config.yaml"
    if not config.is_file():
        raise TrajectoryError(f"{config}: there is no such file; pass --config FILE with the run's model and data")
    show_log()
    if given.model is not None:
        overrides.append(f"--model.pretrained={given.model}")
    run = build(config, *overrides, "--trainer.logger=false")
    trainer: Any = run.trainer
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, SaveConfigCallback)]  # it is no run
    with base_model_found(trajectory):
        run.model.tokenizer  # noqa: B018 (loads it)
    scores = evaluate(trajectory, run.trainer, run.model, run.datamodule, steps, given.split)
    out = Path(given.out) if given.out else trajectory.path.parent / "evaluation.json"
    write_json(out, {"run": trajectory.header.run, "split": given.split, "scores": scores})
    print(markdown(marked(scores)))
    print(f"scores   {out}")


def steps_to_score(trajectory: Trajectory, every: int) -> list[int]:
    """Every so many steps of a trajectory, and its beginning and end."""
    if not every >= 1:
        raise ValueError(f"--every must be at least 1, got {every}")
    first, last = trajectory.header.first_step, trajectory.next_step
    return sorted({first, last, *range(-(-first // every) * every, last + 1, every)})


class ReplayTo(Callback):
    """Gives the module's network the weights of step `target` before they are scored; the target may only go up.

    At the first validation the network must hold the starting weights.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.target = trajectory.header.first_step
        self._state: dict[str, Any] | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replay up to `target`."""
        header, source = self.trajectory.header, str(self.trajectory.path)
        with torch.inference_mode(False), torch.no_grad():
            tensors = tensors_of(header, network_of(pl_module, header), source)
            # Rebuilt each time: the Trainer moves the network from the device and back between validations.
            optimizer = rebuild(header, tensors)
            if self._state is None:
                check_start(header, tensors, source)
            else:
                optimizer.load_state_dict(self._state)
            done = optimizer.steps_done
            if self.target < done:
                raise ValueError(f"target must not go down, got {self.target} after {done}")
            rows = self.trajectory.records[done - header.first_step : self.target - header.first_step]
            replay_records(optimizer, rows, source)
            self._state = optimizer.state_dict()

    on_test_start = on_validation_start


def evaluate(
    trajectory: Trajectory, trainer: Trainer, module: LightningModule, data: Any, steps: Sequence[int], split: str
) -> list[dict[str, float]]:
    """Replay a trajectory on a module that holds the starting weights, stopping at each of the ascending ``steps``.

    Returns the number of each step, as ``step``, with its metrics.
    """
    replayed = ReplayTo(trajectory)
    trainer.callbacks.append(replayed)  # type: ignore[attr-defined]
    run = trainer.validate if split == "validation" else trainer.test
    scores = []
    for step in steps:
        replayed.target = step
        results = run(module, data, verbose=False)  # of each dataloader
        scores.append({"step": step, **{name: value for result in results for name, value in result.items()}})
    return scores


def marked(scores: Sequence[dict[str, float]]) -> list[dict[str, str]]:
    """Scores as text, the best of each metric that is finite with an asterisk."""
    best = {
        n: (min if lower_is_better(n) else max)((row[n] for row in scores if isfinite(row[n])), default=None)
        for n in scores[0]
    }
    return [
        {n: f"{v:,}" if n == "step" else f"{v:.4f}" + "*" * (v == best[n]) for n, v in row.items()} for row in scores
    ]
