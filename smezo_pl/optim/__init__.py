"""The algorithm: an optimizer, its noise, its masks and the fused passes over the weights."""

from smezo_pl.optim.selection import MaskStat
from smezo_pl.optim.sparse_mezo import SparseMeZO
from smezo_pl.optim.step import NonFiniteLossError, StepRecord

__all__ = ["MaskStat", "NonFiniteLossError", "SparseMeZO", "StepRecord"]
