"""Lists and dicts of dataloaders: metrics by loader, in logs, callbacks and files."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from smezo_pl.callbacks import (
    MaskRefresh,
    PredictionWriter,
    RunMetrics,
    ScoreWriter,
    SeedCheckpoint,
    ZerothOrderMonitor,
)
from smezo_pl.commands.compare import compare
from tests.trajectory.runs import Classifier, Examples, examples, make_trainer

FIRST, SECOND = Examples().val_dataloader(), DataLoader(examples()[:5], batch_size=4)


@pytest.mark.parametrize("given", [FIRST, [FIRST], {"own": FIRST}], ids=["loader", "list", "dict"])
def test_one_loader_has_plain_names(given: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, RunMetrics(table=False), max_steps=4)
    trainer.fit(Classifier(), Examples().train_dataloader(), given)
    assert set(json.loads((tmp_path / "metrics.json").read_text())["after"]) == {"loss", "accuracy"}


@pytest.mark.parametrize("given", [[FIRST, SECOND], {"a": FIRST, "b": SECOND}], ids=["list", "dict"])
def test_each_of_several_loaders_has_its_own_metrics(
    given: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "smezo_pl")
    best, module = SeedCheckpoint(), Classifier()
    callbacks = (RunMetrics(), ZerothOrderMonitor(), MaskRefresh(2), ScoreWriter(), PredictionWriter(), best)
    trainer = make_trainer(tmp_path, *callbacks, max_steps=8)
    trainer.fit(module, Examples().train_dataloader(), given)
    result = json.loads((tmp_path / "metrics.json").read_text())
    names = ["loss/dataloader_idx_0", "loss/dataloader_idx_1"]
    assert list(result["before"]) == list(result["after"])
    assert set(result["after"]) == {*names, "accuracy/dataloader_idx_0", "accuracy/dataloader_idx_1"}
    assert "the best checkpoint is that by val/loss/dataloader_idx_0" in caplog.text
    curve = {point["step"]: point[names[0]] for point in result["curve"]["held_out"] if point["step"]}
    assert best.best_step == min(curve, key=lambda step: curve[step])
    assert "accuracy/dataloader_idx_0" in compare([tmp_path], tmp_path / "compared")

    alone = [
        make_trainer(tmp_path).validate(module, loader, verbose=False)[0]["val/loss"] for loader in (FIRST, SECOND)
    ]
    assert alone[0] != alone[1]
    for stage in ("validate", "test"):
        found = getattr(trainer, stage)(module, given, verbose=False)
        key = {"validate": "val", "test": "test"}[stage]
        assert [metrics[f"{key}/{name}"] for metrics, name in zip(found, names, strict=True)] == alone
        assert [len(metrics) for metrics in found] == [2, 2]
        written = json.loads((tmp_path / f"{stage}.json").read_text())["metrics"]
        assert [written[name] for name in names] == alone
    trainer.predict(module, given)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["dataloader_idx"] for row in rows] == [0] * len(FIRST.dataset) + [1] * 5  # type: ignore[arg-type]


def test_another_loader_may_decide(tmp_path: Path) -> None:
    best = SeedCheckpoint(monitor="val/loss/dataloader_idx_1")
    trainer = make_trainer(tmp_path, best, max_steps=8)
    trainer.fit(Classifier(), Examples().train_dataloader(), [FIRST, SECOND])
    assert torch.is_tensor(best.best_model_score)
    with pytest.raises(ValueError, match="monitor='val/f1' is no metric of this run; .* val/loss/dataloader_idx_0"):
        make_trainer(tmp_path / "other", SeedCheckpoint(monitor="val/f1")).fit(
            Classifier(), Examples().train_dataloader(), [FIRST, SECOND]
        )
