"""The header of a trajectory: all that a replay needs beside the starting weights and the steps."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, get_args

from smezo_pl.optim.coefficients import CoefficientsName
from smezo_pl.optim.directions import DIRECTIONS_SCHEME, MAX_RANK, SHARED, Directions, DirectionsName
from smezo_pl.optim.masks import MASK_RULES
from smezo_pl.optim.noise import NOISE_SCHEME, Distribution
from smezo_pl.trajectory.fingerprint import TENSOR_DIGEST_SIZE


class TrajectoryError(RuntimeError):
    """A trajectory that cannot be written, read or applied: which file, what was found, what can be done."""


FORMAT = 1
"""Version of the header, and of a trajectory that needs no later one."""
CHANGING_FORMAT = 2
"""Version of a trajectory or an exported run where tensors took no part in a step, or the number of samples changed."""
LATEST_FORMAT = 3
"""Version of one with directions, a rank or coefficients that are not the papers', and of its header.

A reader takes every version up to this one."""

MAX_HEADER_BYTES = 1 << 25
MAX_NUMEL = 1 << 48

DIRECTION_FIELDS = ("directions", "rank", "coefficients")
"""Fields that a header of format 1 lacks, named as the optimizer's settings."""

COUNTERS = ("skipped", "skipped_in_row", "no_signal", "mean_square")
"""Entries of the optimizer's state that ``coefficients="moving"`` goes on from."""

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the starting weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # without "torch."
    digest: bytes  # the first bytes of its hash, see `fingerprint`


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """One parameter group: the tensors that are optimized, and what holds for all of them.

    Attributes:
        names: Names of its tensors, in the optimizer's order.
        numbers: Number of each, which its noise is drawn with.
        dense: Names of those whose weights are all active, whatever the rule.
        thresholds: Thresholds before the first recorded step, None where that begins with a refresh.
        mask_step: Step of the last refresh before the first recorded step, which the random rule draws with.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    dense: tuple[str, ...]
    mask: str
    mask_update: str
    maximize: bool
    thresholds: tuple[float | None, ...] | None = None
    mask_step: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """Everything a replay needs beside the starting weights and the steps.

    Attributes:
        run: Random name of the run, 32 hexadecimal digits.
        tensors: Tensors of the starting weights, also those that are not optimized.
        root: Hash of all of them, 32 bytes.
        settings: The optimizer's arguments as given, for people to read; a replay uses the fields above.
        model: Name and revision of the pretrained model and its adapter, as far as known.
        directions: As in `SparseMeZO`, like ``rank`` and ``coefficients``; a replay does not need the last.
        counters: Of the optimizer's state before the first recorded step, if that was not its first.
    """

    run: str
    created: str
    seed: int
    noise: Distribution
    num_samples: int
    first_step: int
    groups: tuple[GroupInfo, ...]
    tensors: tuple[TensorInfo, ...]
    root: bytes
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    noise_scheme: int = NOISE_SCHEME
    format: int = FORMAT
    directions: DirectionsName = "shared"
    rank: int | None = None
    coefficients: CoefficientsName = "raw"
    counters: dict[str, int | float] = field(default_factory=dict)

    @property
    def last_number(self) -> int:
        """Largest number of an optimized tensor."""
        return max((number for group in self.groups for number in group.numbers), default=-1)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the tensors that are optimized, group by group: the order of a refresh's thresholds."""
        return tuple(name for group in self.groups for name in group.names)

    def to_bytes(self) -> bytes:
        """The header as deflated JSON."""
        plain = asdict(self)
        if self.format == FORMAT:
            for name in (*DIRECTION_FIELDS, "counters"):
                del plain[name]
        tensors = plain.pop("tensors")
        plain["root"] = self.root.hex()
        # by column: names, shapes and dtypes repeat themselves and deflate well next to each other
        plain["tensors"] = {key: [tensor[key] for tensor in tensors] for key in ("name", "shape", "dtype")}
        plain["tensors"]["digest"] = base64.b64encode(b"".join(tensor["digest"] for tensor in tensors)).decode()
        return zlib.compress(json.dumps(plain, separators=(",", ":"), allow_nan=False).encode(), 9)

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Header:
        """The inverse of `to_bytes`, unless it is of a later format or another noise scheme; ``source`` is the file."""
        try:
            plain = json.loads(inflate(data, MAX_HEADER_BYTES))
            if plain["format"] > LATEST_FORMAT:
                raise TrajectoryError(
                    f"{source}: format {plain['format']!s:.20}, written by smezo_pl {_writer(plain['versions'])}; this "
                    f"version reads formats up to {LATEST_FORMAT}: install that one or a later one"
                )
            header = _from_plain(plain)
            _check(header)
            if header.noise_scheme > DIRECTIONS_SCHEME:
                raise TrajectoryError(
                    f"{source}: noise scheme {header.noise_scheme}, written by smezo_pl {_writer(header.versions)}; "
                    f"this version has schemes up to {DIRECTIONS_SCHEME}: use that one"
                )
            _check_directions(header)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise TrajectoryError(
                f"{source}: the header is corrupted ({error!s:.200}); nothing can be replayed from it"
            ) from None
        return header


def header_digest(data: bytes) -> bytes:
    """Checksum of a header's bytes, and the key of the first step's checksum."""
    return blake2b(data, digest_size=32).digest()


def inflate(data: bytes, limit: int) -> bytes:
    """Inflate at most ``limit`` bytes; a ValueError if there would be more, or they are not whole."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"no deflated data: {error}") from None
    if len(plain) > limit:
        raise ValueError(f"inflates to more than {limit} bytes")
    if not stream.eof:
        raise ValueError("ends early")
    return plain


def _writer(versions: dict[str, Any]) -> str:
    return f"{versions.get('smezo_pl', '?')!s:.20}"


def _from_plain(plain: dict[str, Any]) -> Header:
    columns = plain.pop("tensors")
    digests = base64.b64decode(columns["digest"], validate=True)
    names, shapes, dtypes = columns["name"], columns["shape"], columns["dtype"]
    if not len(names) == len(shapes) == len(dtypes) == len(digests) // TENSOR_DIGEST_SIZE:
        raise ValueError("names, shapes, dtypes and hashes of the tensors differ in number")
    tensors = tuple(
        TensorInfo(name, tuple(shape), dtype, digests[i * TENSOR_DIGEST_SIZE : (i + 1) * TENSOR_DIGEST_SIZE])
        for i, (name, shape, dtype) in enumerate(zip(names, shapes, dtypes, strict=True))
    )
    groups: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        for group in plain.pop("groups")
    ]
    root = bytes.fromhex(plain.pop("root"))
    return Header(root=root, groups=tuple(GroupInfo(**group) for group in groups), tensors=tensors, **plain)


def _check(header: Header) -> None:
    """Refuse what no writer writes, before anything is allocated or looked up with it."""
    _check_int("seed", header.seed, 0, 1 << 64)
    _check_int("num_samples", header.num_samples, 1, 1 << 24)
    _check_int("first_step", header.first_step, 0, 1 << 32)
    _check_int("noise_scheme", header.noise_scheme, 1, 1 << 16)
    _check_int("format", header.format, 1, LATEST_FORMAT + 1)
    if header.noise not in get_args(Distribution):
        raise ValueError(f"noise is {header.noise!s:.40}")
    if len(header.root) != 32 or not isinstance(header.run, str) or len(header.run) != 32:
        raise ValueError("run or root have the wrong length")
    if not all(isinstance(part, dict) for part in (header.settings, header.model, header.versions, header.machine)):
        raise ValueError("settings, model, versions and machine must be objects")
    dtypes: dict[str, str] = {}
    for tensor in header.tensors:
        if not isinstance(tensor.name, str) or tensor.name in dtypes:
            raise ValueError(f"tensor {tensor.name!s:.80} is there twice or has no name")
        for size in tensor.shape:
            _check_int(f"a size of {tensor.name:.80}", size, 0, MAX_NUMEL)
        if math.prod(tensor.shape) >= MAX_NUMEL or not isinstance(tensor.dtype, str):
            raise ValueError(f"tensor {tensor.name:.80} has shape {tensor.shape!s:.80}")
        dtypes[tensor.name] = tensor.dtype
    if not header.groups:
        raise ValueError("no parameter group")
    for group in header.groups:
        if len(group.names) != len(group.numbers) or not set(group.dense) <= set(group.names):
            raise ValueError("a group's names, numbers and dense names do not fit")
        for name, number in zip(group.names, group.numbers, strict=True):
            _check_int(f"the number of {name!s:.80}", number, 0, 1 << 24)
            if dtypes.pop(name, None) not in DTYPES:
                raise ValueError(f"{name!s:.80} is optimized but is no float tensor of the model, or is named twice")
        if group.mask not in MASK_RULES or group.mask_update not in ("dynamic", "constant"):
            raise ValueError(f"mask is {group.mask!s:.40}, {group.mask_update!s:.40}")
        _check_int("mask_step", group.mask_step, 0, 1 << 32)
        if not isinstance(group.maximize, bool):
            raise ValueError("maximize is no boolean")
        if group.thresholds is not None and (
            len(group.thresholds) != len(group.names)
            or any(isinstance(h, bool) or not isinstance(h, int | float | None) for h in group.thresholds)
        ):
            raise ValueError("a group's thresholds are not one number or null per name")


def _check_directions(header: Header) -> None:
    if header.directions not in get_args(DirectionsName) or header.coefficients not in get_args(CoefficientsName):
        raise ValueError(f"directions are {header.directions!s:.40}, coefficients {header.coefficients!s:.40}")
    if header.rank is not None:
        _check_int("rank", header.rank, 1, MAX_RANK + 1)
        if any(group.mask != "dense" for group in header.groups):
            raise ValueError("a direction has a rank, and a group a mask")
    if not set(header.counters) <= set(COUNTERS) or not all(
        type(value) in (int, float) and 0 <= value < math.inf for value in header.counters.values()
    ):
        raise ValueError(f"counters are {header.counters!s:.80}")
    directions = Directions(header.directions == "per_row", header.rank)
    if (header.format, header.noise_scheme) != (format_of_header(directions, header.coefficients), directions.scheme):
        raise ValueError(
            f"format {header.format} and noise scheme {header.noise_scheme} are not those of its directions"
        )


def format_of_header(directions: Directions, coefficients: CoefficientsName) -> int:
    """Version of the header of a run with these directions and coefficients."""
    return FORMAT if (directions, coefficients) == (SHARED, "raw") else LATEST_FORMAT


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
        raise ValueError(f"{name} is {value!s:.40}")


# PEFT has other arguments that import a module or run code of the hub by a name (megatron_core, tokenizer_kwargs).
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "LORA": (
        *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "bias"),
        *("layers_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "init_lora_weights", "modules_to_save"),
    ),
    "PREFIX_TUNING": ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size"),
}
"""Arguments that are taken from a file, by type of adapter."""

LARGEST = 1 << 14
"""Largest rank, number of virtual tokens or width that is taken from a file."""


def recorded_adapter(header: Header, source: str) -> tuple[dict[str, Any], int] | None:
    """The adapter of a run and the seed of its starting weights; None for a run without one.

    What a file may not ask for is refused; ``source`` is its name for messages.
    """
    text = header.model.get("adapter")
    if text is None:
        return None
    try:
        adapter, seed = json.loads(text), int(header.model.get("adapter_seed", 0))
    except (TypeError, ValueError, OverflowError, RecursionError):
        adapter, seed = None, 0
    if not isinstance(adapter, dict) or not 0 <= seed < 1 << 64:
        raise TrajectoryError(f"{source}: the adapter in the header is corrupted: {text!s:.80}")
    kind = str(adapter.get("peft_type", "")).upper()
    unknown = sorted(set(adapter) - {*HARMLESS.get(kind, ()), "peft_type", "task_type"})
    if kind not in HARMLESS or unknown:
        what = f"arguments {', '.join(unknown):.80}" if kind in HARMLESS else f"the type {kind:.40}"
        raise TrajectoryError(
            f"{source}: the run has an adapter with {what}, and from a file only {', '.join(HARMLESS)} with plain "
            "arguments are built: make the starting network in Python and pass it to smezo_pl.apply or smezo_pl.replay"
        )
    for key, value in adapter.items():
        if key == "init_lora_weights":
            plain = isinstance(value, bool) or value == "gaussian"
        elif isinstance(value, list):
            plain = len(value) <= LARGEST and all(isinstance(item, str | int) for item in value)
        else:
            plain = abs(value) <= LARGEST if isinstance(value, int | float) else isinstance(value, str | None)
        if not plain:
            raise TrajectoryError(f"{source}: the adapter's {key} cannot be {value!s:.80}")
    return adapter, seed
