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
    "apply": "smezo_pl.trajectory",
    "export": "smezo_pl.trajectory",
    "record": "smezo_pl.trajectory",
    "replay": "smezo_pl.trajectory",
    "ForwardDDPStrategy": "smezo_pl.strategies",
    "MaskRefresh": "smezo_pl.callbacks",
    "PredictionWriter": "smezo_pl.callbacks",
    "PromptDataModule": "smezo_pl.data",
    "RunMetrics": "smezo_pl.callbacks",
    "SeedCheckpoint": "smezo_pl.callbacks",
    "SparseMeZO": "smezo_pl.optim",
    "SparseMeZOModule": "smezo_pl.module",
    "ZerothOrderMonitor": "smezo_pl.callbacks",
    "build": "smezo_pl.cli",
    "load_model": "smezo_pl.models",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
