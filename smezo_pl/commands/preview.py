"""What the model sees of a configuration's data. No model is loaded, only its tokenizer.

Shown are prompts with the scored tokens marked, lengths, label balance, and tokens of the candidates.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median

from smezo_pl.cli import build, show_log
from smezo_pl.data import Encoded, PromptDataModule
from smezo_pl.data.splits import SplitName
from smezo_pl.tasks.example import Example

_MOST_SHOWN = 60
"""Tokens of candidates that are shown after a prompt, and candidates that are listed."""


def main(args: Sequence[str]) -> None:
    """Build the data of a configuration and print its preview."""
    parser = argparse.ArgumentParser(
        prog="smezo preview",
        description=__doc__,
        epilog="All other arguments are those of `smezo fit`: --config FILE, --data.task NAME, ...",
    )
    parser.add_argument("--examples", type=int, default=3, help="prompts to show (default: 3)")
    help_text = "split to show prompts of (default: train, or dev if there are few-shot demonstrations)"
    parser.add_argument("--split", choices=("train", "dev", "test"), help=help_text)
    given, rest = parser.parse_known_args(args[1:])
    show_log()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    run = build(None, *rest, "--trainer.logger=false", "--trainer.accelerator=cpu")
    data: PromptDataModule = run.datamodule
    if data._tokenizer is None:
        data.set_tokenizer(run.model.tokenizer)
    data.max_positions = run.model.max_positions
    split: SplitName = given.split or ("dev" if data.num_demonstrations else "train")
    print("\n".join(preview(data, split, given.examples)))


def preview(data: PromptDataModule, split: SplitName = "train", examples: int = 3) -> Iterator[str]:
    """The lines that are printed, with so many prompts of a split."""
    task = data.task
    kind = "generated text" if task.is_generation else "candidates"
    yield f"task {task.name}: {kind}, objective {data.objective}, metrics {', '.join(task.metrics)}"
    shown = list(zip(data.examples(split), data.encoded(split), strict=True))[:examples]
    for example, encoded in shown:
        cut = f", {encoded.cut} tokens cut" if encoded.cut else ""
        yield f"\n--- {split}, {example.where} of {data.origin(split)}{cut}"
        yield _marked(data, encoded)
    yield "\n⟦ ⟧ scored tokens, a bar between two of them; * the gold candidate\n"
    yield from _lengths(data, ("train", "dev") if split != "test" else ("test",))
    yield from _labels(data, split)
    yield from _candidates(data, shown)


def _marked(data: PromptDataModule, encoded: Encoded) -> str:
    """The prompt and its candidates; of many or long candidates only the gold ones."""
    few = sum(map(len, encoded.candidates)) <= _MOST_SHOWN
    shown = range(len(encoded.candidates)) if few else encoded.correct
    answers = [_tokens(data, encoded.candidates[index]) + "*" * (index in encoded.correct) for index in shown]
    if others := len(encoded.candidates) - len(answers):
        answers.append(f"and {others} others")
    return _shortened(str(data.tokenizer.decode(list(encoded.prompt))), 1500) + " ".join(answers)


def _tokens(data: PromptDataModule, tokens: Sequence[int]) -> str:
    return "⟦" + "|".join(str(data.tokenizer.decode([token])) for token in tokens).replace("\n", "⏎") + "⟧"


def _shortened(text: str, longest: int) -> str:
    half = longest // 2
    cut = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    return text if len(text) <= longest else cut


def _lengths(data: PromptDataModule, splits: Sequence[SplitName]) -> Iterator[str]:
    yield f"{'tokens':<8}{'examples':>9}{'median':>9}{'longest':>9}{'cut':>6}   (max_length {data.max_length})"
    for split in splits:
        if encoded := data.encoded(split):
            lengths = [example.length for example in encoded]
            cut = sum(example.cut > 0 for example in encoded)
            yield f"{split:<8}{len(encoded):>9}{round(median(lengths)):>9}{max(lengths):>9}{cut:>6}"


def _labels(data: PromptDataModule, split: SplitName) -> Iterator[str]:
    names = data.task.labels
    if told := data.labels(split):
        yield f"\nlabels of {data.origin(split)}: {told}"
    if not names:
        return
    counts = Counter(example.label for example in data.examples(split))
    texts = {name: f" {text!r}" for name, text in getattr(data.task.candidates, "items", dict)()}
    parts = [
        f"{name}{texts.get(name, '')} {counts[index]} ({counts[index] / counts.total():.0%})"
        for index, name in enumerate(names)
    ]
    yield f"\nlabels of {split}: " + ", ".join(parts)


def _candidates(data: PromptDataModule, shown: Sequence[tuple[Example, Encoded]]) -> Iterator[str]:
    if data.task.is_generation or not shown:
        return
    example, first = shown[0]
    fixed = bool(data.task.labels) and len({encoded.candidates for _, encoded in shown}) == 1
    yield "\ncandidates" + ("" if fixed else " of the first example")
    for text, tokens in list(zip(example.candidates, first.candidates, strict=True))[:_MOST_SHOWN]:
        ids = f" {_tokens(data, tokens)} {list(tokens)}" if len(tokens) <= 8 else ""
        yield f"  {_shortened(text, 80)!r}: {len(tokens)} {'token' if len(tokens) == 1 else 'tokens'}{ids}"
