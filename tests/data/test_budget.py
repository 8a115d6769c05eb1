import logging
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl import PromptDataModule, SparseMeZOModule
from smezo_pl.data import Collate
from smezo_pl.data.loaders import CPU_GENERATION_TOKENS, CPU_TOKENS, found_budget, token_budget
from smezo_pl.module import SparseMeZOModule as Module

GPU = torch.device("meta")


def forwards(most: int, there: int, asked: list[int]) -> Callable[[int], int]:
    """A device on which so many tokens fit, and so many tokens of data."""

    def trial(tokens: int) -> int:
        asked.append(tokens)
        held = min(tokens, there)
        if held > most:
            raise torch.OutOfMemoryError("too many")
        return held

    return trial


def test_a_gpu_is_tried_until_it_is_full(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []
    with caplog.at_level(logging.INFO, "smezo_pl"):
        assert token_budget(GPU, forwards(10_000, 1 << 20, asked)) == 8192
    assert asked == [2048, 4096, 8192, 16384]
    assert [r.message for r in caplog.records] == [
        "eval_batch_size auto: 8192 tokens per forward; 16384 did not fit on meta"
    ]


def test_a_gpu_is_tried_until_all_data_fits(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []
    with caplog.at_level(logging.INFO, "smezo_pl"):
        assert token_budget(GPU, forwards(1 << 30, 5000, asked)) == 16384
    assert asked == [2048, 4096, 8192, 16384]
    assert "16384 tokens per forward on meta, all that was tried fits" in caplog.text


def test_a_gpu_on_which_nothing_fits() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="too many"):
        token_budget(GPU, forwards(100, 5000, []))


def test_a_cpu_has_a_stated_number(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "smezo_pl"):
        assert token_budget(torch.device("cpu"), forwards(0, 1, [])) == CPU_TOKENS
        assert found_budget(None, [], Collate(0)) == CPU_TOKENS
        assert found_budget(None, [], Collate(0, "lm", max_new_tokens=5)) == CPU_GENERATION_TOKENS
    assert f"eval_batch_size auto: {CPU_TOKENS} tokens per forward, which suits a CPU's caches" in caplog.text


def test_the_modules_own_evaluation_is_what_is_tried(
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a GPU with room for 300 tokens: found once, for all splits; then a run's batches keep to it."""
    module = SparseMeZOModule(make_tiny_model("llama"))
    module.tokenizer = tiny_tokenizer
    data = PromptDataModule("demo", num_train=8, num_dev=40, num_test=40)
    real, sizes = Module.evaluate_batch, []

    def evaluate_batch(self: Module, batch: object) -> object:
        sizes.append(batch.input_ids.numel())  # type: ignore[attr-defined]
        if sizes[-1] > 300:
            raise torch.OutOfMemoryError("too many")
        return real(self, batch)

    def budget(device: torch.device, trial: Callable[[int], int], on_cpu: int) -> int:
        return token_budget(GPU, trial)

    monkeypatch.setattr(Module, "evaluate_batch", evaluate_batch)
    monkeypatch.setattr("smezo_pl.data.loaders.token_budget", budget)
    monkeypatch.setattr("smezo_pl.data.loaders._FIRST", 128)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with caplog.at_level(logging.INFO, "smezo_pl.data.loaders"):
        trainer.validate(module, data, verbose=False)
        tried = len(sizes)
        trainer.test(module, data, verbose=False)
    said = [record.message for record in caplog.records if record.name == "smezo_pl.data.loaders"]
    assert said == ["eval_batch_size auto: 256 tokens per forward; 512 did not fit on meta"]
    assert len([size for size in sizes if size > 256]) == 1 and len(sizes) > tried
