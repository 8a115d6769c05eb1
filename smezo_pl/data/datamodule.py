"""The LightningDataModule: a task's examples as batches of prompts, for every stage of the Trainer."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from smezo_pl.data.batch import PromptBatch
from smezo_pl.data.collate import Collate
from smezo_pl.data.digests import differences, example_digests
from smezo_pl.data.encoding import Encoded, Encoder, MaskedLMEncoder, encode_each
from smezo_pl.data.loaders import BatchLimit, evaluation_loader, find_token_budget, train_loader
from smezo_pl.data.sources import load_split
from smezo_pl.data.splits import Split, SplitName, Splits, at_least
from smezo_pl.data.tokens import padding_id, refuse_special_tokens, stop_tokens
from smezo_pl.models import load_tokenizer
from smezo_pl.tasks import Example, GeneratedAnswer, Loss, Task, get_task, make_task, masked_form
from smezo_pl.tasks.metrics import get_metric
from smezo_pl.tasks.objectives import check_objective
from smezo_pl.tasks.task import LOSSES, MASK

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
            the answer of a generation task), and optionally ``label`` (its column), ``label_is`` (``position``,
            ``text`` or ``name``), ``metric``, ``objective``, ``name``, ``words``, ``may_be_empty``, ``group``,
            ``calibration``, ``max_new_tokens``, ``stop``.
        data_dir: Local folder with ``{task}/{split}*.parquet`` in the hub's columns. Without it the dataset is loaded
            from the Hugging Face hub.
        train_file: Your own training examples: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file in
            UTF-8 (a TSV's quotes are text), or a dataset on the hub, ``owner/name`` or ``owner/name@config:split``.
        dev_file: Your own dev examples; drawn from ``train_file`` if not given.
        test_file: Your own test examples, for ``test`` and ``predict``. The latter needs no labels, and writes a line
            for every row in the order of the file; for a row that cannot be scored the line says why.
        tokenizer: Name, folder or GGUF file of the tokenizer, or the tokenizer itself. Without it the module's own
            ``tokenizer`` is taken.
        batch_size: Training examples per step and process, at least 1.
        eval_batch_size: How much a forward reads in evaluation. ``auto``: as many tokens as are fast on a CPU; on a
            GPU as many as fit, found once by trying; the number is logged. A number, at least 1: that many
            texts (one per example if its candidates have one token, otherwise about one per candidate).
        num_train: Training examples; the task's own number (1000 for most) if not given.
        num_dev: Dev examples; the task's own number (500 for most) if not given.
        num_test: Test examples at most. If not given: all rows for ``predict`` and of ``test_file``, otherwise the
            task's own number (1000).
        k_shot: Training examples of each class, instead of ``num_train``, and the same number for dev.
        num_demonstrations: Few-shot demonstrations, taken from the training split, before each dev and test example:
            in-context learning, for ``validate`` and ``test`` (MeZO: 32). They are cut on the left where they do not
            fit in ``max_length``.
        demonstration_seed: Decides the one set of demonstrations for all examples, in [0, 2^32); without it each
            example gets a set of its own.
        data_seed: Decides which examples are drawn and in which order they come, in [0, 2^32).
        max_length: Maximum number of tokens of a prompt and a candidate together, at least 2. What is longer loses
            the beginning of its prompt; a beginning-of-sequence token stays. A model or tokenizer for shorter texts
            lowers it, which is logged.
        special_tokens: Whether names of special tokens in prompts and columns, such as ``</s>`` or ``<|im_end|>``, are
            read as these tokens; otherwise they are text like any other.
        objective: What a step minimizes, instead of the task's own loss: ``classification`` (cross-entropy over the
            candidates), ``lm`` (of the gold answer's tokens), or one minus a metric of the batch's answers, such as
            ``accuracy``, ``f1`` or ``em``. Nothing needs to be differentiable. The dev loss stays a loss.
        reward: Import path of a function that a step maximizes instead: ``mymodule.score`` is called as
            ``score(predictions, references)`` with a list of answers as texts and, for each, the list of correct ones,
            and returns one number or one per answer, whose mean counts. If it raises or returns NaN, the step is
            skipped.
        max_new_tokens: Maximum number of tokens of a generated answer; the task's own number (50) if not given.
        calibration: How candidates are chosen in evaluation: ``none``, by mean log-probability; ``sfc``, by the
            log-probability gained over a content-free prompt (surface form competition, as in MeZO); ``icl_sfc``:
            the same with the demonstrations before that prompt too.
        bad_rows: What happens to a row that lacks a text or has a label outside the task: ``refuse`` ends with an error
            that names its line; ``skip`` leaves it out and logs how many. ``predict`` never leaves one out.
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
        special_tokens: bool = False,
    ) -> None:
        super().__init__()
        files: dict[SplitName, str | None] = {"train": train_file, "dev": dev_file, "test": test_file}
        if isinstance(task, str):
            task = get_task(task)
        elif not isinstance(task, Task):
            file = train_file or dev_file or test_file
            task = make_task(task, name=Path(file).stem if file else "own")
        if max_new_tokens is not None:
            if not isinstance(task.candidates, GeneratedAnswer):
                raise ValueError(f"max_new_tokens is for generation tasks, and task {task.name!r} has candidates")
            task = replace(task, candidates=replace(task.candidates, max_new_tokens=max_new_tokens))
        for name in task.metrics:
            get_metric(name, task)
        self.task = self._given_task = task
        if objective is not None and reward is not None:
            raise ValueError(f"objective {objective!r} and reward {reward!r}: give one of them")
        if reward is not None and "." not in reward:
            raise ValueError(f"reward must be the import path of a function, module.function, got {reward!r}")
        self.objective = objective or reward or task.objective
        check_objective(self.objective, task)
        self.splits = Splits(
            task,
            files,
            data_dir,
            num_train,
            num_dev,
            num_test,
            data_seed,
            k_shot,
            bad_rows,
            num_demonstrations,
            demonstration_seed,
            demonstrate_calibration=calibration == "icl_sfc",
        )
        self.num_train, self.num_dev, self.num_test = self.splits.sizes.values()
        self.num_demonstrations = num_demonstrations
        self.data_seed = data_seed
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.max_length = at_least("max_length", max_length, 2)
        self.max_positions: int | None = None  # of a model that no Trainer runs
        self.num_workers = at_least("num_workers", num_workers, 0)
        if not isinstance(eval_batch_size, str):
            at_least("eval_batch_size", eval_batch_size, 1)
        elif eval_batch_size != "auto":
            raise ValueError(f"eval_batch_size must be 'auto' or a number of at least 1, got {eval_batch_size!r}")
        self.eval_batch_size: int | Literal["auto"] = eval_batch_size
        if calibration not in ("none", "sfc", "icl_sfc"):
            raise ValueError(f"calibration must be 'none', 'sfc' or 'icl_sfc', got {calibration!r}")
        if calibration == "icl_sfc" and not num_demonstrations:
            raise ValueError("calibration 'icl_sfc' is for demonstrations: give num_demonstrations, or take 'sfc'")
        if calibration != "none" and task.calibration is None:
            raise ValueError(f"task {task.name!r} has no content-free prompt, so it cannot be calibrated")
        self.calibration = calibration
        self.special_tokens = special_tokens
        self._tokenizer = tokenizer
        # With what each was made of, so that another model, or another prompt, makes it again.
        self._encoded: dict[SplitName, tuple[tuple[Any, ...], list[Encoded], dict[int, str]]] = {}
        self._limit: tuple[tuple[Any, ...], BatchLimit] | None = None
        self._digested: tuple[list[Encoded], dict[str, Any]] | None = None

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take this tokenizer from now on, whatever the module's."""
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: the one given, or that of the module that the Trainer runs."""
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        tokenizer = self._tokenizer
        if tokenizer is None:
            tokenizer = getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
        if tokenizer is None:
            raise RuntimeError(
                "the data module has no tokenizer: give PromptDataModule(tokenizer=...), call set_tokenizer, or use"
                " a module with an attribute `tokenizer`"
            )
        return tokenizer

    def prepare_data(self) -> None:
        """Download what comes from the hub, in one process only."""
        source, splits = self.task.source, self.splits
        if source and source.path and splits.data_dir is None and not any(splits.files.values()):
            for split in {source.train, source.dev or source.train, source.test}:
                load_split(self.task, split)

    def setup(self, stage: str | None = None) -> None:
        """Draw the examples that a stage needs, with prompts for the module's kind of model."""
        masked = getattr(getattr(self.trainer, "lightning_module", None), "is_masked_lm", None)
        task = self._given_task
        if masked is not None and not masked and task.is_masked:
            raise ValueError(f"task {task.name!r} has a prompt with {MASK}, and the model is no masked language model")
        if masked and not task.is_masked:
            task = masked_form(task)
        if task != self.task:  # of the model before this one, if it was of the other kind
            self.task = self.splits.task = task
            self.splits.drawn.clear()
            self.splits.readings.clear()
            if masked:
                logger.info("a masked language model: prompts of %s are %r", task.name, task.prompt)
        if masked and (self.num_demonstrations or self.calibration != "none"):
            raise ValueError("demonstrations and calibration are for causal, not for masked language models")
        if stage in (None, "fit", "validate"):
            self.examples("train")
        if stage in (None, "test", "predict"):
            self.examples("test")

    def examples(self, split: SplitName) -> list[Example]:
        """The examples of ``"train"``, ``"dev"`` or ``"test"`` as text, in the order they were drawn.

        In ``predict``, ``"test"`` is all rows of its file in their order, without those that are `failed`.
        """
        return self._split(split).examples

    def failed(self, split: SplitName) -> dict[int, str]:
        """Why rows to predict are no examples, or cannot be encoded, by their index in the file."""
        return {**self._split(split).failed, **(self._encoded[split][2] if split in self._encoded else {})}

    def origin(self, split: SplitName) -> str:
        """The file or dataset that the examples of a split come from."""
        return self._split(split).origin

    def labels(self, split: SplitName) -> str:
        """Which label of a split's file is which candidate; empty where labels are the task's own names."""
        return self._split(split).labels

    @property
    def _predicting(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    def _split(self, split: SplitName) -> Split:
        return self.splits.get(split, self._predicting)

    def encoded(self, split: SplitName) -> list[Encoded]:
        """The examples of a split as tokens, in the order of `examples`."""
        tokenizer, examples = self.tokenizer, self.examples(split)
        module = getattr(self.trainer, "lightning_module", None)
        positions = getattr(module, "max_positions", self.max_positions)
        key, encoded, failed = self._encoded.get(split, ((), [], {}))
        if len(key) != 3 or key[0] is not tokenizer or key[1] is not examples or key[2] != positions:
            if not self.special_tokens:
                refuse_special_tokens(self.task, tokenizer)
            encoder: Encoder | MaskedLMEncoder
            if self.task.is_masked:
                encoder = MaskedLMEncoder(tokenizer, self.max_length, self.special_tokens, positions)
            else:
                new_tokens = getattr(self.task.candidates, "max_new_tokens", 0)
                calibrated = self.calibration != "none" and split != "train"
                encoder = Encoder(tokenizer, self.max_length, new_tokens, calibrated, self.special_tokens, positions)
            encode, failed = partial(encoder.encode, origin=self.origin(split)), {}
            if self._predicting and split == "test":
                encoded = encode_each(encode, examples, failed)
            else:
                encoded = encode(examples)
                self._check_repeats(encoded, self.origin(split))
            self._encoded[split] = (tokenizer, examples, positions), encoded, failed
        return encoded

    @property
    def _loss(self) -> Loss:
        return next((name for name in LOSSES if name == self.objective), self.task.objective)

    def _check_repeats(self, encoded: Sequence[Encoded], origin: str) -> None:
        """Refuse options that repeat where the loss would be a choice between them."""
        for example in encoded if self._loss == "classification" else ():
            if len(set(example.candidates)) < len(example.candidates):
                where = example.example.where if example.example else f"row {example.index}"
                raise ValueError(
                    f"{origin}, {where}: two options have the same text, and objective 'classification' would train on"
                    " one against the other; objective: lm trains on the text of the gold one"
                )

    def collate(self, training: bool = False) -> Collate:
        """What makes batches of encoded examples, for training steps or for evaluation."""
        is_loss, loss = self.objective in LOSSES, self._loss
        collate = Collate(
            padding_id(self.tokenizer),
            loss,
            gold_only=training and loss == "lm" and (is_loss or self.task.is_generation),
            metrics=self.task.metrics,
            num_labels=len(self.task.labels) if isinstance(self.task.candidates, Mapping) else 0,
            reward=self.objective if training and not is_loss else None,
        )
        answer = self.task.candidates
        if not isinstance(answer, GeneratedAnswer) or (training and is_loss):
            return collate
        stop_ids = stop_tokens(self.tokenizer, answer.stop)
        return replace(collate, max_new_tokens=answer.max_new_tokens, stop_ids=stop_ids, stop=answer.stop)

    def train_dataloader(self) -> "DataLoader[PromptBatch]":
        """Shuffled batches of training examples, this process's share of them."""
        if self.num_demonstrations:
            raise ValueError("num_demonstrations is for validate and test: in-context learning goes without training")
        examples, collate = self.encoded("train"), self.collate(training=True)
        return train_loader(examples, collate, self.batch_size, self.data_seed, self.num_workers, *self._processes())

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
        collate = self.collate()
        limit = self._batch_limit(encoded, collate)
        return evaluation_loader(encoded, collate, limit, self.num_workers, *self._processes())

    def _batch_limit(self, encoded: list[Encoded], collate: Collate) -> BatchLimit:
        """What a forward of the present model reads at most on its device."""
        if self.eval_batch_size != "auto":
            return BatchLimit(rows=self.eval_batch_size)
        module: Any = getattr(self.trainer, "lightning_module", None)
        reader = (module, getattr(module, "device", None), getattr(self.trainer, "precision", None))
        if self._limit is None or self._limit[0] != reader:
            self._limit = reader, BatchLimit(tokens=find_token_budget(self.trainer, encoded, collate))
        return self._limit[1]

    def _processes(self) -> tuple[int, int]:
        """The number of processes and the rank of this one."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def state_dict(self) -> dict[str, Any]:
        """What decides the training batches: saved in checkpoints and compared on a resume."""
        if "train" not in self.splits.drawn:
            return {}
        return {
            "task": self.task.name,
            "data_seed": self.data_seed,
            "num_train": len(self.examples("train")),
            "batch_size": self.batch_size,
            "processes": self._processes()[0],
            "max_length": self.max_length,
            "objective": self.objective,
            **self._digests(),
        }

    def _digests(self) -> dict[str, Any]:
        split, encoded = self._split("train"), self.encoded("train")
        if self._digested is None or self._digested[0] is not encoded:  # for every checkpoint the same
            made = example_digests(self.task, split.examples, encoded, self.tokenizer)
            self._digested = encoded, {**made, "columns": dict(split.columns)}
        return self._digested[1]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Log if the run that is resumed had other batches."""
        if not state_dict or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if changes := differences(state_dict, self.state_dict()):
            logger.warning(
                "the resumed run had other training batches (%s): it will not continue as it would have",
                ", ".join(changes),
            )
