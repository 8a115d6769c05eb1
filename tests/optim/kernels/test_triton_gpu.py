"""What can be known of the Triton kernels without a GPU, beside their equality in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optim.kernels.cases import needs_triton

ROOT = Path(__file__).parents[3]


def compiled(which: str, *capabilities: str) -> dict[str, list[str]]:
    """Problems of each kernel that `gpu_compile` compiled, by name."""
    # In a process of its own: in this one, Triton may have been imported as an interpreter.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.optim.kernels.gpu_compile", which, *capabilities]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    return {each["name"]: each["problems"] for each in found}


@needs_triton
def test_kernels_compile_for_a_gpu_with_every_operation_rounded_once() -> None:
    found = compiled("few", "90")
    assert len(found) == 8
    assert not {name: problems for name, problems in found.items() if problems}


@needs_triton
@pytest.mark.slow
def test_all_kernels_compile_for_two_generations_of_gpus() -> None:
    found = compiled("all", "80", "90")
    assert len(found) == 2 * (90 + 6 + 18 + 18 + 72 + 3 + 2)
    assert not {name: problems for name, problems in found.items() if problems}


@needs_triton
@pytest.mark.slow
def test_the_interpreter_gives_the_bits_of_the_reference() -> None:
    files = [str(Path(__file__).with_name(name)) for name in ("test_equality.py", "test_factored.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "-W", "ignore::RuntimeWarning", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
