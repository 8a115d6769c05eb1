import math
import random
import struct
from typing import Any

import pytest

from smezo_pl.optim import StepRecord
from smezo_pl.trajectory.records import (
    CHECK_SIZE,
    MAX_NUMBERS,
    _step_check,
    pack_step,
    pack_thresholds,
    unpack_step,
    unpack_thresholds,
)

KEY = b"0" * 32
RATES = {"lr": (1e-6, 3e-5), "weight_decay": (0.0, 0.1), "eps": (1e-3, 1e-3), "sparsity": (0.8, 0.5)}
BEFORE = StepRecord(0, (), (), **RATES)


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def make(step: int = 0, samples: int = 1, **changes: object) -> StepRecord:
    noise = random.Random(step)
    values = [f32(noise.gauss(0, 1)) for _ in range(3 * samples)]
    record = {
        "step": step,
        "projected_gradients": tuple(values[:samples]),
        "losses": tuple(zip(values[samples::2], values[samples + 1 :: 2], strict=True)),
        **RATES,
    }
    return StepRecord(**{**record, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [1, 3, 64])
@pytest.mark.parametrize("refresh", [{}, {"refreshed": True, "thresholds": b"thresholds"}])
def test_a_step_comes_back_as_it_was(samples: int, refresh: dict[str, object]) -> None:
    record = make(5, samples, **refresh)
    data = pack_step(record, None, KEY)
    assert unpack_step(5, data, refresh.get("thresholds"), None, KEY, groups=2) == record


def test_a_skipped_step_keeps_losses_that_are_not_finite() -> None:
    record = make(1, projected_gradients=(), losses=((math.inf, 1.5),), skipped=True)
    assert unpack_step(1, pack_step(record, BEFORE, KEY), None, BEFORE, KEY, groups=2) == record


def test_a_loss_beyond_float32_becomes_infinite() -> None:
    record = make(1, losses=((1e300, -1e300),))
    back = unpack_step(1, pack_step(record, BEFORE, KEY), None, BEFORE, KEY, groups=2)
    assert back.losses == ((math.inf, -math.inf),)


def test_rates_are_stored_where_they_change() -> None:
    constant = pack_step(make(1), BEFORE, KEY)
    assert len(constant) == 1 + 12 + 8
    changed = make(1, lr=(2e-6, 3e-5))
    data = pack_step(changed, BEFORE, KEY)
    assert len(data) == len(constant) + 16
    assert unpack_step(1, data, None, BEFORE, KEY, groups=2) == changed


def test_tensors_that_take_no_part_are_stored_where_they_change() -> None:
    first = make(1, unread=0b1100 | 1 << 5000)
    data = pack_step(first, BEFORE, KEY)
    assert unpack_step(1, data, None, BEFORE, KEY, groups=2) == first
    for unread, size in ((first.unread, 0), (0b1000, 1 + 4), (0, 4)):
        later = make(2, unread=unread)
        data = pack_step(later, first, KEY)
        assert len(data) == 1 + 12 + size + 8
        assert unpack_step(2, data, None, first, KEY, groups=2) == later
    skipped = make(2, projected_gradients=(), skipped=True, unread=7, refreshed=True, thresholds=b"abc")
    assert unpack_step(2, pack_step(skipped, first, KEY), b"abc", first, KEY, groups=2) == skipped


ROWS = {"rows": 3, "shared": 0b101 | 1 << 900, "mean_square": 0.1}


def test_what_rows_have_is_stored_where_it_changes() -> None:
    first = make(1, 6, **ROWS)
    data = pack_step(first, BEFORE, KEY)
    assert len(data) == 2 + 4 + (4 + 113) + 8 + 6 * 12 + 8
    assert unpack_step(1, data, None, BEFORE, KEY, groups=2) == first
    for changes, size in (({}, 0), ({"rows": 2}, 4), ({"shared": 7}, 5), ({"shared": 0}, 4), ({"mean_square": 0.2}, 8)):
        later = make(2, 6, **{**ROWS, **changes}, unread=9)
        data = pack_step(later, first, KEY)
        assert len(data) == 1 + bool(changes) + size + 6 * 12 + (1 + 4) + 8
        assert unpack_step(2, data, None, first, KEY, groups=2) == later
    skipped = make(2, 6, projected_gradients=(), skipped=True, rows=2)
    assert unpack_step(2, pack_step(skipped, first, KEY), None, first, KEY, groups=2) == skipped
    assert (first.samples, skipped.samples) == (2, 3)


def sealed(body: bytes) -> bytes:
    return body + _step_check(KEY, 1, body, b"")


def test_what_this_version_does_not_know_is_refused() -> None:
    body = pack_step(make(1), BEFORE, KEY)[1:-CHECK_SIZE]
    for flags in (b"\x80\x08", b"\x80\x80\x01", b"\x80\x80\x80\x80", b"\x80"):
        with pytest.raises(ValueError, match="something that this version does not know"):
            unpack_step(1, sealed(flags + body if len(flags) > 1 else flags), None, BEFORE, KEY, groups=2)


@pytest.mark.parametrize("cut", [1, 3, 7, 11, 100, 125])
def test_a_step_that_ends_within_its_rows_is_refused(cut: int) -> None:
    body = pack_step(make(1, 3, **ROWS), BEFORE, KEY)[: 2 + cut]
    with pytest.raises(ValueError, match="ends within what it holds of its rows|fits no number"):
        unpack_step(1, sealed(body), None, BEFORE, KEY, groups=2)


@pytest.mark.parametrize("rows", [0, 2, 2**32 - 1])
def test_a_number_of_rows_that_does_not_fit_is_refused(rows: int) -> None:
    body = bytearray(pack_step(make(1, 3, rows=3), BEFORE, KEY)[:-CHECK_SIZE])
    body[2:6] = rows.to_bytes(4, "little")
    with pytest.raises(ValueError, match="fits no number of samples"):
        unpack_step(1, sealed(bytes(body)), None, BEFORE, KEY, groups=2)


def test_a_step_with_too_many_numbers_is_refused() -> None:
    most = make(1, MAX_NUMBERS, rows=MAX_NUMBERS)
    assert unpack_step(1, pack_step(most, BEFORE, KEY), None, BEFORE, KEY, groups=2) == most
    with pytest.raises(ValueError, match="fits no number of samples"):
        unpack_step(1, pack_step(make(1, MAX_NUMBERS + 1), BEFORE, KEY), None, BEFORE, KEY, groups=2)


def test_a_length_beyond_the_step_is_refused() -> None:
    data = bytearray(pack_step(make(1, unread=7), BEFORE, KEY)[:-CHECK_SIZE])
    data[-4:] = b"\xff\xff\xff\x7f"
    with pytest.raises(ValueError, match="ends within the tensors"):
        unpack_step(1, bytes(data) + _step_check(KEY, 1, bytes(data), b""), None, BEFORE, KEY, groups=2)


@pytest.mark.parametrize("changes", [{}, {"unread": 0b1100}, {"rows": 1, "shared": 5, "mean_square": 0.1}])
def test_every_flipped_bit_is_found(changes: dict[str, Any]) -> None:
    data = pack_step(make(3, **changes), None, KEY)
    for bit in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="check"):
            unpack_step(3, bytes(wrong), None, None, KEY, groups=2)


def test_every_cut_is_found() -> None:
    data = pack_step(make(3), None, KEY)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="check"):
            unpack_step(3, data[:length], None, None, KEY, groups=2)


def test_a_step_is_tied_to_its_index_its_refresh_and_the_step_before() -> None:
    data = pack_step(make(3), None, KEY)
    check_of_3 = data[-CHECK_SIZE:]
    after = pack_step(make(4), BEFORE, check_of_3)
    assert unpack_step(4, after, None, BEFORE, check_of_3, groups=2) == make(4)
    for step, refresh, check in ((5, None, check_of_3), (4, b"x", check_of_3), (4, None, KEY)):
        with pytest.raises(ValueError, match="check"):
            unpack_step(step, after, refresh, BEFORE, check, groups=2)
    with_refresh = pack_step(make(3, refreshed=True, thresholds=b"abc"), None, KEY)
    for refresh in (None, b"abd"):
        with pytest.raises(ValueError, match="check"):
            unpack_step(3, with_refresh, refresh, None, KEY, groups=2)


def test_the_first_step_must_name_its_rates() -> None:
    with pytest.raises(ValueError, match="learning rate"):
        unpack_step(0, pack_step(make(0), BEFORE, KEY), None, None, KEY, groups=2)


def test_a_number_of_groups_that_does_not_fit_is_refused() -> None:
    data = pack_step(make(0), None, KEY)
    with pytest.raises(ValueError, match="fits no number of samples"):
        unpack_step(0, data, None, None, KEY, groups=7)


@pytest.mark.parametrize(("thresholds", "width"), [((0.0123456, math.inf), 8), ((f32(0.1), math.inf, 0.0), 4), ((), 4)])
def test_thresholds_come_back_to_the_bit(thresholds: tuple[float, ...], width: int) -> None:
    data = pack_thresholds(thresholds)
    assert unpack_thresholds(data, len(thresholds)) == thresholds
    assert len(data) <= width * len(thresholds) + 16


@pytest.mark.parametrize("data", [b"", b"abc", pack_thresholds([1.0] * 5), pack_thresholds([0.0] * 100_000)])
def test_corrupted_thresholds_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"no deflated data|thresholds|inflates|ends early"):
        unpack_thresholds(data, 4)
