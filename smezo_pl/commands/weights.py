"""``smezo replay``, ``export`` and ``apply``: weights from a trajectory or an exported run."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, get_args

from smezo_pl.optim.kernels import KernelName
from smezo_pl.trajectory.exports import export, load
from smezo_pl.trajectory.fingerprint import model_tensors
from smezo_pl.trajectory.header import Header, TrajectoryError, recorded_adapter
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.replaying import matches_run, replay, tensors_of

if TYPE_CHECKING:
    from torch import nn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of both verbs."""
    parser.add_argument(
        "--model", default=None, help="the base model: hub name, folder or GGUF file; the run's if left out"
    )
    parser.add_argument("--out", required=True, help="folder to write, new or empty")
    parser.add_argument(
        "--force", action="store_true", help="go on when the starting weights are others than the run's"
    )
    parser.add_argument("--kernel", default="auto", choices=get_args(KernelName), help="what makes the updates")


def make_folder(trajectory: Trajectory, given: argparse.Namespace) -> None:
    """Load the base model, make the weights, write the folder, and say whether they are the run's.

    Raises:
        TrajectoryError: If the model is another one, or the folder is in use.
    """
    out = Path(given.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrajectoryError(f"--out {out} exists and is not empty: give a new folder")
    model, tokenizer = base_model(trajectory.header, given.model, str(trajectory.path))
    began = perf_counter()
    with progress_of(trajectory.header.first_step, trajectory.next_step) as progress:
        replay(trajectory, model, force=given.force, kernel=given.kernel, progress=progress, verify=False)
    seconds = perf_counter() - began
    tensors = tensors_of(trajectory.header, model, str(trajectory.path))
    same = matches_run(trajectory, tensors)
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    steps, rate = trajectory.next_step, len(trajectory.rows) / max(seconds, 1e-9)
    print(f"{out}: the weights after {steps:,} steps, made in {seconds:.1f} s ({rate:.1f} steps/s)")
    if same:
        print("identical: every bit is as in the run")
    elif same is None:
        print("the run noted no hash of its weights at this step, so there is nothing to compare them with")
    else:
        print(_difference(trajectory, given, model))


def base_model(header: Header, name: str | None, source: str) -> tuple[Any, Any]:
    """The starting weights in the dtype of the run, with its adapter if it had one, and the tokenizer.

    Raises:
        TrajectoryError: If neither the command line nor the record names the model, or its adapter is refused.
    """
    import torch

    from smezo_pl.models import add_adapter, load_model

    name = name or header.model.get("name")
    if name is None:
        raise TrajectoryError("the record does not name the model it starts from (it was given in Python): say --model")
    sizes: Counter[str] = Counter()
    for info in header.tensors:
        sizes[info.dtype] += prod(info.shape)
    dtype = getattr(torch, sizes.most_common(1)[0][0])
    adapter = recorded_adapter(header, source)
    model, tokenizer = load_model(name, dtype=dtype, revision=header.model.get("revision"))
    return (model if adapter is None else add_adapter(model, adapter[0], seed=adapter[1])), tokenizer


def _difference(trajectory: Trajectory, given: argparse.Namespace, model: nn.Module) -> str:
    """What to say of weights that are not the run's."""
    made = trajectory.header.machine.get("kernel", "?")
    if given.force:
        return "not the run's weights: they start from others (--force)"
    reference, _ = base_model(trajectory.header, given.model, str(trajectory.path))
    replay(trajectory, reference, kernel="torch", verify=False)
    pairs = zip(model_tensors(model).values(), model_tensors(reference).values(), strict=True)
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel() and a.is_floating_point())
    same = matches_run(trajectory, tensors_of(trajectory.header, reference, str(trajectory.path)))
    return (
        f"NOT the run's weights. The run was made with kernel {made}, these with {given.kernel}; kernel torch gives "
        f"{'the run exactly' if same else 'others again'}, and the largest difference to it is {largest:.3g}. "
        "Please report it"
    )


@contextmanager
def progress_of(first: int, last: int) -> Iterator[Callable[[int], None] | None]:
    """Shows how far a replay is from one number of steps to another, on a terminal."""
    if not sys.stderr.isatty() or last - first < 2:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replay", total=last - first)
        yield lambda done: bar.update(task, completed=done - first)


def replay_main(args: Sequence[str]) -> None:
    """Make the weights of a step and write them.

    Args:
        args: ``replay`` and the words after it.
    """
    parser = argparse.ArgumentParser(
        prog="smezo replay",
        description="The weights of any step of a run, made from its record and the starting weights, as a Hugging "
        "Face folder with the tokenizer. It needs no data and runs no model.",
    )
    parser.add_argument("run", help="a run's folder or its trajectory.smezo")
    parser.add_argument("--step", type=int, default=None, help="how many steps of the run; all if left out")
    add_arguments(parser)
    given = parser.parse_args(args[1:])
    make_folder(load(given.run, given.step), given)


def apply_main(args: Sequence[str]) -> None:
    """Apply a tune and write the model.

    Args:
        args: ``apply`` and the words after it.
    """
    parser = argparse.ArgumentParser(
        prog="smezo apply",
        description="An exported fine-tune on the model it was made from, as a Hugging Face folder with the tokenizer. "
        "Other starting weights are refused. Taking a tune back means loading the base model again.",
    )
    parser.add_argument("tune", help="what `smezo export` wrote")
    add_arguments(parser)
    given = parser.parse_args(args[1:])
    make_folder(load(given.tune), given)


def export_main(args: Sequence[str]) -> None:
    """Write a run to one safetensors file.

    Args:
        args: ``export`` and the words after it.
    """
    parser = argparse.ArgumentParser(
        prog="smezo export",
        description="The whole fine-tune in one safetensors file: 4 bytes a step and a header, no pickle. From it and "
        "the base model `smezo apply` makes the trained one.",
    )
    parser.add_argument("run", help="a run's folder or its trajectory.smezo")
    parser.add_argument("--out", required=True, help="file to write, for instance tune.safetensors")
    parser.add_argument("--step", type=int, default=None, help="how many steps of the run; all if left out")
    given = parser.parse_args(args[1:])
    trajectory = load(given.run, given.step)
    written = export(trajectory, given.out)
    each = written.size / max(1, len(trajectory.rows))
    print(f"{written.path}: {written.steps:,} steps, {written.size:,} bytes ({each:.1f} a step)")
    if written.verified:
        print("it holds a hash of the final weights, so `smezo apply` can tell whether it gets the same")
    else:
        print("the run noted no hash of the weights of this step: `smezo apply` cannot tell whether it gets the same")
