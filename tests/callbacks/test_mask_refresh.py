import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from smezo_pl.callbacks import MaskRefresh
from smezo_pl.callbacks.mask_refresh import SAMPLE, churn, density, sampled_names
from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.masks import count_ones
from tests.trajectory.runs import Classifier, fit, network


class Refreshes(Callback):
    """Which steps were the first after a refresh, and with which sparsity."""

    def __init__(self) -> None:
        self.at: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        if optimizer.last_step.refreshed:
            self.at[optimizer.last_step.step] = optimizer.param_groups[0]["sparsity"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_n_steps": 4}, {0: 0.8, 4: 0.8, 8: 0.8, 12: 0.8, 16: 0.8}),
        ({"every_n_epochs": 1}, {0: 0.8, 8: 0.8, 16: 0.8}),
        ({"every_n_epochs": 2}, {0: 0.8, 16: 0.8}),
        ({"sparsity": {0: 0.2, 5: 0.5, 9: 0.7}}, {0: 0.2, 5: 0.5, 9: 0.7}),
        ({"every_n_steps": 6, "sparsity": {7: 0.5}}, {0: 0.8, 6: 0.8, 7: 0.5, 12: 0.5, 18: 0.5}),
        ({"every_n_epochs": 1, "sparsity": {2: 0.4}}, {0: 0.8, 8: 0.8, 16: 0.4}),
    ],
)
def test_masks_are_refreshed_when_it_is_time(
    tmp_path: Path, settings: dict[str, Any], expected: dict[int, float]
) -> None:
    seen = Refreshes()
    fit(tmp_path, Classifier(), seen, MaskRefresh(**settings), limit_val_batches=0)
    assert seen.at == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "would never refresh"),
        ({"every_n_steps": 2, "every_n_epochs": 1}, "not both"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"every_n_epochs": -1}, "every_n_epochs must be at least 1, got -1"),
        ({"sparsity": {0: 1.0}}, r"sparsity must be in \[0, 1\), got 1.0 from 0 on"),
        ({"sparsity": {0: float("nan")}}, "sparsity must be in"),
        ({"sparsity": {-1: 0.5}}, "sparsity must start at 0 or later, got -1"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskRefresh(**settings)


def test_what_changed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "smezo_pl"):
        fit(tmp_path, Classifier(), MaskRefresh(sparsity={0: 0.9, 10: 0.5}), limit_val_batches=0)
    [line] = [record.getMessage() for record in caplog.records if "masks refreshed" in record.getMessage()]
    assert line.startswith("masks refreshed after step 10: churn 0.")
    assert line.endswith("sparsity 0.5")


def test_density_and_churn_are_counted_right() -> None:
    model = network()
    optimizer = SparseMeZO(model.named_parameters(), sparsity=0.75, kernel="torch")
    before = optimizer.packed_masks()
    stats = optimizer.mask_stats()
    numel = sum(stat.numel for stat in stats)
    assert {stat.name: count_ones(before[stat.name]) for stat in stats} == {s.name: s.selected for s in stats}
    assert density(before, optimizer) == sum(stat.selected for stat in stats) / numel
    assert churn(before, before, optimizer) == 0.0
    optimizer.refresh_masks(0.5)
    after = optimizer.packed_masks()
    changed = sum(int((_unpacked(before[s.name], s.numel) != _unpacked(after[s.name], s.numel)).sum()) for s in stats)
    assert churn(before, after, optimizer) == changed / numel > 0.1


def _unpacked(bits: torch.Tensor, numel: int) -> torch.Tensor:
    return (bits[:, None] >> torch.arange(8) & 1).flatten()[:numel]


def test_large_models_are_sampled() -> None:
    optimizer = SparseMeZO(network().named_parameters(), kernel="torch")
    sizes = {
        n: p.numel()
        for n, p in zip(optimizer.param_groups[0]["names"], optimizer.param_groups[0]["params"], strict=True)
    }
    assert sampled_names(optimizer) == list(sizes)
    some = sampled_names(optimizer, sum(sizes.values()) // 2)
    assert 0 < sum(sizes[name] for name in some) <= sum(sizes.values()) // 2
    assert sampled_names(optimizer, 1) == ["3.bias"]
    assert SAMPLE == 1 << 26


@pytest.mark.parametrize("callbacks", [[], [MaskRefresh(every_n_steps=3)]])
def test_a_resume_without_it_is_warned_of(tmp_path: Path, callbacks: list[Callback]) -> None:
    fit(tmp_path, Classifier(), MaskRefresh(every_n_steps=2), max_steps=3)
    with pytest.warns(UserWarning, match="Please add the following callbacks: .*MaskRefresh.*'every_n_steps': 2"):
        fit(tmp_path, Classifier(), *callbacks, max_steps=4, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
