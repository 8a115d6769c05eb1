"""The logits of a batch: texts that begin alike share a row, behind a mask that keeps their branches apart."""

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from smezo_pl.data.batch import PromptBatch
from smezo_pl.optim.rows import at_rows, rows
from smezo_pl.scoring.neighbors import length_limit, row_by_row

logger = logging.getLogger(__name__)

PACKABLE = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gpt2"),
    *("gpt_neox", "opt", "phi", "phi3", "olmo2", "smollm3", "granite", "stablelm", "cohere", "starcoder2", "gptj"),
    "falcon",
}
"""Model types of transformers that accept a mask over pairs of tokens and a position for each token, as tested."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_logged: WeakSet[nn.Module] = WeakSet()


def model_logits(model: nn.Module, batch: PromptBatch) -> Tensor:
    """The logits at a batch's positions, in one forward without a key-value cache.

    Texts that begin alike are read in one row behind a mask where the model allows it, otherwise in a row each. The
    model's head reads the positions alone: they are selected from its input. A model without a head of its own computes
    logits at the positions that it is given (``logits_to_keep``), or everywhere. ``[P, V]`` in the model's dtype.
    """
    inputs: dict[str, Any] = {"use_cache": False}
    ids, row, positions = batch.input_ids, batch.logit_row, batch.logit_pos
    read = torch.arange(batch.num_rows, device=ids.device)  # the row that each row of the forward is
    if separates(model, batch):
        inputs["position_ids"] = batch.position_ids
    if batch.bidirectional:
        inputs["attention_mask"] = batch.attention_mask
    elif batch.branching and allows_packing(model):
        inputs["attention_mask"] = _pair_masks(model, batch)
        inputs["position_ids"] = batch.position_ids
    elif batch.branching:
        ids, row, positions, read = _unpacked(batch)
    # Without a mask, as nothing that a causal model predicts depends on the padding to its right: attention is faster.
    takes = parameters_of(model)
    given = {name: value for name, value in inputs.items() if name in takes or name == "attention_mask"}
    if "attention_mask" in takes and takes["attention_mask"].default is inspect.Parameter.empty:
        given.setdefault("attention_mask", torch.ones_like(ids))
    with rows(read):
        return logits_at(model, ids, row, positions, given)


def separates(model: nn.Module, batch: PromptBatch) -> bool:
    """Whether the model's positions of a text in the batch depend on its length, so that it needs a row of its own."""
    limit = length_limit(_config(model)) if depends_on_length(model) else None
    return limit is not None and int(batch.position_ids.max()) >= limit


def depends_on_length(model: nn.Module) -> bool:
    """Whether the model's positions of a long text depend on its length, and can be given for each row."""
    return length_limit(_config(model)) is not None and not has_virtual_tokens(model)


def logits_at(model: nn.Module, input_ids: Tensor, row: Tensor, positions: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Logits ``[P, V]`` at some positions of some rows, both ``[P]``, of ``input_ids``, ``[R, T]``.

    ``inputs`` are the other arguments of the model's forward.
    """
    width, limited = input_ids.shape[1], depends_on_length(model)
    head = _head(model)
    if head is None and "logits_to_keep" in parameters_of(model):
        kept, columns = torch.unique(positions, return_inverse=True)
        with row_by_row(model, limited):
            read: Tensor = model(input_ids=input_ids, logits_to_keep=kept, **inputs).logits
        return read[row, columns]
    selected: list[bool] = []

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3 or args[0].shape[0] != input_ids.shape[0]:
            return None
        # Virtual tokens of an adapter stand before the text.
        virtual = args[0].shape[1] - width
        if virtual < 0:
            return None
        selected.append(True)
        return (at_rows(args[0][row, positions + virtual].unsqueeze(0), row), *args[1:])

    handle = None if head is None else head.register_forward_pre_hook(select, prepend=True)
    try:
        with row_by_row(model, limited):
            logits: Tensor = model(input_ids=input_ids, **inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits[0] if selected else logits[row, positions + logits.shape[1] - width]


def _head(model: nn.Module) -> nn.Module | None:
    """The module that maps hidden states to logits; None where there is none, or where a compiled graph hides it."""
    compiled = torch._dynamo.eval_frame.OptimizedModule if hasattr(torch, "_dynamo") else ()
    for module in model.modules():
        if isinstance(module, compiled) or getattr(module, "_compiled_call_impl", None) is not None:
            return None
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


def why_not_packed(model: nn.Module) -> str | None:
    """Why texts cannot share a row of this model; None if they can."""
    config = _config(model)
    kind = getattr(config, "model_type", None)
    if kind not in PACKABLE or getattr(config, "alibi", False):
        return f"{kind or type(model).__name__} is not known to take a mask over pairs of tokens"
    if has_virtual_tokens(model):
        return "virtual tokens stand before the text"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        return f"attention {implementation!r} takes no mask over pairs of tokens"
    if others := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"it has layers of {', '.join(sorted(others))}"
    return None


def allows_packing(model: nn.Module) -> bool:
    """Whether texts can share a row of this model; if not, the reason is logged, once per model."""
    reason = why_not_packed(model)
    if reason is not None and model not in _logged:
        _logged.add(model)
        logger.info("candidates do not share a row with their prompt: %s; each is read with its prompt", reason)
    return reason is None


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether an adapter of PEFT puts tokens of its own before every text (prefix and prompt tuning)."""
    configs = getattr(model, "peft_config", None)
    adapters = list(configs.values()) if isinstance(configs, dict) else []
    return any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters)


def _config(model: nn.Module) -> Any:
    """The configuration of a language model of transformers; None if there is none."""
    config: Any = getattr(_unwrapped(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _pair_masks(model: nn.Module, batch: PromptBatch) -> Tensor | dict[str, Tensor]:
    """What the attention adds to its scores: 0 where a token may look, else the lowest number.

    ``[R, 1, T, T]``; by layer type where the model has layers with and without a sliding window.
    """
    dtype = activation_dtype(model)

    def additive(seen: Tensor) -> Tensor:
        zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return zeros.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)

    full = batch.visible()
    config = _config(model)
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
    if window is None or "sliding_attention" not in types:
        return additive(full)
    # A window counts tokens of a text, not positions of the row.
    depth = batch.position_ids
    sliding = additive(full & (depth.unsqueeze(2) - depth.unsqueeze(1) < window))
    return sliding if len(types) == 1 else {"full_attention": additive(full), "sliding_attention": sliding}


def activation_dtype(model: nn.Module) -> torch.dtype:
    """Autocast's dtype, or that of the weights."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            device = parameter.device.type
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype
    return torch.get_default_dtype()


def _unpacked(batch: PromptBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The texts in a row each, the rows and positions that are read in these, and the row that each text was in."""
    width = batch.input_ids.shape[1]
    column = torch.arange(width, device=batch.input_ids.device)
    # Only texts that begin no other: those that end at a token without a subtree.
    leaf = (batch.subtree_end == column + 1) & batch.attention_mask.bool()
    leaf_row, leaf_pos = leaf.nonzero(as_tuple=True)
    ids, _ = batch.texts(leaf_row, leaf_pos)
    # A position belongs to the first leaf that follows from it, in its row.
    depth = batch.position_ids[batch.logit_row, batch.logit_pos]
    row = torch.searchsorted(leaf_row * width + leaf_pos, batch.logit_row * width + batch.logit_pos)
    return ids, row, depth, leaf_row


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of `torch.compile` and PEFT, whose own forwards accept any argument."""
    model = getattr(model, "_orig_mod", model)
    base = getattr(model, "get_base_model", None)
    inner: nn.Module = base() if callable(base) else model
    return inner


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments that the model's forward takes, by name."""
    return _signature(type(_unwrapped(model)).forward)


@lru_cache(maxsize=64)
def _signature(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(forward).parameters
    return {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
