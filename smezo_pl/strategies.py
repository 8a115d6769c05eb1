"""Data parallelism for forward-only training: replicas share losses, never weights or gradients."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor

logger = logging.getLogger(__name__)


class ReplicasDifferError(RuntimeError):
    """The weights of two processes are not the same bits."""


class ForwardDDPStrategy(DDPStrategy):
    """Every process holds the whole network, runs its own part of the batch and makes the same update.

    Only losses travel: `SparseMeZOModule` gathers them within the step, so all processes get the same projected
    gradient and, since the noise is a function of integers, the same weights to the last bit. Nothing is wrapped and no
    gradient bucket is held. The weights are compared over the processes before the first step, every ``check_every``
    steps and after the last one. Registered as ``strategy="forward_ddp"``.

    Args:
        check_every: Steps between two comparisons, at least 1.
        **settings: Arguments of Lightning's ``DDPStrategy``, such as ``process_group_backend`` or ``start_method``.

    Raises:
        ValueError: If ``check_every`` is below 1.
        ReplicasDifferError: While training, if the weights of a process differ; it names the process and the tensor.
    """

    strategy_name = "forward_ddp"

    def __init__(self, check_every: int = 1000, **settings: Any) -> None:
        if not check_every >= 1:
            raise ValueError(f"check_every must be at least 1, got {check_every}")
        super().__init__(**settings)
        self.check_every = check_every

    def configure_ddp(self) -> None:
        """Give every process the weights of the first; nothing is wrapped, as there are no gradients to reduce."""
        assert self.model is not None
        with torch.no_grad():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                dist.broadcast(tensor, src=0)

    def on_train_start(self) -> None:
        """Compare the replicas before the first step (after a checkpoint has been read)."""
        super().on_train_start()
        self.compare_replicas()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Compare the replicas every ``check_every`` steps."""
        super().on_train_batch_start(batch, batch_idx)
        assert self.lightning_module is not None
        step = self.lightning_module.global_step
        if step and step % self.check_every == 0:
            self.compare_replicas()

    def on_train_end(self) -> None:
        """Compare the replicas after the last step."""
        super().on_train_end()
        self.compare_replicas()

    def compare_replicas(self) -> None:
        """Compare the bits of all parameters over the processes.

        Raises:
            ReplicasDifferError: If a process has other weights than the first.
        """
        assert self.model is not None
        names, sums = zip(*((name, checksum(tensor)) for name, tensor in self.model.named_parameters()), strict=True)
        mine = torch.stack(sums)
        all_sums = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(all_sums, mine)
        for rank, others in enumerate(all_sums):
            if (differs := (others != all_sums[0]).nonzero()).numel():
                raise ReplicasDifferError(
                    f"the weights of process {rank} are not those of process 0: {len(differs)} of {len(names)} tensors "
                    f"differ, the first is {names[int(differs[0])]}. Was a parameter changed outside the optimizer, or "
                    "on one process alone?"
                )
        logger.debug("replicas compared: %d processes hold the same bits", self.world_size)


def checksum(tensor: Tensor, chunk: int = 1 << 22) -> Tensor:
    """A 64-bit sum of a tensor's bits that depends on every element and its place; int64, on the tensor's device."""
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), chunk):
        part = words[start : start + chunk].to(torch.int64)
        # Odd multipliers are invertible modulo 2**64: a change of any one element changes the sum.
        place = torch.arange(start, start + part.numel(), device=tensor.device) * 2 + 1
        total += (part * (place * 0x2545F4914F6CDD1D)).sum()
    return total


def _register() -> None:
    name = ForwardDDPStrategy.strategy_name
    if name not in StrategyRegistry:
        for suffix, method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork")):
            StrategyRegistry.register(
                name + suffix, ForwardDDPStrategy, description="forward-only data parallelism", start_method=method
            )


_register()
