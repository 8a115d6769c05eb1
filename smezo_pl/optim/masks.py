"""Which weights of a tensor take part: mask rules, as small values that a kernel evaluates inside its fused pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from torch import Tensor

from smezo_pl.optim.noise import Stream

MaskRule = Literal["small", "large", "random", "dense"]
"""Rules a user chooses from: ``small`` is Sparse MeZO, ``random`` R-MeZO, ``large`` an ablation, ``dense`` MeZO."""

MASK_RULES: tuple[MaskRule, ...] = ("small", "large", "random", "dense")

WORD_RANGE = 1 << 16
"""The random rule compares 16-bit words, so its density is a multiple of ``1 / WORD_RANGE``."""


@dataclass(frozen=True, slots=True)
class Mask:
    """The selection ``m`` of one tensor, described rather than stored.

    A weight is active (perturbed and updated) where

    - ``dense``: always,
    - ``small``: ``|theta| <= threshold``,
    - ``large``: ``|theta| > threshold``,
    - ``random``: its 16-bit word of ``stream`` is below ``level``,
    - ``packed``: its bit is set.

    A NaN compares false, so it is active under ``dense``, ``random`` and ``packed`` only.

    Attributes:
        rule: One of the rules above.
        threshold: Magnitude ``h`` that ``small`` and ``large`` compare with.
        stream: Where the random rule draws from.
        level: Active share of the random rule times 65536.
        bits: Packed mask, uint8 of shape ``[ceil(n / 8)]``: element ``i`` is bit ``i & 7`` of byte ``i >> 3``.
    """

    rule: Literal["small", "large", "random", "dense", "packed"]
    threshold: float = inf
    stream: Stream | None = None
    level: int = WORD_RANGE
    bits: Tensor | None = None

    def part(self, first: int, count: int) -> Mask:
        """The same selection for the elements ``[first, first + count)``.

        Raises:
            ValueError: If a packed mask would have to be cut inside a byte.
        """
        if self.rule == "random" and self.stream is not None:
            return replace(self, stream=replace(self.stream, start=self.stream.start + first))
        if self.rule == "packed" and self.bits is not None:
            if first % 8:
                raise ValueError(f"a packed mask can be cut at multiples of 8 elements, got {first}")
            return replace(self, bits=self.bits[first // 8 : (first + count + 7) // 8])
        return self


DENSE = Mask("dense")
