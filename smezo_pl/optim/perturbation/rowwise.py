"""What layers make of weights that stay as they are, with a direction for each row added to what comes out.

A direction that is a sum of outer products needs no perturbed copy of a matrix ``W``::

    x (W + s eps Z_r)^T = x W^T + s eps sum_j (x . b_rj) a_rj                (low rank)
    x (W + s eps Z_r)^T = x W^T + s eps ((x * v_r) (m z)^T) * u_r            (sign flips)

During a step a `Seen` stands in every slot of such a weight. What it does is decided by the function of torch that gets
it, whatever the module is called: a product, a lookup, a normalization, or, for vectors, an elementwise operation.
Every other function sees a `Guard`, which perturbs a copy if the weight has one direction for the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from smezo_pl.optim.perturbation.forward_rows import WHOLE, ForwardRows, Place
from smezo_pl.optim.perturbation.guards import Guard
from smezo_pl.optim.rows import at_rows
from smezo_pl.optim.step import FACTOR_BYTES, Direction

_Drawn = tuple[Tensor | None, Tensor, float]


class Seen(Guard):
    """A guard that functions of torch take for the weight it stands for, perturbed for each row.

    Attributes:
        rowwise: What makes the perturbation.
        weight: The parameter that is optimized.
        theta: Its values, or the tied parameter's, in this orientation and dtype.
        is_transposed: Whether ``theta`` is the transposed weight.
        source: The guard without a conversion of the dtype.
    """

    rowwise: Rowwise
    weight: nn.Parameter
    theta: Tensor
    is_transposed: bool
    source: Guard

    @staticmethod
    def of(guard: Guard, theta: Tensor, weight: nn.Parameter, rowwise: Rowwise, is_transposed: bool = False) -> Seen:
        """What stands for ``weight`` where ``guard`` has stood."""
        seen = Guard.__new__(Seen, guard.guards, guard.memory, theta, theta.requires_grad)
        assert isinstance(seen, Seen)
        seen._is_param = getattr(guard, "_is_param", False) and not is_transposed
        seen.rowwise, seen.weight, seen.theta, seen.is_transposed = rowwise, weight, theta, is_transposed
        seen.source = seen if theta.dtype == guard.dtype else guard
        return seen

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            if handler is not None:
                result = handler(func, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            args, kwargs = tree_map_only(Seen, Seen._unhandled, (args, kwargs))
            return func(*args, **kwargs)

    def _unhandled(self) -> Tensor:
        return self if self.source is self else self.source.to(self.dtype)


class Rowwise:
    """Perturbs what layers make of the weights.

    Args:
        read: Ids of parameters, to which those are added that a layer reads.

    Attributes:
        rows: Where the rows are.
        direction: The direction of the forward that runs; None outside a step.
        note: Told of each use in place of a perturbation, to learn where rows can be told.
        proved: Ids of the parameters of which a use was proved that could have been something else; None if nothing was
            learned here.
        seconds: Spent on perturbing.
    """

    def __init__(self, read: set[int]) -> None:
        self._read = read
        self.rows = ForwardRows()
        self.direction: Direction | None = None
        self.note: Callable[[nn.Parameter, Place, Tensor], None] | None = None
        self.proved: set[int] | None = None
        self.seconds = 0.0
        self._noise: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._next: dict[int, nn.Parameter] = {}
        self._last: nn.Parameter | None = None
        self._ahead: dict[int, _Drawn] = {}
        self._ahead_of: Sequence[int] = ()

    def start(self, direction: Direction) -> None:
        """A closure runs with this direction."""
        self.direction, self.seconds, self._last = direction, 0.0, None
        self._ahead.clear()
        self.rows.restart()

    def _factors(self, weight: nn.Parameter, rows: Sequence[int]) -> _Drawn:
        """`Direction.factors` of a weight, drawn together with those of the weights that were used after it before."""
        direction = self.direction
        assert direction is not None
        if self._last is not None:
            self._next[id(self._last)] = weight
        self._last = weight
        drawn = self._ahead.pop(id(weight), None) if rows == self._ahead_of else None
        if drawn is None:
            chain, apart = {id(weight): weight}, direction.rows_apart(weight)
            held, after = direction.factor_bytes(weight) * len(rows), self._next.get(id(weight))
            while after is not None and id(after) not in chain and after.device == weight.device:
                held += direction.factor_bytes(after) * len(rows) if direction.is_outside(after) else FACTOR_BYTES
                if held > FACTOR_BYTES or direction.rows_apart(after) != apart:
                    break
                chain[id(after)] = after
                after = self._next.get(id(after))
            self._ahead.clear()
            self._ahead_of = rows
            self._ahead.update(zip(chain, direction.factors(list(chain.values()), rows), strict=True))
            drawn = self._ahead.pop(id(weight))
        return drawn

    def extra_bytes(self) -> int:
        """Bytes kept for the noise of one tensor at a time."""
        return sum(noise.nbytes for noise in self._noise.values())

    def place(self, operand: Tensor, weights: Sequence[Seen], of_indices: bool = False) -> Place | None:
        """How the rows lie in what a layer gets, or None if it cannot perturb the weights for them."""
        if self.direction is None:
            return None
        apart = [seen for seen in weights if self.direction.rows_apart(seen.weight)]
        place = self.rows.place(operand, of_indices) if apart else WHOLE
        is_clear = place is None or place.is_plain or place.is_single or self.note is not None
        if not is_clear and self.proved is not None and any(id(seen.weight) not in self.proved for seen in apart):
            return None  # as of pieces of a longer batch than the first, each of which has all rows
        if place is not None:
            self._read.update(id(seen.weight) for seen in weights)
            if self.note is not None:
                for seen in apart:
                    self.note(seen.weight, place, operand)
        return place

    def vector(self, seen: Seen, place: Place, dims: int) -> Tensor:
        """A perturbed vector for each row, ``[R, 1, ..., m]`` in ``dims`` dimensions; for one row ``[m]``."""
        z, noise, scale = self._vector(seen, place)
        theta = seen.theta.reshape(-1)
        if noise is None:
            rows = torch.add(theta, z.to(seen.dtype), alpha=scale)
        else:
            rows = torch.addcmul(theta, noise.to(seen.dtype), z.to(seen.dtype), value=scale)
        if place.is_single:
            return rows.view(seen.shape)
        if place.at is not None:
            return rows[place.at]
        rows = rows.repeat_interleave(place.each, 0) if place.each > 1 else rows
        return rows.view(-1, *[1] * (dims - 1 - seen.dim()), *seen.shape)

    def _vector(self, seen: Seen, place: Place) -> tuple[Tensor, Tensor | None, float]:
        assert self.direction is not None
        _, right, scale = self._factors(seen.weight, place.numbers)
        return right[:, 0], self._drawn(seen), scale

    def product(
        self, out: Tensor, x: Tensor, weight: Seen | None, bias: Seen | None, place: Place, across: bool
    ) -> Tensor:
        """Add the perturbations to ``x theta^T + bias``, or to ``x theta + bias`` if the product goes ``across``."""
        lead = len(place.numbers) if place.at is None and place.each else 1
        wide = out.reshape(lead, -1, out.shape[-1])  # [R, T, n], or [1, T, n]
        at = None if place.at is None else place.at.repeat(wide.shape[1] // len(place.at))
        if weight is not None:
            x = x.reshape(lead, wide.shape[1], x.shape[-1]).to(out.dtype)
            wide, bias = self._product(wide, x, weight, bias, place, at, across)
        if bias is not None:
            z, noise, scale = self._vector(bias, place)
            z = z.to(out.dtype) * scale if noise is None else noise.to(out.dtype) * z * scale
            wide = wide + (z.unsqueeze(1) if at is None else z[at])
        return wide.view(_shape(out, place))

    def _product(
        self, out: Tensor, x: Tensor, weight: Seen, bias: Seen | None, place: Place, at: Tensor | None, across: bool
    ) -> tuple[Tensor, Seen | None]:
        """`product` with the weight, and with the bias unless that is returned."""
        assert self.direction is not None
        left, right, scale = self._factors(weight.weight, place.numbers)
        assert left is not None
        onto, by = (left, right) if across == weight.is_transposed else (right, left)
        onto, by = onto.to(out.dtype), by.to(out.dtype)  # [R, k, n], [R, k, m]
        if (noise := self._drawn(weight)) is not None:
            onto, by = (onto, by) if at is None else (onto[at, 0], by[at, 0])
            return _add(out, F.linear(x * by, (noise.T if across else noise).to(out.dtype)), onto, scale), bias
        if at is None:
            # the fastest ways to write x by^T
            one = len(by) == 1
            inner = F.linear(x, by[0]) if one else torch.matmul(by, x.transpose(1, 2)).transpose(1, 2)
            ones = None if bias is None else inner.new_ones(*inner.shape[:-1], 1)
        else:
            # the products with all rows at once: each position takes its own row's
            ones = F.one_hot(at, len(by)).to(out.dtype).unsqueeze(0)
            inner = F.linear(x, by.flatten(0, 1)) * ones.repeat_interleave(by.shape[1], -1)
            onto = onto.reshape(1, -1, onto.shape[-1])
        if bias is not None and ones is not None:  # as one more factor, so that the sum is rounded once
            z, _, own_scale = self._vector(bias, place)
            inner = torch.cat([inner, ones * (own_scale / scale)], -1)
            onto = torch.cat([onto, z.to(out.dtype).unsqueeze(1 if at is None else 0)], 1)
        return _add_product(out, inner, onto, scale), None

    def lookup(self, out: Tensor, ids: Tensor, seen: Seen, place: Place) -> Tensor:
        """Add the perturbation to looked-up rows of ``theta``."""
        assert self.direction is not None
        left, right, scale = self._factors(seen.weight, place.numbers)
        assert left is not None
        of, width = (right, left) if seen.is_transposed else (left, right)
        width, lead = width.to(out.dtype), len(place.numbers) if place.each else 1
        ids = ids.reshape(lead, 1, ids.numel() // lead).expand(len(of), of.shape[1], -1)
        inner = of.gather(2, ids).transpose(1, 2).to(out.dtype)
        wide = out.reshape(lead, -1, out.shape[-1])
        noise = self._drawn(seen)
        if noise is None:
            wide = _add_product(wide, inner, width, scale)
        else:
            wide = _add(wide, F.embedding(ids[:, 0], noise).to(out.dtype) * width, inner, scale)
        return wide.view(_shape(out, place))

    def _drawn(self, seen: Seen) -> Tensor | None:
        """The noise whose signs the rows flip, as ``theta`` lies, until the next is drawn; None with low rank."""
        assert self.direction is not None
        if self.direction.rank is not None:
            return None
        weight, kind = seen.weight, (seen.weight.dtype, seen.weight.device)
        memory = self._noise.get(kind)
        if memory is None or memory.numel() < weight.numel():
            with torch.inference_mode(False):
                memory = self._noise[kind] = torch.empty(weight.numel(), dtype=kind[0], device=kind[1])
        flat = memory[: weight.numel()]
        self.direction.draw(weight, flat)
        noise = flat.view(weight.shape)
        return noise.T if seen.is_transposed else noise


def _shape(out: Tensor, place: Place) -> tuple[int, ...]:
    """The shape of what a layer makes of a tensor, which gets rows if it had none."""
    return tuple(out.shape) if place.each or place.at is not None else (len(place.numbers), *out.shape[1:])


def _add_product(out: Tensor, inner: Tensor, onto: Tensor, scale: float) -> Tensor:
    """``out + scale * inner onto``, with shapes ``[R, T, n]``, ``[R, T, k]`` and ``[R, k, n]``, rounded once."""
    if onto.shape[1] == 1 and out.element_size() > 2:  # in 16 bits the product is faster
        return _add(out, inner, onto, scale)
    if len(out) == len(inner):
        return out.baddbmm_(inner, onto, alpha=scale)
    return torch.baddbmm(out.expand(len(inner), -1, -1), inner, onto, alpha=scale)


def _add(out: Tensor, one: Tensor, other: Tensor, scale: float) -> Tensor:
    """``out + scale * one * other`` elementwise, in ``out`` itself where it has the rows."""
    if len(out) == max(len(one), len(other) if other.dim() > 2 else 1):
        return out.addcmul_(one, other, value=scale)
    return torch.addcmul(out, one, other, value=scale)


def _plain(value: Any) -> Any:
    return value.theta if isinstance(value, Seen) else value


def _product(func: Any, x: Any, weight: Any, bias: Any, call: tuple[Any, ...], across: bool) -> Any:
    """A product with a weight, a bias or both that are perturbed; ``call`` is what ``func`` gets."""
    seen = [value for value in (weight, bias) if isinstance(value, Seen)]
    is_known = not isinstance(x, Seen) and weight.dim() == 2 and (bias is None or bias.dim() == 1) and x.numel()
    if not is_known or (place := seen[0].rowwise.place(x, seen)) is None:
        return NotImplemented
    rowwise, out = seen[0].rowwise, func(*map(_plain, call))
    if rowwise.note is not None:
        return out
    started = perf_counter()
    weight, bias = (value if isinstance(value, Seen) else None for value in (weight, bias))
    out = rowwise.product(out, x, weight, bias, place, across)
    if place.at is not None:
        at_rows(out, place.at)
    rowwise.seconds += perf_counter() - started
    return out


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    return _product(func, x, weight, bias, (x, weight, bias), across=False)


def _addmm(func: Any, bias: Any, x: Any, weight: Any) -> Any:
    return _product(func, x, weight, bias, (bias, x, weight), across=True)


def _matmul(func: Any, x: Any, weight: Any) -> Any:
    return _product(func, x, weight, None, (x, weight), across=True)


def _embedding(func: Any, ids: Any, weight: Any, max_norm: float | None = None, **settings: Any) -> Any:
    if max_norm is not None or not isinstance(weight, Seen) or not ids.numel():
        return NotImplemented  # which refuses to write
    rowwise = weight.rowwise
    if weight.dim() != 2 or (place := rowwise.place(ids, [weight], of_indices=True)) is None:
        return NotImplemented
    out = func(ids, weight.theta, **settings)
    if rowwise.note is not None:
        return out
    started = perf_counter()
    out = rowwise.lookup(out, ids, weight, place)
    rowwise.seconds += perf_counter() - started
    return out


def _norm(func: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, **settings: Any) -> Any:
    given = {"weight": weight} | ({} if bias is None else {"bias": bias})
    seen = [value for value in given.values() if isinstance(value, Seen)]
    if isinstance(x, Seen) or len(shape) != 1 or not x.numel() or (place := seen[0].rowwise.place(x, seen)) is None:
        return NotImplemented
    rowwise = seen[0].rowwise
    if rowwise.note is not None:
        return func(x, shape, **{name: _plain(value) for name, value in given.items()}, **settings)
    started = perf_counter()
    of_rows = place.each > 0 and place.at is None and not place.is_single
    flat = place._replace(each=1) if of_rows else place
    for name, value in given.items():
        if isinstance(value, Seen):
            given[name] = rowwise.vector(value, flat, 3 if of_rows else x.dim())
    rowwise.seconds += perf_counter() - started
    if place.is_single:
        return func(x, shape, **given, **settings)
    out = func(x, shape, **settings)
    wide = out.view(len(place.numbers), -1, out.shape[-1]) if of_rows else out
    weight, bias = given["weight"], given.get("bias")
    if bias is None:
        wide = wide * weight
    else:
        wide = wide + bias if weight is None else torch.addcmul(bias, wide, weight)
    return wide.view(_shape(out, place))


def _elementwise(func: Any, *args: Any, **settings: Any) -> Any:
    seen = [value for value in args if isinstance(value, Seen)]
    others = [value for value in args if isinstance(value, Tensor) and not isinstance(value, Seen) and value.dim() > 1]
    rowwise, writes = seen[0].rowwise, func.__name__.endswith("_") and not func.__name__.endswith("__")
    like = others[0] if others else rowwise.rows.input()
    if like is None or any(value.dim() > 1 for value in seen) or (writes and isinstance(args[0], Seen)):
        return NotImplemented
    place = rowwise.place(like, seen)
    if place is None or (writes and not place.each):
        return NotImplemented
    if rowwise.note is not None:
        return func(*map(_plain, args), **settings)
    started = perf_counter()
    args = tuple(rowwise.vector(a, place, like.dim()) if isinstance(a, Seen) else a for a in args)
    rowwise.seconds += perf_counter() - started
    return func(*args, **settings)


def _cast(func: Any, tensor: Any, *args: Any, **settings: Any) -> Any:
    if not isinstance(tensor, Seen):
        return func(tensor, *map(_plain, args), **settings)
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    kind = func(empty, *map(_plain, args), **settings)
    if kind.device != tensor.device:
        return NotImplemented
    if kind.dtype == tensor.dtype:
        return tensor
    return Seen.of(tensor, tensor.theta.to(kind.dtype), tensor.weight, tensor.rowwise, tensor.is_transposed)


def _transpose(func: Any, seen: Any, *args: Any) -> Any:
    if seen.dim() != 2 or seen.source is not seen:
        return NotImplemented
    return Seen.of(seen, seen.theta.t(), seen.weight, seen.rowwise, not seen.is_transposed)


def _methods(*names: str) -> list[Any]:
    return [getattr(owner, name) for name in names for owner in (Tensor, torch) if hasattr(owner, name)]


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _norm,
    F.rms_norm: _norm,
    **dict.fromkeys(_methods("matmul", "mm", "__matmul__"), _matmul),
    **dict.fromkeys(
        _methods("mul", "add", "sub", "div", "rsub", "true_divide", "multiply", "mul_", "add_"), _elementwise
    ),
    **dict.fromkeys(_methods("__rsub__", "__rtruediv__", "__rdiv__"), _elementwise),
    **dict.fromkeys(_methods("to", "type_as"), _cast),
    **dict.fromkeys([Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16], _cast),
    **dict.fromkeys([*_methods("t"), Tensor.T.__get__], _transpose),  # type: ignore[attr-defined]
}
"""What is done with a perturbed weight, by the function of torch that gets it."""
