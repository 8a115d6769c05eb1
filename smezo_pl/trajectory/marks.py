"""Notes in a record: checkpoints, fingerprints of the weights, resumes. Each is tied to the step it was made at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from smezo_pl.trajectory.rows import CHECK_SIZE


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
