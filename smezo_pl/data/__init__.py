"""From a task's dataset to batches: sources, splits, tokens, loaders."""

from smezo_pl.data.batch import PromptBatch
from smezo_pl.data.collate import Collate
from smezo_pl.data.datamodule import PromptDataModule
from smezo_pl.data.demo import demo_rows
from smezo_pl.data.encoding import Encoded, Encoder
from smezo_pl.data.tokens import padding_id

__all__ = [
    "Collate",
    "Encoded",
    "Encoder",
    "PromptBatch",
    "PromptDataModule",
    "demo_rows",
    "padding_id",
]
