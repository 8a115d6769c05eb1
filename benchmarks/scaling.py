"""Cost of a step relative to its two forwards, and memory beyond the weights, by size of model, length and batch.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json --plot benchmarks/results/scaling.png

Llamas of random weights from 10 million to a billion weights, in interleaved rounds against the two forwards alone. The
passes over the weights cost the same whatever the batch, so their share falls as the batch grows. Ends within about
ten minutes on 2 cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

from common import DTYPES, last_position_losses, machine, parser_of, print_table, random_llama, write_json
from step import measure

MODELS = ((256, 4), (512, 8), (1024, 8), (1536, 16), (2048, 18))  # hidden units, layers: 10 M to 1 B weights
LENGTHS, BATCHES = (16, 64, 256), (4, 16, 64)
BUDGET = 8e12  # floating point operations of a round above which fewer rounds are taken


def point(hidden: int, layers: int, batch: int, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Ratio and extra bytes of one setting."""
    model = random_llama(hidden, layers, DTYPES[options.dtype], options.device)
    weights = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    size = weights * next(model.parameters()).element_size()
    settings = argparse.Namespace(**vars(options))
    settings.rounds = 2 if 2 * weights * batch * length * 6 > BUDGET else options.rounds
    losses = last_position_losses(model, batch, length, options.device)
    rows = {row["name"]: row for row in measure(model, losses, settings, references=False)}
    del model, losses
    gc.collect()
    return {
        "hidden": hidden,
        "layers": layers,
        "weights": weights,
        "batch": batch,
        "length": length,
        "forwards_s": rows["two_forwards"]["seconds"],
        "ratio": rows["layerwise"]["ratio"],
        "in_place": rows["in_place"]["ratio"],
        "rounds": settings.rounds,
        "extra_MB": round(rows["layerwise"]["extra_bytes"] / 1e6, 1),
        "largest_MB": round(largest / 1e6, 1),
        "weights_MB": round(size / 1e6, 1),
    }


def tick(value: int) -> str:
    """A number of weights, rows or tokens, short."""
    return f"{value / 1e9:.1f} B" if value >= 1e9 else f"{value / 1e6:.0f} M" if value >= 1e6 else str(value)


def label_at(axis: Any, x: list[int]) -> None:
    """Label a logarithmic axis at the measured values alone."""
    axis.set_xticks(x, [tick(value) for value in x])
    axis.set_xticks([], minor=True)


def plot(path: Path, groups: dict[str, list[dict[str, Any]]], about: dict[str, Any], dtype: str) -> None:
    """Ratio against model size, length and batch; extra memory against model size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for axis, (name, key, label) in zip(
        axes,
        (("model", "weights", "weights"), ("length", "length", "tokens per row"), ("batch", "batch", "rows")),
        strict=False,
    ):
        rows = groups[name]
        x = [row[key] for row in rows]
        axis.plot(x, [row["ratio"] for row in rows], "o-", label="layer by layer")
        axis.plot(x, [row["in_place"] for row in rows], "s--", label="in place", alpha=0.7)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel=label, title=f"step / two forwards, by {name}")
        label_at(axis, x)
    axes[0].legend(frameon=False)
    rows = groups["model"]
    x = [row["weights"] for row in rows]
    axes[3].plot(x, [row["extra_MB"] for row in rows], "o-", label="layer by layer")
    axes[3].plot(x, [row["largest_MB"] for row in rows], "k:", label="largest tensor")
    axes[3].plot(x, [row["weights_MB"] for row in rows], color="grey", label="the weights")
    axes[3].set(xscale="log", yscale="log", xlabel="weights", title="MB beyond the weights")
    label_at(axes[3], x)
    axes[3].legend(frameon=False)
    figure.suptitle(f"{dtype}, Gaussian noise, {about['processor']}, {about['threads']} threads", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"written to {path}")


def main(args: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--noise", choices=["gaussian", "rademacher"], default="gaussian")
    parser.add_argument("--kernel", choices=["auto", "numba", "triton", "torch"], default="auto")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=float, default=1.1e9, help="leave out models with more weights than this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(args)
    models, middle, lengths, batches = MODELS, (512, 8), LENGTHS, BATCHES
    if options.small:
        models, middle, lengths, batches, options.rounds = ((64, 1),), (64, 1), (8,), (2,), 1
    about = machine(options.device)
    print(f"{options.dtype}, {options.noise}, s {options.sparsity}; {about['processor']}, {about['threads']} threads")
    sized = [
        (hidden, layers) for hidden, layers in models if 12 * layers * hidden**2 + 64000 * hidden <= options.largest
    ]
    groups = {
        "model": [point(hidden, layers, 16, 64, options) for hidden, layers in sized],
        "length": [point(*middle, 16, length, options) for length in lengths],
        "batch": [point(*middle, batch, 64, options) for batch in batches],
    }
    for name, rows in groups.items():
        print(f"by {name}")
        print_table(rows)
    write_json(options.json, {"machine": about, "dtype": options.dtype, "noise": options.noise, **groups})
    if options.plot:
        plot(options.plot, groups, about, options.dtype)


if __name__ == "__main__":
    main()
