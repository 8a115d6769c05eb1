"""Thresholds of one mask refresh as bytes: kept to check a replay, which computes them again from the weights."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from smezo_pl.trajectory.header import inflate


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
