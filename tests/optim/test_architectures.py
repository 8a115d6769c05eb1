"""Layer by layer and in place give the same losses on the architectures people fine-tune, at tiny random size."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from torch import Tensor, nn

from smezo_pl.optim import SparseMeZO
from tests.optim.changed import check_rows

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
GPT = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
GPT2 = {**GPT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 24}

CAUSAL: dict[str, dict[str, object]] = {
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": LLAMA,
    "Qwen3Moe": {**LLAMA, **MOE},
    "Gemma": LLAMA,
    "Gemma2": LLAMA,
    "Gemma3Text": LLAMA,
    "Phi": {key: value for key, value in LLAMA.items() if key not in ("head_dim", "num_key_value_heads")},
    "Phi3": LLAMA,
    "Mixtral": {**LLAMA, **MOE},
    "Olmo2": LLAMA,
    "SmolLM3": LLAMA,
    "Granite": LLAMA,
    "StableLm": {key: value for key, value in LLAMA.items() if key != "head_dim"},
    "Cohere": {key: value for key, value in LLAMA.items() if key != "head_dim"},
    "OPT": {
        **GPT,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 8,
    },
    "GPT2": GPT2,
    "GPTNeo": {
        **GPT,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "attention_types": [[["global", "local"], 1]],
    },
    "GPTJ": {**GPT2, "rotary_dim": 4},
    "GPTNeoX": {**BERT, "bos_token_id": 1, "eos_token_id": 2},
    "GPTBigCode": GPT2,
    "Bloom": {**GPT, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "Falcon": {**GPT, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "Mpt": {"vocab_size": 64, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32},
}
MASKED: dict[str, dict[str, object]] = {
    "Bert": BERT,
    "Roberta": BERT,
    "DistilBert": {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
}


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "T5":
            config = transformers.T5Config(
                vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
            return transformers.T5ForConditionalGeneration(config).eval()
        settings = CAUSAL.get(name) or MASKED[name]
        config = getattr(transformers, f"{name}Config")(**settings)
        auto = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModelForMaskedLM
        return auto.from_config(config).eval()


def forward_loss(model: nn.Module, name: str, padded: bool = True, reduction: str = "mean") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = not padded
    extra: dict[str, object] = {"decoder_input_ids": ids[:, :4]} if name == "T5" else {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = 1  # torch takes another path for the head's non-contiguous input
    logits = model(input_ids=ids, attention_mask=mask, **extra).logits
    return nn.functional.cross_entropy(logits[:, -1].to(model.dtype), ids[:, 0], reduction=reduction)


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED, "T5"])
def test_both_modes_give_the_same_losses(name: str) -> None:
    losses = {}
    for mode in ("layerwise", "in_place"):
        model = build(name)
        optimizer = SparseMeZO(model.named_parameters(), lr=1e-3, eps=1e-2, sparsity=0.8)
        if mode == "layerwise":
            optimizer.attach(model)
        reports = []
        for _ in range(2):
            optimizer.step(lambda model=model: forward_loss(model, name))
            reports.append(optimizer.last_step.losses)
        losses[mode] = reports
    assert losses["layerwise"] == losses["in_place"]
    assert all(plus != minus for report in losses["layerwise"] for plus, minus in report)


FAST = [("OPT", 1), ("GPT2", 1), ("Gemma", 1), ("Mixtral", 1), ("Falcon", 1), ("Bert", None), ("T5", None)]


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        pytest.param(name, rank, marks=[] if (name, rank) in FAST else pytest.mark.slow)
        for name in (*CAUSAL, *MASKED, "T5")
        for rank in (1, 2, None)
    ],
)
def test_each_row_sees_its_own_direction(name: str, rank: int | None) -> None:
    model = build(name).double()
    model.set_experts_implementation("eager")  # the others know no float64
    # in float64 the additive masks of some are minus infinity where nothing is left to attend to
    padded = name not in ("Gemma2", "Bloom", "Mpt")
    optimizer = check_rows(model, lambda: forward_loss(model, name, padded, "none"), 3, rank)
    names = dict(zip(optimizer.param_groups[0]["numbers"], optimizer.param_groups[0]["names"], strict=True))
    shared = {name for number, name in names.items() if optimizer.last_step.shared >> number & 1}
    assert all("experts" in name or "relative_attention_bias" in name for name in shared)


def test_adapters_see_the_direction_of_each_row() -> None:
    import peft

    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}
    model = (
        peft.get_peft_model(build("Llama"), peft.LoraConfig(r=2, init_lora_weights=False, **targets)).double().eval()
    )
    optimizer = check_rows(model, lambda: forward_loss(model, "Llama", True, "none"), 3, 1)
    assert optimizer.last_step.shared == 0
