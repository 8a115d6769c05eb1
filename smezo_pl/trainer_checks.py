"""What of a Trainer's settings does not go with a forward-only step: refused before anything is loaded."""

import logging
import warnings

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from smezo_pl.strategies import ForwardDDPStrategy

logger = logging.getLogger(__name__)

PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed")


def check_trainer(trainer: Trainer) -> None:
    """Refuse settings that would be ignored or go wrong.

    It runs in ``configure_callbacks``, the one hook that comes before Lightning's own check of manual optimisation,
    whose message knows nothing of micro-batches.

    Raises:
        MisconfigurationException: For gradient clipping, gradient accumulation, a precision that scales gradients or
            quantises weights, or several processes without `ForwardDDPStrategy`.
    """
    if trainer.gradient_clip_val:
        raise MisconfigurationException(
            f"gradient_clip_val={trainer.gradient_clip_val}: there are no gradients to clip. Leave it out; for smaller "
            "steps lower lr, for smaller memory set micro_batch_size in the model"
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: there are no gradients to accumulate. Set a "
            "larger batch_size in the data and micro_batch_size in the model: the batch then runs in parts in one step"
        )
    check_precision(trainer.precision)
    if trainer.world_size > 1 and not isinstance(trainer.strategy, ForwardDDPStrategy):
        raise MisconfigurationException(
            f"{trainer.world_size} processes with {type(trainer.strategy).__name__}: it would wrap the network for "
            "gradients or shard it, and replicas could drift apart. Use strategy='forward_ddp', or devices=1"
        )


def check_precision(precision: str | int) -> None:
    """Refuse a precision in which a forward-only step does not hold.

    Raises:
        MisconfigurationException: If it is not one of `PRECISIONS`.
    """
    if precision == "16-mixed":
        raise MisconfigurationException(
            "precision='16-mixed' scales gradients, and there are none here: use 'bf16-mixed', '16-true' or 'bf16-true'"
        )
    if precision not in PRECISIONS:
        raise MisconfigurationException(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def silence_expected_warnings(data_in_memory: bool) -> None:
    """Drop the warnings of Lightning that take for a mistake what is meant to be so here, or are about itself.

    Args:
        data_in_memory: Whether batches are made of what is in memory, so that worker processes would gain nothing.
    """
    messages = [
        # Both forwards must see the same function, so dropout is off.
        r"Found \d+ module\(s\) in eval mode at the start of training",
        # The module can validate; whether there is something to validate on is the caller's choice.
        "You defined a `validation_step` but have no `val_dataloader`",
        # Method zero-shot trains nothing.
        "`LightningModule.configure_optimizers` returned `None`",
        # Lightning 2.6 asks torch's pytree by a name that torch 2.13 deprecates.
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        # The weights after the step are the ones to keep: there is no other state to save in the middle of a step.
        "Using ModelCheckpoint with manual optimization and every_n_train_steps",
    ]
    if data_in_memory:
        messages.append(r"The '\w+_dataloader' does not have many workers")
    for message in messages:
        warnings.filterwarnings("ignore", message=message)
