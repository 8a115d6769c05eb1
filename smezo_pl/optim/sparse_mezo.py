"""Sparse MeZO as a `torch.optim.Optimizer`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from smezo_pl.optim.kernels import Kernel, KernelName, get_kernel
from smezo_pl.optim.masks import Mask, MaskRule
from smezo_pl.optim.noise import NOISE_SCHEME, Law
from smezo_pl.optim.parameters import (
    Patterns,
    as_patterns,
    check_group,
    check_integer,
    check_tensor,
    float32,
    matches,
    named,
    require_matches,
)
from smezo_pl.optim.perturbation.directions import StepMoves
from smezo_pl.optim.perturbation.forwards import Closure, Forwards, deferred_interrupt
from smezo_pl.optim.perturbation.layerwise import Layerwise
from smezo_pl.optim.selection import MaskStat, Member, Selection
from smezo_pl.optim.step import StepRecord, check_recorded, coefficients, update_in_blocks

logger = logging.getLogger(__name__)

_COPIED = (
    *("num_samples", "seed", "max_skipped", "noise", "kernel", "_scope", "_given", "_steps_done", "_skipped"),
    *("_skipped_in_row", "_refreshed", "_last_step", "_said", "_copied_bytes"),
)
"""Attributes that a copied or pickled optimizer keeps beside torch's own."""


class NonFiniteLossError(RuntimeError):
    """Too many losses in a row were infinite or NaN."""


class SparseMeZO(Optimizer):
    """Sparse memory-efficient zeroth-order optimizer: two forwards a step, no backward, no optimizer state.

    One step with the closure's loss ``L``, weights ``theta`` and, for each tensor, the mask ``m`` of its small weights:

        m = [|theta| <= h],  z ~ N(0, I)
        g = (L(theta + eps m z) - L(theta - eps m z)) / (2 eps)
        theta <- theta - lr (g m z + weight_decay m theta)

    ``z`` (the perturbation) is a pure function of ``seed``, the step, the sample, the tensor's number and the element's
    index, made again wherever it is needed and never stored; torch's generators are not touched. ``g`` (the projected
    gradient) is one float32 number. ``h`` is the threshold below which the fraction ``1 - sparsity`` of the tensor's
    magnitudes lie. 16-bit weights are updated with stochastic rounding, which is a pure function of the same integers.

    What you must do: give the closure to `step`, put the network in ``eval()`` mode so that both forwards see the same
    function, and call `attach` with the network (recommended: weights are then never written during a forward). Without
    `attach` the whole model is perturbed in place, and brought back to the same bits from a copy of the active weights.
    The closure runs under ``no_grad``, twice a sample, on the same batch; in the first step after `attach` it may run
    again, while weights that are used outside their module's forward are looked for.

    References: Sparse MeZO, arXiv 2402.15751; MeZO, arXiv 2305.17333.

    Args:
        params: Parameters, ``named_parameters()`` or groups of either; a group may have its own ``lr``, ``eps``,
            ``sparsity``, ``weight_decay``, ``mask`` and ``mask_update``. Those with ``requires_grad=False`` stay out.
        lr: Learning rate, at least 0.
        eps: Perturbation scale, above 0.
        sparsity: Fraction of each tensor left alone, in ``[0, 1)``; 0 is MeZO. Ignored by ``mask="dense"``.
        mask: ``small`` perturbs the smallest magnitudes (Sparse MeZO), ``large`` the largest, ``random`` a random
            choice (R-MeZO), ``dense`` all weights (MeZO).
        mask_update: ``dynamic`` compares the weights with the threshold at every step (``random``: draws anew at every
            step), ``constant`` keeps the first mask, packed into one bit a weight, until `refresh_masks`.
        num_samples: Perturbations averaged in a step (n-SPSA), at least 1; each costs two forwards.
        weight_decay: Decay of the active weights, at least 0.
        seed: Base seed of all noise, in ``[0, 2**64)``.
        include: Patterns of parameter names (``*`` and ``?``, or a module's name) that take part; None for all.
        exclude: Patterns of names that do not take part.
        dense: Patterns of names that take part with all their weights.
        noise: Law of ``z``: ``gaussian``, the papers', or ``rademacher``, +1 or -1.
        kernel: What makes the fused passes: ``numba`` (CPU), ``triton`` (CUDA), ``torch`` (any device, the slow
            reference) or ``auto``. All give the same bits.
        maximize: Whether to ascend.
        max_skipped: Steps in a row that may be skipped for a loss that is not finite before `step` raises.

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

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        eps: float = 1e-3,
        sparsity: float = 0.8,
        mask: MaskRule = "small",
        mask_update: Literal["dynamic", "constant"] = "dynamic",
        num_samples: int = 1,
        weight_decay: float = 0.0,
        seed: int = 0,
        include: Patterns = None,
        exclude: Patterns = None,
        *,
        dense: Patterns = None,
        noise: Law = "gaussian",
        kernel: KernelName = "auto",
        maximize: bool = False,
        max_skipped: int = 20,
    ) -> None:
        check_integer("num_samples", num_samples, 1, 1 << 24)
        check_integer("seed", seed, 0, 1 << 64)
        check_integer("max_skipped", max_skipped, 1, 1 << 31)
        if noise not in ("gaussian", "rademacher"):
            raise ValueError(f"noise must be 'gaussian' or 'rademacher', got {noise!r}")
        if kernel not in ("auto", "numba", "triton", "torch"):
            raise ValueError(f"kernel must be 'auto', 'numba', 'triton' or 'torch', got {kernel!r}")
        self.num_samples, self.seed, self.max_skipped = num_samples, seed, max_skipped
        self.noise: Law = noise
        self.kernel: KernelName = kernel
        self._scope = {k: as_patterns(k, v) for k, v in (("include", include), ("exclude", exclude), ("dense", dense))}
        self._given: list[str] = []
        self._steps_done = self._skipped_in_row = self._skipped = 0
        self._refreshed = False
        self._copied_bytes = 0
        self._last_step: StepRecord | None = None
        self._said: set[str] = set()
        self._wire()
        defaults = {
            "lr": lr,
            "eps": eps,
            "sparsity": sparsity,
            "weight_decay": weight_decay,
            "mask": mask,
            "mask_update": mask_update,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        for argument, patterns in self._scope.items():
            require_matches(argument, patterns, self._given)
        if not any(group["params"] for group in self.param_groups):
            raise ValueError(
                f"no parameter takes part: of {len(self._given)} given, none has requires_grad=True and is in include "
                "and not in exclude"
            )

    def _wire(self) -> None:
        """Make the parts that refer to this optimizer and are not copied with it."""
        self._kernels: dict[tuple[KernelName, torch.device], Kernel] = {}
        self._listed: list[Member] = []
        self._layerwise: Layerwise | None = None
        self._selection = Selection(self._members, self._kernel, lambda: self.param_groups)

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, numbered after those given before (see `torch.optim.Optimizer.add_param_group`)."""
        group = {**self.defaults, **param_group}
        check_group(group)
        pairs, with_names = named(group["params"])
        if not with_names and any(self._scope.values()):
            raise ValueError(
                "include, exclude and dense need names: pass model.named_parameters() instead of parameters()"
            )
        kept: list[tuple[str, Tensor]] = []
        numbers: list[int] = []
        for name, tensor in pairs:
            number = len(self._given)
            label = name if name is not None else f"parameter {number}"
            self._given.append(label)
            include, exclude = self._scope["include"], self._scope["exclude"]
            if not tensor.requires_grad or (include and not matches(label, include)) or matches(label, exclude):
                continue
            if not tensor.is_meta:
                check_tensor(label, tensor)
            kept.append((label, tensor))
            numbers.append(number)
        group["params"] = [tensor for _, tensor in kept]
        group["names"] = [label for label, _ in kept]
        if with_names:  # named apart from the tensors: torch takes a group that the filters emptied for an unnamed one
            group["param_names"] = list(group["names"])
        group["numbers"] = numbers
        group["thresholds"] = [None] * len(kept)
        group["ready"] = False
        group["mask_step"] = 0
        super().add_param_group(group)

    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor other than the parameters, as plain values."""
        return {
            **self.defaults,
            **{argument: list(patterns) or None for argument, patterns in self._scope.items()},
            "num_samples": self.num_samples,
            "seed": self.seed,
            "noise": self.noise,
            "kernel": self.kernel,
            "max_skipped": self.max_skipped,
        }

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer in plain types: groups with thresholds, counters, and packed masks where constant."""
        state = super().state_dict()
        state["smezo"] = {
            "noise_scheme": NOISE_SCHEME,
            "steps_done": self._steps_done,
            "skipped": self._skipped,
            "skipped_in_row": self._skipped_in_row,
            "seed": self.seed,
            "num_samples": self.num_samples,
            "noise": self.noise,
            "bits": dict(self._selection.bits),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: If the state is another optimizer's, of another noise scheme or of other parameters.
        """
        own = state_dict.get("smezo")
        if own is None:
            raise ValueError("the state does not come from SparseMeZO: it has no entry 'smezo'")
        if own["noise_scheme"] != NOISE_SCHEME:
            raise ValueError(
                f"the state was made with noise scheme {own['noise_scheme']}, this version has scheme {NOISE_SCHEME}; "
                "the run cannot go on with other noise"
            )
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if saved["names"] != group["names"] or saved["numbers"] != group["numbers"]:
                raise ValueError(
                    f"the state belongs to other parameters: {len(saved['names'])} saved ({saved['names'][:2]}...), "
                    f"{len(group['names'])} here ({group['names'][:2]}...)"
                )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "smezo"})
        self._steps_done, self._skipped = own["steps_done"], own["skipped"]
        self._skipped_in_row = own["skipped_in_row"]
        self.seed, self.num_samples, self.noise = own["seed"], own["num_samples"], own["noise"]
        self._selection.load_bits(own["bits"])

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in _COPIED}
        return {**super().__getstate__(), **own, "bits": self._selection.bits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        bits = state.pop("bits", None)
        super().__setstate__(state)
        if bits is not None:  # a copy; `load_state_dict` comes by here too, and keeps its parts
            self._wire()
            self._selection.bits = bits

    def _members(self) -> list[Member]:
        owned = [(tensor, group) for group in self.param_groups for tensor in group["params"]]
        known = self._listed
        if len(owned) != len(known) or any(
            member.parameter is not tensor or member.group is not group
            for member, (tensor, group) in zip(known, owned, strict=True)
        ):
            self._listed = self._list_members()
        return self._listed

    def _list_members(self) -> list[Member]:
        dense = self._scope["dense"]
        return [
            Member(name, group["params"][position], number, position, matches(name, dense), group)
            for group in self.param_groups
            for position, (name, number) in enumerate(zip(group["names"], group["numbers"], strict=True))
        ]

    # ------------------------------------------------------------------ attach

    def attach(self, module: nn.Module) -> None:
        """Perturb layer by layer from now on, inside the module's forward.

        Args:
            module: The network that the closure runs; it holds every parameter of the optimizer.

        Raises:
            ValueError: If it does not hold them, or is compiled.
        """
        layerwise = Layerwise(module, {tensor.name: tensor.parameter for tensor in self._members()})
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

    # ------------------------------------------------------------------ masks

    def prepare_masks(self) -> None:
        """Compute the thresholds that are not there yet. The first step does it; call it to see them before."""
        self._refreshed |= self._selection.prepare(self._steps_done)

    def refresh_masks(self, sparsity: float | None = None) -> None:
        """Compute thresholds, and constant masks, again from today's weights.

        Args:
            sparsity: New sparsity of every group, in ``[0, 1)``; None keeps each group's own.

        Raises:
            ValueError: If the sparsity is out of range.
        """
        if sparsity is not None:
            for group in self.param_groups:
                check_group({**group, "sparsity": sparsity})
            for group in self.param_groups:
                group["sparsity"] = sparsity
        self._selection.make(self.param_groups, self._steps_done)
        self._refreshed = True

    def adopt_masks(self, other: SparseMeZO) -> None:
        """Take thresholds and constant masks from an optimizer of the same parameters, as after a replay.

        Raises:
            ValueError: If it has other parameters.
        """
        if [group["names"] for group in other.param_groups] != [group["names"] for group in self.param_groups]:
            raise ValueError("adopt_masks needs an optimizer of the same parameters in the same groups")
        for mine, its in zip(self.param_groups, other.param_groups, strict=True):
            mine.update(thresholds=list(its["thresholds"]), ready=its["ready"], mask_step=its["mask_step"])
        self._selection.load_bits(other._selection.bits)

    def thresholds(self) -> dict[str, float]:
        """Threshold of every tensor that takes part, by name; infinity where it has none."""
        self.prepare_masks()
        return self._selection.thresholds()

    def packed_masks(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Today's masks by parameter name, one bit a weight (see `smezo_pl.optim.masks.Mask`).

        Args:
            names: Parameters to look at; None for all.
        """
        self.prepare_masks()
        return self._selection.packed(self.seed, self._steps_done, names)

    def mask_stats(self) -> list[MaskStat]:
        """Size, number of active weights and threshold of every tensor that takes part, today."""
        self.prepare_masks()
        return self._selection.stats(self.seed, self._steps_done)

    # ------------------------------------------------------------------ the step

    @property
    def steps_done(self) -> int:
        """Steps taken so far, skipped ones included; the index of the next step."""
        return self._steps_done

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a loss was not finite."""
        return self._skipped

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
        """Take one step: two forwards a sample, then the update.

        Args:
            closure: Runs the forward on one batch and returns its loss: a number or a tensor of one element. It may be
                any number, differentiable or not.

        Returns:
            Mean of ``l+`` and ``l-`` over the samples, a float32 tensor without dimensions, on the CPU.

        Raises:
            TypeError: If the closure is missing or does not return a number.
            NonFiniteLossError: After ``max_skipped`` losses in a row that are not finite.
        """
        if closure is None:
            raise TypeError("SparseMeZO.step needs a closure that runs the forward and returns the loss")
        started = perf_counter()
        self.prepare_masks()
        forwards = Forwards(self.moves_at(self._steps_done), self._layerwise, self._kernel, self.say_once)
        losses = forwards.losses(closure, self.num_samples)
        self._copied_bytes = forwards.copied_bytes
        eps = self.param_groups[0]["eps"]
        gradients = tuple(float32((plus - minus) / (2.0 * eps)) for plus, minus in losses)
        skipped = not all(math.isfinite(value) for value in (*gradients, *(v for pair in losses for v in pair)))
        record = StepRecord(
            step=self._steps_done,
            losses=losses,
            projected_gradients=() if skipped else gradients,
            **self._rates(),
            skipped=skipped,
            refreshed=self._refreshed,
            forward_seconds=forwards.seconds,
        )
        self.replay_steps([record])
        self._last_step = replace(record, total_seconds=perf_counter() - started)
        if self._skipped_in_row >= self.max_skipped:
            raise NonFiniteLossError(
                f"the loss was not finite in {self._skipped_in_row} steps in a row (last pair {losses[-1]}); the "
                "weights are those before them. Try a smaller lr, a smaller eps, or bfloat16 in place of float16"
            )
        return torch.tensor(self._last_step.loss, dtype=torch.float32)

    def replay_step(
        self,
        step: int,
        projected_gradients: Sequence[float],
        lr: Sequence[float],
        weight_decay: Sequence[float],
        skipped: bool = False,
    ) -> None:
        """Make the update of a step again from its record, with no forward.

        Args:
            step: Index of the step; it must be `steps_done`.
            projected_gradients: One float32 number a sample; ignored when skipped.
            lr: Learning rate of each group.
            weight_decay: Weight decay of each group.
            skipped: Whether the step changed nothing.

        Raises:
            ValueError: If the step is not the next one, or numbers are missing.
        """
        rates = self._rates() | {"lr": tuple(lr), "weight_decay": tuple(weight_decay)}
        self.replay_steps([StepRecord(step, (), tuple(projected_gradients), **rates, skipped=skipped)])

    def replay_steps(self, steps: Sequence[StepRecord]) -> None:
        """Make the updates of several steps again, with the bits of `replay_step` one by one.

        Much faster where numba makes the updates: a block of weights takes many steps while it is in cache.

        Args:
            steps: The steps, the first with the index `steps_done`. Masks and eps stay as they are between them.

        Raises:
            ValueError: If a step is not the next one, or numbers are missing.
        """
        for index, recorded in enumerate(steps, self._steps_done):
            check_recorded(recorded, index, len(self.param_groups), self.num_samples)
        self.prepare_masks()
        with deferred_interrupt():
            made = [recorded for recorded in steps if not recorded.skipped]
            if made:
                self._update(made)
            for recorded in steps:
                self._steps_done += 1
                self._skipped += recorded.skipped
                self._skipped_in_row = self._skipped_in_row + 1 if recorded.skipped else 0
                self._refreshed = False

    def moves_at(self, step: int, members: Sequence[Member] | None = None) -> StepMoves:
        """What moves the weights at a step.

        Args:
            step: Index of the step.
            members: Tensors to move; None for all that take part.
        """
        moved = self._members() if members is None else members
        return StepMoves(moved, self._selection, self._kernel, self.noise, self.seed, step)

    def _rates(self) -> dict[str, Any]:
        """What a record has for each parameter group."""
        names = ("lr", "weight_decay", "eps", "sparsity")
        return {name: tuple(float(group[name]) for group in self.param_groups) for name in names}

    @torch.no_grad()
    def _update(self, steps: Sequence[StepRecord]) -> None:
        if len(steps) > 1:
            update_in_blocks(self, [(member, self._kernel(member.parameter)) for member in self._members()], steps)
            return
        self.moves_at(steps[0].step).update(coefficients(self.param_groups, steps[0]), self.param_groups)

    def mask_at(self, member: Member, step: int) -> Mask:
        """The mask of a tensor at a step, to be evaluated on its weights before the step."""
        return self._selection.mask(member, self.seed, step)

    def _kernel(self, where: Tensor | torch.device) -> Kernel:
        device = where if isinstance(where, torch.device) else where.device
        name: KernelName = "torch" if isinstance(where, Tensor) and where.dtype == torch.float64 else self.kernel
        kernel = self._kernels.get((name, device))
        if kernel is None:
            kernel = self._kernels[name, device] = get_kernel(name, device)
        return kernel

    def say_once(self, line: str) -> None:
        """Log a line unless this optimizer did so before."""
        if line not in self._said:
            self._said.add(line)
            logger.info("%s", line)
