"""Synthetic tokenizers."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def word_tokenizer(
    words: Sequence[str], bos: bool = False, eos: bool = False, pad: bool = False
) -> PreTrainedTokenizerFast:
    """A token a word; a space is part of the word after it (``Ġwas``), a newline a token."""
    special = [name for name, wanted in (("<s>", bos), ("</s>", eos), ("<pad>", pad)) if wanted]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=Regex(r" ?[^\s]+|\n| "), behavior="isolated")
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, vocabulary[name]) for name in special if name != "<pad>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        pad_token="<pad>" if pad else None,
    )


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Characters and one merge, ``a`` with ``b``, that may happen across any boundary."""
    vocabulary = {character: i for i, character in enumerate(["a", "b", "c", "\n", "ab"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])))


def masking_tokenizer(words: Sequence[str], roberta: bool = False) -> PreTrainedTokenizerFast:
    """A token a word, with or without the space before it; a mask; special tokens at both ends."""
    names = ["<s>", "<pad>", "</s>", "<unk>"] if roberta else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    mask = "<mask>" if roberta else "[MASK]"
    vocabulary = {token: i for i, token in enumerate([*names, *dict.fromkeys(words), mask])}
    start, end = ("<s>", "</s>") if roberta else ("[CLS]", "[SEP]")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>" if roberta else "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(name, vocabulary[name]) for name in (start, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=start,
        sep_token=end,
        mask_token=mask,
        pad_token="<pad>" if roberta else "[PAD]",
        unk_token="<unk>" if roberta else "[UNK]",
    )
