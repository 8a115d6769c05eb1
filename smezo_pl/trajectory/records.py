"""Steps, events and thresholds of a trajectory as bytes. Each is tied by a checksum to the step before it."""

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
from smezo_pl.trajectory.header import CHANGING_FORMAT, FORMAT, Header, inflate

CHECK_SIZE = 8  # bytes of the checksum at the end of a packed step or event
_FLOAT32_MAX = 3.4028234663852886e38
MAX_NUMBERS = 1 << 16
"""Most numbers of a step that a reader accepts: bounds what a corrupted file can make it allocate."""


class Flag(IntFlag):
    """What the bytes of a step hold beside its projected gradients and losses.

    They are written seven to a byte, the lowest first, with bit 7 set where another byte follows. All from ``ROWS`` on
    are of format 3.
    """

    SKIPPED = 1
    REFRESHED = 2
    LR = 4
    WEIGHT_DECAY = 8
    EPS = 16
    SPARSITY = 32
    UNREAD = 64
    ROWS = 128
    SHARED = 256
    MEAN_SQUARE = 512


def format_of(record: StepRecord, header: Header) -> int:
    """The format that a reader of this step must know."""
    changes = record.unread or record.samples not in (0, header.num_samples)
    return max(header.format, CHANGING_FORMAT if changes else FORMAT)


RATES = {"lr": Flag.LR, "weight_decay": Flag.WEIGHT_DECAY, "eps": Flag.EPS, "sparsity": Flag.SPARSITY}
"""What may change from step to step, one value per parameter group, and the flag of a step that stores it."""


def pack_step(record: StepRecord, before: StepRecord | None, check: bytes) -> bytes:
    """Bytes of a step, tied to the one before it and its checksum, or for the first step to the header's.

    Learning rates and the like are stored where they change, and so is which tensors were left alone.
    """
    flags = Flag.SKIPPED * record.skipped | Flag.REFRESHED * record.refreshed
    rates = b""
    for name, flag in RATES.items():
        new = getattr(record, name)
        if before is None or new != getattr(before, name):
            flags |= flag
            rates += struct.pack(f"<{len(new)}d", *new)
    values = [*record.projected_gradients, *(narrow(value) for pair in record.losses for value in pair)]
    earlier = before if before is not None else _FIRST
    unread = b""
    if record.unread != earlier.unread:
        flags |= Flag.UNREAD
        unread = _mask_bytes(record.unread)
        unread += struct.pack("<I", len(unread))
    rows = b""
    if record.rows != earlier.rows:
        flags |= Flag.ROWS
        rows = struct.pack("<I", record.rows)
    if record.shared != earlier.shared:
        flags |= Flag.SHARED
        shared = _mask_bytes(record.shared)
        rows += struct.pack("<I", len(shared)) + shared
    if record.mean_square != earlier.mean_square:
        flags |= Flag.MEAN_SQUARE
        rows += struct.pack("<d", record.mean_square)
    body = _flag_bytes(flags) + rows + struct.pack(f"<{len(values)}f", *values) + rates + unread
    return body + _step_check(check, record.step, body, record.thresholds)


def unpack_step(
    step: int, data: bytes, thresholds: bytes | None, before: StepRecord | None, check: bytes, groups: int
) -> StepRecord:
    """The inverse of `pack_step`; ``thresholds`` are packed, and None where no mask was refreshed.

    A `ValueError` says why the bytes are not those that were written.
    """
    body, found = data[:-CHECK_SIZE], data[-CHECK_SIZE:]
    if found != _step_check(check, step, body, thresholds or b""):
        raise ValueError("its checksum does not match")
    flags, start = _read_flags(body)
    if bool(flags & Flag.REFRESHED) != (thresholds is not None):
        raise ValueError("its mask refresh is missing, or there is one that it does not name")
    earlier = before if before is not None else _FIRST
    unread, rows, shared, mean_square = earlier.unread, earlier.rows, earlier.shared, earlier.mean_square
    try:
        if flags & Flag.ROWS:
            (rows,), start = struct.unpack_from("<I", body, start), start + 4
        if flags & Flag.SHARED:
            (length,), start = struct.unpack_from("<I", body, start), start + 4
            shared, start = int.from_bytes(body[start : start + length], "little"), start + length
        if flags & Flag.MEAN_SQUARE:
            (mean_square,), start = struct.unpack_from("<d", body, start), start + 8
    except struct.error:
        raise ValueError("it ends within what it holds of its rows") from None
    if flags & Flag.UNREAD:
        end = len(body) - 4 - int.from_bytes(body[-4:], "little")
        if end < start:
            raise ValueError("it ends within the tensors that were left alone")
        body, unread = body[:end], int.from_bytes(body[end:-4], "little")
    changed = [name for name, flag in RATES.items() if flags & flag]
    if before is None and len(changed) < len(RATES):
        raise ValueError("the first step names no learning rate")
    per_pair = 8 if flags & Flag.SKIPPED else 12
    pairs, rest = divmod(len(body) - start - 8 * groups * len(changed), per_pair)
    if rest or not 1 <= pairs <= MAX_NUMBERS or not rows or pairs % rows:
        raise ValueError(f"it has {len(data)} bytes, which fits no number of samples")
    width = pairs * per_pair // 4
    values = struct.unpack_from(f"<{width}f", body, start)
    gradients, losses = values[: width - 2 * pairs], values[width - 2 * pairs :]
    rates: dict[str, Any] = {name: getattr(before, name, ()) for name in RATES}
    for index, name in enumerate(changed):
        rates[name] = struct.unpack_from(f"<{groups}d", body, start + 4 * width + 8 * groups * index)
    return StepRecord(
        step=step,
        projected_gradients=gradients,
        losses=tuple(zip(losses[::2], losses[1::2], strict=True)),
        **rates,
        skipped=bool(flags & Flag.SKIPPED),
        refreshed=thresholds is not None,
        thresholds=thresholds or b"",
        unread=unread,
        rows=rows,
        shared=shared,
        mean_square=mean_square,
    )


_FIRST = StepRecord(-1, (), (), (), (), (), ())  # what the first step is stored as a change of


def _flag_bytes(flags: int) -> bytes:
    seven = [flags >> shift & 127 for shift in range(0, max(1, flags.bit_length()), 7)]
    return bytes(part | 128 * (index < len(seven) - 1) for index, part in enumerate(seven))


def _read_flags(body: bytes) -> tuple[Flag, int]:
    """The flags at the beginning of a step, and where they end."""
    flags = 0
    for index, byte in enumerate(body[:4]):
        flags |= (byte & 127) << 7 * index
        if byte < 128:
            if flags > sum(Flag):
                break
            return Flag(flags), index + 1
    raise ValueError("it holds something that this version does not know")


def _mask_bytes(mask: int) -> bytes:
    return mask.to_bytes(-(-mask.bit_length() // 8), "little")


def narrow(value: float) -> float:
    """A loss as float32 can hold it: infinity beyond its range."""
    return value if not math.isfinite(value) or abs(value) <= _FLOAT32_MAX else math.copysign(math.inf, value)


def _step_check(check: bytes, step: int, body: bytes, thresholds: bytes) -> bytes:
    content = step.to_bytes(8, "little") + len(body).to_bytes(4, "little") + body + thresholds
    return blake2b(content, digest_size=CHECK_SIZE, key=check).digest()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened between two steps of a run.

    Attributes:
        steps: Steps of the optimizer that were done.
        kind: ``checkpoint``: a file without weights was written (``file``, ``sha256``). ``weights``: the weights had
            the hash ``root``. ``anchor``: a full-weight snapshot was written (``file``, ``sha256``).
            ``settings``: the run was resumed with other settings (``changes``: by name, the value before and after).
        facts: What is known of it, in plain types.
    """

    steps: int
    kind: str
    facts: dict[str, Any]


def pack_event(event: Event, check: bytes) -> bytes:
    """Bytes of an event, tied to the checksum of the last step before it."""
    body = json.dumps({"kind": event.kind, **event.facts}, separators=(",", ":"), allow_nan=False).encode()
    return body + _event_check(event.steps, body, check)


def unpack_event(steps: int, data: bytes, check: bytes) -> Event:
    """The inverse of `pack_event`, as `unpack_step` is of `pack_step`."""
    body = data[:-CHECK_SIZE]
    if data[-CHECK_SIZE:] != _event_check(steps, body, check):
        raise ValueError("its checksum does not match")
    facts = json.loads(body)
    if not isinstance(facts, dict) or not isinstance(facts.get("kind"), str):
        raise ValueError("it has no kind")
    return Event(steps, facts.pop("kind"), facts)


def _event_check(steps: int, body: bytes, check: bytes) -> bytes:
    return blake2b(steps.to_bytes(8, "little") + body, digest_size=CHECK_SIZE, key=check, person=b"mark").digest()


def pack_thresholds(thresholds: Sequence[float]) -> bytes:
    """Deflated floats, one per optimized tensor (infinity: no threshold); float32 where that holds them exactly."""
    short = struct.pack(f"<{len(thresholds)}f", *thresholds)
    exact = struct.unpack(f"<{len(thresholds)}f", short) == tuple(thresholds)
    return zlib.compress(short if exact else struct.pack(f"<{len(thresholds)}d", *thresholds), 9)


def unpack_thresholds(data: bytes, tensors: int) -> tuple[float, ...]:
    """The inverse of `pack_thresholds` for so many optimized tensors; a `ValueError` if they are not that many."""
    plain = inflate(data, 8 * tensors)
    if len(plain) not in (4 * tensors, 8 * tensors):
        raise ValueError(f"{len(plain)} bytes of thresholds for {tensors} tensors")
    return struct.unpack(f"<{tensors}{'f' if len(plain) == 4 * tensors else 'd'}", plain)
