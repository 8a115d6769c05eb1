import hashlib
import os

import pytest
import torch
from torch import nn

from smezo_pl.trajectory import fingerprint as module
from smezo_pl.trajectory.fingerprint import fingerprint, model_tensors, root_digest
from tests.trajectory.runs import network


def tensor_digest(tensor: torch.Tensor) -> bytes:
    return fingerprint({"a": tensor})["a"]


def model_fingerprint(model: nn.Module) -> bytes:
    return root_digest(fingerprint(model_tensors(model)))


def test_a_hash_is_what_its_definition_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)
    tensor = torch.arange(10, dtype=torch.float32).view(2, 5)
    data = tensor.numpy().tobytes()
    chunks = b"".join(hashlib.sha256(data[i : i + 16]).digest() for i in range(0, 40, 16))
    assert tensor_digest(tensor) == hashlib.sha256(b"float32[2, 5]" + chunks).digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_one_bit_another_shape_or_another_dtype_changes_it(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, 6, dtype=dtype)
    other = tensor.clone()
    other.view(torch.uint8)[3, 2] ^= 1
    digests = {tensor_digest(t) for t in (tensor, other, tensor.view(6, 4), tensor.to(torch.float64))}
    assert len(digests) == 4


def test_threads_strides_and_gradients_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    tensor = torch.randn(17, 31)
    digest = tensor_digest(tensor)
    assert tensor_digest(tensor.t().contiguous().t()) == digest
    assert tensor_digest(nn.Parameter(tensor)) == digest
    for threads in (1, 5):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        assert fingerprint({"a": tensor}) == {"a": digest}


def test_empty_tensors_and_scalars_have_one() -> None:
    assert len({tensor_digest(torch.empty(0)), tensor_digest(torch.empty(0, 3)), tensor_digest(torch.tensor(0.0))}) == 3


def test_names_and_order_count() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    first = root_digest(fingerprint({"a": a, "b": b}))
    assert first != root_digest(fingerprint({"b": b, "a": a}))
    assert first != root_digest(fingerprint({"a": a, "c": b}))


def test_a_model_gives_parameters_once_and_persistent_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model.register_buffer("passing", torch.zeros(1), persistent=False)
    names = list(model_tensors(model))
    assert names[:3] == ["0.weight", "0.bias", "1.bias"]
    assert {"2.running_mean", "2.running_var"} < set(names)
    assert "1.weight" not in names and "passing" not in names


def test_a_model_is_told_from_one_with_another_bit() -> None:
    one, other = network(), network()
    assert model_fingerprint(one) == model_fingerprint(other)
    with torch.no_grad():
        other[3].bias.view(torch.int32)[1] ^= 1
    assert model_fingerprint(one) != model_fingerprint(other)


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match="layout"):
        tensor_digest(torch.eye(3).to_sparse())
