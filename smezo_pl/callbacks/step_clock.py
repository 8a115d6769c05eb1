"""How long a step takes and how much memory a run needs, for any method."""

from __future__ import annotations

import os
import statistics
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import torch

from smezo_pl.callbacks.monitor import peak_memory

KEPT = 256
"""Step times that the median is taken of, the last ones. A checkpoint holds them, so there are few."""


class StepClock:
    """Times of the last steps, without validation and checkpoints, and the peak of memory since training began."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=KEPT)
        self._began: float | None = None
        self._earlier_peak = 0

    def start_training(self, device: torch.device) -> None:
        """Forget the peak of memory that loading the model left."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux: "5" sets the process's high-water mark to what it holds now (man 5 proc_pid_clear_refs).
            with suppress(OSError):
                Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")

    def begin(self) -> None:
        """A step begins."""
        self._began = perf_counter()

    def end(self) -> None:
        """It ends."""
        if self._began is not None:
            self._times.append(perf_counter() - self._began)
        self._began = None

    @property
    def median(self) -> float | None:
        """Median seconds of a step; None before the first."""
        return statistics.median(self._times) if self._times else None

    def peak(self, device: torch.device) -> int | None:
        """Most bytes held at once in training: on CUDA by torch's allocator, elsewhere by the process."""
        now = peak_memory(device)
        if device.type == "cpu":
            with suppress(OSError, StopIteration, ValueError):
                lines = Path("/proc/self/status").read_text().splitlines()
                now = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
        return max(now, self._earlier_peak) if now is not None else self._earlier_peak or None

    def state(self, device: torch.device) -> dict[str, float | int | Sequence[float]]:
        """In plain types."""
        return {"times": [round(seconds, 6) for seconds in self._times], "peak": self.peak(device) or 0}

    def load(self, state: dict[str, float | int | Sequence[float]]) -> None:
        """Go on from a state."""
        times = state["times"]
        assert isinstance(times, Sequence)
        self._times, self._earlier_peak = deque(times, maxlen=KEPT), int(state["peak"])  # type: ignore[arg-type]
