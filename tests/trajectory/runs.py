"""Small training runs, and what is compared between two of them."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from small_runs import Classifier, Examples, examples, loss_of, make_trainer, network
from torch import Tensor, nn

from smezo_pl.callbacks import SeedCheckpoint
from smezo_pl.module import SparseMeZOModule
from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory.recorder import record

__all__ = [
    "Classifier",
    "Examples",
    "KillAfter",
    "KilledError",
    "Watch",
    "bits",
    "examples",
    "fit",
    "loss_of",
    "make_trainer",
    "more_rows",
    "network",
    "recorded_detour",
    "recorded_rows",
    "recorded_run",
    "same",
]


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


def recorded_detour(
    path: Path, model: nn.Sequential, steps: int = 8, attach: bool = True, **settings: Any
) -> SparseMeZO:
    """A loop that needs format 2.

    The third layer is read in step 3 alone, the masks are refreshed before step 5, the number of samples is 1 up to
    there and then 2, and step 6 is skipped.
    """
    optimizer = SparseMeZO(
        model.named_parameters(), **{"lr": 1e-2, "weight_decay": 0.1, "seed": 7, "kernel": "torch", **settings}
    )
    if attach:
        optimizer.attach(model)
    x = torch.stack([features for features, _ in examples()]).to(model[0].weight.dtype)

    def loss(step: int) -> Tensor:
        hidden = torch.tanh(model[0](x))
        return model[3](model[2](hidden) if step == 3 else hidden).float().square().mean() * (
            1 if step != 6 else torch.nan
        )

    with record(optimizer, path) as recorder:
        for step in range(optimizer.steps_done, steps):
            if step == 5:
                optimizer.refresh_masks(0.5)
                optimizer.num_samples = 2
            optimizer.step(lambda step=step: loss(step))
        recorder.mark_weights()
    return optimizer


def recorded_rows(path: Path, model: nn.Sequential, steps: int = 8, **settings: Any) -> SparseMeZO:
    """A loop with a direction per row that needs all of format 3.

    Batches have 4 rows and in step 1 three; the masks are refreshed before step 3; from step 4 on there are 2 samples.
    Step 5 is skipped, step 6 has no signal. The first layer's bias is read where rows cannot be told.
    """
    settings = {"lr": 1e-2, "seed": 7, "kernel": "torch", "directions": "per_row", "weight_decay": 0.1, **settings}
    optimizer = SparseMeZO(model.named_parameters(), **settings)
    optimizer.attach(model)
    with record(optimizer, path) as recorder:
        more_rows(optimizer, model, steps)
        recorder.mark_weights()
    return optimizer


def more_rows(optimizer: SparseMeZO, model: nn.Sequential, steps: int) -> None:
    """The steps of `recorded_rows` that are left."""
    x, y = (torch.stack([e[0] for e in examples()]), torch.tensor([e[1] for e in examples()]))

    def losses(step: int) -> Tensor:
        rows = torch.arange(3 if step == 1 else 4) + 3 * step % 16
        each = nn.functional.cross_entropy(model(x[rows].to(model[0].weight.dtype)).float(), y[rows], reduction="none")
        return each * {5: torch.nan, 6: 0.0}.get(step, 1.0) + model[0].bias.float().square().sum() * (step != 6)

    for step in range(optimizer.steps_done, steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step // 3)
        if step == 3:
            optimizer.refresh_masks(None if optimizer.rank else 0.5)
        optimizer.num_samples = 1 + (step >= 4)
        optimizer.step(lambda step=step: losses(step))


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
