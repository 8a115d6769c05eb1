"""Forwards on weights that are perturbed in place, the whole model at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter

from torch import Tensor, nn

from smezo_pl.optim.kernels import Kernel
from smezo_pl.optim.masks import Mask


class InPlace:
    """Perturbs the parameters themselves and brings them back to the same bits from a copy of the selected weights.

    Args:
        parameters: The parameters to perturb.
        kernel: Gives the kernel for a tensor.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], kernel: Callable[[Tensor], Kernel]) -> None:
        self._parameters = list(parameters)
        self._kernel = kernel
        self._saved: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self.write_seconds = 0.0

    def extra_bytes(self) -> int:
        """Bytes of the copies of the selected weights and of their packed masks; 0 outside a step."""
        return sum(t.numel() * t.element_size() for _, bits, saved in self._saved for t in (bits, saved))

    @contextmanager
    def selected(self, mask: Callable[[nn.Parameter], Mask]) -> Iterator[None]:
        """Hold copies of the weights that the masks of this step select."""
        for parameter in self._parameters:
            bits, saved = self._kernel(parameter).select(parameter.detach().view(-1), mask(parameter))
            self._saved.append((parameter, bits, saved))
        try:
            yield
        finally:
            self._saved.clear()

    @contextmanager
    def perturbed(self, write: Callable[[nn.Parameter, Mask], None]) -> Iterator[None]:
        """Inside the block the parameters are what ``write(parameter, packed mask)`` made of them, in place."""
        started = perf_counter()
        try:
            for parameter, bits, _ in self._saved:
                write(parameter, Mask("packed", bits=bits))
            self.write_seconds = perf_counter() - started
            yield
        finally:
            started = perf_counter()
            for parameter, bits, saved in self._saved:
                self._kernel(parameter).restore(parameter.detach().view(-1), bits, saved)
            self.write_seconds += perf_counter() - started
