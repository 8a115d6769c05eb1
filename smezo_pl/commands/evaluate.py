"""Replays a record before each validation, as far as it is told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from smezo_pl.trajectory.exports import load
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.replaying import check_start, rebuild, replay_rows, tensors_of
from smezo_pl.trajectory.resume import network_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class ReplayTo(Callback):
    """Gives the module's network the weights of a step before they are scored; steps may only go up.

    Args:
        trajectory: The record; the network must hold its starting weights at the first validation.
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
            if self._state is None:
                check_start(header, tensors, source)
            # built anew each time: the Trainer moves the network from the device and back between validations
            optimizer = rebuild(header, tensors)
            if self._state is not None:
                optimizer.load_state_dict(self._state)
            done = optimizer.steps_done
            if self.target < done:
                raise ValueError(f"target must not go down, got {self.target} after {done}")
            rows = self.trajectory.rows[done - header.first_step : self.target - header.first_step]
            replay_rows(optimizer, rows, source)
            self._state = optimizer.state_dict()

    on_test_start = on_validation_start


DESCRIPTION = """\
Replays a run and scores its weights every so many steps, though no checkpoint was ever kept.

Data and model are those of the run's config.yaml; words such as --data.task or --data.num_dev change them, or
--config names another file. Steps are numbers of steps done: 0 is the model before training."""


def main(args: Sequence[str]) -> None:
    """Score some steps of a run.

    Args:
        args: ``evaluate`` and the words after it.
    """
    parser = argparse.ArgumentParser(
        prog="smezo evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="further words are those of `smezo validate`, for instance --data.num_dev 100",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="a run's folder, its trajectory.smezo, or an exported file")
    parser.add_argument("--every", type=int, required=True, help="steps between two scores, at least 1")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="what is scored")
    parser.add_argument("--config", default=None, help="the configuration; the run's config.yaml if left out")
    parser.add_argument("--out", default=None, help="file for the scores (JSON); RUN/evaluation.json if left out")
    given, words = parser.parse_known_args(args[1:])
    trajectory = load(given.run)
    steps = steps_to_score(trajectory, given.every)
    config = Path(given.config) if given.config else trajectory.path.parent / "config.yaml"
    if not config.is_file():
        raise TrajectoryError(f"{config}: there is no such file; say --config FILE with the run's model and data")
    from smezo_pl.cli import build, show_log

    show_log()
    run = build(config, *words, "--trainer.logger=false")
    scores = evaluate(trajectory, run.trainer, run.model, run.datamodule, steps, given.split)
    out = Path(given.out) if given.out else trajectory.path.parent / "evaluation.json"
    out.write_text(json.dumps({"run": trajectory.header.run, "split": given.split, "scores": scores}, indent=1) + "\n")
    print(table(scores))
    print(f"scores   {out}")


def steps_to_score(trajectory: Trajectory, every: int) -> list[int]:
    """Every so many steps of a record, and its beginning and end.

    Raises:
        ValueError: If ``every`` is below 1.
    """
    if not every >= 1:
        raise ValueError(f"--every must be at least 1, got {every}")
    first, last = trajectory.header.first_step, trajectory.next_step
    return sorted({first, last, *range(-(-first // every) * every, last + 1, every)})


def evaluate(
    trajectory: Trajectory, trainer: Trainer, module: LightningModule, data: Any, steps: Sequence[int], split: str
) -> list[dict[str, float]]:
    """Replay a record, stopping to score its weights.

    Args:
        trajectory: The record.
        trainer: Runs the validations.
        module: Holds the network with the starting weights, or loads it.
        data: Data module, or loaders.
        steps: Numbers of steps after which to score, ascending.
        split: ``validation`` or ``test``.

    Returns:
        For each of the steps its number, as ``step``, and the metrics.

    Raises:
        TrajectoryError: If the network is another one or starts from other weights.
    """
    replayed = ReplayTo(trajectory)
    trainer.callbacks.append(replayed)  # type: ignore[attr-defined]
    run = trainer.validate if split == "validation" else trainer.test
    scores = []
    for step in steps:
        replayed.target = step
        [metrics] = run(module, data, verbose=False)
        scores.append({"step": step, **metrics})
    return scores


def table(scores: Sequence[dict[str, float]]) -> str:
    """Scores as lines, with the best of each metric marked."""
    names = [name for name in scores[0] if name != "step"]
    best = {n: (min if n.endswith("loss") else max)(row[n] for row in scores) for n in names}
    lines = ["  ".join(["    step", *(f"{name:>14}" for name in names)])]
    for row in scores:
        cells = [f"{row[name]:.4f}{'*' if row[name] == best[name] else ' '}" for name in names]
        lines.append("  ".join([f"{row['step']:8,}", *(f"{cell:>14}" for cell in cells)]))
    return "\n".join(lines)
