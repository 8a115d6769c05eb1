"""How a forward sees the perturbed weights ``theta + eps * m * z``: in place here, layer by layer in `layerwise`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import FrameType
from typing import cast

import torch
from torch import Tensor

from smezo_pl.optim.masks import Mask
from smezo_pl.optim.parameters import some
from smezo_pl.optim.perturbation.layerwise import Layerwise
from smezo_pl.optim.step import Direction, StepPerturbation

Closure = Callable[[], "Tensor | float"]


class Forwards:
    """Runs a closure on both perturbations of every sample.

    Args:
        step: Perturbs the weights of this step.
        layerwise: Perturbs inside the forward; None for in place.
        log_once: Takes lines for the log.

    Attributes:
        seconds: Time spent in the closure.
        copied_bytes: Size of the copies of the active weights; 0 layer by layer.
    """

    def __init__(self, step: StepPerturbation, layerwise: Layerwise | None, log_once: Callable[[str], None]) -> None:
        self._step, self._layerwise, self._log_once = step, layerwise, log_once
        self.seconds = 0.0
        self.copied_bytes = 0

    def losses(self, closure: Closure, samples: int) -> tuple[tuple[float, float], ...]:
        """``(l+, l-)`` of each sample.

        Raises:
            TypeError: If the closure does not return a number.
        """
        raw: list[Tensor | float] = []
        way: Layerwise | InPlace
        if self._layerwise is not None:
            way = self._layerwise
        else:
            way = InPlace(self._step)
            self.copied_bytes = way.nbytes()
            self._log_once(
                f"in place: {self.copied_bytes / 2**20:.1f} MiB of copies of the active weights; attach(module) "
                "needs only the largest layer"
            )
        for sample in range(samples):
            for sign in (1.0, -1.0):
                with way.perturbed(Direction(self._step, sample, sign)):
                    started = perf_counter()
                    raw.append(_check_loss(self._call(closure)))
                    self.seconds += perf_counter() - started - way.write_seconds
        values = _read_losses(raw)
        return tuple(zip(values[::2], values[1::2], strict=True))

    def _call(self, closure: Closure) -> Tensor | float:
        layerwise = self._layerwise
        if layerwise is None or layerwise.watched_once:
            return closure()
        while True:
            with layerwise.watched() as readings:
                loss = closure()
            held = layerwise.settle(readings)
            if not held:
                layerwise.watched_once = True
                return loss
            self._log_once(
                f"attach: weights used outside their module's forward, held by an enclosing module: {some(held)}"
            )


class InPlace:
    """Perturbs the parameters themselves, and restores the same bits from copies of the active weights.

    Args:
        step: Perturbs the weights of this step.
    """

    write_seconds = 0.0
    """Seconds of perturbing within the closure: none."""

    def __init__(self, step: StepPerturbation) -> None:
        self._saved = [(t, *t.kernel.select(t.flat, step.mask(t.parameter))) for t in step.tensors]

    def nbytes(self) -> int:
        """Bytes of the copies and of their packed masks."""
        return sum(t.numel() * t.element_size() for _, bits, saved in self._saved for t in (bits, saved))

    @contextmanager
    def perturbed(self, direction: Direction) -> Iterator[None]:
        """Inside the block the parameters are perturbed."""
        try:
            for tensor, bits, _ in self._saved:
                direction.in_place(tensor.parameter, Mask("packed", bits=bits))
            yield
        finally:
            for tensor, bits, saved in self._saved:
                tensor.kernel.restore(tensor.flat, bits, saved)


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Deliver a SIGINT that arrives inside the block at its end, so the block runs whole or not at all.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    previous = signal.getsignal(signal.SIGINT)
    if previous is None:  # set by C code: it cannot be put back from here
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received and callable(previous):
            previous(*received[-1])


def _check_loss(loss: object) -> Tensor | float:
    """A closure's result as one real number, left on its device."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise TypeError(f"the closure must return one number, got a tensor of shape {tuple(loss.shape)}")
        if loss.is_complex():
            raise TypeError("the closure must return a real number, got a complex tensor")
        return loss.detach().reshape(()).double()
    if loss is None:
        raise TypeError("the closure returned None; it must return the loss")
    if isinstance(loss, (bool, str, bytes)) or not hasattr(loss, "__float__"):
        raise TypeError(f"the closure must return a number, got {type(loss).__name__}")
    return float(cast(float, loss))


def _read_losses(losses: list[Tensor | float]) -> list[float]:
    """All losses as numbers, with one synchronization when they lie on one device."""
    tensors = [loss for loss in losses if isinstance(loss, Tensor)]
    if len(tensors) == len(losses) and len({tensor.device for tensor in tensors}) == 1:
        return [float(value) for value in torch.stack(tensors).tolist()]
    return [float(loss) for loss in losses]
