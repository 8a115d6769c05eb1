"""Writers of predictions (``predictions.jsonl``) and of metrics (``validate.json``, ``test.json``)."""

from __future__ import annotations

import logging
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from smezo_pl.callbacks.common import logged_metrics, run_folder, task_and_model
from smezo_pl.data import PromptDataModule
from smezo_pl.models import precision_of
from smezo_pl.trajectory.files import as_json, write_atomically, write_json
from smezo_pl.trajectory.fingerprint import machine, versions

log = logging.getLogger(__name__)


class PredictionWriter(Callback):
    """Writes what ``predict`` returns, one JSON object per row, in the order of the file.

    A line holds ``index`` (row of the dataset), ``prompt`` and ``candidates`` (as text, from a `PromptDataModule`),
    ``scores`` (mean log-probability of each candidate), ``prediction`` and ``label`` (index of a candidate, the latter
    null where it is unknown). In a generation task ``prediction`` is the generated text, ``references`` holds the gold
    answers, and there are no candidates and scores. A row without a result has ``prediction`` null, and ``error``.

    Args:
        path: File to write; by default ``predictions.jsonl`` in the run's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path
        self._rows: list[tuple[int, dict[str, Any]]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start without rows."""
        self._rows = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the rows of a batch."""
        if not isinstance(outputs, list) or not all(isinstance(row, dict) and "index" in row for row in outputs):
            raise TypeError(
                "PredictionWriter needs a predict_step that returns a list of dicts, one per example, with 'index'; "
                f"got {type(outputs).__name__}"
            )
        self._rows.extend((dataloader_idx, row) for row in outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rows of all processes, each example once."""
        gathered: list[Any] = [self._rows]
        if trainer.world_size > 1:
            gathered = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self._rows)
        if not trainer.is_global_zero:
            return
        found = sorted({(loader, row["index"]): row for part in gathered for loader, row in part}.items())
        if len(trainer.num_predict_batches) > 1:
            rows = [{"dataloader_idx": loader, **row} for (loader, _), row in found]
        else:
            rows = _with_text({index: row for (_, index), row in found}, getattr(trainer, "datamodule", None))
        path = Path(self.path or run_folder(trainer) / "predictions.jsonl")
        write_atomically(path, "".join(as_json(row, ensure_ascii=False) + "\n" for row in rows).encode())
        log.info("%d predictions are in %s", len(rows), path)


def _with_text(rows: dict[int, dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    """Rows in the order of the file, with prompts and candidates where the data module has them as text."""
    if not isinstance(data, PromptDataModule):
        return list(rows.values())
    written = [
        {
            "index": example.index,
            "prompt": example.prompt,
            # A generation task has no candidates; its gold answers are in `references`.
            **({"candidates": list(example.candidates)} if "scores" in rows[example.index] else {}),
            **{key: value for key, value in rows[example.index].items() if key != "index"},
        }
        for example in data.examples("test")
        if example.index in rows
    ]
    written += [{"index": index, "prediction": None, "error": why} for index, why in data.failed("test").items()]
    return sorted(written, key=lambda row: row["index"])


class ScoreWriter(Callback):
    """Writes ``validate.json`` or ``test.json`` into the run's folder after the evaluation.

    It holds ``task``, ``split``, ``model``, ``method``, ``checkpoint`` (null: as pretrained), ``metrics`` by name,
    ``examples``, ``data_seed``, ``seconds``, ``precision``, ``versions`` and ``machine``.

    Args:
        path: File to write; by default named after the subcommand, in the run's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path, self._began = path, perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = perf_counter()

    on_test_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, unless it was a validation within ``fit``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "validate", "dev", "val/")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self._write(trainer, pl_module, "test", "test", "test/")

    def _write(self, trainer: Trainer, module: Any, name: str, split: str, prefix: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data: Any = getattr(trainer, "datamodule", None)
        task, model = task_and_model(trainer)
        result = {
            "task": task,
            "split": split,
            "model": model,
            "method": getattr(module, "method", None),
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "metrics": logged_metrics(trainer, prefix),
            "examples": len(data.examples(split)) if hasattr(data, "examples") else None,
            "data_seed": getattr(data, "data_seed", None),
            "seconds": round(perf_counter() - self._began, 2),
            "precision": precision_of(trainer.precision, module),
            "versions": versions(),
            "machine": machine(module.device),
        }
        path = Path(self.path or run_folder(trainer) / f"{name}.json")
        write_json(path, result)
        log.info("metrics are in %s", path)
