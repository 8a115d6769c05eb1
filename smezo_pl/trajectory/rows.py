"""One step as bytes, and the chain of checks that ties each step to all that came before it.

Layout of a row, little-endian; ``q`` samples, ``p`` parameter groups::

    flags          uint8   see Flag
    gradients      q x float32, the projected gradients as the update used them (none when the step was skipped)
    losses         q x (float32 l+, float32 l-)
    lr             p x float64, only when a value differs from the row before
    weight_decay   p x float64, the same
    eps            p x float64, the same
    sparsity       p x float64, the same
    check          8 bytes: blake2b keyed with the check before, of step, all bytes above, and the refresh if any

The first row's "check before" is the header's digest, so a row that was moved, changed, left out or taken from another
run breaks the chain at that row.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntFlag
from hashlib import blake2b
from typing import NamedTuple

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


_RATE_FLAGS = (Flag.LR, Flag.WEIGHT_DECAY, Flag.EPS, Flag.SPARSITY)


class Rates(NamedTuple):
    """What may change from step to step: one value a parameter group."""

    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    eps: tuple[float, ...]
    sparsity: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepRow:
    """What one step adds to the record.

    Attributes:
        step: Index of the step, the one its noise was drawn with.
        projected_gradients: One float32 a sample; empty when skipped.
        losses: ``(l+, l-)`` of each sample, float32.
        rates: Learning rate, weight decay, eps and sparsity of each parameter group.
        skipped: Whether the step left the weights alone.
        refresh: Thresholds, as `smezo_pl.trajectory.refresh` packs them, if masks were refreshed before the step.
    """

    step: int
    projected_gradients: tuple[float, ...]
    losses: tuple[tuple[float, float], ...]
    rates: Rates
    skipped: bool = False
    refresh: bytes | None = None

    @property
    def loss(self) -> float:
        """Mean of ``l+`` and ``l-`` over the samples."""
        return sum(plus + minus for plus, minus in self.losses) / (2 * len(self.losses))


def pack_row(row: StepRow, before: Rates | None, check: bytes) -> bytes:
    """Bytes of a row, its check included.

    Args:
        row: The step.
        before: Rates of the row before, None for the first.
        check: Check of the row before, for the first row the header's digest.
    """
    flags = Flag.SKIPPED * row.skipped | Flag.REFRESHED * (row.refresh is not None)
    rates = b""
    for flag, new, old in zip(_RATE_FLAGS, row.rates, before or (None,) * 4, strict=True):
        if new != old:
            flags |= flag
            rates += struct.pack(f"<{len(new)}d", *new)
    values = [*row.projected_gradients, *(narrow(value) for pair in row.losses for value in pair)]
    body = bytes([flags]) + struct.pack(f"<{len(values)}f", *values) + rates
    return body + _chain(check, row.step, body, row.refresh)


def unpack_row(
    step: int, data: bytes, refresh: bytes | None, before: Rates | None, check: bytes, groups: int
) -> StepRow:
    """The row again, checked against the one before it.

    Args:
        step: Index of the step.
        data: What `pack_row` gave.
        refresh: The refresh kept for this step, if there is one.
        before: Rates of the row before.
        check: Check of the row before.
        groups: Number of parameter groups, from the header.

    Raises:
        ValueError: When the bytes are not those that were written.
    """
    body, found = data[:-CHECK_SIZE], data[-CHECK_SIZE:]
    if found != _chain(check, step, body, refresh):
        raise ValueError("its check does not match")
    flags = Flag(body[0])
    if bool(flags & Flag.REFRESHED) != (refresh is not None):
        raise ValueError(
            "its mask refresh is missing" if refresh is None else "it has a mask refresh that it does not name"
        )
    changed = [bool(flags & flag) for flag in _RATE_FLAGS]
    if before is None and not all(changed):
        raise ValueError("the first step names no learning rate")
    per_sample = 8 if flags & Flag.SKIPPED else 12
    samples, rest = divmod(len(body) - 1 - 8 * groups * sum(changed), per_sample)
    if rest or not 1 <= samples <= MAX_SAMPLES:
        raise ValueError(f"it has {len(data)} bytes, which fits no number of samples")
    width = samples * per_sample // 4
    values = struct.unpack_from(f"<{width}f", body, 1)
    gradients, losses = values[: width - 2 * samples], values[width - 2 * samples :]
    offset = 1 + 4 * width
    rates: list[tuple[float, ...]] = []
    for index, present in enumerate(changed):
        if present:
            rates.append(struct.unpack_from(f"<{groups}d", body, offset))
            offset += 8 * groups
        else:
            assert before is not None
            rates.append(before[index])
    return StepRow(
        step=step,
        projected_gradients=gradients,
        losses=tuple(zip(losses[::2], losses[1::2], strict=True)),
        rates=Rates(*rates),
        skipped=bool(flags & Flag.SKIPPED),
        refresh=refresh,
    )


def check_of(data: bytes) -> bytes:
    """The check at the end of a packed row."""
    return data[-CHECK_SIZE:]


def narrow(value: float) -> float:
    """A loss as float32 can hold it: beyond its range infinity."""
    return value if not math.isfinite(value) or abs(value) <= _FLOAT32_MAX else math.copysign(math.inf, value)


def _chain(check: bytes, step: int, body: bytes, refresh: bytes | None) -> bytes:
    content = step.to_bytes(8, "little") + len(body).to_bytes(4, "little") + body + (refresh or b"")
    return blake2b(content, digest_size=CHECK_SIZE, key=check).digest()
