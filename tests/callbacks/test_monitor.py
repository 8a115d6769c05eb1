import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from smezo_pl.callbacks import MaskRefresh, RunMetrics, ZerothOrderMonitor
from smezo_pl.callbacks.monitor import peak_memory
from tests.trajectory.runs import Classifier, fit

EVERY_LINE = {
    "zo/loss_plus",
    "zo/loss_minus",
    "zo/projected_gradient",
    "zo/gradient_abs_q10",
    "zo/gradient_abs_q50",
    "zo/gradient_abs_q90",
    "zo/lr",
    "zo/eps",
    "zo/skipped_steps",
    "zo/forward_share",
    "zo/examples_per_second",
    "zo/peak_memory_gib",
}


@pytest.fixture
def accumulated(tmp_path: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = Classifier(num_samples=2)
    logger = TensorBoardLogger(tmp_path, name="", version="v")
    callbacks = [
        ZerothOrderMonitor(window=10, masks_every_n_steps=5, figures_every_n_steps=10),
        MaskRefresh(every_n_steps=6),
    ]
    fit(tmp_path, module, *callbacks, logger=logger, log_every_n_steps=4)
    events = EventAccumulator(str(tmp_path / "v"))
    events.Reload()
    return module, events


def test_tensorboard_gets_scalars_and_figures(accumulated: Any) -> None:
    _, events = accumulated
    tags = events.Tags()
    assert EVERY_LINE | {"zo/mask_density", "zo/mask_churn", "mask/churn", "mask/density"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"zo/projected_gradients", "zo/density_by_layer"}
    for name in EVERY_LINE:
        assert [event.step for event in events.Scalars(name)] == [4, 8, 12, 16, 20]
    assert [event.step for event in events.Scalars("zo/mask_density")] == [5, 10, 15, 20]
    assert [event.step for event in events.Scalars("zo/mask_churn")] == [10, 15, 20]
    assert [event.step for event in events.Scalars("mask/churn")] == [6, 12, 18]


def test_the_numbers_are_the_optimizers(accumulated: Any) -> None:
    module, events = accumulated
    value = {name: events.Scalars(name)[-1].value for name in EVERY_LINE}
    optimizer = module.optimizers(use_pl_optimizer=False)
    report = optimizer.last_step
    mean = sum(report.projected_gradients) / 2
    assert value["zo/projected_gradient"] == pytest.approx(mean, rel=1e-6)
    assert (value["zo/loss_plus"] - value["zo/loss_minus"]) / 2e-3 == pytest.approx(mean, rel=1e-2, abs=1e-3)
    assert (value["zo/loss_plus"] + value["zo/loss_minus"]) / 2 == pytest.approx(report.loss, rel=1e-6)
    assert value["zo/lr"] == pytest.approx(1e-2) and value["zo/eps"] == pytest.approx(1e-3)
    assert 0.0 < value["zo/forward_share"] < 1.0
    assert 0.0 < value["zo/gradient_abs_q10"] < value["zo/gradient_abs_q50"] < value["zo/gradient_abs_q90"]
    assert value["zo/examples_per_second"] > 0.0
    assert 0.05 < value["zo/peak_memory_gib"] < 64.0
    stats = optimizer.mask_stats()
    active = sum(stat.selected for stat in stats) / sum(stat.numel for stat in stats)
    assert events.Scalars("zo/mask_density")[-1].value == pytest.approx(active, rel=1e-6)


def test_with_a_direction_per_row_their_size_stands_for_them(tmp_path: Path) -> None:
    module, logger = Classifier(directions="per_row", rank=1, coefficients="ranks"), CSVLogger(tmp_path, "", "v")
    monitor = ZerothOrderMonitor(window=3)
    fit(tmp_path, module, monitor, RunMetrics(), logger=logger, log_every_n_steps=1, max_steps=5)
    header, *lines = (tmp_path / "v" / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    assert "zo/projected_gradient" not in names
    logged = [line.split(",") for line in lines]
    last = [values for values in logged if values[names.index("zo/gradient_rms")]][-1]
    optimizer = module.optimizers(use_pl_optimizer=False)
    gradients = [(plus - minus) / 2e-3 for plus, minus in optimizer.last_step.losses]
    assert len(gradients) == 4
    rms = (sum(g * g for g in gradients) / 4) ** 0.5
    assert float(last[names.index("zo/gradient_rms")]) == pytest.approx(rms, rel=1e-5)
    assert float(last[names.index("zo/rows_without_signal")]) == 0.0 == float(last[names.index("zo/no_signal_steps")])
    assert [len(step) for step in monitor._gradients] == [4, 4, 4], "the last 3 steps, whatever their rows"
    metrics = json.loads((tmp_path / "v" / "metrics.json").read_text())
    assert metrics["directions"] == {"shared": [], "no_signal_steps": 0}
    assert {metrics["hyperparameters"][name] for name in ("directions", "rank", "coefficients")} == {
        "per_row",
        1,
        "ranks",
    }


def test_any_logger_gets_the_scalars(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="v")
    fit(tmp_path, Classifier(), ZerothOrderMonitor(figures_every_n_steps=3), logger=logger, log_every_n_steps=4)
    header = (tmp_path / "v" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert set(header) >= EVERY_LINE


def test_without_a_logger_it_costs_no_look_at_the_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smezo_pl.optim.SparseMeZO.packed_masks", lambda *_: pytest.fail("masks were read"))
    fit(tmp_path, Classifier(), ZerothOrderMonitor(masks_every_n_steps=1), max_steps=4)


def test_a_skipped_step_leaves_the_gradient_out(tmp_path: Path) -> None:
    class Broken(Classifier):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss(batch) * float("nan")

    logger = CSVLogger(tmp_path, name="", version="v")
    fit(tmp_path, Broken(), ZerothOrderMonitor(), logger=logger, log_every_n_steps=1, max_steps=3, limit_val_batches=0)
    header, *lines = (tmp_path / "v" / "metrics.csv").read_text().splitlines()
    assert "zo/projected_gradient" not in header.split(",")
    column = header.split(",").index("zo/skipped_steps")
    assert [line.split(",")[column] for line in lines if line.split(",")[column]] == ["1.0", "2.0", "3.0"]


@pytest.mark.parametrize("name", ["window", "masks_every_n_steps", "figures_every_n_steps"])
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ZerothOrderMonitor(**{name: 0})


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    assert before is not None
    held = torch.ones(before // 4 + (1 << 24))
    after = peak_memory(torch.device("cpu"))
    assert after is not None and after - before > held.numel()
