"""Losses row by row: which row of the batch each row of a forward is, over parts and over processes."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smezo_pl import SparseMeZOModule
from smezo_pl.data import Collate, Encoded, PromptBatch
from smezo_pl.data.batch import Calibration, GenerationPrompts, split_batch
from smezo_pl.optim.rows import current_rows, rows
from smezo_pl.scoring import evaluation, neighbors
from smezo_pl.scoring.evaluation import example_losses, scores_of
from smezo_pl.scoring.logits import model_logits
from smezo_pl.scoring.row_losses import GlobalRows, row_losses, row_rewards
from smezo_pl.tasks.metrics import Answer
from tests.scoring.architectures import build
from tests.scoring.rowwise import own_biases
from tests.scoring.test_logits import tokens
from tests.scoring.test_neighbors import LIMIT, ROPE

ROWS = [0, 1, 0, 2, 3, 3, 0, 4]
"""The row of each example: three and two of them share a passage."""


def examples() -> list[Encoded]:
    one, two = tokens(36, seed=0), tokens(33, seed=7)
    return [
        Encoded((1, *one, 5, 6), ((7,), (8,)), 1, (1,), 0),
        Encoded((1, 9, 10), ((11, 12, 13), (11, 12, 14), (15,)), 0, (0,), 1),
        Encoded((1, *one, 5, 9, 4), (tokens(6, 1), tokens(3, 2), (*tokens(6, 1)[:4], 3)), 2, (0, 2), 2),
        Encoded((1, *tokens(12, 3)), ((7,), (8,)), 0, (0,), 3),
        Encoded((1, *two, 9), ((7, 9), (8, 9)), 0, (0,), 4),
        Encoded((1, *two), ((7,), (8, 10)), 1, (1,), 5),
        Encoded((1, *one), ((6,), (3,)), 1, (1,), 6),
        Encoded((1, *tokens(12, 5)), ((7,), (8,)), 1, (1,), 7),
    ]


def collated(objective: Literal["classification", "lm"] = "classification", **changes: Any) -> PromptBatch:
    return Collate(0, objective, **changes)(examples())


def module_of(model: nn.Module, rank: int = 0, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Any:
    """What `row_losses` needs of a LightningModule."""
    module = SparseMeZOModule(model)
    trainer = SimpleNamespace(world_size=1, strategy=SimpleNamespace(all_gather=gather))
    return SimpleNamespace(
        model=model, trainer=trainer, global_rank=rank, device=torch.device("cpu"), losses=module.losses,
        text_tokenizer=lambda: None, loss=module.loss,
    )  # fmt: skip


def in_processes(count: int, run: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Results of ``run(rank, gather)`` in threads that stand for processes."""
    barrier, given, results = threading.Barrier(count, timeout=30), [torch.empty(0)] * count, [None] * count

    def process(rank: int) -> None:
        def gather(tensor: Tensor) -> Tensor:
            given[rank] = tensor
            barrier.wait()
            together = torch.stack(given)
            barrier.wait()
            return together

        with torch.no_grad():
            results[rank] = run(rank, gather)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("objective", ["classification", "lm"])
@torch.no_grad()
def test_a_rows_number_is_the_sum_over_its_examples(objective: Literal["classification", "lm"]) -> None:
    module, batch = SparseMeZOModule(build("llama")), collated(objective)
    assert (batch.example_row.tolist(), batch.row_number.tolist()) == (ROWS, [0, 1, 2, 3, 4])
    weight = 8 if objective == "classification" else 16
    expected = [0.0] * 5
    for row, example in zip(ROWS, examples(), strict=True):
        alone = Collate(0, objective)([example])
        losses, tokens_or_one = example_losses(scores_of(module.model, alone), alone)
        assert tokens_or_one == (len(example.candidates[example.label]) if objective == "lm" else 1)
        expected[row] += float(losses) * 5 / weight
    losses = module.losses(batch)
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)
    assert float(losses.mean()) == pytest.approx(float(module.loss(batch)), rel=1e-6)
    assert len({round(loss, 3) for loss in expected}) == 5


@pytest.mark.parametrize("name", ["llama", "mistral, window 6", "bloom", "dynamic"])
@pytest.mark.parametrize("micro", [None, 1, 3])
@torch.no_grad()
def test_each_example_is_read_under_the_number_of_its_row(
    name: str, micro: int | None, make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    """Also in parts that share rows, in rows of its own, at selected positions and in the check beside others."""
    if name == "dynamic":
        model: Any = make_tiny_model("llama", max_position_embeddings=LIMIT, rope_parameters=dict(ROPE[name]))
    else:
        model = build(name)
    batch = collated()
    with own_biases(model, rows=5) as seen:
        found = row_losses(module_of(model), split_batch(batch, micro))
        assert {number for forward in seen for number in forward} == {0, 1, 2, 3, 4}
        expected = [0.0] * 5
        for row, example in zip(ROWS, examples(), strict=True):
            alone = Collate(0)([example])
            with rows(torch.tensor([row])):
                expected[row] += float(example_losses(scores_of(model, alone), alone)[0]) * 5 / 8
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    plain = SparseMeZOModule(model).losses(batch)
    assert (found - plain).abs().min() > 1e-2  # without the biases they are others


@torch.no_grad()
def test_the_check_for_neighbors_reads_its_example_as_its_row(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = build("llama"), collated()
    with own_biases(model, rows=9) as seen, rows(torch.tensor([8, 6, 2, 0, 1])):
        scores_of(model, batch)
    assert seen == [[8, 6, 2, 0, 1], [6]]
    assert model in neighbors._checked and "depend on its neighbors" not in caplog.text


@pytest.mark.parametrize("micro", [None, 2])
@torch.no_grad()
def test_processes_number_the_rows_as_one_does(micro: int | None) -> None:
    few = [Encoded((1, *tokens(3 + n, n)), ((7,), (8,)), n % 2, (n % 2,), n) for n in range(8)]

    models = [build("llama") for _ in range(4)]  # here, as they come from torch's generator

    def losses_of(rank: int, world: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        module = module_of(models[rank], rank, gather)
        module.trainer.world_size = world
        with own_biases(module.model, rows=8):
            return row_losses(module, split_batch(Collate(0)(few[rank::world]), micro))

    whole = losses_of(0, 1, lambda tensor: tensor)
    assert len(set(whole.tolist())) == 8
    for world in (2, 4):
        results = in_processes(world, lambda rank, gather, world=world: losses_of(rank, world, gather))  # type: ignore[misc]
        for result in results:
            assert torch.equal(result, results[0])
        torch.testing.assert_close(results[0], whole, rtol=1e-4, atol=1e-5)


def test_processes_with_different_numbers_of_rows_leave_no_gap() -> None:
    batches = [torch.arange(float(n)) for n in (3, 1, 2)]

    def run(rank: int, gather: Callable[[Tensor], Tensor]) -> tuple[list[int], list[float]]:
        every = GlobalRows([(batches[rank],)], gather, rank, torch.device("cpu"))
        return every.numbers[0].tolist(), every.joined([batches[rank] + 10 * rank]).tolist()

    results = in_processes(3, run)
    assert [numbers for numbers, _ in results] == [[0, 3, 5], [1], [2, 4]]
    assert [losses for _, losses in results] == [[0, 10, 20, 1, 21, 2]] * 3


def test_other_batches_are_numbered_by_position() -> None:
    x = torch.arange(14.0).reshape(7, 2)
    module = module_of(nn.Linear(1, 1))
    numbers: list[list[int]] = []

    def losses(part: list[Tensor]) -> Tensor:
        now = current_rows()
        assert now is not None
        numbers.append(now.tolist())
        return part[0].sum(1)

    module.losses = losses
    assert row_losses(module, split_batch([x], 3)).tolist() == x.sum(1).tolist()
    assert numbers == [[0, 1, 2], [3, 4, 5], [6]]
    module.losses = lambda part: part[0].sum()
    with pytest.raises(ValueError, match=r"losses must return one number for each of the 7 rows .*of shape \(\)"):
        row_losses(module, [[x]])


def test_rows_of_a_batch_that_was_cut_before_close_up() -> None:
    batch = collated().take(torch.tensor([7, 3, 1]))
    assert batch.row_number.tolist() == [1, 2, 4]
    every = GlobalRows(batch.split(2), lambda tensor: tensor.unsqueeze(0), 0, torch.device("cpu"))
    assert sorted(number for part in every.numbers for number in part.tolist()) == [0, 1, 2]


def answers(parts: list[PromptBatch], texts: dict[int, str]) -> list[list[Answer]]:
    return [[Answer(int(n), texts[int(n)], ("b",), correct=texts[int(n)] == "b") for n in part.index] for part in parts]


@pytest.mark.parametrize("micro", [None, 3])
def test_a_rows_reward_is_that_of_its_answers(micro: int | None) -> None:
    batch = collated(reward="em")
    parts = split_batch(batch, micro)
    found = row_rewards(parts, answers(parts, dict(enumerate("abbbbabb"))))
    every = GlobalRows(parts, lambda tensor: tensor.unsqueeze(0), 0, torch.device("cpu")).joined(found)
    # Wrong answers: examples 0 and 5, in rows 0 and 3.
    assert every.tolist() == pytest.approx([5 / 8, 0, 0, 5 / 8, 0])


def test_calibrated_answers_have_no_rows_of_their_own() -> None:
    batch = collated(reward="accuracy")
    batch.calibration = Calibration(batch, torch.zeros(1))
    with pytest.raises(ValueError, match="objective 'accuracy' with calibration: .* set calibration='none'"):
        row_rewards([batch], [[]])


def test_prompts_to_generate_after_have_a_row_each_only_where_answers_are_rewarded() -> None:
    texts = [Encoded(e.prompt, e.candidates, e.label, e.correct, e.index) for e in examples()]
    for reward, expected in ((None, 5), ("em", 8)):
        batch = Collate(0, reward=reward, max_new_tokens=4)(texts)
        assert batch.num_rows == expected
    assert batch.example_row.tolist() == list(range(8))


@torch.no_grad()
def test_answers_are_generated_under_the_number_of_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Collate(0, reward="em", max_new_tokens=2)(examples())
    seen: list[list[int]] = []

    def generated(model: nn.Module, prompts: GenerationPrompts, tokenizer: Any) -> list[str]:
        now = current_rows()
        assert now is not None
        seen.append(now.tolist())
        return ["b"] * len(prompts.input_ids)

    monkeypatch.setattr(evaluation, "generated", generated)
    found = row_losses(module_of(build("llama")), batch.split(3))
    assert found.tolist() == [1.0] * 8  # no references
    lengths = batch.attention_mask.sum(1)
    assert [n for part in seen for n in part] == lengths.argsort(stable=True).tolist()


@torch.no_grad()
def test_texts_in_rows_of_their_own_are_of_the_row_that_they_were_in() -> None:
    model, batch = build("bloom"), collated()
    with own_biases(model, rows=5) as seen:
        model_logits(model, batch)
    (numbers,) = seen
    assert sorted(numbers) == numbers and len(numbers) > batch.num_rows
    separate, row = batch.separated()
    assert row.tolist() == separate.row_number.tolist() and row.unique().tolist() == [0, 1, 2, 3, 4]
    texts = {tuple(text) for text in separate.input_ids[row == 1].tolist()}
    assert {text[:3] for text in texts} == {(1, 9, 10)}
