r"""Noise scheme 1: every random number of a run as a pure function of integers.

There is no generator state: element ``i`` of tensor ``k`` at step ``t`` and sample ``q`` has one value for a base seed,
whatever computes it and in whatever order. This file is the definition, in plain torch; the fused kernels
(`smezo_pl.optim.kernels`) give the same bits. Nothing below changes within a scheme version, because trajectories are
replayed by it.

**Words.** One call of philox4x32-10 (Salmon et al., 2011; Random123) is a *group* of four 32-bit words::

    key     = (seed mod 2^32, seed div 2^32)
    counter = (group mod 2^32, tensor + (group div 2^32) * 2^24, step, sample + kind * 2^24)

with the kinds NOISE (0), MASK (1) and ROUNDING (2). Elements are served in blocks by their global index: 1024 elements
for normals and 16-bit words, 16384 for signs. Block ``b`` takes the 128 groups from ``128 * b`` on. Its 512 words form
one array: the words 0 and 1 of its groups, interleaved (group 0 word 0, group 0 word 1, group 1 word 0, ...), then the
words 2 and 3 likewise. (Interleaved because both words of a 64-bit lane are stored at once.)

**Normals.** Word ``m`` of a block makes the elements ``m`` and ``m + 512``, by Box-Muller on half steps: bits 0-19 are
the radius, bits 20-29 the angle in a quadrant, bits 30 and 31 the signs. In float32, every line as written, each
operation rounded once (no fused multiply-add, no library function but the correctly rounded square root)::

    f  = float(word & 0xfffff) + 0.5                          U = f / 2^20, in (0, 1)
    n  = bits(f) - 0x3f3504f3                                 so that the mantissa falls in [sqrt(1/2), sqrt(2))
    m  = float_of_bits((n & 0x7fffff) + 0x3f3504f3)
    t  = m - 1
    s  = t * t
    p  = ((L6*s + (L5*t + L4))*s + (L3*t + L2))*s + (L1*t + L0)       about -2 ln(1 + t) / t
    R  = sqrt(float((n >> 23) - 20) * LN + p * t)             sqrt(-2 ln U); n >> 23 keeps the sign
    v  = float_of_bits(((word >> 7) & 0x7fe000) | 0x3f800000) - (1.5 - 2^-11)      half steps in (-1/2, 1/2)
    w  = v * v
    x  = w * w
    S  = ((S3*w + S2)*x + (S1*w + S0)) * v                    sin(v pi/2) / sqrt(2)
    C  = (C3*w + C2)*x + (C1*w + C0)                          cos(v pi/2) / sqrt(2)
    z[m]       = R * (C - S), negated where bit 31 is set     cosine of the angle pi/4 + v pi/2
    z[m + 512] = R * (C + S), negated where bit 30 is set     sine

The largest ``|z|`` is 5.39; the error against exact arithmetic is below 1.2e-6.

**Signs** (Rademacher). Element ``i`` of a block reads bit ``i div 512`` of word ``i mod 512``: -1 where it is set.

**16-bit words** (random masks, stochastic rounding). Element ``m < 512`` reads the low half of word ``m``, element
``m + 512`` its high half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NOISE_SCHEME = 1
"""Version of the scheme above, kept in every trajectory."""

Distribution = Literal["gaussian", "rademacher"]
"""Distribution of ``z``: standard normal (the papers') or +1 and -1 with equal odds."""

NOISE, MASK, ROUNDING = 0, 1, 2
"""Kinds of draws, told apart in the counter."""

BLOCK = 1024
"""Elements of a block of normals or of 16-bit words."""

SIGN_BLOCK = 16384
"""Elements of a block of signs."""

GROUPS = 128
"""Groups of a block: 512 words."""

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

# Minimax fits in float64, rounded to float32: of the logarithm for the error it leaves in R, on [sqrt(1/2) - 1,
# sqrt(2) - 1]; of sine and cosine on v in [-1/2, 1/2].
LOG = (-2.0000026, 1.0000459, -0.66622055, 0.49748367, -0.41031843, 0.3786392, -0.24240342)
LOG_2 = -1.3862944
SIN = (1.1107208, -0.4567648, 0.056339372, -0.0032472387)
COS = (0.70710677, -0.8723555, 0.17932132, -0.014430884)
SQRT_HALF_BITS = 0x3F3504F3
ANGLE_CENTER = 1.5 - 2.0**-11

_LOW = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Stream:
    """Where the numbers of one tensor at one step come from.

    Attributes:
        seed: Base seed of the run, in ``[0, 2**64)``.
        step: Step, in ``[0, 2**32)``.
        sample: Sample of n-SPSA, in ``[0, 2**24)``.
        tensor: Number of the tensor among all parameters as given, in ``[0, 2**24)``.
        start: Global index of the first element, for a shard of a larger tensor, in ``[0, 2**42)``.

    Raises:
        ValueError: If one of them is out of its range.
    """

    seed: int
    step: int
    sample: int
    tensor: int
    start: int = 0

    def __post_init__(self) -> None:
        # A shift leaves 0 of what is in range, and -1 or less of what is negative.
        if not self.seed >> 64 | self.step >> 32 | self.sample >> 24 | self.tensor >> 24 | self.start >> 42:
            return
        for name, bits in (("seed", 64), ("step", 32), ("sample", 24), ("tensor", 24), ("start", 42)):
            value = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{name} of a noise stream must be in [0, 2**{bits}), got {value}")

    def part(self, first: int) -> Stream:
        """The same numbers from the element ``first`` of this stream on."""
        return Stream(self.seed, self.step, self.sample, self.tensor, self.start + first)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The four words of philox4x32-10 on tensors of counters: 32-bit words in int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The products fill 64 bits and wrap to negative numbers: hence the masks after the shifts.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & _LOW, (k1 + PHILOX_KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def normals(stream: Stream, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers, float32 of shape ``[numel]``, from element ``stream.start`` on."""
    return _in_blocks(_normals_of, BLOCK, stream, NOISE, numel, device)


def signs(stream: Stream, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers +1 and -1 with equal odds, float32 of shape ``[numel]``, from element ``stream.start`` on."""
    return _in_blocks(_signs_of, SIGN_BLOCK, stream, NOISE, numel, device)


def words16(stream: Stream, kind: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform 16-bit words of the kind `MASK` or `ROUNDING`, int32 of shape ``[numel]``, from ``stream.start`` on."""
    return _in_blocks(_halves_of, BLOCK, stream, kind, numel, device)


def draw(distribution: Distribution, stream: Stream, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """``z`` of a distribution: `normals` or `signs`."""
    return normals(stream, numel, device) if distribution == "gaussian" else signs(stream, numel, device)


def chunk_of(device: torch.device) -> int:
    """Elements that the plain torch passes work on at a time: a CPU's cache holds them; elsewhere launches are few."""
    return 1 << 18 if device.type == "cpu" else 1 << 22


def block_words(stream: Stream, kind: int, first: int, blocks: int, device: torch.device | str = "cpu") -> Tensor:
    """The words of blocks, from number ``first`` on whatever the stream's start: int64 of shape ``[blocks, 512]``."""
    group = torch.arange(first * GROUPS, (first + blocks) * GROUPS, dtype=torch.int64, device=device)
    step = torch.full((), stream.step, dtype=torch.int64, device=device)
    counter = (group & _LOW, stream.tensor + ((group >> 32) << 24), step, step * 0 + (stream.sample + (kind << 24)))
    w0, w1, w2, w3 = (word.view(blocks, GROUPS) for word in philox(counter, (stream.seed & _LOW, stream.seed >> 32)))
    pairs = torch.stack((torch.stack((w0, w1), -1), torch.stack((w2, w3), -1)), 1)  # [blocks, 2, groups, 2]
    return pairs.view(blocks, 4 * GROUPS)


def _in_blocks(
    make: Callable[[Tensor], Tensor],
    size: int,
    stream: Stream,
    kind: int,
    numel: int,
    device: torch.device | str,
) -> Tensor:
    """Cut a range of elements out of whole blocks, some blocks at a time."""
    if torch.device(device).type == "mps":
        # MPS has no float64, which the root needs.
        return _in_blocks(make, size, stream, kind, numel, "cpu").to(device)
    out = torch.empty(numel, dtype=torch.float32 if kind == NOISE else torch.int32, device=device)
    end = stream.start + numel
    last, step = -(-end // size), chunk_of(out.device) // size
    for first in range(stream.start // size, last, step):
        blocks = min(step, last - first)
        made = make(block_words(stream, kind, first, blocks, device)).view(-1)
        low, high = max(stream.start, first * size), min(end, (first + blocks) * size)
        out[low - stream.start : high - stream.start] = made[low - first * size : high - first * size]
    return out


def _normals_of(words: Tensor) -> Tensor:
    f = (words & 0xFFFFF).to(torch.float32) + 0.5
    n = f.view(torch.int32) - SQRT_HALF_BITS
    t = ((n & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0
    s = t * t
    p = ((s * LOG[6] + (t * LOG[5] + LOG[4])) * s + (t * LOG[3] + LOG[2])) * s + (t * LOG[1] + LOG[0])
    square = ((n >> 23) - 20).to(torch.float32) * LOG_2 + p * t
    # torch's float32 root is not correctly rounded on the CPU; the float64 one, rounded, is.
    radius = square.to(torch.float64).sqrt().to(torch.float32)
    v = (((words >> 7) & 0x7FE000) | 0x3F800000).to(torch.int32).view(torch.float32) - ANGLE_CENTER
    w = v * v
    x = w * w
    sine = ((w * SIN[3] + SIN[2]) * x + (w * SIN[1] + SIN[0])) * v
    cosine = (w * COS[3] + COS[2]) * x + (w * COS[1] + COS[0])
    z0, z1 = radius * (cosine - sine), radius * (cosine + sine)
    return torch.cat((torch.where(words >= 1 << 31, -z0, z0), torch.where((words >> 30) & 1 == 1, -z1, z1)), 1)


def _signs_of(words: Tensor) -> Tensor:
    bit = torch.arange(32, device=words.device)[:, None]
    return (1 - 2 * ((words[:, None, :] >> bit) & 1)).to(torch.float32).flatten(1)


def _halves_of(words: Tensor) -> Tensor:
    return torch.cat((words & 0xFFFF, words >> 16), 1).to(torch.int32)
