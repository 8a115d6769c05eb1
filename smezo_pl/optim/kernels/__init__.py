"""The fused passes over the weights: numba on the CPU, Triton on CUDA, plain torch as reference and for the rest.

All give the same bits and generate the noise from integers (`smezo_pl.optim.noise`); nothing as large as the weights is
stored.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from typing import Literal

import torch

from smezo_pl.optim.kernels.base import Draw, Factored, FactoredUpdate, Kernel, Update
from smezo_pl.optim.kernels.reference import TorchKernel

__all__ = ["Draw", "Factored", "FactoredUpdate", "Kernel", "KernelName", "Update", "available_kernels", "get_kernel"]

KernelName = Literal["auto", "numba", "triton", "torch"]
"""Who makes the passes; ``auto`` takes Triton on CUDA, numba on the CPU, and torch elsewhere."""

log = logging.getLogger(__name__)


def get_kernel(name: KernelName = "auto", device: torch.device | str = "cpu") -> Kernel:
    """The kernel of that name for a device; the choice is logged once.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the kernel cannot run on the device or is not installed; says which can.
    """
    return _get_kernel(name, device.type if isinstance(device, torch.device) else torch.device(device).type)


def available_kernels(device: torch.device | str = "cpu") -> list[str]:
    """Names of the kernels that can run on a device, the fastest first."""
    kind = torch.device(device).type
    return [name for name in ("triton", "numba", "torch") if _obstacle(name, kind) is None]


@cache
def _get_kernel(name: KernelName, kind: str) -> Kernel:
    if name not in ("auto", "numba", "triton", "torch"):
        raise ValueError(f"kernel must be 'auto', 'numba', 'triton' or 'torch', got {name!r}")
    chosen, why = str(name), ""
    if name == "auto":
        chosen = {"cuda": "triton", "cpu": "numba"}.get(kind, "torch")
        obstacle = _obstacle(chosen, kind)
        if obstacle is not None:
            chosen, why = "torch", f" (slow; {chosen}: {obstacle})"
        elif chosen == "torch":
            why = f" (slow; no fused kernel for {kind})"
    obstacle = _obstacle(chosen, kind)
    if obstacle is not None:
        usable = ", ".join(available_kernels(kind)) or "none"
        raise RuntimeError(f"kernel {name!r} cannot run on {kind}: {obstacle}; available for {kind}: {usable}")
    log.info("kernel for %s: %s%s", kind, chosen, why)
    # Compilers are imported only when they are used: numba and Triton take a second each.
    if chosen == "numba":
        from smezo_pl.optim.kernels.numba_cpu import NumbaKernel

        return NumbaKernel()
    if chosen == "triton":
        from smezo_pl.optim.kernels.triton_gpu import TritonKernel

        return TritonKernel()
    return TorchKernel()


def _obstacle(name: str, kind: str) -> str | None:
    """Why a kernel cannot run on a kind of device, or None."""
    if kind == "meta":
        return "tensors on the meta device hold no weights"
    if name == "torch":
        return None
    if name == "numba" and kind != "cpu":
        return "it works on CPU memory only"
    # Triton's interpreter runs kernels on CPU tensors, for tests.
    if name == "triton" and kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a CUDA or ROCm device"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error})"
    return None
