"""From text to tokens: prompts and candidates for causal and masked LMs, and answers back to text."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from smezo_pl.data.packing import tree_size
from smezo_pl.data.tokens import Texts, Tokens, special_affixes, special_token
from smezo_pl.tasks import Example
from smezo_pl.tasks.task import MASK

logger = logging.getLogger(__name__)

_CHUNK = 256  # examples that are tokenized at once: bounds the memory of the tokenizer's own records


@dataclass(frozen=True)
class Encoded:
    """An example as tokens."""

    prompt: Tokens  # special tokens at the start included
    candidates: tuple[Tokens, ...]  # at least one token each
    label: int  # index of the gold candidate, -1 if unknown
    correct: tuple[int, ...]  # indices of all candidates that count as correct
    index: int  # row of the dataset
    cut: int = 0  # prompt tokens left out because the example was too long
    example: Example | None = field(default=None, compare=False)
    generated_after: Tokens = ()  # the prompt with room left for max_new_tokens; empty where nothing is generated
    calibration: tuple[Tokens, tuple[Tokens, ...]] | None = None  # the content-free prompt, and the candidates after it
    mask_position: int = -1  # where a masked LM predicts every candidate; -1 for causal LMs: after the prompt

    @property
    def bidirectional(self) -> bool:
        """Whether it is for a masked LM, which reads the text on both sides of the mask."""
        return self.mask_position >= 0

    @cached_property
    def tokens(self) -> int:
        """Tokens that are fed when candidates share their common prefixes."""
        return max(len(self.prompt) + tree_size(tokens[:-1] for tokens in self.candidates), len(self.generated_after))

    @property
    def length(self) -> int:
        """Tokens of the longest text that is fed."""
        return max(len(self.prompt) + max(map(len, self.candidates), default=1) - 1, len(self.generated_after))

    @property
    def rows(self) -> int:
        """Different texts that are fed, at least 1; a prefix of another one does not count."""
        return max(1, len(fed_rows(self.candidates)))


def fed_rows(candidates: Sequence[Tokens]) -> list[Tokens]:
    """What is fed after the prompt, one entry per text: candidates without their last tokens and without prefixes."""
    rows: list[Tokens] = []
    for fed in sorted((tokens[:-1] for tokens in candidates), key=len, reverse=True):
        if not any(row[: len(fed)] == fed for row in rows):
            rows.append(fed)
    return rows


def _last(tokens: list[int], count: int) -> list[int]:
    return tokens[max(0, len(tokens) - count) :]


def _lowered(max_length: int, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> int:
    limits = {"the tokenizer's longest text": tokenizer.model_max_length, "the model's positions": max_positions}
    for what, limit in limits.items():
        if limit is not None and limit < max_length:
            logger.info("max_length %d lowered to %d, %s", max_length, limit, what)
            max_length = int(limit)
    return max_length


def _refuse_equal(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], candidates: Sequence[Tokens], where: str
) -> None:
    """Refuse different texts with the same tokens, which no model can tell apart."""
    if len(set(candidates)) == len(set(texts)):
        return
    first: dict[Tokens, str] = {}
    for text, tokens in zip(texts, candidates, strict=True):
        if first.setdefault(tokens, text) != text:
            parts = "|".join(map(str, tokenizer.convert_ids_to_tokens(list(tokens))))
            raise ValueError(
                f"{where}: candidates {first[tokens]!r} and {text!r} are both {parts!r} with this tokenizer, so the"
                " model cannot tell them apart: choose other words"
            )


def _log_cuts(encoded: Sequence[Encoded], origin: str, max_length: int, where: str) -> None:
    cut = [example.cut for example in encoded if example.cut]
    if cut:
        logger.warning(
            "%s: %d of %d examples are longer than max_length %d and were cut%s, by %d tokens at most",
            origin, len(cut), len(encoded), max_length, where, max(cut),
        )  # fmt: skip


class Encoder:
    """Turns examples into tokens for a causal LM.

    A prompt's tokens are those of the prompt alone, after the special tokens that the tokenizer puts at the start of a
    text; those it puts at the end are left out, as the text continues. A candidate's tokens are what the joint
    tokenization of prompt and candidate adds. Where a merge across the boundary would change the prompt's tokens, the
    candidate is tokenized after a newline instead, so that all candidates of an example follow the same prompt.

    An example longer than ``max_length`` keeps the special tokens at the start and loses the prompt's first tokens,
    never an answer's; all its candidates keep the same prompt, cut for the longest of them.

    Args:
        tokenizer: Any tokenizer of transformers. It is not changed, and needs no padding token.
        max_length: Most tokens of a prompt and a candidate together, at least 2.
        max_new_tokens: Tokens that are generated after a prompt, which is cut to leave room for them; 0: none are.
        calibrated: Whether content-free prompts are encoded too, for the examples that have one.
        special_tokens: Whether the names of special tokens in a text are read as the tokens; otherwise they are text.
        max_positions: Most tokens that the model has positions for, None without such a limit; it lowers
            ``max_length``, as does the tokenizer's longest text.

    Raises:
        ValueError: If ``max_length`` is too small.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 2048,
        max_new_tokens: int = 0,
        calibrated: bool = False,
        special_tokens: bool = False,
        max_positions: int | None = None,
    ) -> None:
        if not max_length >= 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        self.tokenizer = tokenizer
        self.texts = Texts(tokenizer, special_tokens)
        self.max_length = _lowered(max_length, tokenizer, max_positions)
        self.start, _ = special_affixes(tokenizer)
        if max_new_tokens and not self.max_length - max_new_tokens - len(self.start) >= 1:
            raise ValueError(
                f"max_length {self.max_length} leaves no room for a prompt before max_new_tokens {max_new_tokens}"
            )
        self.max_new_tokens = max_new_tokens
        self.calibrated = calibrated

    def encode(self, examples: Sequence[Example], origin: str = "example") -> list[Encoded]:
        """Tokens of the examples, in their order; how many had to be cut is logged.

        Raises:
            ValueError: If a candidate or a prompt has no tokens, two candidates have the same, or a candidate leaves no
                room for the prompt.
        """
        encoded: list[Encoded] = []
        for first in range(0, len(examples), _CHUNK):
            encoded.extend(self._encode(examples[first : first + _CHUNK], origin))
        _log_cuts(encoded, origin, self.max_length, " on the left")
        return encoded

    def show(self, example: Encoded) -> str:
        """The prompt as the model reads it, and each candidate's tokens in brackets, a correct one's with a star."""
        decode = self.tokenizer.decode
        answers = (
            "⟦" + "|".join(str(decode([token])) for token in tokens) + "⟧" + "*" * (index in example.correct)
            for index, tokens in enumerate(example.candidates)
        )
        return str(decode(list(example.prompt))) + " ".join(answers)

    def _encode(self, examples: Sequence[Example], origin: str) -> Iterator[Encoded]:
        prompts = self.texts([example.prompt for example in examples])
        joint = iter(self.texts([example.prompt + text for example in examples for text in example.candidates]))
        for example, prompt in zip(examples, prompts, strict=True):
            where = f"{origin}, {example.where}"
            if not self.start and not prompt:
                raise ValueError(f"{where}: prompt {example.prompt!r} has no tokens with this tokenizer")
            candidates = self._candidates(example.candidates, prompt, joint, where)
            longest = max(map(len, candidates), default=1)
            room = self.max_length - len(self.start) - longest
            if room < min(1, len(prompt)):
                raise ValueError(
                    f"{where}: max_length {self.max_length} leaves no room for a prompt before a candidate of"
                    f" {longest} tokens"
                )
            kept = _last(prompt, room)
            before = _last(prompt, self.max_length - len(self.start) - self.max_new_tokens)
            yield Encoded(
                (*self.start, *kept),
                candidates,
                example.label,
                example.correct,
                example.index,
                len(prompt) - len(kept),
                example,
                (*self.start, *before) if self.max_new_tokens else (),
                self._calibration(example, where) if self.calibrated else None,
            )

    def _candidates(
        self, texts: Sequence[str], prompt: list[int], joint: Iterator[list[int]], where: str
    ) -> tuple[Tokens, ...]:
        """Each candidate's own tokens, from the tokens of the prompt and of prompt and candidate together."""
        candidates = []
        for text in texts:
            tokens = next(joint)
            own = tokens[len(prompt) :] if tokens[: len(prompt)] == prompt else self._unmerged(text)
            if not own:
                raise ValueError(f"{where}: candidate {text!r} has no tokens of its own with this tokenizer")
            candidates.append(tuple(own))
        _refuse_equal(self.tokenizer, texts, candidates, where)
        return tuple(candidates)

    def _unmerged(self, candidate: str) -> list[int]:
        """A candidate's tokens where its first must not merge with what comes before it."""
        # After a newline, not on its own: some tokenizers put a space before a text's first word.
        before, both, alone = self.texts(["\n", "\n" + candidate, candidate])
        return both[len(before) :] if both[: len(before)] == before else alone

    def _calibration(self, example: Example, where: str) -> tuple[Tokens, tuple[Tokens, ...]] | None:
        text = example.calibration
        if text is None:
            return None
        prompt, *joint = self.texts([text, *(text + candidate for candidate in example.candidates)])
        candidates = self._candidates(example.candidates, prompt, iter(joint), where)
        start = self.start
        if not start and not prompt:  # the first token needs something to be predicted after
            token = special_token(self.tokenizer, "bos", "eos", "pad")
            if token is None:
                name = type(self.tokenizer).__name__
                raise ValueError(f"calibration after an empty prompt needs a special token, and {name} has none")
            start = (token,)
        room = self.max_length - len(start) - max(map(len, candidates))
        return (*start, *_last(prompt, max(room, 0))), candidates


def encode_each(
    encode: Callable[[Sequence[Example]], list[Encoded]], examples: Sequence[Example], failed: dict[int, str]
) -> list[Encoded]:
    """The tokens of all examples that have some; why the others have none goes into ``failed`` by their index.

    Raises:
        ValueError: If none has.
    """
    try:
        return encode(examples)
    except ValueError as error:
        if len(examples) == 1:
            failed[examples[0].index] = str(error)
            return []
        half = len(examples) // 2
        encoded = encode_each(encode, examples[:half], failed) + encode_each(encode, examples[half:], failed)
        if not encoded and len(failed) == len(examples):
            raise
        return encoded


class MaskedLMEncoder:
    """Turns examples whose prompts hold ``<mask>`` into tokens for a masked LM.

    The tokenizer's own mask token replaces ``<mask>``, and its special tokens are at both ends. A candidate is one
    token: that of the word after a space. A text longer than ``max_length`` loses tokens at its start, and, if the mask
    is near it, at its end; never special tokens, which ``max_length`` counts too, and never the mask.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 2048,
        special_tokens: bool = False,
        max_positions: int | None = None,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} has no mask token, so it is not that of a masked language model"
            )
        self.tokenizer = tokenizer
        self.texts = Texts(tokenizer, special_tokens)
        self.max_length = _lowered(max_length, tokenizer, max_positions)
        self.start, self.end = special_affixes(tokenizer)
        self.room = self.max_length - len(self.start) - len(self.end)
        if self.room < 2:
            raise ValueError(f"max_length {self.max_length} leaves no room for a mask and a token beside it")

    def encode(self, examples: Sequence[Example], origin: str = "example") -> list[Encoded]:
        """Tokens of the examples, in their order; how many had to be cut is logged."""
        words: dict[tuple[str, ...], tuple[Tokens, ...]] = {}
        encoded = []
        for example in examples:
            where = f"{origin}, {example.where}"
            if example.candidates not in words:
                words[example.candidates] = self._words(example.candidates, where)
            before, after = example.prompt[: example.mask_at], example.prompt[example.mask_at + len(MASK) :]
            if before + MASK + after != example.prompt:
                raise ValueError(f"{where}: the text must hold {MASK} at mask_at, got {example.prompt!r}")
            text = self.texts.around_mask(before, after)
            if text.count(self.tokenizer.mask_token_id) != 1:
                raise ValueError(f"{where}: the text holds the mask token itself, got {example.prompt!r}")
            position = text.index(self.tokenizer.mask_token_id)
            first = min(max(0, len(text) - self.room), position)
            kept = text[first : first + self.room]
            encoded.append(
                Encoded(
                    (*self.start, *kept, *self.end),
                    words[example.candidates],
                    example.label,
                    example.correct,
                    example.index,
                    len(text) - len(kept),
                    example,
                    mask_position=len(self.start) + position - first,
                )
            )
        _log_cuts(encoded, origin, self.max_length, "")
        return encoded

    def _words(self, candidates: Sequence[str], where: str) -> tuple[Tokens, ...]:
        words = []
        for text in candidates:
            (tokens,) = self.texts([" " + text.strip()])
            if len(tokens) != 1 or tokens[0] == self.tokenizer.unk_token_id:
                parts = "|".join(self.tokenizer.convert_ids_to_tokens(tokens))
                raise ValueError(
                    f"{where}: candidate {text!r} is {parts!r} with this tokenizer, but a mask stands for one token"
                    " that it knows: choose another word"
                )
            words.append(tuple(tokens))
        _refuse_equal(self.tokenizer, candidates, words, where)
        return tuple(words)
