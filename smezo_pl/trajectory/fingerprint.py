"""What identifies the start of a run: its weights and its machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smezo_pl import __version__
from smezo_pl.optim.memory import memory_of

CHUNK = 1 << 24
"""Bytes hashed at a time. Part of the definition: another value gives other hashes."""

TENSOR_DIGEST_SIZE = 8
"""Bytes kept of a tensor's hash: enough to say which tensor differs; the hash over all keeps its 32."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model's state dict holds, tied parameters once: parameters in their order, then persistent buffers.

    Parameters come under the names that ``named_parameters()`` gives them, which are the optimizer's.
    """
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    seen = {id(parameter) for parameter in model.parameters()}
    tensors |= {
        name: value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
        if name not in tensors and id(value) not in seen and isinstance(value, torch.Tensor)
    }
    return tensors


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """SHA-256 of each tensor's dtype, shape and elements, whatever its device and strides, in the order given.

    Chunks of `CHUNK` bytes are hashed at the same time, which releases the interpreter's lock.
    """
    digests: dict[str, bytes] = {}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided:
                raise TypeError(f"only dense tensors have a fingerprint, got one of layout {tensor.layout}")
            if tensor.numel() and memory_of(tensor) is None:
                raise TypeError(
                    f"{name!r} is a {type(tensor).__name__} without memory of its own, which has no fingerprint: a run "
                    "on such weights cannot be recorded"
                )
            head = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}".encode()
            flat = tensor.detach().reshape(-1)
            # a view as bytes needs an element: an empty tensor has no chunk
            chunks = torch.split(flat.view(torch.uint8), CHUNK) if flat.numel() else ()
            hashes = pool.map(lambda chunk: sha256(chunk.cpu().numpy().data).digest(), chunks)
            digests[name] = sha256(head + b"".join(hashes)).digest()
    return digests


def root_digest(digests: Mapping[str, bytes]) -> bytes:
    """One hash of 32 bytes for a whole model: names and tensors, in their order."""
    root = sha256()
    for name, digest in digests.items():
        encoded = name.encode()
        root.update(len(encoded).to_bytes(4, "little") + encoded + digest)
    return root.digest()


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what a run depends on, where it is installed."""
    found = {"smezo_pl": __version__, "python": platform.python_version()}
    for package in ("torch", "lightning", "transformers", "datasets", "peft", "numba", "triton", "numpy"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def cpuinfo() -> dict[str, str]:
    """What Linux tells about the first processor, by field; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads and vector instructions: what the last bits of a forward may depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }
