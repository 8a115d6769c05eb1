"""Run by torchrun in `test_two_processes`: what each process reads, as JSON."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from smezo_pl.data import PromptBatch, PromptDataModule
from tests.data.synthetic_tokenizers import word_tokenizer


class Reader(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> torch.Tensor:
        self.seen["train"].append(batch.index.tolist())
        return (self.weight * 0).sum()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen["val"].append(batch.index.tolist())

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen["test"].append(batch.index.tolist())


def run(devices: int, batch_size: int) -> tuple[int, dict[str, list[list[int]]]]:
    tokenizer = word_tokenizer([" It", " was", " terrible", " great"])
    data = PromptDataModule(
        tokenizer=tokenizer, batch_size=batch_size, eval_batch_size=8, num_train=40, num_dev=21, num_test=33
    )
    module = Reader()
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2,
        num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return trainer.global_rank, module.seen


if __name__ == "__main__":
    rank, seen = run(devices=2, batch_size=4)
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(seen))
