from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from smezo_pl.tasks.generation import generate

PROMPTS = ((5, 9, 30), (17, 40, 41, 42, 43, 44, 45), (8,), (300, 12, 11, 77))
PAD = 1


def padded(prompts: Sequence[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([(PAD,) * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([(0,) * (width - len(p)) + (1,) * len(p) for p in prompts]),
    }


@torch.no_grad()
def one_by_one(model: nn.Module, prompt: tuple[int, ...], count: int, stops: Sequence[int]) -> list[int]:
    """The whole text again for every token: no cache, no padding."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in stops:
            break
    answer = tokens[len(prompt) :]
    return answer + [PAD] * (count - len(answer))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bloom", "mpt"])
def test_greedy_tokens_are_those_of_one_prompt_at_a_time(
    kind: str, make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_tiny_model(kind)
    free = [one_by_one(model, prompt, 8, ()) for prompt in PROMPTS]
    # A token that ends one answer early and, if at all, the others at another place.
    stop = free[0][3]
    with torch.no_grad():
        answers = generate(model, **padded(PROMPTS), max_new_tokens=8, stop_ids=[stop], pad_id=PAD)
    assert answers.shape == (4, 8) and answers.dtype == torch.int64
    assert answers.tolist() == [one_by_one(model, prompt, 8, [stop]) for prompt in PROMPTS]
    assert answers[0].tolist() != free[0]


def test_it_ends_when_every_row_has(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model()
    calls = 0

    def count(*args: object) -> None:
        nonlocal calls
        calls += 1

    first = {one_by_one(model, prompt, 1, ())[0] for prompt in PROMPTS}
    with torch.no_grad(), model.register_forward_pre_hook(count):
        answers = generate(model, **padded(PROMPTS), max_new_tokens=8, stop_ids=sorted(first), pad_id=PAD)
    assert calls == 1
    assert (answers[:, 1:] == PAD).all()


def test_it_needs_a_token_to_make(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        generate(make_tiny_model(), **padded(PROMPTS), max_new_tokens=0, stop_ids=[], pad_id=PAD)
