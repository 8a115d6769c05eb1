"""A model's positions: texts are cut where its own configuration says so, whatever the tokenizer says."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerFast

from smezo_pl import PromptDataModule, SparseMeZOModule
from smezo_pl.models import add_adapter, position_limit
from tests.data.synthetic_tokenizers import masking_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
COMMON: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
ROTARY = {**COMMON, **SIZES, "max_position_embeddings": 24}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LEARNED = {
    "gpt2": {**COMMON, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24},
    "opt": {**ROTARY, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "bert": ROTARY,
    "roberta": ROTARY,
    "mpnet": ROTARY,
}


def network(kind: str, **settings: Any) -> torch.nn.Module:
    masked = kind in ("bert", "roberta", "mpnet")
    auto: Any = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    model: torch.nn.Module = auto.from_config(transformers.AutoConfig.for_model(kind, **settings))
    return model.eval()


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("adapter", [None, "PROMPT_TUNING", "PREFIX_TUNING"])
def test_the_limit_is_what_learned_positions_allow(kind: str, adapter: str | None) -> None:
    model = network(kind, **LEARNED[kind])
    if adapter and kind not in ("gpt2", "opt"):
        return
    if adapter:
        model = add_adapter(model, {"peft_type": adapter, "num_virtual_tokens": 4})
    limit = position_limit(model)
    assert limit == 24 - 4 * (adapter is not None) - 2 * (kind in ("roberta", "mpnet"))
    model(input_ids=torch.full((1, limit), 5), use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5), use_cache=False)


@pytest.mark.parametrize(
    ("kind", "settings", "limit"),
    [
        ("llama", {**ROTARY, "sliding_window": 8}, 24),
        ("mistral", {**ROTARY, "sliding_window": 8}, 24),
        ("llama", {**ROTARY, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, 96),
        ("llama", {**ROTARY, "rope_parameters": YARN}, 96),
        # The number is that of all positions already.
        ("llama", {**ROTARY, "rope_parameters": {**YARN, "original_max_position_embeddings": 6}}, 24),
        ("llama", {**ROTARY, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 24),
        ("bloom", {**COMMON, "hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
        ("mpt", {"vocab_size": 512, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 24}, 24),
        ("xlnet", {"vocab_size": 512, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}, None),
    ],
)
def test_the_limit_by_configuration(kind: str, settings: dict[str, Any], limit: int | None, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(kind, **settings)
    config.save_pretrained(tmp_path)
    assert position_limit(tmp_path) == limit
    assert position_limit(tmp_path, 4) == (None if limit is None else limit - 4)


def test_the_text_part_of_a_model_of_texts_and_images(tmp_path: Path) -> None:
    transformers.Gemma3Config(text_config={"max_position_embeddings": 24}).save_pretrained(tmp_path)
    assert position_limit(tmp_path) == 24


def test_a_network_without_a_configuration(perceptron: torch.nn.Module) -> None:
    assert position_limit(perceptron) is None


def test_a_folder_of_peft_has_the_positions_of_its_base(tmp_path: Path) -> None:
    base = network("gpt2", **LEARNED["gpt2"])
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapter = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    add_adapter(base, adapter).save_pretrained(tmp_path / "adapter")
    assert position_limit(tmp_path / "adapter") == 20


def run(folder: Path, task: dict[str, Any], **settings: Any) -> PromptDataModule:
    rows = [json.dumps({"text": f"the movie {i} " + "was great " * 40, "label": i % 2}) for i in range(6)]
    (folder / "long.jsonl").write_text("\n".join(rows))
    data = PromptDataModule(
        task, train_file=str(folder / "long.jsonl"), num_train=4, num_dev=2, batch_size=2, max_length=100
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        default_root_dir=folder,
        enable_model_summary=False,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(SparseMeZOModule(str(folder), **settings), data)
    return data


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("adapter", [None, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}])
def test_long_texts_are_cut_to_the_models_positions(
    kind: str,
    adapter: dict[str, Any] | None,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    network(kind, **LEARNED.get(kind, ROTARY)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    limit = 24 if adapter is None else 20
    with caplog.at_level(logging.INFO, "smezo_pl"):
        data = run(tmp_path, {"prompt": "{text}\nIt was", "candidates": {0: " bad", 1: " good"}}, adapter=adapter)
    assert {example.length + 1 for example in data.encoded("train")} == {limit}
    assert f"max_length 100 lowered to {limit}, the model's positions" in caplog.text
    assert f"longer than max_length {limit} and were cut on the left" in caplog.text


def test_a_masked_model_keeps_its_mask(tmp_path: Path) -> None:
    tokenizer = masking_tokenizer(["the", "movie", "was", "great", "terrible", "It", "."], roberta=True)
    network("roberta", **LEARNED["roberta"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = run(tmp_path, {"prompt": "{text} It was<mask>.", "candidates": {0: " terrible", 1: " great"}})
    assert {len(example.prompt) for example in data.encoded("dev")} == {22}
    assert {example.prompt[example.mask_position] for example in data.encoded("dev")} == {tokenizer.mask_token_id}
