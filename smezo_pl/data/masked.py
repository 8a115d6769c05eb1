"""From text to tokens for models that fill in a mask."""

import logging
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from smezo_pl.data.encoding import Encoded
from smezo_pl.tasks import Example
from smezo_pl.tasks.task import MASK

logger = logging.getLogger(__name__)


class MaskedEncoder:
    """Turns examples whose prompts hold ``<mask>`` into tokens.

    The tokenizer's own mask token takes the place of ``<mask>``, and its special tokens stand at both ends. A candidate
    is one token: that of the word after a space. A text longer than ``max_length`` loses tokens at its start, and, if
    the mask stands near it, at its end; never special tokens, and never the mask.

    Args:
        tokenizer: A tokenizer with a mask token.
        max_length: Most tokens of a text, special ones included.

    Raises:
        ValueError: If the tokenizer has no mask token, or ``max_length`` leaves no room for a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 2048) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} has no mask token, so it is not that of a masked language model"
            )
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        if self.max_length < max_length:
            logger.info("max_length %d lowered to %d, the tokenizer's longest text", max_length, self.max_length)
        probe = "It was"
        plain, full = self._ids(probe), tokenizer(probe, verbose=False)["input_ids"]
        first = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), None)
        if first is None:
            raise ValueError(f"tokenizer {type(tokenizer).__name__} changes a text's tokens when it adds special ones")
        self.start, self.end = tuple(full[:first]), tuple(full[first + len(plain) :])
        if self.max_length < len(self.start) + len(self.end) + 2:
            raise ValueError(f"max_length {max_length} leaves no room for a mask and a token beside it")

    def encode(self, examples: Sequence[Example], origin: str = "example") -> list[Encoded]:
        """Tokens of the examples, in their order; what had to be cut is counted and said in the log.

        Raises:
            ValueError: If a text does not hold exactly one mask, a label word is not one token, or two are the same.
        """
        encoded = list(self._encode(examples, origin))
        cut = [example.cut for example in encoded if example.cut]
        if cut:
            logger.warning(
                "%s: %d of %d examples are longer than max_length %d and were cut, by %d tokens at most",
                origin, len(cut), len(encoded), self.max_length, max(cut),
            )  # fmt: skip
        return encoded

    def _encode(self, examples: Sequence[Example], origin: str) -> Iterator[Encoded]:
        words: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}
        for example in examples:
            where = f"{origin}, {example.where}"
            if example.candidates not in words:
                words[example.candidates] = self._words(example.candidates, where)
            if example.prompt.count(MASK) != 1:
                raise ValueError(f"{where}: the text must hold {MASK} once, got {example.prompt!r}")
            text = self._ids(example.prompt.replace(MASK, self.tokenizer.mask_token))
            if text.count(self.tokenizer.mask_token_id) != 1:
                raise ValueError(f"{where}: the text holds the mask token itself, got {example.prompt!r}")
            place = text.index(self.tokenizer.mask_token_id)
            room = self.max_length - len(self.start) - len(self.end)
            first = min(max(0, len(text) - room), place)
            kept = text[first : first + room]
            yield Encoded(
                (*self.start, *kept, *self.end),
                words[example.candidates],
                example.label,
                example.correct,
                example.index,
                len(text) - len(kept),
                example,
                mask=len(self.start) + place - first,
            )

    def _words(self, candidates: Sequence[str], where: str) -> tuple[tuple[int, ...], ...]:
        words = []
        for text in candidates:
            tokens = self._ids(" " + text.strip())
            if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
                parts = "|".join(self.tokenizer.convert_ids_to_tokens(tokens))
                raise ValueError(
                    f"{where}: candidate {text!r} is {parts!r} with this tokenizer, but a mask stands for one token"
                    " that it knows: choose another word"
                )
            words.append(tuple(tokens))
        if len(set(words)) < len(words):
            raise ValueError(f"{where}: two of the candidates {list(candidates)} are the same token")
        return tuple(words)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
