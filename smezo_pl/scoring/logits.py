"""What a model allows: texts that begin alike in one row, behind a mask that keeps their branches apart."""

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
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


def model_logits(model: nn.Module, batch: "PromptBatch") -> Tensor:
    """The logits at a batch's places, in one forward without a key-value cache.

    Texts that begin alike are read in one row behind a mask where the model allows it (`smezo_pl.scoring.logits`),
    otherwise in a row each. The model's head reads the places alone: they are picked out of what goes into it. A model
    without a head of its own computes logits at the positions it is told (``logits_to_keep``), or everywhere.

    Args:
        model: A language model of transformers, or one that is called alike.
        batch: The batch.

    Returns:
        ``[P, V]`` in the model's dtype.
    """
    inputs: dict[str, Any] = {"use_cache": False}
    ids, rows, positions = batch.input_ids, batch.logit_row, batch.logit_pos
    if batch.bidirectional:
        inputs["attention_mask"] = batch.attention_mask
    elif batch.branching and allows_packing(model):
        inputs["attention_mask"] = pair_masks(model, batch, _dtype(model))
        inputs["position_ids"] = batch.position_ids
    elif batch.branching:
        ids, rows, positions = _apart(batch)
    # Without a mask, as nothing that a causal model predicts depends on the padding to its right: attention is quicker.
    takes = parameters_of(model)
    given = {name: value for name, value in inputs.items() if name in takes or name == "attention_mask"}
    if "attention_mask" in required_by(model):
        given.setdefault("attention_mask", torch.ones_like(ids))
    return logits_at(model, ids, rows, positions, given)


def logits_at(model: nn.Module, input_ids: Tensor, rows: Tensor, positions: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Logits at some positions of some rows.

    Args:
        model: The model.
        input_ids: int64 ``[R, T]``.
        rows: int64 ``[P]``.
        positions: int64 ``[P]``.
        inputs: Everything else that the model is called with.

    Returns:
        ``[P, V]``.
    """
    width = input_ids.shape[1]
    head = _head(model)
    if head is None:
        return _without_head(model, input_ids, rows, positions, inputs)
    picked: list[bool] = []

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3 or args[0].shape[0] != input_ids.shape[0]:
            return None
        # Virtual tokens of an adapter stand before the text.
        more = args[0].shape[1] - width
        if more < 0:
            return None
        picked.append(True)
        return (args[0][rows, positions + more].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        logits: Tensor = model(input_ids=input_ids, **inputs).logits
    finally:
        handle.remove()
    return logits[0] if picked else logits[rows, positions + logits.shape[1] - width]


def _without_head(
    model: nn.Module, input_ids: Tensor, rows: Tensor, positions: Tensor, inputs: dict[str, Any]
) -> Tensor:
    width = input_ids.shape[1]
    if "logits_to_keep" not in parameters_of(model):
        logits: Tensor = model(input_ids=input_ids, **inputs).logits
        return logits[rows, positions + logits.shape[1] - width]
    kept, at = torch.unique(positions, return_inverse=True)
    logits = model(input_ids=input_ids, logits_to_keep=kept, **inputs).logits
    return logits[rows, at]


def _head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states; None where there is none, or where a compiled graph hides it."""
    compiled = torch._dynamo.eval_frame.OptimizedModule if hasattr(torch, "_dynamo") else ()
    for module in model.modules():
        if isinstance(module, compiled) or getattr(module, "_compiled_call_impl", None) is not None:
            return None
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


def _apart(batch: "PromptBatch") -> tuple[Tensor, Tensor, Tensor]:
    """The texts that places need, each in a row of its own, and where the places are in these."""
    # Only texts that no other goes on from: the tokens that nothing follows.
    place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    leaf = (batch.subtree_end == place + 1) & batch.attention_mask.bool()
    leaf_row, leaf_pos = leaf.nonzero(as_tuple=True)
    ids, _ = batch.texts(leaf_row, leaf_pos)
    # A place belongs to the first leaf that follows from it, in its row.
    depth = batch.position_ids[batch.logit_row, batch.logit_pos]
    width = batch.input_ids.shape[1]
    at = batch.logit_row * width + batch.logit_pos
    rows = torch.searchsorted(leaf_row * width + leaf_pos, at)
    return ids, rows, depth


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the activations: autocast's, or that of the weights."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            kind = parameter.device.type
            return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    return torch.get_default_dtype()


def innermost_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward whose signature counts: the wrappers of PEFT and `torch.compile` take anything."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    inner: nn.Module = base() if callable(base) else model
    function: Callable[..., Any] = getattr(type(inner), "forward", inner.forward)
    return function


def parameters_of(model: nn.Module) -> frozenset[str]:
    """Names of what the model's forward takes."""
    return _signature(innermost_forward(model))[0]


def required_by(model: nn.Module) -> frozenset[str]:
    """Names of what the model's forward cannot do without."""
    return _signature(innermost_forward(model))[1]


@lru_cache(maxsize=64)
def _signature(forward: Callable[..., Any]) -> tuple[frozenset[str], frozenset[str]]:
    parameters = inspect.signature(forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return frozenset(p.name for p in named), frozenset(p.name for p in named if p.default is p.empty)
