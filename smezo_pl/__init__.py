"""Sparse MeZO in PyTorch Lightning: fine-tune language models from forward passes alone.

The public names load on first use, so that ``import smezo_pl`` and ``smezo --help`` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smezo_pl.callbacks import MaskRefresh as MaskRefresh
    from smezo_pl.callbacks import PredictionWriter as PredictionWriter
    from smezo_pl.callbacks import RunMetrics as RunMetrics
    from smezo_pl.callbacks import SeedCheckpoint as SeedCheckpoint
    from smezo_pl.callbacks import ZerothOrderMonitor as ZerothOrderMonitor
    from smezo_pl.cli import build as build
    from smezo_pl.data import PromptDataModule as PromptDataModule
    from smezo_pl.models import load_model as load_model
    from smezo_pl.module import SparseMeZOModule as SparseMeZOModule
    from smezo_pl.optim import SparseMeZO as SparseMeZO
    from smezo_pl.strategies import ForwardDDPStrategy as ForwardDDPStrategy
    from smezo_pl.trajectory import apply as apply
    from smezo_pl.trajectory import export as export
    from smezo_pl.trajectory import record as record
    from smezo_pl.trajectory import replay as replay

__version__ = "0.1.0"

_HOMES = {
    "callbacks": ("MaskRefresh", "PredictionWriter", "RunMetrics", "SeedCheckpoint", "ZerothOrderMonitor"),
    "cli": ("build",),
    "data": ("PromptDataModule",),
    "models": ("load_model",),
    "module": ("SparseMeZOModule",),
    "optim": ("SparseMeZO",),
    "strategies": ("ForwardDDPStrategy",),
    "trajectory": ("apply", "export", "record", "replay"),
}
_HOME = {name: f"smezo_pl.{home}" for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
