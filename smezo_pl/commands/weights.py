"""``smezo replay``, ``export`` and ``apply``: weights from a trajectory, and a trajectory as one small file."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from smezo_pl.models import add_adapter, load_model
from smezo_pl.optim.kernels import KernelName
from smezo_pl.saving import check_place, save_network
from smezo_pl.trajectory.exports import export, load
from smezo_pl.trajectory.fingerprint import model_tensors
from smezo_pl.trajectory.header import TrajectoryError, recorded_adapter
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.replaying import matches_run, own_start, replay, tensors_of


def replay_main(args: Sequence[str]) -> None:
    """Write the weights of a step."""
    parser = argparse.ArgumentParser(
        prog="smezo replay",
        description="Write the weights of any step of a run, computed from its trajectory and the starting weights, as "
        "a Hugging Face folder with the tokenizer. This needs no data and runs no model.",
    )
    parser.add_argument("run", help="folder of a run, or its trajectory.smezo")
    parser.add_argument("--step", type=int, default=None, help="number of steps (default: all of the run)")
    _write_model(parser, args)


def apply_main(args: Sequence[str]) -> None:
    """Apply an exported run and write the model."""
    parser = argparse.ArgumentParser(
        prog="smezo apply",
        description="Apply an exported run to the model it was trained from, and write the result as a Hugging Face "
        "folder with the tokenizer. Other starting weights are refused. To undo it, load the base model again.",
    )
    parser.add_argument("run", metavar="exported", help="file that `smezo export` wrote")
    parser.set_defaults(step=None)
    _write_model(parser, args)


def export_main(args: Sequence[str]) -> None:
    """Write a run to one safetensors file."""
    parser = argparse.ArgumentParser(
        prog="smezo export",
        description="Write a whole fine-tune to one safetensors file: 4 bytes per step and a header, without pickle. "
        "`smezo apply` makes the trained model from it and the base model.",
    )
    parser.add_argument("run", help="folder of a run, or its trajectory.smezo")
    parser.add_argument("--out", required=True, help="file to write, for instance sst2.safetensors")
    parser.add_argument("--step", type=int, default=None, help="number of steps (default: all of the run)")
    given = parser.parse_args(args[1:])
    trajectory = load(given.run, given.step)
    written = export(trajectory, given.out)
    per_step = written.size / max(1, len(trajectory.records))
    print(f"{written.path}: {written.steps:,} steps, {written.size:,} bytes ({per_step:.1f} per step)")
    if written.verified:
        print("it holds a hash of the final weights, so `smezo apply` can tell whether it gets the same")
    else:
        print("the run stored no hash of the weights at this step: `smezo apply` cannot tell whether it gets the same")
    if own_start(trajectory) is not None:
        command = f"`smezo replay {given.run} --step {trajectory.header.first_step} --out FOLDER`"
        print(f"it starts from weights that only the run keeps: {command} writes them for `smezo apply --model FOLDER`")


def _write_model(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    """Load the base model, replay, write the folder, and report whether the weights are those of the run."""
    parser.add_argument("--model", default=None, help="base model: hub name, folder or GGUF file (default: the run's)")
    parser.add_argument("--out", required=True, help="folder to write, new or empty")
    parser.add_argument("--force", action="store_true", help="continue when the starting weights are not the run's")
    parser.add_argument("--kernel", default="auto", choices=get_args(KernelName), help="what computes the updates")
    given = parser.parse_args(args[1:])
    trajectory = load(given.run, given.step)
    out, force, kernel = Path(given.out), given.force, given.kernel
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrajectoryError(f"--out {out} exists and is not empty: pass a new folder")
    check_place(out, f"--out {out}")
    model, tokenizer = base_model(trajectory, given.model)
    began = perf_counter()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("replay", total=len(trajectory.records))
        replay(trajectory, model, force=force, kernel=kernel, progress=lambda _: bar.advance(task), verify=False)
    seconds = perf_counter() - began
    same = matches_run(trajectory, tensors_of(trajectory.header, model, str(trajectory.path)))
    save_network(model, tokenizer, out)
    steps, rate = trajectory.next_step, len(trajectory.records) / max(seconds, 1e-9)
    print(f"{out}: the weights after {steps:,} steps, replayed in {seconds:.1f} s ({rate:.1f} steps/s)")
    if same:
        print("identical: every bit is as in the run")
    elif same is None:
        print("the run stored no hash of its weights at this step, so there is nothing to compare them with")
    elif force:
        print("not the run's weights: they start from others (--force)")
    else:
        print(_difference(trajectory, given, model))


def base_model(trajectory: Trajectory, name: str | None) -> tuple[Any, Any]:
    """The starting weights in the dtype of the run, with its adapter if it had one, and the tokenizer."""
    header = trajectory.header
    name = name or header.model.get("name")
    if name is None:
        raise TrajectoryError(
            "the trajectory does not name the model it starts from (it was given in Python): pass --model"
        )
    sizes: Counter[str] = Counter()
    for info in header.tensors:
        sizes[info.dtype] += prod(info.shape)
    dtype = getattr(torch, sizes.most_common(1)[0][0])
    adapter = recorded_adapter(header, str(trajectory.path))
    with base_model_found(trajectory):
        model, tokenizer = load_model(name, dtype=dtype, revision=header.model.get("revision"))
    return (model if adapter is None else add_adapter(model, adapter[0], seed=adapter[1])), tokenizer


@contextmanager
def base_model_found(trajectory: Trajectory) -> Iterator[None]:
    """Add to the error of a base model that is not there, as on another machine, how to name it."""
    try:
        yield
    except OSError as error:
        recorded = trajectory.header.model.get("name")
        raise TrajectoryError(
            f"{error}. The run in {trajectory.path} starts from {recorded}: pass --model with where that is here"
        ) from error


def _difference(trajectory: Trajectory, given: argparse.Namespace, model: nn.Module) -> str:
    """How weights differ that should be those of the run: by kernel, from a replay with the reference kernel."""
    reference, _ = base_model(trajectory, given.model)
    replay(trajectory, reference, kernel="torch", verify=False)
    pairs = zip(model_tensors(model).values(), model_tensors(reference).values(), strict=True)
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel() and a.is_floating_point())
    same = matches_run(trajectory, tensors_of(trajectory.header, reference, str(trajectory.path)))
    return (
        f"NOT the run's weights. The run was made with kernel {trajectory.header.machine.get('kernel', '?')}, these "
        f"with {given.kernel}; kernel torch gives {'the run exactly' if same else 'others again'}, and the largest "
        f"difference to it is {largest:.3g}. Please report it"
    )
