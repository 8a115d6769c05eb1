from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from smezo_pl.optim.rows import rows
from smezo_pl.scoring import generation
from smezo_pl.scoring.generation import generate
from tests.scoring.architectures import APART, PACKED, build
from tests.scoring.rowwise import own_biases

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
    # A token that ends one answer early and, if at all, the others at another position.
    stop = free[0][3]
    with torch.no_grad():
        answers = generate(model, **padded(PROMPTS), max_new_tokens=8, stop_ids=[stop], pad_id=PAD)
    assert answers.shape == (4, 8) and answers.dtype == torch.int64
    assert answers.tolist() == [one_by_one(model, prompt, 8, [stop]) for prompt in PROMPTS]
    assert answers[0].tolist() != free[0]


@pytest.mark.parametrize("name", [*PACKED, *APART])
@pytest.mark.parametrize("part", [4, 20])
def test_reading_in_parts_and_leaving_rows_change_nothing(
    name: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve prompts of 1 to 13 tokens, windows of 6, rows that end from the first token on."""
    monkeypatch.setattr(generation, "_CPU_PART", part)
    monkeypatch.setattr(generation, "ROOM_BYTES", 40_000)
    model = build(name)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 64, (1 + 5 * i % 13,), generator=generator).tolist()) for i in range(12)]
    free = [one_by_one(model, prompt, 12, ()) for prompt in prompts]
    stops = [free[1][2], free[2][5], free[4][0]]
    with torch.no_grad():
        answers = generate(model, **padded(prompts), max_new_tokens=12, stop_ids=stops, pad_id=PAD)
    expected = [one_by_one(model, prompt, 12, stops) for prompt in prompts]
    assert answers.tolist() == expected
    assert len({answer.count(PAD) for answer in expected}) > 1


@pytest.mark.parametrize("name", ["llama", "gemma2, window 6", "bloom", "uncached"])
@torch.no_grad()
def test_each_row_is_generated_under_its_own_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in parts, joined, when rows have left, and without a cache."""
    monkeypatch.setattr(generation, "_CPU_PART", 12)
    monkeypatch.setattr(generation, "ROOM_BYTES", 40_000)
    model = build("llama" if name == "uncached" else name)
    if name == "uncached":
        monkeypatch.setattr(generation, "has_virtual_tokens", lambda model: True)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 64, (1 + 5 * i % 13,), generator=generator).tolist()) for i in range(12)]
    numbers = torch.randperm(12, generator=generator)
    with own_biases(model, rows=12, scale=0.1) as seen:

        def alone(row: int, stops: Sequence[int]) -> list[int]:
            with rows(numbers[row].reshape(1)):
                return one_by_one(model, prompts[row], 12, stops)

        stops = [alone(1, ())[2], alone(2, ())[5], alone(4, ())[0]]
        expected = [alone(row, stops) for row in range(12)]
        seen.clear()
        with rows(numbers):
            answers = generate(model, **padded(prompts), max_new_tokens=12, stop_ids=stops, pad_id=PAD)
    assert answers.tolist() == expected
    assert len({answer.count(PAD) for answer in expected}) > 1 and len({len(forward) for forward in seen}) > 2


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
    prompts = [(5, 9, 30), (17, 40, 41, 42, 43), (8,)]
    expected = [one_by_one(model, prompt, 6, ()) for prompt in prompts]
    with torch.no_grad():
        answers = generate(model, **padded(prompts), max_new_tokens=6, stop_ids=[], pad_id=PAD)
    assert answers.tolist() == expected
    assert expected != [one_by_one(build("llama"), prompt, 6, ()) for prompt in prompts]


def test_rows_that_have_ended_are_read_no_more() -> None:
    model, sizes = build("llama"), []
    prompts = [(5, 9, 30), (17, 40, 41, 42, 43), (8,), (33, 12, 11)]
    free = [one_by_one(model, prompt, 8, ()) for prompt in prompts]
    stops = [free[0][0], free[1][1]]
    ends = [
        len(one_by_one(model, prompt, 8, stops)) - one_by_one(model, prompt, 8, stops).count(PAD) for prompt in prompts
    ]
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    with torch.no_grad():
        generate(model, **padded(prompts), max_new_tokens=8, stop_ids=stops, pad_id=PAD)
    handle.remove()
    # At most a third more rows are read than still run.
    assert sizes[0] == 4 and sizes[-1] < 4
    for position, size in enumerate(sizes[1:], 1):
        assert size * 0.75 < sum(end > position for end in ends) <= size


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
