"""The methods that ``--model.method`` chooses between, so that they share data, scoring and ``metrics.json``."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from smezo_pl.data.batch import batch_weight
from smezo_pl.optim import NonFiniteLossError, SparseMeZO
from smezo_pl.optim.parameters import remembers_given
from smezo_pl.optim.standstill import PATIENCE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Method:
    """What distinguishes a method."""

    summary: str
    order: Literal[0, 1] | None  # 0: forward passes alone (`SparseMeZO`), 1: gradients (AdamW), None: no training
    mask: str | None = None  # the optimizer's, for order 0
    adapter: Mapping[str, Any] = field(default_factory=dict)  # the default; a given one must have its peft_type
    lr: float = 0.0  # AdamW's default, for order 1: a starting point, not a tuned one


METHODS: dict[str, Method] = {
    "s-mezo": Method("Sparse MeZO: forward passes alone, the smallest weights of each tensor", 0, "small"),
    "mezo": Method("MeZO: forward passes alone, all weights", 0, "dense"),
    "r-mezo": Method("R-MeZO: forward passes alone, a random choice of weights", 0, "random"),
    "full": Method("full fine-tuning with AdamW", 1, lr=1e-5),
    # MeZO's adapters; which matrices LoRA goes to is PEFT's choice by architecture (query and value for most).
    "lora": Method("LoRA with AdamW", 1, adapter={"peft_type": "LORA", "r": 8, "lora_alpha": 16}, lr=1e-4),
    "prefix": Method(
        "prefix tuning with AdamW",
        1,
        adapter={"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "init_weights": "zero"},
        lr=1e-2,
    ),
    "linear-probe": Method("a linear layer on frozen features of the last position", 1, lr=1e-2),
    "zero-shot": Method("no training", None),
}

if TYPE_CHECKING:
    MethodName: TypeAlias = str
else:
    MethodName = Literal[tuple(METHODS)]  # the choices that the command line shows


def adapter_of(name: str | None, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The adapter that a method trains: the given one, the method's own, or None; another method's is refused."""
    if name is None or METHODS[name].order == 0:
        return None if given is None else dict(given)
    method = METHODS[name]
    if given is None:
        return dict(method.adapter) or None
    own = method.adapter.get("peft_type")
    kind = str(given.get("peft_type", own)).upper()
    if own is None or kind != own:
        allowed = f"an adapter of peft_type {own}" if own else "no adapter"
        raise ValueError(f"method {name!r} takes {allowed}, got adapter={dict(given)}")
    return {**given, "peft_type": kind}


def check_adapter(name: str | None, given: Mapping[str, Any] | None, present: Sequence[str]) -> None:
    """Refuse another adapter, or a method that would not train the ones that the network has, by ``peft_type``."""
    kinds = " and ".join(present)
    if given is not None:
        raise ValueError(f"the model has a {kinds} adapter, which is trained on: leave out adapter={dict(given)}")
    own = METHODS[name].adapter.get("peft_type") if name else None
    if name == "full" or (own is not None and list(present) != [own]):
        raise ValueError(
            f"method {name!r} trains {f'a {own} adapter' if own else 'the whole model'}, and the model has a {kinds} "
            "adapter, which alone would be trained: choose another method, or merge it first (PEFT's merge_and_unload)"
        )


@remembers_given
@dataclass(frozen=True)
class FirstOrder:
    """AdamW's settings, for the first-order baselines.

    Args:
        lr: Learning rate, at least 0. None: the method's own, 1e-5 for full, 1e-4 for lora, 1e-2 for prefix and
            linear-probe; starting points, to be tuned.
        weight_decay: Decoupled weight decay, at least 0.
        beta1: Decay of the mean of the gradients, in ``[0, 1)``.
        beta2: Decay of the mean of their squares, in ``[0, 1)``.
        eps: Added to the root of the latter, above 0.
        gradient_clip: Largest norm of the gradient, above 0; None does not clip.
        seed: Seed of an adapter's starting weights.

    Raises:
        ValueError: If a number is out of range.
    """

    lr: float | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    gradient_clip: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        valid = {
            "lr": (self.lr is None or 0.0 <= self.lr < math.inf, "in [0, inf)"),
            "weight_decay": (0.0 <= self.weight_decay < math.inf, "in [0, inf)"),
            "beta1": (0.0 <= self.beta1 < 1.0, "in [0, 1)"),
            "beta2": (0.0 <= self.beta2 < 1.0, "in [0, 1)"),
            "eps": (0.0 < self.eps < math.inf, "in (0, inf)"),
            "gradient_clip": (self.gradient_clip is None or self.gradient_clip > 0.0, "above 0, or null for none"),
            "seed": (0 <= self.seed < 2**63, "in [0, 2^63)"),
        }
        for name, (holds, allowed) in valid.items():
            if not holds:
                raise ValueError(f"first_order.{name} must be {allowed}, got {getattr(self, name)}")


MAX_SKIPPED = 20  # steps in a row without an update, as in `SparseMeZO`


class FirstOrderBaseline:
    """Training with AdamW, for comparison.

    The network stays in ``eval()`` mode as for the other methods, so there is no dropout. The weights are updated in
    their own dtype: in bfloat16 an update below about 1/256 of a weight is lost by rounding, so ``full`` and ``prefix``
    are better run in ``32-true`` or ``bf16-mixed``. LoRA's matrices (PEFT) and the probe's layer are float32 always.
    ``last_loss`` is the loss of the last step, before its update.
    """

    def __init__(self, method: str, adamw: FirstOrder) -> None:
        self.method = method
        given: frozenset[str] = adamw.given  # type: ignore[attr-defined]  # by `remembers_given`
        self.given = given if adamw.lr is not None else given - {"lr"}
        self.overrides: tuple[dict[str, Any], ...] = ()  # all weights are in one group
        self._groups: list[dict[str, Any]] = []
        self.adamw = adamw if adamw.lr is not None else replace(adamw, lr=METHODS[method].lr)
        self.last_loss = math.nan
        self.skipped_steps = self._skipped_in_row = self._without_gradient = 0

    @property
    def dead(self) -> str | None:
        """Why the last steps did nothing; None if they did something."""
        if self._without_gradient < PATIENCE:
            return None
        return (
            "the gradient was 0: the loss does not depend on the weights that are trained, or the model has diverged "
            "to a constant output (then lower lr, and begin again)"
        )

    def settings(self) -> dict[str, Any]:
        """Hyperparameters as plain values, as `SparseMeZO.settings` gives them."""
        return {"optimizer": "AdamW", **asdict(self.adamw)}

    def adopt(self, settings: Mapping[str, Any]) -> None:
        """Take settings of a resumed run, also in the parameter group of the optimizer that was built."""
        self.adamw = replace(self.adamw, **settings)
        for group in self._groups:
            group.update(self._group())

    def build(self, network: nn.Module) -> torch.optim.AdamW:
        """AdamW on the weights of a network that are trained."""
        trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        if coarse := sorted({str(p.dtype).removeprefix("torch.") for _, p in trained if p.dtype.itemsize < 4}):
            logger.warning(
                "AdamW updates weights in %s, where an update that is small beside its weight is rounded away: "
                "32-true and bf16-mixed keep it",
                " and ".join(coarse),
            )
        optimizer = torch.optim.AdamW(trained, **self._group())
        self._groups = optimizer.param_groups
        return optimizer

    def _group(self) -> dict[str, Any]:
        s = self.adamw
        return {"lr": s.lr, "betas": (s.beta1, s.beta2), "eps": s.eps, "weight_decay": s.weight_decay}

    def step(self, module: Any, parts: list[Any]) -> Tensor:
        """One step on the parts of a batch, weighted by example (``lm``: by token); their graphs are freed one by one.

        Returns the loss of the batch before the update, a float32 scalar.
        """
        optimizer = module.optimizers()
        optimizer.zero_grad(set_to_none=True)
        weights = [batch_weight(part) for part in parts]
        losses = []
        for part, weight in zip(parts, weights, strict=True):
            loss = module.loss(part).float().reshape(()) * (weight / sum(weights))
            if getattr(part, "reward", None) is not None or not loss.requires_grad:
                raise ValueError(
                    f"method {self.method!r} needs a loss with a gradient, and this objective has none: choose a "
                    "zeroth-order method (s-mezo, mezo, r-mezo) or another objective"
                )
            module.manual_backward(loss)
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        norm = nn.utils.clip_grad_norm_(module.model.parameters(), self.adamw.gradient_clip or math.inf)
        self.last_loss, gradient_norm = torch.stack([total, norm.float()]).tolist()
        if math.isfinite(self.last_loss) and math.isfinite(gradient_norm):
            self._skipped_in_row = 0
            self._without_gradient = 0 if gradient_norm or not self.last_loss else self._without_gradient + 1
            if self._without_gradient == PATIENCE:
                logger.warning("the last %d steps did nothing: %s", PATIENCE, self.dead)
        else:
            self.skipped_steps += 1
            self._skipped_in_row += 1
            values = f"loss {self.last_loss:g}, gradient norm {gradient_norm:g}"
            logger.warning("step skipped: %s", values)
            if self._skipped_in_row >= MAX_SKIPPED:
                raise NonFiniteLossError(
                    f"{MAX_SKIPPED} losses or gradients in a row were not finite (the last: {values}): try a smaller "
                    f"lr (now {self.adamw.lr:g}) or another precision"
                )
            optimizer.zero_grad(set_to_none=True)  # AdamW passes over weights without a gradient
        optimizer.step()  # also for a skipped step, as it counts the Trainer's steps
        return total


def optimizer_of(module: Any) -> torch.optim.Optimizer | None:
    """The optimizer of the module's method on its network, attached to it; None if nothing is trained."""
    if module.baseline is not None:
        if module.trainer.world_size > 1:
            raise MisconfigurationException(
                f"method {module.method!r} runs in one process, as nothing here adds up gradients over "
                f"{module.trainer.world_size}: set devices=1"
            )
        adamw: torch.optim.AdamW = module.baseline.build(module.model)
        return adamw
    if not module.zeroth_order:
        return None
    optimizer = build_zeroth_order(module, module.model.named_parameters())
    if module.perturbation == "layerwise":
        optimizer.attach(module.model)
    if module._trainer is not None and module.trainer.world_size > 1:
        # else replicas would drift apart where only one of them reads a weight
        optimizer.participation.over_processes = lambda flags: module.trainer.strategy.all_gather(flags).amax(0)
    return optimizer


def build_zeroth_order(module: Any, parameters: Iterable[tuple[str, nn.Parameter]]) -> SparseMeZO:
    """The optimizer of a zeroth-order method; settings that do not go together are refused."""
    optimizer: Any = module.build_optimizer(parameters)
    if not isinstance(optimizer, SparseMeZO):
        raise TypeError(f"optimizer must build a SparseMeZO, got {type(optimizer).__name__}, which needs gradients")
    if mask := METHODS[module.method].mask if module.method else None:
        for group in optimizer.param_groups:
            # small is the default, so it was perhaps not asked for; `adopt` says what a rank needs
            if group["mask"] not in ("small", mask) and optimizer.rank is None:
                raise ValueError(
                    f"method {module.method!r} has mask {mask!r}, but the optimizer was given {group['mask']!r}"
                )
            group["mask"] = mask
        optimizer.adopt({"mask": mask})
    if is_per_row(optimizer) and module.perturbation == "in_place":
        raise ValueError(
            "perturbation='in_place' perturbs the weights themselves, which all rows of a batch read, and "
            "directions='per_row' needs each row to see its own: set perturbation='layerwise'"
        )
    return optimizer


def is_per_row(optimizer: Any) -> bool:
    """Whether each row of a batch has a direction of its own, so that its loss must be known."""
    return isinstance(optimizer, SparseMeZO) and optimizer.directions == "per_row"


def scheduler_of(module: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The module's scheduler on an optimizer, None if there is none; one that needs another optimizer is refused."""
    try:
        return None if module.build_scheduler is None else module.build_scheduler(optimizer)
    except ValueError as error:
        if "cycle_momentum" not in str(error):
            raise
        raise ValueError(
            "lr_scheduler: this scheduler cycles a momentum, and SparseMeZO has none: set cycle_momentum: false in the "
            "scheduler's init_args (--model.lr_scheduler.cycle_momentum false)"
        ) from error


def check_resumed(module: Any, then: Mapping[str, Any]) -> None:
    """Refuse another method or adapter than a run had so far; no method stays that of a zeroth-order run."""
    before = then.get("method")
    if module.method is None and before is not None and METHODS[before].order == 0:
        module.method = before
        module.save_hyperparameters({"method": before})
    adapters = adapter_of(before, then.get("adapter")), module.adapter
    for name, (one, other) in {"method": (before, module.method), "adapter": adapters}.items():
        if then and one != other:
            raise ValueError(
                f"a resumed run cannot change its {name} ({one!r} -> {other!r}): give the checkpoint's, or start a new "
                "run from its weights"
            )


def log_method(module: Any) -> None:
    """Log the method, and how many weights it trains."""
    name, groups = module.method, [group for each in module.trainer.optimizers for group in each.param_groups]
    trained = sum(p.numel() for group in groups for p in group["params"])
    frozen = sum(p.numel() for p in module.model.parameters()) - trained
    settings = "" if module.baseline is None else f", {module.baseline.settings()}"
    counts = f"{trained:,} weights are trained, {frozen:,} are frozen"
    logger.info("method %s (%s): %s%s", name, METHODS[name].summary, counts, settings)


def log_directions(optimizer: Any) -> None:
    """Log which directions the first step took, where they are not the papers'."""
    kind, rank, rule = optimizer.directions, optimizer.rank, optimizer.coefficients
    if (kind, rank, rule) == ("shared", None, "raw"):
        return
    rows = optimizer.last_step.rows
    of = f"one for each of the {rows} rows of the first batch" if kind == "per_row" else "one for the batch"
    noise = ("sign flips" if kind == "per_row" else "full noise") if rank is None else f"rank {rank}"
    logger.info("directions %s (%s), %s, coefficients %s", kind, of, noise, rule)


def trained_only(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a module's state that are trained; all of them if nothing is frozen."""
    trained = {name: p.requires_grad for name, p in module.named_parameters()}
    return {name: tensor for name, tensor in state.items() if trained.get(name, all(trained.values()))}


def frozen_sample(module: nn.Module) -> dict[str, Any]:
    """Some values of each frozen weight, which a checkpoint keeps to know the network that it was trained on."""
    frozen = [p.detach() for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    values = [flat[:: max(1, flat.numel() // 8)][:8].float() for flat in (p.flatten() for p in frozen)]
    return {"dtype": str(frozen[0].dtype), "values": torch.cat(values).cpu()} if frozen else {}


def check_frozen(module: Any, then: Mapping[str, Any]) -> None:
    """Refuse frozen weights that are not those of `frozen_sample`; in another dtype they are compared roughly."""
    now = frozen_sample(module)
    one, other = then["values"], now.get("values", torch.empty(0))
    rough = {"rtol": 0.0, "atol": 0.0} if then["dtype"] == now.get("dtype") else {"rtol": 2.0**-6, "atol": 1e-6}
    if one.shape != other.shape or not torch.allclose(one, other, equal_nan=True, **rough):
        raise ValueError(
            f"the checkpoint's weights were trained on another network than {module.pretrained or 'this one'}: the "
            "frozen weights differ; give the pretrained model of that run"
        )


def check_dtypes(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to train on in another precision than that of a checkpoint's weights and of its frozen ones."""
    own = module.state_dict()
    pairs = [
        (str(tensor.dtype), str(own[name].dtype)) for name, tensor in checkpoint["state_dict"].items() if name in own
    ]
    then, now = checkpoint.get("frozen"), frozen_sample(module)
    if then and now:
        pairs.append((then["dtype"], now["dtype"]))
    if other := next((pair for pair in pairs if pair[0] != pair[1]), None):
        raise ValueError(
            f"a resumed run cannot change its precision: the checkpoint is of weights in {other[0]}, and they are "
            f"{other[1]} here; give the same --trainer.precision, or start a new run from its weights"
        )


def check_network(module: Any, then: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a network with another adapter or head; ``then`` are its run's hyperparameters."""
    before = then.get("method")
    parts = (adapter_of(before, then.get("adapter")), before == "linear-probe")
    if then and parts != (module.adapter, module.method == "linear-probe"):
        way = "the run's adapter" if before in (None, module.method) else f"--model.method {before}"
        raise ValueError(
            f"the checkpoint is of method {before!r} with adapter {parts[0]}, and this is method {module.method!r} "
            f"with adapter {module.adapter}: pass {way}, or the run's config.yaml with --config"
        )


def check_state(module: Any, state: Mapping[str, Tensor]) -> None:
    """Refuse the weights of another network with a ``ValueError``; those that a baseline froze may be missing."""
    own = module.state_dict()
    needed = own if module.baseline is None else (n for n, p in module.named_parameters() if p.requires_grad)
    found = {
        "lacks": [name for name in needed if name not in state],
        "has besides": [name for name in state if name not in own],
        "has in another shape": [name for name in own if name in state and state[name].shape != own[name].shape],
    }
    if any(found.values()):
        parts = (f"{what} {len(names)} ({', '.join(names[:3])})" for what, names in found.items() if names)
        raise ValueError(f"the checkpoint is of another model or method: of the weights here it {', it '.join(parts)}")
