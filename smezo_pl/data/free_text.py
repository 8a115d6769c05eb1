"""Free answers between text and tokens: where generation stops, and what was said."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> tuple[int, ...]:
    """The tokens that end an answer: end of sequence, and every token whose text holds one of the stop texts.

    A tokenizer may have many tokens with a newline in them. A stop text that only several tokens together make up stops
    nothing; the answer is cut at it all the same.
    """
    ids = range(len(tokenizer))
    texts = tokenizer.batch_decode([[number] for number in ids])
    found = {number for number, text in zip(ids, texts, strict=True) if any(end in text for end in stop)}
    if isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))


def answer_texts(
    tokenizer: PreTrainedTokenizerBase, tokens: Tensor, stop_ids: Sequence[int], stop: Sequence[str]
) -> list[str]:
    """What was generated, up to the first stop text, without white space at either end.

    Args:
        tokenizer: The tokenizer.
        tokens: int64 ``[R, max_new_tokens]``; what follows a row's first stop token is ignored.
        stop_ids: Tokens that end an answer.
        stop: Texts that end an answer.
    """
    ends = set(stop_ids)
    rows = []
    for row in tokens.tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:end])
    answers = []
    for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
        places = [place for place in (text.find(end) for end in stop) if place >= 0]
        answers.append(text[: min(places, default=len(text))].strip())
    return answers
