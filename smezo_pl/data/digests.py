"""What training examples were made of, in short strings: a resume names what differs."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from reprlib import Repr
from typing import Any

from transformers import PreTrainedTokenizerBase

from smezo_pl.data.encoding import Encoded
from smezo_pl.tasks import Example, Task

_PROBE = "It was the 1st of 2,024 tests: naïve CAFÉ's “great” 日本語 👍\n\tx_y = f(3.14) != None;"

_SHOWN = (
    *("task", "data_seed", "num_train", "batch_size", "processes", "max_length"),
    *("objective", "prompt", "candidates"),
)
"""What is shown as it was and is; of the rest, which are digests, only the name is."""


def digest(parts: Iterable[str | bytes]) -> str:
    """A short hash of some parts and their lengths."""
    state = blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def column_digests(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> dict[str, str]:
    """A digest of each column of some rows: of what a file holds, whatever prompt is made of it."""
    return {column: digest(repr(row.get(column)) for row in rows) for column in columns}


def example_digests(
    task: Task, examples: Sequence[Example], encoded: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Prompt and candidates of a task, and digests of the training examples and of the tokenizer."""
    return {
        "prompt": task.prompt,
        "candidates": str(task.candidates),
        "labels": digest(str((example.label, example.correct)) for example in examples),
        "texts": digest(text for e in examples for text in (e.prompt, *e.candidates)),
        "tokens": digest(array("q", ids).tobytes() for e in encoded for ids in (e.prompt, *e.candidates)),
        "tokenizer": digest([str(len(tokenizer)), str(tokenizer(_PROBE, verbose=False)["input_ids"])]),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the examples of two runs, by name; what only follows from another difference is left out.

    What an older version did not note is not compared.
    """
    differs = {name for name in now if name in then and then[name] != now[name]}
    short = Repr()
    short.maxstring = 120
    found = [f"{name} {short.repr(then[name])} -> {short.repr(now[name])}" for name in _SHOWN if name in differs]
    drawn = differs & {"task", "data_seed", "num_train"}
    before = {} if drawn else then.get("columns", {})
    columns = [column for column, value in now["columns"].items() if before.get(column, value) != value]
    found += [f"column {column!r} of the training examples" for column in columns]
    if "labels" in differs and not drawn | {*columns}:
        found.append("labels of the training examples")
    if "texts" in differs and not (drawn | {*columns} | differs & {"prompt", "candidates"}):
        found.append("texts of the training examples")
    if "tokenizer" in differs:
        found.append("tokenizer")
    elif "tokens" in differs and not differs & {"texts", "max_length"}:
        found.append("tokens of the training examples")
    return found
