import logging

import pytest
from transformers import PreTrainedTokenizerFast

from smezo_pl.data import Encoder, padding_id
from smezo_pl.data.encoding import Encoded, MaskedLMEncoder, fed_rows
from smezo_pl.tasks import Example, get_task, make_example, make_task
from tests.data.synthetic_tokenizers import masking_tokenizer, merging_tokenizer, word_tokenizer

WORDS = ["a", " a", " b", " c", " d", "e", "\n"]


def example(prompt: str, *candidates: str, label: int = 0, index: int = 0) -> Example:
    return Example(prompt, candidates, label, (label,), index)


def ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> tuple[int, ...]:
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


def test_prompt_and_candidates() -> None:
    tokenizer = word_tokenizer(WORDS)
    (encoded,) = Encoder(tokenizer).encode([example("a b", " c", " d d", label=1, index=9)])
    assert encoded == Encoded(ids(tokenizer, "a", " b"), (ids(tokenizer, " c"), ids(tokenizer, " d", " d")), 1, (1,), 9)
    assert encoded.length == 3


@pytest.mark.parametrize("eos", [False, True])
def test_special_tokens_at_the_start_alone(eos: bool) -> None:
    tokenizer = word_tokenizer(WORDS, bos=True, eos=eos)
    assert tokenizer("a")["input_ids"] == list(ids(tokenizer, "<s>", "a", *["</s>"] * eos))
    (encoded,) = Encoder(tokenizer).encode([example("a b", " c", " d")])
    assert encoded.prompt == ids(tokenizer, "<s>", "a", " b")
    assert encoded.candidates == (ids(tokenizer, " c"), ids(tokenizer, " d"))


def test_a_merge_across_the_boundary_does_not_change_the_prompt() -> None:
    tokenizer = merging_tokenizer()
    assert tokenizer("ca" + "bc")["input_ids"] == list(ids(tokenizer, "c", "ab", "c"))
    (encoded,) = Encoder(tokenizer).encode([example("ca", "bc", "cab")])
    assert encoded.prompt == ids(tokenizer, "c", "a")
    assert encoded.candidates == (ids(tokenizer, "b", "c"), ids(tokenizer, "c", "ab"))


def test_the_first_word_after_a_merge_gets_no_space_put_before_it() -> None:
    """SentencePiece puts a space before a text; a candidate in the middle of one must not get it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["▁", "a", "b", "ab", "\n", "▁a", "▁ab"])}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    (encoded,) = Encoder(tokenizer).encode([example("ba", "b", "a")])
    assert encoded.prompt == ids(tokenizer, "▁", "b", "a")
    assert encoded.candidates == (ids(tokenizer, "b"), ids(tokenizer, "a"))


def test_candidates_that_the_tokenizer_cannot_tell_apart() -> None:
    wrong = example("a", " c", " x", " b", " y", index=5)
    with pytest.raises(
        ValueError, match=r"^file, row 5: candidates ' x' and ' y' are both '<unk>' with this tokenizer"
    ):
        Encoder(word_tokenizer(WORDS)).encode([wrong], "file")


def test_equal_candidates_are_not_the_tokenizers_affair() -> None:
    (encoded,) = Encoder(word_tokenizer(WORDS)).encode([example("a", " c", " b", " c")])
    assert encoded.candidates[0] == encoded.candidates[2]


def test_special_tokens_of_a_column_are_text_and_of_the_task_with_special_tokens() -> None:
    tokenizer = word_tokenizer(["a", " a", " b", " c", "</s>x"], bos=True, eos=True)
    shown = example("a </s>", " b", " c")
    (encoded,) = Encoder(tokenizer).encode([shown])
    assert encoded.prompt == ids(tokenizer, "<s>", "a", "<unk>")
    (encoded,) = Encoder(tokenizer, special_tokens=True).encode([shown])
    assert tokenizer.eos_token_id in encoded.prompt


def test_a_candidate_without_tokens() -> None:
    tokenizer = merging_tokenizer()  # no unknown token: other characters vanish
    with pytest.raises(ValueError, match=r"dev.parquet, row 5: candidate 'x' has no tokens of its own"):
        Encoder(tokenizer).encode([example("a", "b", "x", index=5)], "dev.parquet")


def test_a_prompt_without_tokens() -> None:
    with pytest.raises(ValueError, match=r"row 5: prompt 'xyz' has no tokens"):
        Encoder(merging_tokenizer()).encode([example("xyz", "b", "c", index=5)])


@pytest.mark.parametrize("bos", [False, True])
def test_the_cut_keeps_the_start_token_and_the_answers(bos: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer(WORDS, bos=bos)
    long, short = example("e b b b a", " c", " d d", index=3), example("e", " c", " d")
    with caplog.at_level(logging.INFO):
        cut, whole = Encoder(tokenizer, max_length=5 + bos).encode([long, short], "train.parquet")
    # Three tokens of prompt beside the longest candidate's two; the shorter candidate gets the same prompt.
    assert cut.prompt == ids(tokenizer, *["<s>"] * bos, " b", " b", " a")
    assert cut.candidates == (ids(tokenizer, " c"), ids(tokenizer, " d", " d"))
    assert cut.cut == 2
    assert whole.cut == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"train.parquet: 1 of 2 examples are longer than max_length {5 + bos} and were cut on the left,"
        " by 2 tokens at most"
    ]


def test_an_example_of_exactly_max_length_is_whole(caplog: pytest.LogCaptureFixture) -> None:
    (encoded,) = Encoder(word_tokenizer(WORDS, bos=True), max_length=4).encode([example("a b", " c", " d")])
    assert encoded.cut == 0
    assert not caplog.records


def test_max_length_without_room_for_the_prompt() -> None:
    with pytest.raises(ValueError, match="max_length 3 leaves no room for a prompt before a candidate of 3 tokens"):
        Encoder(word_tokenizer(WORDS), max_length=3).encode([example("a b", " c", " d d d")])


@pytest.mark.parametrize("max_length", [1, 0, -1])
def test_max_length_out_of_range(max_length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length must be at least 2, got {max_length}"):
        Encoder(word_tokenizer(WORDS), max_length)


def test_the_tokenizers_own_limit_counts(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.model_max_length = 3
    with caplog.at_level(logging.INFO):
        encoder = Encoder(tokenizer, max_length=2048)
        (encoded,) = encoder.encode([example("a b b b", " c", " d")])
    assert encoded.cut == 2
    assert "max_length 2048 lowered to 3" in caplog.text


def test_encoding_in_parts_is_the_same() -> None:
    tokenizer = word_tokenizer(WORDS)
    examples = [example("a" + " b" * (i % 7), " c", " d" * (1 + i % 3), index=i) for i in range(600)]
    encoder = Encoder(tokenizer)
    assert encoder.encode(examples) == [encoder.encode([one])[0] for one in examples]


def test_padding_token() -> None:
    tokenizer = word_tokenizer(WORDS, eos=True, pad=True)
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    assert padding_id(word_tokenizer(WORDS, eos=True)) == 1
    without = word_tokenizer(WORDS)
    assert padding_id(without) == 0
    assert without.pad_token is None


@pytest.mark.parametrize(
    ("candidates", "rows"),
    [
        ([(1,), (2,)], [()]),
        ([(1, 2), (1, 3)], [(1,)]),
        ([(1,), (2, 3)], [(2,)]),
        ([(1, 2, 3), (1, 4), (5, 6), (7,)], [(1, 2), (5,)]),
        ([(1, 2), (3, 4), (1, 5)], [(1,), (3,)]),
    ],
)
def test_rows_are_shared_where_one_is_a_prefix_of_the_other(
    candidates: list[tuple[int, ...]], rows: list[tuple[int, ...]]
) -> None:
    assert fed_rows(candidates) == rows


def test_show_marks_the_scored_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tiny_tokenizer)
    task = get_task("sst2")
    (encoded,) = encoder.encode([make_example(task, {"sentence": "the movie", "label": 1})])
    shown = encoder.show(encoded)
    assert shown.startswith("<s>the movie It was⟦")
    assert shown.endswith("⟧*")
    assert shown.replace("|", "") == "<s>the movie It was⟦ terrible⟧ ⟦ great⟧*"


MASKED_WORDS = [*("the", "movie", "was", "fine", "long", "It", ".", ",", "great", "terrible"), *"abcdef"]


def masked(prompt: str, *candidates: str) -> Example:
    return Example(prompt, candidates or (" terrible", " great"), 1, (1,), 7, mask_at=prompt.rfind("<mask>"))


@pytest.mark.parametrize("roberta", [False, True])
def test_the_mask_is_where_the_word_belongs(roberta: bool) -> None:
    tokenizer = masking_tokenizer(MASKED_WORDS, roberta)
    (encoded,) = MaskedLMEncoder(tokenizer).encode([masked("the movie was fine It was<mask>.")])
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
    tokenizer = masking_tokenizer(MASKED_WORDS)
    most = len(kept.split()) + 2
    with caplog.at_level(logging.WARNING, "smezo_pl"):
        (encoded,) = MaskedLMEncoder(tokenizer, most).encode([masked(prompt)], "file.csv")
    assert tokenizer.convert_ids_to_tokens(list(encoded.prompt)) == ["[CLS]", *kept.split(), "[SEP]"]
    assert encoded.prompt[encoded.mask_position] == tokenizer.mask_token_id
    total = len(tokenizer(prompt.replace("<mask>", "[MASK]"), add_special_tokens=False)["input_ids"])
    assert encoded.cut == total - len(kept.split())
    assert f"file.csv: 1 of 1 examples are longer than max_length {most} and were cut, by {encoded.cut}" in caplog.text


def test_the_tokenizers_longest_text_holds() -> None:
    tokenizer = masking_tokenizer(MASKED_WORDS)
    tokenizer.model_max_length = 6
    assert MaskedLMEncoder(tokenizer, 100).max_length == 6
    with pytest.raises(ValueError, match="max_length 3 leaves no room for a mask and a token beside it"):
        MaskedLMEncoder(tokenizer, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (masked("the movie was fine"), r"x, row 7: the text must hold <mask> at mask_at, got 'the movie was fine'"),
        (
            masked("a<mask>", " not known", " great"),
            r"candidate ' not known' is '\[UNK\]\|\[UNK\]' with this tokenizer",
        ),
        (
            masked("a<mask>", " bad", " great"),
            r"candidate ' bad' is '\[UNK\]' .* but a mask stands for one token",
        ),
        (
            masked("a<mask>", " great", "great"),
            r"x, row 7: candidates ' great' and 'great' are both 'great' with this tokenizer",
        ),
    ],
)
def test_unusable_masked_examples(wrong: Example, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedLMEncoder(masking_tokenizer(MASKED_WORDS)).encode([wrong], "x")


@pytest.mark.parametrize("roberta", [False, True])
def test_a_mask_in_a_column_is_text(roberta: bool) -> None:
    tokenizer = masking_tokenizer(MASKED_WORDS, roberta)
    task = make_task({"prompt": "{text} It was<mask>. {text}", "candidates": [" terrible", " great"]})
    for name in ("<mask>", "[MASK]", tokenizer.sep_token):
        row = make_example(task, {"text": f"the movie {name}", "label": 1})
        (encoded,) = MaskedLMEncoder(tokenizer).encode([row])
        tokens = tokenizer.convert_ids_to_tokens(list(encoded.prompt))
        assert (tokens.count(tokenizer.mask_token), tokens.count(tokenizer.sep_token)) == (1, 1)
        assert tokens[encoded.mask_position - 1 : encoded.mask_position + 2] == ["was", tokenizer.mask_token, "."]
        with pytest.raises(ValueError, match="the text holds the mask token itself"):
            MaskedLMEncoder(tokenizer, special_tokens=True).encode([masked(f"{tokenizer.mask_token} a<mask>")])


def test_a_tokenizer_without_a_mask() -> None:
    tokenizer: PreTrainedTokenizerFast = word_tokenizer(["a"])
    with pytest.raises(ValueError, match="has no mask token, so it is not that of a masked language model"):
        MaskedLMEncoder(tokenizer)
