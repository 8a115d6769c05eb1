"""Hold back Ctrl-C while weights are being written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import FrameType
from typing import Any

from torch import Tensor

from smezo_pl.optim.kernels import Kernel
from smezo_pl.optim.parameters import check_loss, read_losses, some
from smezo_pl.optim.perturbation.directions import StepMoves
from smezo_pl.optim.perturbation.in_place import InPlace
from smezo_pl.optim.perturbation.layerwise import Layerwise


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


Closure = Callable[[], "Tensor | float"]


class Forwards:
    """Runs a closure on both sides of every sample's perturbation.

    Args:
        moves: Perturbs the weights of this step.
        layerwise: Perturbs inside the forward; None for in place.
        kernel: Gives the kernel for a tensor.
        say: Takes lines for the log.
    """

    def __init__(
        self,
        moves: StepMoves,
        layerwise: Layerwise | None,
        kernel: Callable[[Tensor], Kernel],
        say: Callable[[str], None],
    ) -> None:
        self._moves, self._layerwise, self._kernel, self._say = moves, layerwise, kernel, say
        self.seconds = 0.0
        self.copied_bytes = 0

    def losses(self, closure: Closure, samples: int) -> tuple[tuple[float, float], ...]:
        """``(l+, l-)`` of each sample; ``seconds`` then holds the time spent in the closure.

        Raises:
            TypeError: If the closure does not return a number.
        """
        raw: list[Tensor | float] = []
        with self._perturbations() as perturbed:
            for sample in range(samples):
                for sign in (1.0, -1.0):
                    with perturbed(sample, sign) as clock:
                        started = perf_counter()
                        raw.append(check_loss(self._call(closure)))
                        self.seconds += perf_counter() - started - clock()
        values = read_losses(raw)
        return tuple(zip(values[::2], values[1::2], strict=True))

    def _call(self, closure: Closure) -> Tensor | float:
        layerwise = self._layerwise
        if layerwise is None or layerwise.watched_once:
            return closure()
        while True:
            with layerwise.watched() as readings:
                loss = closure()
            moved = layerwise.settle(readings)
            if not moved:
                layerwise.watched_once = True
                return loss
            self._say(
                f"attach: weights used outside their module's forward, held by an enclosing module: {some(moved)}"
            )

    @contextmanager
    def _perturbations(self) -> Iterator[Callable[[int, float], Any]]:
        """Gives ``perturbed(sample, sign)``, a context in which forwards see ``theta + sign * eps * m * z``."""
        moves, layerwise = self._moves, self._layerwise
        if layerwise is not None:

            @contextmanager
            def inside(sample: int, sign: float) -> Iterator[Callable[[], float]]:
                with layerwise.perturbed(moves.side(sample, sign)):
                    yield lambda: layerwise.write_seconds

            yield inside
            return

        in_place = InPlace([member.parameter for member in moves.members], self._kernel)
        with in_place.selected(moves.mask):
            self.copied_bytes = in_place.extra_bytes()
            self._say(
                f"in place: {self.copied_bytes / 2**20:.1f} MiB of copies of the active weights; attach(module) "
                "needs only the largest layer"
            )

            @contextmanager
            def around(sample: int, sign: float) -> Iterator[Callable[[], float]]:
                with in_place.perturbed(moves.side(sample, sign).in_place):
                    yield lambda: 0.0

            yield around
