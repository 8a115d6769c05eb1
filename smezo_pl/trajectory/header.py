"""The one exception of this package that a user is meant to read."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any, get_args

from smezo_pl.optim.masks import MASK_RULES
from smezo_pl.optim.noise import NOISE_SCHEME, Law
from smezo_pl.trajectory.fingerprint import TENSOR_DIGEST_SIZE


class TrajectoryError(RuntimeError):
    """A record that cannot be written, read or applied: which file, what was found, what can be done."""


FORMAT = 1
"""Version of the record's format. A reader takes every version up to its own."""

MAX_HEADER_BYTES = 1 << 25
MAX_TENSORS = 1 << 20
MAX_GROUPS = 1 << 12
MAX_NUMEL = 1 << 48

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the starting weights.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        dtype: Its dtype, without ``torch.``.
        digest: The first bytes of `smezo_pl.trajectory.fingerprint.tensor_digest`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """One parameter group: the tensors that take part, and what holds for all of them.

    Attributes:
        names: Names of its tensors, in the optimizer's order.
        numbers: Number of each, the one its noise is drawn with.
        dense: Those that take part with all their weights whatever the rule.
        mask: Mask rule.
        mask_update: ``dynamic`` or ``constant``.
        maximize: Whether the run ascends.
        thresholds: Thresholds that were there before the first step of the record, None where it begins with a refresh.
        mask_step: Step of the last refresh before the record, which the random rule draws with.
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
        created: When it began, in ISO 8601.
        seed: Base seed of all noise.
        noise: Law of the noise.
        num_samples: Perturbations a step.
        first_step: Index of the first step of the record.
        groups: Parameter groups.
        tensors: Tensors of the starting weights, those that do not take part included.
        root: Hash over all of them, 32 bytes.
        settings: The optimizer's arguments as they were given (to be read by people; a replay uses the fields above).
        model: Name and revision of the pretrained model, as far as known.
        versions: Versions of the packages that made the record.
        machine: Device, kernel, threads and processor that made it.
        noise_scheme: Version of the noise.
        format: Version of the record's format.
    """

    run: str
    created: str
    seed: int
    noise: Law
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

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the tensors that take part, group by group: the order of a refresh's thresholds."""
        return tuple(name for group in self.groups for name in group.names)

    def to_bytes(self) -> bytes:
        """The header as deflated JSON."""
        plain = asdict(self)
        tensors = plain.pop("tensors")
        plain["root"] = self.root.hex()
        # by column: names, shapes and dtypes repeat themselves and deflate well next to each other
        plain["tensors"] = {key: [tensor[key] for tensor in tensors] for key in ("name", "shape", "dtype")}
        plain["tensors"]["digest"] = base64.b64encode(b"".join(tensor["digest"] for tensor in tensors)).decode()
        return zlib.compress(json.dumps(plain, separators=(",", ":"), allow_nan=False).encode(), 9)

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Header:
        """Read and check a header.

        Args:
            data: What `to_bytes` gave.
            source: The file, for messages.

        Raises:
            TrajectoryError: If it is damaged, of a later format or of other noise.
        """
        try:
            plain = json.loads(inflate(data, MAX_HEADER_BYTES))
            version = plain["format"]
        except (ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
            raise TrajectoryError(
                f"{source}: the header is damaged ({error}); nothing can be replayed from it"
            ) from None
        if not isinstance(version, int) or version > FORMAT:
            writer = plain.get("versions", {}) if isinstance(plain.get("versions"), dict) else {}
            raise TrajectoryError(
                f"{source}: format {version!s:.20}, written by smezo_pl {writer.get('smezo_pl', '?')!s:.20}; this "
                f"version reads formats up to {FORMAT}: install that one or a later one"
            )
        try:
            header = _from_plain(plain)
            _check(header)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise TrajectoryError(
                f"{source}: the header is damaged ({error}); nothing can be replayed from it"
            ) from None
        if header.noise_scheme != NOISE_SCHEME:
            raise TrajectoryError(
                f"{source}: noise scheme {header.noise_scheme}, written by smezo_pl "
                f"{header.versions.get('smezo_pl', '?')!s:.20}; this version has scheme {NOISE_SCHEME}: use that one"
            )
        return header


def header_digest(data: bytes) -> bytes:
    """Check of a header's bytes, and the key of the first row's check."""
    return blake2b(data, digest_size=32).digest()


def inflate(data: bytes, limit: int) -> bytes:
    """Inflate at most ``limit`` bytes.

    Raises:
        ValueError: If there would be more, or the data end early.
        zlib.error: If they are not deflated data.
    """
    stream = zlib.decompressobj()
    plain = stream.decompress(data, limit)
    if stream.unconsumed_tail:
        raise ValueError(f"inflates to more than {limit} bytes")
    if not stream.eof:
        raise ValueError("ends early")
    return plain


def _from_plain(plain: dict[str, Any]) -> Header:
    columns = plain.pop("tensors")
    digests = base64.b64decode(columns["digest"], validate=True)
    names, shapes, dtypes = columns["name"], columns["shape"], columns["dtype"]
    if not len(names) == len(shapes) == len(dtypes) == len(digests) // TENSOR_DIGEST_SIZE <= MAX_TENSORS:
        raise ValueError("names, shapes, dtypes and hashes of the tensors differ in number")
    tensors = tuple(
        TensorInfo(name, tuple(shape), dtype, digests[i * TENSOR_DIGEST_SIZE : (i + 1) * TENSOR_DIGEST_SIZE])
        for i, (name, shape, dtype) in enumerate(zip(names, shapes, dtypes, strict=True))
    )
    groups = tuple(_group(group) for group in plain.pop("groups"))
    return Header(**{**plain, "root": bytes.fromhex(plain["root"]), "groups": groups, "tensors": tensors})


def _group(plain: dict[str, Any]) -> GroupInfo:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
    return GroupInfo(**fields)


def _check(header: Header) -> None:
    """Refuse what no writer writes, before anything is allocated or looked up with it.

    Raises:
        ValueError: Says which field.
    """

    def whole(name: str, value: object, low: int, high: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
            raise ValueError(f"{name} is {value!s:.40}")

    whole("seed", header.seed, 0, 1 << 64)
    whole("num_samples", header.num_samples, 1, 1 << 24)
    whole("first_step", header.first_step, 0, 1 << 32)
    whole("noise_scheme", header.noise_scheme, 1, 1 << 16)
    if header.noise not in get_args(Law):
        raise ValueError(f"noise is {header.noise!s:.40}")
    if len(header.root) != 32 or not isinstance(header.run, str) or len(header.run) != 32:
        raise ValueError("run or root have the wrong length")
    for mapping in (header.settings, header.model, header.versions, header.machine):
        if not isinstance(mapping, dict):
            raise ValueError("settings, model, versions and machine must be objects")
    known: dict[str, TensorInfo] = {}
    for tensor in header.tensors:
        if not isinstance(tensor.name, str) or tensor.name in known:
            raise ValueError(f"tensor {tensor.name!s:.80} is there twice or has no name")
        for size in tensor.shape:
            whole(f"a size of {tensor.name:.80}", size, 0, MAX_NUMEL)
        if math.prod(tensor.shape) >= MAX_NUMEL or not isinstance(tensor.dtype, str):
            raise ValueError(f"tensor {tensor.name:.80} has shape {tensor.shape!s:.80}")
        known[tensor.name] = tensor
    if not header.groups:
        raise ValueError("no parameter group")
    if len(header.groups) > MAX_GROUPS:
        raise ValueError(f"{len(header.groups)} parameter groups")
    used: set[str] = set()
    for group in header.groups:
        if len(group.names) != len(group.numbers) or not set(group.dense) <= set(group.names):
            raise ValueError("a group's names, numbers and dense names do not fit")
        for name, number in zip(group.names, group.numbers, strict=True):
            whole(f"the number of {name!s:.80}", number, 0, 1 << 24)
            if name not in known or name in used or known[name].dtype not in DTYPES:
                raise ValueError(
                    f"{name!s:.80} takes part but is no tensor of the model, or twice, or of no dtype for it"
                )
            used.add(name)
        if group.mask not in MASK_RULES or group.mask_update not in ("dynamic", "constant"):
            raise ValueError(f"mask is {group.mask!s:.40}, {group.mask_update!s:.40}")
        whole("mask_step", group.mask_step, 0, 1 << 32)
        if not isinstance(group.maximize, bool):
            raise ValueError("maximize is no boolean")
        if group.thresholds is not None:
            if len(group.thresholds) != len(group.names):
                raise ValueError("a group's thresholds and names differ in number")
            if any(h is not None and (isinstance(h, bool) or not isinstance(h, int | float)) for h in group.thresholds):
                raise ValueError("a threshold is no number")


_LORA = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "fan_in_fan_out", "use_rslora", "use_dora", "init_lora_weights", "modules_to_save"),
)
_PREFIX = ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size")

# PEFT has others that import a module or run code of the hub by a name (megatron_core, tokenizer_kwargs, adapters).
HARMLESS: Mapping[str, tuple[str, ...]] = {"LORA": _LORA, "PREFIX_TUNING": _PREFIX}
"""Arguments that are taken from a record, for each type of adapter."""

MOST = 1 << 14
"""Largest rank, number of virtual tokens or width that is taken from a record."""


def recorded_adapter(header: Header, source: str) -> tuple[dict[str, Any], int] | None:
    """The adapter of a run and the seed of its starting weights; None for a run without one.

    Args:
        header: The record's header.
        source: The file, for messages.

    Raises:
        TrajectoryError: If the record is damaged there, or names what a file may not ask for.
    """
    text = header.model.get("adapter")
    if text is None:
        return None
    try:
        adapter, seed = json.loads(text), int(header.model.get("adapter_seed", 0))
    except (TypeError, ValueError, OverflowError, RecursionError):
        adapter, seed = None, 0
    if not isinstance(adapter, dict) or not 0 <= seed < 1 << 64:
        raise TrajectoryError(f"{source}: the adapter in the header is damaged: {text!s:.80}")
    kind = str(adapter.get("peft_type", "")).upper()
    known = HARMLESS.get(kind, ())
    odd = sorted(str(key) for key in adapter if key not in (*known, "peft_type", "task_type"))
    if not known or odd:
        what = f"arguments {', '.join(odd):.80}" if known else f"the type {kind:.40}"
        raise TrajectoryError(
            f"{source}: the run has an adapter with {what}, and from a file only {', '.join(HARMLESS)} with plain "
            "arguments are built: make the starting network in Python and give it to smezo_pl.apply or smezo_pl.replay"
        )
    for key, value in adapter.items():
        plain = value is None or isinstance(value, bool | int | float | str) or _is_list(value)
        large = isinstance(value, int | float) and not abs(value) <= MOST
        if not plain or large:
            raise TrajectoryError(f"{source}: the adapter's {key} cannot be {value!s:.80}")
    if not isinstance(adapter.get("init_lora_weights", True), bool) and adapter["init_lora_weights"] != "gaussian":
        raise TrajectoryError(
            f"{source}: the adapter's init_lora_weights cannot be {adapter['init_lora_weights']!s:.80}"
        )
    return adapter, seed


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST and all(isinstance(item, str | int) for item in value)
