"""How many tokens a forward reads in evaluation, found once."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from smezo_pl.data.collate import Collate
from smezo_pl.data.encoding import Encoded
from smezo_pl.data.filling import BatchLimit, fill

logger = logging.getLogger(__name__)

CPU_TOKENS = 1024
"""Tokens of a forward on a CPU: the matrices are large enough to be worth it, and the activations of a layer still lie
in its caches. Half or twice as many are read about as quickly; memory is no concern."""

CPU_GENERATION_TOKENS = 16384
"""The same where answers are generated: all rows together read the weights once for every further token."""

_FIRST, _MOST = 2048, 1 << 18


def found_budget(trainer: pl.Trainer | None, examples: Sequence[Encoded], collate: Collate) -> int:
    """The most tokens of a forward for the Trainer's module, by trying it on these examples; the same on every process.

    Args:
        trainer: The Trainer, whose module is on its device; without one the CPU's number is taken.
        examples: The examples that will be scored.
        collate: Makes their batches.
    """
    module: Any = getattr(trainer, "lightning_module", None)
    on_cpu = CPU_GENERATION_TOKENS if collate.max_new_tokens else CPU_TOKENS
    if trainer is None or module is None:
        return token_budget(torch.device("cpu"), lambda tokens: tokens, on_cpu)

    def trial(tokens: int) -> int:
        numbers = fill(examples, BatchLimit(tokens=tokens))[0]
        batch = collate([examples[number] for number in numbers]).to(module.device)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            module.evaluate_batch(batch)
        return batch.input_ids.numel()

    budget = token_budget(module.device, trial, on_cpu)
    if trainer.world_size == 1:
        return budget
    return int(trainer.strategy.all_gather(torch.tensor(budget, device=module.device)).min())


def token_budget(device: torch.device, trial: Callable[[int], int], on_cpu: int = CPU_TOKENS) -> int:
    """The most tokens of a forward for `device`; the log says how it was chosen.

    On a CPU it is a stated number. Elsewhere forwards of twice as many tokens each are tried until memory runs out or
    the data does.

    Args:
        device: Where the model is.
        trial: Runs the batch that needs most under a limit of so many tokens, and gives the tokens it held.
        on_cpu: The number for a CPU.

    Raises:
        torch.OutOfMemoryError: If not even the first trial fits.
    """
    if device.type == "cpu":
        logger.info("eval_batch_size auto: %d tokens a forward, which suits a CPU's caches", on_cpu)
        return on_cpu
    fits, asked = 0, _FIRST
    while asked <= _MOST:
        try:
            held = trial(asked)
        except torch.OutOfMemoryError:
            _empty_cache(device)
            if not fits:
                raise
            logger.info("eval_batch_size auto: %d tokens a forward; %d did not fit on %s", fits, asked, device)
            return fits
        fits = asked
        if held <= asked // 2:
            # All that there is was in it.
            break
        asked *= 2
    _empty_cache(device)
    logger.info("eval_batch_size auto: %d tokens a forward on %s, all that was tried fits", fits, device)
    return fits


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
