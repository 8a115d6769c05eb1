"""Memory for perturbed copies: allocated once, handed out and taken back in the order modules nest."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Elements. Keeps every copy on the 64-byte boundary that torch's own allocations have."""


class ScratchStack:
    """A stack of buffers for each dtype and device.

    Modules run nested, so the copy made last is released first. The stack grows to the largest sum of copies held at
    one time, which is the largest single module when no module with parameters of its own encloses another.
    """

    def __init__(self) -> None:
        self._chunks: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self._used: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        self._views: dict[tuple[torch.dtype, torch.device, int, int, torch.Size], Tensor] = {}
        self._storages: set[int] = set()

    def reserve(self, dtype: torch.dtype, device: torch.device, numel: int) -> None:
        """Make the first chunk large enough for ``numel`` elements, before anything is taken."""
        key = (dtype, device)
        chunks = self._chunks.setdefault(key, [])
        if not chunks or chunks[0].numel() < numel:
            chunks[:] = [_buffer(numel, dtype, device)]
            self._used[key] = [0]
            self._views.clear()
            self._storages = self._addresses()

    def take(self, like: Tensor) -> tuple[Tensor, int]:
        """A contiguous buffer of the shape of ``like``, and the number of its chunk for `release`."""
        key = (like.dtype, like.device)
        chunks, used = self._chunks.setdefault(key, []), self._used.setdefault(key, [])
        size = padded(like.numel())
        for number, chunk in enumerate(chunks):
            if used[number] + size <= chunk.numel():
                break
        else:
            number = len(chunks)
            chunks.append(_buffer(size, like.dtype, like.device))
            used.append(0)
            self._storages = self._addresses()
        start = used[number]
        used[number] += size
        place = (*key, number, start, like.shape)
        view = self._views.get(place)
        if view is None:  # kept: a model has few shapes, and making a view takes as long as perturbing a small tensor
            with torch.inference_mode(False):
                view = self._views[place] = chunks[number][start : start + like.numel()].view(like.shape)
        return view, number

    def release(self, buffer: Tensor, number: int) -> None:
        """Take back the buffer that was taken last from chunk ``number``."""
        self._used[buffer.dtype, buffer.device][number] -= padded(buffer.numel())

    def release_all(self) -> None:
        """Take back whatever is out, after an interrupted forward."""
        for used in self._used.values():
            used[:] = [0] * len(used)

    def holds(self, address: int) -> bool:
        """Whether a storage at that address is one of the chunks."""
        return address in self._storages

    def _addresses(self) -> set[int]:
        return {chunk.untyped_storage().data_ptr() for chunks in self._chunks.values() for chunk in chunks}

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(chunk.numel() * chunk.element_size() for chunks in self._chunks.values() for chunk in chunks)


def padded(numel: int) -> int:
    """Elements that a buffer of ``numel`` elements occupies."""
    return -(-numel // _ALIGNMENT) * _ALIGNMENT


def _buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.empty(numel, dtype=dtype, device=device)
