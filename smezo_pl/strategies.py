"""Forward-only data parallelism, and which settings of a Trainer go with forward-only training."""

import signal
import warnings
from pkgutil import resolve_name
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import Tensor

from smezo_pl.models import TRUE_PRECISION


class ReplicasDifferError(RuntimeError):
    """The weights of two processes are not the same bits."""


class ForwardDDPStrategy(DDPStrategy):
    """Every process holds the whole network, runs its own part of the batch and makes the same update.

    Only losses travel: `SparseMeZOModule` gathers them within the step, so all processes get the same projected
    gradient and, since the noise is a function of integers, the same weights to the last bit. Nothing is wrapped and no
    gradient bucket is held. The weights are compared over the processes before the first step, every ``check_every``
    steps and after the last one. SIGTERM ends all processes at once. Registered as ``strategy="forward_ddp"``.

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

    def setup(self, trainer: Trainer) -> None:
        """Set up as `DDPStrategy`, but for the end by SIGTERM."""
        super().setup(trainer)
        # Lightning 2.6 broadcasts within its handler, in the middle of a step's own communication: neither ends.
        trainer._signal_connector._sigterm_notifier_fn = self._terminate  # type: ignore[method-assign, assignment]

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        assert self.lightning_module is not None
        if not callable(self.lightning_module.trainer._signal_connector._original_handlers[signal.SIGTERM]):
            raise SystemExit(128 + number)  # else that handler is called next, and decides

    def teardown(self) -> None:
        """Tear down; a run that was interrupted leaves no process behind, waiting for this one."""
        super().teardown()
        trainer = getattr(self.lightning_module, "_trainer", None)  # none where a spawned process ran it
        if self.launcher is not None and (trainer is None or trainer.interrupted):
            self.launcher.kill(signal.SIGKILL)

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
        """Compare the bits of all parameters over the processes."""
        assert self.model is not None
        names, sums = zip(*((name, checksum(tensor)) for name, tensor in self.model.named_parameters()), strict=True)
        own_sums = torch.stack(sums)
        all_sums = [torch.empty_like(own_sums) for _ in range(self.world_size)]
        dist.all_gather(all_sums, own_sums)
        for rank, rank_sums in enumerate(all_sums):
            if (differing := (rank_sums != all_sums[0]).nonzero()).numel():
                raise ReplicasDifferError(
                    f"the weights of process {rank} are not those of process 0: {len(differing)} of {len(names)} "
                    f"tensors differ, the first is {names[int(differing[0])]}. Was a parameter changed outside the "
                    "optimizer, or on one process alone?"
                )


def checksum(tensor: Tensor, chunk: int = 1 << 22) -> Tensor:
    """A 64-bit sum of a tensor's bits that depends on every element and its index; int64, on the tensor's device."""
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), chunk):
        part = words[start : start + chunk].to(torch.int64)
        # Odd multipliers are invertible modulo 2**64: a change of any one element changes the sum.
        index = torch.arange(start, start + part.numel(), device=tensor.device) * 2 + 1
        total += (part * (index * 0x2545F4914F6CDD1D)).sum()
    return total


for _suffix, _method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork")):
    StrategyRegistry.register(
        ForwardDDPStrategy.strategy_name + _suffix,
        ForwardDDPStrategy,
        description="forward-only data parallelism",
        override=True,
        start_method=_method,
    )


def check_trainer(trainer: Trainer) -> None:
    """Refuse settings that would be ignored or give wrong results.

    To be called in ``configure_callbacks``, the one hook before Lightning's own check of manual optimization, whose
    message knows nothing of micro-batches.
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
    kinds = (StochasticWeightAveraging, ModelPruning)
    if other := next((c for c in trainer.callbacks if isinstance(c, kinds)), None):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"{type(other).__name__} writes weights after they were validated, so the scores would not be those of the "
            "weights that are saved: leave it out. EMAWeightAveraging with WeightCheckpoint saves the average that it "
            "scores"
        )
    check_strategy(trainer.strategy)
    if trainer.world_size > 1 and not isinstance(trainer.strategy, ForwardDDPStrategy):
        raise MisconfigurationException(
            f"{trainer.world_size} processes with {type(trainer.strategy).__name__}: it would wrap the network for "
            "gradients or shard it, and replicas could drift apart. Use strategy='forward_ddp', or devices=1"
        )


def check_dtype(trainer: Trainer, loaded: torch.dtype) -> None:
    """Refuse a network that was loaded in another precision: a rounded weight does not come back."""
    with trainer.precision_plugin.module_init_context():
        asked = torch.get_default_dtype()
    if loaded != asked:
        raise MisconfigurationException(
            f"precision={trainer.precision!r} means weights in {asked}, and this network was loaded in {loaded}: build "
            f"the module again for this Trainer, or give the Trainer precision={TRUE_PRECISION.get(loaded)!r}"
        )


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy, its name, or a mapping with its ``class_path``, that shards the network or needs gradients."""
    path = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", None)
    if path is not None and "." not in path:
        supported = path in ("auto", "single_device") or path.startswith(("forward_ddp", "ddp"))
    else:
        kind = type(strategy) if path is None else resolve_name(path)
        supported = issubclass(kind, SingleDeviceStrategy | DDPStrategy) and not issubclass(kind, DeepSpeedStrategy)
    if not supported:
        raise MisconfigurationException(
            f"strategy={path or type(strategy).__name__!r}: sharded weights and gradients have no use in forward-only "
            "training, where every process updates its own whole network. Use strategy='auto' on one device, "
            "'forward_ddp' on several; for less memory set precision='bf16-true' and micro_batch_size in the model"
        )


def check_precision(precision: str | int) -> None:
    """Refuse a precision that forward-only training does not support."""
    if precision == "16-mixed":
        raise MisconfigurationException(
            "precision='16-mixed' scales gradients, and there are none here: use 'bf16-mixed', '16-true' or 'bf16-true'"
        )
    if precision not in (supported := ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed")):
        raise MisconfigurationException(f"precision must be one of {', '.join(supported)}, got {precision!r}")


def silence_expected_warnings(data_in_memory: bool) -> None:
    """Ignore warnings of Lightning about what is intended here, or about Lightning itself."""
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
    if data_in_memory:  # worker processes would gain nothing
        messages.append(r"The '\w+_dataloader' does not have many workers")
    for message in messages:
        warnings.filterwarnings("ignore", message=message)
