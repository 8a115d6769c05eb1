"""The LightningModule: builds network and optimizer, defines the closure, logs and scores."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, ReduceLROnPlateau
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from smezo_pl import methods
from smezo_pl.data import PromptBatch, PromptDataModule
from smezo_pl.data.batch import batch_size, batch_weight, split_batch
from smezo_pl.data.loaders import LOADER, logged_name
from smezo_pl.methods import FirstOrder, FirstOrderBaseline, MethodName
from smezo_pl.models import (
    adapter_kinds,
    add_adapter,
    kind_of,
    load_network,
    load_tokenizer,
    position_limit,
    precision_of,
)
from smezo_pl.optim import SparseMeZO
from smezo_pl.optim.step import NON_FINITE_ADVICE, NonFiniteLossError
from smezo_pl.saving import check_output, save_network
from smezo_pl.scoring import evaluation
from smezo_pl.scoring.linear_probe import LinearProbe
from smezo_pl.scoring.row_losses import row_losses
from smezo_pl.strategies import check_dtype, check_trainer, silence_expected_warnings
from smezo_pl.tasks.objectives import reward_loss
from smezo_pl.trajectory import resume
from smezo_pl.trajectory.settings import as_given
from smezo_pl.trajectory.writes import remember

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Pretrained: TypeAlias = str | nn.Module
else:
    # The command line knows names and paths; with nn.Module in the union, --help would list every module of torch.
    Pretrained = str


class SparseMeZOModule(LightningModule):
    """Fine-tunes a language model, causal or masked, with Sparse MeZO: two forwards per step, no backward.

    ``method`` chooses another method instead, for comparison on the same data with the same scoring. The network is in
    ``eval()`` mode throughout. Logged: ``train/loss`` at every step (zeroth-order: the mean of both sides),
    ``val/loss``, ``val/accuracy``, ``test/loss`` and ``test/accuracy`` over the whole split (of several dataloaders
    ``val/loss/dataloader_idx_0`` and so on); ``ModelCheckpoint`` and ``EarlyStopping`` can monitor these. For another
    kind of model subclass and override `loss`, or `losses`, which a direction per row needs; for other metrics override
    `evaluate_batch`.

    Args:
        pretrained: Name on the Hugging Face hub, local folder, GGUF file, or (from Python) a ready ``nn.Module``.
        optimizer: The optimizer and its settings; given the network's named parameters.
        lr_scheduler: A scheduler of torch, stepped once per step; one that waits for a metric is stepped after
            validation.
        perturbation: ``layerwise`` perturbs each layer inside its own forward and never writes the weights;
            ``in_place`` perturbs the whole model and restores it from a copy of the active weights.
        micro_batch_size: Examples in one forward; a batch is run in parts of that size and weighted by example. None:
            the whole batch at once.
        adapter: PEFT adapter, which alone is trained, for instance
            ``{peft_type: LORA, r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}``.
        revision: Branch, tag or commit of ``pretrained`` on the hub.
        method: ``s-mezo``, ``mezo`` and ``r-mezo`` give ``optimizer`` their mask; ``full``, ``lora``, ``prefix`` and
            ``linear-probe`` are first-order baselines, trained with AdamW instead; ``zero-shot`` trains nothing. None:
            as configured in ``optimizer``.
        first_order: AdamW's settings, for the first-order baselines.
        save_pretrained: Folder that the trained model and its tokenizer are written to, in Hugging Face's format, when
            ``fit`` ends: a new or an empty one, or one with an earlier output, which is replaced.

    Raises:
        ValueError: If an argument is out of range.
    """

    model: nn.Module
    """The network: there from ``fit``, ``validate``, ``test`` and ``predict``, or after `configure_model`."""

    def __init__(
        self,
        pretrained: Pretrained,
        optimizer: Callable[[Iterable[Any]], SparseMeZO] = SparseMeZO,
        lr_scheduler: LRSchedulerCallable | None = None,
        perturbation: Literal["layerwise", "in_place"] = "layerwise",
        micro_batch_size: int | None = None,
        adapter: dict[str, Any] | None = None,
        revision: str | None = None,
        save_pretrained: str | None = None,
        method: MethodName | None = None,
        first_order: FirstOrder = FirstOrder(),  # noqa: B008 (it is frozen)
    ) -> None:
        super().__init__()
        if perturbation not in ("layerwise", "in_place"):
            raise ValueError(f"perturbation must be 'layerwise' or 'in_place', got {perturbation!r}")
        if method is not None and method not in methods.METHODS:
            raise ValueError(f"method must be one of {', '.join(methods.METHODS)}, got {method!r}")
        if micro_batch_size is not None and not micro_batch_size >= 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        ready = isinstance(pretrained, nn.Module)
        if save_pretrained is not None and ready and not hasattr(pretrained, "save_pretrained"):
            raise ValueError(f"save_pretrained needs a transformers model, got {type(pretrained).__name__}")
        if save_pretrained is not None and method == "linear-probe":
            raise ValueError(
                "save_pretrained: method 'linear-probe' leaves the model as it was; checkpoints hold its layer"
            )
        # Callables and networks in a checkpoint's hyperparameters could not be read back with weights_only=True.
        self.save_hyperparameters(
            ignore=["optimizer", "lr_scheduler", "first_order", *(["pretrained"] if ready else [])]
        )
        self.automatic_optimization = False
        self.pretrained: str | None = None if ready else str(pretrained)
        self.revision, self.perturbation, self.micro_batch_size = revision, perturbation, micro_batch_size
        self.build_optimizer, self.build_scheduler = optimizer, lr_scheduler
        self.method, self.adapter, self.adapter_seed = method, methods.adapter_of(method, adapter), first_order.seed
        order = 0 if method is None else methods.METHODS[method].order
        self.zeroth_order = order == 0
        self.first_order = first_order
        self.baseline = FirstOrderBaseline(str(method), first_order) if order == 1 else None
        self.save_folder = save_pretrained
        self._loaded_in: torch.dtype | None = None
        self._means: dict[int, evaluation.WeightedMeans] = defaultdict(evaluation.WeightedMeans)  # by dataloader
        self._results: list[dict[str, Any]] = []  # what the Trainer keeps of each dataloader of an evaluation
        if isinstance(pretrained, nn.Module):
            self.model = self._adapted(pretrained)
            remember(self.model)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """The tokenizer of ``pretrained``, loaded when first asked for; None for a ready network, until it is set."""
        return None if self.pretrained is None else load_tokenizer(self.pretrained, revision=self.revision)

    @property
    def is_masked_lm(self) -> bool:
        """Whether the network is a masked language model; known before it is loaded."""
        if self.pretrained is not None:
            return kind_of(self.pretrained, revision=self.revision) == "masked"
        return kind_of(self.model.network if isinstance(self.model, LinearProbe) else self.model) == "masked"

    @property
    def max_positions(self) -> int | None:
        """The most tokens that the network has positions for; known before it is loaded."""
        network = self._modules.get("model")
        if isinstance(network, LinearProbe):
            network = network.network
        virtual = 0 if self.adapter is None else self.adapter.get("num_virtual_tokens", 0)
        named = self.pretrained if network is None else network
        return None if named is None else position_limit(named, virtual, revision=self.revision)

    def text_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that generated text is decoded with: the data module's, else the module's."""
        data = getattr(self._trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None) or self.tokenizer
        if tokenizer is None:
            raise RuntimeError("generated answers need a tokenizer to be read: set module.tokenizer")
        return tokenizer

    def configure_callbacks(self) -> list[Callback]:
        """No callbacks; the Trainer's settings are checked here, before anything is loaded."""
        check_trainer(self.trainer)
        silence_expected_warnings(isinstance(getattr(self.trainer, "datamodule", None), PromptDataModule))
        return []

    def configure_model(self) -> None:
        """Load the network, once, in the dtype that is the default: that of the Trainer's ``*-true`` precision."""
        if "model" not in self._modules and (network := self.starting_network()) is not None:
            self.model, self._loaded_in = network, torch.get_default_dtype()
            remember(network)

    def starting_network(self) -> nn.Module | None:
        """The network as it was before any training, loaded again; None for a ready one."""
        return None if self.pretrained is None else self._adapted(load_network(self.pretrained, revision=self.revision))

    def _adapted(self, network: nn.Module) -> nn.Module:
        if kinds := adapter_kinds(network):
            methods.check_adapter(self.method, self.hparams["adapter"], kinds)
        elif self.adapter is not None:
            network = add_adapter(network, self.adapter, seed=self.adapter_seed)
        return (LinearProbe(network) if self.method == "linear-probe" else network).eval()

    def to(self, *args: Any, **kwargs: Any) -> "SparseMeZOModule":
        """Move to a device; a loaded network keeps the dtypes it was loaded with.

        Lightning's ``*-true`` precisions cast everything, also the rotary frequencies, norms and adapters that
        transformers and PEFT keep in float32 on purpose.
        """
        if self.pretrained is None:
            return super().to(*args, **kwargs)
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        return self if device is None else super().to(device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward."""
        return self.model(*args, **kwargs)

    def configure_optimizers(self) -> Any:
        """The method's optimizer on the network, and the scheduler; None for zero-shot."""
        if self.baseline is not None:  # without the numbers of a run before, and the settings of one that was resumed
            self.baseline = FirstOrderBaseline(str(self.method), self.first_order)
        optimizer: Any = methods.optimizer_of(self)
        if optimizer is None:
            return None
        own = type(self)
        if (
            methods.is_per_row(optimizer)
            and own.loss != SparseMeZOModule.loss
            and own.losses == SparseMeZOModule.losses
        ):
            raise ValueError(
                f"{own.__name__} overrides loss, one number for a batch, and directions='per_row' needs one for each "
                "row of a forward: override losses too, or set directions='shared'"
            )
        name, training = ("sparse_mezo", optimizer) if self.baseline is None else ("adamw", self.baseline)
        resumed = None if self._trainer is None else resume.settle(self._trainer, training, optimizer)
        self.save_hyperparameters({name: as_given(training)})
        scheduler = methods.scheduler_of(self, optimizer)
        if resumed is not None:
            resumed.settle_schedule(optimizer, scheduler)
            resumed.log()
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    def on_fit_start(self) -> None:
        """Log what is trained, in which precision, and whether the run can be replayed."""
        if self.trainer.global_step and self.trainer.ckpt_path is None:
            raise MisconfigurationException(
                f"this Trainer has made {self.trainer.global_step} steps and counts on from there: make another "
                "Trainer for a run that begins with the present weights, or pass ckpt_path to resume the one before"
            )
        perturbation = self.perturbation if self.zeroth_order else "none"
        precision = precision_of(self.trainer.precision, self.model)
        logger.info("precision %s, perturbation %s, device %s", precision, perturbation, self.device)
        if self.method is not None:
            methods.log_method(self)
        if self.pretrained is None and self.zeroth_order:
            logger.warning(
                "no file holds the starting weights of this network: the run can be replayed only if they are saved, "
                "for instance by torch.save(module.model.state_dict(), 'start.pt') before fit"
            )

    def on_train_start(self) -> None:
        """Restore the weights of a checkpoint that holds none, and turn dropout off."""
        resume.restore(self.trainer)
        self.model.eval()
        self.trainer.should_stop |= self.method == "zero-shot"
        self._is_first_step = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of the optimizer on one batch."""
        parts = split_batch(batch, self.micro_batch_size)  # here, as it waits for a GPU, and the closure runs twice
        if self.baseline is not None:
            loss = self.baseline.step(self, parts)
        else:
            loss = self.optimizers().step(closure=lambda: self.batch_loss(parts))  # type: ignore[union-attr]
            if self._is_first_step:
                methods.log_directions(self.trainer.optimizers[0])
        self._is_first_step = False
        self.log("train/loss", loss, prog_bar=True, batch_size=batch_size(batch))
        scheduler = self.lr_schedulers()
        if scheduler is not None and not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step()  # type: ignore[union-attr]

    def loss(self, batch: Any) -> Tensor:
        """Mean loss over the examples of a batch or a part of it, one element; override it for another kind of model.

        It need not be differentiable.
        """
        if type(self).losses is not SparseMeZOModule.losses:
            return self.losses(batch).mean()
        total, weight = evaluation.loss_of(evaluation.scores_of(self.model, batch), batch)
        return total / weight

    def losses(self, batch: Any) -> Tensor:
        """The loss of each row of the forward over a batch or a part of it, ``[R]``, whose mean is `loss`.

        What a step with a direction per row sees; override it, and perhaps it alone, for another kind of model.
        Examples that share a row share its number.
        """
        losses, weight = evaluation.example_losses(evaluation.scores_of(self.model, batch), batch)
        sums: Tensor = batch.row_sums(losses) * (batch.num_rows / weight)
        return sums

    def batch_loss(self, parts: list[Any]) -> Tensor:
        """The closure: `loss` over the parts of a batch and over all processes, weighted by example (``lm``: by token).

        Float32, the same bits on every process: a scalar, or with a direction per row the loss of each row of the
        global batch, whose mean it is.
        """
        if any(methods.is_per_row(optimizer) for optimizer in self.trainer.optimizers):
            return row_losses(self, parts)
        weights = [batch_weight(part) for part in parts]
        weight = float(sum(weights))
        if isinstance(parts[0], PromptBatch) and parts[0].reward is not None:
            # Of all parts together, as an F1 of the whole is no mean of the parts' F1.
            answers = [
                answer for part in parts for answer in evaluation.answers_of(self.model, part, self.text_tokenizer)
            ]
            loss = reward_loss(parts[0].reward, answers, parts[0].num_labels)
            total = torch.tensor(loss, dtype=torch.float32, device=self.device) * weight
        else:
            losses = [self.loss(part).float().reshape(()) * w for part, w in zip(parts, weights, strict=True)]
            total = torch.stack(losses).sum()
        if self.trainer.world_size == 1:
            return total / weight
        # Gathered and added in the order of ranks, where a reduction might add in another order on each process.
        both = torch.stack([total, total.new_tensor(weight)])
        total, overall = self.trainer.strategy.all_gather(both).sum(0).unbind()
        return total / overall

    def evaluate_batch(self, batch: Any) -> evaluation.Sums:
        """Sums and weights of a batch's metrics by name; ``val/<name>`` is the sum of sums over the sum of weights.

        For metrics that are no means, the batch's answers (`smezo_pl.scoring.evaluation.Collected`).
        """
        if not isinstance(batch, PromptBatch):
            weight = batch_weight(batch)
            return {"loss": (self.loss(batch).float() * weight, weight)}
        return evaluation.batch_sums(self.model, batch, self.text_tokenizer)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of its dataloader."""
        self._means[dataloader_idx].update(self.evaluate_batch(batch), self.device)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``, and step a scheduler that waits for it.

        Raises:
            NonFiniteLossError: In ``fit``, if the scores of all examples are infinite or NaN.
        """
        values = self._log_means("val")
        if self.trainer.state.fn == TrainerFn.FITTING and values and not any(m.scored for m in self._means.values()):
            steps, advice = self.trainer.global_step, NON_FINITE_ADVICE
            if not steps:
                advice = "They are those of the starting weights: try bfloat16 or float32, or another model"
            raise NonFiniteLossError(
                f"the scores of all validation examples are infinite or NaN after {steps} steps. {advice}"
            )
        in_fit = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        scheduler = self.lr_schedulers() if in_fit else None
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            monitor = scheduler.monitor if isinstance(scheduler, ReduceLROnPlateau) else "val/loss"
            scheduler.step(values[logged_name(monitor, values)])

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._log_means("test")

    def on_validation_end(self) -> None:
        """Leave to each dataloader's results, which the Trainer prints, its own metrics alone."""
        for index, results in enumerate(self._results if len(self._results) > 1 else ()):
            for name in [n for n in results if LOADER.format("") in n and not n.endswith(LOADER.format(index))]:
                del results[name]

    on_test_end = on_validation_end

    def _log_means(self, stage: str) -> dict[str, Tensor]:
        loop = self.trainer.test_loop if stage == "test" else self.trainer.validate_loop
        self._results = list(loop._logged_outputs)
        several = len(getattr(self.trainer, f"num_{stage}_batches")) > 1
        values: dict[str, Tensor] = {}
        for index, means in sorted(self._means.items()):
            suffix = LOADER.format(index) if several else ""
            values |= {f"{stage}/{name}{suffix}": value.float() for name, value in means.compute().items()}
            if means.scored < 1:
                share = f"the scores of {1 - means.scored:.3%} of the examples are infinite or NaN, so metrics are NaN"
                logger.warning("%s%s: %s; `smezo predict` names the examples", stage, suffix, share)
        self.log_dict(values, prog_bar=True, add_dataloader_idx=False)
        return values

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """The prediction for each example: its index in the dataset, the answer, and the gold one."""
        return evaluation.prediction_rows(self.model, batch, self.text_tokenizer)

    def setup(self, stage: str) -> None:
        """Let the Trainer read checkpoints without weights, and refuse what would spoil files or the precision."""
        resume.install(self.trainer)
        if stage == "fit" and self.save_folder is not None:
            check_output(self.save_folder, self.trainer, self.pretrained)
        if self._loaded_in is not None:
            check_dtype(self.trainer, self._loaded_in)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights into the network, which is built first if needed (as after a run in subprocesses)."""
        self.configure_model()
        if kwargs.get("strict", True):
            methods.check_state(self, args[0])
            kwargs["strict"] = self.baseline is None  # frozen weights are not in it
        return super().load_state_dict(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep frozen weights, which ``pretrained`` holds, out of the checkpoints of a first-order baseline."""
        # With averaged weights Lightning puts two whole models in a checkpoint, and reads them as whole ones.
        if self.baseline is not None and "state_dict" in checkpoint and "averaging_state" not in checkpoint:
            checkpoint["state_dict"] = methods.trained_only(self, checkpoint["state_dict"])
            if sample := methods.frozen_sample(self):
                checkpoint["frozen"] = sample

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse no weights, another frozen network, and on a resume another method, adapter or precision."""
        resume.refuse_unrestored(self, checkpoint)
        resumes = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if resumes:
            methods.check_resumed(self, checkpoint.get("hyper_parameters", {}))
        methods.check_network(self, checkpoint.get("hyper_parameters", {}))
        if self.baseline is not None and "frozen" in checkpoint:
            self.configure_model()
            methods.check_frozen(self, checkpoint["frozen"])
        if resumes:
            self.configure_model()
            methods.check_dtypes(self, checkpoint)

    def on_validation_start(self) -> None:
        """Restore the weights of a checkpoint that holds none, and drop what an interrupted evaluation left."""
        resume.restore(self.trainer)
        self._means.clear()

    on_test_start = on_predict_start = on_validation_start

    def on_fit_end(self) -> None:
        """Write the trained model as a Hugging Face folder."""
        resume.restore(self.trainer)  # a run that had ended already trains no step
        trainer: Any = self.trainer
        if self.save_folder is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            check_output(self.save_folder, trainer, self.pretrained)  # another run may have written there
            save_network(self.model, self.tokenizer, self.save_folder)
            logger.info("the trained model is in %s", self.save_folder)

    def teardown(self, stage: str) -> None:
        """Leave no hook on the network."""
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, SparseMeZO):
                optimizer.detach()
