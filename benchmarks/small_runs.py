"""Training runs of a second, for the fault campaigns and the tests: a small network, its data and a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from smezo_pl import SparseMeZO, SparseMeZOModule
from smezo_pl.data.loaders import EpochSampler, TrainLoader

EXAMPLES, FEATURES, CLASSES = 32, 12, 3


def network(seed: int = 0, dtype: torch.dtype = torch.float32, width: int = 24) -> nn.Sequential:
    """A small classifier, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, CLASSES)).to(
            dtype
        )


def examples(seed: int = 1, count: int = EXAMPLES) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    return [(features, int(label)) for features, label in zip(x, y, strict=True)]


def loss_of(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)).float(), y)


class Classifier(SparseMeZOModule):
    """The network above under Sparse MeZO; ``routed``: some batches leave a layer out."""

    def __init__(self, dtype: str = "float32", seed: int = 0, width: int = 24, **settings: Any) -> None:
        scheduler, routed = settings.pop("scheduler", None), settings.pop("routed", False)
        settings = {"lr": 1e-2, "seed": settings.pop("noise_seed", 7), "kernel": "torch", **settings}
        super().__init__(network(seed, getattr(torch, dtype), width), lambda p: SparseMeZO(p, **settings), scheduler)

        self.routed = routed

    def loss(self, batch: Any) -> Tensor:
        is_short = self.routed and int(batch[1].sum()) % 3 > 0
        return loss_of(nn.Sequential(*(self.model[i] for i in (0, 1, 3))) if is_short else self.model, *batch)

    def losses(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.scores(batch), batch[1], reduction="none")

    def scores(self, batch: Any) -> Tensor:
        return self.model(batch[0].to(self.model[0].weight.dtype)).float()

    def evaluate_batch(self, batch: Any) -> dict[str, tuple[Tensor | float, float]]:
        right = self.scores(batch).argmax(1) == batch[1]
        return {"loss": (self.loss(batch) * len(batch[1]), len(batch[1])), "accuracy": (right.sum(), len(batch[1]))}

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        return [
            {"index": 4 * batch_idx + i, "scores": row.tolist(), "prediction": int(row.argmax()), "label": int(label)}
            for i, (row, label) in enumerate(zip(self.scores(batch), batch[1], strict=True))
        ]


class Examples(LightningDataModule):
    """The examples in a random order that a checkpoint keeps: 8 batches an epoch."""

    def __init__(self, workers: int = 0, order: int = 3) -> None:
        super().__init__()
        self.workers, self.order = workers, order

    def train_dataloader(self) -> Any:
        return TrainLoader(
            examples(), sampler=EpochSampler(EXAMPLES, seed=self.order), batch_size=4, num_workers=self.workers
        )

    def val_dataloader(self) -> Any:
        return DataLoader(examples(2, 16), batch_size=4)

    test_dataloader = predict_dataloader = val_dataloader


def make_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    settings = {"max_steps": 20, "max_epochs": -1, "val_check_interval": 4, "logger": False, **settings}
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **settings,
    )
