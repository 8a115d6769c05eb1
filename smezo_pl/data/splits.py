"""Which examples a split holds: sampling, checks, few-shot demonstrations."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smezo_pl.data.digests import column_digests
from smezo_pl.data.sources import Rows, load_file, load_split
from smezo_pl.tasks import Example, ExampleError, GeneratedAnswer, LabelReading, Source, Task, make_example
from smezo_pl.tasks.example import options_of
from smezo_pl.tasks.labels import Cell

logger = logging.getLogger(__name__)

SplitName = Literal["train", "dev", "test"]

SEPARATOR = "\n\n"
"""What separates demonstrations from each other and from the example, as in MeZO."""


def permutation(count: int, *seeds: int) -> list[int]:
    """A permutation of ``range(count)`` that is a pure function of the seeds, each in [0, 2^32).

    With one seed it is ``numpy.random.seed(seed); numpy.random.permutation(count)``, which is what MeZO samples with,
    so the same seed gives MeZO's examples. This generator's numbers are frozen in numpy.
    """
    state = np.random.RandomState(seeds[0] if len(seeds) == 1 else np.array(seeds, dtype=np.uint32))
    order: list[int] = state.permutation(count).tolist()
    return order


def sample(count: int, number: int, seed: int, what: str, origin: str) -> list[int]:
    """``number`` rows out of ``count``, in the order of a permutation by the seed; all of them if there are fewer."""
    if number > count:
        logger.info("%s holds %d rows, fewer than the %d asked for as %s: all are used", origin, count, number, what)
    return permutation(count, seed)[:number]


def sample_train_dev(count: int, num_train: int, num_dev: int, seed: int, origin: str) -> tuple[list[int], list[int]]:
    """Rows for training and for dev out of one split of ``count`` rows.

    The split is shuffled by the seed and ``num_train + num_dev`` rows are taken, the last ``num_dev`` of them for dev.
    A smaller split is used whole and divided in the same proportion, which is logged.
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
    rows = permutation(count, seed)[: num_train + num_dev]
    return rows[:num_train], rows[num_train:]


def sample_k_per_class(
    labels: Sequence[int], k: int, names: Sequence[str], seed: int, origin: str, dev: bool
) -> tuple[list[int], list[int]]:
    """``k`` rows of every class for training and, if they come from the same split, ``k`` others for dev.

    The rows are shuffled by the seed; of each class the first ``k`` train, the next ``k`` are dev.
    """
    order = permutation(len(labels), seed)
    by_class: dict[int, list[int]] = defaultdict(list)
    for row in order:
        by_class[labels[row]].append(row)
    need = 2 * k if dev else k
    for label, name in enumerate(names):
        if len(by_class[label]) < need:
            raise ValueError(
                f"k_shot {k} needs {need} rows of each class{' (train and dev)' if dev else ''}, and {origin} has"
                f" {len(by_class[label])} of {name!r}"
            )
    train = {row for rows in by_class.values() for row in rows[:k]}
    others = {row for rows in by_class.values() for row in rows[k:need]}
    return [row for row in order if row in train], [row for row in order if row in others]


def at_least(name: str, value: int, least: int) -> int:
    """The value, or a ``ValueError`` that names the argument."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


@dataclass(frozen=True)
class Split:
    """The examples of a split, in the order they were drawn, and the file or dataset that they come from."""

    examples: list[Example]
    origin: str
    labels: str = ""  # how they were read, where that is not by the task's own names
    columns: Mapping[str, str] = field(default_factory=dict)  # of training examples, digests of what they are made of
    failed: Mapping[int, str] = field(default_factory=dict)  # why rows to predict are no examples, by their index


@dataclass
class Splits:
    """The three splits of a task, each drawn when it is asked for: a pure function of these settings and the data.

    The settings are those of `smezo_pl.PromptDataModule`.
    """

    task: Task
    files: Mapping[SplitName, str | None]
    data_dir: str | Path | None = None
    num_train: int | None = None
    num_dev: int | None = None
    num_test: int | None = None
    seed: int = 0
    k_shot: int | None = None
    bad_rows: Literal["refuse", "skip"] = "refuse"
    num_demonstrations: int = 0
    demonstration_seed: int | None = None
    demonstrate_calibration: bool = False  # put demonstrations before the content-free prompt too
    drawn: dict[str, Split] = field(init=False, default_factory=dict)
    readings: dict[str, LabelReading] = field(init=False, default_factory=dict)  # by the file or dataset

    def __post_init__(self) -> None:
        if self.k_shot is not None:
            at_least("k_shot", self.k_shot, 1)
            if not self.task.labels:
                raise ValueError(f"k_shot {self.k_shot} needs classes, and task {self.task.name!r} has none")
            if self.num_train is not None or self.num_dev is not None:
                raise ValueError("k_shot takes the place of num_train and num_dev: give only one of them")
        if self.bad_rows not in ("refuse", "skip"):
            raise ValueError(f"bad_rows must be 'refuse' or 'skip', got {self.bad_rows!r}")
        at_least("num_demonstrations", self.num_demonstrations, 0)
        for name, seed in (("data_seed", self.seed), ("demonstration_seed", self.demonstration_seed or 0)):
            if not 0 <= seed < 2**32:
                raise ValueError(f"{name} must be in [0, 2^32), got {seed}")
        self.sizes: dict[str, Any] = {}
        for name, least in (("train", 1), ("dev", 0), ("test", 0)):
            asked, default = getattr(self, f"num_{name}"), getattr(self.task, f"num_{name}")
            self.sizes[name] = at_least(f"num_{name}", default if asked is None else asked, least)
        if self.num_test is None and self.files["test"] is not None:
            self.sizes["test"] = None  # all rows of a user's own file

    def get(self, name: SplitName, predicting: bool = False) -> Split:
        """A split; with ``predicting`` the test set is all rows of its file in their order, also without labels."""
        if name not in ("train", "dev", "test"):
            raise ValueError(f"split must be one of train, dev, test, got {name!r}")
        key = "predict" if predicting and name == "test" else name
        if key not in self.drawn:
            if name == "test":
                self.drawn[key] = self._predicted() if predicting else self._test()
            else:
                self.drawn.update(self._train_and_dev())
        return self.drawn[key]

    def _train_and_dev(self) -> dict[str, Split]:
        data = dev_data = self._load("train")
        rows = dev_rows = self._usable(data)
        source = self.task.source
        apart = self.files["dev"] is not None or (source is not None and source.dev is not None)
        if apart:
            dev_data = self._load("dev")
            dev_rows = self._usable(dev_data)
        if self.k_shot is not None:
            train, dev = self._k_per_class(self.k_shot, data, rows, dev=not apart)
            if apart:
                dev, _ = self._k_per_class(self.k_shot, dev_data, dev_rows, dev=False)
        elif apart:
            train = sample(len(rows), self.sizes["train"], self.seed, "training examples", data.origin)
            dev = sample(len(dev_rows), self.sizes["dev"], self.seed, "dev examples", dev_data.origin)
        else:
            train, dev = sample_train_dev(len(rows), self.sizes["train"], self.sizes["dev"], self.seed, data.origin)
        train_split = self._split("train", data, [rows[n] for n in train])
        dev_split = self._split("dev", dev_data, [dev_rows[n] for n in dev])
        log_leaked_examples(train_split, dev_split)
        return {"train": train_split, "dev": self._with_demonstrations("dev", dev_split, data)}

    def _test(self) -> Split:
        data = self._load("test")
        rows = self._usable(data)
        count = len(rows) if self.sizes["test"] is None else self.sizes["test"]
        numbers = sample(len(rows), count, self.seed, "test examples", data.origin)
        split = self._split("test", data, [rows[n] for n in numbers])
        return self._with_demonstrations("test", split, self._load("train")) if self.num_demonstrations else split

    def _predicted(self) -> Split:
        """All rows of the test set in their order, or a sample of ``num_test`` if that was given.

        A label that cannot be read is unknown. A row that is no example is among `Split.failed`.
        """
        data, how = self._load("test", labelled=False), "all"
        count = len(data) if self.num_test is None else self.num_test
        drawn = sample(len(data), count, self.seed, "rows to predict", data.origin)
        numbers = sorted(drawn)
        if self.num_test is not None:
            how = f"a sample by data_seed {self.seed}, as num_test {self.num_test} is given"
        logger.info("%s: %d of %d rows of %s to predict: %s", self.task.name, len(numbers), len(data), data.origin, how)
        unread: dict[int, str] = {}
        try:
            reading = self._reading(data)
        except ExampleError as error:
            reading, unread = LabelReading.of(self.task, (), (), data.origin), dict.fromkeys(numbers, str(error))
        label, examples, failed = self.task.columns[-1], [], {}
        make = partial(make_example, self.task, origin=data.origin, reading=reading)
        for index, row in zip(numbers, data.rows(numbers), strict=True):
            line = data.line(index)
            try:
                if index not in unread:
                    examples.append(make(row, index, line=line))
                    continue
            except ExampleError as error:
                unread[index] = str(error)
            try:
                examples.append(make({**row, label: None}, index, line=line))
            except ExampleError as error:
                failed[index] = str(error)
                unread.pop(index)
        for what, reasons in (("have no label that can be read", unread), ("cannot be predicted", failed)):
            if reasons:
                first = next(iter(reasons.values()))
                logger.warning("%d of %d rows %s; the first: %s", len(reasons), len(numbers), what, first)
        if numbers and not examples:
            raise ValueError(f"none of {len(numbers)} rows can be predicted; the first: {next(iter(failed.values()))}")
        split = Split(examples, data.origin, reading.describe(), failed=failed)
        if self.num_demonstrations:
            # In the order that they are drawn in, so that each gets the demonstrations that it gets in a test.
            rank = {row: position for position, row in enumerate(drawn)}
            examples = sorted(examples, key=lambda example: rank[example.index])
            split = self._with_demonstrations("test", replace(split, examples=examples), self._load("train"))
        return replace(split, examples=sorted(split.examples, key=lambda example: example.index))

    def _load(self, name: SplitName, labelled: bool = True) -> Rows:
        """The rows that a split is drawn from: the user's own file, else the task's dataset."""
        source = self.task.source or Source(test="test")
        hub_split = {"train": source.train, "dev": source.dev or "validation", "test": source.test}[name]
        given = [f"{other}_file" for other, file in self.files.items() if file]
        if (file := self.files[name]) is not None:
            return load_file(file, self.task, hub_split, labelled)
        if given or self.task.source is None:
            raise ValueError(
                f"{name} examples of task {self.task.name!r} need {name}_file: give one"
                + (f" ({', '.join(given)} is given)" if given else "")
            )
        return load_split(self.task, hub_split, self.data_dir)

    def _reading(self, data: Rows) -> LabelReading:
        """How a file's labels are read; the files that a task has read agree."""
        if data.origin not in self.readings:
            reading = read_labels(self.task, data)
            for other in self.readings.values():
                reading.check_agrees(other)
            self.readings[data.origin] = reading
            if told := reading.describe():
                logger.info("labels of %s: %s", data.origin, told)
        return self.readings[data.origin]

    def _usable(self, data: Rows) -> list[int]:
        """The rows that examples are drawn from; with ``bad_rows: skip`` those that can be made into one."""
        if self.bad_rows == "refuse":
            return list(range(len(data)))
        kept, reasons = [], []
        reading = self._reading(data)
        for index, row in enumerate(data.rows(range(len(data)))):
            try:
                example = make_example(self.task, row, index, data.origin, line=data.line(index), reading=reading)
            except ExampleError as error:
                reasons.append(str(error))
                continue
            if example.label < 0:
                reasons.append(f"{data.origin}, {data.line(index)}: no label")
            else:
                kept.append(index)
        if reasons:
            logger.warning("%d of %d rows are left out; the first: %s", len(reasons), len(data), reasons[0])
        if not kept:
            raise ValueError(f"{data.origin}: none of the {len(data)} rows is usable; the first: {reasons[0]}")
        return kept

    def _k_per_class(self, k: int, data: Rows, rows: list[int], dev: bool) -> tuple[list[int], list[int]]:
        labels = [example.label for example in make_examples(self.task, data, rows, self._reading(data))]
        return sample_k_per_class(labels, k, self.task.labels, self.seed, data.origin, dev)

    def _split(self, name: SplitName, data: Rows, numbers: list[int]) -> Split:
        reading = self._reading(data)
        examples = make_examples(self.task, data, numbers, reading)
        unknown = [example for example in examples if example.label < 0]
        if unknown:
            column, kind = self.task.label, "label"
            if isinstance(self.task.candidates, GeneratedAnswer):
                column, kind = self.task.candidates.column, "answer"
            raise ValueError(
                f"{data.origin}, {unknown[0].where}: column {column!r} holds no {kind} ({len(unknown)} such rows of"
                f" {len(numbers)}), but {name} examples need one; bad_rows: skip leaves such rows out"
            )
        logger.info(
            "%s: %d of %d rows of %s are %s examples (data_seed %d)",
            self.task.name, len(numbers), len(data), data.origin, name, self.seed,
        )  # fmt: skip
        columns = column_digests(data.rows(numbers), self.task.columns) if name == "train" else {}
        return Split(examples, data.origin, reading.describe(), columns)

    def _with_demonstrations(self, name: SplitName, split: Split, data: Rows) -> Split:
        """The split with few-shot demonstrations before each example: prompts and gold answers, stripped.

        Without a seed every example gets a set of its own, by seeds that are drawn themselves as MeZO draws them. No
        example is among its own demonstrations.
        """
        count = self.num_demonstrations
        if not count:
            return split
        logger.info("%s: %d demonstrations of %s before each", name, count, data.origin)
        if len(data) <= count:
            raise ValueError(
                f"num_demonstrations {count} needs more than {count} rows, and {data.origin} has {len(data)}"
            )
        seeds: list[int] = np.random.RandomState(0).randint(0, 10000, len(split.examples)).tolist()
        if self.demonstration_seed is not None:
            seeds = [self.demonstration_seed] * len(seeds)
        chosen = []
        for example, seed in zip(split.examples, seeds, strict=True):
            itself = example.index if split.origin == data.origin else None
            chosen.append([row for row in permutation(len(data), seed)[: count + 1] if row != itself][:count])
        demonstrations = {}
        drawn = sorted({row for rows in chosen for row in rows})
        for shown in make_examples(self.task, data, drawn, self._reading(data)):
            if shown.label < 0:
                raise ValueError(f"{data.origin}, {shown.where}: a demonstration needs a label, and this row has none")
            demonstrations[shown.index] = (shown.prompt + shown.candidates[shown.label]).strip()
        examples = []
        for example, rows in zip(split.examples, chosen, strict=True):
            before = SEPARATOR.join(demonstrations[row] for row in rows) + SEPARATOR
            content_free = example.calibration
            if self.demonstrate_calibration and content_free is not None:
                content_free = before + content_free
            examples.append(replace(example, prompt=before + example.prompt, calibration=content_free))
        return replace(split, examples=examples)


def make_examples(task: Task, data: Rows, numbers: Sequence[int], reading: LabelReading | None = None) -> list[Example]:
    """The rows at these indices as examples; the labels of all rows decide how they are read."""
    reading = reading or read_labels(task, data)
    rows = zip(numbers, data.rows(numbers), strict=True)
    return [make_example(task, row, n, data.origin, line=data.line(n), reading=reading) for n, row in rows]


def read_labels(task: Task, data: Rows) -> LabelReading:
    """How the labels of a file are read, decided by all of them."""
    return LabelReading.of(task, _cells(task, data), data.names.get(task.label, ()), data.origin)


def _cells(task: Task, data: Rows) -> Iterator[Cell]:
    columns = (task.label, *task.candidate_columns)
    seen = set()
    for index, values in enumerate(zip(*map(data.values, columns), strict=True)):
        # The same label again, with the same candidates, says nothing new.
        if len(columns) == 1:
            if (label := repr(values[0])) in seen:
                continue
            seen.add(label)
        where = f"{data.origin}, {data.line(index)}"
        yield where, values[0], partial(options_of, task, dict(zip(columns, values, strict=True)), where)


def log_leaked_examples(train: Split, dev: Split) -> None:
    """Log how many dev examples have the text and the candidates of a training example."""
    trained = {(example.prompt, example.candidates): example.where for example in reversed(train.examples)}
    leaked = [example for example in dev.examples if (example.prompt, example.candidates) in trained]
    if leaked:
        logger.warning(
            "%d of %d dev examples have the text of a training example (train/dev leakage); the first: %s, %s, trained"
            " on as %s, %s",
            len(leaked), len(dev.examples), dev.origin, leaked[0].where,
            train.origin, trained[leaked[0].prompt, leaked[0].candidates],
        )  # fmt: skip
