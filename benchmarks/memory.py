"""Peak memory of a training step beyond the weights and one forward, on the CPU (Linux).

    python benchmarks/memory.py --json benchmarks/results/memory.json

Each row runs in a process of its own on SmolLM2-135M: it compiles the kernels on a small network, loads the model,
resets the peak counter of the process (VmHWM), runs, and reads it again. What a plain forward needs is measured alike.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import DTYPES, last_position_losses, machine, parser_of, print_table, random_llama, smollm2, write_json

ROWS = ["forward", "layerwise", "layerwise, constant mask", "in_place", "in_place, dense"]


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}: this needs Linux")


def measure(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the weights, and the peak above what was resident before the run."""
    import torch

    from smezo_pl.optim import SparseMeZO

    dtype = DTYPES[options.dtype]
    first = torch.nn.Sequential(torch.nn.Embedding(4096, 64), torch.nn.Linear(64, 4096)).to(dtype)
    warm = SparseMeZO(first.named_parameters(), mask_update="constant" if "constant" in row else "dynamic")
    for _ in range(2):  # every pass that the rows need, in place and layer by layer
        warm.step(lambda: first(torch.zeros(1, 1, dtype=torch.long)).sum())
        warm.attach(first)
    model = random_llama(64, 1, dtype) if options.small else smollm2(dtype)
    losses = last_position_losses(model, options.batch, options.length)

    def closure() -> float:
        return float(losses().mean())

    if row == "forward":
        run = closure
    else:
        optimizer = SparseMeZO(
            model.named_parameters(),
            mask="dense" if "dense" in row else "small",
            mask_update="constant" if "constant" in row else "dynamic",
        )
        if row.startswith("layerwise"):
            optimizer.attach(model)

        def run() -> Any:
            return optimizer.step(closure)

    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    for _ in range(3):
        run()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights": weights, "peak": _resident("VmHWM") - before}


def measure_alone(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own."""
    words = ["--row", row, "--dtype", options.dtype, "--batch", options.batch, "--length", options.length]
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(args: list[str] | None = None) -> None:
    """Measure every row in its own process, print, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.small:
        options.batch, options.length = 2, 8
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return
    rows = []
    forward = 0
    for row in ROWS:
        # Small: all in this process, as the figures do not matter.
        result = measure(row, options) if options.small else measure_alone(row, options)
        forward = result["peak"] if row == "forward" else forward
        rows.append(
            {
                "name": row,
                "peak_over_weights_MB": round(result["peak"] / 1e6, 1),
                "over_a_forward_MB": round((result["peak"] - forward) / 1e6, 1),
                "share_of_weights": round((result["peak"] - forward) / result["weights"], 3),
            }
        )
    print(f"SmolLM2-135M, {result['weights'] / 1e6:.1f} MB of weights, {options.dtype}", end=", ")
    print(f"{options.batch} x {options.length} tokens")
    print_table(rows)
    write_json(options.json, {"machine": machine(), "weights": result["weights"], "rows": rows})


if __name__ == "__main__":
    main()
