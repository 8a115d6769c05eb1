"""Speed of every pass over the weights, compared with plain torch.

    python benchmarks/passes.py [--json FILE] [--dtypes fp32 bf16 fp16] [--numel 16777216] [--device cpu]

Prints G weights/s, the median over interleaved rounds. ``add_`` and ``copy_`` show the memory's speed, ``normal + add``
is the pass of the official MeZO code. About a minute on 2 cores that nothing else uses.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, interleave, machine, parser_of, print_table, write_json
from torch import Tensor

from smezo_pl.optim.kernels import Kernel, Update, available_kernels, get_kernel
from smezo_pl.optim.kernels.base import Factored, FactoredUpdate
from smezo_pl.optim.masks import DENSE, Mask
from smezo_pl.optim.noise import Stream

SLOW_NUMEL = 1 << 20  # for the plain torch kernel, a hundredth as fast as the others


def plain_passes(theta: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    def normal_and_add() -> None:
        out.add_(torch.normal(0.0, 1.0, size=out.shape, dtype=out.dtype, device=out.device), alpha=1e-3)

    return {
        "add_": lambda: out.add_(1e-3),
        "copy_": lambda: out.copy_(theta),
        "normal + add": normal_and_add,
    }


def kernel_passes(kernel: Kernel, theta: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    one, two = Stream(1, 2, 0, 3), Stream(1, 2, 1, 3)
    small = Mask("small", threshold=0.005)  # sparsity 0.8 of N(0, 0.02)
    packed = Mask("packed", bits=kernel.pack(theta, small))
    bits, saved = kernel.select(theta, small)
    half = theta.element_size() == 2
    random = Mask("random", stream=two, level=13107)
    passes: dict[str, Callable[[], object]] = {
        "perturb gaussian": lambda: kernel.perturb(theta, out, small, "gaussian", one, 1e-3),
        "perturb rademacher": lambda: kernel.perturb(theta, out, small, "rademacher", one, 1e-3),
        "perturb in place": lambda: kernel.perturb(out, out, small, "gaussian", one, 1e-9),
        "perturb packed mask": lambda: kernel.perturb(theta, out, packed, "gaussian", one, 1e-3),
        "perturb random mask": lambda: kernel.perturb(theta, out, random, "gaussian", one, 1e-3),
        "update": partial(kernel.update_all, [Update(out, small, [one], [1e-9])], "gaussian"),
        "update 2 samples, decay": partial(
            kernel.update_all, [Update(out, small, [one, two], [1e-9, 1e-9], 1e-9)], "gaussian"
        ),
        "draw": lambda: kernel.draw(theta, out, small, "gaussian", one, 1e-3),
        "select": lambda: kernel.select(theta, small),
        "restore": lambda: kernel.restore(out, bits, saved),
        "pack": lambda: kernel.pack(theta, small),
        "histogram": lambda: kernel.histogram(theta, 0 if half else 16, None),
    }
    rounding = one if half else None
    width = 1 << 10
    for terms in (1, 16, 64):
        sizes = (len(out) // width, width)
        factors = (torch.ones(terms, size, dtype=torch.bfloat16, device=out.device) for size in sizes)
        products = Factored(*factors, [1e-9] * terms)
        passes[f"update {terms} outer products"] = partial(
            kernel.update_factored, FactoredUpdate(out, DENSE, products, 0.0, rounding), "gaussian"
        )
    if half:
        stochastic = [Update(out, small, [one], [1e-9], 0.0, one)]
        passes["update stochastic"] = partial(kernel.update_all, stochastic, "gaussian")
        passes["update rademacher, stochastic"] = partial(kernel.update_all, stochastic, "rademacher")
    return passes


def rows_of(kind: str, kernels: list[str], numel: int, rounds: int, device: str) -> list[dict[str, Any]]:
    rows = []
    for name in ("plain", *kernels):
        count = min(numel, SLOW_NUMEL) if name == "torch" else numel
        generator = torch.Generator().manual_seed(0)
        theta = (torch.randn(count, generator=generator) * 0.02).to(device, DTYPES[kind])
        out = theta.clone()
        if name == "plain":
            passes = plain_passes(theta, out)
        else:
            passes = kernel_passes(get_kernel(name, device), theta, out)  # type: ignore[arg-type]
        turns = dict.fromkeys(passes, 2 if name == "torch" else rounds)
        for what, seconds in interleave(passes, turns, device).items():
            rates = {"rate": count / statistics.median(seconds) / 1e9, "fastest": count / min(seconds) / 1e9}
            rows.append({"pass": what, "kernel": name, "dtype": kind, "weights": count} | rates)
    return rows


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Passes by kernel and dtype; a pass of plain torch has the same figure for every kernel."""
    kernels = list(dict.fromkeys((row["kernel"], row["dtype"]) for row in rows if row["kernel"] != "plain"))
    rates = {(row["pass"], row["kernel"], row["dtype"]): f"{row['rate']:.2f}" for row in rows}
    return [
        {"G weights/s": what}
        | {
            f"{kernel} {dtype}": rates.get((what, kernel, dtype), rates.get((what, "plain", dtype)))
            for kernel, dtype in kernels
        }
        for what in dict.fromkeys(row["pass"] for row in rows)
    ]


def main(args: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kernels", nargs="+", help="default: all that can run on the device")
    parser.add_argument("--numel", type=int, default=1 << 24, help="weights per pass")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(args)
    if options.small:
        options.dtypes, options.numel, options.rounds = ["fp32"], 4096, 1
    if options.threads:
        torch.set_num_threads(options.threads)
    about = machine(options.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows: list[dict[str, Any]] = []
    for kind in options.dtypes:
        kernels = options.kernels or available_kernels(options.device)
        rows += rows_of(kind, kernels, options.numel, options.rounds, options.device)
    print_table(table(rows))
    write_json(options.json, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
