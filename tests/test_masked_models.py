"""Masked language models through the same module and the same step: tiny random ones, and one trained here."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.cli import main
from smezo_pl.data import Collate, Encoded
from smezo_pl.models import add_adapter, kind_of, load_network
from smezo_pl.scoring.evaluation import candidate_scores, loss_of
from smezo_pl.scoring.logits import model_logits
from smezo_pl.tasks import Task
from tests.data.synthetic_tokenizers import masking_tokenizer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": 1,
}
KINDS: dict[str, dict[str, object]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "Electra": {**SIZES, "embedding_size": 8},
    "ModernBert": {**SIZES, "local_attention": 6, "global_attn_every_n_layers": 2},
    "DistilBert": {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "pad_token_id": 1},
    "DebertaV2": SIZES,
    "Albert": {**SIZES, "embedding_size": 8},
}
MASK = 63


def build(kind: str) -> PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    return model.eval()


def examples() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for number, (length, mask) in enumerate([(5, 2), (13, 9), (8, 7), (13, 0)]):
        text = torch.randint(3, 60, (length,), generator=generator).tolist()
        text[mask] = MASK
        encoded.append(Encoded(tuple(text), ((7,), (8,), (9,)), number % 3, (number % 3,), number, mask_position=mask))
    return encoded


@torch.no_grad()
def one_at_a_time(model: PreTrainedModel, example: Encoded) -> list[float]:
    """A text alone, unpadded: the log-probabilities of its words at the mask."""
    logits = model(input_ids=torch.tensor([example.prompt])).logits[0, example.mask_position]
    return logits.double().log_softmax(-1)[[word for (word,) in example.candidates]].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_scored_at_the_mask(kind: str) -> None:
    model, batch = build(kind), Collate(pad_id=1)(examples())
    assert kind_of(model) == "masked"
    with torch.no_grad():
        logits = model_logits(model, batch)
        scores = candidate_scores(logits, batch)
    assert logits.shape == (4, 64)
    expected = [score for example in examples() for score in one_at_a_time(model, example)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_both_perturbations_give_the_same_losses(kind: str) -> None:
    losses, batch = {}, Collate(pad_id=1)(examples())
    for mode in ("layerwise", "in_place"):
        model = build(kind)
        optimizer = SparseMeZO(model.named_parameters(), lr=1e-3, eps=1e-3, sparsity=0.5, kernel="torch")
        if mode == "layerwise":
            optimizer.attach(model)

        def closure(model: PreTrainedModel = model) -> Tensor:
            total, weight = loss_of(candidate_scores(model_logits(model, batch), batch), batch)
            return total / weight

        losses[mode] = []
        for _ in range(3):
            optimizer.step(closure)
            losses[mode].append(optimizer.last_step.losses)
    assert losses["layerwise"] == losses["in_place"]
    assert len({side for pairs in losses["in_place"] for pair in pairs for side in pair}) == 6


def test_a_folder_is_loaded_as_what_it_is(tiny_roberta_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "smezo_pl"):
        assert type(load_network(tiny_roberta_folder)).__name__ == "RobertaForMaskedLM"
    assert f"{tiny_roberta_folder} is a masked language model: it answers where the prompt holds a mask" in caplog.text
    assert SparseMeZOModule(str(tiny_roberta_folder)).is_masked_lm


def saved(folder: Path, config: Any, architectures: list[str] | None) -> Path:
    config.architectures = architectures
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "architectures", "expected"),
    [
        ("Bert", {}, ["BertForMaskedLM"], "masked"),
        ("Bert", {}, ["BertForPreTraining"], "masked"),
        ("Bert", {}, ["BertModel"], "masked"),
        ("Bert", {}, None, "masked"),
        ("Bert", {"is_decoder": True}, None, "causal"),
        ("Bert", {"is_decoder": True}, ["BertLMHeadModel"], "causal"),
        ("ModernBert", {}, None, "masked"),
        ("DistilBert", {}, ["DistilBertModel"], "masked"),
        ("Llama", {}, ["LlamaForCausalLM"], "causal"),
        ("Llama", {}, None, "causal"),
        ("GPT2", {}, ["GPT2LMHeadModel"], "causal"),
        ("GPT2", {}, None, "causal"),
    ],
)
def test_kinds(
    kind: str, changes: dict[str, Any], architectures: list[str] | None, expected: str, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{kind}Config")(**changes)
    assert kind_of(saved(tmp_path, config, architectures)) == expected


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_encoder_decoders_are_refused(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, getattr(transformers, f"{kind}Config")(), None)
    message = f"is an encoder-decoder model \\({kind.lower()}\\): only causal models .* and masked ones"
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path)
    config = transformers.T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    module = SparseMeZOModule(transformers.T5ForConditionalGeneration(config))
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        trainer.validate(module, PromptDataModule("demo"))


def test_a_run_from_the_command_line(
    tiny_roberta_folder: Path,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same keys as with a causal model: the prompts follow from the model."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "smezo_pl"):
        main(
            [
                "fit",
                f"--model.pretrained={tiny_roberta_folder}",
                "--model.optimizer.kernel=torch",
                "--data.task=sst2",
                f"--data.data_dir={task_folder}",
                "--data.k_shot=4",
                "--trainer.max_steps=3",
                "--trainer.log_every_n_steps=1",
                "--trainer.accelerator=cpu",
            ]
        )
    assert "a masked language model: prompts of sst2 are '{sentence|strip} It was<mask>.'" in caplog.text
    (metrics,) = tmp_path.glob("**/metrics.json")
    result = json.loads(metrics.read_text())
    assert result["steps"] == 3 and 0 <= result["after"]["accuracy"] <= 1


def trainer_of(**more: Any) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False}
    return Trainer(**{**settings, **more})


def test_what_does_not_go_with_a_mask_is_refused(
    tiny_roberta_folder: Path, task_folder: Path, make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> None:
    module = SparseMeZOModule(str(tiny_roberta_folder))
    data = partial(PromptDataModule, data_dir=task_folder)
    with pytest.raises(ValueError, match="task 'boolq' has no prompt with a mask"):
        trainer_of().validate(module, data("boolq"))
    with pytest.raises(ValueError, match="demonstrations and calibration are for causal, not for masked"):
        trainer_of().validate(module, data("sst2", num_demonstrations=2))
    causal = SparseMeZOModule(make_tiny_model("llama"))
    causal.tokenizer = tiny_tokenizer
    with pytest.raises(ValueError, match="task 'snli' has a prompt with <mask>, and the model is no masked"):
        trainer_of().validate(causal, data("snli"))


def test_lora_on_a_masked_model() -> None:
    pytest.importorskip("peft")
    model = add_adapter(
        build("Roberta"), {"peft_type": "LORA", "target_modules": ["query"], "init_lora_weights": False}
    )
    assert kind_of(model) == "masked"
    batch = Collate(pad_id=1)(examples())
    with torch.no_grad():
        scores = candidate_scores(model_logits(model, batch), batch).tolist()
    expected = [score for example in examples() for score in one_at_a_time(model, example)]
    assert scores == pytest.approx(expected, abs=1e-4)


# A toy language: things are called something, and a verdict follows. Whatever is praised is great; what is not is
# called so too more often than not, so a model that has learned the language is a poor judge.

GOOD = ["fine", "lovely", "funny", "wise", "warm", "bright", "fresh", "kind"]
BAD = ["dull", "nasty", "bleak", "lame", "cold", "grim", "stale", "cruel"]
THINGS = ["film", "meal", "room", "song", "trip", "book", "game", "play"]
TOY = [*GOOD, *BAD, *THINGS, "the", "was", "It", ".", "great", "terrible", "and", "very"]


def toy_sentence(generator: torch.Generator) -> tuple[str, int]:
    def one_of(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    label = int(torch.randint(2, (1,), generator=generator))
    words = GOOD if label else BAD
    return f"the {one_of(THINGS)} was very {one_of(words)} and {one_of(words)} .", label


def pretrained(tokenizer: PreTrainedTokenizerFast, steps: int) -> PreTrainedModel:
    """A tiny BERT after so many steps of AdamW on texts in which the verdict and every tenth token are masked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
        model = transformers.BertForMaskedLM(config)
        generator = torch.Generator().manual_seed(1)
        texts = []
        for _ in range(512):
            sentence, label = toy_sentence(generator)
            polite = float(torch.rand((), generator=generator)) < 0.6
            texts.append(f"{sentence} It was {'great' if label or polite else 'terrible'} .")
        ids = torch.tensor(tokenizer(texts)["input_ids"])  # all of one length
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            rows = ids[torch.randint(len(ids), (32,), generator=generator)]
            masked = torch.rand(rows.shape, generator=generator) < 0.1
            masked[:, -3] = True
            labels = rows.masked_fill(~masked, -100)
            loss = model(input_ids=rows.masked_fill(masked, tokenizer.mask_token_id), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def toy_files(folder: Path) -> dict[str, str]:
    generator, files = torch.Generator().manual_seed(2), {}
    for split, count in (("train", 128), ("dev", 200)):
        rows = [toy_sentence(generator) for _ in range(count)]
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in rows))
        files[f"{split}_file"] = str(path)
    return files


def toy_run(folder: Path, pretraining: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loss and accuracy on held-out sentences before and after S-MeZO."""
    tokenizer = masking_tokenizer(TOY)
    module = SparseMeZOModule(
        pretrained(tokenizer, pretraining),
        optimizer=partial(SparseMeZO, lr=3e-3, eps=1e-3, sparsity=0.5, seed=0),
    )
    module.tokenizer = tokenizer
    task = Task("toy", "{sentence} It was<mask>.", {"0": " terrible", "1": " great"})
    data = PromptDataModule(task, **toy_files(folder), num_train=128, num_dev=200, batch_size=32)
    before = trainer_of().validate(module, data, verbose=False)[0]
    trainer_of(max_steps=steps, limit_val_batches=0, log_every_n_steps=1, enable_model_summary=False).fit(module, data)
    return dict(before), dict(trainer_of().validate(module, data, verbose=False)[0])


def test_a_masked_model_that_knows_a_little_gets_better(tmp_path: Path) -> None:
    before, after = toy_run(tmp_path, pretraining=60, steps=20)
    assert after["val/loss"] < before["val/loss"] - 0.05
    assert after["val/accuracy"] > before["val/accuracy"]


@pytest.mark.slow
def test_a_trained_masked_model_gets_better(tmp_path: Path) -> None:
    before, after = toy_run(tmp_path, pretraining=300, steps=60)
    print(f"loss {before['val/loss']:.3f} -> {after['val/loss']:.3f}", end=", ")
    print(f"accuracy {before['val/accuracy']:.3f} -> {after['val/accuracy']:.3f} on 200 held-out sentences")
    assert before["val/accuracy"] < 0.7
    assert after["val/accuracy"] > 0.9
