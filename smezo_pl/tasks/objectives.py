"""What training makes larger or smaller: a loss, a metric of the answers, or a function of the user's."""

import importlib
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from smezo_pl.tasks.metrics import METRICS, Answer, get_metric
from smezo_pl.tasks.task import LOSSES, Task

logger = logging.getLogger(__name__)


def check_objective(objective: str, task: Task) -> None:
    """Refuse an objective that does not exist or does not fit the task.

    Args:
        objective: ``classification``, ``lm``, the name of a metric, or ``module.function`` of a reward.
        task: The task.

    Raises:
        ValueError: If it is none of these or does not fit; if the reward cannot be imported.
    """
    if objective in LOSSES:
        if objective == "classification" and task.is_generation:
            raise ValueError(f"objective 'classification' needs candidates, and task {task.name!r} has a free answer")
        return
    if "." in objective:
        load_reward(objective)
    elif objective in METRICS:
        get_metric(objective, task, "objective")
    else:
        names = (*LOSSES, *METRICS)
        near = get_close_matches(objective, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown objective {objective!r}{hint} There are {', '.join(names)}, and any function by its import path,"
            " module.function"
        )


def load_reward(path: str) -> Callable[[list[str], list[list[str]]], Any]:
    """The function of that import path; modules in the current folder are found too.

    Raises:
        ValueError: If there is no such module or function, or it cannot be called.
    """
    module_name, _, name = path.partition("(")[0].strip().rpartition(".")
    if not module_name:
        raise ValueError(f"reward must be module.function, got {path!r}")
    # The console script does not look there by itself.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward {path!r}: cannot import {module_name!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"reward {path!r}: module {module_name!r} has no function {name!r}; it has {there or 'none'}")
    loaded: Callable[[list[str], list[list[str]]], Any] = function
    return loaded


@lru_cache(maxsize=16)
def reward_of(objective: str, labels: int) -> "Reward":
    """The reward of that name, made once, so that it says once what is wrong with it."""
    return Reward(objective, labels)


@dataclass
class Reward:
    """A number made of a batch's answers that training is to make small: minus a reward, or one minus a metric.

    Args:
        objective: Name of a metric, or ``module.function``. The function gets the answers as texts and, for each, the
            list of right ones; it gives a number, or one an answer, whose mean counts; more is better.
        labels: Number of labels of the task, 0 where they are not shared.
    """

    objective: str
    labels: int = 0

    def __post_init__(self) -> None:
        self._function = load_reward(self.objective) if "." in self.objective else None
        self._said: set[str] = set()

    def loss(self, answers: Sequence[Answer]) -> float:
        """The number; NaN if a user's function raises or gives NaN, which skips the step. Never infinite."""
        if self._function is None:
            metric = METRICS[self.objective]
            value = metric.measure(answers, self.labels)
            return value if metric.lower_is_better else 1 - value
        try:
            value = self._function([answer.text for answer in answers], [list(answer.references) for answer in answers])
            value = self._mean(value, len(answers))
        except Exception as error:
            self._warn(f"raised {type(error).__name__}: {error}")
            return math.nan
        if not math.isfinite(value):
            self._warn(f"gave {value}")
            return math.nan
        return -value

    def _mean(self, value: Any, count: int) -> float:
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, Sequence):
            return float(value)
        if len(value) != count:
            raise ValueError(f"it gave {len(value)} numbers for {count} answers")
        return sum(map(float, value)) / count

    def _warn(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("reward %s %s: the step is skipped", self.objective, what)
