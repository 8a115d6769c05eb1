"""Golden cases: small runs through the public names alone, whose results must outlive any change of the inside.

A case runs in an empty folder and gives up to three kinds of results:

- ``exact``: the same on every x86-64 CPU (hashes of weights and files, answers, names);
- ``close``: numbers that a processor's matrix products may move in their last digits (losses, scores);
- ``machine``: what is the same only on one machine (weights trained on such losses).

``values.json`` holds the first two, and `test_golden` compares with it. To compare two commits on one machine, bit for
bit and with the third kind::

    python -m tests.golden.cases --write /tmp/before.json      # at the one
    python -m tests.golden.cases --compare /tmp/before.json    # at the other; prints what differs and exits with 1

Weights are made independent of the processor where a step's losses are: they are counts of right answers (objective
``accuracy`` with an eps that makes some answers change), or numbers made of the bits of the perturbed weights.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import inspect
import io
import json
import logging
import os
import re
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# before torch and transformers are imported; the same as in tests/conftest.py
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import smezo_pl
from smezo_pl.__main__ import main as smezo_main
from tests.golden.tiny import (
    CHOOSE,
    CLASSIFY,
    FILL_IN,
    TASK_ROWS,
    WRITE,
    fill,
    put_model,
    put_rows,
    put_tasks,
    whole_numbers,
)

Result = dict[str, dict[str, Any]]
CASES: dict[str, Callable[[Path], Result]] = {}
VALUES = Path(__file__).parent / "values.json"


def case(name: str) -> Callable[[Callable[[Path], Result]], Callable[[Path], Result]]:
    """Register a function as a case."""

    def register(function: Callable[[Path], Result]) -> Callable[[Path], Result]:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


LATER = {"directions": "shared", "rank": None, "coefficients": "raw", "strict": False}
"""Settings that came after `values.json` was written, and the values with which they change nothing."""


def _without_later(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}


def run_case(name: str, folder: Path) -> Result:
    """Run a case in a folder; its results as JSON gives them back."""
    with _inside(folder):
        result = CASES[name](folder)
    kept: Result = json.loads(json.dumps(result, allow_nan=False), object_hook=_without_later)
    assert str(folder) not in json.dumps(kept), "a result holds a path of this machine"
    return kept


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """The folder as the current one; what the command line changes for the whole process is as it was afterwards."""
    before, path, dtype = Path.cwd(), list(sys.path), torch.get_default_dtype()
    log = logging.getLogger("smezo_pl")
    handlers, level = list(log.handlers), log.level
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path  # a reward's module is looked for in the current folder
        sys.modules.pop("golden_rewards", None)
        torch.set_default_dtype(dtype)
        log.handlers, log.level = handlers, level


# ---------------------------------------------------------------------- what results are made of


def digest(data: bytes | str | Any) -> str:
    """The first 20 hexadecimal digits of a SHA-256, of JSON if it is neither bytes nor text."""
    if not isinstance(data, bytes | str):
        data = json.dumps(data, sort_keys=True)
    return sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:20]


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def weights_of(source: nn.Module | dict[str, Tensor] | Path) -> str:
    """A hash over names, types, shapes and bits of all weights: of a network, or of a folder's safetensors."""
    if isinstance(source, Path):
        files = sorted(source.glob("*.safetensors"))
        assert files, source
        source = {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}
    named = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    whole = sha256()
    for name, tensor in sorted(named.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw(tensor))
    return whole.hexdigest()[:20]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: what is not finite as text."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else repr(value)
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def smezo(*words: str) -> str:
    """Run the command line; what it prints to its standard output."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            smezo_main(list(words))
        except SystemExit as stop:
            code = stop.code
    assert not code, f"smezo {' '.join(words)}\n{err.getvalue()}"
    return out.getvalue()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exported(path: Path) -> dict[str, Any]:
    """What an exported file says, without what differs from run to run: name, time, machine, versions."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    content = json.loads(zlib.decompress(arrays["header"].tobytes()))
    header = content["header"]
    return plain(
        {
            "metadata": sorted(metadata),
            "content": sorted(content),
            "header": sorted(header),
            "gradients": arrays["projected_gradients"].tolist(),
            "columns": digest(arrays["columns"].tobytes()),
            **{name: content[name] for name in ("pieces", "skipped", "refreshed", "final")},
            **{name: header[name] for name in ("seed", "noise", "num_samples", "first_step", "noise_scheme", "format")},
            "settings": header["settings"],
            "root": header["root"],
            "groups": digest(header["groups"]),
            "tensors": digest(header["tensors"]),
            "model": sorted(header["model"]),
        }
    )


# ---------------------------------------------------------------------- the optimizer alone


class Held(nn.Module):
    """Holds a weight and notes its bits when it runs: a forward without arithmetic."""

    def __init__(self, weight: nn.Parameter, seen: list[bytes]) -> None:
        super().__init__()
        self.weight, self.seen = weight, seen

    def forward(self) -> None:
        self.seen.append(raw(self.weight))


class Network(nn.Module):
    """Weights of many shapes; one is shared by two modules, and one is read by the module that encloses its own."""

    SHAPES = ((37, 41), (2050,), (3, 5, 7), (1,), (33, 65), (1024,))

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.seen: list[bytes] = []
        weights = [nn.Parameter(whole_numbers(shape, n).to(dtype)) for n, shape in enumerate(self.SHAPES)]
        self.parts = nn.ModuleList([Held(weight, self.seen) for weight in weights])
        self.tied = Held(weights[4], self.seen)
        self.inner = Held(nn.Parameter(whole_numbers((129,), 99).to(dtype)), self.seen)
        self.outer = nn.Module()
        self.outer.bias = nn.Parameter(whole_numbers((40,), 98).to(dtype))

    def forward(self) -> float:
        self.seen.clear()
        for part in (*self.parts, self.tied):
            part()
        self.seen.extend([raw(self.inner.weight), raw(self.outer.bias)])
        return int.from_bytes(sha256(b"".join(self.seen)).digest()[:2], "big") / 65536

    def hash(self) -> str:
        return weights_of(self)


def steps_of(optimizer: Any, network: Network, count: int, closure: Any = None) -> list[Any]:
    """Some steps; their projected gradients."""
    gradients = []
    for _ in range(count):
        optimizer.step(closure or network)
        gradients.append(list(optimizer.last_step.projected_gradients))
    return gradients


def optimizer_for(network: Network, attach: bool = True, **settings: Any) -> Any:
    settings = {"lr": 2e-3, "eps": 2e-2, "sparsity": 0.7, "seed": 11, **settings}
    optimizer = smezo_pl.SparseMeZO(network.named_parameters(), **settings)
    if attach:
        optimizer.attach(network)
    return optimizer


def short_run(dtype: torch.dtype, attach: bool, count: int = 3, **settings: Any) -> dict[str, Any]:
    network = Network(dtype)
    start = network.hash()
    optimizer = optimizer_for(network, attach, **settings)
    gradients = steps_of(optimizer, network, count)
    assert any(any(each) for each in gradients) and network.hash() != start, "nothing was trained"
    return {
        "weights": network.hash(),
        "gradients": gradients,
        "thresholds": {name: repr(value) for name, value in optimizer.thresholds().items()},
        "masks": digest(b"".join(raw(bits) for bits in optimizer.packed_masks().values())),
    }


def _optimizer_table(mask: str, noise: str, dtype: str, folder: Path) -> Result:
    exact: dict[str, Any] = {}
    for update in ("dynamic", "constant"):
        runs = [
            short_run(getattr(torch, dtype), attach, mask=mask, mask_update=update, noise=noise)
            for attach in (True, False)
        ]
        # where the bits come from must not matter: the two perturbations see the same weights
        assert runs[0] == runs[1]
        exact[update] = runs[0]
    return {"exact": exact}


for _mask, _noise, _dtype in product(
    ("small", "large", "random", "dense"), ("gaussian", "rademacher"), ("float32", "bfloat16", "float16")
):
    case(f"optimizer/{_mask}-{_noise}-{_dtype}")(partial(_optimizer_table, _mask, _noise, _dtype))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@case("optimizer/settings")
def _optimizer_settings(folder: Path) -> Result:
    """One argument at a time, with every way to make and to perturb the weights."""
    settings: dict[str, dict[str, Any]] = {
        "n-SPSA": {"num_samples": 3},
        "n-SPSA, rademacher, constant": {"num_samples": 2, "noise": "rademacher", "mask_update": "constant"},
        "weight decay": {"weight_decay": 0.5},
        "weight decay, dense": {"weight_decay": 0.5, "mask": "dense", "num_samples": 2},
        "include": {"include": ["parts.0", "*bias"]},
        "exclude": {"exclude": ["parts.1.*", "inner"]},
        "dense patterns": {"dense": "parts.2", "sparsity": 0.9},
        "maximize": {"maximize": True},
        "sparsity 0": {"sparsity": 0.0},
        "another seed": {"seed": 2**63 + 5},
    }
    exact: dict[str, Any] = {}
    for name, given in settings.items():
        for dtype, attach in product(DTYPES, (True, False)):
            exact[f"{name}, {dtype}, {'layerwise' if attach else 'in place'}"] = short_run(dtype, attach, **given)[
                "weights"
            ]
    exact["float64"] = short_run(torch.float64, True)
    for dtype, mask in product(DTYPES, ("small", "random")):
        given = {"mask": mask, "num_samples": 2, "weight_decay": 0.1}
        slow = short_run(dtype, True, kernel="torch", **given)
        assert slow == short_run(dtype, True, kernel="numba", **given)
        exact[f"reference kernel, {mask}, {dtype}"] = slow["weights"]
    return {"exact": exact}


@case("optimizer/groups-and-schedule")
def _optimizer_groups(folder: Path) -> Result:
    exact = {}
    for dtype in DTYPES:
        network = Network(dtype)
        named = list(network.named_parameters())
        groups = [
            {"params": named[:2], "lr": 1e-3, "sparsity": 0.5},
            {"params": named[2:5], "eps": 1e-2, "mask": "large", "mask_update": "constant", "weight_decay": 0.25},
            {"params": named[5:], "mask": "random"},
        ]
        optimizer = smezo_pl.SparseMeZO(groups, lr=4e-3, eps=2e-2, num_samples=2)
        optimizer.attach(network)
        gradients = []
        for step in range(4):
            for group in optimizer.param_groups:
                group["lr"] /= 1 + step
            gradients += steps_of(optimizer, network, 1)
        stats = [list(stat) for stat in optimizer.mask_stats()]
        exact[str(dtype)] = [network.hash(), gradients, plain(stats), plain(optimizer.settings())]
    return {"exact": exact}


@case("optimizer/skipped-steps")
def _optimizer_skips(folder: Path) -> Result:
    """A loss that is not finite leaves the weights as they are and counts as a step; too many in a row end the run."""
    network = Network(torch.bfloat16)
    optimizer = optimizer_for(network, max_skipped=3)
    steps = []
    for bad in (None, float("nan"), float("inf"), None, float("-inf"), None):
        before = network.hash()
        loss = optimizer.step(network if bad is None else lambda bad=bad: bad)
        assert (network.hash() == before) is (bad is not None)
        report = optimizer.last_step
        steps.append([report.step, report.skipped, repr(float(loss)), list(report.projected_gradients)])
    counters = [optimizer.steps_done, optimizer.skipped_steps]
    message = ""
    try:
        steps_of(optimizer, network, 5, closure=lambda: float("nan"))
    except RuntimeError as error:
        message = str(error)
    return {"exact": {"weights": network.hash(), "steps": steps, "counters": counters, "end": message}}


@case("optimizer/refresh")
def _optimizer_refresh(folder: Path) -> Result:
    exact = {}
    for mask, update, dtype in product(("small", "large", "random"), ("dynamic", "constant"), DTYPES):
        network = Network(dtype)
        optimizer = optimizer_for(network, mask=mask, mask_update=update)
        gradients = steps_of(optimizer, network, 2)
        optimizer.refresh_masks()
        gradients += steps_of(optimizer, network, 2)
        optimizer.refresh_masks(0.25)
        gradients += steps_of(optimizer, network, 2)
        thresholds = [repr(value) for value in optimizer.thresholds().values()]
        exact[f"{mask}, {update}, {dtype}"] = [network.hash(), digest([gradients, thresholds])]
    return {"exact": exact}


@case("optimizer/state")
def _optimizer_state(folder: Path) -> Result:
    """A state that was written and read in mid-run, also with constant masks, goes on to the same bits."""
    exact: dict[str, Any] = {}
    for mask, update in product(("small", "random"), ("dynamic", "constant")):
        settings = {"mask": mask, "mask_update": update, "num_samples": 2}
        whole, first, second = (Network(torch.bfloat16) for _ in range(3))
        steps_of(optimizer_for(whole, **settings), whole, 5)
        optimizer = optimizer_for(first, **settings)
        steps_of(optimizer, first, 3)
        torch.save([first.state_dict(), optimizer.state_dict()], folder / "state.pt")
        weights, state = torch.load(folder / "state.pt", weights_only=True)
        second.load_state_dict(weights)
        again = optimizer_for(second, **settings)
        again.load_state_dict(state)
        steps_of(again, second, 2)
        assert second.hash() == whole.hash()
        exact[f"{mask}, {update}"] = [whole.hash(), again.steps_done]
        exact["keys"] = [sorted(state), sorted(state["smezo"]), sorted(state["param_groups"][0])]
    return {"exact": exact}


@case("optimizer/record")
def _optimizer_record(folder: Path) -> Result:
    """The record of a plain loop: replayed to two steps, exported, applied."""
    exact: dict[str, Any] = {}
    for dtype in DTYPES:
        path = folder / str(dtype)
        network = Network(dtype)
        optimizer = optimizer_for(network, num_samples=2, weight_decay=0.1)
        with smezo_pl.record(optimizer, path / "trajectory.smezo") as recorder:
            for step in range(6):
                if step == 3:
                    optimizer.refresh_masks(0.5)
                optimizer.param_groups[0]["lr"] = 2e-3 / (1 + step)
                optimizer.step((lambda: float("nan")) if step == 4 else network)
            recorder.mark_weights()
        early, late, applied = (Network(dtype) for _ in range(3))
        smezo_pl.replay(path, early, steps=3)
        smezo_pl.replay(path, late)
        written = smezo_pl.export(path, path / "tune.safetensors")
        made = smezo_pl.apply(applied, path / "tune.safetensors")
        assert late.hash() == applied.hash() == network.hash()
        exact[str(dtype)] = {
            "weights": [early.hash(), network.hash()],
            "exported": exported(path / "tune.safetensors"),
            "said": [written.steps, written.verified, made.steps, made.identical],
        }
    return {"exact": exact}


# ---------------------------------------------------------------------- runs through the command line

ACCURACY = ("--data.objective=accuracy",)


def prepare(folder: Path, task: Any = CLASSIFY, kind: str = "llama") -> None:
    """Model, data and ``base.yaml`` in a case's folder."""
    put_model(folder, kind)
    put_rows(folder)
    config = {
        "model": {"pretrained": "model", "optimizer": {"lr": 2e-3, "eps": 0.1, "sparsity": 0.5, "seed": 3}},
        "data": {
            "task": task,
            "train_file": "train.jsonl",
            "dev_file": "dev.jsonl",
            "test_file": "test.jsonl",
            "batch_size": 8,
        },
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "max_steps": 5,
            "max_epochs": -1,
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(config))


def fit(name: str, *words: str) -> Path:
    """``smezo fit`` of the prepared configuration; the run's folder."""
    smezo("fit", "--config=base.yaml", f"--name={name}", *words)
    return sorted(Path("runs", name).iterdir())[-1]


def metrics_of(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``metrics.json`` as what is exact and what is close."""
    metrics = json.loads((run / "metrics.json").read_text())
    curve = metrics["curve"]
    exact = {name: metrics[name] for name in ("task", "model", "steps", "method", "batch_size", "data_seed", "seed")}
    exact |= {"keys": sorted(metrics), "curve": sorted(curve), "precision": metrics["precision"]}
    exact |= {"perturbation": metrics["perturbation"], "skipped": metrics["skipped_steps"]}
    exact["hyperparameters"] = metrics["hyperparameters"]
    close = {name: metrics[name] for name in ("before", "after")}
    close["held_out"] = [dict(sorted(point.items())) for point in curve["held_out"]]
    close["train"] = curve["train_loss"]
    return plain(exact), plain(close)


def record_of(run: Path) -> dict[str, Any]:
    """The run's record as its exported form says it, with some steps that must have found a slope."""
    smezo("export", str(run), "--out", str(run / "tune.safetensors"))
    content = exported(run / "tune.safetensors")
    flat = [each for step in content["gradients"] for each in step]
    assert any(flat), "no step changed anything: the golden run tests nothing"
    return content


def trained(name: str, *words: str) -> Result:
    """A run whose weights depend on no processor: its record, and the weights that are made of it."""
    run = fit(name, *ACCURACY, *words)
    exact, close = metrics_of(run)
    return {"exact": {"metrics": exact, **weights_by_record(run)}, "close": close}


def weights_by_record(run: Path) -> dict[str, Any]:
    out = run / "made"
    said = smezo("replay", str(run), "--out", str(out))
    assert "identical: every bit is as in the run" in said, said
    return {"record": record_of(run), "weights": weights_of(out)}


@case("cli/s-mezo")
def _cli_s_mezo(folder: Path) -> Result:
    """A whole run and every verb that reads what it left."""
    prepare(folder)
    words = ("--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null")
    run = fit("one", *ACCURACY, *words, "--model.save_pretrained=whole")
    exact, close = metrics_of(run)
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    result: dict[str, Any] = {
        "metrics": exact,
        "files": ["events" if name.startswith("events.") else name for name in files],
        "weights": weights_of(folder / "whole"),
        "record": record_of(run),
    }
    for step in (2, 5):
        smezo("replay", str(run), "--step", str(step), "--out", f"step{step}")
        result[f"step {step}"] = weights_of(folder / f"step{step}")
    assert result["step 5"] == result["weights"] != weights_of(folder / "model")
    said = smezo("apply", str(run / "tune.safetensors"), "--out", "applied")
    result["apply"] = said.splitlines()[1:]
    assert weights_of(folder / "applied") == result["weights"]
    smezo("export", str(run), "--step", "2", "--out", "early.safetensors")
    result["early"] = exported(folder / "early.safetensors")
    for name in ("whole", "applied"):
        there = {path.name for path in (folder / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= there

    facts = {name: json.loads(smezo("show", str(path), "--json")) for name, path in _shown(run).items()}
    varying = ("bytes", "run", "created", "versions", "machine", "loss", "path")
    result["show"] = {
        name: plain({key: value for key, value in each.items() if key not in varying}) for name, each in facts.items()
    }
    result["show keys"] = sorted(facts["record"])
    close["show"] = facts["record"]["loss"]
    result["shown"] = [line.split()[0] for line in smezo("show", str(run)).splitlines()[1:]]
    result["two"] = smezo("show", str(run), str(run / "tune.safetensors")).splitlines()[-1].split(": ", 1)[1]

    smezo("evaluate", str(run), "--every", "2", "--out", "scores.json")
    scores = json.loads((folder / "scores.json").read_text())
    close["evaluate"] = scores["scores"]
    result["evaluate"] = [sorted(scores), scores["split"], [row["step"] for row in scores["scores"]]]

    for verb in ("validate", "test"):
        for name, more in (("untrained", ()), ("trained", (f"--ckpt_path={run / 'checkpoints/last.ckpt'}",))):
            smezo(verb, f"--config={run / 'config.yaml'}", f"--name={verb}-{name}", *more)
            [written] = Path("runs", f"{verb}-{name}").rglob(f"{verb}.json")
            measured = json.loads(written.read_text())
            close[f"{verb} {name}"] = measured["metrics"]
            result[f"{verb} {name}"] = [sorted(measured), *(measured[k] for k in ("task", "split", "examples"))]
    smezo("predict", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints/last.ckpt'}", "--name=p")
    result["predict"], close["predict"] = predictions(Path("runs/p"))

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    # a resume of an older run finds its callbacks by these names
    result["checkpoint"] = {
        "keys": sorted(key for key in checkpoint if not key.startswith("pytorch-lightning")),
        "callbacks": {name: sorted(state) for name, state in checkpoint["callbacks"].items()},
        "hyperparameters": sorted(checkpoint["hyper_parameters"]),
        "optimizer": [sorted(state) for state in checkpoint["optimizer_states"]],
        "place": sorted(checkpoint["smezo_pl"]),
    }
    with contextlib.closing(sqlite3.connect(run / "trajectory.smezo")) as database:
        schema = database.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
    result["schema"] = [list(row) for row in schema]

    table = smezo("compare", "runs/one", "--out", "compared")
    result["compare"] = table.splitlines()[0]
    with open("compared.csv", encoding="utf-8") as file:
        [row] = list(csv.DictReader(file))
    result["compare csv"] = list(row)
    return {"exact": result, "close": close}


def _shown(run: Path) -> dict[str, Path]:
    return {"record": run, "tune": run / "tune.safetensors"}


def predictions(folder: Path) -> tuple[list[Any], list[Any]]:
    """``predictions.jsonl`` below a folder: rows without scores, and scores."""
    [path] = folder.rglob("predictions.jsonl")
    rows = rows_of(path)
    exact = [{key: value for key, value in row.items() if key != "scores"} for row in rows]
    return [list(rows[0]), exact[0], digest(exact)], [row.get("scores", []) for row in rows]


ZEROTH_ORDER: dict[str, tuple[str, ...]] = {
    "mezo": ("--model.method=mezo", "--model.optimizer.lr=5e-4"),
    "r-mezo": ("--model.method=r-mezo",),
    "s-mezo by method": ("--model.method=s-mezo", "--model.optimizer.mask_update=constant"),
    "large": ("--model.optimizer.mask=large",),
    "in place": ("--model.perturbation=in_place",),
    "rademacher": ("--model.optimizer.noise=rademacher", "--model.optimizer.weight_decay=0.1"),
    "two samples": ("--model.optimizer.num_samples=2",),
    "micro-batches": ("--model.micro_batch_size=3",),
    "scope": ("--model.optimizer.include=['*self_attn*']", "--model.optimizer.exclude=['*q_proj*']"),
    "schedule": ("--model.lr_scheduler=torch.optim.lr_scheduler.LinearLR", "--model.lr_scheduler.total_iters=3"),
    "anchors": (
        "--trainer.callbacks=smezo_pl.SeedCheckpoint",
        "--trainer.callbacks.every_n_steps=2",
        "--trainer.callbacks.anchor_every_n_steps=2",
    ),
    "refresh": ("--trainer.callbacks=smezo_pl.MaskRefresh", "--trainer.callbacks.every_n_steps=2"),
    "refresh, constant": (
        "--trainer.callbacks=smezo_pl.MaskRefresh",
        "--trainer.callbacks.sparsity={0: 0.25, 3: 0.75}",
        "--model.optimizer.mask_update=constant",
    ),
    "f1": ("--data.objective=f1", "--data.k_shot=6", "--data.task.metric=[f1,f1_macro,matthews]"),
}


def _cli_zeroth_order(name: str, folder: Path) -> Result:
    prepare(folder)
    return trained("run", *ZEROTH_ORDER[name])


for _name in ZEROTH_ORDER:
    case(f"cli/{_name}")(partial(_cli_zeroth_order, _name))


def _cli_16_bit(precision: str, folder: Path) -> Result:
    """16-bit weights: processors differ visibly in such a model's answers, so a reward gives numbers made beforehand.

    One of them is NaN, and its step is skipped.
    """
    prepare(folder)
    # The count is in a file, since a reward that was loaded once in a process is kept.
    (folder / "golden_rewards.py").write_text(
        "from pathlib import Path\n"
        "def prepared(predictions, references):\n"
        "    call = len(Path('calls').read_text()) if Path('calls').exists() else 0\n"
        "    Path('calls').write_text('.' * (call + 1))\n"
        "    return float('nan') if call == 6 else (call * 37 % 64) / 64\n"
    )
    words = ("--data.reward=golden_rewards.prepared", f"--trainer.precision={precision}", "--trainer.max_steps=6")
    run = fit("run", *words, "--model.optimizer.num_samples=2")
    exact, close = metrics_of(run)
    assert exact["skipped"] == 1
    return {"exact": {"metrics": exact, **weights_by_record(run)}, "close": {"train": plain(close["train"])}}


for _precision in ("bf16-true", "16-true"):
    case(f"cli/{_precision}")(partial(_cli_16_bit, _precision))


@case("cli/lora-zeroth-order")
def _cli_lora(folder: Path) -> Result:
    """LoRA's starting weights are PEFT's draw from torch's generator: a uniform one, whose bits all CPUs share."""
    prepare(folder)
    adapter = "{peft_type: LORA, r: 4, lora_alpha: 16, target_modules: [q_proj, v_proj]}"
    words = (f"--model.adapter={adapter}", "--model.optimizer.eps=0.5", "--model.optimizer.lr=0.05")
    return trained("run", *words, "--model.optimizer.sparsity=0.25")


@case("cli/prefix-zeroth-order")
def _cli_prefix(folder: Path) -> Result:
    """A prefix that starts at zero: PEFT's random one is a normal draw, which CPUs round differently.

    The command line refuses to build it from a record, so the weights are those that the run wrote.
    """
    prepare(folder)
    adapter = "{peft_type: PREFIX_TUNING, num_virtual_tokens: 3, init_weights: zero}"
    words = (f"--model.adapter={adapter}", "--model.optimizer.eps=1.0", "--model.optimizer.lr=0.05")
    run = fit("run", *ACCURACY, *words, "--model.save_pretrained=whole")
    exact, close = metrics_of(run)
    return {
        "exact": {"metrics": exact, "record": record_of(run), "weights": weights_of(folder / "whole")},
        "close": close,
    }


@case("cli/resume")
def _cli_resume(folder: Path) -> Result:
    """A run that was stopped in the middle of an epoch (of 3 steps) goes on to what the whole one is."""
    prepare(folder)
    callback = ("--trainer.callbacks=smezo_pl.MaskRefresh", "--trainer.callbacks.every_n_steps=3")
    words = (*ACCURACY, *callback, "--model.optimizer.num_samples=2")
    whole = fit("whole", *words, "--trainer.max_steps=8")
    early = fit("half", *words, "--trainer.max_steps=4")
    late = fit("half", *words, "--trainer.max_steps=8", f"--ckpt_path={early / 'checkpoints/last.ckpt'}")
    made = {name: weights_by_record(run) for name, run in (("whole", whole), ("late", late))}
    assert made["whole"]["weights"] == made["late"]["weights"]
    assert made["whole"]["record"]["gradients"] == made["late"]["record"]["gradients"]
    losses = [json.loads((run / "metrics.json").read_text())["curve"]["train_loss"] for run in (whole, late)]
    assert losses[0] == losses[1]
    return {"exact": made, "close": {"train": losses[0]}}


@case("cli/masked-language-model")
def _cli_masked(folder: Path) -> Result:
    prepare(folder, FILL_IN, "roberta")
    result = trained("run", "--model.optimizer.eps=0.2")
    checkpoint = "--ckpt_path=" + str(next(Path("runs/run").rglob("last.ckpt")))
    smezo("predict", "--config=base.yaml", "--name=p", checkpoint)
    result["exact"]["predict"], result["close"]["predict"] = predictions(Path("runs/p"))
    return result


@case("cli/multiple-choice")
def _cli_choice(folder: Path) -> Result:
    """Candidates of several tokens, read after their prompt in one row; demonstrations and calibration."""
    prepare(folder, CHOOSE)
    result = trained("run", "--model.micro_batch_size=5")
    for name, words in (
        ("plain", ()),
        ("demonstrations", ("--data.num_demonstrations=2", "--data.eval_batch_size=3")),
        ("one set", ("--data.num_demonstrations=3", "--data.demonstration_seed=4", "--data.max_length=60")),
        ("sfc", ("--data.calibration=sfc",)),
        ("icl_sfc", ("--data.calibration=icl_sfc", "--data.num_demonstrations=2")),
    ):
        smezo("predict", "--config=base.yaml", f"--name={name}", *words)
        result["exact"][name], result["close"][name] = predictions(Path("runs", name))
    return result


@case("cli/generation")
def _cli_generation(folder: Path) -> Result:
    """Generated answers, as objective, as metric and as predictions."""
    prepare(folder, WRITE)
    (folder / "golden_rewards.py").write_text(
        "def letters(predictions, references):\n    return [len(p) + p.count('e') for p in predictions]\n"
    )
    words = ("--data.reward=golden_rewards.letters", "--model.perturbation=in_place", "--trainer.max_steps=4")
    run = fit("run", *words)
    exact, close = metrics_of(run)
    result: dict[str, Any] = {"metrics": exact, **weights_by_record(run)}
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    for name, more in (("before", ()), ("after", (checkpoint,))):
        smezo("predict", "--config=base.yaml", f"--name={name}", *more)
        [path] = Path("runs", name).rglob("predictions.jsonl")
        result[name] = rows_of(path)
    smezo("test", "--config=base.yaml", "--name=t", checkpoint)
    [path] = Path("runs/t").rglob("test.json")
    close["test"] = json.loads(path.read_text())["metrics"]
    return {"exact": result, "close": close}


@case("cli/likelihood-objectives")
def _cli_losses(folder: Path) -> Result:
    """Steps on real losses, whose weights are this machine's; ``lm`` weighs parts by the lengths of answers."""
    prepare(folder, CHOOSE)
    exact, close, machine = {}, {}, {}
    for name, words in (
        ("classification", ("--data.objective=classification",)),
        ("lm", ("--data.objective=lm", "--model.micro_batch_size=3")),
    ):
        run = fit(name, *words, "--model.optimizer.eps=1e-3", "--model.optimizer.lr=1e-3", "--trainer.max_steps=3")
        exact[name], close[name] = metrics_of(run)
        machine[name] = weights_by_record(run)
    return {"exact": exact, "close": close, "machine": machine}


FIRST_ORDER = {"full": 1e-3, "lora": 2e-2, "prefix": 1e-1, "linear-probe": 1e-1}


def _cli_first_order(method: str, folder: Path) -> Result:
    prepare(folder)
    words = (f"--model.method={method}", f"--model.first_order.lr={FIRST_ORDER[method]}", "--model.micro_batch_size=5")
    run = fit("run", *words, "--trainer.max_steps=4", "--model.first_order.weight_decay=0.1")
    exact, close = metrics_of(run)
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    learned = dict(checkpoint["state_dict"])
    result = {
        "metrics": exact,
        "files": ["events" if name.startswith("events.") else name for name in files],
        "learned": sorted(learned),
        "callbacks": {name: sorted(state) for name, state in checkpoint["callbacks"].items()},
    }
    smezo("test", "--config=base.yaml", *words, "--name=t", f"--ckpt_path={run / 'checkpoints/last.ckpt'}")
    [path] = Path("runs/t").rglob("test.json")
    close["test"] = json.loads(path.read_text())["metrics"]
    return {"exact": result, "close": close, "machine": {"weights": weights_of(learned)}}


for _method in FIRST_ORDER:
    case(f"cli/{_method}")(partial(_cli_first_order, _method))


@case("cli/zero-shot")
def _cli_zero_shot(folder: Path) -> Result:
    prepare(folder)
    run = fit("run", "--model.method=zero-shot")
    exact, close = metrics_of(run)
    return {"exact": exact, "close": close}


@case("cli/logged-names")
def _cli_logged(folder: Path) -> Result:
    """Names that a logger gets, and the values that do not depend on the processor or the clock."""
    prepare(folder)
    words = ("--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs")
    callback = ("--trainer.callbacks=smezo_pl.MaskRefresh", "--trainer.callbacks.every_n_steps=2")
    smezo("fit", "--config=base.yaml", *ACCURACY, *words, *callback, "--trainer.val_check_interval=2")
    [path] = Path("logs").rglob("metrics.csv")
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    timed = re.compile("second|memory|share|fraction|examples|overhead|bytes")
    values = {
        name: [[int(row["step"]), float(row[name])] for row in rows if row[name]]
        for name in sorted(rows[0])
        if name not in ("step", "epoch") and not timed.search(name)
    }
    return {"exact": {"names": sorted(rows[0])}, "close": plain(values)}


@case("python/module-in-the-trainer")
def _python_module(folder: Path) -> Result:
    """A subclass with a network and a loss of its own, as the README shows it."""
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    class Counting(smezo_pl.SparseMeZOModule):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return ((self.model(x)[:, 0] > 0) != y).float().mean()

    exact = {}
    features = whole_numbers((48, 6), 1)
    labels = features[:, 0] + features[:, 1] > 0
    for name, settings in (
        ("plain", {}),
        ("parts", {"micro_batch_size": 5}),
        ("in place", {"perturbation": "in_place"}),
    ):
        network = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1))
        fill(network, 1.0)
        start = weights_of(network)
        optimizer = partial(smezo_pl.SparseMeZO, lr=2e-2, eps=0.25, sparsity=0.25, num_samples=2)
        module = Counting(network, optimizer=optimizer, **settings)
        trainer = Trainer(
            max_steps=6,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[smezo_pl.SeedCheckpoint(str(folder / name))],
        )
        loader = DataLoader(TensorDataset(features, labels), batch_size=16)
        trainer.fit(module, loader)
        assert weights_of(network) != start
        exact[name] = [weights_of(network), weights_of(module), trainer.optimizers[0].steps_done]
    return {"exact": exact}


# ---------------------------------------------------------------------- data and names


@case("data/tasks")
def _data_tasks(folder: Path) -> Result:
    """Prompts, candidates and answers of every built-in task, from made-up rows."""
    put_tasks(folder)
    exact: dict[str, Any] = {}
    for task in ("demo", *(name.removesuffix(".fixed") for name in TASK_ROWS)):
        data = smezo_pl.PromptDataModule(task, "data", num_train=8, num_dev=4, num_test=6)
        rows = [
            [example.index, example.prompt, list(example.candidates), example.label, list(example.references)]
            for split in ("train", "dev", "test")
            for example in data.examples(split)
        ]
        exact[task] = [rows[0], digest(rows)]
    return {"exact": exact}


@case("data/preview")
def _data_preview(folder: Path) -> Result:
    """What ``smezo preview`` shows: tokens that are scored, lengths, balance; causal and masked prompts."""
    put_tasks(folder)
    prepare(folder)
    exact: dict[str, Any] = {"own": smezo("preview", "--config=base.yaml", "--examples", "2").splitlines()}
    sizes = ("--data.data_dir=data", "--data.num_train=8", "--data.num_dev=4", "--model.pretrained=model")
    for task in ("demo", "copa", "multirc", "squad", "trec"):
        exact[task] = smezo("preview", f"--data.task={task}", *sizes, "--examples", "1").splitlines()
    masked = folder / "masked"
    masked.mkdir()
    put_model(masked, "roberta")
    for task in ("demo", "sst2", "mnli", "rte", "qnli", "mrpc", "qqp", "cola", "trec"):
        words = (f"--data.task={task}", *sizes, "--model.pretrained=masked/model")
        exact[f"masked {task}"] = smezo("preview", *words, "--examples", "1").splitlines()
    return {"exact": exact}


METHODS = {
    "SparseMeZO": [
        "attach",
        "detach",
        "step",
        "refresh_masks",
        "prepare_masks",
        "thresholds",
        "packed_masks",
        "mask_stats",
        "settings",
        "adopt_masks",
        "state_dict",
        "load_state_dict",
        "add_param_group",
        "replay_step",
        "replay_steps",
        "extra_bytes",
    ],
    "SparseMeZOModule": ["loss", "batch_loss", "evaluate_batch", "configure_model", "starting_network"],
    "PromptDataModule": ["examples", "encoded", "origin", "set_tokenizer", "setup", "train_dataloader"],
}
"""Methods that users call or override."""


@case("names/public")
def _names_public(folder: Path) -> Result:
    """Public names, and the arguments of what is callable."""
    arguments = {}
    for name in smezo_pl.__all__:
        value = getattr(smezo_pl, name)
        if callable(value):
            given = inspect.signature(value).parameters.values()
            arguments[name] = [f"{p.kind.name.lower()} {p.name}{_default(p.default)}" for p in given]
    for name, methods in METHODS.items():
        assert all(callable(getattr(getattr(smezo_pl, name), method, None)) for method in methods), name
    return {"exact": {"names": sorted(smezo_pl.__all__), "arguments": arguments}}


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    # of a group of settings the values: the name of its class is not public
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return f"={getattr(value, '__name__', None) or repr(value)}"


_OPTION = re.compile(r"^ +(?:-\w, )?(--[\w.-]+)", re.MULTILINE)


@case("names/options")
def _names_options(folder: Path) -> Result:
    """Verbs and their options, all of which must stay (new ones may come); defaults. Lightning's own are left out."""
    verbs = re.findall(r"^  (\w+)  +\S.*$", smezo("--help"), re.MULTILINE)
    present: dict[str, list[str]] = {"verbs": verbs}
    for verb in verbs:
        options = sorted(set(_OPTION.findall(smezo(verb, "--help"))))
        present[verb] = [option for option in options if not option.startswith("--trainer")]
    present["optimizer"] = sorted(set(_OPTION.findall(smezo("fit", "--model.optimizer.help"))))
    for name in ("MaskRefresh", "PredictionWriter", "RunMetrics", "SeedCheckpoint", "ZerothOrderMonitor"):
        present[name] = sorted(set(_OPTION.findall(smezo("fit", f"--trainer.callbacks.help=smezo_pl.{name}"))))
    printed = yaml.safe_load(smezo("fit", "--model.pretrained=x", "--print_config"))
    exact: dict[str, Any] = {"defaults": {key: value for key, value in printed.items() if key != "trainer"}}
    changed = ("default_root_dir", "enable_model_summary", "log_every_n_steps", "max_steps", "num_sanity_val_steps")
    exact["trainer defaults"] = {key: printed["trainer"][key] for key in changed}
    return {"exact": exact, "present": present}


# ---------------------------------------------------------------------- the table


def compute(pattern: str = "", say: bool = True) -> dict[str, Result]:
    """All cases whose name contains a text."""
    results = {}
    for name in CASES:
        if pattern in name:
            with TemporaryDirectory() as folder:
                results[name] = run_case(name, Path(folder).resolve())
            if say:
                print(name, file=sys.stderr)
    return results


def differences(mine: Any, other: Any, where: str, tolerance: bool = False) -> list[str]:
    """Where two results differ; numbers by less than 1e-3 of themselves plus 1e-4 do not with ``tolerance``."""
    if isinstance(mine, dict) and isinstance(other, dict):
        found = [f"{where}: {key!r} is only in one of them" for key in sorted(mine.keys() ^ other.keys())]
        for key in sorted(mine.keys() & other.keys()):
            found += differences(mine[key], other[key], f"{where} / {key}", tolerance)
        return found
    if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
        pairs = enumerate(zip(mine, other, strict=True))
        return [line for n, (a, b) in pairs for line in differences(a, b, f"{where} / {n}", tolerance)]
    if isinstance(mine, list) and isinstance(other, list) and all(isinstance(each, str) for each in (*mine, *other)):
        parts = [sorted(set(mine) - set(other)), sorted(set(other) - set(mine))]
        return [f"{where}: of {len(mine)} and {len(other)} texts only the first has {parts[0]}, the second {parts[1]}"]
    numbers = [value for value in (mine, other) if isinstance(value, int | float) and not isinstance(value, bool)]
    if tolerance and len(numbers) == 2 and abs(mine - other) <= 1e-4 + 1e-3 * abs(other):
        return []
    return [] if mine == other else [f"{where}: {mine!r:.300} is not {other!r:.300}"]


def as_text(results: dict[str, Result]) -> str:
    """JSON with a line for each value of a case, so that a change shows as the lines that it concerns."""
    line = partial(json.dumps, sort_keys=True, ensure_ascii=False)
    cases = []
    for name, result in sorted(results.items()):
        kinds = [
            f" {line(kind)}: {{\n" + ",\n".join(f"  {line(k)}: {line(v)}" for k, v in sorted(of.items())) + "\n }"
            for kind, of in sorted(result.items())
        ]
        cases.append(f"{line(name)}: {{\n" + ",\n".join(kinds) + "\n}")
    return "{\n" + ",\n".join(cases) + "\n}\n"


def main() -> None:
    """Write the table, or compare with a written one."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.cases", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="compute all cases and write them")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compute all cases and print what differs")
    parser.add_argument("--portable", action="store_true", help="leave out what is this machine's; for values.json")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains it")
    given = parser.parse_args()
    results = compute(given.only)
    if given.portable:
        results = {name: {k: v for k, v in result.items() if k != "machine"} for name, result in results.items()}
    if given.write is not None:
        given.write.write_text(as_text(results), "utf-8")
    if given.compare is not None:
        written = json.loads(given.compare.read_text("utf-8"))
        written = {name: result for name, result in written.items() if given.only in name}
        found = differences(results, written, "now and then")
        print("\n".join(found) or f"{len(results)} cases, no difference")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
