"""Adapters that a record names, which may be a stranger's."""

import json
from dataclasses import replace
from typing import Any

import pytest

from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory.header import Header, TrajectoryError, recorded_adapter
from smezo_pl.trajectory.recorder import describe
from tests.trajectory.runs import network

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def header(adapter: Any, **facts: Any) -> Header:
    model = network()
    plain = describe(SparseMeZO(model.named_parameters(), kernel="torch"), model)
    return replace(plain, model={"adapter": adapter if isinstance(adapter, str) else json.dumps(adapter), **facts})


def test_what_was_recorded_comes_back() -> None:
    model = network()
    optimizer = SparseMeZO(model.named_parameters(), kernel="torch")
    assert recorded_adapter(describe(optimizer, model), "FILE") is None
    found = Header.from_bytes(describe(optimizer, model, adapter=LORA, adapter_seed=3).to_bytes(), "FILE")
    assert recorded_adapter(found, "FILE") == (LORA, 3)
    assert recorded_adapter(header(LORA), "FILE") == (LORA, 0)


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
        recorded_adapter(header(adapter), "FILE")


@pytest.mark.parametrize("seed", ["x", "-1", float("inf"), [], "9" * 5000])
def test_a_seed_that_is_none(seed: Any) -> None:
    with pytest.raises(TrajectoryError, match="is corrupted"):
        recorded_adapter(header(LORA, adapter_seed=seed), "FILE")
