"""An example scores the same beside any other: rotary positions that depend on lengths; what is said of the rest."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl.data import Collate, Encoded, Encoder
from smezo_pl.scoring.evaluation import candidate_scores, scores_of
from smezo_pl.scoring.generation import generate
from smezo_pl.scoring.linear_probe import LinearProbe
from smezo_pl.scoring.logits import model_logits
from smezo_pl.scoring.neighbors import length_limit
from smezo_pl.tasks import Example
from tests.scoring.test_generation import one_by_one, padded
from tests.scoring.test_scoring import flat

LIMIT = 24
ROPE: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": LIMIT,
    },
}


@pytest.fixture(params=ROPE)
def rotary(request: pytest.FixtureRequest, make_tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_tiny_model("llama", max_position_embeddings=LIMIT, rope_parameters=dict(ROPE[request.param]))


@pytest.fixture(scope="module")
def encoded(tiny_tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Texts below, at and beyond the limit; candidates that begin one another; a prompt that begins another."""
    words = "the movie was nice and good because it was lovely the food is poor and the hotel was awful so " * 3
    passage = " ".join(words.split()[:40])
    prompts = ["food", "room " * (LIMIT - 4), passage, passage + " question answer", " ".join(words.split()[:30])]
    texts = (" a", " a nice story", " it was worse.")
    return Encoder(tiny_tokenizer).encode([Example(p, texts, n % 3, (n % 3,), n) for n, p in enumerate(prompts)])


def fresh(model: nn.Module, example: Encoded) -> list[float]:
    """One candidate at a time, without its last token, each read by a model that has read nothing before."""
    found = []
    for tokens in example.candidates:
        ids = [*example.prompt, *tokens[:-1]]
        logits = copy.deepcopy(model)(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        ends = enumerate(tokens, len(example.prompt) - 1)
        found.append(sum(float(logits[position, token]) for position, token in ends) / len(tokens))
    return found


@torch.no_grad()
def test_scores_are_those_of_one_candidate_at_a_time(
    rotary: PreTrainedModel, encoded: list[Encoded], caplog: pytest.LogCaptureFixture
) -> None:
    assert length_limit(rotary.config) == LIMIT
    assert min(example.length for example in encoded) < LIMIT < max(example.length for example in encoded)
    expected = [fresh(rotary, example) for example in encoded]
    batch = Collate(0)(encoded)
    assert batch.branching and batch.num_rows < len(encoded)
    for _ in range(2):  # also after longer texts were read
        assert scores_of(rotary, batch).tolist() == pytest.approx(flat(expected), abs=2e-5)
    for part in batch.split(2):
        wanted = flat([expected[n] for n in part.index.tolist()])
        assert scores_of(rotary, part).tolist() == pytest.approx(wanted, abs=2e-5)
    assert "depend on its neighbors" not in caplog.text
    # Without a row of its own for each text they would be others.
    shared = candidate_scores(model_logits(rotary, batch), batch).tolist()
    assert shared != pytest.approx(flat(expected), abs=1e-3)


@torch.no_grad()
def test_a_linear_probe_reads_features_of_texts_alone(rotary: PreTrainedModel, encoded: list[Encoded]) -> None:
    probe = LinearProbe(rotary)
    nn.init.normal_(probe.head.weight, generator=torch.Generator().manual_seed(0))
    single = [Encoded(each.prompt, ((5,), (9,)), 0, (0,), each.index) for each in encoded]
    batch = Collate(0)(single)
    alone = [value for each in single for value in scores_of(probe, Collate(0)([each])).tolist()]
    assert scores_of(probe, batch).tolist() == pytest.approx(alone, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_generated_tokens_are_those_of_one_prompt_at_a_time(
    rotary: PreTrainedModel, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 300, (n,), generator=generator).tolist()) for n in (5, 22, 30, 41)]
    if not cached:
        monkeypatch.setattr("smezo_pl.scoring.generation._read", lambda *_: None)
    together = generate(rotary, **padded(prompts), max_new_tokens=6, stop_ids=[], pad_id=1).tolist()
    alone = [generate(rotary, **padded([p]), max_new_tokens=6, stop_ids=[], pad_id=1)[0].tolist() for p in prompts]
    assert together == alone
    if not cached:
        assert together == [one_by_one(copy.deepcopy(rotary), prompt, 6, ()) for prompt in prompts]


class Mixing(nn.Module):
    """A head behind a normalization over the batch."""

    def __init__(self, head: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(width, track_running_stats=False), head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(hidden.flatten(0, -2)).reshape(hidden.shape))


@torch.no_grad()
def test_what_else_mixes_a_batch_is_said_once(
    make_tiny_model: Callable[..., PreTrainedModel], encoded: list[Encoded], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "smezo_pl")
    batch, fine = Collate(0)(encoded), make_tiny_model("llama")
    for _ in range(2):
        scores_of(fine, batch)
    assert "depend on its neighbors" not in caplog.text
    mixing = make_tiny_model("llama")
    mixing.model.norm = nn.Sequential(mixing.model.norm, Mixing(nn.Identity(), 32))
    scores_of(mixing, Collate(0)(encoded[:1]))
    assert "depend on its neighbors" not in caplog.text
    for _ in range(2):
        scores_of(mixing, batch)
    assert caplog.text.count("the scores of an example depend on its neighbors in the batch, by up to") == 1
    assert "the likely cause is a batch normalization that takes its statistics from the batch" in caplog.text


def test_a_model_that_cannot_read_an_example_alone_is_trained_on_with_a_warning(
    make_tiny_model: Callable[..., PreTrainedModel], encoded: list[Encoded], caplog: pytest.LogCaptureFixture
) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(32, track_running_stats=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + self.norm(hidden.mean(1)).unsqueeze(1)

    model = make_tiny_model("gpt2")  # whose candidates share a row
    model.transformer.ln_f = nn.Sequential(model.transformer.ln_f, Pooled())
    assert scores_of(model, Collate(0)(encoded)).requires_grad
    assert "(one alone gives: Expected more than 1 value per channel" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_a_neighbor(
    dtype: torch.dtype,
    make_tiny_model: Callable[..., PreTrainedModel],
    encoded: list[Encoded],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for seed in range(4):
        for kind in ("llama", "gpt2", "bloom"):
            scores_of(make_tiny_model(kind, seed=seed).to(dtype), Collate(0)(encoded))
    assert "depend on its neighbors" not in caplog.text
