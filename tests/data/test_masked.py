import logging

import pytest
from transformers import PreTrainedTokenizerFast

from smezo_pl.data.encoding import MaskedLMEncoder
from smezo_pl.tasks import Example
from tests.data.made_tokenizers import masking_tokenizer, word_tokenizer

WORDS = ["the", "movie", "was", "fine", "long", "It", ".", ",", "great", "terrible", "a", "b", "c", "d", "e", "f"]


def example(prompt: str, *candidates: str) -> Example:
    return Example(prompt, candidates or (" terrible", " great"), 1, (1,), 7)


@pytest.mark.parametrize("roberta", [False, True])
def test_the_mask_stands_where_the_word_belongs(roberta: bool) -> None:
    tokenizer = masking_tokenizer(WORDS, roberta)
    (encoded,) = MaskedLMEncoder(tokenizer).encode([example("the movie was fine It was<mask>.")])
    tokens = tokenizer.convert_ids_to_tokens(list(encoded.prompt))
    start, end = ("<s>", "</s>") if roberta else ("[CLS]", "[SEP]")
    assert tokens == [start, *["the", "movie", "was", "fine", "It", "was"], tokenizer.mask_token, ".", end]
    assert encoded.prompt[encoded.mask_position] == tokenizer.mask_token_id
    assert tokenizer.convert_ids_to_tokens([c[0] for c in encoded.candidates]) == ["terrible", "great"]
    assert (encoded.label, encoded.correct, encoded.index, encoded.cut) == (1, (1,), 7, 0)
    assert encoded.bidirectional


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        ("a b c d It was<mask>.", "d It was [MASK] ."),
        ("a b c d It was<mask>.", "was [MASK] ."),
        ("<mask>: a b c d e f", "[MASK] [UNK] a b"),
        ("a b<mask> c d e f", "[MASK] c d"),
    ],
)
def test_long_texts_keep_the_mask(prompt: str, kept: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = masking_tokenizer(WORDS)
    most = len(kept.split()) + 2
    with caplog.at_level(logging.WARNING, "smezo_pl"):
        (encoded,) = MaskedLMEncoder(tokenizer, most).encode([example(prompt)], "file.csv")
    assert tokenizer.convert_ids_to_tokens(list(encoded.prompt)) == ["[CLS]", *kept.split(), "[SEP]"]
    assert encoded.prompt[encoded.mask_position] == tokenizer.mask_token_id
    total = len(tokenizer(prompt.replace("<mask>", "[MASK]"), add_special_tokens=False)["input_ids"])
    assert encoded.cut == total - len(kept.split())
    assert f"file.csv: 1 of 1 examples are longer than max_length {most} and were cut, by {encoded.cut}" in caplog.text


def test_the_tokenizers_longest_text_holds() -> None:
    tokenizer = masking_tokenizer(WORDS)
    tokenizer.model_max_length = 6
    assert MaskedLMEncoder(tokenizer, 100).max_length == 6
    with pytest.raises(ValueError, match="max_length 3 leaves no room for a mask and a token beside it"):
        MaskedLMEncoder(tokenizer, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (example("the movie was fine"), r"x, row 7: the text must hold <mask> once, got 'the movie was fine'"),
        (example("<mask> movie<mask>"), r"x, row 7: the text must hold <mask> once"),
        (example("[MASK] a<mask>"), r"x, row 7: the text holds the mask token itself, got '\[MASK\] a<mask>'"),
        (
            example("a<mask>", " not known", " great"),
            r"candidate ' not known' is '\[UNK\]\|\[UNK\]' with this tokenizer",
        ),
        (example("a<mask>", " bad", " great"), r"candidate ' bad' is '\[UNK\]' .* but a mask stands for one token"),
        (example("a<mask>", " great", "great"), r"two of the candidates \[' great', 'great'\] are the same token"),
    ],
)
def test_what_is_refused(wrong: Example, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedLMEncoder(masking_tokenizer(WORDS)).encode([wrong], "x")


def test_a_tokenizer_without_a_mask() -> None:
    tokenizer: PreTrainedTokenizerFast = word_tokenizer(["a"])
    with pytest.raises(ValueError, match="has no mask token, so it is not that of a masked language model"):
        MaskedLMEncoder(tokenizer)
