"""What the module does around a step: optimizers, the closure over parts and processes, what is said at the start."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from smezo_pl.batches import batch_weight
from smezo_pl.data import PromptBatch
from smezo_pl.evaluation import answers_of
from smezo_pl.methods import say, use_mask
from smezo_pl.optim import SparseMeZO
from smezo_pl.tasks.objectives import reward_of

if TYPE_CHECKING:
    from smezo_pl.module import SparseMeZOModule

logger = logging.getLogger("smezo_pl.module")  # it speaks for the module


def build_optimizers(module: SparseMeZOModule) -> Any:
    """The optimizer of the module's method on its network, attached, and the scheduler; None for zero-shot.

    Raises:
        TypeError: If the configured optimizer is another one.
        MisconfigurationException: If several processes would train by backpropagation.
    """
    optimizer: torch.optim.Optimizer
    if module.backpropagation is not None:
        if module.trainer.world_size > 1:
            raise MisconfigurationException(
                f"method {module.method!r} runs in one process, as nothing here adds up gradients over "
                f"{module.trainer.world_size}: set devices=1"
            )
        optimizer = module.backpropagation.optimizer(module.model)
        module.save_hyperparameters({"adamw": module.backpropagation.hyperparameters()})
    elif not module.zeroth_order:
        return None
    else:
        optimizer = module.build_optimizer(module.model.named_parameters())
        if not isinstance(optimizer, SparseMeZO):
            raise TypeError(f"optimizer must build a SparseMeZO, got {type(optimizer).__name__}, which needs gradients")
        use_mask(optimizer, module.method)
        if module.perturbation == "layerwise":
            optimizer.attach(module.model)
        module.save_hyperparameters({"sparse_mezo": optimizer.settings()})
    return optimizer if module.build_scheduler is None else ([optimizer], [module.build_scheduler(optimizer)])


def announce(module: SparseMeZOModule) -> None:
    """Say what is trained, in what, and whether it can be replayed."""
    logger.info("precision %s, perturbation %s, device %s", *_setting(module))
    if module.method is not None:
        details = "" if module.backpropagation is None else f", {module.backpropagation.hyperparameters()}"
        say(module.method, module.model.named_parameters(), details)
    if module.pretrained is None and module.zeroth_order:
        logger.warning(
            "no file holds the starting weights of this network: the record of the run can be replayed only if "
            "they are saved, for instance by torch.save(module.model.state_dict(), 'start.pt') before fit"
        )


def _setting(module: SparseMeZOModule) -> tuple[Any, ...]:
    return module.trainer.precision, module.perturbation if module.zeroth_order else "none", module.device


def batch_loss(module: SparseMeZOModule, parts: list[Any]) -> Tensor:
    """The module's loss over the parts of a batch and over all processes, weighted by example (``lm``: by token).

    Returns:
        A float32 scalar, the same bits on every process.
    """
    weights = [batch_weight(part) for part in parts]
    weight = float(sum(weights))
    if isinstance(parts[0], PromptBatch) and parts[0].reward is not None:
        # Of all parts together, as an F1 of the whole is no mean of the parts' F1.
        answers = [answer for part in parts for answer in answers_of(module.model, part, module.text_tokenizer)]
        reward = reward_of(parts[0].reward, parts[0].num_labels)
        total = torch.tensor(reward.loss(answers), dtype=torch.float32, device=module.device) * weight
    else:
        losses = [module.loss(part).float().reshape(()) * w for part, w in zip(parts, weights, strict=True)]
        total = torch.stack(losses).sum()
    if module.trainer.world_size == 1:
        return total / weight
    # Gathered and added in the order of ranks, where a reduction might add in another order on each process.
    both = torch.stack([total, total.new_tensor(weight)])
    total, overall = module.trainer.strategy.all_gather(both).sum(0).unbind()
    return total / overall
