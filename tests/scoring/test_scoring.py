import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl.data import Collate, Encoded, Encoder, PromptBatch
from smezo_pl.scoring.evaluation import (
    candidate_scores,
    correct_predictions,
    loss_of,
    predictions,
    score_table,
)
from smezo_pl.scoring.logits import model_logits
from smezo_pl.tasks import Example, get_task, make_example

KINDS = ("gpt2", "opt", "llama", "bloom", "mpt")


@pytest.fixture(scope="module")
def encoded(tiny_tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Examples of very different lengths; candidates of one token, of several, and that begin one another."""
    examples = [
        Example("the movie was nice and good because it was lovely It was", (" terrible", " great"), 1, (1,), 0),
        Example("food", (" a", " a nice story", " a nice room and a service"), 2, (0, 2), 1),
        make_example(get_task("rte"), {"premise": "the food is poor " * 6, "hypothesis": "bad food", "label": 0}, 2),
        Example("It was awful so", (" the hotel was better.", " it was worse."), 0, (0,), 3),
    ]
    return Encoder(tiny_tokenizer).encode(examples)


@torch.no_grad()
def one_at_a_time(model: nn.Module, example: Encoded) -> list[float]:
    """Mean log-probability of each candidate: one unpadded forward a candidate, logits everywhere."""
    means = []
    for tokens in example.candidates:
        ids = [*example.prompt, *tokens]
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        positions = range(len(example.prompt), len(ids))
        means.append(sum(float(log_probs[position - 1, ids[position]]) for position in positions) / len(tokens))
    return means


@torch.no_grad()
def scores_of(model: nn.Module, batch: PromptBatch) -> list[list[float]]:
    table = score_table(candidate_scores(model_logits(model, batch), batch), batch)
    return [[value for value in row if value > -math.inf] for row in table.tolist()]


def flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_depends_on_neither_padding_nor_neighbours(
    kind: str, encoded: list[Encoded], make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_tiny_model(kind)
    collate = Collate(pad_id=1)
    together = scores_of(model, collate(encoded))
    for example, row in zip(encoded, together, strict=True):
        plain = one_at_a_time(model, example)
        assert row == pytest.approx(plain, abs=1e-5)
        assert scores_of(model, collate([example]))[0] == pytest.approx(plain, abs=1e-5)
        # The scores differ, so the comparison says something.
        assert max(plain) - min(plain) > 1e-3
    # Not even on what stands in the padding.
    assert flat(scores_of(model, Collate(pad_id=17)(encoded))) == pytest.approx(flat(together), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [1, 3])
def test_parts_of_a_batch_add_up(
    kind: str, micro: int, encoded: list[Encoded], make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_tiny_model(kind)
    for collate in (Collate(1), Collate(1, "lm"), Collate(1, "lm", gold_only=True)):
        batch = collate(encoded)
        with torch.no_grad():
            whole = loss_of(candidate_scores(model_logits(model, batch), batch), batch)
            parts = [loss_of(candidate_scores(model_logits(model, p), p), p) for p in batch.split(micro)]
        assert sum(weight for _, weight in parts) == whole[1]
        assert sum(float(total) for total, _ in parts) == pytest.approx(float(whole[0]), abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_adapters_of_peft(
    kind: str, adapter: str, encoded: list[Encoded], make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    if adapter == "lora":
        target = {"gpt2": "c_attn"}.get(kind, "q_proj")
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=[target], init_lora_weights=False, fan_in_fan_out=kind == "gpt2"
        )
    else:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make_tiny_model(kind), config).eval()
    collate = Collate(1)
    together = scores_of(model, collate(encoded))
    for example, row in zip(encoded, together, strict=True):
        assert row == pytest.approx(scores_of(model, collate([example]))[0], abs=1e-5)
    plain = scores_of(make_tiny_model(kind), collate(encoded))
    assert max(abs(a - b) for a, b in zip(flat(plain), flat(together), strict=True)) > 1e-3


def two_examples(objective: str) -> PromptBatch:
    """Example 0: candidates of 1 and 2 tokens, the second correct. Example 1: three of one token, the first correct."""
    examples = [
        Encoded((9,), ((0,), (1, 2)), 1, (1,), 0),
        Encoded((9,), ((0,), (1,), (2,)), 0, (0, 2), 1),
    ]
    return Collate(0, objective)(examples)  # type: ignore[arg-type]


SCORES = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.25])


def test_classification_is_cross_entropy_over_the_candidates() -> None:
    total, weight = loss_of(SCORES, two_examples("classification"))
    first = math.log(math.exp(-1) + math.exp(-2)) + 2
    second = math.log(math.exp(-0.5) + math.exp(-3) + math.exp(-0.25)) + 0.5
    assert weight == 2
    assert float(total) == pytest.approx(first + second, abs=1e-6)
    assert total.dtype == torch.float32


def test_lm_is_the_answers_tokens() -> None:
    total, weight = loss_of(SCORES, two_examples("lm"))
    assert weight == 2 + 1
    assert float(total) == pytest.approx(2 * 2.0 + 0.5, abs=1e-6)


def test_predictions_and_which_count_as_right() -> None:
    batch = two_examples("classification")
    assert predictions(SCORES, batch).tolist() == [0, 2]
    assert correct_predictions(predictions(SCORES, batch), batch).tolist() == [False, True]
    assert predictions(torch.zeros(5), batch).tolist() == [0, 0]


def test_no_loss_without_labels() -> None:
    batch = Collate(0)([Encoded((9,), ((0,), (1,)), -1, (), 0)])
    with pytest.raises(ValueError, match="label is unknown"):
        loss_of(torch.zeros(2), batch)
    assert predictions(torch.tensor([0.0, 1.0]), batch).tolist() == [1]


def test_scores_of_half_precision_logits_are_float32() -> None:
    batch = two_examples("classification")
    logits = torch.randn(len(batch.logit_row), 16, generator=torch.Generator().manual_seed(0))
    half = logits.bfloat16()
    assert candidate_scores(half, batch).dtype == torch.float32
    assert torch.equal(candidate_scores(half, batch), candidate_scores(half.float(), batch))
