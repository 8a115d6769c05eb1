"""The LightningModule: what a step does with a batch, what the Trainer may be asked for, what is logged and saved."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from smezo_pl import PromptDataModule, RunMetrics, SeedCheckpoint, SparseMeZO, SparseMeZOModule, saving
from smezo_pl.callbacks import ScoreWriter
from smezo_pl.data.batch import split_batch
from smezo_pl.models import load_network
from smezo_pl.strategies import check_precision

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "max_epochs": -1,
}
fast = partial(SparseMeZO, lr=1e-3, sparsity=0.5, kernel="torch")


class Regression(SparseMeZOModule):
    """Another kind of model: one method."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y)


def regression_data(count: int = 32, batch_size: int = 8) -> DataLoader[Any]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]])), batch_size)


def demo(**changes: Any) -> PromptDataModule:
    settings = {"task": "demo", "num_train": 32, "num_dev": 16, "num_test": 16, "batch_size": 8, **changes}
    return PromptDataModule(**settings)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"])
def test_fit_validate_test_predict(tiny_folder: Path, precision: Any) -> None:
    module = SparseMeZOModule(str(tiny_folder), partial(fast, lr=1e-2))
    data, trainer = demo(), Trainer(**QUIET, max_steps=4, precision=precision)
    trainer.fit(module, data)
    kept = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}.get(
        precision, torch.float32
    )
    assert {p.dtype for p in module.parameters()} == {kept}
    assert trainer.global_step == 4
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(trainer.callback_metrics)
    before = load_network(tiny_folder, dtype=kept)
    assert not all(torch.equal(a, b) for a, b in zip(before.parameters(), module.model.parameters(), strict=True))
    assert set(trainer.validate(module, data, verbose=False)[0]) == {"val/loss", "val/accuracy"}
    assert set(trainer.test(module, data, verbose=False)[0]) == {"test/loss", "test/accuracy"}
    rows = [row for part in trainer.predict(module, data) or [] for row in part]
    assert sorted(row["index"] for row in rows) == sorted(e.index for e in data.examples("test"))
    texts = {e.index: e for e in data.examples("test")}
    for row in rows:
        assert set(row) == {"index", "scores", "prediction", "label"}
        assert row["prediction"] == max(range(2), key=lambda i: row["scores"][i])
        assert row["label"] == texts[row["index"]].label


def test_evaluation_equals_its_definition(tiny_folder: Path) -> None:
    module, data = SparseMeZOModule(str(tiny_folder), fast), demo(num_dev=21, eval_batch_size=4)
    trainer = Trainer(**QUIET)
    values = trainer.validate(module, data, verbose=False)[0]
    rows = []
    tokenizer = module.tokenizer
    assert tokenizer is not None
    for example in data.examples("dev"):
        scores = []
        for candidate in example.candidates:
            prompt = tokenizer(example.prompt)["input_ids"]
            ids = torch.tensor([tokenizer(example.prompt + candidate)["input_ids"]])
            log_probs = module.model(ids).logits[0, :-1].log_softmax(-1)
            tokens = ids[0, len(prompt) :]
            scores.append(log_probs[len(prompt) - 1 :].gather(1, tokens[:, None]).mean())
        rows.append((torch.stack(scores), example.label))
    loss = torch.stack([nn.functional.cross_entropy(s[None], torch.tensor([label])) for s, label in rows]).mean()
    accuracy = sum(int(s.argmax()) == label for s, label in rows) / len(rows)
    assert values["val/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert values["val/accuracy"] == pytest.approx(accuracy)


def test_val_loss_keeps_its_digits_in_16_bits(tiny_folder: Path) -> None:
    module, trainer = SparseMeZOModule(str(tiny_folder), fast), Trainer(**QUIET, precision="bf16-true")
    loss = trainer.validate(module, demo(), verbose=False)[0]["val/loss"]
    assert loss != torch.tensor(loss, dtype=torch.bfloat16).item()


def test_an_interrupted_evaluation_leaves_nothing_to_the_next(tiny_folder: Path) -> None:
    class Interrupt(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise InterruptedError

    module, data = SparseMeZOModule(str(tiny_folder), fast), demo(eval_batch_size=4)
    with pytest.raises(InterruptedError):
        Trainer(**QUIET, callbacks=[Interrupt()]).validate(module, data, verbose=False)
    fresh = Trainer(**QUIET).test(SparseMeZOModule(str(tiny_folder), fast), data, verbose=False)
    assert Trainer(**QUIET).test(module, data, verbose=False) == fresh


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("objective", ["classification", "lm"])
def test_micro_batches_weigh_by_example(tiny_folder: Path, micro_batch_size: int, objective: str) -> None:
    from dataclasses import replace

    from smezo_pl.tasks import get_task

    data = demo(task=replace(get_task("demo"), objective=objective))
    whole = SparseMeZOModule(str(tiny_folder), fast)
    parts = SparseMeZOModule(str(tiny_folder), fast, micro_batch_size=micro_batch_size)
    losses = {}
    for module in (whole, parts):
        module.trainer = Trainer(**QUIET)
        module.configure_model()
        data.set_tokenizer(module.tokenizer)  # type: ignore[arg-type]
        batch = next(iter(data.train_dataloader()))
        with torch.no_grad():
            losses[module] = module.batch_loss(split_batch(batch, module.micro_batch_size))
    assert losses[whole].dtype == torch.float32
    torch.testing.assert_close(losses[parts], losses[whole], rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), lambda x, y: {"x": x, "y": [y, "kept"]}])
def test_micro_batches_of_any_tensors(perceptron: nn.Module, wrap: Callable[..., Any]) -> None:
    seen: list[int] = []

    class Sum(SparseMeZOModule):
        def loss(self, batch: Any) -> Tensor:
            x = batch["x"] if isinstance(batch, dict) else batch[0]
            y = batch["y"][0] if isinstance(batch, dict) else batch[1]
            seen.append(len(x))
            return (self.model(x) - y).square().mean()

    module = Sum(perceptron, fast)
    module.trainer = Trainer(**QUIET)
    x, y = regression_data(batch_size=8).dataset[:8]
    with torch.no_grad():
        loss = module.batch_loss(split_batch(wrap(x, y), 3))
    assert seen == [3, 3, 2]
    torch.testing.assert_close(loss, (perceptron(x) - y).square().mean())


def test_another_kind_of_model_learns(perceptron: nn.Module) -> None:
    module = Regression(perceptron, partial(SparseMeZO, lr=1e-2, sparsity=0.0, kernel="torch"))
    loader = regression_data()
    trainer = Trainer(**QUIET, max_steps=150)
    before = trainer.validate(module, loader, verbose=False)[0]["val/loss"]
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["val/loss"] < 0.5 * before
    assert "val/accuracy" not in trainer.callback_metrics


def test_a_ready_network_is_told_to_save_its_start(perceptron: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "smezo_pl.module"):
        Trainer(**QUIET, max_steps=1).fit(Regression(perceptron, fast), regression_data())
    assert any("torch.save(module.model.state_dict(), 'start.pt') before fit" in line for line in caplog.messages)


def test_a_named_network_is_not(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "smezo_pl.module"):
        Trainer(**QUIET, max_steps=1).fit(SparseMeZOModule(str(tiny_folder), fast), demo())
    assert not any("start.pt" in line for line in caplog.messages)
    assert "precision 32-true, perturbation layerwise, device cpu" in caplog.messages


def test_both_perturbations_train_alike(tiny_folder: Path) -> None:
    networks = []
    for perturbation in ("layerwise", "in_place"):
        module = SparseMeZOModule(str(tiny_folder), fast, perturbation=perturbation)  # type: ignore[arg-type]
        Trainer(**QUIET, max_steps=3).fit(module, demo())
        networks.append(module.model)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.model.modules())
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_network_is_in_eval_mode_and_needs_no_gradient(perceptron: nn.Module) -> None:
    modes: list[tuple[bool, bool]] = []

    class Watch(Regression):
        def loss(self, batch: Any) -> Tensor:
            modes.append((self.model.training, torch.is_grad_enabled()))
            return super().loss(batch)

    perceptron.train()
    Trainer(**QUIET, max_steps=2).fit(Watch(perceptron, fast), regression_data())
    assert set(modes) == {(False, False)}
    assert all(p.grad is None for p in perceptron.parameters())


def test_scheduler_is_stepped_once_a_step(perceptron: nn.Module) -> None:
    scheduler = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=10)
    module = Regression(perceptron, fast, scheduler)
    trainer = Trainer(**QUIET, max_steps=5)
    trainer.fit(module, regression_data())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5e-3)


def test_scheduler_that_waits_for_a_metric(perceptron: nn.Module) -> None:
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1, threshold=0.9999)
    module = Regression(perceptron, fast, scheduler)
    trainer = Trainer(**{**QUIET, "max_epochs": 3})
    trainer.fit(module, regression_data(), regression_data())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)


def test_callbacks_can_watch(tiny_folder: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=1)
    watch = [best, EarlyStopping("val/accuracy", mode="max", patience=1)]
    module = SparseMeZOModule(str(tiny_folder), partial(fast, lr=0.0))
    trainer = Trainer(**{**QUIET, "max_epochs": 5, "enable_checkpointing": True}, callbacks=watch)
    trainer.fit(module, demo())
    assert trainer.current_epoch == 2
    assert Path(best.best_model_path).is_file()


def test_full_checkpoint_loads_and_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    def fit(steps: int, folder: Path, ckpt_path: Path | None = None) -> SparseMeZOModule:
        module = SparseMeZOModule(str(tiny_folder), partial(fast, lr=1e-2))
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_steps=steps, callbacks=[keep])
        trainer.fit(module, demo(), ckpt_path=ckpt_path)
        return module

    whole = fit(5, tmp_path / "whole")
    half = tmp_path / "whole" / "step=3.ckpt"
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        resumed = fit(5, tmp_path / "resumed", half)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    loaded = SparseMeZOModule.load_from_checkpoint(half)
    assert loaded.pretrained == str(tiny_folder)
    assert torch.load(half)["hyper_parameters"]["sparse_mezo"]["lr"] == 1e-2


@pytest.mark.parametrize(
    "adapter",
    [
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_adapters_train_alone(tiny_folder: Path, adapter: dict[str, Any], precision: Any) -> None:
    module = SparseMeZOModule(str(tiny_folder), partial(SparseMeZO, lr=1e-2, eps=1e-2, kernel="torch"), adapter=adapter)
    module.configure_model()
    start = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    module = SparseMeZOModule(str(tiny_folder), partial(SparseMeZO, lr=1e-2, eps=1e-2, kernel="torch"), adapter=adapter)
    Trainer(**QUIET, max_steps=10, precision=precision).fit(module, demo())
    for name, p in module.model.named_parameters():
        same = torch.equal(p.float(), start[name].to(p.dtype).float())
        if not p.requires_grad:
            assert same, name
        elif "lora_A" not in name:
            assert not same, name


def test_lora_b_changes_in_100_steps(tiny_folder: Path) -> None:
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    module = SparseMeZOModule(str(tiny_folder), partial(SparseMeZO, lr=1e-2, eps=1e-2, kernel="torch"), adapter=adapter)
    Trainer(**QUIET, max_steps=100).fit(module, demo())
    changes = {name: p.abs().max() for name, p in module.model.named_parameters() if "lora_B" in name}
    assert len(changes) == 4
    assert all(value > 1e-4 for value in changes.values())


def test_save_pretrained(tiny_folder: Path, tmp_path: Path) -> None:
    module = SparseMeZOModule(str(tiny_folder), partial(fast, lr=1e-2), save_pretrained=str(tmp_path / "out"))
    Trainer(**QUIET, max_steps=2).fit(module, demo())
    again = SparseMeZOModule(str(tmp_path / "out"), fast)
    again.configure_model()
    for a, b in zip(module.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.tokenizer is not None
    assert again.tokenizer("It was great")["input_ids"] == module.tokenizer("It was great")["input_ids"]  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["base", "link", "above", "run", "files", "file", "below", "denied", "checkpoints"])
def test_save_pretrained_writes_over_nothing(
    tiny_folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, used = tmp_path / "models" / "base", tmp_path / "run", tmp_path / "used"
    shutil.copytree(tiny_folder, base)
    (tmp_path / "link").symlink_to(base)
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    folder, reason = {
        "base": (base, "is the folder of the model that is trained"),
        "link": (tmp_path / "link", "is the folder of the model that is trained"),
        "above": (base.parent, "holds the folder of the model that is trained"),
        "run": (run, "is the folder of the run"),
        "files": (used, "is not empty and no earlier output"),
        "file": (used / "notes.txt", "is a file: choose a new folder"),
        "below": (used / "notes.txt" / "out", "is below a file: choose a new folder"),
        "denied": (tmp_path / "new" / "out", "cannot be written by this user"),
        "checkpoints": (run / "checkpoints", "is the folder of the run's checkpoints"),
    }[kind]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if kind == "denied":  # to root nothing is
        monkeypatch.setattr(saving.os, "access", lambda *_: False)
    module = SparseMeZOModule(str(base), fast, save_pretrained=str(folder))
    settings: dict[str, Any] = QUIET | {"enable_checkpointing": True, "default_root_dir": run}
    with pytest.raises(ValueError, match=reason):
        Trainer(**settings, max_steps=2, callbacks=[SeedCheckpoint()]).fit(module, demo())
    assert not hasattr(module, "model")  # before anything is loaded
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_save_pretrained_writes_within_its_folder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is mounted has no neighbors on its file system."""
    moved = []
    monkeypatch.setattr(saving.os, "replace", lambda a, b: moved.append(Path(a)) or shutil.move(a, b))
    module = SparseMeZOModule(str(tiny_folder), fast, save_pretrained=str(tmp_path / "out"))
    Trainer(**QUIET, max_steps=1).fit(module, demo())
    assert moved and all(tmp_path / "out" in path.parents for path in moved)
    assert not list((tmp_path / "out").glob(".part-*"))


def test_save_pretrained_replaces_an_earlier_output(tiny_folder: Path, tmp_path: Path) -> None:
    """An adapter's files do not stay beside those of a whole model, nor does what is not an output's go."""
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    out = tmp_path / "out"
    for settings in ({"adapter": adapter}, {}):
        module = SparseMeZOModule(str(tiny_folder), fast, save_pretrained=str(out), **settings)
        Trainer(**QUIET, max_steps=1).fit(module, demo())
        (out / "notes.txt").write_text("mine")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "notes.txt", "smezo_pl.json"} <= names
    assert not any(name.startswith("adapter") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_trainer_with_another_precision(tiny_folder: Path, tmp_path: Path) -> None:
    module = SparseMeZOModule(str(tiny_folder), fast)
    Trainer(**QUIET, max_steps=1).fit(module, demo())
    for run in ("fit", "validate"):
        with pytest.raises(MisconfigurationException, match="build the module again .* precision='32-true'"):
            getattr(Trainer(**QUIET, max_steps=1, precision="bf16-true"), run)(module, demo())
    Trainer(**QUIET, max_steps=1, precision="bf16-mixed").fit(module, demo())
    Trainer(**QUIET, max_steps=1).validate(module, demo(), verbose=False)


@pytest.mark.parametrize(("precision", "named"), [("32-true", "bf16-true"), ("16-true", "16-true")])
def test_reports_name_the_precision_of_the_weights(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any, tmp_path: Path, precision: Any, named: str
) -> None:
    """A ready network keeps its dtype in 32-true, and is cast in the others, as Lightning does it."""
    module = SparseMeZOModule(make_tiny_model().bfloat16(), fast)
    metrics, scores = RunMetrics(table=False), ScoreWriter()
    trainer = Trainer(**QUIET, max_steps=1, precision=precision, callbacks=[metrics, scores], default_root_dir=tmp_path)
    trainer.fit(module, demo(tokenizer=tiny_tokenizer))
    trainer.validate(module, demo(tokenizer=tiny_tokenizer), verbose=False)
    assert metrics.result is not None
    assert metrics.result["precision"] == json.loads((tmp_path / "validate.json").read_text())["precision"] == named


def test_saved_adapter_can_be_scored(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    large = partial(SparseMeZO, lr=1e-1, eps=1e-2, kernel="torch")
    module = SparseMeZOModule(str(tiny_folder), large, adapter=adapter, save_pretrained=str(tmp_path / "adapter"))
    trainer, data = Trainer(**QUIET, max_steps=4), demo()
    base = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    trainer.fit(module, data)
    trained = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    again = SparseMeZOModule(str(tmp_path / "adapter"))
    assert Trainer(**QUIET).validate(again, data, verbose=False)[0]["val/loss"] == pytest.approx(trained, rel=1e-6)
    assert trained != pytest.approx(base, rel=1e-4)


def test_ready_language_model_with_its_tokenizer(
    make_tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> None:
    module = SparseMeZOModule(make_tiny_model("gpt2"), fast)
    assert module.tokenizer is None
    Trainer(**QUIET, max_steps=1).fit(module, demo(tokenizer=tiny_tokenizer))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbation": "layers"}, "perturbation must be 'layerwise' or 'in_place', got 'layers'"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"save_pretrained": "x"}, "save_pretrained needs a transformers model, got Perceptron"),
    ],
)
def test_wrong_arguments(perceptron: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMeZOModule(perceptron, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0: there are no gradients to clip.*micro_batch_size"),
        ({"accumulate_grad_batches": 4}, "accumulate_grad_batches=4: there are no gradients.*micro_batch_size"),
    ],
)
def test_trainer_settings_that_need_gradients(perceptron: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Trainer(**QUIET, **settings).fit(Regression(perceptron, fast), regression_data())


@pytest.mark.parametrize("precision", ["16-mixed", "transformer-engine", "nf4"])
def test_precisions_that_do_not_hold(precision: str) -> None:
    with pytest.raises(MisconfigurationException, match="precision"):
        check_precision(precision)


def test_16_mixed_is_named() -> None:
    with pytest.raises(
        MisconfigurationException, match="'16-mixed' scales gradients, and there are none here: use 'bf16-mixed'"
    ):
        check_precision("16-mixed")


def test_16_mixed_on_the_cpu_says_what_was_taken(perceptron: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="bf16-mixed"):
        trainer = Trainer(**QUIET, max_steps=1, precision="16-mixed")
    with caplog.at_level(logging.INFO, "smezo_pl.module"):
        trainer.fit(Regression(perceptron, fast), regression_data())
    assert "precision bf16-mixed, perturbation layerwise, device cpu" in caplog.messages


def test_another_optimizer(perceptron: nn.Module) -> None:
    module = Regression(perceptron, torch.optim.Adam)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must build a SparseMeZO, got Adam, which needs gradients"):
        Trainer(**QUIET, max_steps=1).fit(module, regression_data())


def test_model_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="pretrained='./nowhere'"):
        Trainer(**QUIET, max_steps=1).fit(SparseMeZOModule("./nowhere", fast), demo())


def test_batch_that_cannot_be_split() -> None:
    with pytest.raises(
        ValueError, match=r"micro_batch_size=2: the batch's tensors differ in their first dimension \(\[3, 4\]\)"
    ):
        split_batch((torch.zeros(3, 4), torch.zeros(4, 1)), 2)
    with pytest.raises(TypeError, match="cannot tell the number of examples in a batch of type str"):
        split_batch("text", 2)


def test_loss_that_stays_infinite(perceptron: nn.Module) -> None:
    class Infinite(SparseMeZOModule):
        def loss(self, batch: Any) -> Tensor:
            return torch.tensor(float("inf"))

    module = Infinite(perceptron, partial(fast, max_skipped=3))
    with pytest.raises(RuntimeError, match="the loss was not finite in 3 steps in a row.*smaller lr"):
        Trainer(**QUIET, max_steps=50).fit(module, regression_data())
