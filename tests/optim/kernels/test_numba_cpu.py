import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from smezo_pl.optim.kernels import _numba_passes as passes
from smezo_pl.optim.kernels import numba_cpu
from smezo_pl.optim.kernels.numba_cpu import NumbaKernel
from smezo_pl.optim.kernels.reference import TorchKernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Distribution, Stream, normals
from tests.optim.kernels.cases import DISTRIBUTIONS, DTYPES, RULES, mask_of, needs_two_threads, same, update, weights

KERNEL, REFERENCE = NumbaKernel(), TorchKernel()
COUNT = numba_cpu._SERIAL + 54321


@needs_two_threads
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", DISTRIBUTIONS)
def test_threads_do_not_change_a_bit(dtype: torch.dtype, noise: Distribution) -> None:
    start = 777
    theta, stream = weights(dtype, COUNT), Stream(1, 2, 3, 4, start)
    for rule in RULES:
        mask, results = mask_of(rule, COUNT, start), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            moved, updated = torch.empty_like(theta), theta.clone()
            KERNEL.perturb(theta, moved, mask, noise, stream, 1e-3)
            update(KERNEL, updated, mask, noise, [stream], [1e-4], 1e-3, stream)
            bits, saved = KERNEL.select(theta, mask)
            KERNEL.restore(moved_back := moved.clone(), bits, saved)
            counts = KERNEL.histogram(theta, 0, None)
            results.append((moved, updated, bits, saved, moved_back, counts))
        assert all(same(a, b) for a, b in zip(*results, strict=True)), rule
        assert same(results[0][4], theta)


@needs_two_threads
def test_large_tensors_equal_the_reference() -> None:
    torch.set_num_threads(2)
    theta, stream = weights(torch.bfloat16, COUNT), Stream(5, 6, 7, 8)
    got, expected = theta.clone(), theta.clone()
    update(KERNEL, got, Mask("small", threshold=0.01), "gaussian", [stream], [1e-4], 0.0, stream)
    update(REFERENCE, expected, Mask("small", threshold=0.01), "gaussian", [stream], [1e-4], 0.0, stream)
    assert same(got, expected)


def test_threads_follow_torch_and_are_given_back() -> None:
    torch.set_num_threads(1)
    assert numba_cpu._threads(1 << 30) == 1
    torch.set_num_threads(2)
    assert numba_cpu._threads(1 << 30) == min(2, numba.config.NUMBA_NUM_THREADS)
    assert numba_cpu._threads(1000) == 1
    before = numba.get_num_threads()
    KERNEL.perturb(torch.zeros(COUNT), torch.zeros(COUNT), Mask("dense"), "gaussian", Stream(0, 0, 0, 0), 1.0)
    assert numba.get_num_threads() == before


def test_two_threads_may_call_at_once() -> None:
    torch.set_num_threads(2)
    outs = [torch.zeros(COUNT) for _ in range(4)]

    def work(k: int) -> None:
        for _ in range(3):
            outs[k].zero_()
            KERNEL.perturb(outs[k], outs[k], Mask("dense"), "gaussian", Stream(0, 0, 0, k), 1.0)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k, out in enumerate(outs):
        assert torch.equal(out[:5000], normals(Stream(0, 0, 0, k), 5000))


@pytest.mark.parametrize("exponent", [31, 39])
def test_groups_beyond_32_bits(exponent: int) -> None:
    # 2^35 weights take 2^32 groups. The boundary itself lies inside this range.
    start = (1 << exponent + 4) - 1500
    theta, stream = torch.zeros(3000), Stream(1, 2, 3, 4, min(start, (1 << 42) - 3000))
    KERNEL.perturb(theta, theta, Mask("dense"), "gaussian", stream, 1.0)
    assert torch.equal(theta, normals(stream, 3000))
    assert not torch.equal(theta[1500:], normals(Stream(1, 2, 3, 4), 1500))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_code_and_many_32_bit_ones(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        codes = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=torch.Generator().manual_seed(0))
        theta = codes.to(torch.int32).view(dtype)
    else:
        theta = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    stream = Stream(1, 2, 3, 4)
    for scale in (1e-3, 3e-8, 1e-6, 300.0, 1e38, 1e300):
        for rounding in (None, stream):
            got, expected = theta.clone(), theta.clone()
            update(KERNEL, got, Mask("dense"), "gaussian", [stream], [scale], 0.0, rounding)
            update(REFERENCE, expected, Mask("dense"), "gaussian", [stream], [scale], 0.0, rounding)
            assert same(got, expected), scale


def test_the_compiled_code_uses_no_fused_multiply_add() -> None:
    from smezo_pl.optim.kernels._numba_outer import _add_terms
    from smezo_pl.optim.kernels._numba_words import _fill_normals

    sums, factors = np.zeros(81, np.float32), np.ones((2, 128), np.float32)
    _add_terms(sums.ctypes.data, sums.ctypes.data, 64, factors.ctypes.data, factors.ctypes.data, 4, 2)
    assert sums.tolist() == [2.0] * 64 + [0.0] * 17
    halves = np.zeros(512, np.float32), np.zeros(512, np.float32)
    _fill_normals(np.zeros(512, np.uint32), *halves, np.float32(1.0))
    assert all("sqrt" in assembly for assembly in _fill_normals.inspect_asm().values())
    for assembly in (*_fill_normals.inspect_asm().values(), *_add_terms.inspect_asm().values()):
        assert not any(name in assembly for name in ("vfmadd", "vfnmadd", "vfmsub", "fmla", "fmadd"))


def test_compiling_is_said_once_and_kept_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    numba_cpu._compiled.cache_clear()
    with caplog.at_level(logging.INFO, logger="smezo_pl"):
        KERNEL.histogram(torch.zeros(9), 0, None)
    numba_cpu._compiled.cache_clear()
    assert "numba compiled the pass histogram for float32 in" in caplog.text
    assert list(tmp_path.rglob("*.nbi"))
    code = (
        "import numpy\nfrom smezo_pl.optim.kernels._numba_passes import compile_pass\n"
        "print(compile_pass('histogram', numpy.uint32(0)).cache_hits)"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"


def test_without_a_writable_cache_it_compiles_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **options: object) -> object:
        raise RuntimeError("cannot cache function 'entry': no locator available")

    original = passes.cfunc
    monkeypatch.setattr(
        passes, "cfunc", lambda *a, cache=False, **o: refuse if cache else original(*a, cache=cache, **o)
    )
    with caplog.at_level(logging.INFO, logger="smezo_pl"):
        compiled = passes.compile_pass("histogram", np.uint32(0))
    assert compiled.address
    assert "compiled kernels cannot be kept on disk, every run compiles anew: cannot cache" in caplog.text
