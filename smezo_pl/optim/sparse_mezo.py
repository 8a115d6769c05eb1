"""Sparse MeZO as a `torch.optim.Optimizer`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from smezo_pl.optim.coefficients import CoefficientsName, coefficients, rounded
from smezo_pl.optim.directions import SHARED, Directions, DirectionsName
from smezo_pl.optim.kernels import KernelName
from smezo_pl.optim.masked import Masked
from smezo_pl.optim.masks import MaskRule
from smezo_pl.optim.noise import Distribution
from smezo_pl.optim.parameters import (
    OptimizedTensor,
    Patterns,
    as_patterns,
    check_group,
    check_rank,
    check_scope,
    check_settings,
    check_state,
    choose,
    remembers_given,
    some,
)
from smezo_pl.optim.participation import Participation
from smezo_pl.optim.perturbation import deferred_interrupt, run_forwards
from smezo_pl.optim.perturbation.layerwise import Closure, Layerwise
from smezo_pl.optim.selection import Selection
from smezo_pl.optim.standstill import Standstill
from smezo_pl.optim.step import (
    Progress,
    StepPerturbation,
    StepRecord,
    check_record,
    rates_of,
)

logger = logging.getLogger(__name__)

_SETTINGS = (
    *("num_samples", "seed", "noise", "kernel", "max_skipped", "directions", "rank", "coefficients", "strict"),
)
"""Attributes that are arguments of the constructor."""

_OF_NOISE = ("seed", "num_samples", "noise")
"""Those that a state brings along."""

_COPIED = (
    *("given", "overrides", *_SETTINGS, "participation"),
    *("_scope", "_given", "_progress", "_selection", "_last_step", "_logged", "_copied_bytes"),
)
"""Attributes that a copied or pickled optimizer keeps beside torch's own."""


@remembers_given
class SparseMeZO(Masked, Optimizer):
    """Sparse memory-efficient zeroth-order optimizer: two forwards per step, no backward, no optimizer state.

    One step with the closure's loss ``L``, weights ``theta`` and, for each tensor, the mask ``m`` of its small weights:

        m = [|theta| <= h],  z ~ N(0, I)
        g = (L(theta + eps m z) - L(theta - eps m z)) / (2 eps)
        theta <- theta - lr (g m z + weight_decay m theta)

    ``z`` (the perturbation) is a pure function of ``seed``, the step, the sample, the tensor's number and the element's
    index, regenerated wherever it is needed and never stored; torch's generators are not touched. ``g`` (the projected
    gradient) is one float32 number. ``h`` is the threshold below which the fraction ``1 - sparsity`` of the tensor's
    magnitudes lie. 16-bit weights are updated with stochastic rounding, which is a pure function of the same integers.

    What you must do: give the closure to `step`, put the network in ``eval()`` mode so that both forwards see the same
    function, and call `attach` with the network (recommended: weights are then never written during a forward). Without
    `attach` the whole model is perturbed in place, and brought back to the same bits from a copy of the active weights.
    The closure runs under ``no_grad``, twice per sample, on the same batch. A forward must not write weights.
    Tensors that no forward reads are left alone (see `unread`).

    With ``directions="per_row"`` row ``r`` of the batch sees its own ``theta + eps Z_r`` in the same two forwards, and
    with its own losses has its own ``g_r``; the update takes the mean of ``g_r Z_r``: as many numbers per step as rows,
    which helps most in the first hundreds of steps. With a ``rank``, ``Z`` is a sum of so many outer products, of all
    weights, and costs no pass over them in a forward; without, it keeps the mask and costs a second matrix product.
    See `smezo_pl.optim.directions`, and for what marks the rows of a forward `smezo_pl.optim.rows`.

    References: Sparse MeZO, arXiv 2402.15751; MeZO, arXiv 2305.17333.

    Args:
        params: Parameters, ``named_parameters()`` or groups of either; a group may have its own ``lr``, ``eps``,
            ``sparsity``, ``weight_decay``, ``mask`` and ``mask_update``. Those with ``requires_grad=False`` stay out.
        lr: Learning rate, at least 0.
        eps: Perturbation scale, above 0.
        sparsity: Fraction of each tensor left alone, in ``[0, 1)``; 0 is MeZO. Ignored by ``mask="dense"``.
        mask: ``small`` perturbs the smallest magnitudes (Sparse MeZO), ``large`` the largest, ``random`` a random
            choice (R-MeZO), ``dense`` all weights (MeZO). None is ``dense`` with a ``rank``, else ``small``.
        mask_update: ``dynamic`` compares the weights with the threshold at every step (``random``: draws anew at every
            step), ``constant`` keeps the first mask, packed into one bit per weight, until `refresh_masks`.
        num_samples: Perturbations averaged in a step (n-SPSA), at least 1; each costs two forwards.
        weight_decay: Decay of the active weights, at least 0.
        seed: Base seed of all noise, in ``[0, 2**64)``.
        include: Patterns of parameter names (``*`` and ``?``, or a module's name) to optimize; None for all.
        exclude: Patterns of names to leave alone.
        dense: Patterns of names whose weights are all active, whatever the rule.
        noise: Distribution of ``z``: ``gaussian``, the papers', or ``rademacher``, +1 or -1.
        kernel: What makes the fused passes: ``numba`` (CPU), ``triton`` (CUDA), ``torch`` (any device, the slow
            reference) or ``auto``. All give the same bits.
        maximize: Whether to ascend.
        max_skipped: Steps in a row that may be skipped for a loss that is not finite before `step` raises.
        directions: ``shared``: one direction for the whole batch, the papers'. ``per_row``: one for each of its rows;
            the closure then returns one loss per row, and the optimizer must be attached.
        rank: Rank of the directions, in ``[1, 64]``, of all weights. None for full noise; a direction per row is then
            ``m z`` with the signs of rows and columns flipped at random.
        coefficients: What stands for ``g`` in the update (see `smezo_pl.optim.coefficients`): ``raw``, ``g`` itself;
            ``normalized``, ``g`` over its root mean square in the step; ``moving``, over a moving one of all steps so
            far; ``ranks``, its signed rank in the step. All but ``raw`` need a learning rate of their own.
        strict: Whether to refuse a tensor whose rows cannot be told, which otherwise has one direction for the batch,
            and one that is read for the first time after the first step.

    Raises:
        ValueError: If a number is out of range, the parameter list is empty or a pattern matches nothing.
        TypeError: If a parameter's dtype or kind is not supported.

    Examples:
        >>> model = torch.nn.Linear(4, 1)
        >>> x, y = torch.randn(8, 4), torch.randn(8, 1)
        >>> optimizer = SparseMeZO(model.named_parameters(), lr=1e-2)
        >>> optimizer.attach(model)
        >>> loss = optimizer.step(lambda: torch.nn.functional.mse_loss(model(x), y))
    """

    given: frozenset[str]
    """Names of the arguments that were given, not left at their defaults."""

    overrides: list[dict[str, Any]]
    """Of each parameter group, the settings that were given for it alone."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        eps: float = 1e-3,
        sparsity: float = 0.8,
        mask: MaskRule | None = None,
        mask_update: Literal["dynamic", "constant"] = "dynamic",
        num_samples: int = 1,
        weight_decay: float = 0.0,
        seed: int = 0,
        include: Patterns = None,
        exclude: Patterns = None,
        *,
        dense: Patterns = None,
        noise: Distribution = "gaussian",
        kernel: KernelName = "auto",
        maximize: bool = False,
        max_skipped: int = 20,
        directions: DirectionsName = "shared",
        rank: int | None = None,
        coefficients: CoefficientsName = "raw",
        strict: bool = False,
    ) -> None:
        self.num_samples, self.seed, self.max_skipped, self.strict = num_samples, seed, max_skipped, strict
        self.noise: Distribution = noise
        self.kernel: KernelName = kernel
        self.directions: DirectionsName = directions
        self.coefficients: CoefficientsName = coefficients
        self.rank = rank
        check_settings({name: getattr(self, name) for name in _SETTINGS})
        if mask is None:
            mask, self.given = ("small" if rank is None else "dense"), self.given - {"mask"}
        self._scope = {k: as_patterns(k, v) for k, v in (("include", include), ("exclude", exclude), ("dense", dense))}
        self._given: list[str] = []
        self._selection, self.participation = Selection(), Participation()
        self._progress, self._copied_bytes = Progress(), 0
        self._last_step: StepRecord | None = None
        self._logged: set[str] = set()
        self.overrides = []
        self._wire()
        defaults: dict[str, Any] = {"lr": lr, "eps": eps, "sparsity": sparsity, "weight_decay": weight_decay}
        defaults |= {"mask": mask, "mask_update": mask_update, "maximize": maximize}
        super().__init__(params, defaults)
        check_scope(self._scope, self._given, self.param_groups)

    def _wire(self) -> None:
        """Make the parts that are not copied with the optimizer."""
        self._listed: list[OptimizedTensor] = []
        self._layerwise: Layerwise | None = None
        self.standstill = Standstill()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, numbered after those given before (see `torch.optim.Optimizer.add_param_group`)."""
        group = {**self.defaults, **param_group}
        check_group(group)
        check_rank(self.rank, [group])
        self.overrides.append({name: param_group[name] for name in self.defaults if name in param_group})
        group |= choose(group["params"], self._scope, self._given, self.param_groups)
        group |= {"thresholds": [None] * len(group["params"]), "ready": False, "mask_step": 0}
        super().add_param_group(group)

    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor other than the parameters, as plain values."""
        return {
            # torch puts one in when a state is loaded
            **{name: value for name, value in self.defaults.items() if name != "differentiable"},
            **{argument: list(patterns) or None for argument, patterns in self._scope.items()},
            **{name: getattr(self, name) for name in _SETTINGS},
        }

    def adopt(self, settings: Mapping[str, Any]) -> None:
        """Take settings of a resumed run: those of the constructor, except ``include`` and ``exclude``."""
        for name, value in settings.items():
            if name in self.defaults:
                self.defaults[name] = value
                for group, own in zip(self.param_groups, self.overrides, strict=True):
                    group[name] = own.get(name, value)
            elif name in self._scope:
                self._scope[name], self._listed = as_patterns(name, value), []
            else:
                setattr(self, name, value)
        check_rank(self.rank, self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer in plain types: groups with thresholds, counters, and packed masks where constant."""
        state = super().state_dict()
        state["smezo"] = {
            "noise_scheme": self._directions.scheme,
            **{name: getattr(self, name) for name in _OF_NOISE},
            **({"directions": self.directions, "rank": self.rank} if self._directions != SHARED else {}),
            **({"coefficients": self.coefficients} if self.coefficients != "raw" else {}),
            **self._progress.state(),
            **self.participation.state(),
            "bits": dict(self._selection.bits),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a `state_dict`.

        Raises:
            ValueError: If the state is another optimizer's, of other directions, coefficients or parameters.
        """
        check_state(state_dict, self.param_groups, self._directions, self.coefficients)
        own = state_dict["smezo"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "smezo"})
        for name in _OF_NOISE:
            setattr(self, name, own[name])
        self._progress.load(own)
        self.participation.load(own)
        self._selection.load_bits(self._tensors(), own["bits"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in _COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "given" in state:  # a copy; `load_state_dict` comes by here too
            self._wire()

    def attach(self, module: nn.Module) -> None:
        """Perturb layer by layer from now on, inside the module's forward.

        Args:
            module: The network that the closure runs; it holds every parameter of the optimizer.

        Raises:
            ValueError: If it does not hold them, or is compiled.
        """
        layerwise = Layerwise(module, {tensor.name: tensor.parameter for tensor in self._tensors()})
        self.detach()
        self._layerwise = layerwise

    def detach(self) -> None:
        """Undo `attach`: no hook stays on the module, and steps perturb in place again."""
        if self._layerwise is not None:
            self._layerwise.detach()
        self._layerwise = None

    @property
    def attached(self) -> nn.Module | None:
        """The module given to `attach`, or None."""
        return self._layerwise.module if self._layerwise is not None else None

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a loss was not finite."""
        return self._progress.skipped

    @property
    def no_signal_steps(self) -> int:
        """Steps in which the losses on both sides were equal in all directions, so that no direction was followed."""
        return self._progress.no_signal

    @property
    def last_step(self) -> StepRecord:
        """What the last step did.

        Raises:
            RuntimeError: Before the first step.
        """
        if self._last_step is None:
            raise RuntimeError("no step has been taken yet")
        return self._last_step

    def extra_bytes(self) -> int:
        """Bytes held beside the weights: scratch or copies of the last step's forwards, and packed constant masks."""
        bits = sum(packed.numel() for packed in self._selection.bits.values())
        return bits + (self._layerwise.extra_bytes() if self._layerwise is not None else self._copied_bytes)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step: two forwards per sample, then the update.

        Args:
            closure: Runs the forward on one batch and returns its loss: a number or a tensor of one element. It may be
                any number, differentiable or not. With ``directions="per_row"`` it returns the loss of each row, a
                tensor ``[R]`` whose mean is the loss, where rows are the first dimension of the network's input.

        Returns:
            Mean of ``l+`` and ``l-`` over samples and rows, a float32 tensor without dimensions, on the CPU.

        Raises:
            TypeError: If the closure is missing or does not return a number, or one for each row.
            ValueError: If it returns other than one number for each row, or ``strict`` refuses a tensor.
            RuntimeError: If a weight is written; with ``directions="per_row"`` if rows are mixed or cannot be told.
            NonFiniteLossError: After ``max_skipped`` losses in a row that are not finite.
        """
        if closure is None:
            raise TypeError("SparseMeZO.step needs a closure that runs the forward and returns the loss")
        started = perf_counter()
        self.prepare_masks()
        number, own, per_row = self.steps_done, self.participation, self._directions.per_row
        step = self._perturbation(number, own.shared)
        if per_row and own.shared is None and self._layerwise is not None:
            anywhere = partial(own.anywhere, device=self._tensors()[0].parameter.device)
            own.share(self._tensors(), self._layerwise.learn(closure, step, self.strict, anywhere))
            step = self._perturbation(number, own.shared)
        # the group's own number says the same as `refreshed`, and outlives a resume between refresh and step
        fresh = any(group["mask_step"] == number for group in self.param_groups)
        watched = own.watched(self._tensors(), fresh)
        losses, forward_seconds, self._copied_bytes, read = run_forwards(
            closure, self.num_samples, step, self._layerwise, [tensor.parameter for tensor in watched], self._log_once
        )
        if len(losses) == 1 and self.coefficients in ("normalized", "ranks"):
            self._log_once(f"coefficients={self.coefficients!r} of one direction per step are +1 or -1")
        moving = self._progress.mean_square, self._progress.signals
        numbers, mean_square = coefficients(losses, self.param_groups[0]["eps"], self.coefficients, *moving)
        unread = own.after_forwards(watched, fresh, read, number)
        if self.strict and (late := own.unread & ~unread & (own.shared or 0)):
            names = some(repr(tensor.name) for tensor in self._tensors() if late >> tensor.number & 1)
            raise ValueError(
                f"strict=True refuses parameters of which the first step did not find out how their rows are told, as "
                f"it did not read them: {names}; leave them out with exclude, or give them one direction for the batch "
                "by strict=False"
            )
        record = StepRecord(
            step=number,
            losses=losses,
            projected_gradients=rounded(numbers) if per_row else numbers,
            **rates_of(self.param_groups),
            skipped=not numbers,
            refreshed=self._selection.refreshed,
            unread=unread,
            rows=len(losses) // self.num_samples,
            shared=own.shared or 0,
            mean_square=mean_square,
            forward_seconds=forward_seconds,
        )
        self.standstill.look(record, step)
        self._apply(record, step)
        self._last_step = replace(record, total_seconds=perf_counter() - started)
        self._progress.check(self.max_skipped, losses)
        return torch.tensor(self._last_step.loss, dtype=torch.float32)

    def replay_step(
        self,
        step: int,
        projected_gradients: Sequence[float],
        lr: Sequence[float],
        weight_decay: Sequence[float],
        skipped: bool = False,
        unread: int = 0,
        shared: int = 0,
    ) -> None:
        """Make the update of a step again, with no forward, from what its `StepRecord` holds; see `replay_steps`."""
        rates = rates_of(self.param_groups) | {"lr": tuple(lr), "weight_decay": tuple(weight_decay)}
        how: dict[str, Any] = {"skipped": skipped, "unread": unread, "shared": shared}
        how |= {"rows": max(1, len(projected_gradients) // self.num_samples) if self._directions.per_row else 1}
        how |= {"mean_square": self._progress.mean_square}
        self.replay_steps([StepRecord(step, (), tuple(projected_gradients), **rates, **how)])

    @torch.no_grad()
    def replay_steps(self, steps: Sequence[StepRecord]) -> None:
        """Make the updates of several steps again from their records. Masks and eps are those of the optimizer.

        Args:
            steps: The steps, the first with the index `steps_done`.

        Raises:
            ValueError: If a step is not the next one, or numbers are missing; then nothing is written.
        """
        for index, record in enumerate(steps, self.steps_done):
            check_record(record, index, len(self.param_groups), self.num_samples, self._directions.per_row)
        self.prepare_masks()
        for record in steps:
            self._apply(record, self._perturbation(record.step, record.shared))

    @property
    def _directions(self) -> Directions:
        return Directions(self.directions == "per_row", self.rank)

    def _perturbation(self, step: int, shared: int | None) -> StepPerturbation:
        check_rank(self.rank, self.param_groups)
        noise = self.noise, self.seed, step, self.num_samples
        return StepPerturbation(self._tensors(), self._selection, *noise, self._directions, shared or 0)

    def _apply(self, record: StepRecord, step: StepPerturbation) -> None:
        """Make the update of a step and count it, whole or not at all."""
        with deferred_interrupt():
            if not record.skipped:
                step.update(record, self.param_groups)
            self._progress.count(record)
            self._selection.refreshed, self.participation.unread = False, record.unread
            if self._directions.per_row:
                self.participation.shared = record.shared

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            logger.info("%s", line)
