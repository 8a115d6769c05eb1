"""Means over a data set, from sums and weights of batches."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from smezo_pl.tasks.answers import Answered, gathered
from smezo_pl.tasks.metrics import METRICS


@dataclass(frozen=True)
class Collected:
    """A batch's part of a metric that only all answers together give.

    Attributes:
        metric: Its name in `smezo_pl.tasks.metrics.METRICS`.
        answers: The batch's answers.
        num_labels: Number of labels of the task, 0 where they are not shared by all examples.
    """

    metric: str
    answers: list[Answered]
    num_labels: int = 0


Sums = dict[str, tuple[Tensor | float, float] | Collected]
"""What a batch adds to each metric: a sum and the weight it stands for, or answers."""


class WeightedMeans:
    """Named means that weigh batches by what their sums count, over all processes.

    Example:
        >>> means = WeightedMeans()
        >>> means.update({"accuracy": (3.0, 4.0)}, torch.device("cpu"))
        >>> means.update({"accuracy": (1.0, 1.0)}, torch.device("cpu"))
        >>> means.compute()
        {'accuracy': tensor(0.8000, dtype=torch.float64)}
    """

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}
        self._collected: dict[str, Collected] = {}

    def update(self, sums: Mapping[str, tuple[Tensor | float, float] | Collected], device: torch.device) -> None:
        """Add a batch: for each name a sum and the weight it stands for, or answers."""
        for name, part in sums.items():
            if isinstance(part, Collected):
                kept = self._collected.setdefault(name, Collected(part.metric, [], part.num_labels))
                kept.answers.extend(part.answers)
        # States made inside Lightning's inference mode could not be added to outside it, as in `fit` after `validate`.
        with torch.inference_mode(False), torch.no_grad():
            self._update({name: part for name, part in sums.items() if not isinstance(part, Collected)}, device)

    def _update(self, sums: Mapping[str, tuple[Tensor | float, float]], device: torch.device) -> None:
        for name, (total, weight) in sums.items():
            if name not in self._means:
                # float64, as thousands of float32 batches would lose the last digits that runs are compared by. Set
                # last: torchmetrics 1.9 takes torch's default dtype in `to`, 16-bit inside a step of bf16-true.
                self._means[name] = MeanMetric().to(device)
                self._means[name].set_dtype(torch.float64)
            if weight:
                value = torch.as_tensor(total, dtype=torch.float64, device=device) / weight
                self._means[name].update(value, torch.full_like(value, weight))

    def compute(self) -> dict[str, Tensor]:
        """The means of all that was added since the last call, the same on every process."""
        values: dict[str, Tensor] = {}
        for name, metric in self._means.items():
            if metric.update_called:
                values[name] = metric.compute()
                with torch.inference_mode(False):
                    metric.reset()
        for name, part in self._collected.items():
            value = METRICS[part.metric].measure(gathered(part.answers), part.num_labels)
            values[name] = torch.tensor(value, dtype=torch.float64)
        self._collected.clear()
        return values
