"""Language models and their adapters in the Trainer, from a kill to an exported file, in a folder with an odd name."""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule, apply
from smezo_pl.callbacks import SeedCheckpoint
from smezo_pl.methods import FirstOrder
from smezo_pl.models import add_adapter, load_model
from smezo_pl.trajectory.exports import load
from smezo_pl.trajectory.replaying import tensors_of
from tests.trajectory.runs import KillAfter, KilledError, Watch, same

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
LAST = "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def multimodal_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A model of images and texts, whose vision tower no text reads."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**shape, "vocab_size": len(tiny_tokenizer), "num_key_value_heads": 1, "head_dim": 8},
        vision_config={**shape, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    folder = tmp_path_factory.mktemp("tiny") / "tiny-gemma3"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "LoRA": ({}, LORA),
    "prefix": ({}, PREFIX),
    "some tensors": ({"include": ["*self_attn*", "*norm*"], "exclude": "*o_proj*", "dense": "*norm*"}, None),
    "all but some, a constant mask": ({"exclude": "*embed*", "mask_update": "constant"}, None),
    "a vision tower": ({"weight_decay": 0.1}, None),
}


def fit(module: SparseMeZOModule, folder: Path, *callbacks: Any, ckpt_path: Path | None = None) -> Watch:
    watch = Watch()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        precision="bf16-true",
        max_steps=10,
        max_epochs=-1,
        val_check_interval=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[watch, *callbacks, SeedCheckpoint(every_n_steps=3)],
    )
    data = PromptDataModule(task="demo", num_train=64, num_dev=8, batch_size=8)
    watch_batches(watch)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return watch


def watch_batches(watch: Watch) -> None:
    """Batches of prompts instead of pairs of tensors."""

    def seen(trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        watch.train[trainer.global_step] = float(trainer.callback_metrics["train/loss"])
        watch.seen[trainer.global_step] = batch.input_ids.flatten().tolist()

    watch.on_train_batch_end = seen  # type: ignore[method-assign]


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_and_its_file_makes_the_same_weights(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, adapter = RUNS[name]
    tiny_folder = request.getfixturevalue("multimodal_folder" if name == "a vision tower" else "tiny_folder")

    def build() -> SparseMeZOModule:
        seed = FirstOrder(seed=3)  # of an adapter's starting weights
        optimizer = partial(SparseMeZO, lr=1e-2, **settings)
        return SparseMeZOModule(str(tiny_folder), optimizer, adapter=adapter, first_order=seed)

    trained, resumed, folder = build(), build(), tmp_path / "ein Lauf, größer ?#%"
    seen = fit(trained, tmp_path / "straight")
    with pytest.raises(KilledError):
        fit(build(), folder, KillAfter(7))
    watch = fit(resumed, folder, ckpt_path=folder / LAST)
    assert min(watch.train) == 7 and max(watch.train) == 10
    assert all(watch.train[step] == seen.train[step] and watch.seen[step] == seen.seen[step] for step in watch.train)
    assert same(resumed.model, trained.model)

    tune = folder / "tune größer.safetensors"
    import_module("smezo_pl.commands.weights").export_main(["export", str(folder), "--out", str(tune)])
    model = load_model(tiny_folder, dtype=torch.bfloat16)[0]
    if name == "a vision tower":
        unchanged = {
            part for part, tensor in trained.model.named_parameters() if torch.equal(tensor, model.get_parameter(part))
        }
        assert unchanged == {
            part for part, _ in model.named_parameters() if "vision_tower" in part or "projector" in part
        }
    model = model if adapter is None else add_adapter(model, adapter, seed=3)
    assert apply(model, tune).identical is True
    assert same(model, trained.model)
    assert tensors_of(load(tune).header, model, "").keys() == {n for n, _ in trained.model.named_parameters()}
    import_module("smezo_pl.commands.weights").apply_main(["apply", str(tune), "--out", str(folder / "model")])
    assert "identical: every bit is as in the run" in capsys.readouterr().out
    assert (folder / "model" / ("model" if adapter is None else "adapter_model")).with_suffix(".safetensors").is_file()
