"""Tiny models and data made in code, and a clean process state around every test."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before transformers is imported: a test that asks the hub by mistake fails at once, and the same everywhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny tensors gain nothing from threads, and threads that wait for each other by spinning lose much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_WORDS = (
    "the a of and is was this that it to in with not movie food hotel service story room true question answer passage "
    "terrible great good bad Yes No Maybe It was mean Does because so better worse lovely awful nice poor"
)


# The same examples in every run, and no file beside the tests.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile("fixed")


def pytest_collection_finish(session: pytest.Session) -> None:
    # The first step of every run looks at all objects of the process for tensors: not at those of imported modules.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else Triton's bindings report leaks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    data = os.environ.get("SMEZO_DATA")
    reasons = {
        "data": None if data and Path(data).is_dir() else "SMEZO_DATA names no folder",
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "network": None if os.environ.get("SMEZO_NETWORK") else "set SMEZO_NETWORK=1 to ask the hub",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """What a test changes for the whole process is as it was afterwards."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    log = logging.getLogger("smezo_pl")
    handlers, level = list(log.handlers), log.level
    environment = dict(os.environ)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    log.handlers = handlers
    log.setLevel(level)  # assigned, it would leave what loggers below remember of the one before
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets (tests marked ``data``)."""
    return Path(os.environ["SMEZO_DATA"])


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few hundred tokens, a beginning-of-sequence token and no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([_WORDS, _WORDS], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def make_tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """A function that makes a random network: ``make_tiny_model("llama")``; the same bits every time."""

    def make(kind: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
        from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig, OPTConfig

        vocab = len(tiny_tokenizer)
        shapes = {
            "llama": (
                LlamaConfig,
                {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 512,
                    "tie_word_embeddings": True,
                },
            ),
            "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
            "opt": (
                OPTConfig,
                {
                    "hidden_size": 32,
                    "ffn_dim": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 512,
                    "word_embed_proj_dim": 32,
                },
            ),
            "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
            "mpt": (MptConfig, {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2}),
        }
        config_class, shape = shapes[kind]
        ids = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config_class(**{**ids, **shape, **changes}))
        # transformers starts with tiny weights, which would give every candidate nearly the same score.
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A tiny Llama with its tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    make_tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_roberta_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa, a masked language model, with its tokenizer as a Hugging Face folder."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    from tests.data.synthetic_tokenizers import masking_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "tiny-roberta"
    words = [
        "the",
        "movie",
        "number",
        "is",
        "great",
        "lovely",
        "terrible",
        "awful",
        "It",
        "was",
        ".",
        "Yes",
        "Maybe",
        "No",
        "?",
        ",",
    ]
    tokenizer = masking_tokenizer([*words, *map(str, range(64))], roberta=True)
    tokenizer.model_max_length = 40
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=1, max_position_embeddings=48, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder like the real one, ``{task}/{split}.parquet``, with a few made-up rows of some tasks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("data")
    adjectives = ("great", "lovely", "terrible", "awful")
    rows: dict[str, Callable[[int], dict[str, object]]] = {
        "sst2": lambda i: {
            "sentence": f"the movie number {i} is {adjectives[i % 4]} ",
            "label": int(i % 4 < 2),
            "idx": i,
        },
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
        "trec": lambda i: {
            "text": f"What is {i}?",
            "coarse_label": ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")[i % 6],
        },
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
    for task, row in rows.items():
        (folder / task).mkdir()
        for split, count in (("train", 48), ("test" if task == "trec" else "validation", 16)):
            pq.write_table(pa.Table.from_pylist([row(i) for i in range(count)]), folder / task / f"{split}.parquet")
    return folder


class Perceptron(nn.Module):
    """A network that is no language model."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(x)))


@pytest.fixture
def perceptron() -> Perceptron:
    """A tiny regression network, the same bits every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Perceptron()
