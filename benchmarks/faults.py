"""Robustness of a trajectory to kills, corruption and fuzzed headers. Exits with 1 if a run ends with wrong weights.

    python benchmarks/faults.py --json benchmarks/results/faults.json

It takes a while (the defaults: about half an hour on two cores); the tests run a few of each. A campaign that is given
0 is left out, and keeps what the file says of it. Every run is a small network of its own process, trained by the
Trainer with `SeedCheckpoint`:

- ``kills``: runs killed by SIGKILL, one to three times each, at any time or at a chosen point (inside a commit of the
  trajectory, inside a checkpoint, inside a mask refresh), then resumed. Each must end with the weights, the trajectory
  and the logged values of the run that nobody disturbed.
- ``corruptions``: one file of a killed or finished run is corrupted. Reading, replaying, exporting and resuming must
  each report an error or give the right weights to the last bit.
- ``headers``: headers of trajectories and exported runs with odd values or corrupted bytes, sealed as a writer would.
  Each must be read or refused by an error of the package, within a bound of memory.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import tracemalloc
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import campaigns
import torch
from common import machine, parser_of, write_json

from smezo_pl.commands import show
from smezo_pl.trajectory.exports import export, read_export
from smezo_pl.trajectory.header import Header, TrajectoryError
from smezo_pl.trajectory.log import Trajectory

MEMORY_BOUND = 64 << 20
"""Most bytes that reading a file of a few kilobytes may allocate, whatever stands in it."""


def shared_out(campaign: Any, count: int, folder: Path, jobs: int) -> dict[str, Any]:
    """A campaign in several processes, each with its share of the numbers; what they found is added up."""
    children = []
    for job in range(jobs):
        own = folder / f"job{job}"
        own.mkdir(parents=True)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                (own / "found").write_text(json.dumps(campaign(range(job, count, jobs), own)))
                status = 0
            finally:
                os._exit(status)
        children.append((pid, own))
    found: dict[str, Any] = {}
    for pid, own in children:
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise RuntimeError(f"a part of {campaign.__name__} ended early")
        found = added(found, json.loads((own / "found").read_text()))
    return found


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Numbers added, lists joined; of texts and of most_bytes_allocated the first and the largest."""
    result = dict(one)
    for key, value in other.items():
        if key not in result:
            result[key] = value
        elif isinstance(value, dict):
            result[key] = added(result[key], value)
        elif isinstance(value, int | list):
            result[key] = max(result[key], value) if key == "most_bytes_allocated" else result[key] + value
    return result


def kills(numbers: range, folder: Path) -> dict[str, Any]:
    names = list(campaigns.CONFIGURATIONS)
    seconds = {name: campaigns.undisturbed(folder / f"straight{i}", name) for i, name in enumerate(names)}
    points: Counter[str] = Counter()
    equal, times, failures = 0, 0, []
    for number in numbers:
        which = number // len(campaigns.POINTS) % len(names)
        name, run = names[which], folder / f"killed{number}"
        found = campaigns.killed(run, name, folder / f"straight{which}", seconds[name], number)
        points[found["point"]] += 1
        times += len(found["kills"])
        equal += found["equal"] is None
        if found["equal"] is not None:
            failures.append({"number": number, "configuration": name, **found})
        shutil.rmtree(run)
    return {"runs": len(numbers), "equal": equal, "times_killed": times, "points": dict(points), "failures": failures}


def corruptions(numbers: range, folder: Path) -> dict[str, Any]:
    prepared = []
    for i, name in enumerate(campaigns.CONFIGURATIONS):
        straight = folder / f"whole{i}"
        campaigns.undisturbed(straight, name)
        campaigns.half_run(folder / f"half{i}", name, 17)
        campaigns.half_run(folder / f"other{i}", name, 17, seed=8)
        code, said = campaigns.forked(lambda s=straight, n=name: campaigns.truth_of(s, n))
        if code:
            raise RuntimeError(said)
        truth = {int(steps): digest for steps, digest in json.loads(said).items()}
        prepared.append((name, straight, [folder / f"half{i}", straight], folder / f"other{i}", truth))
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    failures = []
    for number in numbers:
        noise = random.Random(number)
        name, straight, sources, other, truth = prepared[number % len(prepared)]
        # the run is the one that the undisturbed one repeats; its name differs, so steps are compared, not files
        run = folder / "corrupted"
        shutil.copytree(sources[noise.random() < 0.3], run)
        done = campaigns.corrupt(run, other, noise)
        found = campaigns.outcomes_of(run, straight, name, truth)
        kinds[done.split(":")[0]] += 1
        for what, outcome in found.items():
            word = outcome.split(":")[0]
            outcomes[f"{what}: {word}"] += 1
            if word == "detected":
                examples.setdefault(f"{done.split(':')[0]}, {what}", outcome.replace(str(run), "RUN")[:300])
            if word == "WRONG":
                failures.append({"number": number, "configuration": name, "harm": done, what: outcome})
        shutil.rmtree(run)
    return {
        "corruptions": len(numbers),
        "wrong": len(failures),
        "outcomes": dict(sorted(outcomes.items())),
        "kinds": dict(kinds),
        "examples": examples,
        "failures": failures,
    }


def headers(numbers: range, folder: Path) -> dict[str, Any]:
    name = next(iter(campaigns.CONFIGURATIONS))
    run = folder / "headers"
    campaigns.undisturbed(run, name)
    plain = json.loads(zlib.decompress(Trajectory.read(run).header.to_bytes()))
    exported = run / "tune.safetensors"
    export(run, exported)
    original = exported.read_bytes()
    outcomes: Counter[str] = Counter()
    failures, most = [], 0
    tracemalloc.start()
    for number in numbers:
        noise = random.Random(number)
        kind = ("record", "export", "export, bytes")[number % 3]
        try:
            changed = campaigns.mutated_header(plain, noise)
            if kind == "record":
                data = zlib.compress(json.dumps(changed).encode())
                tracemalloc.reset_peak()
                seen = Trajectory(exported, Header.from_bytes(data, "FILE"), [], [], [])
            else:
                exported.write_bytes(original)
                campaigns.cheat(exported, changed if kind == "export" else None, noise)
                tracemalloc.reset_peak()
                seen = read_export(exported)
            show.as_text(seen, show.summary(seen))
            outcomes[f"{kind}: read"] += 1
        except TrajectoryError as error:
            outcomes[f"{kind}: refused"] += 1
            if len(str(error)) > 2000:
                failures.append({"number": number, "kind": kind, "error": f"a message of {len(str(error))} letters"})
        except Exception as error:
            failures.append({"number": number, "kind": kind, "error": f"{type(error).__name__}: {error!s:.300}"})
        most = max(most, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    if most > MEMORY_BOUND:
        failures.append({"error": f"{most} bytes were allocated"})
    return {"headers": len(numbers), "outcomes": dict(outcomes), "most_bytes_allocated": most, "failures": failures}


def main(args: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--corruptions", type=int, default=500)
    parser.add_argument("--headers", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    given = parser.parse_args(args)
    if given.small:
        given.kills, given.corruptions, given.headers, given.jobs = 1, 2, 20, 1
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    campaigns.HUNG_SECONDS = 3600.0  # nobody waits for it, and the machine may be busy with other things
    earlier = given.json is not None and given.json.exists()
    results: dict[str, Any] = json.loads(given.json.read_text()) if earlier else {}
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a killed process loses nothing of either
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        campaigns.warm_up(Path(folder))
        for name, campaign in (("kills", kills), ("corruptions", corruptions), ("headers", headers)):
            if getattr(given, name):
                began = time.monotonic()
                found = shared_out(campaign, getattr(given, name), Path(folder) / name, given.jobs)
                results[name] = {**found, "seconds": round(time.monotonic() - began, 1), "machine": machine()}
                short = {key: value for key, value in found.items() if key not in ("examples", "failures")}
                print(f"{name}: {short}; {len(found['failures'])} failures", flush=True)
                for failure in found["failures"][:5]:
                    print("  ", failure, flush=True)
                write_json(given.json, results)
    sys.exit(any(found["failures"] for found in results.values()))


if __name__ == "__main__":
    main()
