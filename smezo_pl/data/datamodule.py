"""Checks of the data module's arguments, each with what is allowed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from smezo_pl.data.batch import PromptBatch
from smezo_pl.data.collate import Collate
from smezo_pl.data.encoding import Encoded, Encoder, MaskedEncoder, padding_id, stop_tokens
from smezo_pl.data.loaders import BatchLimit, evaluation_loader, found_budget, train_loader
from smezo_pl.data.sources import load_split
from smezo_pl.data.splits import Drawn, Draws, SplitName
from smezo_pl.models import load_tokenizer
from smezo_pl.tasks import Example, GeneratedAnswer, Task, get_task, make_task, masked_form
from smezo_pl.tasks.metrics import get_metric
from smezo_pl.tasks.objectives import check_objective
from smezo_pl.tasks.task import LOSSES, MASK


def task_of(task: str | Mapping[str, Any] | Task, file: str | None, max_new_tokens: int | None) -> Task:
    """The task of that name or of these keys, called after the file where it has no name.

    Raises:
        ValueError: For an unknown name, wrong keys, a metric that does not fit, or answers that are not written.
    """
    if isinstance(task, str):
        task = get_task(task)
    elif not isinstance(task, Task):
        task = make_task(task, name=Path(file).stem if file else "own")
    if max_new_tokens is not None:
        if not isinstance(task.candidates, GeneratedAnswer):
            raise ValueError(
                f"max_new_tokens is for answers that the model writes, and task {task.name!r} has candidates"
            )
        task = replace(task, candidates=replace(task.candidates, max_new_tokens=max_new_tokens))
    for name in task.metrics:
        get_metric(name, task)
    return task


def check_objective_or_reward(task: Task, objective: str | None, reward: str | None) -> str:
    """What a step goes by: the objective, the reward's import path, or the task's own loss.

    Raises:
        ValueError: If both are given, or what is given does not exist or does not fit the task.
    """
    if objective is not None and reward is not None:
        raise ValueError(f"objective {objective!r} and reward {reward!r}: give one of them")
    if reward is not None and "." not in reward:
        raise ValueError(f"reward must be the import path of a function, module.function, got {reward!r}")
    chosen = objective or reward or task.objective
    check_objective(chosen, task)
    return chosen


def check_together(
    task: Task,
    *,
    sizes_given: bool,
    k_shot: int | None,
    num_demonstrations: int,
    calibration: str,
    bad_rows: str,
    eval_batch_size: int | str,
) -> None:
    """Refuse arguments that are unknown or do not go with each other or the task, with a ``ValueError``."""
    if calibration not in ("none", "sfc", "icl_sfc"):
        raise ValueError(f"calibration must be 'none', 'sfc' or 'icl_sfc', got {calibration!r}")
    if calibration == "icl_sfc" and not num_demonstrations:
        raise ValueError("calibration 'icl_sfc' is for demonstrations: give num_demonstrations, or take 'sfc'")
    if calibration != "none" and task.calibration is None:
        raise ValueError(f"task {task.name!r} has no prompt without content, so it cannot be calibrated")
    if bad_rows not in ("refuse", "skip"):
        raise ValueError(f"bad_rows must be 'refuse' or 'skip', got {bad_rows!r}")
    if k_shot is not None:
        at_least("k_shot", k_shot, 1)
        if not task.labels:
            raise ValueError(f"k_shot {k_shot} needs classes, and task {task.name!r} has none")
        if sizes_given:
            raise ValueError("k_shot takes the place of num_train and num_dev: give only one of them")
    if not isinstance(eval_batch_size, str):
        at_least("eval_batch_size", eval_batch_size, 1)
    elif eval_batch_size != "auto":
        raise ValueError(f"eval_batch_size must be 'auto' or a number of at least 1, got {eval_batch_size!r}")


def at_least(name: str, value: int, least: int) -> int:
    """The value, or a ``ValueError`` that names the argument."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def seed_in_range(name: str, value: int) -> int:
    """The seed, or a ``ValueError`` that names the argument."""
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must be in [0, 2^32), got {value}")
    return value


def encoded_examples(
    task: Task,
    examples: Sequence[Example],
    origin: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    calibrated: bool = False,
) -> list[Encoded]:
    """The examples as tokens, in their order.

    Args:
        task: The task that they are of.
        examples: The examples.
        origin: Where they come from, for messages.
        tokenizer: The tokenizer.
        max_length: Most tokens of a prompt and a candidate together.
        calibrated: Whether prompts without content are encoded too.
    """
    if task.is_masked:
        return MaskedEncoder(tokenizer, max_length).encode(examples, origin)
    new_tokens = task.candidates.max_new_tokens if isinstance(task.candidates, GeneratedAnswer) else 0
    return Encoder(tokenizer, max_length, new_tokens, calibrated=calibrated).encode(examples, origin)


def collate_of(task: Task, tokenizer: PreTrainedTokenizerBase, objective: str, training: bool = False) -> Collate:
    """What makes batches of a task's encoded examples.

    Args:
        task: The task.
        tokenizer: The tokenizer.
        objective: A loss, a metric or a reward. Where nothing is trained, the loss stays one.
        training: Whether the batches are for training steps.
    """
    loss = next((name for name in LOSSES if name == objective), task.objective)
    reward = objective if training and objective not in LOSSES else None
    free = task.candidates
    collate = Collate(
        padding_id(tokenizer),
        loss,
        # A step of the lm objective reads no candidate but the right one.
        right_only=training and loss == "lm" and (reward is None or task.is_generation),
        metrics=task.metrics,
        num_labels=len(task.labels) if isinstance(free, Mapping) else 0,
        reward=reward,
    )
    if not isinstance(free, GeneratedAnswer) or (training and reward is None):
        return collate
    stops = stop_tokens(tokenizer, free.stop)
    return replace(collate, max_new_tokens=free.max_new_tokens, stop_ids=stops, stop=free.stop)


logger = logging.getLogger(__name__)


class PromptDataModule(pl.LightningDataModule):
    """Examples of a task as prompts with candidates, sampled as in MeZO's experiments.

    The training split is shuffled by ``data_seed`` and gives ``num_train`` examples and, from the end of those drawn,
    ``num_dev`` for dev; the test set is drawn from the validation split by the same seed. ``fit`` and ``validate``
    score the dev set, ``test`` and ``predict`` the test set. The training loader can be resumed in the middle of an
    epoch, and an epoch's order is a pure function of ``data_seed`` and the epoch.

    Args:
        task: Name of a built-in task: demo (synthetic, needs no download), sst2, rte, boolq, cb, wsc, wic, multirc,
            copa, record, squad, drop, mnli, qnli, mrpc, qqp, cola, trec, piqa, siqa, aqua; with a masked language model
            (RoBERTa) demo, sst2, sst5, mnli, snli, rte, qnli, mrpc, qqp, cola, trec. Or a task of your own as a
            mapping: ``prompt`` (text with columns in braces), ``candidates`` (``{label: text}``, a list of texts,
            texts with columns in braces, or ``{column: c}`` for a column that holds a list) or ``target`` (column of
            an answer that the model writes), and optionally ``label`` (its column), ``metric``, ``objective``,
            ``name``, ``words``, ``may_be_empty``, ``group``, ``calibration``, ``max_new_tokens``, ``stop``.
        data_dir: Local folder with ``{task}/{split}*.parquet`` in the hub's columns. Without it the data set is loaded
            from the Hugging Face hub.
        train_file: Your own training examples: a ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file in UTF-8 (a TSV's
            quotes are text), or a data set on the hub, ``owner/name`` or ``owner/name@config:split``.
        dev_file: Your own dev examples; drawn from ``train_file`` if not given.
        test_file: Your own test examples, for ``test`` and ``predict``; the latter needs no labels.
        tokenizer: Name, folder or GGUF file of the tokenizer, or the tokenizer itself. Without it the module's own
            ``tokenizer`` is taken.
        batch_size: Training examples a step and process, at least 1.
        eval_batch_size: How much a forward reads in evaluation. ``auto``: as many tokens as are quick on a CPU; on a
            GPU as many as fit, found once by trying; the log says how many. A number, at least 1: so many texts (an
            example is one if its candidates have one token, otherwise about one a candidate).
        num_train: Training examples; the task's own number (1000 for most) if not given.
        num_dev: Dev examples; the task's own number (500 for most) if not given.
        num_test: Test examples at most; the task's own number (1000) if not given.
        k_shot: Training examples of each class, instead of ``num_train``, and as many for dev.
        num_demonstrations: Solved training examples before each dev and test example: in-context learning, for
            ``validate`` and ``test`` (MeZO: 32). They are cut on the left where they do not fit in ``max_length``.
        demonstration_seed: Decides the one set of demonstrations for all examples, in [0, 2^32); without it each
            example gets a set of its own.
        data_seed: Decides which examples are drawn and in which order they come, in [0, 2^32).
        max_length: Most tokens of a prompt and a candidate together, at least 2. What is longer loses the beginning of
            its prompt; a beginning-of-sequence token stays.
        objective: What a step makes smaller, instead of the task's own loss: ``classification`` (cross-entropy over the
            candidates), ``lm`` (of the right answer's tokens), or one minus a metric of the batch's answers, such as
            ``accuracy``, ``f1`` or ``em``. Nothing needs to be differentiable. The dev loss stays a loss.
        reward: Import path of a function that a step makes larger instead: ``mymodule.score`` is called as
            ``score(predictions, references)`` with a list of answers as texts and, for each, the list of right ones,
            and gives a number or one an answer, whose mean counts. If it raises or gives NaN, the step is skipped.
        max_new_tokens: Most tokens of a generated answer; the task's own number (50) if not given.
        calibration: How candidates are chosen in evaluation: ``none``, by mean log-probability; ``sfc``, by the
            log-probability gained over a prompt without content (surface form competition, as in MeZO); ``icl_sfc``:
            the same with the demonstrations before that prompt too.
        bad_rows: What happens to a row that lacks a text or has a label outside the task: ``refuse`` ends with an error
            that names its line; ``skip`` leaves it out, and the log says how many.
        num_workers: Processes that make batches; 0 makes them in the main process, which is enough for text.

    Raises:
        ValueError: For an unknown task or a number out of range.
    """

    def __init__(
        self,
        task: str | dict[str, Any] | Task = "demo",
        data_dir: str | Path | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        eval_batch_size: int | Literal["auto"] = "auto",
        num_train: int | None = None,
        num_dev: int | None = None,
        num_test: int | None = None,
        data_seed: int = 0,
        max_length: int = 2048,
        num_workers: int = 0,
        train_file: str | None = None,
        dev_file: str | None = None,
        test_file: str | None = None,
        bad_rows: Literal["refuse", "skip"] = "refuse",
        k_shot: int | None = None,
        objective: str | None = None,
        reward: str | None = None,
        max_new_tokens: int | None = None,
        num_demonstrations: int = 0,
        demonstration_seed: int | None = None,
        calibration: Literal["none", "sfc", "icl_sfc"] = "none",
    ) -> None:
        super().__init__()
        self.files: dict[SplitName, str | None] = {"train": train_file, "dev": dev_file, "test": test_file}
        self.task = task_of(task, next(filter(None, self.files.values()), None), max_new_tokens)
        self.objective = check_objective_or_reward(self.task, objective, reward)
        check_together(
            self.task,
            sizes_given=num_train is not None or num_dev is not None,
            k_shot=k_shot,
            num_demonstrations=num_demonstrations,
            calibration=calibration,
            bad_rows=bad_rows,
            eval_batch_size=eval_batch_size,
        )
        self.bad_rows = bad_rows
        self.k_shot = k_shot
        self.num_demonstrations = at_least("num_demonstrations", num_demonstrations, 0)
        self.demonstration_seed = demonstration_seed
        if demonstration_seed is not None:
            seed_in_range("demonstration_seed", demonstration_seed)
        self.calibration = calibration
        self.data_dir = data_dir
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.eval_batch_size: int | Literal["auto"] = eval_batch_size
        self.num_train = at_least("num_train", self.task.num_train if num_train is None else num_train, 1)
        self.num_dev = at_least("num_dev", self.task.num_dev if num_dev is None else num_dev, 0)
        self.num_test = at_least("num_test", self.task.num_test if num_test is None else num_test, 0)
        self.data_seed = seed_in_range("data_seed", data_seed)
        self.max_length = at_least("max_length", max_length, 2)
        self.num_workers = at_least("num_workers", num_workers, 0)
        self._given_tokenizer = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._drawn: dict[SplitName, Drawn] = {}
        self._encoded: dict[SplitName, list[Encoded]] = {}
        self._limit: BatchLimit | None = None

    # Tokenizer

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take this tokenizer from now on."""
        if tokenizer is not self._tokenizer:
            self._tokenizer = tokenizer
            self._encoded.clear()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: the one given, or the module's.

        Raises:
            RuntimeError: If there is neither.
        """
        if self._tokenizer is None:
            if isinstance(self._given_tokenizer, str):
                self._tokenizer = load_tokenizer(self._given_tokenizer)
            elif self._given_tokenizer is not None:
                self._tokenizer = self._given_tokenizer
            else:
                module = getattr(self.trainer, "lightning_module", None)
                self._tokenizer = getattr(module, "tokenizer", None)
        if self._tokenizer is None:
            raise RuntimeError(
                "the data module has no tokenizer: give PromptDataModule(tokenizer=...), call set_tokenizer, or use a"
                " module with an attribute `tokenizer`"
            )
        return self._tokenizer

    # Examples

    def prepare_data(self) -> None:
        """Download what comes from the hub, in one process only."""
        source = self.task.source
        if self.data_dir is None and not any(self.files.values()) and source is not None and source.path is not None:
            for split in {source.train, source.dev or source.train, source.test}:
                load_split(self.task, split)

    def setup(self, stage: str | None = None) -> None:
        """Draw the examples that a stage needs, with prompts for the module's kind of model.

        Raises:
            ValueError: If there are none for it, or an argument does not go with them.
        """
        self._fit_to_model()
        if stage in (None, "fit", "validate"):
            self.examples("train")
        if stage in (None, "test", "predict"):
            self.examples("test")

    def _fit_to_model(self) -> None:
        """Take the task's prompts with a mask for a model that fills one in."""
        masked = getattr(getattr(self.trainer, "lightning_module", None), "is_masked", None)
        if masked is None:
            return
        if self.task.is_masked and not masked:
            raise ValueError(
                f"task {self.task.name!r} has a prompt with {MASK}, and the model is no masked language model"
            )
        if masked and not self.task.is_masked:
            self.task = masked_form(self.task)
            self._drawn.clear()
            self._encoded.clear()
            logger.info("a masked language model: prompts of %s are %r", self.task.name, self.task.prompt)
        if masked and (self.num_demonstrations or self.calibration != "none"):
            raise ValueError(
                "demonstrations and calibration are for models that go on with a text, not for masked language models"
            )

    def examples(self, split: SplitName) -> list[Example]:
        """The examples of a split: prompt, candidates and label as text, in the order they were drawn.

        Args:
            split: ``"train"``, ``"dev"`` or ``"test"``.
        """
        return self._draw(split).examples

    def origin(self, split: SplitName) -> str:
        """The file or data set that the examples of a split come from."""
        return self._draw(split).origin

    def _draw(self, split: SplitName) -> Drawn:
        if split not in ("train", "dev", "test"):
            raise ValueError(f"split must be one of train, dev, test, got {split!r}")
        if split not in self._drawn:
            draws = Draws(
                task=self.task,
                files=self.files,
                data_dir=self.data_dir,
                sizes={"train": self.num_train, "dev": self.num_dev, "test": self.num_test},
                seed=self.data_seed,
                k_shot=self.k_shot,
                bad_rows=self.bad_rows,
                num_demonstrations=self.num_demonstrations,
                demonstration_seed=self.demonstration_seed,
                shown_without_content=self.calibration == "icl_sfc",
            )
            predicting = self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
            self._drawn |= {"test": draws.test(predicting)} if split == "test" else draws.train_and_dev()
        return self._drawn[split]

    def encoded(self, split: SplitName) -> list[Encoded]:
        """The examples of a split as tokens, in the order of :meth:`examples`."""
        if split not in self._encoded:
            self._encoded[split] = encoded_examples(
                self.task,
                self.examples(split),
                self.origin(split),
                self.tokenizer,
                self.max_length,
                calibrated=self.calibration != "none" and split != "train",
            )
        return self._encoded[split]

    # Loaders

    def train_dataloader(self) -> "DataLoader[PromptBatch]":
        """Shuffled batches of training examples, this process's share of them.

        Raises:
            ValueError: If there are demonstrations, which are for `validate` and `test`.
        """
        if self.num_demonstrations:
            raise ValueError("num_demonstrations is for validate and test: in-context learning goes without training")
        collate = collate_of(self.task, self.tokenizer, self.objective, training=True)
        loader: DataLoader[PromptBatch] = train_loader(
            self.encoded("train"), collate, self.batch_size, self.data_seed, self.num_workers, *self._place()
        )
        return loader

    def val_dataloader(self) -> "DataLoader[PromptBatch] | list[Any]":
        """The dev examples, the longest first; nothing if ``num_dev`` is 0.

        For fewer of them lower ``num_dev``: the Trainer's ``limit_val_batches`` would score the longest alone.
        """
        return self._evaluation("dev")

    def test_dataloader(self) -> "DataLoader[PromptBatch] | list[Any]":
        """The test examples by length."""
        return self._evaluation("test")

    def predict_dataloader(self) -> "DataLoader[PromptBatch] | list[Any]":
        """The test examples by length; their labels may be unknown."""
        return self._evaluation("test")

    def _evaluation(self, split: SplitName) -> "DataLoader[PromptBatch] | list[Any]":
        encoded = self.encoded(split)
        if not encoded:
            return []
        collate = collate_of(self.task, self.tokenizer, self.objective)
        if self._limit is None:
            if self.eval_batch_size == "auto":
                self._limit = BatchLimit(tokens=found_budget(self.trainer, encoded, collate))
            else:
                self._limit = BatchLimit(rows=self.eval_batch_size)
        return evaluation_loader(encoded, collate, self._limit, self.num_workers, *self._place())

    # Resume

    def _batches(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "data_seed": self.data_seed,
            "num_train": len(self.examples("train")),
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "objective": self.objective,
        }

    def state_dict(self) -> dict[str, Any]:
        """What decides which batches come: saved in checkpoints and compared on a resume."""
        return self._batches() if "train" in self._drawn else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say in the log if the run that is resumed had other batches."""
        if not state_dict or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        other = {
            name: (state_dict.get(name), now) for name, now in self._batches().items() if state_dict.get(name) != now
        }
        if other:
            changes = ", ".join(f"{name} {then!r} -> {now!r}" for name, (then, now) in other.items())
            logger.warning(
                "the resumed run had other training batches (%s): it will not go on as it would have", changes
            )

    def _place(self) -> tuple[int, int]:
        """The number of processes and which of them this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
