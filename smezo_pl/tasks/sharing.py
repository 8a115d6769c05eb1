"""What a model allows: texts that begin alike in one row, behind a mask that keeps their branches apart."""

import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from smezo_pl.data.batch import PromptBatch

logger = logging.getLogger(__name__)

PACKABLE = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gpt2"),
    *("gpt_neox", "opt", "phi", "phi3", "olmo2", "smollm3", "granite", "stablelm", "cohere", "starcoder2", "gptj"),
    "falcon",
}
"""Types of transformers that take a mask over pairs of tokens and a position for each token, as the tests have seen."""

_KINDS_OF_LAYER = {"full_attention", "sliding_attention"}
_said: "WeakSet[nn.Module]" = WeakSet()


def network_config(model: nn.Module) -> Any:
    """The configuration of a language model of transformers, also inside PEFT's wrapper; None if there is none."""
    base = getattr(model, "get_base_model", None)
    config: Any = getattr(base() if callable(base) else model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def why_not_packed(model: nn.Module) -> str | None:
    """Why texts cannot share a row of this model; None if they can."""
    config = network_config(model)
    kind = getattr(config, "model_type", None)
    if kind not in PACKABLE or getattr(config, "alibi", False):
        return f"{kind or type(model).__name__} is not known to take a mask over pairs of tokens"
    if has_virtual_tokens(model):
        return "virtual tokens stand before the text"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        return f"attention {implementation!r} takes no mask over pairs of tokens"
    if not set(getattr(config, "layer_types", None) or ()) <= _KINDS_OF_LAYER:
        return f"it has layers of {', '.join(sorted(set(config.layer_types) - _KINDS_OF_LAYER))}"
    return None


def allows_packing(model: nn.Module) -> bool:
    """Whether texts can share a row of this model; if not, the log says why, once a model."""
    reason = why_not_packed(model)
    if reason is not None and model not in _said:
        _said.add(model)
        logger.info("candidates do not share a row with their prompt: %s; each is read with its prompt", reason)
    return reason is None


def pair_masks(model: nn.Module, batch: "PromptBatch", dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """What the model's attention adds to its scores: 0 where a token may look, else the lowest number.

    Args:
        model: A model that allows packing.
        batch: The batch.
        dtype: The dtype of the model's activations.

    Returns:
        ``[R, 1, T, T]``; by kind of layer where the model has layers with and without a sliding window.
    """
    config = network_config(model)
    full = batch.visible()

    def additive(seen: Tensor) -> Tensor:
        zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return zeros.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
    if window is None or "sliding_attention" not in kinds:
        return additive(full)
    # A window counts tokens of a text, not places of the row.
    depth = batch.position_ids
    near = depth.unsqueeze(2) - depth.unsqueeze(1) < window
    if kinds == {"sliding_attention"}:
        return additive(full & near)
    return {"full_attention": additive(full), "sliding_attention": additive(full & near)}


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether an adapter of PEFT puts tokens of its own before every text (prefix and prompt tuning)."""
    configs = getattr(model, "peft_config", None)
    adapters = list(configs.values()) if isinstance(configs, dict) else []
    return any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters)
