"""A finished run as one safetensors file: the header, a projected gradient per sample, and what changed on the way.

Learning rate, weight decay, eps and sparsity change rarely, or at every step. What holds for many steps is run-length
encoded in JSON. A schedule that changes at every step is a column of float64: each value's bits are subtracted from
those of the one before it, twice (a straight line leaves next to nothing), and the bytes of equal weight are deflated
together. 20,000 steps with a linear schedule take 84 kB; deflated as they are, 202 kB.

Format 2 has the number of samples as one more column, gradients padded with zeros to the largest number, and from which
step on which tensors took no part.

Format 3 has the numbers of all steps one after the other, columns with the number of samples and rows of each, and from
which step on which tensors shared a direction. With a direction per row each number is a multiple, from -127 to 127, of
a unit that its step has (`smezo_pl.optim.coefficients.rounded`): one byte, and one more column with the units. 20,000
steps of 16 rows take 375 kB, by ranks 322 kB; as float32 1.3 MB.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from smezo_pl.optim import StepRecord
from smezo_pl.optim.coefficients import in_steps
from smezo_pl.trajectory.files import write_atomically
from smezo_pl.trajectory.header import FORMAT, LATEST_FORMAT, MAX_HEADER_BYTES, Header, TrajectoryError, inflate
from smezo_pl.trajectory.log import FILE_NAME, Trajectory, is_trajectory, locate
from smezo_pl.trajectory.records import MAX_NUMBERS, RATES, Event, format_of

log = logging.getLogger(__name__)

KIND = "smezo_tune"
MAX_FILE_BYTES = 1 << 27
"""Largest file that is written and opened: thirty million steps, or a hundred thousand of 1000 rows."""

_ONE_EACH = ("samples", "rows", "mean_square", "unit")  # in the order of their columns, which follow the rates


def pack_columns(values: Sequence[tuple[float, ...]]) -> tuple[list[list[Any]], bytes]:
    """Encode one value per step and parameter group.

    Either as runs, each ``[first step, value of each group]``, and no bytes; or as no runs and a column.
    """
    runs: list[list[Any]] = []
    for index, value in enumerate(values):
        if not runs or tuple(runs[-1][1:]) != value:
            runs.append([index, *value])
    # an entry of the run-length encoding costs about as much JSON as six steps of a column
    if 6 * len(runs) <= len(values) or len(runs) <= 1:
        return runs, b""
    bits = np.ascontiguousarray(np.array(values, dtype="<f8").T).view("<u8")
    for _ in range(2):
        bits = np.diff(bits, prepend=np.uint64(0))
    planes = np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 8).T
    return [], zlib.compress(planes.tobytes(), 9)


def unpack_columns(runs: object, column: bytes, steps: int, groups: int) -> list[tuple[float, ...]]:
    """Decode what `pack_columns` gave; a `ValueError` if these are not the values of so many steps and groups."""
    if steps * groups > 1 << 26:  # bounds what a corrupted file can make a reader allocate
        raise ValueError(f"{steps} steps of {groups} groups are too many")
    if runs == []:
        return _unpack_column(column, steps, groups) if steps else []
    if not isinstance(runs, list) or not all(
        isinstance(run, list) and len(run) == groups + 1 and {*map(type, run)} <= {int, float} for run in runs
    ):
        raise ValueError("the run-length encoding is no list of a step and a number per group")
    starts = [run[0] for run in runs]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], steps], strict=True)]
    if starts[0] != 0 or not all(isinstance(length, int) and length > 0 for length in lengths):
        raise ValueError("the run-length encoding is not of these steps")
    return [tuple(map(float, run[1:])) for run, length in zip(runs, lengths, strict=True) for _ in range(length)]


def _unpack_column(data: bytes, steps: int, groups: int) -> list[tuple[float, ...]]:
    plain = inflate(data, 8 * steps * groups)
    if len(plain) != 8 * steps * groups:
        raise ValueError(f"a column has {len(plain)} bytes for {steps} steps and {groups} groups")
    planes = np.frombuffer(plain, np.uint8).reshape(8, -1)
    bits = np.ascontiguousarray(planes.T).view("<u8").reshape(groups, steps)
    for _ in range(2):
        bits = np.cumsum(bits, axis=1, dtype=np.uint64)
    return [tuple(row) for row in np.ascontiguousarray(bits).view("<f8").T.tolist()]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        steps: Steps of the optimizer that it holds.
        size: Its bytes.
        verified: Whether it holds a hash of the final weights, so that `apply` can tell whether it got the same.
    """

    path: Path
    steps: int
    size: int
    verified: bool


def export(source: Trajectory | str | Path, path: str | Path, steps: int | None = None) -> Exported:
    """Write a run to one file.

    Args:
        source: The trajectory, its file, or the run's folder.
        path: File to write, by convention ``.safetensors``.
        steps: How many steps of the optimizer; None for all that are recorded.

    Raises:
        TrajectoryError: If the trajectory is corrupted or does not reach that far, or the file cannot be written or is
            another one than an exported run.
    """
    trajectory = source.upto(steps) if isinstance(source, Trajectory) else load(source, steps)
    if (path := Path(path)).is_file() and not _is_export(path):
        raise TrajectoryError(f"{path} is there already and no exported run: choose another name")
    records, root = trajectory.records, trajectory.final_root
    about = replace(trajectory.header, settings=trajectory.settings)
    form = max((format_of(record, about) for record in records), default=about.format)
    columns_of = {name: [getattr(record, name) for record in records] for name in RATES}
    if form > FORMAT:
        columns_of["samples"] = [(float(record.samples),) for record in records]
    numbers, further = _numbers_of(records, about, str(path))
    packed = {name: pack_columns(values) for name, values in (columns_of | further).items()}
    content = {
        "header": json.loads(zlib.decompress(about.to_bytes())),
        "pieces": {name: runs for name, (runs, _) in packed.items()},
        "columns": [len(column) for _, column in packed.values()],
        "skipped": [index for index, record in enumerate(records) if record.skipped],
        "refreshed": [index for index, record in enumerate(records) if record.refreshed],
        "final": root,
    }
    if form > FORMAT:
        content["unread"] = _changes([record.unread for record in records])
    if form == LATEST_FORMAT:
        content |= {"steps": len(records), "shared": _changes([record.shared for record in records])}
    header = zlib.compress(json.dumps(content, separators=(",", ":"), allow_nan=False).encode(), 9)
    columns = b"".join(column for _, column in packed.values())
    arrays = {
        "projected_gradients": numbers,
        "header": np.frombuffer(header, np.uint8),
        "columns": np.frombuffer(columns, np.uint8),
    }
    metadata = {  # what any safetensors tool shows; only the first three are read back
        "kind": KIND,
        "format": str(form),
        "sha256": _seal(header, columns, numbers),
        "run": about.run,
        "model": about.model.get("name", "unknown"),
        "revision": about.model.get("revision", "unknown"),
        "steps": str(trajectory.next_step),
        "seed": str(about.seed),
        "noise_scheme": str(about.noise_scheme),
        "settings": json.dumps(about.settings),
        "starting_weights": about.root.hex(),
        "final_weights": root or "unknown",
        "smezo_pl": about.versions.get("smezo_pl", "unknown"),
        "apply_with": "smezo apply FILE --model MODEL --out DIR",
    }
    data = save(arrays, metadata=metadata)
    if len(data) > MAX_FILE_BYTES:
        limit = f"more than the {MAX_FILE_BYTES:,} that are read"
        raise TrajectoryError(f"{path} would have {len(data):,} bytes, {limit}: keep the run's folder instead")
    write_atomically(path, data)
    return Exported(path, trajectory.next_step, len(data), root is not None)


def _numbers_of(
    records: Sequence[StepRecord], header: Header, path: str
) -> tuple[npt.NDArray[Any], dict[str, list[tuple[float, ...]]]]:
    """What the updates multiplied with as one array, and the columns that say how to read it."""
    numbers = [record.projected_gradients for record in records]
    if header.format == FORMAT:
        width = max([header.num_samples, *map(len, numbers)])
        padded = [(*values, *(0.0,) * (width - len(values))) for values in numbers]
        return np.array(padded, dtype="<f4").reshape(-1, width), {}
    columns: dict[str, list[tuple[float, ...]]] = {"rows": [(float(record.rows),) for record in records]}
    if any(record.mean_square for record in records):
        columns["mean_square"] = [(record.mean_square,) for record in records]
    flat = np.array([value for values in numbers for value in values], dtype="<f4")
    if header.directions == "per_row" and np.isfinite(flat).all():
        in_units = [in_steps(values) for values in numbers]
        again = [unit * multiple for unit, multiples in in_units for multiple in multiples]
        if np.array(again, dtype="<f4").tobytes() == flat.tobytes():
            columns["unit"] = [(unit,) for unit, _ in in_units]
            return np.array([one for _, multiples in in_units for one in multiples], dtype=np.int8), columns
        log.info("%s: the run's numbers are not of 8 bits, and are stored as float32", path)
    return flat, columns


def load(path: str | Path, steps: int | None = None) -> Trajectory:
    """Read and verify a trajectory or an exported run, whichever it is.

    Args:
        path: A run's folder, its trajectory, or an exported run.
        steps: How many steps of the optimizer; None for all. A corrupted trajectory is read if it is valid that far.

    Raises:
        TrajectoryError: If it is neither, corrupted, or does not reach that far.
    """
    path = locate(path)
    if is_trajectory(path) or path.name == FILE_NAME:  # by its name even if its first page is corrupted
        return Trajectory.read(path, damaged=steps is not None).upto(steps)
    return read_export(path).upto(steps)


def _is_export(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("kind") == KIND
    except (SafetensorError, OSError):
        return False


def read_export(path: Path) -> Trajectory:
    """Read and verify an exported run.

    Its steps have no losses, and no thresholds where masks were refreshed. An event of kind ``weights`` holds the hash
    of the final weights if it is known.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise TrajectoryError(f"{path} is no exported run: it has {path.stat().st_size:,} bytes, those a few per step")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != KIND:
                raise TrajectoryError(f"{path} is a safetensors file, but no exported run (no {KIND!r} in it)")
            if metadata.get("format") not in {str(known) for known in range(FORMAT, LATEST_FORMAT + 1)}:
                raise TrajectoryError(
                    f"{path}: export format {metadata.get('format')!s:.20}; this version reads formats up to "
                    f"{LATEST_FORMAT}: install a later smezo_pl"
                )
            arrays = {name: file.get_tensor(name) for name in ("projected_gradients", "header", "columns")}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise TrajectoryError(f"{path} is no safetensors file, corrupted or cut short: {error!s:.200}") from None
    header, columns, gradients = arrays["header"].tobytes(), arrays["columns"].tobytes(), arrays["projected_gradients"]
    if metadata.get("sha256") != _seal(header, columns, gradients):
        raise TrajectoryError(f"{path} is corrupted: its hash is not that of its content")
    try:
        return _from_content(path, json.loads(inflate(header, MAX_HEADER_BYTES)), columns, gradients)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise TrajectoryError(f"{path} is corrupted: {error!s:.200}") from None


def _from_content(path: Path, content: dict[str, Any], columns: bytes, array: npt.NDArray[Any]) -> Trajectory:
    header = Header.from_bytes(zlib.compress(json.dumps(content["header"]).encode(), 1), str(path))
    groups, runs = len(header.groups), content["pieces"]
    steps = len(array) if header.format == FORMAT else int(content["steps"])
    skipped, refreshed = _indices(content["skipped"], steps), _indices(content["refreshed"], steps)
    if not 0 <= steps - len(skipped) <= len(array):  # bounds what a corrupted file can make a reader allocate
        raise ValueError(f"{len(array)} numbers are too few for {steps} steps")
    widths = {**dict.fromkeys(RATES, groups), **{name: 1 for name in _ONE_EACH if name in runs}}
    lengths = [int(length) for length in content["columns"]]
    if len(lengths) != len(widths) or min(lengths) < 0 or sum(lengths) != len(columns):
        raise ValueError("the columns do not have the lengths that the header says")
    values, offset = {}, 0
    for (name, width), length in zip(widths.items(), lengths, strict=True):
        values[name] = unpack_columns(runs[name], columns[offset : offset + length], steps, width)
        offset += length
    single = {name: [value for (value,) in values.pop(name)] for name in _ONE_EACH if name in values}
    samples = [int(number) for number in single.get("samples", [header.num_samples] * steps)]
    rows = [int(number) for number in single.get("rows", [1] * steps)]
    if header.directions == "shared" and any(number != 1 for number in rows):
        raise ValueError("a step has rows with a direction each")
    counts = [0 if index in skipped else each * of for index, (each, of) in enumerate(zip(samples, rows, strict=True))]
    if any(number < 1 for index, number in enumerate(counts) if index not in skipped):
        raise ValueError("a step has no samples")
    numbers = _numbers_from(array, counts, max([header.num_samples, *samples]), header, single.get("unit"))
    unread, shared = (_masks(content.get(name, []), steps, header) for name in ("unread", "shared"))
    records = [
        StepRecord(
            step=header.first_step + index,
            losses=(),
            projected_gradients=own,
            **dict(zip(values, rates, strict=True)),
            skipped=index in skipped,
            refreshed=index in refreshed,
            unread=unread[index],
            rows=rows[index],
            shared=shared[index],
            mean_square=single["mean_square"][index] if "mean_square" in single else 0.0,
        )
        for index, (own, *rates) in enumerate(zip(numbers, *values.values(), strict=True))
    ]
    root = content["final"]
    if root is not None and (not isinstance(root, str) or len(root) != 64):
        raise ValueError("the hash of the final weights has the wrong length")
    events = [] if root is None else [Event(header.first_step + steps, "weights", {"root": root})]
    return Trajectory(path, header, records, [b""] * steps, events)


def _indices(values: Sequence[Any], steps: int) -> frozenset[int]:
    if not isinstance(values, list) or not all(isinstance(v, int) and 0 <= v < steps for v in values):
        raise ValueError("a step is named that does not exist")
    return frozenset(values)


def _numbers_from(
    array: npt.NDArray[Any], counts: Sequence[int], samples: int, header: Header, units: Sequence[float] | None
) -> list[tuple[float, ...]]:
    """What the update of each step multiplied with: so many numbers each."""
    if header.format == FORMAT:
        if array.dtype != np.float32 or array.shape != (len(counts), samples) or samples > MAX_NUMBERS:
            raise ValueError(f"gradients are {array.dtype} {array.shape} for {samples} samples")
        return [tuple(row[:count]) for row, count in zip(array.tolist(), counts, strict=True)]
    if array.dtype != (np.float32 if units is None else np.int8) or array.shape != (sum(counts),):
        raise ValueError(f"gradients are {array.dtype} {array.shape} for {sum(counts)} directions")
    if max(counts, default=0) > MAX_NUMBERS:
        raise ValueError(f"a step has {max(counts)} numbers")
    flat, ends = array.tolist(), accumulate(counts)
    return [
        tuple(flat[end - count : end]) if units is None else tuple(unit * one for one in flat[end - count : end])
        for end, count, unit in zip(ends, counts, units or [1.0] * len(counts), strict=True)
    ]


def _changes(masks: Sequence[int]) -> list[list[Any]]:
    return [[index, f"{now:x}"] for index, (last, now) in enumerate(pairwise([0, *masks])) if now != last]


def _masks(changes: Sequence[Any], steps: int, header: Header) -> list[int]:
    """Of each step the tensors that are named, from where that changed."""
    at, bits = dict(changes), header.last_number + 1
    _indices(list(at), steps)
    masks = list(accumulate(range(steps), lambda last, step: int(at[step], 16) if step in at else last, initial=0))
    if any(mask < 0 or mask.bit_length() > bits for mask in masks):
        raise ValueError("a tensor is named that is not optimized")
    return masks[1:]


def _seal(header: bytes, columns: bytes, gradients: npt.NDArray[Any]) -> str:
    content = (header, columns, gradients.tobytes(), repr((gradients.shape, str(gradients.dtype))).encode())
    return sha256(b"".join(sha256(part).digest() for part in content)).hexdigest()
