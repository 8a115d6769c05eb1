import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.callbacks import RunMetrics
from smezo_pl.callbacks.common import RunProgressBar


class Recorder(RunProgressBar):
    """Takes down what bars there are and how far they come."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: dict[Any, tuple[str, float]] = {}
        self.seen: dict[Any, list[int]] = {}

    def _add_task(self, total_batches: float, description: str, visible: bool = True) -> Any:
        task = super()._add_task(total_batches, description, visible)
        self.bars[task] = (description.strip(), total_batches)
        return task

    def _update(self, progress_bar_id: Any, current: int, visible: bool = True, hard: bool = False) -> None:
        self.seen.setdefault(progress_bar_id, []).append(current)
        super()._update(progress_bar_id, current, visible, hard)


@pytest.mark.parametrize("num_dev", [20, 0])
def test_what_is_measured_around_a_run_has_a_bar(
    num_dev: int, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bar = Recorder()
    module = SparseMeZOModule(str(tiny_folder), optimizer=partial(SparseMeZO, lr=1e-4, kernel="torch"))
    data = PromptDataModule("demo", num_train=16, num_dev=num_dev, batch_size=8, eval_batch_size=4)
    trainer = Trainer(
        max_steps=2,
        limit_val_batches=None if num_dev else 0,
        accelerator="cpu",
        callbacks=[RunMetrics(table=False), bar],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    with caplog.at_level(logging.ERROR):
        trainer.fit(module, data)
    measured = [task for task, (name, _) in bar.bars.items() if name == "Measuring"]
    if not num_dev:
        assert not measured
        return
    assert bar.bars[measured[0]] == ("Measuring", 5)
    assert bar.seen[measured[0]] == [1, 2, 3, 4, 5]
    assert bar.progress is not None and not bar.progress.tasks[measured[0]].visible
    assert ("Training", 2) in bar.bars.values()
