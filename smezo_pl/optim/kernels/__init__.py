"""The fused passes over the weights: numba on the CPU, Triton on CUDA, plain torch as reference and for the rest.

All kernels give the same bits. Each works on one flat tensor at a time and generates the noise it needs from integers
(`smezo_pl.optim.noise`); nothing of the size of the weights is stored.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from smezo_pl.optim.kernels._common import Update
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Law, Stream

__all__ = ["Kernel", "KernelName", "Update", "available_kernels", "get_kernel"]

KernelName = Literal["auto", "numba", "triton", "torch"]
"""Who makes the passes; ``auto`` takes Triton on CUDA, numba on the CPU, and torch elsewhere."""

log = logging.getLogger(__name__)


class Kernel(Protocol):
    """The passes over one tensor's weights.

    ``theta`` and ``out`` are one-dimensional and contiguous, float32, bfloat16 or float16 (float64: the torch kernel
    alone; the others hand it over). ``m`` is the mask, ``z`` the noise of the law. Arithmetic is float32 (float64 for
    float64 weights), each operation rounded once, in the order written; scales and decay are rounded to that precision
    first. A weight outside the mask keeps its bits, the payload of a NaN included. A selected weight follows the
    arithmetic: infinities stay, and every NaN becomes the one quiet NaN of its dtype. Streams give the noise of global
    element ``stream.start + i`` to ``theta[i]``.
    """

    name: str

    def perturb(self, theta: Tensor, out: Tensor, mask: Mask, law: Law, stream: Stream, scale: float) -> None:
        """``out = round(theta + scale * z)`` under the mask, ``theta`` elsewhere; a plain copy if ``scale`` is 0.

        Args:
            theta: Weights; not written unless ``out`` is the same memory.
            out: Where the result goes; may be ``theta`` itself.
            mask: Which weights take part, judged by ``theta``.
            law: Distribution of ``z``.
            stream: Where ``z`` comes from.
            scale: Factor of ``z``: eps or -eps.
        """
        ...

    def perturb_rows(
        self, theta: Tensor, out: Tensor, rows: Tensor, mask: Mask, law: Law, stream: Stream, scale: float
    ) -> None:
        """`perturb` some rows of a matrix: ``out[i]`` is what row ``rows[i]`` of the perturbed matrix is.

        Args:
            theta: Matrix of shape ``[n, width]``, contiguous, ``width`` a multiple of 8.
            out: Where the rows go, shape ``[len(rows), width]``.
            rows: Numbers of the rows, int64, in ``[0, n)``.
            mask: Mask of the whole matrix.
            law: Distribution of ``z``.
            stream: Where ``z`` of the whole matrix comes from.
            scale: Factor of ``z``.
        """
        ...

    def update(
        self,
        theta: Tensor,
        mask: Mask,
        law: Law,
        streams: Sequence[Stream],
        scales: Sequence[float],
        decay: float = 0.0,
        rounding: Stream | None = None,
    ) -> None:
        """``theta = round(theta - (scales[0] * z_0 + scales[1] * z_1 + ... + decay * theta))`` under the mask.

        Nothing is touched if all scales and the decay are 0; the decay is left out of the sum if it is 0.

        Args:
            theta: Weights, updated in place.
            mask: Which weights take part, judged by ``theta`` before the update.
            law: Distribution of ``z``.
            streams: One for each sample.
            scales: One for each sample: learning rate times projected gradient.
            decay: Learning rate times weight decay.
            rounding: Where the random bits of stochastic rounding come from; None rounds to nearest even. Weights of
                32 and 64 bits are always rounded to nearest.
        """
        ...

    def update_all(self, updates: Sequence[Update], law: Law) -> None:
        """`update` of several tensors, of any dtypes, at once: many small passes cost as much as one large one.

        Args:
            updates: The tensors and what `update` needs for each. No two share memory.
            law: Distribution of ``z``.
        """
        ...

    def select(self, theta: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Pack the mask and copy the weights under it.

        Args:
            theta: Weights.
            mask: Which of them.

        Returns:
            Bits as `pack` gives them, and the selected weights in ascending order of their index.
        """
        ...

    def restore(self, theta: Tensor, bits: Tensor, saved: Tensor) -> None:
        """Write saved weights back to where `select` found them.

        Args:
            theta: Weights, written in place.
            bits: First result of `select`.
            saved: Second result of `select`.
        """
        ...

    def pack(self, theta: Tensor, mask: Mask) -> Tensor:
        """Evaluate a mask to one bit a weight.

        Args:
            theta: Weights.
            mask: Which of them.

        Returns:
            uint8 of shape ``[ceil(n / 8)]``: weight ``i`` is bit ``i & 7`` of byte ``i >> 3``; spare bits are 0.
        """
        ...

    def histogram(self, theta: Tensor, shift: int, prefix: int | None) -> Tensor:
        """Count 16-bit digits of the magnitude codes (the bits of a weight without its sign).

        16-bit weights need ``histogram(theta, 0, None)``; float32 the upper halves ``histogram(theta, 16, None)`` and
        the lower ones of a bucket ``histogram(theta, 0, bucket)``.

        Args:
            theta: Weights.
            shift: Bits below the digit.
            prefix: Only weights with ``code >> (shift + 16) == prefix`` are counted; None counts all.

        Returns:
            int64 of shape ``[65536]``: how often each value of ``(code >> shift) & 0xffff`` occurs.
        """
        ...


def get_kernel(name: KernelName = "auto", device: torch.device | str = "cpu") -> Kernel:
    """The kernel of that name for a device; the choice is logged once.

    Args:
        name: ``auto``, or who shall make the passes.
        device: Where the weights are.

    Returns:
        A kernel. It keeps no state between calls, so one serves all tensors of the device.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the kernel asked for cannot run on the device or is not installed; says which can.
    """
    return _get_kernel(name, torch.device(device).type)


def available_kernels(device: torch.device | str = "cpu") -> list[str]:
    """Names of the kernels that can run on a device, the fastest first."""
    kind = torch.device(device).type
    return [name for name in ("triton", "numba", "torch") if _obstacle(name, kind) is None]


@cache
def _get_kernel(name: KernelName, kind: str) -> Kernel:
    if name not in ("auto", "numba", "triton", "torch"):
        raise ValueError(f"kernel must be 'auto', 'numba', 'triton' or 'torch', got {name!r}")
    why = ""
    chosen: str = name
    if name == "auto":
        chosen = {"cuda": "triton", "cpu": "numba"}.get(kind, "torch")
        obstacle = _obstacle(chosen, kind)
        if obstacle is not None:
            chosen, why = "torch", f" (slow; {chosen}: {obstacle})"
        elif chosen == "torch":
            why = f" (slow; no fused kernel for {kind})"
    obstacle = _obstacle(chosen, kind)
    if obstacle is not None:
        there = ", ".join(available_kernels(kind)) or "none"
        raise RuntimeError(f"kernel {name!r} cannot run on {kind}: {obstacle}; available for {kind}: {there}")
    log.info("kernel for %s: %s%s", kind, chosen, why)
    return _make(chosen)


def _make(name: str) -> Kernel:
    # Compilers are imported only when they are used: numba and Triton take a second each.
    kernel: Kernel
    if name == "numba":
        from smezo_pl.optim.kernels.numba_cpu import NumbaKernel

        kernel = NumbaKernel()
    elif name == "triton":
        from smezo_pl.optim.kernels.triton_gpu import TritonKernel

        kernel = TritonKernel()
    else:
        kernel = TorchKernel()
    return kernel


def _obstacle(name: str, kind: str) -> str | None:
    """Why a kernel cannot run on a kind of device, or None."""
    if kind == "meta":
        return "tensors on the meta device hold no weights"
    if name == "torch":
        return None
    if name == "numba" and kind != "cpu":
        return "it works on CPU memory only"
    if name == "triton" and kind != "cuda" and not _interpreted():
        return "Triton needs a CUDA or ROCm device"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error})"
    return None


def _interpreted() -> bool:
    """Whether Triton's interpreter is switched on: it runs kernels on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
