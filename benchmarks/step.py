"""Cost of a step relative to its two forwards.

    python benchmarks/step.py --dtype bf16 --json benchmarks/results/step_bf16.json
    python benchmarks/step.py --hidden 1024 --layers 12 --dtype fp32
    python benchmarks/step.py --pretrained none --hidden 4096 --layers 32 --dtype bf16 --length 256 --device cuda

Rows: the two forwards alone (ratio 1); this package layer by layer, with a direction of rank 1 for the batch, with one
for each row, and with sign flips for each row; in place; and two reference loops written out below: MeZO (four passes
of `torch.normal` over the weights) and the same with a stored boolean mask, as public implementations of Sparse MeZO
have it. All score the last position of the same batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    interleave,
    last_position_losses,
    machine,
    parser_of,
    print_table,
    random_llama,
    rows_of,
    smollm2,
    write_json,
)
from torch import Tensor, nn

from smezo_pl.optim import SparseMeZO

LR, EPS = 1e-7, 1e-3


class ReferenceMeZO:
    """MeZO as a plain loop: perturb by +1, -2, +1 times eps z, then subtract lr g z; z is drawn anew each time.

    Args:
        model: Its trainable parameters are perturbed in place.
        masks: One boolean tensor per parameter that multiplies z, or None.
    """

    def __init__(self, model: nn.Module, masks: dict[str, Tensor] | None = None) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masks = masks
        self.seed = 0

    def _add(self, scale: float) -> None:
        generator = torch.Generator(next(iter(self.parameters.values())).device).manual_seed(self.seed)
        for name, parameter in self.parameters.items():
            z = torch.normal(
                0.0, 1.0, parameter.shape, dtype=parameter.dtype, device=parameter.device, generator=generator
            )
            if self.masks is not None:
                z *= self.masks[name]
            parameter.add_(z, alpha=scale)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        """One step."""
        self.seed += 1
        self._add(EPS)
        plus = closure()
        self._add(-2 * EPS)
        minus = closure()
        self._add(EPS)
        self._add(-LR * (float(plus) - float(minus)) / (2 * EPS))


def boolean_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """The small weights of each parameter, one byte per weight."""
    masks = {}
    for name, parameter in model.named_parameters():
        magnitudes = parameter.detach().abs().float().flatten()
        rank = max(1, round((1 - sparsity) * magnitudes.numel()))
        masks[name] = parameter.detach().abs() <= magnitudes.kthvalue(rank).values
    return masks


def measure(
    model: nn.Module, losses: Callable[[], Tensor], arguments: argparse.Namespace, references: bool = True
) -> list[dict[str, Any]]:
    """Rows of one model: name, seconds, ratio to two forwards, spread, rounds, extra bytes."""
    settings = {
        "lr": LR,
        "eps": EPS,
        "sparsity": arguments.sparsity,
        "noise": arguments.noise,
        "kernel": arguments.kernel,
    }

    def optimizer(**more: Any) -> SparseMeZO:
        return SparseMeZO(model.named_parameters(), **settings, **more)

    def closure() -> Tensor:
        return losses().mean()

    def two_forwards() -> None:
        float(closure()) + float(closure())

    largest = max(p.numel() * p.element_size() for p in model.parameters())
    weights = sum(p.numel() for p in model.parameters())
    steps: dict[str, Callable[[], object]] = {"two_forwards": two_forwards}
    in_place = optimizer()
    attached = {
        "layerwise": (optimizer(), closure),
        "rank_1": (optimizer(rank=1), closure),
        "rank_1_per_row": (optimizer(directions="per_row", rank=1), losses),
        "sign_flips_per_row": (optimizer(directions="per_row"), losses),
    }
    # hooks are registered once, as in a run; those of others cost a row nothing measurable
    for name, (own, forward) in attached.items():
        own.attach(model)
        steps[name] = partial(own.step, forward)
    steps["in_place"] = lambda: in_place.step(closure)
    rounds = dict.fromkeys(steps, arguments.rounds)
    extra = {}
    if references:
        dense = ReferenceMeZO(model)
        masked = ReferenceMeZO(model, boolean_masks(model, arguments.sparsity))
        steps["mezo_reference"] = lambda: dense.step(closure)
        steps["sparse_reference"] = lambda: masked.step(closure)
        few = min(arguments.rounds, arguments.reference_rounds)
        rounds.update(mezo_reference=few, sparse_reference=few)
        extra.update(mezo_reference=largest, sparse_reference=largest + weights)
    seconds = interleave(steps, rounds, arguments.device)
    extra.update({name: own.extra_bytes() for name, (own, _) in attached.items()}, in_place=in_place.extra_bytes())
    for own, _ in attached.values():
        own.detach()
    return rows_of(seconds, "two_forwards", extra)


def main(args: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--pretrained", choices=["smollm2", "none"], default="smollm2")
    parser.add_argument("--hidden", type=int, help="random Llama of this width instead of SmolLM2")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--noise", choices=["gaussian", "rademacher"], default="gaussian")
    parser.add_argument("--kernel", choices=["auto", "numba", "triton", "torch"], default="auto")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--reference-rounds", type=int, default=3, help="rounds of the slow reference loops")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(args)
    if arguments.small:
        arguments.hidden, arguments.layers, arguments.batch, arguments.length, arguments.rounds = 64, 1, 2, 8, 1
    dtype = DTYPES[arguments.dtype]
    if arguments.hidden is None and arguments.pretrained == "smollm2":
        name, model = "SmolLM2-135M", smollm2(dtype, arguments.device)
    else:
        hidden = arguments.hidden or 512
        name = f"random Llama, hidden {hidden}, {arguments.layers} layers"
        model = random_llama(hidden, arguments.layers, dtype, arguments.device)
    weights = sum(p.numel() for p in model.parameters())
    losses = last_position_losses(model, arguments.batch, arguments.length, arguments.device)
    rows = measure(model, losses, arguments)
    about = machine(arguments.device)
    print(
        f"{name}, {weights / 1e6:.1f} M weights, {arguments.dtype}, {arguments.noise}, s {arguments.sparsity}, ", end=""
    )
    print(f"{arguments.batch} x {arguments.length} tokens; {about['processor']}, {' '.join(about['instructions'])}")
    print_table(rows)
    by_name = {row["name"]: row["seconds"] for row in rows}
    print(f"faster than the MeZO loop: {by_name['mezo_reference'] / by_name['layerwise']:.2f} times")
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "small")}
    write_json(
        arguments.json, {"machine": about, "model": name, "weights": weights, "settings": settings, "rows": rows}
    )


if __name__ == "__main__":
    main()
