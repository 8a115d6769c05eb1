"""Loaders: shuffled training batches that can be resumed; evaluation batches alike in length, filled up to a limit."""

import logging
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from smezo_pl.data.batch import PromptBatch
from smezo_pl.data.collate import Collate, group_examples
from smezo_pl.data.encoding import Encoded
from smezo_pl.data.packing import tree_size
from smezo_pl.data.splits import permutation

logger = logging.getLogger(__name__)

CPU_TOKENS = 1024
"""Tokens per forward on a CPU: the matrices are large enough to be efficient, and a layer's activations still fit in
the caches. Half or twice as many take about as long per token; memory is no concern."""

CPU_GENERATION_TOKENS = 16384
"""The same where answers are generated: all rows together read the weights once for every further token."""

_FIRST, _MOST = 2048, 1 << 18  # tokens per forward that are tried on a GPU


LOADER = "/dataloader_idx_{}"
"""What Lightning adds to the name of a metric where there are several dataloaders."""


def logged_name(name: str, metrics: Container[str]) -> str:
    """The name that a metric has among those logged: with several dataloaders, a name without one is the first's."""
    first = name + LOADER.format(0)
    return first if name not in metrics and first in metrics else name


@dataclass(frozen=True)
class BatchLimit:
    """How much a forward may read in evaluation."""

    rows: int | None = None  # most texts, where a prefix of another one does not count; None: no limit
    tokens: int | None = None  # most tokens, padding included; None: no limit


def fill(examples: Sequence[Encoded], limit: BatchLimit) -> list[list[int]]:
    """Indices of the examples of each batch, the batches with the longest rows first.

    Examples that share a row (`group_examples`) are in one batch, unless they exceed the limit. A single example that
    exceeds it is a batch of its own.
    """
    units: list[list[int]] = []
    for members in group_examples(examples, limit.tokens):
        units.append([])
        texts = 0
        for member in members:
            texts += examples[member].rows
            if units[-1] and limit.rows is not None and texts > limit.rows:
                units.append([])
                texts = examples[member].rows
            units[-1].append(member)
    lengths = [_row_length([examples[member] for member in unit]) for unit in units]

    batches: list[list[int]] = []
    rows = texts = width = 0
    # Longest first: too little memory shows at once, and the progress bar never underestimates the time left.
    for index in sorted(range(len(units)), key=lambda index: -lengths[index]):
        more = sum(examples[member].rows for member in units[index])
        full = (limit.rows is not None and texts + more > limit.rows) or (
            limit.tokens is not None and (rows + 1) * width > limit.tokens
        )
        if not batches or full:
            batches.append([])
            rows, texts, width = 0, 0, lengths[index]
        batches[-1] += units[index]
        rows, texts = rows + 1, texts + more
    return batches


def _row_length(members: list[Encoded]) -> int:
    if len(members) == 1:
        return members[0].tokens
    texts = [example.prompt + tokens[:-1] for example in members for tokens in example.candidates]
    return tree_size([*texts, *(example.prompt for example in members)])


# Both samplers are DistributedSamplers by name: that is how Lightning knows to leave them alone
# (`_requires_distributed_sampler`), whatever the Trainer's `use_distributed_sampler`.


class EpochSampler(DistributedSampler[Any]):
    """All examples once an epoch, in an order that is a pure function of the seed and the epoch.

    Process r of W takes the positions r, r + W, r + 2W, ... of that order, so W processes with batches of B together
    read, step by step, what one process with batches of W B reads. If the number of examples does not divide by W, the
    first ones of the epoch come again at its end, at most W - 1 of them, so that all processes take equally many steps.
    """

    def __init__(self, count: int, seed: int, world_size: int = 1, rank: int = 0) -> None:
        super().__init__(range(count), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self._earliest = (0, 0)
        self._start: tuple[int, int] | None = None
        again = self.total_size - count
        if again:
            logger.info(
                "%d training examples come twice an epoch, so that %d processes have as many", again, world_size
            )

    @property
    def start(self) -> tuple[int, int]:
        """Where the latest pass began, or the first one will: an epoch, and how many of its examples are skipped."""
        return self._start or max((self.epoch, 0), self._earliest)

    def resume(self, epoch: int, read: int) -> None:
        """Begin the next pass after ``read`` examples of an epoch; the end of an epoch is the start of the next."""
        self._earliest, self._start = (epoch, read) if read < len(self) else (epoch + 1, 0), None

    def __iter__(self) -> Iterator[int]:
        # A later epoch than that of the checkpoint: `limit_train_batches` ended it, or it was saved after its end.
        epoch, read = self._start = max((self.epoch, 0), self._earliest)
        if self._earliest != (0, 0):
            # Lightning 2.6 counts an epoch too few after two resumes that each began at an epoch's last batch.
            self._earliest = (epoch + 1, 0)
        order = permutation(len(self.dataset), self.seed, epoch)  # type: ignore[arg-type]
        own = range(self.rank, self.total_size, self.num_replicas)
        return iter([order[position % len(order)] for position in own[read:]])


class LengthSampler(DistributedSampler[Any]):
    """Batches of example indices, the longest rows first, filled up to a limit (`fill`).

    Each example is in one batch of one process; all processes have equally many batches.
    """

    def __init__(self, examples: Sequence[Encoded], limit: BatchLimit, world_size: int = 1, rank: int = 0) -> None:
        super().__init__(examples, num_replicas=world_size, rank=rank)  # type: ignore[arg-type]
        if len(examples) < world_size:
            raise ValueError(f"{len(examples)} examples cannot be shared out to {world_size} processes")
        batches = fill(examples, limit)
        self.batches = _even(batches, len(examples), world_size)[rank::world_size]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _even(batches: list[list[int]], examples: int, world_size: int) -> list[list[int]]:
    """The batches, some halved, or joined if too few can be, so that ``world_size`` divides their number.

    They stay sorted by length, so that the processes' batches of one turn are alike.
    """
    extra = len(batches) % world_size
    if not extra:
        return batches
    more = world_size - extra
    if len(batches) + more > examples:
        tail = batches[-2 * extra :]
        return batches[: -2 * extra] + [one + two for one, two in zip(tail[::2], tail[1::2], strict=True)]
    for _ in range(more):
        largest = max(range(len(batches)), key=lambda index: len(batches[index]))
        half = len(batches[largest]) // 2
        batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    return batches


class TrainLoader(DataLoader[Any]):
    """A loader over an `EpochSampler` whose position can be saved and restored, to the bit, with any number of workers.

    The order is a function of seed and epoch, so an epoch and a number of examples are the position. Lightning finds
    it by ``state_dict`` and ``load_state_dict``. With another sampler, such as the one that it puts in for
    ``overfit_batches``, nothing is saved.
    """

    _batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that workers begin with the first batch: Lightning asks for an iterator before it tells the
        # sampler the epoch.
        self._batches = 0
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch and how many examples of it were handed out; workers have fetched more than that."""
        if not isinstance(self.sampler, EpochSampler):
            return {}
        epoch, begun = self.sampler.start
        return {"epoch": epoch, "yielded": min(begun + self._batches * (self.batch_size or 1), len(self.sampler))}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        self._batches = 0
        if isinstance(self.sampler, EpochSampler) and state_dict:
            self.sampler.resume(state_dict["epoch"], state_dict["yielded"])


def train_loader(
    examples: Sequence[Encoded],
    collate: Collate,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    world_size: int = 1,
    rank: int = 0,
) -> DataLoader[PromptBatch]:
    """A shuffled loader that resumes in the middle of an epoch."""
    order = EpochSampler(len(examples), seed, world_size, rank)
    return TrainLoader(
        examples,  # type: ignore[arg-type]
        sampler=order,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=num_workers,
    )


class _Lists(Dataset[Any]):
    """Lists of examples by lists of indices, or by one index where Lightning puts in a sampler of its own."""

    def __init__(self, examples: Sequence[Encoded]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, indices: int | list[int]) -> list[Encoded]:
        return [self.examples[index] for index in (indices if isinstance(indices, list) else [indices])]


def evaluation_loader(
    examples: Sequence[Encoded],
    collate: Collate,
    limit: BatchLimit,
    num_workers: int = 0,
    world_size: int = 1,
    rank: int = 0,
) -> DataLoader[PromptBatch]:
    """A loader of batches of similar length. ``PromptBatch.index`` has their rows of the dataset."""
    return DataLoader(
        _Lists(examples),
        # The sampler gives whole batches, of different sizes.
        batch_size=None,
        sampler=LengthSampler(examples, limit, world_size, rank),
        collate_fn=collate,
        num_workers=num_workers,
    )


def find_token_budget(trainer: pl.Trainer | None, examples: Sequence[Encoded], collate: Collate) -> int:
    """The most tokens per forward for the Trainer's module, by trying it on these examples; the same on every process.

    Without a Trainer, whose module is on its device, it is the CPU's number.
    """
    module: Any = getattr(trainer, "lightning_module", None)
    on_cpu = CPU_GENERATION_TOKENS if collate.max_new_tokens else CPU_TOKENS
    if trainer is None or module is None:
        return token_budget(torch.device("cpu"), lambda tokens: tokens, on_cpu)

    def trial(tokens: int) -> int:
        batch = collate([examples[index] for index in fill(examples, BatchLimit(tokens=tokens))[0]]).to(module.device)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            module.evaluate_batch(batch)
        return batch.input_ids.numel()

    budget = token_budget(module.device, trial, on_cpu)
    if trainer.world_size == 1:
        return budget
    return int(trainer.strategy.all_gather(torch.tensor(budget, device=module.device)).min())


def token_budget(device: torch.device, trial: Callable[[int], int], on_cpu: int = CPU_TOKENS) -> int:
    """The most tokens per forward for a device; how it was chosen is logged.

    On a CPU it is a fixed number. Elsewhere forwards of twice as many tokens each are tried until memory runs out or
    the data does. ``trial`` runs the batch that needs most under a limit of so many tokens, and returns the tokens it
    held.
    """
    if device.type == "cpu":
        logger.info("eval_batch_size auto: %d tokens per forward, which suits a CPU's caches", on_cpu)
        return on_cpu
    fits, asked = 0, _FIRST
    while asked <= _MOST:
        try:
            held = trial(asked)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # does nothing where CUDA is not used
            if not fits:
                raise
            logger.info("eval_batch_size auto: %d tokens per forward; %d did not fit on %s", fits, asked, device)
            return fits
        fits = asked
        if held <= asked // 2:  # all the data was in it
            break
        asked *= 2
    torch.cuda.empty_cache()
    logger.info("eval_batch_size auto: %d tokens per forward on %s, all that was tried fits", fits, device)
    return fits
