"""Where the rows of a batch can be told, learned from a few runs of the closure before the first step, and proved.

The first run sees the weights as they are, and notes how each is used. A weight that meets a function other than those
of `smezo_pl.optim.perturbation.rowwise`, or an input whose rows cannot be told, gets one direction for the batch. Three
more runs prove the rest: what a row gives must not change when others are perturbed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from smezo_pl.optim.masks import Mask
from smezo_pl.optim.perturbation.forward_rows import Place
from smezo_pl.optim.step import Direction, StepPerturbation

logger = logging.getLogger(__name__)


class Trial(Direction):
    """A direction for learning: some rows are not perturbed, and what is not perturbed row by row is not at all.

    Args:
        step: The first step.
        shared: Ids of the parameters that have one direction for the batch.
        is_silent: Whether a row is not perturbed.

    Attributes:
        whole: Ids of the parameters of which a copy was read.
    """

    def __init__(self, step: StepPerturbation, shared: set[int], is_silent: Callable[[int], bool]) -> None:
        super().__init__(step, 0, 1.0)
        self._shared_ids, self._is_silent = shared, is_silent
        self.whole: set[int] = set()

    def rows_apart(self, parameter: nn.Parameter) -> bool:  # noqa: D102
        return id(parameter) not in self._shared_ids

    is_outside = rows_apart

    def factors(  # noqa: D102
        self, parameters: Sequence[nn.Parameter], rows: Sequence[int]
    ) -> list[tuple[Tensor | None, Tensor, float]]:
        drawn = super().factors(parameters, rows)
        for _, right, _ in drawn:
            right[[index for index, row in enumerate(rows) if self._is_silent(row)]] = 0
        return drawn

    def perturb(self, parameter: nn.Parameter, out: Tensor, mask: Mask | None = None) -> None:  # noqa: D102
        out.copy_(parameter.detach().view(-1))
        self.whole.add(id(parameter))

    def perturb_rows(self, parameter: nn.Parameter, rows: Tensor, out: Tensor) -> None:  # noqa: D102
        torch.index_select(parameter.detach(), 0, rows, out=out)


class Uses:
    """How the layers of a run use the weights.

    Args:
        paths: Of each parameter, by its id, its slots in the network: name, kind of module, shape.
    """

    def __init__(self, paths: Mapping[int, Sequence[str]]) -> None:
        self._paths = paths
        self._doubtful: set[int] = set()
        self._broadcast: set[int] = set()
        self._lengths: dict[int, set[int]] = {}

    def note(self, weight: nn.Parameter, place: Place, operand: Tensor) -> None:
        """A layer uses a weight."""
        if not place.is_plain:
            self._doubtful.add(id(weight))
        if not place.each:
            self._broadcast.add(id(weight))
        self._lengths.setdefault(id(weight), set()).add(0 if place.at is not None else operand.shape[0])

    def unused(self) -> set[int]:
        """Ids of the parameters that no layer used row by row."""
        return self._paths.keys() - self._lengths.keys()

    def doubtful(self) -> set[int]:
        """Ids of those for which the entries of the first dimension may be something else than rows, in order."""
        return self._doubtful

    def broadcast(self) -> set[int]:
        """Ids of those that are used once for all rows, so that what comes out gets rows that it did not have."""
        return self._broadcast

    def routed(self) -> set[int]:
        """Ids of the doubtful that look like experts, which get the rows' tokens as these are routed.

        Their names say so, or like layers that are numbered beside them get other numbers of tokens, or none.
        """
        beside: dict[str, set[frozenset[int]]] = {}
        for key, paths in self._paths.items():
            for family in _families(paths):
                beside.setdefault(family, set()).add(frozenset(self._lengths.get(key, ())))
        return {
            key
            for key in self._doubtful
            if any("expert" in path.lower() for path in self._paths[key])
            or any(len(beside[family]) > 1 for family in _families(self._paths[key]))
        }


def _families(paths: Iterable[str]) -> Iterable[str]:
    """Names in which one number is left open, so that they match what is numbered beside."""
    for path in paths:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", "." + path):
            yield f"{path[: number.start() - 1]}*{path[number.end() - 1 :]}"


class Probe:
    """What a run of the closure gives for each row: its losses, and sums over the first output of the network.

    Attributes:
        calls: Number of rows and shape of what was given to the network, call by call.
        losses: The losses, float64 ``[R]``.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, torch.Size]] = []
        self.losses = torch.empty(0)
        self._sums: Tensor | None = None
        self._numbers: list[int] = []

    def look(self, output: object, numbers: Sequence[int]) -> None:
        """The network has run on rows of these numbers."""
        for leaf in tree_leaves(output) if self._sums is None else ():
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (len(numbers),):
                self._numbers = list(numbers)
                self._sums = leaf.detach().flatten(1).sum(1, dtype=torch.float64) if leaf.dim() > 1 else leaf.detach()
                return

    def differs(self, other: Probe, rows: Callable[[int], bool], tolerance: float = 0.0) -> bool:
        """Whether some rows give something else in another run; losses count if the network was called alike."""
        pairs = [(list(range(len(self.losses))), self.losses, other.losses)] if self.calls == other.calls else []
        if self._sums is not None and other._sums is not None:
            pairs.append((self._numbers, self._sums, other._sums))
        for numbers, one, two in pairs:
            chosen = [index for index, number in enumerate(numbers) if rows(number)]
            if not torch.allclose(one[chosen], two[chosen], rtol=tolerance, atol=tolerance, equal_nan=True):
                return True
        return False


def learn(
    run: Callable[[Trial, Uses | None], Probe],
    step: StepPerturbation,
    paths: Mapping[int, Sequence[str]],
    names: Mapping[int, str],
    strict: bool,
    anywhere: Callable[[bool], bool],
) -> set[int]:
    """Find out which weights get one direction for the batch, and prove that no row sees another's.

    Args:
        run: Runs the closure with a trial direction; where there are `Uses`, it notes them and perturbs nothing.
        step: The first step.
        paths: Of each parameter, by its id, its slots in the network: name, kind of module, shape.
        names: Names of the parameters, by their ids.
        strict: Whether to refuse weights whose rows cannot be told.
        anywhere: Whether something holds in any of the processes, all of which must run the closure equally often.

    Returns:
        The ids of these weights, and of those that the closure does not use.

    Raises:
        RuntimeError: If the model or the loss mixes rows.
        ValueError: If ``strict`` refuses weights.
    """
    uses, trial = Uses(paths), Trial(step, set(), _is_any)
    calls = run(trial, uses).calls
    untold = trial.whole | uses.routed()
    unused = uses.unused() - untold
    if not anywhere(not calls or any(count > 1 for count, _ in calls)):
        logger.info("the first batch has one row at a time; nothing can be learned of how a batch's rows are treated")
        unused |= uses.doubtful() - untold
    else:
        try:
            mixes = _mixes(run, step, untold | unused, anywhere)
        except (RuntimeError, ValueError, IndexError):  # of a model that expects no rows there
            untold |= uses.broadcast()
            mixes = _mixes(run, step, untold | unused, anywhere)
        if mixes:
            untold |= uses.doubtful()
            if _mixes(run, step, untold | unused, anywhere):
                raise RuntimeError(
                    "the loss of a row changes when only other rows are perturbed: the model or the loss mixes the "
                    "rows of a batch (a norm over the batch, experts of limited capacity, a loss over pairs), has them "
                    "in another dimension than the first, or draws random numbers; use directions='shared'"
                )
        if untold | unused >= paths.keys():
            raise RuntimeError(
                "the rows of a batch cannot be told where any of the parameters is used, or the model or the loss "
                "mixes them; use directions='shared'"
            )
    if untold:
        listed = ", ".join(repr(names[key]) for key in names if key in untold)
        if strict:
            raise ValueError(
                f"strict=True refuses parameters whose rows cannot be told: {listed}; leave them out with exclude, or "
                "give them one direction for the batch by strict=False"
            )
        logger.info("rows cannot be told where these parameters are used; they get one direction a batch: %s", listed)
    return untold | unused


def _mixes(
    run: Callable[[Trial, Uses | None], Probe],
    step: StepPerturbation,
    shared: set[int],
    anywhere: Callable[[bool], bool],
) -> bool:
    """Whether something changes for some rows when only the others are perturbed; two choices of rows are tried."""
    still = run(Trial(step, shared, _is_any), None)
    half = len(still.losses) // 2
    # rows that a network reorders could be chosen alike by one of the two
    for is_silent in (_is_odd, lambda row: row >= half):
        some_rows = run(Trial(step, shared, is_silent), None)
        if not anywhere(still.differs(some_rows, is_silent)):
            continue
        again = run(Trial(step, shared, _is_any), None)
        # a backend that does not give the same bits twice
        is_exact = not still.differs(again, _is_any)
        if anywhere(still.differs(some_rows, is_silent, 0.0 if is_exact else 1e-5)):
            return True
    return False


def _is_any(row: int) -> bool:
    return True


def _is_odd(row: int) -> bool:
    """Whether the binary number has an odd number of ones: neither neighbors nor halves of a batch are alike."""
    return row.bit_count() % 2 == 1
