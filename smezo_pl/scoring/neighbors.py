"""Scores that depend on the other texts of a forward: rotary positions of each row's own length, a check of the rest.

With the rotary positions ``dynamic`` (NTK) and ``longrope``, the frequencies of all rows follow from the longest one
once it is beyond the length that the model was pretrained on; those of ``dynamic`` also from longer texts read before.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from smezo_pl.data.batch import PromptBatch

logger = logging.getLogger(__name__)

_checked: WeakSet[nn.Module] = WeakSet()


def length_limit(config: Any) -> int | None:
    """The longest text whose rotary positions depend on no other; None if those of no text do.

    Args:
        config: The configuration of a language model of transformers.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return None
    limits = []
    for part in (rope, *(each for each in rope.values() if isinstance(each, Mapping))):
        kind = part.get("rope_type")
        if kind == "longrope" or "dynamic" in str(kind):
            limits.append(part.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(limits, default=None)


@contextmanager
def row_by_row(model: nn.Module, limited: bool) -> Iterator[None]:
    """Within it, rotary positions that depend on a text's length are those of each row's own, if ``limited``."""
    rotary = [m for m in model.modules() if hasattr(m, "rope_type") and hasattr(m, "original_max_seq_len")]
    handles = [m.register_forward_hook(_of_rows, with_kwargs=True) for m in rotary] if limited else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    positions = kwargs.pop("position_ids", args[1] if len(args) > 1 else None)
    if positions is None or positions.ndim != 2:
        return output
    lengths = positions.amax(1)
    parts = []
    for length in lengths.unique():
        _forget(module)  # the lengths of earlier forwards
        rows = (lengths == length).nonzero().squeeze(1)
        parts.append((rows, module.forward(args[0], position_ids=positions[rows], **kwargs)))
    _forget(module)
    order = torch.cat([rows for rows, _ in parts]).argsort()
    if isinstance(output, Tensor):
        return torch.cat([part for _, part in parts])[order]
    return type(output)(torch.cat(each)[order] for each in zip(*(part for _, part in parts), strict=True))


def _forget(module: Any) -> None:
    for name in {*vars(module), *dict(module.named_buffers(recurse=False))}:
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            present = getattr(module, f"{prefix}inv_freq")
            original = getattr(module, name).to(present.device)
            module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def awaits_check(model: nn.Module, batch: PromptBatch) -> bool:
    """Whether this batch is the first of a model that holds more than one example."""
    return len(batch) > 1 and model not in _checked


@torch.no_grad()
def check_neighbors(model: nn.Module, together: Tensor, read_alone: Callable[[], Tensor], dtype: torch.dtype) -> None:
    """Warn, once per model, if the scores of an example are others beside the rest of a batch than alone.

    Args:
        model: The model.
        together: Scores of the example's candidates, read with other examples.
        read_alone: Reads it alone.
        dtype: What the model computes in; differences below the square root of its resolution are rounding.
    """
    try:
        alone = read_alone()
    except (RuntimeError, ValueError) as error:  # as of a batch normalization that needs several values
        amount = f" (one alone gives: {' '.join(str(error).split()):.200})"
    else:
        if not bool((together.isfinite() & alone.isfinite()).all()):
            return
        difference = (together - alone).abs()
        amount = f", by up to {float(difference.max()):.2g}"
        resolution = torch.finfo(dtype).eps
        if dtype == torch.float32 and together.is_cuda and torch.get_float32_matmul_precision() != "highest":
            resolution = torch.finfo(torch.float16).eps  # TF32
        if bool((difference <= resolution**0.5 * alone.abs().clamp_min(1)).all()):
            _checked.add(model)
            return
    _checked.add(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    batch_norm = any(m.training or m.running_mean is None for m in norms)
    cause = (
        "a batch normalization that takes its statistics from the batch (call eval(), or give it running statistics)"
        if batch_norm
        else "a layer that looks across the batch, or at its longest text, such as experts with a capacity"
    )
    logger.warning(
        "the scores of an example depend on its neighbors in the batch%s, so results change with batch_size and "
        "eval_batch_size; the likely cause is %s. eval_batch_size: 1 and micro_batch_size: 1 read each example alone",
        amount, cause,
    )  # fmt: skip
