"""``smezo preview``: what the model will see of a configuration's data. No model is loaded, only its tokenizer."""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from smezo_pl.data import Encoded, PromptDataModule
from smezo_pl.data.splits import SplitName

_LONGEST_SHOWN = 1500
"""Characters of a prompt that are shown; of a longer one its beginning and its end."""


_MOST_SHOWN = 60
"""Tokens of candidates that are shown after a prompt, and candidates that are listed."""


def main(args: Sequence[str]) -> None:
    """Print prompts with the scored tokens marked, token lengths, balance of the labels, and the candidates' tokens.

    Args:
        args: ``preview`` and the words after it.
    """
    from smezo_pl.cli import build, show_log

    parser = argparse.ArgumentParser(
        prog="smezo preview",
        description="What the model will see of a configuration's data: prompts with the scored tokens marked, "
        "lengths, balance of the labels, candidates' tokens. Only the tokenizer is loaded.",
        epilog="All other arguments are those of `smezo fit`: --config FILE, --data.task NAME, ...",
    )
    parser.add_argument("--examples", type=int, default=3, help="prompts to show (3)")
    parser.add_argument(
        "--split",
        choices=("train", "dev", "test"),
        help="the split that prompts are shown of: train, or dev where there are demonstrations",
    )
    given, rest = parser.parse_known_args(args[1:])
    show_log()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    run = build(None, *rest, "--trainer.logger=false", "--trainer.accelerator=cpu")
    data: PromptDataModule = run.datamodule
    if data._given_tokenizer is None:
        tokenizer = run.model.tokenizer
        if tokenizer is None:
            raise ValueError("preview needs a tokenizer: give model.pretrained or data.tokenizer")
        data.set_tokenizer(tokenizer)
    split: SplitName = given.split or ("dev" if data.num_demonstrations else "train")
    print("\n".join(preview(data, split, given.examples)), file=sys.stdout)


def preview(data: PromptDataModule, split: SplitName = "train", examples: int = 3) -> Iterator[str]:
    """The lines that are printed.

    Args:
        data: A data module that has a tokenizer.
        split: What prompts are shown of.
        examples: How many of them.
    """
    task = data.task
    kind = "free text" if task.is_generation else "candidates"
    yield f"task {task.name}: {kind}, objective {data.objective}, metrics {', '.join(task.metrics)}"
    shown = data.encoded(split)[:examples]
    for encoded in shown:
        where = encoded.example.where if encoded.example else f"row {encoded.index}"
        cut = f", {encoded.cut} tokens cut" if encoded.cut else ""
        yield f"\n--- {split}, {where} of {data.origin(split)}{cut}"
        yield _marked(data, encoded)
    yield "\n⟦ ⟧ scored tokens, a bar between two of them; * the right answer\n"
    yield from _lengths(data, ("train", "dev") if split != "test" else ("test",))
    yield from _labels(data, split)
    yield from _candidates(data, shown)


def _marked(data: PromptDataModule, encoded: Encoded) -> str:
    """The prompt and its candidates; of many or long candidates those that are right."""
    places = list(range(len(encoded.candidates)))
    if sum(map(len, encoded.candidates)) > _MOST_SHOWN:
        places = [place for place in places if place in encoded.correct]
    answers = [_pieces(data, encoded.candidates[place]) + "*" * (place in encoded.correct) for place in places]
    if others := len(encoded.candidates) - len(answers):
        answers.append(f"and {others} others")
    return _folded(str(data.tokenizer.decode(list(encoded.prompt)))) + " ".join(answers)


def _pieces(data: PromptDataModule, tokens: Sequence[int]) -> str:
    return "⟦" + "|".join(str(data.tokenizer.decode([token])) for token in tokens).replace("\n", "⏎") + "⟧"


def _folded(text: str, longest: int = _LONGEST_SHOWN) -> str:
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _lengths(data: PromptDataModule, splits: Sequence[SplitName]) -> Iterator[str]:
    yield f"{'tokens':<8}{'examples':>9}{'median':>9}{'longest':>9}{'cut':>6}   (max_length {data.max_length})"
    for split in splits:
        encoded = data.encoded(split)
        if not encoded:
            continue
        lengths = [example.length for example in encoded]
        cut = sum(example.cut > 0 for example in encoded)
        median = round(statistics.median(lengths))
        yield f"{split:<8}{len(encoded):>9}{median:>9}{max(lengths):>9}{cut:>6}"


def _labels(data: PromptDataModule, split: SplitName) -> Iterator[str]:
    names = data.task.labels
    if not names:
        return
    counts = Counter(example.label for example in data.examples(split))
    total = sum(counts.values())
    texts = {name: f" {text!r}" for name, text in getattr(data.task.candidates, "items", dict)()}
    parts = (
        f"{name}{texts.get(name, '')} {counts[place]} ({counts[place] / total:.0%})" for place, name in enumerate(names)
    )
    yield f"\nlabels of {split}: " + ", ".join(parts)


def _candidates(data: PromptDataModule, shown: Sequence[Encoded]) -> Iterator[str]:
    if data.task.is_generation or not shown or shown[0].example is None:
        return
    fixed = bool(data.task.labels) and len({example.candidates for example in shown}) == 1
    yield "\ncandidates" + ("" if fixed else " of the first example")
    for text, tokens in list(zip(shown[0].example.candidates, shown[0].candidates, strict=True))[:_MOST_SHOWN]:
        ids = f" {_pieces(data, tokens)} {list(tokens)}" if len(tokens) <= 8 else ""
        yield f"  {_folded(text, 80)!r}: {len(tokens)} {'token' if len(tokens) == 1 else 'tokens'}{ids}"
