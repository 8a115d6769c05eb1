"""Which rows of which data set become a run's train, dev and test examples."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smezo_pl.data.drawing import examples_of, k_of_each_class, usable, with_demonstrations
from smezo_pl.data.repeats import say_repeated_ids, say_shared_texts
from smezo_pl.data.sampling import sample, sample_train_dev
from smezo_pl.data.sources import Split, load_file, load_split
from smezo_pl.tasks import Example, FreeText, Task

logger = logging.getLogger(__name__)

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
            column = free.column if isinstance(free, FreeText) else self.task.label
            raise ValueError(
                f"{data.origin}, {unknown[0].where}: column {column!r} holds no"
                f" {'answer' if self.task.is_free else 'label'} ({len(unknown)} such rows of {len(numbers)}),"
                f" but {split} examples need one; bad_rows: skip leaves such rows out"
            )
        logger.info(
            "%s: %d of %d rows of %s are %s examples (data_seed %d)",
            self.task.name, len(numbers), len(data), data.origin, split, self.seed,
        )  # fmt: skip
        return Drawn(examples, data.origin)
