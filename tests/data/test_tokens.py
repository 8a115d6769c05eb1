import random
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smezo_pl.data.tokens import Texts, refuse_special_tokens
from smezo_pl.tasks import get_task, make_task
from tests.data.synthetic_tokenizers import masking_tokenizer, word_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["<|im_end|>"]}
CHARACTERS = "abdeimnsuk<>/|_ "


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """As T5's and XLM-R's: the special tokens are pieces of the model, which finds them in any text."""
    pieces = [*SPECIAL_NAMES, "▁", *CHARACTERS.replace(" ", ""), "▁a", "an"]
    inner = Tokenizer(models.Unigram([(piece, -float(len(piece) < 2)) for piece in pieces], unk_id=2))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's."""
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL_NAMES, "▁", *CHARACTERS.replace(" ", ""), "an", "▁an"])}
    inner = Tokenizer(models.BPE(vocabulary, [("a", "n"), ("▁", "an")], unk_token="<unk>", ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's; the special tokens come after the vocabulary, a token that is added but not special between them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, "an"])}, [("a", "n")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["mean"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


SPECIAL_NAMES = ("<s>", "</s>", "<unk>", "<|im_end|>")
KINDS = {
    "unigram": lru_cache(unigram_tokenizer),
    "sentencepiece": lru_cache(sentencepiece_tokenizer),
    "bytes": lru_cache(byte_tokenizer),
}


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids(list(SPECIAL_NAMES))) - {None}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@given(pieces=st.lists(st.sampled_from([*SPECIAL_NAMES, *CHARACTERS, "mean", "an"]), max_size=20))
def test_special_tokens_in_a_text_are_text(kind: str, pieces: list[str]) -> None:
    tokenizer = KINDS[kind]()
    text = "".join(["a", *pieces, "n"])
    (tokens,) = Texts(tokenizer)([text])
    assert special_ids(tokenizer).isdisjoint(tokens)
    assert tokenizer.decode(tokens) == text
    (special,) = Texts(tokenizer, special_tokens=True)([text])
    if "</s>" in pieces:
        assert tokenizer.eos_token_id in special
    if special_ids(tokenizer).isdisjoint(special):
        assert tokens == special


def test_a_special_token_that_the_normalizer_makes() -> None:
    tokenizer = unigram_tokenizer()
    (tokens,) = Texts(tokenizer)(["an ＜/s＞"])
    assert special_ids(tokenizer).isdisjoint(tokens)
    assert tokenizer.decode(tokens) == "an </s>"


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_them_have_the_tokenizers_tokens(kind: str) -> None:
    """Also next to others, and read by the copy: renaming special tokens changes nothing else."""
    tokenizer = KINDS[kind]()
    texts, draw = Texts(tokenizer), random.Random(0)
    plain = ["".join(draw.choices(CHARACTERS.replace("<", ""), k=draw.randrange(1, 40))) + "mean" for _ in range(50)]
    expected = tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert texts([*plain, "a</s>"])[:-1] == expected
    assert [texts._as_text(text) for text in plain] == expected


@pytest.mark.parametrize("pad", ["an", "a"])
def test_a_special_token_that_text_itself_becomes(pad: str) -> None:
    """An ordinary token that was made the padding token, as some saved tokenizers have it."""
    tokenizer = sentencepiece_tokenizer()
    expected = tokenizer(["man an a"], add_special_tokens=False)["input_ids"]
    tokenizer.add_special_tokens({"pad_token": pad})
    assert Texts(tokenizer)(["man an a"]) == expected


def test_the_names_of_words() -> None:
    tokenizer = word_tokenizer(["a", " a"], bos=True, eos=True)
    assert Texts(tokenizer)(["a </s>", "a <unk>", "a a"]) == [[3, 0], [3, 0], [3, 4]]


@pytest.mark.parametrize("roberta", [False, True])
def test_only_the_template_holds_the_mask(roberta: bool) -> None:
    tokenizer = masking_tokenizer(["a", "b"], roberta)
    mask, name = tokenizer.mask_token_id, tokenizer.mask_token
    texts, a, b = Texts(tokenizer), *tokenizer.convert_tokens_to_ids(["a", "b"])
    assert texts.around_mask("a", " b") == [a, mask, b]
    tokens = texts.around_mask(f"a {name} {tokenizer.sep_token}", f" b {name}")
    assert [token for token in tokens if token != tokenizer.unk_token_id] == [a, mask, b]
    assert Texts(tokenizer, special_tokens=True).around_mask(f"a {name}", " b") == [a, mask, mask, b]


def test_a_slow_tokenizer_refuses_what_it_cannot_read_as_text() -> None:
    class Slow(type(word_tokenizer(["a"]))):  # type: ignore[misc]
        is_fast = False

    tokenizer = word_tokenizer(["a"], eos=True)
    tokenizer.__class__ = Slow
    assert Texts(tokenizer)(["a", "a b"]) == [[2], [2, tokenizer.unk_token_id]]
    with pytest.raises(ValueError, match=r"'a</s>' holds a special token's name, which Slow cannot read as text; spe"):
        Texts(tokenizer)(["a</s>"])


def test_a_task_that_writes_special_tokens_says_so() -> None:
    tokenizer = byte_tokenizer()
    chat = "{text}<|im_end|>\n"
    for keys in (
        {"prompt": chat, "candidates": ["a", "b"]},
        {"prompt": "{text}\n", "candidates": ["a", "b<|im_end|>"]},
        {"prompt": "{text}\n", "target": "text", "stop": "<|im_end|>"},
    ):
        with pytest.raises(
            ValueError, match=r"'own' holds the tokenizer's special token '<\|im_end\|>' in .* data.special_tokens: t"
        ):
            refuse_special_tokens(make_task(keys), tokenizer)
    refuse_special_tokens(get_task("demo"), tokenizer)
    refuse_special_tokens(
        make_task({"prompt": "{text}<mask>", "candidates": ["a", "b"]}), masking_tokenizer(["a"], True)
    )
