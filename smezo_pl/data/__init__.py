"""From a task's data set to batches: sources, sampling, tokens, loaders."""

from smezo_pl.data.batch import PromptBatch as PromptBatch
from smezo_pl.data.collate import Collate as Collate
from smezo_pl.data.datamodule import PromptDataModule as PromptDataModule
from smezo_pl.data.demo import demo_rows as demo_rows
from smezo_pl.data.encoding import Encoded as Encoded
from smezo_pl.data.encoding import Encoder as Encoder
from smezo_pl.data.encoding import padding_id as padding_id

__all__ = [
    "Collate",
    "Encoded",
    "Encoder",
    "PromptBatch",
    "PromptDataModule",
    "demo_rows",
    "padding_id",
]
