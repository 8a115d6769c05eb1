"""Forward-only data parallelism: two processes over gloo, compared with one."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from smezo_pl import ForwardDDPStrategy, PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.models import load_network
from smezo_pl.strategies import ReplicasDifferError, check_strategy, checksum

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "max_epochs": -1,
}


class Record(Callback):
    """Writes each process's weights, losses and metrics, and may spoil a weight on one process."""

    def __init__(self, folder: Path, spoil: bool = False) -> None:
        self.folder, self.spoil = folder, spoil
        self.losses: list[tuple[tuple[float, float], ...]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, SparseMeZO)
        self.losses.append(optimizer.last_step.losses)
        if self.spoil and trainer.global_rank == 1:
            next(pl_module.parameters()).data.view(-1)[3] += 1e-3

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = [p.detach().clone() for p in pl_module.parameters()]
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        torch.save(
            {"weights": weights, "losses": self.losses, "metrics": metrics}, self.folder / f"{trainer.global_rank}"
        )


class Apart(SparseMeZOModule):
    """The second process alone reads ``spare``, which adds nothing to the loss."""

    def configure_model(self) -> None:
        super().configure_model()
        if not hasattr(self.model, "spare"):
            self.model.spare = nn.Linear(3, 1)
            nn.init.ones_(self.model.spare.weight)
            nn.init.ones_(self.model.spare.bias)

    def loss(self, batch: Any) -> torch.Tensor:
        loss = super().loss(batch)
        return loss + 0 * self.model.spare(torch.ones(3)).sum() if self.global_rank == 1 else loss

    def losses(self, batch: Any) -> torch.Tensor:
        losses = super().losses(batch)
        return losses + 0 * self.model.spare(torch.ones(3)).sum() if self.global_rank == 1 else losses


def fit(
    model: str, folder: Path, processes: int, *, spoil: bool = False, steps: int = 4, **settings: Any
) -> SparseMeZOModule:
    module = Apart(model, partial(SparseMeZO, lr=1e-2, kernel="torch", **settings), micro_batch_size=3)
    data = PromptDataModule("demo", num_train=32, num_dev=10, batch_size=8 // processes)
    strategy: Any = "auto"
    if processes > 1:
        strategy = ForwardDDPStrategy(start_method="spawn", process_group_backend="gloo", check_every=2)
    trainer = Trainer(**QUIET, max_steps=steps, devices=processes, strategy=strategy, callbacks=[Record(folder, spoil)])
    trainer.fit(module, data)
    return module


def test_two_processes_hold_the_same_bits_and_train_as_one(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    fit(str(tiny_folder), tmp_path / "one", 1)
    module = fit(str(tiny_folder), tmp_path / "two", 2)
    one, first, second = (torch.load(tmp_path / name) for name in ("one/0", "two/0", "two/1"))
    assert first["losses"] == second["losses"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    start = load_network(tiny_folder).parameters()
    assert not all(torch.equal(a, b) for a, b in zip(first["weights"], start, strict=False))
    # What one process reads takes part on all of them, and what none reads on none.
    assert not all((spare == 1).all() for spare in first["weights"][-2:])
    assert all((spare == 1).all() for spare in one["weights"][-2:])
    # The trained weights are in the process that asked for the run.
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], module.parameters(), strict=True))
    # One process with the whole batch sees the same examples, added in another order.
    torch.testing.assert_close(torch.tensor(first["losses"][0]), torch.tensor(one["losses"][0]), rtol=1e-5, atol=0)
    assert first["metrics"].keys() == one["metrics"].keys() == {"train/loss", "val/loss", "val/accuracy"}
    assert first["metrics"]["val/accuracy"] == second["metrics"]["val/accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"rank": 1}, {"sparsity": 0.5}], ids=["rank 1", "flips"])
def test_two_processes_give_each_example_the_direction_that_one_gives_it(
    settings: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    settings |= {"directions": "per_row", "coefficients": "ranks"}
    fit(str(tiny_folder), tmp_path / "one", 1, steps=2, **settings)
    fit(str(tiny_folder), tmp_path / "two", 2, steps=2, **settings)
    one, first, second = (torch.load(tmp_path / name) for name in ("one/0", "two/0", "two/1"))
    assert first["losses"] == second["losses"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    whole, parts = torch.tensor(one["losses"][0]), torch.tensor(first["losses"][0])
    assert whole.shape == (8, 2) and len(set(whole.flatten().tolist())) > 8
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)
    # The differences of both sides are those of the same directions, and so are the updates.
    torch.testing.assert_close(parts[:, 0] - parts[:, 1], whole[:, 0] - whole[:, 1], rtol=0, atol=2e-6)
    for a, b in zip(first["weights"][:-2], one["weights"][:-2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_replicas_that_differ_are_named(perceptron: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(outputs: list[torch.Tensor], own: torch.Tensor) -> None:
        for rank, output in enumerate(outputs):
            output.copy_(own)
            output[2] += rank == 2

    monkeypatch.setattr("torch.distributed.all_gather", gather)
    monkeypatch.setattr(ForwardDDPStrategy, "world_size", 3)
    strategy = ForwardDDPStrategy()
    strategy._model = perceptron
    message = "the weights of process 2 are not those of process 0: 1 of 4 tensors differ, the first is out.weight"
    with pytest.raises(ReplicasDifferError, match=message):
        strategy.compare_replicas()


@pytest.mark.slow
def test_replicas_that_differ_end_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    message = r"the weights of process 1 are not those of process 0: 1 of \d+ tensors differ, the first is model\."
    with pytest.raises(Exception, match=message):
        fit(str(tiny_folder), tmp_path, 2, spoil=True)


def test_other_strategies_are_refused(perceptron: nn.Module) -> None:
    trainer = Trainer(**QUIET, devices=2, strategy="ddp_spawn")
    module = SparseMeZOModule(perceptron)
    module.trainer = trainer
    with pytest.raises(
        MisconfigurationException, match=r"2 processes with DDPStrategy.*strategy='forward_ddp', or devices=1"
    ):
        module.configure_callbacks()


def test_a_strategy_that_shards_is_refused_on_one_device_too() -> None:
    for strategy in (
        FSDPStrategy(),
        "deepspeed",
        SimpleNamespace(class_path="lightning.pytorch.strategies.FSDPStrategy"),
    ):
        with pytest.raises(MisconfigurationException, match="sharded weights and gradients have no use.*'forward_ddp'"):
            check_strategy(strategy)
    for name in ("auto", "ddp", "forward_ddp_spawn", "smezo_pl.ForwardDDPStrategy"):
        check_strategy(name)


def test_names_are_registered() -> None:
    for name in ("forward_ddp", "forward_ddp_spawn", "forward_ddp_fork"):
        assert name in StrategyRegistry
    trainer = Trainer(**QUIET, devices=2, strategy="forward_ddp")
    assert isinstance(trainer.strategy, ForwardDDPStrategy)


def test_check_every_must_be_positive() -> None:
    with pytest.raises(ValueError, match="check_every must be at least 1, got 0"):
        ForwardDDPStrategy(check_every=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_checksum_sees_every_element_and_its_index(dtype: torch.dtype) -> None:
    x = torch.arange(1, 101).to(dtype)
    whole = checksum(x)
    assert torch.equal(checksum(x, chunk=7), whole)
    for i in (0, 50, 99):
        changed = x.clone()
        changed[i] = -changed[i]
        assert checksum(changed) != whole
    assert checksum(x.flip(0)) != whole
