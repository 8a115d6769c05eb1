"""How a forward sees the perturbed weights ``theta + eps * m * z``: in place here, layer by layer in `layerwise`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from time import perf_counter
from types import FrameType
from typing import cast

import torch
from torch import Tensor, nn

from smezo_pl.optim.masks import Mask
from smezo_pl.optim.memory import stamp
from smezo_pl.optim.parameters import some
from smezo_pl.optim.perturbation.guards import refusal_of_write
from smezo_pl.optim.perturbation.layerwise import Closure, Layerwise
from smezo_pl.optim.perturbation.reads import UNDISPATCHED, ReadWatch
from smezo_pl.optim.step import Direction, StepPerturbation


def run_forwards(
    closure: Closure,
    samples: int,
    step: StepPerturbation,
    layerwise: Layerwise | None,
    watched: Sequence[nn.Parameter],
    log_once: Callable[[str], None],
) -> tuple[tuple[tuple[float, float], ...], float, int, set[int]]:
    """Run a closure on both perturbations of every sample, in place where there is no ``layerwise``.

    Returns:
        ``(l+, l-)`` of each sample, and in it of each row that has its own direction, the seconds spent in the closure,
        the bytes of copies of the active weights, and the ids of those parameters of ``watched`` that were read, and
        perhaps of others.

    Raises:
        RuntimeError: If each row has a direction, and there is no ``layerwise``.
        TypeError: If the closure does not return a number, or one for each row.
        ValueError: If it does not always return as many.
    """
    per_row = step.directions.per_row
    raw: list[Tensor | float] = []
    seconds, copied_bytes = 0.0, 0
    way: Layerwise | InPlace
    if layerwise is not None:
        way = layerwise
        layerwise.watch(watched)
    elif per_row:
        raise RuntimeError(
            "directions='per_row' needs attach(module): in place all rows of a batch see the same weights"
        )
    else:
        way = InPlace(step, watched)
        copied_bytes = way.nbytes()
        log_once(
            f"in place: {copied_bytes / 2**20:.1f} MiB of copies of the active weights; attach(module) "
            "needs only the largest layer"
        )
        if 0 < len(watched) < len(step.passes):
            log_once("in place: each step watches for reads of what is left alone; exclude saves that and its copies")
    for sample in range(samples):
        for sign in (1.0, -1.0):
            with way.perturbed(Direction(step, sample, sign)):
                started = perf_counter()
                raw.append(layerwise.check(closure()) if layerwise is not None and per_row else _check_loss(closure()))
                seconds += perf_counter() - started - way.write_seconds
    if len(counts := {loss.numel() for loss in raw if isinstance(loss, Tensor)}) > 1:
        raise ValueError(f"the closure must return the same number of losses each time, got {sorted(counts)}")
    values = _read_losses(raw)
    pairs = (zip(plus, minus, strict=True) for plus, minus in zip(values[::2], values[1::2], strict=True))
    return tuple(chain.from_iterable(pairs)), seconds, copied_bytes, way.read


class InPlace:
    """Perturbs the parameters themselves, and restores the same bits from copies of the active weights.

    Args:
        step: Perturbs the weights of this step.
        watched: Parameters of which `read` says whether a closure read them.

    Attributes:
        read: Their ids.
    """

    write_seconds = 0.0
    """Seconds of perturbing within the closure: none."""

    def __init__(self, step: StepPerturbation, watched: Sequence[nn.Parameter]) -> None:
        self._watched, self.read = watched, set[int]()
        self._saved = [(p.tensor, p.kernel, *p.kernel.select(p.tensor.flat, p.mask)) for p in step.passes.values()]

    def nbytes(self) -> int:
        """Bytes of the copies and of their packed masks."""
        return sum(part.nbytes for _, _, *parts in self._saved for part in parts)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if not self._watched:
            yield
            return
        watch = ReadWatch(self.read)
        for parameter in self._watched:
            watch.add(parameter, id(parameter))
        try:
            with watch.watching():
                yield
        finally:
            for parameter in self._watched:
                for name in UNDISPATCHED:
                    vars(parameter).pop(name, None)

    @contextmanager
    def perturbed(self, direction: Direction) -> Iterator[None]:
        """Inside the block the parameters are perturbed.

        Raises:
            RuntimeError: If a weight was written in the block.
        """
        parameters = {tensor.name: tensor.parameter for tensor, *_ in self._saved}
        try:
            for tensor, _, bits, _ in self._saved:
                # packed, because the weights that it is judged by change
                direction.perturb(tensor.parameter, tensor.flat, Mask("packed", bits=bits))
            contents = len(self._watched) == len(parameters)
            stamps = {name: stamp(parameter, contents) for name, parameter in parameters.items()}
            with self._watching():
                yield
            written = [name for name, parameter in parameters.items() if stamp(parameter, contents) != stamps[name]]
            if written:
                raise RuntimeError(refusal_of_write(some(map(repr, written)), "in place"))
        finally:
            for tensor, kernel, bits, saved in self._saved:
                kernel.restore(tensor.flat, bits, saved)


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


def _read_losses(losses: list[Tensor | float]) -> list[list[float]]:
    """The losses of each forward as numbers, with one synchronization when all lie on one device."""
    tensors = [loss for loss in losses if isinstance(loss, Tensor)]
    if len(tensors) == len(losses) and len({tensor.device for tensor in tensors}) == 1:
        values: list[list[float]] = torch.stack([tensor.view(-1) for tensor in tensors]).tolist()
        return values
    return [loss.view(-1).tolist() if isinstance(loss, Tensor) else [loss] for loss in losses]
