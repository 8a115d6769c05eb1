"""How a task's examples become tokens and batches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from smezo_pl.data.collate import Collate
from smezo_pl.data.encoding import Encoded, Encoder, padding_id
from smezo_pl.data.free_text import stop_tokens
from smezo_pl.data.masked import MaskedEncoder
from smezo_pl.tasks import Example, FreeText, Task
from smezo_pl.tasks.task import LOSSES


def encoded_examples(
    task: Task,
    examples: Sequence[Example],
    origin: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    calibrated: bool = False,
) -> list[Encoded]:
    """The examples as tokens, in their order.

    Args:
        task: The task that they are of.
        examples: The examples.
        origin: Where they come from, for messages.
        tokenizer: The tokenizer.
        max_length: Most tokens of a prompt and a candidate together.
        calibrated: Whether prompts without content are encoded too.
    """
    if task.is_masked:
        return MaskedEncoder(tokenizer, max_length).encode(examples, origin)
    new_tokens = task.candidates.max_new_tokens if isinstance(task.candidates, FreeText) else 0
    return Encoder(tokenizer, max_length, new_tokens, calibrated=calibrated).encode(examples, origin)


def collate_of(task: Task, tokenizer: PreTrainedTokenizerBase, objective: str, training: bool = False) -> Collate:
    """What makes batches of a task's encoded examples.

    Args:
        task: The task.
        tokenizer: The tokenizer.
        objective: A loss, a metric or a reward. Where nothing is trained, the loss stays one.
        training: Whether the batches are for training steps.
    """
    loss = next((name for name in LOSSES if name == objective), task.objective)
    reward = objective if training and objective not in LOSSES else None
    free = task.candidates
    collate = Collate(
        padding_id(tokenizer),
        loss,
        # A step of the lm objective reads no candidate but the right one.
        right_only=training and loss == "lm" and (reward is None or task.is_free),
        metrics=task.metrics,
        num_labels=len(task.labels) if isinstance(free, Mapping) else 0,
        reward=reward,
    )
    if not isinstance(free, FreeText) or (training and reward is None):
        return collate
    stops = stop_tokens(tokenizer, free.stop)
    return replace(collate, max_new_tokens=free.max_new_tokens, stop_ids=stops, stop=free.stop)
