"""Which rows are train, dev and test: MeZO's sampling, and the order of an epoch."""

import logging

import numpy as np

logger = logging.getLogger(__name__)


def permutation(count: int, *seeds: int) -> list[int]:
    """A permutation of ``range(count)`` that is a pure function of the seeds, each in [0, 2^32).

    With one seed it is ``numpy.random.seed(seed); numpy.random.permutation(count)``, which is what MeZO draws with, so
    the same seed gives MeZO's examples. This generator's numbers are frozen in numpy.
    """
    state = np.random.RandomState(seeds[0] if len(seeds) == 1 else np.array(seeds, dtype=np.uint32))
    drawn: list[int] = state.permutation(count).tolist()
    return drawn


def sample_train_dev(count: int, num_train: int, num_dev: int, seed: int, origin: str) -> tuple[list[int], list[int]]:
    """Rows for training and for dev out of one split of ``count`` rows.

    The split is shuffled by the seed and ``num_train + num_dev`` rows are taken, the last ``num_dev`` of them for dev.
    A smaller split is used whole and shared out in the same proportion; the log says so.

    Raises:
        ValueError: If one of the two was asked for and gets no row.
    """
    if num_train + num_dev > count:
        dev = round(count * num_dev / (num_train + num_dev))
        if num_dev and num_train:
            dev = min(max(dev, 1), count - 1)
        train = count - dev
        if (num_train and not train) or (num_dev and not dev):
            raise ValueError(f"{origin} holds {count} rows, too few for a train and a dev set")
        logger.warning(
            "%s holds %d rows, fewer than the %d for training and %d for dev that were asked for: %d and %d are used",
            origin, count, num_train, num_dev, train, dev,
        )  # fmt: skip
        num_train, num_dev = train, dev
    drawn = permutation(count, seed)[: num_train + num_dev]
    return drawn[:num_train], drawn[num_train:]


def sample(count: int, number: int, seed: int, what: str, origin: str) -> list[int]:
    """``number`` rows out of ``count``, in the order of a permutation by the seed; all of them if there are fewer."""
    if number > count:
        logger.info("%s holds %d rows, fewer than the %d asked for as %s: all are used", origin, count, number, what)
    return permutation(count, seed)[:number]
