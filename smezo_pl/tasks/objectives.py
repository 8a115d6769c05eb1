"""What training minimizes or maximizes: a loss, a metric of the answers, or a user's reward function."""

import importlib
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from smezo_pl.tasks.metrics import METRICS, Answer, Kind, Metric, get_metric
from smezo_pl.tasks.task import LOSSES, Task, unknown

logger = logging.getLogger(__name__)


def check_objective(objective: str, task: Task) -> None:
    """Refuse an objective that does not exist, does not fit the task or cannot be imported, by a ValueError.

    It is ``classification``, ``lm``, the name of a metric, or ``module.function`` of a reward.
    """
    if objective in LOSSES:
        if objective == "classification" and task.is_generation:
            raise ValueError(f"objective 'classification' needs candidates, and {task.name!r} is a generation task")
    elif "." in objective:
        load_reward(objective)
    elif objective in METRICS:
        get_metric(objective, task, "objective")
    else:
        functions = ", and any function by its import path, module.function"
        raise unknown("unknown objective", objective, (*LOSSES, *METRICS), functions)


@lru_cache(maxsize=16)
def load_reward(path: str) -> Callable[[list[str], list[list[str]]], Any]:
    """The function of that import path; modules in the current folder are found too.

    Raises:
        ValueError: If there is no such module or function, or it cannot be called.
    """
    module_name, _, name = path.partition("(")[0].strip().rpartition(".")
    # The console script does not look there by itself.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"reward {path!r}: cannot import {module_name!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"reward {path!r}: module {module_name!r} has no function {name!r}; it has {known or 'none'}")
    loaded: Callable[[list[str], list[list[str]]], Any] = function
    return loaded


def reward_loss(objective: str, answers: Sequence[Answer], num_labels: int = 0) -> float:
    """The number that training minimizes: minus the reward of a batch's answers, or one minus their metric.

    The function of a reward gets the answers as texts and, for each, the list of references; it returns a number, or
    one per answer, whose mean counts; more is better. NaN, which skips the step, if it raises or returns something not
    finite, or if an answer is missing. ``num_labels`` is 0 where labels are not shared.
    """
    if not all(answer.scored for answer in answers):
        return math.nan
    if "." not in objective:
        return _metric_loss(METRICS[objective], answers, num_labels)
    rewards = _rewards(objective, answers)
    return -sum(rewards) / len(rewards)


def reward_losses(objective: str, answers: Sequence[Answer], num_labels: int = 0) -> list[float]:
    """That number of each answer by itself, for a direction per row.

    Raises:
        ValueError: If the metric is no mean over answers, or the function returns one number for several.
    """
    if not all(answer.scored for answer in answers):
        return [math.nan] * len(answers)
    if "." not in objective:
        metric = METRICS[objective]
        kind: Kind = "labels" if num_labels else "text" if answers[0].choice < 0 else "listed"
        if kind not in metric.mean_on:
            means = ", ".join(name for name, other in METRICS.items() if kind in other.mean_on)
            raise ValueError(
                f"objective {objective!r} is no mean over the answers, and directions='per_row' needs a number for "
                f"each: choose {means}, a reward function, or directions='shared'"
            )
        return [_metric_loss(metric, [answer], num_labels) for answer in answers]
    rewards = _rewards(objective, answers)
    if len(rewards) < len(answers) and not math.isnan(rewards[0]):
        raise ValueError(
            f"reward {objective}: it returned one number for {len(answers)} answers, and directions='per_row' needs "
            "one for each: return a list, or choose directions='shared'"
        )
    return [-reward for reward in rewards] if len(rewards) == len(answers) else [math.nan] * len(answers)


def _metric_loss(metric: Metric, answers: Sequence[Answer], num_labels: int) -> float:
    value = metric.measure(answers, num_labels)
    return value if metric.lower_is_better else 1 - value


def _rewards(objective: str, answers: Sequence[Answer]) -> list[float]:
    """What the function of a reward returns, one number or one per answer; one NaN if it fails."""
    function = load_reward(objective)
    try:
        value = function([answer.text for answer in answers], [list(a.references) for a in answers])
        value = value.tolist() if hasattr(value, "tolist") else value
        rewards = [float(each) for each in value] if isinstance(value, Sequence) else [float(value)]
        if isinstance(value, Sequence) and len(value) != len(answers):
            raise ValueError(f"it returned {len(value)} numbers for {len(answers)} answers")
    except Exception as error:
        _warn_once(objective, f"raised {type(error).__name__}: {error}")
        return [math.nan]
    if not math.isfinite(mean := sum(rewards) / len(rewards)):
        _warn_once(objective, f"returned {mean}")
        return [math.nan]
    return rewards


@lru_cache(maxsize=1024)
def _warn_once(objective: str, what: str) -> None:
    logger.warning("reward %s %s: the step is skipped", objective, what)
