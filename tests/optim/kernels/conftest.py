import pytest

from smezo_pl.optim.kernels import Kernel, get_kernel
from tests.optim.kernels.cases import needs_gpu_or_interpreter, needs_triton, place


@pytest.fixture(params=["numba", pytest.param("triton", marks=[needs_triton, needs_gpu_or_interpreter])])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """A compiled kernel, to be compared with the reference."""
    return get_kernel(request.param, place(request.param))
