"""Texts as tokens: a user's text never becomes a special token by what it says."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from smezo_pl.tasks import GeneratedAnswer, Task
from smezo_pl.tasks.task import MASK

Tokens = tuple[int, ...]


class Texts:
    """The tokens of texts, without the special tokens that a tokenizer puts around a text.

    The names of special tokens in a text (``</s>``, ``<|im_end|>``, ``[SEP]``) are text like any other. Texts without
    them have the tokenizer's own tokens. The others are read by a copy of it in which special tokens have other names.

    Args:
        tokenizer: Any tokenizer of transformers. It is not changed.
        special_tokens: Whether the names are read as special tokens instead.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: bool = False) -> None:
        self.tokenizer, self.special_tokens = tokenizer, special_tokens
        added = tokenizer.added_tokens_decoder.items()
        # Text becomes the unknown token too, and only a fast tokenizer's copy can tell why.
        text = None if tokenizer.is_fast else tokenizer.unk_token_id
        self._special = frozenset(id for id, token in added if token.special and id != text)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        ids = self._read(texts)
        for index, tokens in enumerate(ids):
            if not self.special_tokens and not self._special.isdisjoint(tokens):
                ids[index] = self._as_text(texts[index])
        return ids

    def around_mask(self, before: str, after: str) -> list[int]:
        """The tokens of two texts with the mask between them, which is there once unless ``special_tokens``."""
        (tokens,) = self._read([f"{before}{self.tokenizer.mask_token}{after}"])
        if self.special_tokens or sum(token in self._special for token in tokens) == 1:
            return tokens
        return self._as_text(before, after)

    def _read(self, texts: Sequence[str]) -> list[list[int]]:
        """What the tokenizer makes of texts, special tokens included."""
        if not texts:
            return []
        # verbose=False: the warning about texts longer than the model takes; they are cut later.
        encoding = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoding["input_ids"]
        return ids

    def _as_text(self, *parts: str) -> list[int]:
        """The tokens of a text with special tokens' names in it, or of several with a mask between them."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{parts[0][:60]!r} holds a special token's name, which {type(self.tokenizer).__name__} cannot read as"
                " text; special_tokens: true reads it as the token"
            )
        copy, names = self._renamed
        ids: list[int] = copy.encode(names.get(self.tokenizer.mask_token, "").join(parts), add_special_tokens=False).ids
        return ids

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str]]:
        """The tokenizer with other names for its special tokens, and these names by the old ones.

        Leaving its special tokens out would not do: a model of unigrams or words finds them in its vocabulary.
        """
        state: dict[str, Any] = json.loads(self.tokenizer.backend_tokenizer.to_str())
        model, added = state["model"], state["added_tokens"]
        vocabulary = model["vocab"]
        known = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
        # What text itself becomes by merging, or as a single character, is text.
        text = {"".join(pair) for pair in model.get("merges", ())} | {piece for piece in known if len(piece) == 1}
        special = [token["content"] for token in added if token["special"]]
        # Noncharacters of Unicode, which no text holds.
        names = {name: f"\ufdd0{n}\ufdd1" for n, name in enumerate(special) if name not in text}
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if "unk_token" in model:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        state["added_tokens"] = [
            {**token, "content": names[token["content"]], "normalized": False} if token["special"] else token
            for token in added
            if not token["special"] or token["content"] in names
        ]
        state.update(post_processor=None, truncation=None, padding=None)
        return Tokenizer.from_str(json.dumps(state)), names


def refuse_special_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a task whose own text holds the name of a special token, where such names are text.

    It was hardly written to be text, as a chat's template shows.
    """
    written = [task.prompt.replace(MASK, ""), *task.candidate_templates, task.calibration or ""]
    written += [word for words in task.words.values() for word in words.values()]
    if isinstance(task.candidates, GeneratedAnswer):
        written += [task.candidates.text, *task.candidates.stop]
    for token in tokenizer.added_tokens_decoder.values():
        text = next((text for text in written if token.content in text), None)
        if token.special and len(token.content) > 1 and text is not None:
            raise ValueError(
                f"task {task.name!r} holds the tokenizer's special token {token.content!r} in {text!r}, and names"
                " of special tokens are read as text; data.special_tokens: true reads them as the tokens, also in the"
                " columns' texts"
            )


def special_token(tokenizer: PreTrainedTokenizerBase, *names: str) -> int | None:
    """The first of the special tokens ``"bos"``, ``"eos"``, ``"pad"``, ... that the tokenizer has."""
    tokens = (getattr(tokenizer, f"{name}_token_id") for name in names)
    return next((token for token in tokens if isinstance(token, int)), None)


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, Tokens]:
    """The special tokens that the tokenizer puts before and after a text."""
    probe = "It was"
    plain, full = (tokenizer(probe, add_special_tokens=add, verbose=False)["input_ids"] for add in (False, True))
    for first in range(len(full) - len(plain) + 1):
        if full[first : first + len(plain)] == plain:
            return tuple(full[:first]), tuple(full[first + len(plain) :])
    raise ValueError(f"tokenizer {type(tokenizer).__name__} changes a text's tokens when it adds special ones")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token. Attention never looks at it, so where there is none of its own any will do."""
    return special_token(tokenizer, "pad", "eos") or 0


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Tokens:
    """The tokens that end an answer: end of sequence, and every token whose text holds one of the stop texts.

    A tokenizer may have many tokens with a newline in them. A stop text that only several tokens together make up stops
    nothing; the answer is cut at it all the same.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    tokens = {token for token, text in enumerate(texts) if any(end in text for end in stop)}
    if (eos := special_token(tokenizer, "eos")) is not None:
        tokens.add(eos)
    return tuple(sorted(tokens))
