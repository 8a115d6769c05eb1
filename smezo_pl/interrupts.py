"""How a training run ends before its time: signals are obeyed between two steps, and the last line resumes the run."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Interrupts:
    """A context in which SIGTERM and SIGINT end ``fit`` after the step it is in, with a checkpoint.

    Everything else they end at once, also ``fit`` before its first batch and after its last, and when sent again.

    Args:
        graceful: Whether a step may be finished first.

    Attributes:
        received: The first signal that came.
    """

    def __init__(self, *, graceful: bool) -> None:
        self.graceful = graceful
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number, handler in ((signal.SIGTERM, self._terminate), (signal.SIGINT, self._interrupt)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as for nohup, or set by C code
                    self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _waits(self) -> bool:
        # While its loops run, Lightning has a handler around ours, which lets them end after a batch.
        return self.graceful and signal.getsignal(signal.SIGTERM) != self._terminate

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received == number, self.received or number
        if again or not self._waits():
            raise SystemExit(128 + number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, self.received or number
        if again or not self._waits():
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGTERM)


def resume_command(trainer: Trainer, folder: Path | None, given: str | None) -> str | None:
    """The command that resumes a run from its newest checkpoint, or from the ``given`` one; None without any."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if folder is None or not (folder / "config.yaml").is_file():
        return None
    paths = [path for c in callbacks for path in (c.best_model_path, c.last_model_path)]
    paths.append(str(folder / "checkpoints" / "last.ckpt"))  # of spawned processes this one's callbacks know nothing
    files = [Path(path) for path in paths if Path(path).is_file()]
    newest: str | Path | None = max(files, key=lambda path: path.stat().st_mtime_ns, default=given)
    if newest is None:
        return None
    return command("fit", folder / "config.yaml", newest)


def command(subcommand: str, config: Path, checkpoint: str | Path) -> str:
    """A command line for the shell, of the program that is running."""
    program = [sys.argv[0]] if Path(sys.argv[0]).name == "smezo" else [sys.executable, "-m", "smezo_pl"]
    if shutil.which("smezo") == program[0]:
        program = ["smezo"]
    return shlex.join([*program, subcommand, "--config", str(config), "--ckpt_path", str(checkpoint)])
