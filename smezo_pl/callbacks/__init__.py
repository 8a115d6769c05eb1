"""Callbacks of a training run."""

from smezo_pl.callbacks.checkpoints import SeedCheckpoint, WeightCheckpoint
from smezo_pl.callbacks.mask_refresh import MaskRefresh
from smezo_pl.callbacks.monitor import ZerothOrderMonitor
from smezo_pl.callbacks.run_metrics import RunMetrics
from smezo_pl.callbacks.writers import PredictionWriter, ScoreWriter

__all__ = [
    "MaskRefresh",
    "PredictionWriter",
    "RunMetrics",
    "ScoreWriter",
    "SeedCheckpoint",
    "WeightCheckpoint",
    "ZerothOrderMonitor",
]
