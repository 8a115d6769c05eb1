"""``smezo evaluate``: the validation curve of a run, made after it from its record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smezo_pl.trajectory.errors import TrajectoryError
from smezo_pl.trajectory.reader import Trajectory
from smezo_pl.trajectory.tune import load

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

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
    from smezo_pl.callbacks.replay_to import ReplayTo

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
