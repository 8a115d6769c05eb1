"""Training runs of a second: a small network, a loader that resumes, and what is compared between two runs."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from smezo_pl.callbacks import SeedCheckpoint
from smezo_pl.data.loaders import EpochSampler, TrainLoader
from smezo_pl.module import SparseMeZOModule
from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory.recorder import record

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


def recorded_run(
    path: Path, model: nn.Sequential, steps: int = 8, refresh_at: int | None = 3, **settings: Any
) -> SparseMeZO:
    """A plain loop with a changing learning rate and a mask refresh, recorded."""
    optimizer = SparseMeZO(model.named_parameters(), **{"lr": 1e-2, "seed": 7, "kernel": "torch", **settings})
    optimizer.attach(model)
    x, y = (torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()]))
    with record(optimizer, path) as recorder:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step // 3)
            if step == refresh_at:
                optimizer.refresh_masks(0.5)
            optimizer.step(lambda: loss_of(model, x, y))
        recorder.mark_weights()
    return optimizer


class Classifier(SparseMeZOModule):
    """The network above under Sparse MeZO."""

    def __init__(self, dtype: str = "float32", seed: int = 0, width: int = 24, **settings: Any) -> None:
        scheduler = settings.pop("scheduler", None)
        settings = {"lr": 1e-2, "seed": settings.pop("noise_seed", 7), "kernel": "torch", **settings}
        super().__init__(network(seed, getattr(torch, dtype), width), lambda p: SparseMeZO(p, **settings), scheduler)

    def loss(self, batch: Any) -> Tensor:
        return loss_of(self.model, *batch)

    def scores(self, batch: Any) -> Tensor:
        return self.model(batch[0].to(self.model[0].weight.dtype)).float()

    def evaluate_batch(self, batch: Any) -> dict[str, tuple[Tensor | float, float]]:
        right = self.scores(batch).argmax(1) == batch[1]
        return {"loss": (self.loss(batch) * len(batch[1]), len(batch[1])), "accuracy": (right.sum(), len(batch[1]))}

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
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


class Watch(Callback):
    """Keeps what a run logs and reads, by step."""

    def __init__(self) -> None:
        self.train: dict[int, float] = {}
        self.val: dict[int, dict[str, float]] = {}
        self.seen: dict[int, list[float]] = {}
        self.epochs: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train[trainer.global_step] = float(trainer.callback_metrics["train/loss"])
        self.seen[trainer.global_step] = batch[0][:, 0].tolist()
        self.epochs[trainer.global_step] = trainer.current_epoch

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.val[trainer.global_step] = {
                name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
            }


class KilledError(Exception):
    """The end of a process, as far as a run can tell."""


class KillAfter(Callback):
    """Ends a run before the step after ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise KilledError


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


def fit(
    folder: Path, module: SparseMeZOModule, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any
) -> Watch:
    """Train, and give what was seen."""
    watch, data = Watch(), settings.pop("data", None) or Examples()
    if not any(isinstance(callback, SeedCheckpoint) for callback in callbacks):
        callbacks = (*callbacks, SeedCheckpoint(every_n_steps=3))
    make_trainer(folder, watch, *callbacks, **settings).fit(module, data, ckpt_path=ckpt_path)
    return watch


def bits(module: nn.Module) -> list[Tensor]:
    """Weights as integers, so that equal means equal to the last bit."""
    kinds = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    return [p.detach().clone().view(kinds[p.element_size()]) for p in module.parameters()]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))
