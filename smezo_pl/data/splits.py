"""Which examples a split holds: drawing, checks, repeats."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from smezo_pl.data.sources import Split, load_file, load_split
from smezo_pl.tasks import Example, ExampleError, GeneratedAnswer, Task, make_example

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


ID_COLUMNS = ("id", "idx", "uid", "guid", "query_id", "question_id", "example_id")
"""Columns that number the rows of a data set, wherever one is called so."""


def say_repeated_ids(data: Split) -> None:
    """Say in the log which ids of a file stand on several of its rows, and on which the first of them does.

    Nothing here goes by an id: rows are known by their place, also in ``predictions.jsonl``. So a repeated one harms
    nothing by itself, but it mostly means that rows were copied, and copies may fall on both sides of train and dev.
    """
    for column in ID_COLUMNS:
        if column not in data.column_names:
            continue
        first: dict[str, int] = {}
        again: list[tuple[str, int]] = []
        for row, value in enumerate(data.column(column)):
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            key = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
            if key in first:
                again.append((key, row))
            else:
                first[key] = row
        if again:
            key, row = again[0]
            logger.warning(
                "%s: %d of %d rows repeat the %s of an earlier row; the first: %s on %s and %s. Every row counts as an"
                " example of its own; copies may be in train and dev alike",
                data.origin, len(again), len(data), column, key, data.line(first[key]), data.line(row),
            )  # fmt: skip


def say_shared_texts(train: Sequence[Example], dev: Sequence[Example], train_origin: str, dev_origin: str) -> None:
    """Say in the log how many dev examples have the text and the candidates of a training example.

    Args:
        train: The training examples.
        dev: The dev examples.
        train_origin: The file or data set of the training examples.
        dev_origin: That of the dev examples.
    """
    trained = {_texts(example): example.where for example in reversed(train)}
    shared = [example for example in dev if _texts(example) in trained]
    if shared:
        logger.warning(
            "%d of %d dev examples have the text of a training example and measure what was learnt by heart; the first:"
            " %s, %s, trained on as %s, %s",
            len(shared), len(dev), dev_origin, shared[0].where, train_origin, trained[_texts(shared[0])],
        )  # fmt: skip


def _texts(example: Example) -> tuple[str, tuple[str, ...]]:
    return example.prompt, example.candidates


SEPARATOR = "\n\n"
"""What stands between demonstrations, and before the example: MeZO's."""


def examples_of(task: Task, data: Split, numbers: Sequence[int]) -> list[Example]:
    """The rows of these numbers as examples.

    Raises:
        ExampleError: If a row cannot be made into one.
    """
    names = data.names.get(task.label)
    rows = zip(numbers, data.rows(numbers), strict=True)
    return [make_example(task, row, i, data.origin, names, data.line(i)) for i, row in rows]


def usable(task: Task, data: Split, labelled: bool) -> list[int]:
    """The rows that can be made into examples; the log says how many are left out, and why the first one is.

    Raises:
        ValueError: If there is none.
    """
    names = data.names.get(task.label)
    kept, reasons = [], []
    for index, row in enumerate(data.rows(range(len(data)))):
        try:
            example = make_example(task, row, index, data.origin, names, data.line(index))
        except ExampleError as error:
            reasons.append(str(error))
            continue
        if example.label < 0 and labelled:
            reasons.append(f"{data.origin}, {data.line(index)}: no label")
        else:
            kept.append(index)
    if reasons:
        logger.warning("%d of %d rows are left out; the first: %s", len(reasons), len(data), reasons[0])
    if not kept:
        raise ValueError(f"{data.origin}: none of the {len(data)} rows is usable; the first: {reasons[0]}")
    return kept


def k_of_each_class(
    labels: Sequence[int], k: int, names: Sequence[str], seed: int, origin: str, dev: bool
) -> tuple[list[int], list[int]]:
    """``k`` rows of every class for training and, if they come from the same split, ``k`` others for dev.

    The rows are shuffled by the seed; of each class the first ``k`` train, the next ``k`` are dev.

    Raises:
        ValueError: If a class has too few; it says how many there are.
    """
    of_class: dict[int, list[int]] = defaultdict(list)
    for row in permutation(len(labels), seed):
        of_class[labels[row]].append(row)
    need = 2 * k if dev else k
    for place, name in enumerate(names):
        if len(of_class[place]) < need:
            raise ValueError(
                f"k_shot {k} needs {need} rows of each class{' (train and dev)' if dev else ''}, and {origin} has"
                f" {len(of_class[place])} of {name!r}"
            )
    order = {row: place for place, row in enumerate(permutation(len(labels), seed))}

    def drawn(first: int) -> list[int]:
        return sorted((row for rows in of_class.values() for row in rows[first : first + k]), key=order.__getitem__)

    return drawn(0), drawn(k) if dev else []


def with_demonstrations(
    examples: Sequence[Example], task: Task, data: Split, count: int, seed: int | None, evaluated: str, after: bool
) -> list[Example]:
    """The examples with demonstrations before them: solved training examples, as in-context learning shows them.

    Each is its prompt and the right answer, stripped; they are joined by two line breaks. Without a seed every example
    gets a draw of its own, by seeds that are drawn themselves as MeZO draws them.

    Args:
        examples: What is evaluated.
        task: The task.
        data: The split that demonstrations come from.
        count: Demonstrations of an example.
        seed: Decides the one set for all examples; None: a fresh one for each.
        evaluated: Where the examples come from, so that none is shown to itself.
        after: Whether prompts without content follow demonstrations too.

    Raises:
        ValueError: If there are too few rows.
    """
    if len(data) <= count:
        raise ValueError(f"num_demonstrations {count} needs more than {count} rows, and {data.origin} has {len(data)}")
    seeds: Iterable[int] = np.random.RandomState(0).randint(0, 10000, len(examples)).tolist()
    if seed is not None:
        seeds = [seed] * len(examples)
    rows = []
    for example, own_seed in zip(examples, seeds, strict=True):
        drawn = np.random.RandomState(own_seed).permutation(len(data))[: count + 1].tolist()
        itself = example.index if evaluated == data.origin else None
        rows.append([row for row in drawn if row != itself][:count])
    needed = sorted({row for drawn in rows for row in drawn})
    solved = {}
    for shown in examples_of(task, data, needed):
        if shown.label < 0:
            raise ValueError(f"{data.origin}, {shown.where}: a demonstration needs a label, and this row has none")
        solved[shown.index] = (shown.prompt + shown.candidates[shown.label]).strip()
    result = []
    for example, drawn in zip(examples, rows, strict=True):
        before = SEPARATOR.join(solved[row] for row in drawn) + SEPARATOR
        content_free = example.calibration
        if after and content_free is not None:
            content_free = before + content_free
        result.append(replace(example, prompt=before + example.prompt, calibration=content_free))
    return result


SplitName = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Drawn:
    """The examples of a split, in the order they were drawn, and the file or data set that they come from."""

    examples: list[Example]
    origin: str


@dataclass(frozen=True)
class Draws:
    """What decides which rows are drawn; its methods draw them. All of it is a pure function of this and the data.

    Attributes:
        task: The task.
        files: One's own files, by split.
        data_dir: Local folder of the task's data set; None for the hub.
        sizes: How many examples of each split are asked for.
        seed: Decides which rows are drawn.
        k_shot: Examples of each class for train and dev, instead of ``sizes``.
        bad_rows: What happens to a row that no example can be made of.
        num_demonstrations: Solved training examples before each dev and test example.
        demonstration_seed: Decides one set of them for all examples; None: one for each.
        shown_without_content: Whether they stand before the prompt without content too.
    """

    task: Task
    files: Mapping[SplitName, str | None]
    data_dir: str | Path | None
    sizes: Mapping[SplitName, int]
    seed: int
    k_shot: int | None = None
    bad_rows: Literal["refuse", "skip"] = "refuse"
    num_demonstrations: int = 0
    demonstration_seed: int | None = None
    shown_without_content: bool = False

    def train_and_dev(self) -> dict[SplitName, Drawn]:
        """Both at once, as they come out of one split where dev has none of its own.

        Raises:
            ValueError: If there are too few rows, or one cannot be made into an example.
        """
        data = self._load("train")
        rows = self._rows(data)
        source = self.task.source
        apart = self.files["dev"] is not None or (source is not None and source.dev is not None)
        dev_data = self._load("dev") if apart else data
        dev_rows = self._rows(dev_data) if apart else rows
        if self.k_shot is not None:
            train, dev = self._of_each_class(data, rows, dev=not apart)
            if apart:
                dev, _ = self._of_each_class(dev_data, dev_rows, dev=False)
        elif apart:
            train = sample(len(rows), self.sizes["train"], self.seed, "training examples", data.origin)
            dev = sample(len(dev_rows), self.sizes["dev"], self.seed, "dev examples", dev_data.origin)
        else:
            train, dev = sample_train_dev(len(rows), self.sizes["train"], self.sizes["dev"], self.seed, data.origin)
        drawn: dict[SplitName, Drawn] = {
            "train": self._made("train", data, [rows[place] for place in train]),
            "dev": self._made("dev", dev_data, [dev_rows[place] for place in dev]),
        }
        say_shared_texts(drawn["train"].examples, drawn["dev"].examples, data.origin, dev_data.origin)
        if self.num_demonstrations:
            drawn["dev"] = self._demonstrated("dev", drawn["dev"], data)
        return drawn

    def test(self, predicting: bool = False) -> Drawn:
        """The test examples.

        Args:
            predicting: Whether labels may be unknown.

        Raises:
            ValueError: If there are none, or a row cannot be made into an example.
        """
        data = self._load("test", labelled=not predicting)
        rows = self._rows(data, labelled=not predicting)
        numbers = sample(len(rows), self.sizes["test"], self.seed, "test examples", data.origin)
        drawn = self._made("test", data, [rows[place] for place in numbers], labelled=not predicting)
        return self._demonstrated("test", drawn, self._load("train")) if self.num_demonstrations else drawn

    def _load(self, split: SplitName, labelled: bool = True) -> Split:
        data = self._found(split, labelled)
        say_repeated_ids(data)
        return data

    def _found(self, split: SplitName, labelled: bool) -> Split:
        """The rows that a split is drawn from: one's own file, else the task's data set."""
        source = self.task.source
        names = {
            "train": source.train if source else "train",
            "dev": (source.dev if source else None) or "validation",
            "test": source.test if source else "test",
        }
        if (file := self.files[split]) is not None:
            return load_file(file, self.task, names[split], labelled)
        if any(self.files.values()) or source is None:
            raise ValueError(
                f"{split} examples of task {self.task.name!r} need {split}_file: give one"
                + (f" ({', '.join(f'{name}_file' for name, file in self.files.items() if file)} is given)")
                * any(self.files.values())
            )
        return load_split(self.task, names[split], self.data_dir)

    def _rows(self, data: Split, labelled: bool = True) -> list[int]:
        return usable(self.task, data, labelled) if self.bad_rows == "skip" else list(range(len(data)))

    def _of_each_class(self, data: Split, rows: list[int], dev: bool) -> tuple[list[int], list[int]]:
        assert self.k_shot is not None
        labels = [example.label for example in examples_of(self.task, data, rows)]
        return k_of_each_class(labels, self.k_shot, self.task.labels, self.seed, data.origin, dev)

    def _demonstrated(self, split: SplitName, drawn: Drawn, data: Split) -> Drawn:
        logger.info("%s: %d demonstrations of %s before each", split, self.num_demonstrations, data.origin)
        shown = with_demonstrations(
            drawn.examples,
            self.task,
            data,
            self.num_demonstrations,
            self.demonstration_seed,
            drawn.origin,
            after=self.shown_without_content,
        )
        return Drawn(shown, drawn.origin)

    def _made(self, split: SplitName, data: Split, numbers: list[int], labelled: bool = True) -> Drawn:
        examples = examples_of(self.task, data, numbers)
        unknown = [example for example in examples if example.label < 0]
        if unknown and labelled:
            free = self.task.candidates
            column = free.column if isinstance(free, GeneratedAnswer) else self.task.label
            raise ValueError(
                f"{data.origin}, {unknown[0].where}: column {column!r} holds no"
                f" {'answer' if self.task.is_generation else 'label'} ({len(unknown)} such rows of {len(numbers)}),"
                f" but {split} examples need one; bad_rows: skip leaves such rows out"
            )
        logger.info(
            "%s: %d of %d rows of %s are %s examples (data_seed %d)",
            self.task.name, len(numbers), len(data), data.origin, split, self.seed,
        )  # fmt: skip
        return Drawn(examples, data.origin)
