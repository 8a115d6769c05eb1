"""Compile the Triton kernels for NVIDIA GPUs on a machine without one; a script, run by `test_triton_gpu`.

``python -m tests.optim.kernels.gpu_compile few 90`` prints a JSON object for each kernel: its name, what is wrong with
it, and its registers. The kernels are launched through `TritonKernel` on CPU tensors, under a driver that names a GPU
and stops before it would be used, so that types, alignments and options are those of a real launch.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from smezo_pl.optim.kernels.base import Draw, Factored, FactoredUpdate
from smezo_pl.optim.kernels.triton_gpu import TritonKernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Stream
from tests.optim.kernels.cases import update

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
STREAM, COUNT = Stream(1, 2, 0, 3), 4096
MASKS = {
    "small": Mask("small", threshold=0.5),
    "random": Mask("random", stream=Stream(9, 2, 0, 3), level=13107),
    "packed": Mask("packed", bits=torch.zeros(COUNT // 8, dtype=torch.uint8)),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORBIDDEN = (
    r"\bfma\.|\.ftz|\.approx|\bdiv\.\S*f\d|\bmad\.\S*f32|\b(?:mul|add|sub)\.f32"
    r"|\bsqrt\.(?!rn\.f32)|\b(?:ex2|lg2|sin|cos)\."
)
"""Of PTX: operations that are contracted, approximate, flush subnormal numbers, or leave rounding to the assembler."""


class NoDevice:
    """A driver with a target and nothing behind it."""

    capability = 0

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel that a run can launch, by name."""
    kernel = TritonKernel()
    for (name, dtype), (rule, mask), noise in product(DTYPES.items(), MASKS.items(), ("gaussian", "rademacher")):
        theta, kind = torch.zeros(COUNT, dtype=dtype), f"{name} {noise} {rule}"
        yield f"perturb {kind}", partial(kernel.perturb, theta, torch.empty_like(theta), mask, noise, STREAM, 1e-3)
        for samples, decay in product((1, 2), (0.0, 1e-3)):
            arguments = ([STREAM] * samples, [1e-3] * samples, decay, STREAM)
            yield f"update {kind} {samples} decay {decay}", partial(update, kernel, theta, mask, noise, *arguments)
        if noise == "gaussian" and rule != "packed":
            yield f"pack {name} {rule}", partial(kernel.pack, theta, mask)
        yield f"draw {kind}", partial(kernel.draw, theta, torch.empty_like(theta), mask, noise, STREAM, 1e-3)
        times, outer = (STREAM, kind) if noise == "gaussian" else (None, f"{name} {rule}")
        for terms, decay in product((1, 16), (0.0, 1e-3)):
            factors = (torch.zeros(terms, size, dtype=torch.bfloat16) for size in (8, COUNT // 8))
            change = FactoredUpdate(theta, mask, Factored(*factors, [1e-3] * terms, times), decay, STREAM)
            yield f"factored {outer} {terms} decay {decay}", partial(kernel.update_factored, change, noise)
    for name, dtype in DTYPES.items():
        theta, factors = torch.zeros(COUNT, dtype=dtype), torch.zeros(2, 64, dtype=torch.bfloat16)
        yield (
            f"perturb factored {name}",
            partial(kernel.perturb_factored, theta, theta, Factored(factors, factors, [1.0, 1.0])),
        )
    for noise in ("gaussian", "rademacher"):
        rows = torch.zeros(3, 1000, dtype=torch.bfloat16)
        yield f"draw rows {noise}", partial(kernel.draw_rows, [Draw(rows, [0, 1024, 4096], STREAM)], noise)
    # Arguments whose alignment or size Triton compiles a kernel of its own for.
    far = Stream(1, 2, 0, 3, (3 << 35) + 12345)
    shapes = (("odd length", 4093, STREAM), ("one weight", 1, STREAM), ("far shard", COUNT, far))
    for (name, dtype), (shape, count, stream), address in product(DTYPES.items(), shapes, (0, 1)):
        theta = torch.zeros(COUNT + 1, dtype=dtype)[address : count + address]
        launch = partial(kernel.perturb, theta, theta, MASKS["small"], "gaussian", stream, 1e-3)
        yield f"perturb {name} gaussian, {shape}, address {address}", launch


FEW = (
    "update bfloat16 gaussian small 1 decay 0.0",
    "update float16 rademacher random 1 decay 0.001",
    "update float32 gaussian packed 2 decay 0.001",
    "perturb bfloat16 gaussian small",
    "pack float16 random",
    "factored bfloat16 random 16 decay 0.001",
    "factored float32 gaussian packed 1 decay 0.0",
    "draw rows gaussian",
)
"""Every kernel, each format, noise and kind of mask, one sample and several."""


def inspect(kernel: Any, rooted: bool, path: Path) -> tuple[list[str], int]:
    """What in the code of a kernel could change a bit or spills registers, and how many registers it takes."""
    ptx = re.sub(r"//.*", "", kernel.asm["ptx"])
    # Triton before 3.6 writes the root with .ftz; the squares it is taken of are never subnormal.
    ptx = ptx.replace("sqrt.rn.ftz.f32", "sqrt.rn.f32")
    found = [f"PTX has {operation}" for operation in sorted(set(re.findall(FORBIDDEN, ptx)))]
    if rooted and "sqrt.rn.f32" not in ptx:
        found.append("PTX has no correctly rounded square root")
    path.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", path]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = {key: int(size) for key, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found += [f"{sizes[key]} bytes of {key.lower()} memory" for key in ("STACK", "LOCAL") if sizes[key]]
    return found, sizes["REG"]


def main(which: str, *capabilities: str) -> None:
    """Compile ``few`` or ``all`` kernels for some compute capabilities."""
    driver, launched = NoDevice(), []
    triton.runtime.driver.set_active(driver)
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    with tempfile.TemporaryDirectory() as folder:
        for driver.capability in map(int, capabilities):
            for name, launch in variants():
                if which == "few" and name not in FEW:
                    continue
                launched.clear()
                registers = None
                try:
                    launch()
                    found, registers = inspect(launched[0], "gaussian" in name, Path(folder, "kernel.cubin"))
                except triton.CompilationError as error:
                    cause: BaseException = error
                    while cause.__cause__ is not None:
                        cause = cause.__cause__
                    found = [f"it does not compile: {cause}"]
                print(json.dumps({"name": f"sm_{driver.capability} {name}", "problems": found, "registers": registers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
