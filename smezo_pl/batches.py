"""What a training step needs to know of a batch of any kind: its size, its weight, its parts."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from smezo_pl.data import PromptBatch


def batch_size(batch: Any) -> int:
    """Number of examples: of prompts, or the first dimension of the first tensor in nested containers.

    Raises:
        TypeError: If the batch holds no tensor.
    """
    if isinstance(batch, PromptBatch):
        return len(batch)
    for tensor in _tensors(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise TypeError(f"cannot tell the number of examples in a batch of type {type(batch).__name__}: it holds no tensor")


def batch_weight(batch: Any) -> int:
    """What a batch's mean loss is a mean over: answer tokens for prompts with the ``lm`` objective, else examples."""
    if isinstance(batch, PromptBatch) and batch.objective == "lm" and batch.reward is None:
        return batch.answer_tokens
    return batch_size(batch)


def split_batch(batch: Any, micro_batch_size: int | None) -> list[Any]:
    """Parts of at most ``micro_batch_size`` examples; the batch itself if None.

    Prompts are sorted by length. Of other batches every tensor in (nested) tuples, lists and dicts is cut along its
    first dimension; what is not a tensor, or has no dimension, is in every part.

    Raises:
        TypeError: If the batch holds no tensor.
        ValueError: If its tensors do not agree in their first dimension.
    """
    if micro_batch_size is None:
        return [batch]
    if isinstance(batch, PromptBatch):
        return list(batch.split(micro_batch_size))
    size = batch_size(batch)
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim}
    if len(sizes) > 1:
        raise ValueError(
            f"micro_batch_size={micro_batch_size}: the batch's tensors differ in their first dimension "
            f"({sorted(sizes)}), so it cannot be split by example"
        )
    return [_cut(batch, start, start + micro_batch_size) for start in range(0, size, micro_batch_size)]


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return [tensor for part in batch for tensor in _tensors(part)]
    return []


def _cut(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        parts = [_cut(value, start, stop) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # type: ignore[call-arg]
    return batch
