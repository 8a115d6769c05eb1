"""From encoded examples to the tensors of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smezo_pl.data.batch import Calibration, GenerationPrompts, PromptBatch, left_padded
from smezo_pl.data.encoding import Encoded
from smezo_pl.data.packing import PackedRow, group_by_prefix, pack
from smezo_pl.data.tokens import Tokens
from smezo_pl.tasks.task import Loss


def group_examples(examples: Sequence[Encoded], max_tokens: int | None = None) -> list[list[int]]:
    """Indices of the examples that share a row of at most ``max_tokens``; see `group_by_prefix`."""
    if any(example.bidirectional for example in examples):  # every token attends to its whole row
        return [[index] for index in range(len(examples))]
    prompts, sizes = [example.prompt for example in examples], [example.tokens for example in examples]
    return group_by_prefix(prompts, sizes, max_tokens)


@dataclass(frozen=True)
class Collate:
    """Makes a `PromptBatch` of encoded examples."""

    pad_id: int  # the padding token, on the right of rows
    objective: Loss = "classification"
    gold_only: bool = False  # leave out all candidates but the gold one: a step of the lm objective reads no other
    metrics: tuple[str, ...] = ()
    num_labels: int = 0  # labels of the task, 0 where examples have candidates of their own
    reward: str | None = None  # a metric or a function that training maximizes instead of the loss
    max_new_tokens: int = 0  # of a generated answer; 0: nothing is generated
    stop_ids: tuple[int, ...] = ()  # tokens that end a generated answer
    stop: tuple[str, ...] = ()  # texts that end one

    def __call__(self, examples: Sequence[Encoded]) -> PromptBatch:
        """The batch; its examples are in the order given, its rows in that of their first examples.

        Raises:
            ValueError: For no examples, an unknown label with ``gold_only``, or examples of masked and causal LMs
                together.
        """
        if not examples:
            raise ValueError("a batch needs at least one example, got none")
        bidirectional = examples[0].bidirectional
        if any(example.bidirectional != bidirectional for example in examples):
            raise ValueError("a batch holds examples with a mask and examples without one")
        chosen = [self._chosen(example) for example in examples]

        rows: list[PackedRow] = []
        prompt_ends = [(0, 0)] * len(examples)
        # (row, position) that something is predicted at, and its index; by candidate the indices for its tokens.
        logits: dict[tuple[int, int], int] = {}
        candidate_logits: dict[tuple[int, int], list[int]] = {}
        generates = self.reward is not None and self.max_new_tokens > 0  # then each row is the prompt of an answer
        for members in [[n] for n in range(len(examples))] if generates else group_examples(examples):
            texts = [examples[n].prompt + examples[n].candidates[k][:-1] for n in members for k in chosen[n]]
            row, paths = pack([*(examples[n].prompt for n in members), *texts])
            for n in members:
                example = examples[n]
                prompt_ends[n] = (len(rows), paths[example.prompt][-1])
                for k in chosen[n]:
                    path = paths[example.prompt + example.candidates[k][:-1]]
                    # A token is predicted at the one before it, or at the mask.
                    positions = [path[example.mask_position]] if bidirectional else path[len(example.prompt) - 1 :]
                    candidate_logits[n, k] = [logits.setdefault((len(rows), p), len(logits)) for p in positions]
            rows.append(row)

        tokens: list[tuple[int, ...]] = []
        candidates: list[tuple[int, ...]] = []
        for n, example in enumerate(examples):
            for k in chosen[n]:
                pairs = zip(candidate_logits[n, k], example.candidates[k], strict=True)
                tokens += [(logit, token, len(candidates), order) for order, (logit, token) in enumerate(pairs)]
                candidates.append((n, k, len(example.candidates[k])))
        width = max(len(row.tokens) for row in rows)
        texts_of = [example.example for example in examples]
        return PromptBatch(
            input_ids=_padded([row.tokens for row in rows], width, self.pad_id),
            attention_mask=_padded([[1] * len(row.tokens) for row in rows], width),
            position_ids=_padded([row.depth for row in rows], width),
            # Padding follows from itself alone.
            subtree_end=torch.tensor([row.end + list(range(len(row.end) + 1, width + 1)) for row in rows]),
            row_number=torch.arange(len(rows)),
            **_columns(list(logits), "logit_row", "logit_pos"),
            **_columns(tokens, "token_logit", "token_id", "token_candidate", "token_order"),
            **_columns(candidates, "candidate_example", "candidate_index", "candidate_tokens"),
            candidate_correct=torch.tensor([k in examples[n].correct for n, k, _ in candidates], dtype=torch.bool),
            **_columns(prompt_ends, "example_row", "example_pos"),
            labels=torch.tensor([example.label for example in examples]),
            index=torch.tensor([example.index for example in examples]),
            branching=any(row.depth[-1] + 1 < len(row.tokens) for row in rows),
            bidirectional=bidirectional,
            longest_candidate=max((length for _, _, length in candidates), default=0),
            num_candidates=max((k + 1 for _, k, _ in candidates), default=0),
            answer_tokens=(
                sum(len(example.candidates[example.label]) for example in examples)
                if all(example.label >= 0 for example in examples)
                else 0
            ),
            objective=self.objective,
            group=torch.tensor([text.group if text else 0 for text in texts_of]),
            answers=tuple(text.answers if text else () for text in texts_of),
            references=tuple(text.references if text else () for text in texts_of),
            metrics=self.metrics,
            num_labels=self.num_labels,
            reward=self.reward,
            prompts=self._prompts(examples),
            calibration=self._calibration(examples),
        )

    def _chosen(self, example: Encoded) -> Sequence[int]:
        if not self.gold_only:
            return range(len(example.candidates))
        if example.label < 0:
            raise ValueError(f"row {example.index} has no label, so there is no gold candidate to train on")
        return (example.label,)

    def _prompts(self, examples: Sequence[Encoded]) -> GenerationPrompts | None:
        if not self.max_new_tokens:
            return None
        rows = left_padded([example.generated_after for example in examples], self.pad_id)
        return GenerationPrompts(*rows, self.max_new_tokens, self.stop_ids, self.stop, self.pad_id)

    def _calibration(self, examples: Sequence[Encoded]) -> Calibration | None:
        content_free = [example.calibration for example in examples if example.calibration]
        if self.gold_only or len(content_free) < len(examples):
            return None
        # Most tasks have one content-free prompt, so a batch has a row or two of them.
        first: dict[tuple[Tokens, tuple[Tokens, ...]], int] = {}
        total = 0
        for prompt in dict.fromkeys(content_free):
            first[prompt] = total
            total += len(prompt[1])
        batch = Collate(self.pad_id)([Encoded(*prompt, 0, (0,), 0) for prompt in first])
        own = [first[prompt] + k for prompt in content_free for k in range(len(prompt[1]))]
        return Calibration(batch, torch.tensor(own))


def _padded(rows: list[list[int]], width: int, value: int = 0) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def _columns(rows: Sequence[tuple[int, ...]], *names: str) -> dict[str, Any]:
    """The columns of a table as tensors by name."""
    columns = torch.tensor(rows, dtype=torch.long).reshape(len(rows), len(names)).unbind(1)
    return dict(zip(names, columns, strict=True))
