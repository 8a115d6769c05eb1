"""Tiny random causal models of the architectures that people fine-tune."""

from collections.abc import Sequence

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

IDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 160,
}
WIDE = {**LLAMA, "head_dim": 8}
GPT2 = {**IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 160, "n_inner": 24}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
BLOCK = {**IDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SLIDING = {"sliding_window": 6}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}

PACKED: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", WIDE),
    "mistral": ("Mistral", {**WIDE, "sliding_window": None}),
    "mistral, window 6": ("Mistral", {**WIDE, **SLIDING}),
    "mixtral": ("Mixtral", {**WIDE, **MOE}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2, window 6": ("Qwen2", {**LLAMA, **SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", WIDE),
    "qwen3_moe": ("Qwen3Moe", {**WIDE, **MOE}),
    "gemma": ("Gemma", WIDE),
    "gemma2, window 6": ("Gemma2", {**WIDE, **MIXED}),
    "gemma3, window 6": ("Gemma3Text", {**WIDE, **MIXED}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", {**BLOCK, "intermediate_size": 24}),
    "gptj": ("GPTJ", {**GPT2, "rotary_dim": 4}),
    "opt": ("OPT", {**BLOCK, "ffn_dim": 24, "max_position_embeddings": 160, "word_embed_proj_dim": 8}),
    "phi": ("Phi", {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}),
    "phi3": ("Phi3", LLAMA),
    "phi3, window 6": ("Phi3", {**LLAMA, **SLIDING}),
    "olmo2": ("Olmo2", LLAMA),
    "smollm3": ("SmolLM3", LLAMA),
    "granite": ("Granite", LLAMA),
    "stablelm": ("StableLm", LLAMA),
    "cohere": ("Cohere", LLAMA),
    "starcoder2": ("Starcoder2", LLAMA),
    "falcon": ("Falcon", {**BLOCK, "alibi": False}),
}
"""Name, class of transformers and settings of those whose texts may share a row."""

APART: dict[str, tuple[str, dict[str, object]]] = {
    "bloom": ("Bloom", {**IDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "mpt": ("Mpt", {"vocab_size": 64, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 160}),
    "falcon, alibi": ("Falcon", {**BLOCK, "alibi": True}),
    "gpt_neo, window 6": (
        "GPTNeo",
        {
            **BLOCK,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 160,
            "window_size": 6,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gpt_bigcode": ("GPTBigCode", GPT2),
}
"""The same of those whose texts each need a row of their own."""


def build(name: str, **changes: object) -> PreTrainedModel:
    """The model of that name, the same bits every time."""
    kind, settings = {**PACKED, **APART}[name]
    config = getattr(transformers, f"{kind}Config")(**settings, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    # transformers starts with tiny weights, which would give every candidate nearly the same score.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    return model.eval()


@torch.no_grad()
def one_at_a_time(model: nn.Module, prompt: Sequence[int], candidate: Sequence[int]) -> float:
    """Mean log-probability of a candidate: one forward of it and its prompt alone, logits everywhere."""
    ids = [*prompt, *candidate]
    log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    positions = range(len(prompt), len(ids))
    return sum(float(log_probs[position - 1, ids[position]]) for position in positions) / len(candidate)
