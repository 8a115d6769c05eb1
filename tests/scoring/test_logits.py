import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_pl.data import Collate, Encoded
from smezo_pl.optim import SparseMeZO
from smezo_pl.scoring.evaluation import candidate_scores, loss_of, score_table
from smezo_pl.scoring.logits import allows_packing, model_logits, why_not_packed
from tests.scoring.architectures import APART, PACKED, build, one_at_a_time


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def examples() -> list[Encoded]:
    """A passage with two questions, one of which has long candidates that begin alike; and shorter texts."""
    passage = tokens(36, seed=0)
    return [
        Encoded((1, *passage, 5, 6), ((7,), (8,)), 1, (1,), 0),
        Encoded((1, 9, 10), ((11, 12, 13), (11, 12, 14), (15,)), 0, (0,), 1),
        Encoded((1, *passage, 5, 9, 4), (tokens(6, 1), tokens(3, 2), (*tokens(6, 1)[:4], 3)), 2, (0, 2), 2),
        Encoded((1, *tokens(12, 3)), ((7,), (8,)), 0, (0,), 3),
    ]


@torch.no_grad()
def scores_of(model: nn.Module, encoded: list[Encoded]) -> list[list[float]]:
    batch = Collate(pad_id=0)(encoded)
    table = score_table(candidate_scores(model_logits(model, batch), batch), batch)
    return [[value for value in row if value > -math.inf] for row in table.tolist()]


@pytest.mark.parametrize("name", [*PACKED, *APART])
def test_the_same_scores_as_one_candidate_at_a_time(name: str) -> None:
    model = build(name)
    assert (why_not_packed(model) is None) == (name in PACKED)
    for example, row in zip(examples(), scores_of(model, examples()), strict=True):
        plain = [one_at_a_time(model, example.prompt, candidate) for candidate in example.candidates]
        assert row == pytest.approx(plain, abs=1e-4)
        assert max(plain) - min(plain) > 1e-3
    # Texts that do not branch need no mask over pairs of tokens, and texts of one length no padding.
    for example in examples():
        alone = Encoded(example.prompt, example.candidates[:1], 0, (0,), 0)
        plain = [one_at_a_time(model, alone.prompt, alone.candidates[0])]
        assert scores_of(model, [alone])[0] == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2, window 6", "gpt2", "opt"])
def test_eager_attention(name: str) -> None:
    model = build(name, attn_implementation="eager")
    assert model.config._attn_implementation == "eager" and why_not_packed(model) is None
    for one, two in zip(scores_of(model, examples()), scores_of(build(name), examples()), strict=True):
        assert one == pytest.approx(two, abs=1e-4)


def test_what_stands_in_a_branch_is_not_seen_by_another() -> None:
    model = build("llama")
    example = Encoded((1, *tokens(9, 0)), (tokens(6, 1), tokens(6, 2)), 0, (0,), 0)
    other = Encoded(example.prompt, (tokens(6, 1), tokens(5, 3)), 0, (0,), 0)
    assert scores_of(model, [example])[0][0] == pytest.approx(scores_of(model, [other])[0][0], abs=1e-5)
    # The check can fail: with the branches in each other's sight the scores are others.
    batch = Collate(0)([example])
    with torch.no_grad():
        wrong = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[
            batch.logit_row, batch.logit_pos
        ]
        assert not torch.allclose(wrong, model_logits(model, batch), atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral, window 6", "gemma3, window 6", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("objective", ["classification", "lm"])
def test_a_step_on_shared_rows(name: str, objective: str) -> None:
    """Both perturbations give the same losses to the bit, and those of one candidate at a time within tolerance."""
    losses: dict[str, Any] = {}
    batch = Collate(0, objective)(examples())  # type: ignore[arg-type]
    for mode in ("layerwise", "in_place", "plain"):
        model = build(name)
        optimizer = SparseMeZO(model.named_parameters(), lr=1e-4, eps=1e-3, sparsity=0.5, kernel="torch")
        if mode == "layerwise":
            optimizer.attach(model)

        def shared(model: nn.Module = model) -> Tensor:
            total, weight = loss_of(candidate_scores(model_logits(model, batch), batch), batch)
            return total / weight

        def plain(model: nn.Module = model) -> Tensor:
            scores = [one_at_a_time(model, e.prompt, c) for e in examples() for c in e.candidates]
            total, weight = loss_of(torch.tensor(scores), batch)
            return total / weight

        seen = []
        for _ in range(3):
            optimizer.step(plain if mode == "plain" else shared)
            seen.append(optimizer.last_step.losses)
        losses[mode] = seen
    assert losses["layerwise"] == losses["in_place"]
    flat = {mode: [side for pairs in steps for pair in pairs for side in pair] for mode, steps in losses.items()}
    assert flat["in_place"] == pytest.approx(flat["plain"], abs=1e-4)
    assert len(set(flat["in_place"])) == 6


def test_a_model_that_does_not_allow_it_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build("bloom")
    with caplog.at_level(logging.INFO, "smezo_pl"):
        scores_of(model, examples())
        scores_of(model, examples())
    assert [r.message for r in caplog.records] == [
        "candidates do not share a row with their prompt: bloom is not known to take a mask over pairs of tokens; "
        "each is read with its prompt"
    ]


def test_other_reasons_against_a_shared_row() -> None:
    assert "Linear is not known to take" in str(why_not_packed(nn.Linear(2, 2)))
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "attention 'flash_attention_2' takes no mask" in str(why_not_packed(model))
    model = build("llama")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert "it has layers of chunked_attention" in str(why_not_packed(model))
    assert not allows_packing(model)


@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
def test_adapters_of_peft(adapter: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[adapter]()
    model = peft.get_peft_model(build("llama"), config).eval()
    assert (why_not_packed(model) is None) == (adapter == "lora")
    together = scores_of(model, examples())
    for example, row in zip(examples(), together, strict=True):
        # One row and no mask: the model with its adapter as it is.
        for candidate, score in zip(example.candidates, row, strict=True):
            alone = scores_of(model, [Encoded(example.prompt, (candidate,), 0, (0,), 0)])
            assert score == pytest.approx(alone[0][0], abs=1e-5)
    plain = scores_of(build("llama"), examples())
    assert (
        max(abs(a - b) for one, two in zip(plain, together, strict=True) for a, b in zip(one, two, strict=True)) > 1e-3
    )


def test_logits_are_computed_where_they_are_read_alone() -> None:
    model, seen = build("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    batch = Collate(0)(examples())
    with torch.no_grad():
        logits = model_logits(model, batch)
    assert seen == [(1, len(batch.logit_row), 64)] and logits.shape == (len(batch.logit_row), 64)
    assert len(batch.logit_row) < int(batch.attention_mask.sum()) / 3
    assert not model.lm_head._forward_pre_hooks


def test_a_head_is_left_as_it_was_when_the_forward_fails() -> None:
    model = build("llama")
    model.model.layers[1].forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        scores_of(model, examples())
    assert not model.lm_head._forward_pre_hooks


class Plain(nn.Module):
    """Logits that are its input, at every position; takes down what it is called with."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.seen = {"attention_mask": attention_mask}
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids, 64).float())


class Keeping(Plain):
    def forward(  # type: ignore[override]
        self, input_ids: Tensor, use_cache: bool = True, logits_to_keep: int | Tensor = 0
    ) -> SimpleNamespace:
        self.seen = {"use_cache": use_cache, "logits_to_keep": logits_to_keep}
        return SimpleNamespace(logits=nn.functional.one_hot(input_ids, 64).float()[:, logits_to_keep])


def test_a_model_without_a_head_is_given_what_it_takes() -> None:
    batch = Collate(1)([Encoded((5, 6, 7, 8), ((1, 2), (3, 4)), 0, (0,), 0)])
    plain, keeping = Plain(), Keeping()
    assert torch.equal(model_logits(plain, batch), model_logits(keeping, batch))
    # The prompt's last token, and the first of each candidate.
    assert model_logits(plain, batch).argmax(-1).tolist() == [8, 1, 3]
    assert keeping.seen["use_cache"] is False and keeping.seen["logits_to_keep"].tolist() == [3, 4]
    assert plain.seen["attention_mask"].all()


def test_a_compiled_model_is_read_without_touching_its_graph() -> None:
    model = build("gpt2")
    wrapped = torch.compile(model, backend="eager")
    before = scores_of(model, examples())
    for one, two in zip(before, scores_of(wrapped, examples()), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
