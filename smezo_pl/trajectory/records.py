"""Rows of a trajectory as bytes: step records and events."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from hashlib import blake2b
from typing import Any

from smezo_pl.optim import StepRecord
from smezo_pl.trajectory.header import inflate

CHECK_SIZE = 8
_FLOAT32_MAX = 3.4028234663852886e38
MAX_SAMPLES = 4096
"""Most samples of a step that a reader accepts: bounds what a damaged header can make it allocate."""


class Flag(IntFlag):
    """What a row holds beside its numbers."""

    SKIPPED = 1
    REFRESHED = 2
    LR = 4
    WEIGHT_DECAY = 8
    EPS = 16
    SPARSITY = 32


RATES = {"lr": Flag.LR, "weight_decay": Flag.WEIGHT_DECAY, "eps": Flag.EPS, "sparsity": Flag.SPARSITY}
"""What may change from step to step, one value for each parameter group, and the flag of a row that stores it."""


def pack_row(row: StepRecord, before: StepRecord | None, check: bytes) -> bytes:
    """Bytes of a row, its check included.

    Args:
        row: The step.
        before: The row before, None for the first: learning rates and the like are stored where they change.
        check: Check of the row before, for the first row the header's digest.
    """
    flags = Flag.SKIPPED * row.skipped | Flag.REFRESHED * row.refreshed
    rates = b""
    for name, flag in RATES.items():
        new = getattr(row, name)
        if before is None or new != getattr(before, name):
            flags |= flag
            rates += struct.pack(f"<{len(new)}d", *new)
    values = [*row.projected_gradients, *(narrow(value) for pair in row.losses for value in pair)]
    body = bytes([flags]) + struct.pack(f"<{len(values)}f", *values) + rates
    return body + _chain(check, row.step, body, row.thresholds)


def unpack_row(
    step: int, data: bytes, refresh: bytes | None, before: StepRecord | None, check: bytes, groups: int
) -> StepRecord:
    """The row again, checked against the one before it.

    Args:
        step: Index of the step.
        data: What `pack_row` gave.
        refresh: Packed thresholds of the refresh kept for this step, if there is one.
        before: The row before.
        check: Check of the row before.
        groups: Number of parameter groups, from the header.

    Raises:
        ValueError: When the bytes are not those that were written.
    """
    body, found = data[:-CHECK_SIZE], data[-CHECK_SIZE:]
    if found != _chain(check, step, body, refresh or b""):
        raise ValueError("its check does not match")
    flags = Flag(body[0])
    if bool(flags & Flag.REFRESHED) != (refresh is not None):
        raise ValueError(
            "its mask refresh is missing" if refresh is None else "it has a mask refresh that it does not name"
        )
    changed = [name for name, flag in RATES.items() if flags & flag]
    if before is None and len(changed) < len(RATES):
        raise ValueError("the first step names no learning rate")
    per_sample = 8 if flags & Flag.SKIPPED else 12
    samples, rest = divmod(len(body) - 1 - 8 * groups * len(changed), per_sample)
    if rest or not 1 <= samples <= MAX_SAMPLES:
        raise ValueError(f"it has {len(data)} bytes, which fits no number of samples")
    width = samples * per_sample // 4
    values = struct.unpack_from(f"<{width}f", body, 1)
    gradients, losses = values[: width - 2 * samples], values[width - 2 * samples :]
    offset = 1 + 4 * width
    rates: dict[str, Any] = {name: getattr(before, name, ()) for name in RATES}
    for name in changed:
        rates[name] = struct.unpack_from(f"<{groups}d", body, offset)
        offset += 8 * groups
    return StepRecord(
        step=step,
        projected_gradients=gradients,
        losses=tuple(zip(losses[::2], losses[1::2], strict=True)),
        **rates,
        skipped=bool(flags & Flag.SKIPPED),
        refreshed=refresh is not None,
        thresholds=refresh or b"",
    )


def check_of(data: bytes) -> bytes:
    """The check at the end of a packed row."""
    return data[-CHECK_SIZE:]


def narrow(value: float) -> float:
    """A loss as float32 can hold it: beyond its range infinity."""
    return value if not math.isfinite(value) or abs(value) <= _FLOAT32_MAX else math.copysign(math.inf, value)


def _chain(check: bytes, step: int, body: bytes, thresholds: bytes) -> bytes:
    content = step.to_bytes(8, "little") + len(body).to_bytes(4, "little") + body + thresholds
    return blake2b(content, digest_size=CHECK_SIZE, key=check).digest()


@dataclass(frozen=True, slots=True)
class Mark:
    """A note.

    Attributes:
        steps: Steps of the optimizer that were done.
        kind: ``checkpoint``: a file without weights was written (``file``, ``sha256``). ``weights``: the weights of
            this step had the hash ``root``. ``anchor``: all weights were written (``file``, ``root``). ``resumed``: the
            run went on from here (``machine``).
        facts: What was noted, in plain types.
    """

    steps: int
    kind: str
    facts: dict[str, Any]


def pack_mark(mark: Mark, check: bytes) -> bytes:
    """Bytes of a mark.

    Args:
        mark: The mark.
        check: Check of the last row before it.
    """
    body = json.dumps({"kind": mark.kind, **mark.facts}, separators=(",", ":"), allow_nan=False).encode()
    return body + _check(mark.steps, body, check)


def unpack_mark(steps: int, data: bytes, check: bytes) -> Mark:
    """The mark again.

    Raises:
        ValueError: When the bytes are not those that were written.
    """
    body = data[:-CHECK_SIZE]
    if data[-CHECK_SIZE:] != _check(steps, body, check):
        raise ValueError("its check does not match")
    facts = json.loads(body)
    if not isinstance(facts, dict) or not isinstance(facts.get("kind"), str):
        raise ValueError("it has no kind")
    return Mark(steps, facts.pop("kind"), facts)


def _check(steps: int, body: bytes, check: bytes) -> bytes:
    return blake2b(steps.to_bytes(8, "little") + body, digest_size=CHECK_SIZE, key=check, person=b"mark").digest()


def pack_thresholds(thresholds: Sequence[float]) -> bytes:
    """Deflated floats, one a tensor that takes part (infinity: no threshold); float32 where that holds them exactly."""
    narrow = struct.pack(f"<{len(thresholds)}f", *thresholds)
    exact = struct.unpack(f"<{len(thresholds)}f", narrow) == tuple(thresholds)
    return zlib.compress(narrow if exact else struct.pack(f"<{len(thresholds)}d", *thresholds), 9)


def unpack_thresholds(data: bytes, tensors: int) -> tuple[float, ...]:
    """The thresholds again.

    Args:
        data: What `pack_thresholds` gave.
        tensors: Number of tensors that take part.

    Raises:
        ValueError: If they are not that many.
    """
    try:
        plain = inflate(data, 8 * tensors)
    except zlib.error as error:
        raise ValueError(f"the thresholds are damaged: {error}") from None
    if len(plain) not in (4 * tensors, 8 * tensors):
        raise ValueError(f"{len(plain)} bytes of thresholds for {tensors} tensors")
    return struct.unpack(f"<{tensors}{'f' if len(plain) == 4 * tensors else 'd'}", plain)
