import logging

import numpy as np
import pytest

from smezo_pl.data.splits import permutation, sample, sample_train_dev


def test_the_draw_is_that_of_numpys_seeded_permutation() -> None:
    """MeZO draws with numpy.random.seed and numpy.random.permutation: the same seed gives the same examples."""
    state = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(3)  # noqa: NPY002
        expected = np.random.permutation(1000).tolist()  # noqa: NPY002
    finally:
        np.random.set_state(state)  # noqa: NPY002
    assert permutation(1000, 3) == expected


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    permutation(100, 1, 2)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]  # noqa: NPY002


def test_the_draw_never_changes() -> None:
    assert permutation(10, 0) == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    assert permutation(10, 0, 0) != permutation(10, 0, 1) != permutation(10, 1, 0)


def test_the_last_drawn_are_dev() -> None:
    train, dev = sample_train_dev(100, 20, 10, 5, "x")
    assert train + dev == permutation(100, 5)[:30]
    assert (len(train), len(dev)) == (20, 10)


def test_more_training_examples_leave_the_dev_set_disjoint() -> None:
    for num_train in (10, 60, 90):
        train, dev = sample_train_dev(100, num_train, 10, 0, "x")
        assert not set(train) & set(dev)


@pytest.mark.parametrize(
    ("count", "asked", "given"),
    [
        (64, (1000, 500), (43, 21)),
        (250, (150, 100), (150, 100)),
        (2, (1000, 1), (1, 1)),
        (2, (1, 1000), (1, 1)),
        (3, (10, 0), (3, 0)),
    ],
)
def test_a_small_split_is_shared_out(
    count: int, asked: tuple[int, int], given: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    train, dev = sample_train_dev(count, *asked, 0, "boolq.parquet")
    assert (len(train), len(dev)) == given
    assert len(set(train + dev)) == sum(given)
    said = (
        f"boolq.parquet holds {count} rows, fewer than the {asked[0]} for training and {asked[1]} for dev that were"
        f" asked for: {given[0]} and {given[1]} are used"
    )
    assert ([record.getMessage() for record in caplog.records] == [said]) == (sum(asked) > count)


def test_too_small_a_split() -> None:
    with pytest.raises(ValueError, match=r"x holds 1 rows, too few for a train and a dev set"):
        sample_train_dev(1, 10, 5, 0, "x")


def test_sample(caplog: pytest.LogCaptureFixture) -> None:
    assert sample(100, 10, 7, "test examples", "x") == permutation(100, 7)[:10]
    with caplog.at_level(logging.INFO):
        assert sample(5, 10, 7, "test examples", "x") == permutation(5, 7)
    assert "x holds 5 rows, fewer than the 10 asked for as test examples: all are used" in caplog.text
