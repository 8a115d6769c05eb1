"""The passes over the weights in plain torch, one operation after another: the definition that the others are held to.

It runs on every device and in float64 too, and takes a few times the memory of one chunk beside the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from smezo_pl.optim.kernels import base
from smezo_pl.optim.kernels.base import Factored, FactoredUpdate, Kernel, Update
from smezo_pl.optim.masks import Mask
from smezo_pl.optim.noise import MASK, ROUNDING, Distribution, Stream, chunk_of, draw, words16


class TorchKernel(Kernel):
    """Plain torch operations, on any device that has float64 (see `Kernel` for what each pass computes)."""

    name = "torch"

    def perturb(
        self, theta: Tensor, out: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float
    ) -> None:
        """Write ``theta + scale * m * z`` to ``out``; see `Kernel.perturb`."""
        base.check_pair(theta, out)
        base.check_mask(theta, mask)
        base.check_streams(mask, [stream], [scale], None)
        for low, high in _chunks(theta):
            part = theta[low:high]
            new = part
            if scale != 0.0:
                wide = _widen(part)
                z = draw(noise, stream.part(low), high - low, theta.device).to(wide.dtype)
                new = _where(active(theta, mask, low, high), _narrow(wide + z * _scalar(scale, wide), part.dtype), part)
            out[low:high] = new

    def update_all(self, updates: Sequence[Update], noise: Distribution) -> None:
        """Update one tensor after the other; see `Kernel.update_all`."""
        for update in updates:
            _update(update, noise)

    def draw(self, theta: Tensor, out: Tensor, mask: Mask, noise: Distribution, stream: Stream, scale: float) -> None:
        """The noise under the mask alone; see `Kernel.draw`."""
        base.check_pair(theta, out)
        base.check_mask(theta, mask)
        base.check_streams(mask, [stream], [scale], None)
        for low, high in _chunks(theta):
            z = draw(noise, stream.part(low), high - low, theta.device).to(_widen(theta[:0]).dtype)
            scaled = _narrow(z * _scalar(scale, z), theta.dtype)
            out[low:high] = torch.where(active(theta, mask, low, high), scaled, torch.zeros_like(scaled))

    def perturb_factored(self, theta: Tensor, out: Tensor, factored: Factored) -> None:
        """``theta`` minus a sum of outer products; see `Kernel.perturb_factored`."""
        base.check_pair(theta, out)
        base.check_factored(theta, factored)
        base.check_no_stream(factored)
        for low, high in _chunks(theta):
            wide = _widen(theta[low:high])
            out[low:high] = _narrow(wide - _delta(factored, low, high, wide), theta.dtype)

    def update_factored(self, update: FactoredUpdate, noise: Distribution) -> None:
        """Update by a sum of outer products; see `Kernel.update_factored`."""
        theta, mask, factored, decay, rounding = update
        base.check_weights(theta)
        base.check_mask(theta, mask)
        base.check_factored(theta, factored, mask, rounding)
        if decay == 0.0 and not any(factored.scales):
            return
        for low, high in _chunks(theta):
            delta = _delta(factored, low, high, _widen(theta[low:high]))
            if factored.stream is not None:
                delta = delta * draw(noise, factored.stream.part(low), high - low, theta.device).to(delta.dtype)
            _subtract(theta, mask, low, high, delta, decay, rounding)

    def select(self, theta: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Packed mask and a copy of the weights under it; see `Kernel.select`."""
        bits = self.pack(theta, mask)
        chosen = _unpack(bits, theta.numel())
        return bits, base.codes_of(theta)[chosen].view(theta.dtype)

    def restore(self, theta: Tensor, bits: Tensor, saved: Tensor) -> None:
        """Put back what `select` saved; see `Kernel.restore`."""
        base.check_weights(theta)
        base.check_bits(theta, bits)
        chosen = _unpack(bits, theta.numel())
        count = int(chosen.sum())
        base.check_saved(theta, saved, count)
        base.codes_of(theta)[chosen] = base.codes_of(saved)

    def pack(self, theta: Tensor, mask: Mask) -> Tensor:
        """The mask, one bit per weight; see `Kernel.pack`."""
        base.check_weights(theta)
        base.check_mask(theta, mask)
        bits = torch.empty(base.packed_size(theta.numel()), dtype=torch.uint8, device=theta.device)
        position = torch.arange(8, device=theta.device)
        for low, high in _chunks(theta):
            chosen = torch.nn.functional.pad(active(theta, mask, low, high).to(torch.int64), (0, -(high - low) % 8))
            bits[low // 8 : base.packed_size(high)] = (chosen.view(-1, 8) << position).sum(1).to(torch.uint8)
        return bits

    def histogram(self, theta: Tensor, shift: int, prefix: int | None) -> Tensor:
        """Counts of magnitude codes; see `Kernel.histogram`."""
        base.check_weights(theta)
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=theta.device)
        for low, high in _chunks(theta):
            digits = _magnitude_codes(theta[low:high]).to(torch.int64) >> shift
            if prefix is not None:
                digits = digits[digits >> 16 == prefix]
            counts += torch.bincount(digits & 0xFFFF, minlength=1 << 16)
        return counts


def _update(update: Update, noise: Distribution) -> None:
    theta, mask, streams, scales, decay, rounding = update
    base.check_weights(theta)
    base.check_mask(theta, mask)
    base.check_streams(mask, streams, scales, rounding)
    if decay == 0.0 and not any(scales):
        return
    for low, high in _chunks(theta):
        wide = _widen(theta[low:high])
        terms = (
            draw(noise, stream.part(low), high - low, theta.device).to(wide.dtype) * _scalar(scale, wide)
            for stream, scale in zip(streams, scales, strict=True)
        )
        _subtract(theta, mask, low, high, functools.reduce(torch.add, terms), decay, rounding)


def _subtract(
    theta: Tensor, mask: Mask, low: int, high: int, delta: Tensor, decay: float, rounding: Stream | None
) -> None:
    """Subtract ``delta`` and the decay from ``theta[low:high]`` under the mask."""
    part = theta[low:high]
    wide = _widen(part)
    if decay != 0.0:
        delta = delta + wide * _scalar(decay, wide)
    new = wide - delta
    if rounding is None or theta.element_size() > 2:
        rounded = _narrow(new, theta.dtype)
    else:
        word = words16(rounding.part(low), ROUNDING, high - low, theta.device)
        rounded = round_stochastically(new, word, theta.dtype)
    theta[low:high] = _where(active(theta, mask, low, high), rounded, part)


def _delta(factored: Factored, low: int, high: int, like: Tensor) -> Tensor:
    """The sum of outer products for ``theta[low:high]``, without the factor of every element."""
    left, right, scales, _ = factored
    index = torch.arange(low, high, device=left.device)
    row, column = index // right.shape[1], index % right.shape[1]
    terms = (
        (a[row].to(like.dtype) * _scalar(scale, like)) * b[column].to(like.dtype)
        for a, b, scale in zip(left, right, scales, strict=True)
    )
    delta: Tensor = functools.reduce(torch.add, terms)
    return delta


def active(theta: Tensor, mask: Mask, low: int, high: int) -> Tensor:
    """The mask of ``theta[low:high]``, bool, by the rule alone."""
    count = high - low
    if mask.rule in ("small", "large"):
        codes = _magnitude_codes(theta[low:high])
        limit = base.threshold_code(mask.threshold, theta.dtype)
        if mask.rule == "small":
            return codes <= limit
        return (codes > limit) & (codes <= base.INFINITY[theta.dtype])
    if mask.rule == "random":
        assert mask.stream is not None
        return words16(mask.stream.part(low), MASK, count, theta.device) < mask.level
    if mask.rule == "packed":
        assert mask.bits is not None
        return _unpack(mask.bits[low // 8 : base.packed_size(high)], count)
    return torch.ones(count, dtype=torch.bool, device=theta.device)


def round_stochastically(value: Tensor, word: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to a 16-bit dtype, up in magnitude with the probability of the part that is cut off.

    bfloat16: the 16 random bits are added to the 16 that are cut. float16: the upper 13 random bits to the 13 that are
    cut; below its smallest normal number, ``|value|`` in steps of ``2^-40`` gets all 16. A number beyond the largest
    finite one becomes infinite, or may when it lies within one step of it. NaN becomes the one quiet NaN.

    Args:
        value: float32 tensor.
        word: int32 tensor of the same shape, in ``[0, 65536)``.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        Tensor of that dtype.
    """
    code = value.view(torch.int32)
    sign, magnitude = code >> 16 & 0x8000, code & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (magnitude.to(torch.int64) + word) >> 16
    else:
        normal = (magnitude + (word >> 3) - (112 << 23)) >> 13
        small = ((value.abs().clamp(max=1.0) * 2.0**40).to(torch.int64) + word) >> 16
        rounded = torch.where(magnitude < 0x38800000, small, normal)
        rounded = torch.where(magnitude >= 0x47800000, base.INFINITY[dtype], rounded)
    rounded = torch.where(magnitude > 0x7F800000, base.QUIET_NAN[dtype], rounded | sign)
    return rounded.to(torch.int16).view(dtype)


def _chunks(theta: Tensor) -> Iterator[tuple[int, int]]:
    chunk = chunk_of(theta.device)
    for low in range(0, theta.numel(), chunk):
        yield low, min(low + chunk, theta.numel())


def _widen(theta: Tensor) -> Tensor:
    """Weights in the precision of the arithmetic: float32, or float64 for float64 weights."""
    return theta if theta.dtype == torch.float64 else theta.to(torch.float32)


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest even, with one quiet NaN: torch's conversions keep different ones."""
    rounded = value.to(dtype)
    codes = base.codes_of(rounded)
    return torch.where(value.isnan(), base.QUIET_NAN[dtype], codes).to(codes.dtype).view(dtype)


def _where(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`torch.where` on the bits: what is not chosen keeps even the payload of a NaN."""
    return torch.where(chosen, base.codes_of(new), base.codes_of(old)).view(old.dtype)


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _magnitude_codes(theta: Tensor) -> Tensor:
    codes = base.codes_of(theta)
    return codes & torch.iinfo(codes.dtype).max


def _unpack(bits: Tensor, numel: int) -> Tensor:
    position = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> position) & 1).view(-1)[:numel].to(torch.bool)
