"""Means over a data set, from sums and weights of batches."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import MeanMetric


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

    def update(self, sums: Mapping[str, tuple[Tensor | float, float]], device: torch.device) -> None:
        """Add a batch: for each name a sum and the weight it stands for."""
        # States made inside Lightning's inference mode could not be added to outside it, as in `fit` after `validate`.
        with torch.inference_mode(False), torch.no_grad():
            self._update(sums, device)

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
        """The means of all that was added since the last call."""
        values: dict[str, Tensor] = {}
        for name, metric in self._means.items():
            if metric.update_called:
                values[name] = metric.compute()
                with torch.inference_mode(False):
                    metric.reset()
        return values
