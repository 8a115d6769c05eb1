"""Loading pretrained models: every source, every way to name one wrongly."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl import PromptDataModule, SeedCheckpoint, SparseMeZO, SparseMeZOModule, load_model, replay
from smezo_pl.models import adapter_kinds, add_adapter, kind_of, load_network, load_tokenizer, with_pad_token

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def test_folder(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "smezo_pl.models"):
        model, tokenizer = load_model(tiny_folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    size = sum(p.numel() for p in model.parameters())
    assert f"{tiny_folder}: LlamaForCausalLM, {size:,} parameters, torch.float32, cpu" in caplog.messages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_that_of_the_weights_and_not_of_the_rotary_frequencies(tiny_folder: Path, dtype: torch.dtype) -> None:
    model = load_network(tiny_folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_default_dtype_is_taken(tiny_folder: Path) -> None:
    torch.set_default_dtype(torch.bfloat16)
    assert load_network(tiny_folder).dtype == torch.bfloat16


def test_a_device_context_does_not_matter(tiny_folder: Path) -> None:
    with torch.device("meta"):
        assert load_network(tiny_folder).device == torch.device("cpu")


def test_pad_token(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert tiny_tokenizer.pad_token is None
    with caplog.at_level(logging.INFO, "smezo_pl.models"):
        tokenizer = load_tokenizer(tiny_folder)
    assert tokenizer.pad_token == "</s>"
    assert "the tokenizer has no pad token: '</s>' pads" in caplog.messages


def test_pad_token_of_its_own_is_kept(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.pad_token = "!"
    assert with_pad_token(tokenizer).pad_token == "!"


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/no-such-model", ""])
def test_path_without_a_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no such folder \(a path must be a folder with config.json"):
        load_network(name)


def test_hub_name_that_the_hub_does_not_give() -> None:
    with pytest.raises(OSError, match="pretrained='no-one/no-such-model' is neither a folder nor a .gguf file here"):
        load_network("no-one/no-such-model")
    with pytest.raises(OSError, match="pretrained='no-such-model' is neither"):
        load_tokenizer("no-such-model")


def test_folder_without_config_names_its_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "model.Q4.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; name one of its GGUF files: model.Q4.gguf"):
        load_network(tmp_path)


def test_missing_weights_are_not_made_up(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of LlamaForCausalLM.*model.norm.weight"):
        load_network(tmp_path)


def write_gguf(path: Path, hidden: int = 64, layers: int = 2, vocab: int = 260) -> None:
    """A tiny Llama as llama.cpp would write it: 4-bit matrices, float32 norms."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<s>", "</s>", "ab", *sorted(ByteLevel.alphabet())]
    tokens += [f"<unused{i}>" for i in range(vocab - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (vocab - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", vocab, hidden)
    add("output_norm.weight", hidden)
    for layer in range(layers):
        block = f"blk.{layer}."
        add(block + "attn_q.weight", hidden, hidden)
        add(block + "attn_k.weight", hidden // 2, hidden)
        add(block + "attn_v.weight", hidden // 2, hidden)
        add(block + "attn_output.weight", hidden, hidden)
        add(block + "ffn_gate.weight", hidden, hidden)
        add(block + "ffn_up.weight", hidden, hidden)
        add(block + "ffn_down.weight", hidden, hidden)
        add(block + "attn_norm.weight", hidden)
        add(block + "ffn_norm.weight", hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_gives_plain_weights(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_model(tmp_path / "tiny.gguf", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    query = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(query) is torch.nn.Linear
    assert query.weight.shape == (64, 64)
    assert tokenizer.pad_token is not None
    model.save_pretrained(tmp_path / "saved")
    again = load_network(tmp_path / "saved", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_gguf_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"pretrained='nowhere/x.gguf': there is no such file"):
        load_network("nowhere/x.gguf")


def test_gguf_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").touch()
    monkeypatch.setattr("smezo_pl.models.find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ModuleNotFoundError, match=r"a GGUF file needs gguf: pip install 'smezo_pl\[gguf\]'"):
        load_network(tmp_path / "x.gguf")


def test_lora(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    state = torch.get_rng_state()
    model = add_adapter(make_tiny_model("llama"), LORA)
    again = add_adapter(make_tiny_model("llama"), LORA)
    assert torch.equal(torch.get_rng_state(), state)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = add_adapter(make_tiny_model("llama"), LORA, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_prefix(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = add_adapter(make_tiny_model("llama"), {"peft_type": "prefix_tuning", "num_virtual_tokens": 5})
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["prompt_encoder.default.embedding.weight"]


SAVED: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "DoRA": {**LORA, "use_dora": True, "modules_to_save": ["norm"]},
    "LoHa": {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj"]},
    "IA3": {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
}


def parts(network: nn.Module, trained: bool) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad is trained}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def saved_adapters(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, adapter in SAVED.items():
        network = add_adapter(load_network(tiny_folder), adapter)
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.1 * p.requires_grad)
        network.save_pretrained(folder / name)  # type: ignore[operator]
    return {name: folder / name for name in SAVED}


@pytest.mark.parametrize("name", SAVED)
def test_training_continues_on_a_saved_adapter(
    saved_adapters: dict[str, Path], tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    folder, run = saved_adapters[name], tmp_path / "run"

    def module(**settings: Any) -> SparseMeZOModule:
        large = partial(SparseMeZO, lr=1e-1, eps=1e-2, sparsity=0.0, kernel="torch")
        return SparseMeZOModule(str(folder), large, **settings)

    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    data, trained = PromptDataModule(num_train=8, num_dev=4, batch_size=4), module(save_pretrained=str(tmp_path / "o"))
    trained.configure_model()
    start, base = parts(trained.model, True), parts(trained.model, False)
    Trainer(**quiet, max_steps=2, callbacks=[SeedCheckpoint(str(run))]).fit(trained, data)
    end = parts(trained.model, True)
    assert start.keys() == end.keys()
    assert not any(torch.equal(start[key], end[key]) for key in start)
    assert same_tensors(parts(trained.model, False), base)
    assert same_tensors(parts(load_network(tmp_path / "o"), True), end)
    restored = module()
    Trainer(**quiet).validate(restored, data, ckpt_path=run / "checkpoints" / "last.ckpt", verbose=False)
    assert same_tensors(parts(restored.model, True), end)
    replayed = load_network(folder)
    replay(run, replayed)
    assert same_tensors(parts(replayed, True), end)


def test_a_saved_adapter_of_a_masked_model(tiny_roberta_folder: Path, tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["query"]}
    add_adapter(load_network(tiny_roberta_folder), adapter).save_pretrained(tmp_path)  # type: ignore[operator]
    assert kind_of(tmp_path) == "masked"
    assert adapter_kinds(load_network(tmp_path)) == ["LORA"]
    assert load_tokenizer(tmp_path).mask_token is not None  # of the base model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": LORA}, "has a LORA adapter, which is trained on: leave out adapter="),
        ({"method": "prefix"}, "method 'prefix' trains a PREFIX_TUNING adapter, and the model has a LORA adapter"),
        ({"method": "full"}, "method 'full' trains the whole model, and the model has a LORA adapter, which alone"),
    ],
)
def test_a_method_that_does_not_train_the_saved_adapter(
    saved_adapters: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMeZOModule(str(saved_adapters["LoRA"]), **settings).configure_model()
    allowed = SparseMeZOModule(str(saved_adapters["LoRA"]), method="lora")
    allowed.configure_model()
    assert adapter_kinds(allowed.model) == ["LORA"]


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)


def break_a_name(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {name.replace("layers.0", "layers.7"): t for name, t in tensors.items()})


def break_a_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {name: t[:1].clone() for name, t in tensors.items()})


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_a_name, "PEFT does not load this adapter: .*layers.0"),
        (break_a_shape, "PEFT does not load this adapter: .*size mismatch"),
        (lambda folder: change(folder, base_model_name_or_path=None), "names no base model"),
        (
            lambda folder: change(folder, base_model_name_or_path="/gone"),
            "names the base model '/gone': ",
        ),
        (lambda folder: change(folder, r=7), "PEFT does not load this adapter: "),
    ],
)
def test_an_adapter_that_is_not_loaded_whole(
    saved_adapters: dict[str, Path], tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(saved_adapters["LoRA"], tmp_path / "adapter")
    harm(tmp_path / "adapter")
    with pytest.raises((ValueError, OSError), match=message):
        load_network(tmp_path / "adapter")


def test_a_model_and_an_adapter_in_one_folder(
    saved_adapters: dict[str, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    for folder in (tiny_folder, saved_adapters["LoRA"]):
        shutil.copytree(folder, tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds a model and an adapter"):
        load_network(tmp_path / "both")


def test_several_adapters_in_one_folder(
    saved_adapters: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved_adapters["LoRA"], tmp_path / "adapter")
    shutil.copytree(saved_adapters["IA3"], tmp_path / "adapter" / "other")
    load_network(tmp_path / "adapter")
    assert "the adapters in its folders other are not loaded" in caplog.text
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="name the folder of one of its adapters: other"):
        load_network(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"r": 8}, "adapter needs peft_type, one of .*LORA.*; got None"),
        ({"peft_type": "LORRA"}, "adapter needs peft_type, one of .*; got 'LORRA'"),
        (
            {"peft_type": "LORA", "rank": 8},
            "adapter={'peft_type': 'LORA', 'rank': 8}: .*unexpected keyword argument 'rank'",
        ),
        ({**LORA, "target_modules": ["nope"]}, "Target modules {'nope'} not found"),
    ],
)
def test_wrong_adapter(
    make_tiny_model: Callable[..., PreTrainedModel], adapter: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_adapter(make_tiny_model("llama"), adapter)


def test_adapter_without_peft(perceptron: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("smezo_pl.models.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"adapter needs peft: pip install 'smezo_pl\[peft\]'"):
        add_adapter(perceptron, LORA)
