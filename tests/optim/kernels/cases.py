"""Weights, masks and streams that every kernel is tried on."""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace

import numba
import pytest
import torch
from torch import Tensor

from smezo_pl.optim.kernels import Kernel, Update
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Distribution, Stream

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("dense", "small", "large", "random", "packed", "empty", "all", "all but NaN")
DISTRIBUTIONS = ("gaussian", "rademacher")

# (global index of the first element, number of elements): whole blocks, parts of blocks, less than a block, across the
# boundary of a block of signs, more groups than 32 bits count.
RANGES = ((0, 2048), (0, 1), (5, 1023), (1000, 2500), (16384 - 512, 1024), (8, 40007), ((3 << 35) + 12345, 3000))


def weights(dtype: torch.dtype, count: int, seed: int = 0) -> Tensor:
    """Usual weights with all that is unusual strewn in: zeros of both signs, subnormal numbers, infinities, NaN."""
    generator = torch.Generator().manual_seed(seed)
    theta = (torch.randn(count, generator=generator) * 0.02).to(dtype)
    for offset, value in enumerate((-0.0, 0.0, float("inf"), -float("inf"), 1e-7, -3e-39, 3e38, 65504.0, -3e-6)):
        theta[3 + offset :: 101] = value
    codes = theta.view(torch.int32 if dtype == torch.float32 else torch.int16)
    exponent = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    codes[20::211] = exponent + 5  # a NaN with a payload
    codes[21::211] = exponent + 7 - (1 << (8 * theta.element_size() - 1))  # a negative one
    return theta


def mask_of(rule: str, count: int, start: int = 0) -> Mask:
    """A mask of a rule, or of one of its limits."""
    if rule == "packed":
        generator = torch.Generator().manual_seed(7)
        bits = torch.randint(0, 256, ((count + 7) // 8,), dtype=torch.uint8, generator=generator)
        if count % 8:
            bits[-1] &= (1 << count % 8) - 1
        return Mask("packed", bits=bits)
    return {
        "dense": Mask("dense"),
        "small": Mask("small", threshold=0.005),
        "large": Mask("large", threshold=0.02),
        "random": Mask("random", stream=Stream(99, 3, 0, 5, start), level=13107),
        "empty": Mask("small", threshold=-1.0),
        "all": Mask("random", stream=Stream(99, 3, 0, 5, start), level=65536),
        "all but NaN": Mask("small"),
    }[rule]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, payloads of NaN and signs of zeros included, wherever the two are."""
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def moved(mask: Mask, device: torch.device) -> Mask:
    """The mask for weights on a device."""
    return mask if mask.bits is None else replace(mask, bits=mask.bits.to(device))


def update(
    kernel: Kernel,
    theta: Tensor,
    mask: Mask,
    noise: Distribution,
    streams: list[Stream],
    scales: list[float],
    decay: float,
    rounding: Stream | None,
) -> None:
    """Update one tensor."""
    kernel.update_all([Update(theta, mask, streams, scales, decay, rounding)], noise)


def updates(start: int) -> Iterator[tuple[list[Stream], list[float], float, Stream | None]]:
    """Streams, scales, decay and rounding of a few updates."""
    one, two = Stream((1 << 64) - 5, (1 << 32) - 1, 7, (1 << 24) - 1, start), Stream(9, 3, 1, 4, start)
    yield [one], [3e-4], 0.0, None
    yield [one], [-2e-6], 1e-3, one
    yield [one, two, one], [1e-4, -3e-4, 2e-5], 0.0, two
    yield [one, two], [0.0, 1e-6], 2e-4, None


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

needs_two_threads = pytest.mark.skipif(
    numba.config.NUMBA_NUM_THREADS < 2, reason="numba has one thread: a result would be compared with itself"
)

# Triton reads the variable when it is imported, which torch may have done long before a test.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu_or_interpreter = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, and not started with TRITON_INTERPRET=1"
)


def place(name: str) -> torch.device:
    """Device that a compiled kernel is tried on."""
    return torch.device("cpu" if name == "numba" or INTERPRETED else "cuda")
