"""What training minimizes or maximizes: a loss, a metric of the answers, or a user's reward function."""

import importlib
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from smezo_pl.tasks.metrics import METRICS, Answer, get_metric
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
        metric = METRICS[objective]
        value = metric.measure(answers, num_labels)
        return value if metric.lower_is_better else 1 - value
    function = load_reward(objective)
    try:
        value = _mean(function([answer.text for answer in answers], [list(a.references) for a in answers]), answers)
    except Exception as error:
        _warn_once(objective, f"raised {type(error).__name__}: {error}")
        return math.nan
    if not math.isfinite(value):
        _warn_once(objective, f"returned {value}")
        return math.nan
    return -value


def _mean(value: Any, answers: Sequence[Answer]) -> float:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence):
        return float(value)
    if len(value) != len(answers):
        raise ValueError(f"it returned {len(value)} numbers for {len(answers)} answers")
    return sum(map(float, value)) / len(answers)


@lru_cache(maxsize=1024)
def _warn_once(objective: str, what: str) -> None:
    logger.warning("reward %s %s: the step is skipped", objective, what)
