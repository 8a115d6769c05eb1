"""Checks of the data module's arguments, each with what is allowed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smezo_pl.tasks import FreeText, Task, get_task, make_task
from smezo_pl.tasks.metrics import get_metric
from smezo_pl.tasks.objectives import check_objective


def task_of(task: str | Mapping[str, Any] | Task, file: str | None, max_new_tokens: int | None) -> Task:
    """The task of that name or of these keys, called after the file where it has no name.

    Raises:
        ValueError: For an unknown name, wrong keys, a metric that does not fit, or answers that are not written.
    """
    if isinstance(task, str):
        task = get_task(task)
    elif not isinstance(task, Task):
        task = make_task(task, name=Path(file).stem if file else "own")
    if max_new_tokens is not None:
        if not isinstance(task.candidates, FreeText):
            raise ValueError(
                f"max_new_tokens is for answers that the model writes, and task {task.name!r} has candidates"
            )
        task = replace(task, candidates=replace(task.candidates, max_new_tokens=max_new_tokens))
    for name in task.metrics:
        get_metric(name, task)
    return task


def check_objective_or_reward(task: Task, objective: str | None, reward: str | None) -> str:
    """What a step goes by: the objective, the reward's import path, or the task's own loss.

    Raises:
        ValueError: If both are given, or what is given does not exist or does not fit the task.
    """
    if objective is not None and reward is not None:
        raise ValueError(f"objective {objective!r} and reward {reward!r}: give one of them")
    if reward is not None and "." not in reward:
        raise ValueError(f"reward must be the import path of a function, module.function, got {reward!r}")
    chosen = objective or reward or task.objective
    check_objective(chosen, task)
    return chosen


def check_together(
    task: Task,
    *,
    sizes_given: bool,
    k_shot: int | None,
    num_demonstrations: int,
    calibration: str,
    bad_rows: str,
    eval_batch_size: int | str,
) -> None:
    """Refuse arguments that are unknown or do not go with each other or the task, with a ``ValueError``."""
    if calibration not in ("none", "sfc", "icl_sfc"):
        raise ValueError(f"calibration must be 'none', 'sfc' or 'icl_sfc', got {calibration!r}")
    if calibration == "icl_sfc" and not num_demonstrations:
        raise ValueError("calibration 'icl_sfc' is for demonstrations: give num_demonstrations, or take 'sfc'")
    if calibration != "none" and task.calibration is None:
        raise ValueError(f"task {task.name!r} has no prompt without content, so it cannot be calibrated")
    if bad_rows not in ("refuse", "skip"):
        raise ValueError(f"bad_rows must be 'refuse' or 'skip', got {bad_rows!r}")
    if k_shot is not None:
        at_least("k_shot", k_shot, 1)
        if not task.labels:
            raise ValueError(f"k_shot {k_shot} needs classes, and task {task.name!r} has none")
        if sizes_given:
            raise ValueError("k_shot takes the place of num_train and num_dev: give only one of them")
    if not isinstance(eval_batch_size, str):
        at_least("eval_batch_size", eval_batch_size, 1)
    elif eval_batch_size != "auto":
        raise ValueError(f"eval_batch_size must be 'auto' or a number of at least 1, got {eval_batch_size!r}")


def at_least(name: str, value: int, least: int) -> int:
    """The value, or a ``ValueError`` that names the argument."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def seed_in_range(name: str, value: int) -> int:
    """The seed, or a ``ValueError`` that names the argument."""
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must be in [0, 2^32), got {value}")
    return value
