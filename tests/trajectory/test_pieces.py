import math
import random

import pytest
import torch

from smezo_pl.trajectory.exports import pack_columns as pack
from smezo_pl.trajectory.exports import unpack_columns as unpack

STEPS = 20_000


def linear() -> list[tuple[float, ...]]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-6)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    values = []
    for _ in range(STEPS):
        values.append((float(optimizer.param_groups[0]["lr"]),))
        optimizer.step()
        scheduler.step()
    return values


CASES: dict[str, tuple[list[tuple[float, ...]], int]] = {
    "constant": ([(1e-6,)] * STEPS, 100),
    "two groups": ([(1e-6, 3e-5)] * STEPS, 100),
    "a few runs": ([(1e-6 / (1 + i // 5000),) for i in range(STEPS)], 200),
    "cosine": ([(0.5e-6 * (1 + math.cos(math.pi * i / STEPS)),) for i in range(STEPS)], 8 * STEPS),
    "linear": (linear(), 5 * STEPS),
    "noise": ([(random.Random(i).random(),) for i in range(1000)], 9 * 1000),
    "nothing": ([], 10),
    "one": ([(0.0, math.pi)], 40),
    "odd values": ([(v,) for v in (math.inf, -0.0, 5e-324, 1.7e308, 0.1)], 200),
}


@pytest.mark.parametrize("name", CASES)
def test_values_come_back_to_the_bit_and_small(name: str) -> None:
    values, most = CASES[name]
    runs, column = pack(values)
    back = unpack(runs, column, len(values), len(values[0]) if values else 1)
    assert [[v.hex() for v in row] for row in back] == [[v.hex() for v in row] for row in values]
    assert len(str(runs)) + len(column) <= most


@pytest.mark.parametrize(
    "runs",
    [
        None,
        [[1, 0.5]],
        [[0, 0.5], [0, 0.5]],
        [[0, 0.5], [5, 0.5]],
        [[0, 0.5, 0.5]],
        [[0, "x"]],
        [[0, True]],
        [[0]],
        ["x"],
        [[0, 0.5], "x"],
        [[0, 0.5], []],
        [[0, 0.5], [3, 0.5], [2, 0.5]],
    ],
)
def test_a_run_length_encoding_that_does_not_fit_is_refused(runs: object) -> None:
    with pytest.raises(ValueError, match="run-length encoding"):
        unpack(runs, b"", 4, 1)


@pytest.mark.parametrize("column", [b"", b"x", pack(CASES["noise"][0])[1]])
def test_columns_that_do_not_fit_are_refused(column: bytes) -> None:
    with pytest.raises(ValueError, match=r"column|inflates|ends early|no deflated data"):
        unpack([], column, 7, 1)
