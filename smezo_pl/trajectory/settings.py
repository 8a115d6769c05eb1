"""What a resumed run takes from its checkpoint, and what from the settings that it is given now."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

log = logging.getLogger(__name__)

CHANGEABLE = frozenset(
    ("lr", "weight_decay", "eps", "sparsity", "num_samples", "max_skipped", "strict", "beta1", "beta2", "gradient_clip")
)
"""Settings that may change in mid-run: a trajectory stores them with each step, or their value changes no update."""

_MACHINE = ("kernel",)  # always the present one: all kernels give the same bits, and not every machine has each

_ADDED = {"directions": "shared", "rank": None, "coefficients": "raw"}
"""Settings that an earlier version did not have, and what it did."""

_SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum", "base_momentum", "max_momentum")
"""Entries of a parameter group that torch's schedulers write."""

_COUNTERS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")
_PROGRESS = {*_COUNTERS, "T_cur", "T_i", "_step_count", "_get_lr_called_within_step", "_is_initial"}


class Training(Protocol):
    """What has settings: `SparseMeZO`, or the owner of an AdamW."""

    @property
    def given(self) -> frozenset[str]:
        """Names of those that were given, not left at their defaults."""

    @property
    def overrides(self) -> Sequence[Mapping[str, Any]]:
        """Of each parameter group, those that were given for it alone."""

    def settings(self) -> dict[str, Any]:
        """Settings as given."""

    def adopt(self, settings: Mapping[str, Any]) -> None:
        """Take other settings, also in the parameter groups that have none of their own."""


def as_given(training: Training) -> dict[str, Any]:
    """Settings as plain values, those of single parameter groups included: what `Resumed` compares with."""
    overrides = [dict(own) for own in training.overrides]
    return {**training.settings(), **({"groups": overrides} if any(overrides) else {})}


class Resumed:
    """A checkpoint that a run resumes from, made to say what the run is given now.

    Args:
        checkpoint: What was read; its parameter groups and schedules are changed in place.
        earlier: Settings as given in the run so far, where the checkpoint's hyperparameters hold none.

    Attributes:
        changes: What changed: by name, the value so far and the new one.
    """

    def __init__(self, checkpoint: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> None:
        hyperparameters = checkpoint.get("hyper_parameters") or {}
        states = checkpoint["optimizer_states"]
        state: Mapping[str, Any] = next((state for state in states if "smezo" in state), states[0] if states else {})
        # not the checkpoint itself, whose weights may be released when they were read
        self._groups: Sequence[dict[str, Any]] = state.get("param_groups", [])
        self._own: dict[str, Any] = state.get("smezo", {})
        self._schedules: list[dict[str, Any]] = checkpoint.get("lr_schedulers", [])
        self._steps: int = checkpoint["global_step"]
        self._then = hyperparameters.get("sparse_mezo") or hyperparameters.get("adamw") or earlier
        if self._then is not None:
            self._then = {**_ADDED, **self._then}
        elif self._own:  # a user's own module, of which no trajectory tells: what its state tells
            group = self._groups[0]
            names = self._own.keys() & {"seed", "num_samples", "noise", "directions", "rank", "coefficients"}
            self._then = {**group, "lr": group.get("initial_lr", group["lr"]), **{n: self._own[n] for n in names}}
        self._kept: dict[str, Any] = {}
        self._is_settled = False
        self.changes: dict[str, tuple[Any, Any]] = {}

    def settle(self, training: Training, optimizer: Optimizer, refreshes: bool) -> bool:
        """Decide every setting: what was given counts, what was not given stays as it was in the run so far.

        Args:
            training: Has the settings given now, and gets those that stay.
            optimizer: Its optimizer.
            refreshes: Whether masks will be refreshed with the sparsity of the parameter groups.

        Returns:
            Whether this was not done before.

        Raises:
            ValueError: If a setting was given that cannot change in mid-run.
        """
        if self._is_settled:
            return False
        self._is_settled = True
        if self._then is None:
            return True
        then, now = dict(self._then), training.settings()
        differing = [name for name in now if name in then and now[name] != then[name] and name not in _MACHINE]
        self._kept = {name: then[name] for name in differing if name not in training.given}
        self.changes = {name: (then[name], now[name]) for name in differing if name in training.given}
        fixed = [name for name in self.changes if name not in CHANGEABLE]
        # what was left out of the optimizer cannot be put in now
        fixed += [name for name in ("include", "exclude") if name in self._kept]
        _refuse({name: (then[name], now[name]) for name in fixed}, now)
        training.adopt(self._kept)
        self._settle_groups(training, optimizer.param_groups, refreshes)
        if "num_samples" in self.changes:
            self._own["num_samples"] = now["num_samples"]
        return True

    def _settle_groups(self, training: Training, groups: Sequence[dict[str, Any]], refreshes: bool) -> None:
        then, now, earlier = dict(self._then or {}), training.settings(), (self._then or {}).get("groups")
        refresh = False
        for index, (saved, group) in enumerate(zip(self._groups, groups, strict=False)):
            own = training.overrides[index] if index < len(training.overrides) else {}
            before = earlier[index] if earlier is not None and index < len(earlier) else {}
            for name in {*own, *before}:
                # a version that did not write them down: the group's value, for the rate that of its schedule's start
                noted = before.get(name, saved.get("initial_lr" if name == "lr" else name, saved.get(name)))
                values = (noted if earlier is None else before.get(name, then[name])), own.get(name, now[name])
                if values[0] != values[1]:
                    self.changes[f"{name} of group {index}"] = values
                    if name not in CHANGEABLE:
                        _refuse({f"{name} of group {index}": values}, now)
            changed = {name.removesuffix(f" of group {index}") for name in self.changes if name not in own}
            changed = {"betas" if name.startswith("beta") else name for name in changed} & group.keys()
            saved.update({name: group[name] for name in changed})
            if "sparsity" in changed and saved["mask"] in ("small", "large"):
                refresh = True
        if refresh and not refreshes:
            raise ValueError(
                f"the sparsity of the resumed run cannot change ({listed(self.changes)}): its masks are computed "
                f"once. Add MaskRefresh, without a sparsity of its own, and they are computed now as well; {_NEW_RUN}"
            )
        for saved in self._groups if refresh else ():
            saved["ready"] = False  # the next step computes all masks

    def settle_schedule(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        """Put a schedule that was changed, or starts from another rate, where it would be after the steps done.

        Args:
            optimizer: The optimizer that was settled.
            scheduler: Its new scheduler; None for a constant rate.

        Raises:
            ValueError: If the run so far had a schedule and has none now, or it ends before the steps done.
        """
        if scheduler is None:
            if self._schedules:
                raise ValueError(
                    "the resumed run had an lr_scheduler and none is given now: give it again, or for a constant rate "
                    "torch.optim.lr_scheduler.ConstantLR with factor 1"
                )
            return
        saved = self._schedules[0] if self._schedules else {}
        waited, waits = "num_bad_epochs" in saved, isinstance(scheduler, ReduceLROnPlateau)
        if not waits:
            _forward(scheduler, self._steps if waited else saved.get("last_epoch", self._steps))
        state = scheduler.state_dict()
        one, other = _shape(saved), _shape(state)
        differing = [name for name in (*one, *other) if one.get(name) != other.get(name)]
        new_rate = any(name.partition(" ")[0] == "lr" for name in self.changes)
        if not differing and not new_rate:
            return
        if waits and waited:
            if all(saved.get(name) == state.get(name) for name in ("monitor", "mode")):
                state |= {name: saved[name] for name in _COUNTERS}
        else:
            for group, new in zip(self._groups, optimizer.param_groups, strict=False):
                group.update({name: new[name] for name in _SCHEDULED if name in new})
        self._schedules[:] = [state]
        if differing := [name for name in dict.fromkeys(differing) if not (new_rate and name.startswith("base_lrs"))]:
            kind = type(scheduler).__name__
            differing = [name for name in differing if not name.startswith("_")] or differing
            before = {name: one[name] for name in differing if name in one}
            after = {name: other[name] for name in differing if name in other}
            self.changes["lr_scheduler"] = (f"{before}" if saved else "none", f"{kind} {after}")

    def settle_built_schedule(self, optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
        """`settle_schedule` for one that was built before the rate was settled, if it was built from the right one."""
        if "lr" not in self._kept:
            self.settle_schedule(optimizer, schedulers[0] if schedulers else None)

    def log(self) -> None:
        """Log what changed, and what stays though the default is another."""
        if self.changes:
            log.info("resumed after %d steps with other settings: %s", self._steps, listed(self.changes))
        if self._kept:
            kept = ", ".join(f"{name} {value!r}" for name, value in self._kept.items())
            log.info("not given, so as in the run so far: %s", kept)


_NEW_RUN = (
    "for another, start a new run from its weights: `smezo replay RUN --out FOLDER`, then --model.pretrained FOLDER"
)


def _refuse(fixed: Mapping[str, tuple[Any, Any]], settings: Mapping[str, Any]) -> None:
    if fixed:
        way_out = "for another, start a new run" if "optimizer" in settings else _NEW_RUN
        raise ValueError(f"a resumed run cannot change {listed(fixed)}: give what the checkpoint has; {way_out}")


def listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """What changed, for a message: ``lr 0.01 -> 0.001``."""
    return ", ".join(f"{name} {then!r} -> {now!r}" for name, (then, now) in changes.items())


def _forward(scheduler: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer stepped between
        try:
            for _ in range(steps):
                scheduler.step()
        except ValueError as error:
            raise ValueError(
                f"lr_scheduler {type(scheduler).__name__} ends before the {steps} steps that the resumed run has done: "
                f"{error}"
            ) from error


def _shape(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a scheduler's state, without its progress; of one made of functions what they give now."""
    kept = {name: value for name, value in state.items() if name not in _PROGRESS and name != "_schedulers"}
    if "lr_lambdas" in state:
        rates = zip(state["_last_lr"], state["base_lrs"], strict=True)
        kept["factors"] = [f"{rate / base:.9g}" if base else "" for rate, base in rates]
    for index, inner in enumerate(state.get("_schedulers", ())):
        kept |= {f"{name} ({index})": value for name, value in _shape(inner).items()}
    return kept
