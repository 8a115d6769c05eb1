import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl import PromptDataModule, SparseMeZOModule
from smezo_pl.data import Collate, Encoded
from smezo_pl.data.loaders import (
    CPU_GENERATION_TOKENS,
    CPU_TOKENS,
    BatchLimit,
    EpochSampler,
    LengthSampler,
    evaluation_loader,
    find_token_budget,
    token_budget,
    train_loader,
)
from smezo_pl.data.splits import permutation


def make(count: int, rows: int = 1) -> list[Encoded]:
    """Examples of different lengths that read ``rows`` rows each."""
    candidates = tuple((place, 5) for place in range(rows)) if rows > 1 else ((1,), (2,))
    return [Encoded((9,) * (1 + i * 7 % 13), candidates, 0, (0,), index=100 + i) for i in range(count)]


def read(loader: "DataLoader[Any]") -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


def test_an_epochs_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = EpochSampler(10, seed=3)
    assert list(sampler) == permutation(10, 3, 0)
    sampler.set_epoch(2)
    assert list(sampler) == permutation(10, 3, 2)
    assert list(EpochSampler(10, seed=4)) != permutation(10, 3, 0)
    assert len(sampler) == 10


@pytest.mark.parametrize("count", [32, 30])
def test_processes_read_together_what_one_reads_alone(count: int) -> None:
    examples, collate = make(count), Collate(0)
    alone = read(train_loader(examples, collate, batch_size=8, seed=1))
    shared = [read(train_loader(examples, collate, 4, 1, world_size=2, rank=rank)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shared, strict=True)] == [sorted(batch) for batch in alone]
    assert sorted(sum(alone, [])) == list(range(100, 100 + count))  # noqa: RUF017


def test_processes_take_equally_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        samplers = [EpochSampler(10, 0, world_size=4, rank=rank) for rank in range(4)]
    orders = [list(sampler) for sampler in samplers]
    assert {len(order) for order in orders} == {3} == {len(sampler) for sampler in samplers}
    assert set(sum(orders, [])) == set(range(10))  # noqa: RUF017
    assert "2 training examples come twice an epoch, so that 4 processes have as many" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("taken", [1, 3])
def test_a_loader_resumes_where_it_was(num_workers: int, epoch: int, taken: int) -> None:
    def loader() -> Any:
        return train_loader(make(30), Collate(0), 8, 5, num_workers)

    whole = loader()
    whole.sampler.set_epoch(epoch)
    expected = read(whole)
    first = loader()
    first.sampler.set_epoch(epoch)
    iterator = iter(first)
    for _ in range(taken):
        next(iterator)
    state = first.state_dict()
    del iterator
    # As Lightning does it: the iterator is made before the sampler hears of the epoch.
    resumed = loader()
    resumed.load_state_dict(state)
    assert read(resumed) == expected[taken:]
    resumed.sampler.set_epoch(epoch + 1)
    whole.sampler.set_epoch(epoch + 1)
    assert read(resumed) == read(whole)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_end_of_an_epoch_is_the_start_of_the_next(num_workers: int) -> None:
    def loader() -> Any:
        return train_loader(make(30), Collate(0), 8, 5, num_workers)

    first = loader()
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    state = first.state_dict()
    del iterator
    resumed, following = loader(), loader()
    resumed.load_state_dict(state)
    following.sampler.set_epoch(1)
    assert read(resumed) == read(following)


def test_evaluation_runs_by_length_the_longest_first() -> None:
    examples = make(50)
    loader = evaluation_loader(examples, Collate(0), BatchLimit(rows=8))
    widths = [batch.input_ids.shape[1] for batch in loader]
    assert widths == sorted(widths, reverse=True)
    batches = read(loader)
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 8, 8, 2]
    assert sorted(sum(batches, [])) == list(range(100, 150))  # noqa: RUF017
    assert len(loader) == 7


def test_evaluation_batches_are_filled_by_texts() -> None:
    batches = evaluation_loader(make(7, rows=3), Collate(0), BatchLimit(rows=7))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    # An example with more texts than that is a batch of its own.
    assert [len(batch) for batch in evaluation_loader(make(2, rows=3), Collate(0), BatchLimit(rows=1))] == [1, 1]


def test_evaluation_batches_are_filled_by_tokens() -> None:
    examples = make(50)
    shapes = [batch.input_ids.shape for batch in evaluation_loader(examples, Collate(0), BatchLimit(tokens=26))]
    assert all(rows * width <= 26 for rows, width in shapes)
    # No batch could take the longest of the next one as well.
    assert all((rows + 1) * width > 26 for rows, width in shapes[:-1])
    assert sum(rows for rows, _ in shapes) == 50
    assert [len(batch) for batch in evaluation_loader(make(3), Collate(0), BatchLimit(tokens=1))] == [1, 1, 1]


def test_neighbours_are_in_one_batch_and_one_row() -> None:
    passages = [tuple(range(start, start + 40)) for start in (100, 200, 300)]
    examples = [Encoded((*passages[i % 3], 3 + i), ((1,), (2,)), 0, (0,), index=i) for i in range(12)]
    batches = list(evaluation_loader(examples, Collate(0), BatchLimit(tokens=100)))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 44), (1, 44)]
    rows = [
        sorted(batch.index[batch.example_row == row].tolist()) for batch in batches for row in range(len(batch) // 4)
    ]
    assert sorted(rows) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    # A passage is read again where the limit asks for it.
    apart = list(evaluation_loader(examples, Collate(0), BatchLimit(rows=3)))
    assert [(len(batch), batch.num_rows) for batch in apart] == [(3, 1), (3, 1), (3, 1), (3, 3)]
    cut = list(evaluation_loader(examples, Collate(0), BatchLimit(tokens=42)))
    assert [tuple(batch.input_ids.shape) for batch in cut] == [(1, 42)] * 6


@pytest.mark.parametrize(
    ("count", "world_size", "max_rows"),
    [(50, 2, 8), (50, 3, 50), (7, 4, 100), (3, 2, 1), (9, 4, 2), (10, 4, 1), (5, 3, 2), (4, 4, 9)],
)
def test_every_example_is_scored_once_by_one_process(count: int, world_size: int, max_rows: int) -> None:
    examples = make(count)
    samplers = [LengthSampler(examples, BatchLimit(rows=max_rows), world_size, rank) for rank in range(world_size)]
    assert len({len(sampler) for sampler in samplers}) == 1
    batches = [batch for sampler in samplers for batch in sampler]
    assert all(batches)
    assert sorted(number for batch in batches for number in batch) == list(range(count))


def test_fewer_examples_than_processes() -> None:
    with pytest.raises(ValueError, match="2 examples cannot be shared out to 3 processes"):
        LengthSampler(make(2), BatchLimit(rows=8), world_size=3)


def test_an_example_alone_is_a_batch() -> None:
    """Lightning's `overfit_batches` puts in a sampler of its own, which hands out single numbers."""
    loader = evaluation_loader(make(3), Collate(0), BatchLimit(rows=8))
    assert loader.collate_fn is not None
    assert len(loader.collate_fn(loader.dataset[1])) == 1


GPU = torch.device("meta")


def memory_for(most: int, available: int, asked: list[int]) -> Callable[[int], int]:
    """Trials on a device whose memory holds ``most`` tokens, with ``available`` tokens of data; notes what is asked."""

    def trial(tokens: int) -> int:
        asked.append(tokens)
        held = min(tokens, available)
        if held > most:
            raise torch.OutOfMemoryError("too many")
        return held

    return trial


def test_tokens_per_forward_are_doubled_until_a_gpus_memory_is_full(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []
    with caplog.at_level(logging.INFO, "smezo_pl"):
        assert token_budget(GPU, memory_for(10_000, 1 << 20, asked)) == 8192
    assert asked == [2048, 4096, 8192, 16384]
    assert [r.message for r in caplog.records] == [
        "eval_batch_size auto: 8192 tokens per forward; 16384 did not fit on meta"
    ]


def test_tokens_per_forward_are_doubled_until_all_data_fits(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[int] = []
    with caplog.at_level(logging.INFO, "smezo_pl"):
        assert token_budget(GPU, memory_for(1 << 30, 5000, asked)) == 16384
    assert asked == [2048, 4096, 8192, 16384]
    assert "16384 tokens per forward on meta, all that was tried fits" in caplog.text


def test_an_error_if_the_first_trial_does_not_fit() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="too many"):
        token_budget(GPU, memory_for(100, 5000, []))


def test_tokens_per_forward_on_a_cpu_are_a_fixed_number(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "smezo_pl"):
        assert token_budget(torch.device("cpu"), memory_for(0, 1, [])) == CPU_TOKENS
        assert find_token_budget(None, [], Collate(0)) == CPU_TOKENS
        assert find_token_budget(None, [], Collate(0, "lm", max_new_tokens=5)) == CPU_GENERATION_TOKENS
    assert f"eval_batch_size auto: {CPU_TOKENS} tokens per forward, which suits a CPU's caches" in caplog.text


def test_trials_run_the_modules_own_evaluation(
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a GPU with room for 300 tokens: found once, for all splits; then a run's batches keep to it."""
    module = SparseMeZOModule(make_tiny_model("llama"))
    module.tokenizer = tiny_tokenizer
    data = PromptDataModule("demo", num_train=8, num_dev=40, num_test=40)
    real, sizes = SparseMeZOModule.evaluate_batch, []

    def evaluate_batch(self: SparseMeZOModule, batch: object) -> object:
        sizes.append(batch.input_ids.numel())  # type: ignore[attr-defined]
        if sizes[-1] > 300:
            raise torch.OutOfMemoryError("too many")
        return real(self, batch)

    def budget(device: torch.device, trial: Callable[[int], int], on_cpu: int) -> int:
        return token_budget(GPU, trial)

    monkeypatch.setattr(SparseMeZOModule, "evaluate_batch", evaluate_batch)
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
