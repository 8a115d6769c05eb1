"""What can be known of the Triton kernels without a GPU, beside their equality in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optim.kernels.cases import needs_triton

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from smezo_pl.optim.kernels._triton_passes import sweep
fixed = dict(FORMAT=int(sys.argv[1]), LAW=0, SOURCE=1, DECAY=True, STOCHASTIC=True, ROW=6)
weights = "*i32" if fixed["FORMAT"] == 0 else "*i16"
pointers = {"theta": weights, "out": weights, "bits": "*u8", "more": "*i32"}
types = {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in sweep.arg_names}
compiled = triton.compile(
    ASTSource(sweep, types, fixed), target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}
)
print(compiled.asm["ptx"])
"""


@needs_triton
@pytest.mark.parametrize("kind", ["0", "1", "2"])
def test_compiled_for_a_gpu_every_operation_is_rounded_once(kind: str) -> None:
    # In a process of its own: in this one, Triton may have been imported as an interpreter.
    ptx = subprocess.run([sys.executable, "-c", COMPILE, kind], capture_output=True, text=True, check=True).stdout
    assert "sqrt.rn.f32" in ptx
    assert "mul.rn.f32" in ptx
    assert "fma." not in ptx
    assert "sqrt.approx" not in ptx
    assert ".ftz" not in ptx


@needs_triton
@pytest.mark.slow
def test_the_interpreter_gives_the_bits_of_the_reference() -> None:
    equality = Path(__file__).with_name("test_equality.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "-W", "ignore::RuntimeWarning", str(equality)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
