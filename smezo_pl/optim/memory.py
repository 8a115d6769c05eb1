"""The memory of tensors: whether the fused passes can walk it, and which tensors share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = {getattr(kind.__torch_function__, "__func__", kind.__torch_function__) for kind in (Tensor, nn.Parameter)}
"""How tensors whose values lie in their memory treat functions of torch."""


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a parameter that the fused passes cannot walk."""
    kind = type(tensor)
    if is_lazy(tensor):
        raise ValueError(f"parameter {name!r} is not initialized: run the network once before building the optimizer")
    if kind.__name__ == "DTensor":
        raise TypeError(
            f"parameter {name!r} is a DTensor; sharded parameters are not supported, use the forward_ddp strategy"
        )
    is_plain = getattr(kind.__torch_function__, "__func__", kind.__torch_function__) in _PLAIN
    if not is_plain or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"parameter {name!r} is a {kind.__module__}.{kind.__qualname__}, whose values do not lie in memory of its "
            "own; only plain tensors can be perturbed. Leave it out with exclude or requires_grad=False"
        )
    if tensor.dtype not in _DTYPES or tensor.is_quantized:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(
            f"parameter {name!r} has dtype {str(tensor.dtype).removeprefix('torch.')}; allowed: {allowed}. "
            "Leave it out with exclude or requires_grad=False"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ValueError(
            f"parameter {name!r} has layout {tensor.layout}; only dense (strided) tensors can be perturbed"
        )
    if tensor.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device and has no values; load the model's weights first")
    if not tensor.is_contiguous():
        raise ValueError(
            f"parameter {name!r} is not contiguous (strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}); "
            "replace it by its .contiguous() copy before building the optimizer"
        )


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its storage that a tensor spans, and the one after the last."""
    if tensor.numel() == 0:
        return 0, 0
    first = int(tensor.storage_offset()) * tensor.element_size()
    reach = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * tensor.element_size()


def memory_of(tensor: Tensor) -> tuple[int, int, int] | None:
    """Address of a tensor's storage and its `extent` there; None if it has no memory."""
    try:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, wrapper and lazy tensors
        return None
    if not address or not tensor.numel():
        return None
    return (address, 0, storage.nbytes()) if tensor.is_nested else (address, *extent(tensor))


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share that read one memory alike."""
    return memory_of(tensor) or id(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype


def stamp(tensor: Tensor, contents: bool = False) -> tuple[int, int, int]:
    """What changes when a tensor is written, as far as torch counts it; of ``contents`` also what it does not count."""
    version, total = -1 if tensor.is_inference() else tensor._version, 0
    if contents and tensor.numel():  # as under .data; a sum of integers is the same in every order
        width = {2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.uint8)
        with _disable_current_modes():  # no forward reads it here
            whole = tensor.detach().contiguous().view(-1).view(torch.uint8).view(width)
            total = int(whole.sum(dtype=torch.int64))
    return version, Tensor.data_ptr(tensor), total


class Part(NamedTuple):
    """A parameter, and what is done with it; nothing if it is not optimized."""

    name: str
    tensor: Tensor
    treatment: str


def ties(parts: Sequence[Part]) -> set[int]:
    """Numbers of the parameters that are the same memory as one before them, and are treated like it.

    Raises:
        ValueError: If an optimized parameter shares memory with another in another way.
    """
    placed = [(memory, number) for number, part in enumerate(parts) if (memory := memory_of(part.tensor)) is not None]
    found: set[int] = set()
    end, furthest = (0, 0), 0  # address and last byte of the parameter that reaches furthest, and its number
    for (address, first, last), number in sorted(placed):
        part = parts[number]
        if (address, first) < end and (part.treatment or parts[furthest].treatment):
            other = parts[furthest]
            if identity(part.tensor) != identity(other.tensor) or part.treatment != other.treatment:
                both = f"{other.treatment or 'not optimized'}, {part.treatment or 'not optimized'}"
                raise ValueError(
                    f"parameters {other.name!r} and {part.name!r} ({both}) share memory, so an update of one would "
                    "change the other: make them one parameter, or give one of them memory of its own by .clone()"
                )
            found.add(number)
        if (address, last) > end:
            end, furthest = (address, last), number
    return found
