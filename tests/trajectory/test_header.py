import json
import random
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory import header as module
from smezo_pl.trajectory.header import Header, TrajectoryError, inflate, recorded_adapter
from smezo_pl.trajectory.recorder import describe
from tests.trajectory.runs import network


@pytest.fixture
def header() -> Header:
    model = network()
    named = list(model.named_parameters())
    groups = [{"params": named[:3], "lr": 1e-3}, {"params": named[3:], "mask": "large"}]
    optimizer = SparseMeZO(groups, seed=2**64 - 1, dense="3.*", exclude="0.bias", kernel="torch")
    return describe(optimizer, model, pretrained="some/model", revision="abc")


def plain(header: Header) -> dict[str, Any]:
    return dict(json.loads(zlib.decompress(header.to_bytes())))


def read(plain: Any) -> Header:
    return Header.from_bytes(zlib.compress(json.dumps(plain).encode()), "FILE")


def test_a_header_comes_back_as_it_was(header: Header) -> None:
    assert Header.from_bytes(header.to_bytes(), "FILE") == header


def test_it_says_what_is_optimized(header: Header) -> None:
    assert header.active == ("0.weight", "2.weight", "2.bias", "3.weight", "3.bias")
    assert [group.numbers for group in header.groups] == [(0, 2), (3, 4, 5)]
    assert [group.dense for group in header.groups] == [(), ("3.weight", "3.bias")]
    assert [group.mask for group in header.groups] == ["small", "large"]
    assert len(header.tensors) == 6
    assert header.model == {"name": "some/model", "revision": "abc"}
    assert header.seed == 2**64 - 1
    assert header.machine["kernel"] == "torch"
    assert {"smezo_pl", "torch", "python"} <= set(header.versions)


def test_a_later_format_says_which_version_reads_it(header: Header) -> None:
    changed = {**plain(header), "format": 7, "versions": {"smezo_pl": "3.1"}, "groups": "unknown to us"}
    with pytest.raises(TrajectoryError, match=r"FILE: format 7, written by smezo_pl 3\.1; .* up to 3"):
        read(changed)


def test_other_noise_says_which_version_draws_it(header: Header) -> None:
    with pytest.raises(TrajectoryError, match=r"noise scheme 3, written by smezo_pl 0\.1.*schemes up to 2"):
        read(plain(replace(header, noise_scheme=3)))


DENSE = {"format": 3, "noise_scheme": 2, "directions": "per_row", "rank": 1}


def dense(header: Header, **changes: Any) -> Header:
    groups = tuple(replace(group, mask="dense") for group in header.groups)
    return replace(header, groups=groups, **{**DENSE, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"directions": "shared", "rank": 64, "coefficients": "moving"},
        {"rank": None, "coefficients": "ranks"},
        {"directions": "shared", "rank": None, "noise_scheme": 1, "coefficients": "normalized"},
    ],
)
def test_directions_and_coefficients_come_back(header: Header, changes: dict[str, Any]) -> None:
    written = dense(header, **changes)
    assert Header.from_bytes(written.to_bytes(), "FILE") == written
    assert not {"directions", "rank", "coefficients"} & plain(header).keys(), "a header of format 1 is what it was"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": "each"}, "directions are each"),
        ({"directions": []}, "directions are"),
        ({"coefficients": "best"}, "coefficients best"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 65}, "rank is 65"),
        ({"rank": True}, "rank is True"),
        ({"format": 1}, "format 1 and noise scheme 2 are not those of its directions"),
        ({"format": 2}, "format 2 and noise scheme 2 are not those"),
        ({"noise_scheme": 1}, "format 3 and noise scheme 1 are not those"),
        ({"directions": "shared", "rank": None, "noise_scheme": 1}, "format 3 and noise scheme 1 are not those"),
    ],
)
def test_directions_that_no_writer_writes_are_refused(header: Header, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajectoryError, match=f"FILE: the header is corrupted.*{message}"):
        read({**plain(dense(header)), **changes})


def test_a_rank_with_a_mask_is_refused(header: Header) -> None:
    with pytest.raises(TrajectoryError, match="a direction has a rank, and a group a mask"):
        read({**plain(dense(header)), "groups": plain(header)["groups"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"num_samples": 0}, "num_samples"),
        ({"noise": "cauchy"}, "noise is cauchy"),
        ({"first_step": True}, "first_step"),
        ({"root": "00"}, "root"),
        ({"root": 5}, "fromhex"),
        ({"groups": []}, "no parameter group"),
        ({"surprise": 1}, "surprise"),
        ({"settings": []}, "settings"),
        ({"run": None}, "run"),
    ],
)
def test_values_that_no_writer_writes_are_refused(header: Header, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajectoryError, match=f"FILE: the header is corrupted.*{message}"):
        read({**plain(header), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["nowhere", "2.weight"]}, "nowhere is optimized but is no float tensor"),
        ({"names": ["0.weight", "0.weight"]}, "named twice"),
        ({"numbers": [0]}, "do not fit"),
        ({"numbers": [-1, 2]}, "number of 0.weight"),
        ({"numbers": [1 << 24, 2]}, "number of 0.weight"),
        ({"dense": ["3.weight"]}, "do not fit"),
        ({"mask": "huge"}, "mask is huge"),
        ({"mask_update": 3}, "mask is small, 3"),
        ({"maximize": 1}, "maximize"),
        ({"thresholds": []}, "thresholds are not one number"),
        ({"thresholds": [None, "1"]}, "thresholds are not one number"),
        ({"mask_step": -4}, "mask_step"),
    ],
)
def test_groups_that_do_not_fit_are_refused(header: Header, changes: dict[str, Any], message: str) -> None:
    changed = plain(header)
    changed["groups"][0] |= changes
    with pytest.raises(TrajectoryError, match=f"corrupted.*{message}"):
        read(changed)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("name", "2.weight", "there twice"),
        ("name", 5, "has no name"),
        ("shape", [-1, 2], "size of 0.weight"),
        ("shape", [1 << 60], "size of 0.weight"),
        ("shape", [1 << 30, 1 << 30], "has shape"),
        ("shape", ["2"], "size of 0.weight"),
        ("dtype", "complex64", "no float tensor"),
        ("dtype", None, "has shape"),
    ],
)
def test_tensors_that_cannot_be_are_refused(header: Header, column: str, value: Any, message: str) -> None:
    changed = plain(header)
    changed["tensors"][column][0] = value
    with pytest.raises(TrajectoryError, match=f"corrupted.*{message}"):
        read(changed)


def test_columns_of_different_length_are_refused(header: Header) -> None:
    changed = plain(header)
    del changed["tensors"]["shape"][0]
    with pytest.raises(TrajectoryError, match="differ in number"):
        read(changed)


def test_a_bomb_is_refused_before_it_goes_off(header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 1 << 12)
    with pytest.raises(TrajectoryError, match="inflates to more than 4096 bytes"):
        Header.from_bytes(zlib.compress(b" " * (1 << 20)), "FILE")


@pytest.mark.parametrize("limit", [0, 1, 1 << 10])
def test_no_more_than_the_limit_is_inflated(limit: int) -> None:
    bomb = zlib.compress(bytes(1 << 24))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"inflates to more than {limit} bytes"):
            inflate(bomb, limit)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert inflate(zlib.compress(bytes(limit)), limit) == bytes(limit)


def test_mutated_headers_are_read_or_refused_cleanly(header: Header) -> None:
    noise = random.Random(0)
    text = zlib.decompress(header.to_bytes())
    refused = 0
    for _ in range(2000):
        wrong = bytearray(text)
        for _ in range(noise.randint(1, 4)):
            place = noise.randrange(len(wrong))
            wrong[place : place + noise.randint(0, 3)] = noise.randbytes(noise.randint(0, 3))
        try:
            Header.from_bytes(zlib.compress(bytes(wrong)), str(Path("FILE")))
        except TrajectoryError:
            refused += 1
    assert refused > 1000


# An adapter in a header may be a stranger's.
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def with_adapter(adapter: Any, **facts: Any) -> Header:
    model = network()
    plain = describe(SparseMeZO(model.named_parameters(), kernel="torch"), model)
    return replace(plain, model={"adapter": adapter if isinstance(adapter, str) else json.dumps(adapter), **facts})


def test_what_was_recorded_comes_back() -> None:
    model = network()
    optimizer = SparseMeZO(model.named_parameters(), kernel="torch")
    assert recorded_adapter(describe(optimizer, model), "FILE") is None
    found = Header.from_bytes(describe(optimizer, model, adapter=LORA, adapter_seed=3).to_bytes(), "FILE")
    assert recorded_adapter(found, "FILE") == (LORA, 3)
    assert recorded_adapter(with_adapter(LORA), "FILE") == (LORA, 0)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("{", "the adapter in the header is corrupted"),
        ([], "the adapter in the header is corrupted"),
        ({}, "adapter with the type , and from a file only LORA, PREFIX_TUNING"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}, "the type PROMPT_TUNING"),
        ({**LORA, "megatron_core": "antigravity", "megatron_config": {}}, "arguments megatron_config, megatron_core"),
        ({**LORA, "r": 10**9}, "the adapter's r cannot be 1000000000"),
        ({**LORA, "r": {"a": 1}}, "the adapter's r cannot be"),
        ({**LORA, "target_modules": [["q_proj"]]}, "the adapter's target_modules cannot be"),
        ({**LORA, "init_lora_weights": "pissa"}, "the adapter's init_lora_weights cannot be pissa"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": float("inf")}, "num_virtual_tokens cannot be inf"),
    ],
)
def test_what_a_file_may_not_ask_for_is_refused(adapter: Any, message: str) -> None:
    with pytest.raises(TrajectoryError, match=message):
        recorded_adapter(with_adapter(adapter), "FILE")


@pytest.mark.parametrize("seed", ["x", "-1", float("inf"), [], "9" * 5000])
def test_a_seed_that_is_none(seed: Any) -> None:
    with pytest.raises(TrajectoryError, match="is corrupted"):
        recorded_adapter(with_adapter(LORA, adapter_seed=seed), "FILE")
