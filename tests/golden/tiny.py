"""Tiny models, tokenizers and data for the golden cases, made of whole numbers: every CPU starts from the same bits.

Starting weights drawn by torch's normal distribution would differ between processors in their last bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WORDS = tuple(
    re.findall(
        r"\w+",
        "the movie number is great lovely fine good terrible awful poor bad It was not this that question answer room "
        "hotel food service Yes No Maybe because so mean and with story",
    )
)
SPECIAL = ("<s>", "</s>", "<pad>", "<mask>")


def whole_numbers(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    """float32 in ``[-scale, scale)``, a multiple of ``scale / 2**23``; ``scale`` is a power of two."""
    values = np.random.default_rng(seed).integers(-(2**23), 2**23, shape)
    return torch.from_numpy(values.astype(np.float32) * np.float32(scale / 2**23))


def fill(model: nn.Module, scale: float = 0.5) -> None:
    """Give every matrix and every bias values of its own; gains of norms stay one."""
    with torch.no_grad():
        for place, (name, weight) in enumerate(model.named_parameters()):
            if weight.ndim > 1 or name.endswith("bias"):
                weight.copy_(whole_numbers(tuple(weight.shape), place, scale if weight.ndim > 1 else 0.125))


def make_tokenizer(masked: bool) -> Any:
    """Byte-level BPE in which each word of `WORDS` after a space is one token; its merges are written, not trained."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        made = "Ġ"
        for letter in word:
            if (made, letter) not in merges:
                merges.append((made, letter))
                tokens.append(made + letter)
            made += letter
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if masked else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if masked:
        names |= {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def _llama(vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _roberta(vocabulary: int) -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=200,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


_MODELS: dict[str, Callable[[int], nn.Module]] = {"llama": _llama, "roberta": _roberta}


@lru_cache
def _made(kind: str) -> TemporaryDirectory[str]:
    held = TemporaryDirectory(prefix="golden-")
    tokenizer = make_tokenizer(masked=kind == "roberta")
    tokenizer.model_max_length = 180
    with torch.random.fork_rng(devices=[]):
        model = _MODELS[kind](len(tokenizer))
    fill(model)
    model.save_pretrained(held.name)
    tokenizer.save_pretrained(held.name)
    return held


def put_model(folder: Path, kind: str = "llama") -> None:
    """A Hugging Face folder ``model`` in a case's folder: a relative name, so that no result holds a path."""
    copytree(_made(kind).name, folder / "model")


GOOD, BAD = ("great", "lovely", "fine"), ("terrible", "awful", "poor")
CLASSIFY = {"prompt": "{text} It was", "candidates": {0: " bad", 1: " good"}, "label": "label"}
FILL_IN = {"prompt": "{text} It was<mask>.", "candidates": {0: " bad", 1: " good"}, "label": "label"}
CHOOSE = {"prompt": "{text} because", "candidates": [" {one}", " {two}"], "label": "label", "calibration": "because"}
WRITE = {"prompt": "question {q}?\nanswer:", "target": "answers", "max_new_tokens": 4, "metric": ["f1", "em"]}


def _row(i: int) -> dict[str, Any]:
    good = (i * 7 // 3) % 2 == 1
    word = (GOOD if good else BAD)[i % 3]
    thing = ("movie", "hotel", "food", "story", "room")[i % 5]
    return {
        "text": f"{'the' if i % 4 else 'this'} {thing} number {i} is {word}.",
        "label": int(good),
        "one": f"the {thing} is {word}",
        "two": f"it was not {GOOD[i % 2]} {'and so ' * (i % 3)}",
        "q": "the " * (i % 4) + str(i),
        "answers": [f"{i} great", "the", "is"],
    }


def put_rows(folder: Path) -> None:
    """``train.jsonl`` (24 rows), ``dev.jsonl`` and ``test.jsonl`` (12 each) in a case's folder."""
    for name, first, count in (("train", 0, 24), ("dev", 100, 12), ("test", 200, 12)):
        lines = [json.dumps(_row(i)) + "\n" for i in range(first, first + count)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


_ADJECTIVES = ("great", "lovely", "terrible", "awful")
TASK_ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sst2": lambda i: {"sentence": f"the movie number {i} is {_ADJECTIVES[i % 4]} ", "label": int(i % 4 < 2), "idx": i},
    "rte": lambda i: {"premise": f"It is {i}.", "hypothesis": f"Not {i % 3}.", "label": i % 2, "idx": i},
    "boolq": lambda i: {"question": f"is it {i}", "passage": f"It is {i % 5}.", "label": i % 2, "idx": i},
    "cola": lambda i: {"sentence": f"It is {i}.", "label": i % 2, "idx": i},
    "copa": lambda i: {
        "premise": f"It was {i}.",
        "choice1": f"It is {i + 1}.",
        "choice2": "It is not.",
        "question": ("cause", "effect")[i % 2],
        "label": i % 2,
        "idx": i,
    },
    "trec": lambda i: {"text": f"What is {i}?", "coarse_label": ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")[i % 6]},
    "multirc": lambda i: {
        "paragraph": f"It is {i // 4}.",
        "question": f"Is it {i // 2}?",
        "answer": f"{i}",
        "label": i % 2,
    },
    "squad": lambda i: {
        "title": "",
        "context": f"It is {i}.",
        "question": "What is it?",
        "answers": {"text": [f"{i}"], "answer_start": [6]},
    },
    "drop": lambda i: {
        "passage": f"It is {i}.",
        "question": "What is it?",
        "answers_spans": {"spans": [f"{i}"], "types": ["number"]},
    },
    "mnli": lambda i: {"premise": f"It is {i}.", "hypothesis": f"Not {i % 4}.", "label": i % 3},
    "qnli": lambda i: {"question": f"Is it {i}?", "sentence": f"It is {i % 5}.", "label": i % 2},
    "mrpc": lambda i: {"sentence1": f"It is {i}.", "sentence2": f"It was {i % 5}.", "label": i % 2},
    "qqp": lambda i: {"question1": f"Is it {i}?", "question2": f"Was it {i % 5}?", "label": i % 2},
    "cb": lambda i: {"premise": f"It is {i}.", "hypothesis": f"It was {i % 4}", "label": i % 3},
    "wsc.fixed": lambda i: {
        "text": f"The room {i} is good and it was great.",
        "span1_text": "The room",
        "span2_text": "it",
        "label": i % 2,
    },
    "wic": lambda i: {"word": "room", "sentence1": f"room {i}", "sentence2": "a nice room", "label": i % 2},
    "record": lambda i: {
        "passage": f"The {i} and the {i + 1}.\n@highlight\nIt is good",
        "query": "@placeholder is good",
        "entities": [f"The {i}", f"the {i + 1}"],
        "answers": [f"The {i}"],
    },
    "piqa": lambda i: {"goal": f"mean {i}", "sol1": "so", "sol2": f"not {i}", "label": i % 2},
    "siqa": lambda i: {
        "context": f"It was {i}.",
        "question": "Because?",
        "answerA": "so",
        "answerB": "not",
        "answerC": f"{i}",
        "label": str(i % 3 + 1),
    },
    "aqua": lambda i: {
        "question": f"What is {i} and 1?",
        "options": [f"{letter}){i + place}" for place, letter in enumerate("ABCDE")],
        "correct": "ABCDE"[i % 5],
    },
}
"""Made-up rows in the columns of the real data sets, by the name of their folder."""


def put_tasks(folder: Path) -> None:
    """A folder ``data`` of the built-in tasks' files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for task, row in TASK_ROWS.items():
        (folder / "data" / task).mkdir(parents=True)
        held_out = {"trec": "test", "mnli": "validation_matched"}.get(task, "validation")
        for split, count in (("train", 24), (held_out, 12)):
            table = pa.Table.from_pylist([row(i) for i in range(count)])
            pq.write_table(table, folder / "data" / task / f"{split}.parquet")
