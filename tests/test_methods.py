"""Every method by its one key: what it trains, that its loss falls, and that its runs resume."""

import json
import logging
import math
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file

from smezo_pl import PromptDataModule, SparseMeZO, SparseMeZOModule
from smezo_pl.callbacks import RunMetrics, SeedCheckpoint, WeightCheckpoint
from smezo_pl.cli import check_settings, main
from smezo_pl.methods import METHODS, FirstOrder, MethodName
from smezo_pl.optim import NonFiniteLossError
from smezo_pl.scoring.evaluation import scores_of
from smezo_pl.scoring.linear_probe import LinearProbe
from tests.trajectory.runs import KillAfter, KilledError

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
RATES = {"full": 1e-2, "lora": 2e-2, "prefix": 1e-1, "linear-probe": 1e-1}
FIRST_ORDER = tuple(RATES)


def demo(**changes: Any) -> PromptDataModule:
    return PromptDataModule(**{"task": "demo", "num_train": 64, "num_dev": 32, "batch_size": 8, **changes})


def module_of(method: Any, folder: Path, **changes: Any) -> SparseMeZOModule:
    settings = {
        "optimizer": partial(SparseMeZO, lr=1e-2, kernel="torch"),
        "first_order": FirstOrder(lr=RATES.get(method)),
        **changes,
    }
    return SparseMeZOModule(str(folder), method=method, **settings)


def test_every_method_is_declared_and_has_a_summary() -> None:
    assert tuple(METHODS) == get_args(MethodName)
    assert all(method.summary for method in METHODS.values())


@pytest.mark.parametrize("method", FIRST_ORDER)
def test_the_training_loss_falls_and_what_is_frozen_stays(method: str, tiny_folder: Path) -> None:
    module = module_of(method, tiny_folder)
    module.configure_model()
    start = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    data = demo(num_train=8, num_dev=8)  # one batch, again and again
    Trainer(**QUIET, max_steps=1).fit(module, data)
    assert module.baseline is not None
    first = module.baseline.last_loss
    module = module_of(method, tiny_folder)
    Trainer(**QUIET, max_steps=25).fit(module, data)
    assert module.baseline is not None
    assert module.baseline.last_loss < 0.6 * first
    for name, p in module.model.named_parameters():
        assert torch.equal(p, start[name]) is (not p.requires_grad), name
    trained = [name for name, p in module.model.named_parameters() if p.requires_grad]
    part = {"full": "", "lora": "lora_", "prefix": "prompt_encoder", "linear-probe": "head."}[method]
    assert trained and all(part in name for name in trained)
    assert (len(trained) == len(start)) is (method == "full")


def test_one_adamw_step_is_torchs(tiny_folder: Path) -> None:
    """The step against AdamW by hand on the same batch, with clipping, whole and in parts."""
    settings = FirstOrder(lr=1e-3, weight_decay=0.1, gradient_clip=0.05)
    modules = [module_of("full", tiny_folder, first_order=settings, micro_batch_size=size) for size in (None, 3)]
    for module in modules:
        Trainer(**QUIET, max_steps=1).fit(module, demo())
    by_hand = module_of("full", tiny_folder)
    by_hand.configure_model()
    data = demo()
    data.set_tokenizer(by_hand.tokenizer)  # type: ignore[arg-type]
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    optimizer = torch.optim.AdamW(by_hand.model.parameters(), lr=1e-3, weight_decay=0.1)
    by_hand.loss(batch).backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 0.05)
    assert norm > 0.05
    optimizer.step()
    for a, b, c in zip(*(m.model.parameters() for m in (by_hand, *modules)), strict=True):
        assert torch.equal(a, b)
        # Adam's first step divides a gradient by its own size: rounding of small ones shows
        assert (a - c).abs().max() <= 2.1e-3 and (a - c).abs().mean() < 1e-5


@pytest.mark.parametrize(("method", "mask"), [("s-mezo", "small"), ("mezo", "dense"), ("r-mezo", "random")])
def test_zeroth_order_methods_are_the_optimizer_with_their_mask(method: str, mask: Any, tiny_folder: Path) -> None:
    by_method = module_of(method, tiny_folder)
    by_mask = module_of(None, tiny_folder, optimizer=partial(SparseMeZO, lr=1e-2, kernel="torch", mask=mask))
    for module in (by_method, by_mask):
        Trainer(**QUIET, max_steps=3).fit(module, demo())
    for a, b in zip(by_method.model.parameters(), by_mask.model.parameters(), strict=True):
        assert torch.equal(a, b)
    optimizer = by_method.trainer.optimizers[0]
    assert isinstance(optimizer, SparseMeZO) and optimizer.settings()["mask"] == mask


def test_zero_shot_trains_nothing_and_writes_metrics(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*words(tiny_folder, "zero-shot"), "--trainer.max_steps=5"])
    metrics = json.loads((tmp_path / "runs/demo/version_0/metrics.json").read_text())
    assert metrics["steps"] == 0 and metrics["method"] == "zero-shot" and metrics["step_seconds"] is None
    assert metrics["before"] == metrics["after"] and metrics["after"]["accuracy"] > 0
    main(["validate", *words(tiny_folder, "zero-shot")[1:], "--name=again"])
    scored = json.loads((tmp_path / "runs/again/version_0/validate.json").read_text())
    assert scored["metrics"] == pytest.approx(metrics["after"], abs=1e-5)
    assert scored["examples"] == 16 and scored["split"] == "dev" and scored["checkpoint"] is None


# ---------------------------------------------------------------------- the probe


def test_probe_scores_are_the_head_on_the_last_prompt_position(tiny_folder: Path) -> None:
    module = module_of("linear-probe", tiny_folder)
    module.configure_model()
    probe = module.model
    assert isinstance(probe, LinearProbe)
    torch.nn.init.normal_(probe.head.weight)
    data = demo()
    data.set_tokenizer(module.tokenizer)  # type: ignore[arg-type]
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    scores = scores_of(module.model, batch)
    encoded = {example.index: example for example in data.encoded("train")}
    for position, index in enumerate(batch.index.tolist()):
        prompt = torch.tensor([encoded[index].prompt])
        hidden = probe.network.model(input_ids=prompt).last_hidden_state[0, -1]  # type: ignore[union-attr, operator]
        actual = scores[batch.candidate_example == position]
        expected = probe.head(hidden)[batch.candidate_index[batch.candidate_example == position]]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("method", ["lora", "prefix", "linear-probe"])
def test_a_checkpoint_of_another_frozen_network_is_refused(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    for weight in weights.values():
        weight += 1e-3 * weight  # as after a little training
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_steps=1, callbacks=[WeightCheckpoint(str(run))])
    trainer.fit(module_of(method, tiny_folder), demo())
    last = str(run / "checkpoints" / "last.ckpt")
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    Trainer(**QUIET, precision="bf16-true").validate(module_of(method, moved), demo(), last, verbose=False)
    for use in ("validate", "fit"):
        with pytest.raises(ValueError, match=r"trained on another network than .*other: the frozen weights differ"):
            getattr(Trainer(**QUIET, max_steps=2), use)(module_of(method, other), demo(), ckpt_path=last)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resume_in_another_precision_is_refused(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    keep = WeightCheckpoint(str(tmp_path))
    Trainer(**{**QUIET, "enable_checkpointing": True}, max_steps=1, callbacks=[keep]).fit(
        module_of(method, tiny_folder), demo()
    )
    trainer = Trainer(**QUIET, max_steps=2, precision="bf16-true")
    with pytest.raises(ValueError, match=r"cannot change its precision: .*torch.float32, and they are torch.bfloat16"):
        trainer.fit(module_of(method, tiny_folder), demo(), ckpt_path=keep.last_model_path)


@pytest.mark.parametrize("method", FIRST_ORDER)
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_killed_run_resumes_to_the_same_bits(method: str, scheduled: bool, tiny_folder: Path, tmp_path: Path) -> None:
    if scheduled and method != "lora":
        pytest.skip("once is enough")
    scheduler = partial(torch.optim.lr_scheduler.LinearLR, total_iters=7) if scheduled else None

    def fit(folder: Path, ckpt: Path | None = None, kill: int | None = None) -> SparseMeZOModule:
        module = module_of(method, tiny_folder, lr_scheduler=scheduler)
        callbacks: list[Any] = [WeightCheckpoint(str(folder), every_n_steps=2)]
        callbacks += [KillAfter(kill)] if kill is not None else []
        trainer = Trainer(
            **{**QUIET, "enable_checkpointing": True},
            max_steps=7,
            callbacks=callbacks,
            val_check_interval=4,
            check_val_every_n_epoch=None,
        )
        trainer.fit(module, demo(), ckpt_path=ckpt)
        return module

    whole = fit(tmp_path / "whole")
    with pytest.raises(KilledError):
        fit(tmp_path / "killed", kill=5)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    resumed = fit(tmp_path / "killed", last)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    state = torch.load(last, weights_only=True)
    trained = {f"model.{name}" for name, p in resumed.model.named_parameters() if p.requires_grad}
    assert set(state["state_dict"]) == trained if method != "full" else trained <= set(state["state_dict"])
    assert state["global_step"] == 7
    best = Trainer(**QUIET).validate(module_of(method, tiny_folder), demo(), str(last), verbose=False)[0]["val/loss"]
    now = Trainer(**QUIET).validate(resumed, demo(), verbose=False)[0]["val/loss"]
    assert best == now


def test_a_checkpoint_of_another_method_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    keep = WeightCheckpoint(str(tmp_path))
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_steps=1, callbacks=[keep])
    trainer.fit(module_of("linear-probe", tiny_folder), demo(num_dev=8))
    for method, changes in (("lora", {}), (None, {}), (None, {"adapter": {"peft_type": "LORA"}})):
        other = SparseMeZOModule(str(tiny_folder), method=method, **changes)
        with pytest.raises(ValueError, match="of method 'linear-probe' with.*--model.method linear-probe, or"):
            Trainer(**QUIET).validate(other, demo(), keep.last_model_path)
    ranks = module_of("lora", tiny_folder, adapter={"r": 4})
    with pytest.raises(ValueError, match="this is method 'lora' with adapter .*: pass the run's adapter, or"):
        ranks.on_load_checkpoint({"hyper_parameters": {"method": "lora"}})


def test_the_weights_of_another_network_are_refused_in_one_line(tiny_folder: Path) -> None:
    module = module_of("full", tiny_folder)
    module.configure_model()
    state = {f"other.{name}" if "norm" in name else name: tensor[1:] for name, tensor in module.state_dict().items()}
    message = r"here it lacks 5 \(.*\), it has besides 5 \(other.*\), it has in another shape \d+ \([^\n]*\)$"
    with pytest.raises(ValueError, match=message):
        module.load_state_dict(state)
    module.load_state_dict(state | module.state_dict(), strict=False)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_scheduler_that_wants_momentum(name: str, tiny_folder: Path) -> None:
    arguments = {"OneCycleLR": {"max_lr": 1e-3, "total_steps": 4}, "CyclicLR": {"base_lr": 0.0, "max_lr": 1e-3}}[name]
    schedule = partial(getattr(torch.optim.lr_scheduler, name), **arguments)
    for method in ("s-mezo", None):
        module = SparseMeZOModule(str(tiny_folder), method=method, lr_scheduler=schedule)
        with pytest.raises(ValueError, match="cycles a momentum, and SparseMeZO has none: set cycle_momentum: false"):
            check_settings(module)
    check_settings(SparseMeZOModule(str(tiny_folder), lr_scheduler=partial(schedule, cycle_momentum=False)))
    Trainer(**QUIET, max_steps=1).fit(module_of("linear-probe", tiny_folder, lr_scheduler=schedule), demo(num_dev=8))


def test_load_from_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    keep = WeightCheckpoint(str(tmp_path))
    module = module_of("lora", tiny_folder, first_order=FirstOrder(lr=0.5, seed=3))
    Trainer(**{**QUIET, "enable_checkpointing": True}, max_steps=2, callbacks=[keep]).fit(module, demo(num_dev=8))
    loaded = SparseMeZOModule.load_from_checkpoint(keep.last_model_path, first_order=FirstOrder(seed=3))
    assert loaded.method == "lora"
    for a, b in zip(module.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- the command line


def words(model: Path, method: str) -> list[str]:
    return [
        "fit",
        f"--model.pretrained={model}",
        f"--model.method={method}",
        "--data.task=demo",
        "--data.num_train=32",
        "--data.num_dev=16",
        "--data.num_test=16",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
    ]


def test_lora_by_the_command_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "c.yaml"
    config.write_text("trainer:\n  callbacks:\n    - class_path: smezo_pl.SeedCheckpoint\n")
    main([*words(tiny_folder, "lora"), f"--config={config}", "--trainer.max_steps=4", "--model.first_order.lr=0.02"])
    run = tmp_path / "runs/demo/version_0"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["method"] == "lora" and metrics["hyperparameters"]["lr"] == 0.02 and metrics["seed"] == 0
    assert metrics["trained_parameters"] == 1792 < sum(metrics["parameters"].values())
    assert metrics["perturbation"] is None and "kernel" not in metrics["machine"]
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["step_seconds"] > 0 and metrics["peak_memory_bytes"] > 1e7
    assert metrics["curve"]["held_out"][0]["step"] == 0
    assert len(metrics["curve"]["train_loss"]) == 4
    log = capsys.readouterr().err
    assert "left out, as method lora does not use SparseMeZO: SeedCheckpoint" in log
    assert "method lora (LoRA with AdamW): 1,792 weights are trained" in log
    assert not (run / "trajectory.smezo").exists()
    main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints/last.ckpt'}", "--name=t"])
    scored = json.loads((tmp_path / "runs/t/version_0/test.json").read_text())
    assert scored["examples"] == 16 and scored["split"] == "test" and scored["checkpoint"].endswith("last.ckpt")


@pytest.mark.parametrize("method", ["s-mezo", "full"])
def test_metrics_have_the_same_keys_for_every_method(
    method: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*words(tiny_folder, method), "--trainer.max_steps=2", "--name=x"])
    metrics = json.loads((tmp_path / "runs/x/version_0/metrics.json").read_text())
    main([*words(tiny_folder, "zero-shot"), "--name=y"])
    assert set(metrics) == set(json.loads((tmp_path / "runs/y/version_0/metrics.json").read_text()))


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, "first_order.lr must be in [0, inf), got -1.0"),
        ({"lr": math.nan}, "first_order.lr must be in [0, inf), got nan"),
        ({"weight_decay": -0.1}, "first_order.weight_decay must be in [0, inf), got -0.1"),
        ({"beta1": 1.0}, "first_order.beta1 must be in [0, 1), got 1.0"),
        ({"beta2": -0.5}, "first_order.beta2 must be in [0, 1), got -0.5"),
        ({"eps": 0.0}, "first_order.eps must be in (0, inf), got 0.0"),
        ({"gradient_clip": 0.0}, "first_order.gradient_clip must be above 0, or null for none, got 0.0"),
        ({"seed": -1}, "first_order.seed must be in [0, 2^63), got -1"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FirstOrder(**setting)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adam"}, "method must be one of s-mezo, mezo, .*, got 'adam'"),
        ({"method": "full", "adapter": {"peft_type": "LORA"}}, "method 'full' takes no adapter, got adapter="),
        (
            {"method": "prefix", "adapter": {"peft_type": "LORA"}},
            "method 'prefix' takes an adapter of peft_type PREFIX_TUNING, got",
        ),
    ],
)
def test_wrong_method(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMeZOModule("x", **changes)


def test_a_mask_of_another_method_is_refused(tiny_folder: Path) -> None:
    module = module_of("mezo", tiny_folder, optimizer=partial(SparseMeZO, mask="large"))
    with pytest.raises(ValueError, match="method 'mezo' has mask 'dense', but the optimizer was given 'large'"):
        Trainer(**QUIET, max_steps=1).fit(module, demo(num_dev=8))


class NoGradient(SparseMeZOModule):
    def loss(self, batch: Any) -> torch.Tensor:
        return torch.tensor(1.0)


class Infinite(SparseMeZOModule):
    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) * math.inf


def test_a_loss_without_gradient_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="method 'full' needs a loss with a gradient"):
        Trainer(**QUIET, max_steps=1).fit(NoGradient(str(tiny_folder), method="full"), demo(num_dev=8))


class Unmoved(SparseMeZOModule):
    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) * 0 + 0.7


def test_a_run_whose_gradient_is_0_is_dead(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, settings = Unmoved(str(tiny_folder), method="lora"), {"default_root_dir": tmp_path, "max_steps": 21}
    Trainer(**QUIET | settings, callbacks=[RunMetrics(table=False)]).fit(module, demo(num_dev=8))
    assert caplog.text.count("the last 20 steps did nothing: the gradient was 0") == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["dead"].startswith("the gradient was 0")


def test_losses_that_are_not_finite_are_skipped_and_end_the_run(tiny_folder: Path) -> None:
    module = Infinite(str(tiny_folder), method="lora")
    module.configure_model()
    start = [p.detach().clone() for p in module.model.parameters()]
    for _ in range(2):
        with pytest.raises(NonFiniteLossError, match="20 losses or gradients in a row were not finite"):
            Trainer(**QUIET, max_steps=30).fit(module, demo(num_dev=8))
        assert module.baseline is not None and module.baseline.skipped_steps == 20
    for p, before in zip(module.model.parameters(), start, strict=True):
        assert torch.equal(p, before)


def test_16_bit_weights_are_warned_of(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "smezo_pl"):
        Trainer(**QUIET, max_steps=1, precision="bf16-true").fit(module_of("full", tiny_folder), demo(num_dev=8))
        assert "AdamW updates weights in bfloat16" in caplog.text
        caplog.clear()
        Trainer(**QUIET, max_steps=1, precision="bf16-true").fit(
            module_of("linear-probe", tiny_folder), demo(num_dev=8)
        )
        Trainer(**QUIET, max_steps=1, precision="bf16-true").fit(module_of("lora", tiny_folder), demo(num_dev=8))
        assert "AdamW updates" not in caplog.text


def test_callbacks_of_zeroth_order_say_what_they_need(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": True}, max_steps=1, callbacks=[SeedCheckpoint(str(tmp_path)), RunMetrics()]
    )
    with pytest.raises(TypeError, match="SeedCheckpoint needs a SparseMeZO optimizer, the run has AdamW"):
        trainer.fit(module_of("lora", tiny_folder), demo(num_dev=8))


def test_several_processes_are_refused(tiny_folder: Path) -> None:
    trainer = SimpleNamespace(world_size=2)
    module = SimpleNamespace(baseline=object(), method="lora", first_order=FirstOrder(), trainer=trainer)
    with pytest.raises(MisconfigurationException, match="method 'lora' runs in one process.*set devices=1"):
        SparseMeZOModule.configure_optimizers(module)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["lora", "prefix", "linear-probe"])
def test_scores_do_not_depend_on_the_batch(method: str, tiny_folder: Path) -> None:
    """Padding, shared rows and a prefix's positions: an example alone has the scores that it has among others."""
    module = module_of(method, tiny_folder)
    data = demo(batch_size=8)
    Trainer(**QUIET, max_steps=6).fit(module, data)
    batch = next(iter(data.train_dataloader()))
    together = scores_of(module.model, batch)
    for part in batch.split(1):
        alone = scores_of(module.model, part)
        position = batch.index.tolist().index(int(part.index))
        torch.testing.assert_close(alone, together[batch.candidate_example == position], atol=2e-5, rtol=1e-5)
    assert together.std() > 1e-3
