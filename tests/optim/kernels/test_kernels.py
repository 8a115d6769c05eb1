import importlib
import logging

import pytest
import torch

import smezo_pl.optim.kernels as kernels
from smezo_pl.optim.kernels import Kernel, available_kernels, get_kernel
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import Stream
from tests.optim.kernels.cases import update

STREAM = Stream(1, 2, 3, 4)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels._get_kernel.cache_clear()
    yield
    kernels._get_kernel.cache_clear()


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    def hide(*names: str) -> None:
        def import_module(name: str) -> object:
            if name in names:
                raise ImportError(f"No module named {name!r}")
            return object()

        monkeypatch.setattr(kernels.importlib, "import_module", import_module)

    yield hide
    assert importlib.import_module is not None


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="smezo_pl"):
        first, second = get_kernel("auto", "cpu"), get_kernel("auto", torch.device("cpu"))
    assert first is second
    assert first.name == "numba"
    assert caplog.messages == ["kernel for cpu: numba"]


def test_auto_without_numba_says_that_it_is_slow(without, caplog: pytest.LogCaptureFixture) -> None:
    without("numba", "triton")
    with caplog.at_level(logging.INFO, logger="smezo_pl"):
        assert get_kernel("auto", "cpu").name == "torch"
        assert get_kernel("auto", "cuda").name == "torch"
        assert get_kernel("auto", "xpu").name == "torch"
    assert caplog.messages == [
        "kernel for cpu: torch (slow; numba: numba cannot be imported (No module named 'numba'))",
        "kernel for cuda: torch (slow; triton: triton cannot be imported (No module named 'triton'))",
        "kernel for xpu: torch (slow; no fused kernel for xpu)",
    ]


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        (
            "numba",
            "cuda",
            "kernel 'numba' cannot run on cuda: it works on CPU memory only; available for cuda: triton, torch",
        ),
        ("triton", "cpu", "kernel 'triton' cannot run on cpu: Triton needs a CUDA or ROCm device; .*: numba, torch"),
        ("torch", "meta", "kernel 'torch' cannot run on meta: tensors on the meta device hold no weights; .*: none"),
        ("auto", "meta", "kernel 'auto' cannot run on meta"),
    ],
)
def test_a_kernel_that_cannot_run_says_why(without, name: str, device: str, message: str) -> None:
    without()
    with pytest.raises(RuntimeError, match=message):
        get_kernel(name, device)


def test_a_kernel_that_is_not_installed_says_so(without) -> None:
    without("triton")
    with pytest.raises(RuntimeError, match=r"triton cannot be imported \(No module named 'triton'\); .*cuda: torch"):
        get_kernel("triton", "cuda")
    assert available_kernels("cuda") == ["torch"]


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel must be 'auto', 'numba', 'triton' or 'torch', got 'cupy'"):
        get_kernel("cupy", "cpu")  # type: ignore[arg-type]


@pytest.fixture(params=["numba", "torch"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return get_kernel(request.param, "cpu")


@pytest.mark.parametrize(
    ("theta", "error", "message"),
    [
        (torch.zeros(4, 4), ValueError, "theta must be one-dimensional and contiguous, got shape \\(4, 4\\)"),
        (torch.zeros(8)[::2], ValueError, "theta must be one-dimensional and contiguous.*strides \\(2,\\)"),
        (torch.zeros(4, dtype=torch.int8), TypeError, "theta must be float32, .* got torch.int8"),
        (torch.zeros(4, dtype=torch.complex64), TypeError, "theta must be float32, .* got torch.complex64"),
        (torch.zeros(4).to_sparse(), TypeError, "theta must be a strided tensor, got layout torch.sparse_coo"),
        (torch.zeros(4, device="meta"), ValueError, "theta is on the meta device"),
    ],
)
def test_weights_that_no_kernel_can_walk_over_are_refused(
    kernel: Kernel, theta: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kernel.perturb(theta, theta, Mask("dense"), "gaussian", STREAM, 1.0)
    with pytest.raises(error, match=message):
        update(kernel, theta, Mask("dense"), "gaussian", [STREAM], [1.0], 0.0, None)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (
            lambda theta: torch.zeros(9),
            ValueError,
            "out must have the 10 elements of theta on cpu, got 9 elements on cpu",
        ),
        (
            lambda theta: torch.zeros(10).bfloat16(),
            TypeError,
            "out must be torch.float32 like theta, got torch.bfloat16",
        ),
        (lambda theta: theta._base[5:15], ValueError, "out must be theta itself or not overlap it"),
        (lambda theta: torch.zeros(2, 5), ValueError, "out must be one-dimensional"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(kernel: Kernel, out, error: type[Exception], message: str) -> None:
    theta = torch.zeros(20)[:10]
    with pytest.raises(error, match=message):
        kernel.perturb(theta, out(theta), Mask("dense"), "gaussian", STREAM, 1.0)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask("small", threshold=float("nan")), "threshold of a mask must be a number, got nan"),
        (Mask("random"), "a random mask needs a stream"),
        (Mask("packed"), "a packed mask needs bits"),
        (
            Mask("packed", bits=torch.zeros(1, dtype=torch.uint8)),
            r"must be uint8 of shape \(2,\) on cpu, got torch.uint8",
        ),
        (Mask("packed", bits=torch.zeros(2)), r"must be uint8 of shape \(2,\) on cpu, got torch.float32"),
        (Mask("big"), "mask rule must be .* got 'big'"),  # type: ignore[arg-type]
    ],
)
def test_a_mask_that_lacks_something_is_refused(kernel: Kernel, mask: Mask, message: str) -> None:
    theta = torch.ones(10)
    with pytest.raises(ValueError, match=message):
        kernel.perturb(theta, theta, mask, "gaussian", STREAM, 1.0)
    with pytest.raises(ValueError, match=message):
        kernel.pack(theta, mask)
    assert torch.equal(theta, torch.ones(10))


def test_streams_that_do_not_fit_together_are_refused(kernel: Kernel) -> None:
    theta, later = torch.ones(10), Stream(1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="one scale per stream and at least one, got 1 and 2"):
        update(kernel, theta, Mask("dense"), "gaussian", [STREAM], [1.0, 2.0], 0.0, None)
    with pytest.raises(ValueError, match="all streams of a pass must start at the same element, got 0 and 5"):
        update(kernel, theta, Mask("dense"), "gaussian", [STREAM], [1.0], 0.0, later)
    with pytest.raises(ValueError, match="got 5 and 0"):
        kernel.perturb(theta, theta, Mask("random", stream=STREAM), "gaussian", later, 1.0)


def test_saved_weights_of_another_mask_are_refused(kernel: Kernel) -> None:
    theta = torch.ones(10)
    bits, saved = kernel.select(theta, Mask("dense"))
    with pytest.raises(ValueError, match=r"saved weights must be torch.float32 of shape \(10,\), got .* shape \(9,\)"):
        kernel.restore(theta, bits, saved[:9])
    with pytest.raises(ValueError, match="saved weights must be torch.float32"):
        kernel.restore(theta, bits, saved.bfloat16())
