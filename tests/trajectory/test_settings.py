"""What a resumed run takes from its checkpoint, and what from the settings that it is given now."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.optim import lr_scheduler

from smezo_pl import SparseMeZO, SparseMeZOModule
from smezo_pl.callbacks import MaskRefresh, RunMetrics, WeightCheckpoint
from smezo_pl.cli import main
from smezo_pl.commands.show import as_text, summary
from smezo_pl.methods import FirstOrder
from smezo_pl.trajectory.exports import export, load
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.replaying import replay
from tests.trajectory.runs import (
    Classifier,
    Examples,
    KillAfter,
    KilledError,
    fit,
    loss_of,
    make_trainer,
    network,
    same,
)

LAST = "checkpoints/last.ckpt"


class Small(Classifier):
    """A classifier whose optimizer is built from the keywords that are given, and from no others."""

    routed = False

    def __init__(self, scheduler: Any = None, build: Any = SparseMeZO, **given: Any) -> None:
        SparseMeZOModule.__init__(self, network(), partial(build, **given), scheduler)


def run(folder: Path, module: Any, steps: int, *callbacks: Any, ckpt_path: Path | None = None, **settings: Any) -> Any:
    fit(folder, module, *callbacks, max_steps=steps, ckpt_path=ckpt_path, **settings)
    return module.optimizers().optimizer


def hyperparameters(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "metrics.json").read_text())["hyperparameters"]
    return settings


def rates(folder: Path, name: str = "lr") -> list[float]:
    return [getattr(record, name)[0] for record in Trajectory.read(folder).records]


def check_replay(folder: Path, module: Any) -> None:
    again = network()
    replay(folder, again)
    assert same(again, module.model)


GIVEN = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "seed": 7, "kernel": "torch"}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("stopped")
    run(folder, Small(**GIVEN), 4)
    return folder


def test_what_is_given_counts_and_what_is_not_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "smezo_pl")
    run(tmp_path, Small(**GIVEN), 4, RunMetrics(table=False))
    resumed = Small(lr=1e-3, kernel="torch", max_skipped=3)
    optimizer = run(tmp_path, resumed, 8, RunMetrics(table=False), ckpt_path=tmp_path / LAST)
    [group] = optimizer.param_groups
    assert (group["lr"], group["eps"], group["weight_decay"], optimizer.seed) == (1e-3, 1e-2, 0.1, 7)
    assert optimizer.max_skipped == 3
    settings = {**SparseMeZO(network().named_parameters()).settings(), **GIVEN, "lr": 1e-3, "max_skipped": 3}
    assert optimizer.settings() == hyperparameters(tmp_path) == resumed.hparams["sparse_mezo"] == settings
    assert rates(tmp_path) == [1e-2] * 4 + [1e-3] * 4
    trajectory = Trajectory.read(tmp_path)
    assert "after step 4 lr 0.01 -> 0.001, max_skipped 20 -> 3" in as_text(trajectory, summary(trajectory))
    assert load(export(trajectory, tmp_path / "run.safetensors").path).header.settings == settings
    [event] = Trajectory.read(tmp_path).events_of("settings")
    assert (event.steps, event.facts) == (4, {"changes": {"lr": [1e-2, 1e-3], "max_skipped": [20, 3]}})
    assert "resumed after 4 steps with other settings: lr 0.01 -> 0.001, max_skipped 20 -> 3" in caplog.text
    assert "not given, so as in the run so far: eps 0.01, weight_decay 0.1, seed 7" in caplog.text
    check_replay(tmp_path, resumed)

    caplog.clear()
    run(tmp_path, Small(kernel="torch"), 10, RunMetrics(table=False), ckpt_path=tmp_path / LAST)
    assert rates(tmp_path)[8:] == [1e-3] * 2
    assert "other settings" not in caplog.text


def test_a_resume_that_is_taken_back_leaves_no_change(stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    for step, lr in ((4, 1e-3), (4, 1e-4), (4, None)):
        given = {} if lr is None else {"lr": lr}
        with pytest.raises(KilledError):
            run(folder, Small(kernel="torch", **given), 8, KillAfter(step), ckpt_path=folder / LAST)
        changes = [event.facts["changes"] for event in Trajectory.read(folder).events_of("settings")]
        assert changes == ([] if lr is None else [{"lr": [1e-2, lr]}])


FIXED: dict[str, Any] = {
    "seed": 8,
    "noise": "rademacher",
    "mask": "large",
    "mask_update": "constant",
    "maximize": True,
    "include": ["0"],
    "exclude": "0.bias",
    "dense": ["3.bias"],
    "sparsity": 0.5,
}


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_change_is_refused_before_a_step(name: str, stopped: Path) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    module = Small(kernel="torch", **{name: FIXED[name]})
    with pytest.raises(ValueError, match=rf"cannot change.*{name} .* -> .*smezo replay RUN --out FOLDER"):
        run(stopped, module, 8, ckpt_path=stopped / LAST)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_patterns_that_are_not_given_again_are_refused(name: str, tmp_path: Path) -> None:
    run(tmp_path, Small(**GIVEN, **{name: "0"}), 4)
    with pytest.raises(ValueError, match=rf"cannot change {name} \['0'\] -> None"):
        run(tmp_path, Small(kernel="torch"), 8, ckpt_path=tmp_path / LAST)


@pytest.mark.parametrize("mask_update", ["dynamic", "constant"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using")
def test_another_sparsity_where_masks_are_refreshed(mask_update: str, whole: bool, tmp_path: Path) -> None:
    weights = [ModelCheckpoint(tmp_path / "whole", every_n_train_steps=4, filename="whole")] if whole else []
    run(tmp_path, Small(**GIVEN, mask_update=mask_update), 4, *weights)
    resumed = Small(kernel="torch", sparsity=0.5)
    checkpoint = tmp_path / ("whole/whole.ckpt" if whole else LAST)
    optimizer = run(tmp_path, resumed, 8, MaskRefresh(every_n_steps=100), ckpt_path=checkpoint)
    records = Trajectory.read(tmp_path).records
    assert [record.sparsity[0] for record in records] == [0.8] * 4 + [0.5] * 4
    assert [record.refreshed for record in records] == [True, *[False] * 3, True, *[False] * 3]
    assert all(stat.selected / stat.numel > 0.3 for stat in optimizer.mask_stats() if stat.numel > 99)
    check_replay(tmp_path, resumed)


def test_another_sparsity_where_the_refresh_has_its_own_is_refused(stopped: Path) -> None:
    with pytest.raises(ValueError, match="MaskRefresh, without a sparsity of its own"):
        run(stopped, Small(sparsity=0.5), 8, MaskRefresh(sparsity={6: 0.9}), ckpt_path=stopped / LAST)


def test_a_random_choice_needs_no_refresh(tmp_path: Path) -> None:
    run(tmp_path, Small(**GIVEN, mask="random"), 4)
    resumed = Small(sparsity=0.5, kernel="torch")
    run(tmp_path, resumed, 8, ckpt_path=tmp_path / LAST)
    assert rates(tmp_path, "sparsity") == [0.8] * 4 + [0.5] * 4
    check_replay(tmp_path, resumed)


def test_another_number_of_samples(tmp_path: Path) -> None:
    run(tmp_path, Small(**GIVEN, num_samples=3), 4)
    for steps, number in ((6, 1), (8, 2), (10, None)):
        resumed = Small(kernel="torch", **({} if number is None else {"num_samples": number}))
        optimizer = run(tmp_path, resumed, steps, ckpt_path=tmp_path / LAST)
        assert optimizer.settings()["num_samples"] == (number or 2)
    assert [record.samples for record in Trajectory.read(tmp_path).records] == [3] * 4 + [1] * 2 + [2] * 4
    check_replay(tmp_path, resumed)


def two_groups(params: Any, rate: float | None = None, mask: str = "small", **settings: Any) -> SparseMeZO:
    one, *others = list(params)
    own = {"params": [one], **({} if rate is None else {"lr": rate})}
    return SparseMeZO([own, {"params": others, "mask": mask}], **settings)


def test_settings_of_one_group(tmp_path: Path) -> None:
    def lrs() -> list[tuple[float, ...]]:
        return [record.lr for record in Trajectory.read(tmp_path).records]

    def resume(steps: int, *given: Any, **settings: Any) -> None:
        resumed = Small(build=lambda params, **s: two_groups(params, *given, **s), kernel="torch", **settings)
        run(tmp_path, resumed, steps, ckpt_path=tmp_path / LAST if steps > 2 else None)
        check_replay(tmp_path, resumed)

    resume(2, 1e-2, seed=7)
    resume(4, 1e-3)
    assert lrs()[2:] == [(1e-3, 1e-6)] * 2
    resume(6, 1e-3, lr=1e-4)
    assert lrs()[4:] == [(1e-3, 1e-4)] * 2
    changes = [event.facts["changes"] for event in Trajectory.read(tmp_path).events_of("settings")]
    assert changes == [{"lr of group 0": [1e-2, 1e-3]}, {"lr": [1e-6, 1e-4]}]
    with pytest.raises(ValueError, match="cannot change mask of group 1 'small' -> 'large'"):
        resume(8, 1e-3, "large")


SCHEDULES: dict[str, Any] = {
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=10),
    "cosine, longer": partial(lr_scheduler.CosineAnnealingLR, T_max=20),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "lambda, other": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (2 + step)),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=12, cycle_momentum=False),
    "one cycle, higher": partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=12, cycle_momentum=False),
    "warmup": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.StepLR(optimizer, 2, 0.5)],
        milestones=[3],
    ),
    "none": None,
}


@pytest.mark.parametrize(
    ("first", "second", "lr"),
    [
        ("cosine", "cosine", 1e-3),
        ("cosine", "cosine, longer", 1e-2),
        ("cosine", "lambda", 1e-3),
        ("lambda", "lambda, other", 1e-2),
        ("one cycle", "one cycle, higher", 1e-2),
        ("warmup", "warmup", 1e-3),
        ("none", "warmup", 1e-2),
    ],
)
def test_another_schedule_is_where_it_would_be_after_the_steps_done(
    first: str, second: str, lr: float, tmp_path: Path
) -> None:
    run(tmp_path / "resumed", Small(SCHEDULES[first], **GIVEN), 4)
    resumed = Small(SCHEDULES[second], **{**GIVEN, "lr": lr})
    run(tmp_path / "resumed", resumed, 10, ckpt_path=tmp_path / "resumed" / LAST)
    run(tmp_path / "whole", Small(SCHEDULES[second], **{**GIVEN, "lr": lr}), 10)
    assert rates(tmp_path / "resumed")[4:] == rates(tmp_path / "whole")[4:]
    [event] = Trajectory.read(tmp_path / "resumed").events_of("settings")
    assert set(event.facts["changes"]) == ({"lr"} if lr != 1e-2 else set()) | (
        {"lr_scheduler"} if first != second else set()
    )
    check_replay(tmp_path / "resumed", resumed)


@pytest.mark.parametrize("name", ["cosine", "lambda", "one cycle", "warmup"])
def test_the_same_schedule_is_no_change(name: str, tmp_path: Path) -> None:
    run(tmp_path / "resumed", Small(SCHEDULES[name], **GIVEN), 4)
    run(tmp_path / "resumed", Small(SCHEDULES[name], kernel="torch"), 10, ckpt_path=tmp_path / "resumed" / LAST)
    run(tmp_path / "whole", Small(SCHEDULES[name], **GIVEN), 10)
    assert rates(tmp_path / "resumed") == rates(tmp_path / "whole")
    assert not Trajectory.read(tmp_path / "resumed").events_of("settings")


def test_a_schedule_that_is_not_given_again_is_refused(tmp_path: Path) -> None:
    run(tmp_path, Small(SCHEDULES["cosine"], **GIVEN), 4)
    with pytest.raises(ValueError, match=r"had an lr_scheduler and none is given now.*ConstantLR"):
        run(tmp_path, Small(**GIVEN), 10, ckpt_path=tmp_path / LAST)


def test_a_schedule_that_has_ended_is_refused(stopped: Path) -> None:
    short = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=3, cycle_momentum=False)
    with pytest.raises(ValueError, match="lr_scheduler OneCycleLR ends before the 4 steps"):
        run(stopped, Small(short, **GIVEN), 10, ckpt_path=stopped / LAST)


def test_a_schedule_that_waits_keeps_its_counters(tmp_path: Path) -> None:
    def waits(**settings: Any) -> Any:
        return partial(lr_scheduler.ReduceLROnPlateau, threshold=10.0, **settings)

    run(tmp_path, Small(waits(patience=2, factor=0.5), **GIVEN), 8)  # two validations, of which one was no better
    module = Small(waits(patience=1, factor=0.1), **GIVEN)
    run(tmp_path, module, 16, ckpt_path=tmp_path / LAST)
    assert rates(tmp_path)[8:] == pytest.approx([1e-2] * 4 + [1e-3] * 4)
    [event] = Trajectory.read(tmp_path).events_of("settings")
    assert event.facts["changes"]["lr_scheduler"][1] == "ReduceLROnPlateau {'factor': 0.1, 'patience': 1}"
    check_replay(tmp_path, module)


class Own(LightningModule):
    """A user's own module."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.model, self.given = network(), given
        self.automatic_optimization = False

    def configure_optimizers(self) -> SparseMeZO:
        return SparseMeZO(self.named_parameters(), **self.given)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.log("train/loss", self.optimizers().step(closure=lambda: loss_of(self.model, *batch)))  # type: ignore[union-attr]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", loss_of(self.model, *batch), batch_size=len(batch[1]))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_module_of_ones_own(tmp_path: Path) -> None:
    fit(tmp_path, Own(**GIVEN), max_steps=4)  # type: ignore[arg-type]
    for steps, lr in ((6, 1e-3), (8, 1e-4)):
        fit(tmp_path, Own(lr=lr, kernel="torch"), max_steps=steps, ckpt_path=tmp_path / LAST)  # type: ignore[arg-type]
    assert rates(tmp_path) == [1e-2] * 4 + [1e-3] * 2 + [1e-4] * 2
    assert rates(tmp_path, "weight_decay") == [0.1] * 8
    with pytest.raises(ValueError, match="cannot change seed 7 -> 8"):
        fit(tmp_path, Own(seed=8), max_steps=10, ckpt_path=tmp_path / LAST)  # type: ignore[arg-type]


@pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode",
    "ignore:The dirpath has changed",
    "ignore:Be aware that",
    "ignore:Using ModelCheckpoint with manual optimization",
)
def test_a_module_of_ones_own_with_whole_weights(tmp_path: Path) -> None:
    whole = ModelCheckpoint(tmp_path / "whole", every_n_train_steps=4, filename="whole")
    fit(tmp_path, Own(**GIVEN), whole, max_steps=4)  # type: ignore[arg-type]
    fit(tmp_path / "more", Own(lr=1e-3, kernel="torch"), max_steps=6, ckpt_path=tmp_path / "whole" / "whole.ckpt")  # type: ignore[arg-type]
    assert rates(tmp_path / "more") == [1e-2] * 4 + [1e-3] * 2
    assert rates(tmp_path / "more", "weight_decay") == [0.1] * 6


class Baseline(Classifier):
    """The classifier under AdamW."""

    routed = False

    def __init__(self, scheduler: Any = None, method: Any = "full", **given: Any) -> None:
        SparseMeZOModule.__init__(
            self, network(), lr_scheduler=scheduler, method=method, first_order=FirstOrder(**given)
        )


def test_adamw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "smezo_pl")

    def train(module: Any, steps: int, resumes: bool = True) -> Any:
        trainer = make_trainer(tmp_path, WeightCheckpoint(), RunMetrics(table=False), max_steps=steps)
        trainer.fit(module, Examples(), ckpt_path=tmp_path / LAST if resumes else None)
        return trainer.optimizers[0].param_groups[0]

    schedule = partial(lr_scheduler.StepLR, step_size=4, gamma=0.5)
    train(Baseline(schedule, lr=1e-2, weight_decay=0.1), 2, resumes=False)
    module = Baseline(schedule, lr=1e-3, beta2=0.9, gradient_clip=None)
    group = train(module, 6)
    assert (group["lr"], group["betas"], group["weight_decay"]) == (5e-4, (0.9, 0.9), 0.1)
    assert "resumed after 2 steps with other settings: lr 0.01 -> 0.001, beta2 0.999 -> 0.9" in caplog.text
    expected = {"lr": 1e-3, "beta2": 0.9, "gradient_clip": None, "weight_decay": 0.1}
    assert expected.items() <= hyperparameters(tmp_path).items()
    assert expected.items() <= module.hparams["adamw"].items()
    with pytest.raises(ValueError, match="cannot change seed 0 -> 1"):
        train(Baseline(schedule, seed=1), 8)
    with pytest.raises(ValueError, match=r"cannot change its method \('full' -> None\)"):
        train(Small(), 8)


def test_a_zeroth_order_method_stays(tmp_path: Path) -> None:
    run(tmp_path, _with_method("mezo"), 4)
    resumed = _with_method(None)
    optimizer = run(tmp_path, resumed, 8, ckpt_path=tmp_path / LAST)
    assert (resumed.method, optimizer.settings()["mask"]) == ("mezo", "dense")
    with pytest.raises(ValueError, match="cannot change its method"):
        run(tmp_path, _with_method("r-mezo"), 12, ckpt_path=tmp_path / LAST)


def _with_method(method: Any) -> Any:
    module = Small(**GIVEN)
    SparseMeZOModule.__init__(module, network(), partial(SparseMeZO, **GIVEN), method=method)
    return module


def test_checkpoints_of_the_version_before(tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent / "callbacks" / "version_0_1_0"
    module = Classifier(mask_update="constant")
    module.model.load_state_dict(load_file(folder / "start.safetensors"))
    shutil.copytree(folder, tmp_path / "run")
    fit(tmp_path / "run", module, max_steps=14, ckpt_path=tmp_path / "run" / LAST)
    assert not Trajectory.read(tmp_path / "run").events_of("settings")


def fit_cli(model: Path, *more: str) -> None:
    main(
        [
            "fit",
            f"--model.pretrained={model}",
            "--model.optimizer.kernel=torch",
            "--data.task=demo",
            "--data.num_train=32",
            "--data.num_dev=16",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.log_every_n_steps=1",
            "--trainer.callbacks+=smezo_pl.RunMetrics",
            "--trainer.callbacks.before=false",
            "--name=run",
            *more,
        ]
    )


def test_the_command_line_counts_where_it_says_something(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "smezo_pl")
    fit_cli(tiny_folder, "--trainer.max_steps=2", "--model.optimizer.lr=1e-3", "--model.optimizer.eps=0.01")
    folders = [tmp_path / "runs" / "run" / f"version_{number}" for number in range(3)]
    resume = f"--ckpt_path={folders[0] / LAST}"
    fit_cli(
        tiny_folder, "--trainer.max_steps=4", "--model.optimizer.lr=1e-4", "--model.optimizer.num_samples=1", resume
    )
    config = yaml.safe_load((folders[1] / "config.yaml").read_text())["model"]["optimizer"]["init_args"]
    hparams = yaml.safe_load((folders[1] / "hparams.yaml").read_text())["sparse_mezo"]
    assert config["mask"] is None  # which stands for the mask in use
    assert {**config, "kernel": "torch", "mask": "small"} == hparams == hyperparameters(folders[1])
    assert (config["lr"], config["eps"]) == (1e-4, 1e-2)
    assert rates(folders[1]) == [1e-3] * 2 + [1e-4] * 2
    assert rates(folders[1], "eps") == [1e-2] * 4
    assert "model.optimizer.eps 0.01" in caplog.text
    assert "with other settings: lr 0.001 -> 0.0001" in caplog.text
    with pytest.raises(ValueError, match="cannot change seed 0 -> 1"):
        fit_cli(tiny_folder, "--trainer.max_steps=4", "--model.optimizer.seed=1", resume)
    assert not folders[2].exists() or not (folders[2] / "config.yaml").exists()


def test_the_command_line_keeps_a_schedule_that_is_not_given(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = ("--model.lr_scheduler=torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size=1")
    fit_cli(tiny_folder, "--trainer.max_steps=2", "--model.optimizer.lr=1e-3", *schedule)
    fit_cli(tiny_folder, "--trainer.max_steps=3", "--ckpt_path=last")
    assert rates(tmp_path / "runs" / "run" / "version_1") == pytest.approx([1e-3, 1e-4, 1e-5])
    with pytest.raises(ValueError, match="had an lr_scheduler and none is given now"):
        fit_cli(tiny_folder, "--trainer.max_steps=4", "--ckpt_path=last", "--model.lr_scheduler=null")


def test_the_saved_configuration_of_a_method_resumes_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit_cli(tiny_folder, "--trainer.max_steps=2", "--model.method=r-mezo")
    folder = tmp_path / "runs" / "run" / "version_0"
    main(["fit", f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder / LAST}", "--trainer.max_steps=4"])
    assert not Trajectory.read(folder.with_name("version_1")).events_of("settings")
    # and without it the checkpoint knows the method
    fit_cli(tiny_folder, "--trainer.max_steps=4", f"--ckpt_path={folder / LAST}")
    assert json.loads((folder.with_name("version_2") / "metrics.json").read_text())["method"] == "r-mezo"
