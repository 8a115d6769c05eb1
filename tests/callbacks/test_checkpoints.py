import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch.optim.lr_scheduler import CosineAnnealingLR

from smezo_pl.callbacks import MaskRefresh, SeedCheckpoint, WeightCheckpoint
from smezo_pl.optim import SparseMeZO
from smezo_pl.trajectory import files as checkpoint_files
from smezo_pl.trajectory import resume
from smezo_pl.trajectory.header import TrajectoryError
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.replaying import replay
from tests.trajectory.runs import (
    Classifier,
    Examples,
    KillAfter,
    KilledError,
    Watch,
    bits,
    fit,
    loss_of,
    make_trainer,
    network,
    same,
)

LAST, BEST, TRAJECTORY = "checkpoints/last.ckpt", "checkpoints/best.ckpt", "trajectory.smezo"


def interrupted(folder: Path, module: LightningModule, step: int, *callbacks: Any, **settings: Any) -> None:
    with pytest.raises(KilledError):
        fit(folder, module, KillAfter(step), *callbacks, **settings)  # type: ignore[arg-type]


def equal_after(resumed: Watch, straight: Watch) -> bool:
    """What the resumed run saw and logged is what the other one did at the same steps."""
    return all(
        getattr(resumed, kind)[step] == getattr(straight, kind)[step]
        for kind in ("train", "val", "seen", "epochs")
        for step in getattr(resumed, kind)
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier, Watch]:
    """A run of 20 steps that nothing disturbed."""
    folder, module = tmp_path_factory.mktemp("straight"), Classifier()
    return folder, module, fit(folder, module)


def test_a_run_leaves_its_trajectory_and_two_small_checkpoints(straight: tuple[Path, Classifier, Watch]) -> None:
    folder, trained, watch = straight
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [BEST, LAST, TRAJECTORY]
    assert all((folder / name).stat().st_size < 20_000 for name in (LAST, BEST, TRAJECTORY))
    trajectory = Trajectory.read(folder)
    assert [row.loss for row in trajectory.records] == pytest.approx([watch.train[s + 1] for s in range(20)], rel=1e-6)
    again = network()
    replay(folder, again)
    assert same(again, trained.model)


def test_checkpoints_hold_no_weights_and_nothing_but_plain_types(straight: tuple[Path, Classifier, Watch]) -> None:
    checkpoint = torch.load(straight[0] / LAST, weights_only=True)
    assert "state_dict" not in checkpoint
    largest = max((t.numel() for t in _tensors(checkpoint)), default=0)
    assert largest <= 1
    assert checkpoint["smezo_pl"]["steps"] == checkpoint["global_step"] == 20


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for child in children for tensor in _tensors(child)]


# 3: after a checkpoint; 4: after a validation; 8: after an epoch and a validation; 12: a checkpoint was due with one
@pytest.mark.parametrize("killed", [0, 1, 3, 4, 7, 8, 9, 12, 19])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    straight: tuple[Path, Classifier, Watch], tmp_path: Path, killed: int
) -> None:
    interrupted(tmp_path, Classifier(), killed)
    resumed = Classifier()
    watch = fit(tmp_path, resumed, ckpt_path=tmp_path / LAST)
    folder, trained, seen = straight
    assert max(watch.train) == 20
    assert min(watch.train) <= killed + 1
    assert equal_after(watch, seen)
    assert same(resumed.model, trained.model)
    assert [row.projected_gradients for row in Trajectory.read(tmp_path).records] == [
        row.projected_gradients for row in Trajectory.read(folder).records
    ]


CONFIGURATIONS: dict[str, tuple[Callable[[], Classifier], Callable[[], list[Any]]]] = {
    "bfloat16": (lambda: Classifier("bfloat16"), list),
    "constant masks": (lambda: Classifier(mask_update="constant"), list),
    "constant masks, refreshed": (
        lambda: Classifier("bfloat16", mask_update="constant"),
        lambda: [MaskRefresh(every_n_steps=4, sparsity={0: 0.5, 10: 0.9})],
    ),
    "refreshed where it is saved": (Classifier, lambda: [MaskRefresh(every_n_steps=3)]),
    "refreshed by epoch": (lambda: Classifier(mask="large"), lambda: [MaskRefresh(every_n_epochs=1)]),
    "random constant masks, refreshed": (
        lambda: Classifier(mask="random", mask_update="constant"),
        lambda: [MaskRefresh(every_n_steps=6)],
    ),
    "a layer read now and then": (
        lambda: Classifier("bfloat16", routed=True),
        lambda: [MaskRefresh(every_n_steps=7)],
    ),
    "a part of the network": (lambda: Classifier(include=["0", "3.*"], exclude="0.bias", dense="3.bias"), list),
    "n-SPSA, rademacher": (lambda: Classifier(num_samples=2, noise="rademacher"), list),
    "a schedule": (lambda: Classifier(scheduler=lambda opt: CosineAnnealingLR(opt, 20), weight_decay=0.1), list),
}


SLOW = ("constant masks", "refreshed where it is saved", "a part of the network", "n-SPSA, rademacher", "a schedule")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CONFIGURATIONS]
)
def test_a_resume_is_exact_in_every_configuration(tmp_path: Path, name: str) -> None:
    build, callbacks = CONFIGURATIONS[name]
    trained, resumed = build(), build()
    seen = fit(tmp_path / "straight", trained, *callbacks())
    interrupted(tmp_path / "killed", build(), 14, *callbacks())
    watch = fit(tmp_path / "killed", resumed, *callbacks(), ckpt_path=tmp_path / "killed" / LAST)
    assert equal_after(watch, seen)
    assert same(resumed.model, trained.model)
    again = network(dtype=next(trained.model.parameters()).dtype)
    replay(tmp_path / "killed", again)
    assert same(again, trained.model)


def with_snapshots(**settings: Any) -> SeedCheckpoint:
    return SeedCheckpoint(every_n_steps=3, anchor_every_n_steps=6, **settings)


class TestSnapshots:
    """Full-weight snapshots."""

    @pytest.mark.parametrize(
        "name",
        ["bfloat16", "constant masks, refreshed", "random constant masks, refreshed", "a layer read now and then"],
    )
    def test_a_resume_begins_at_the_last_one(
        self, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build, callbacks = CONFIGURATIONS[name]
        trained, resumed = build(), build()
        seen = fit(tmp_path / "straight", trained, *callbacks())
        interrupted(tmp_path / "killed", build(), 16, *callbacks(), with_snapshots())
        assert [p.name for p in (tmp_path / "killed" / "anchors").iterdir()] == ["step-12.safetensors"]
        with torch.no_grad():
            resumed.model[3].bias.add_(1.0)  # whatever is optimized may be anything
        with caplog.at_level(logging.INFO):
            watch = fit(
                tmp_path / "killed", resumed, *callbacks(), with_snapshots(), ckpt_path=tmp_path / "killed" / LAST
            )
        assert "replayed 4 steps from the full-weight snapshot" in caplog.text
        assert equal_after(watch, seen)
        assert same(resumed.model, trained.model)
        again = network(dtype=next(trained.model.parameters()).dtype)
        replay(tmp_path / "killed", again)
        assert same(again, trained.model)

    @pytest.mark.parametrize("harm", ["damaged", "gone"])
    def test_without_it_the_weights_come_from_the_start(
        self, straight: tuple[Path, Classifier, Watch], tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        interrupted(tmp_path, Classifier(), 16, with_snapshots())
        [snapshot] = (tmp_path / "anchors").iterdir()
        if harm == "gone":
            snapshot.unlink()
        else:
            data = bytearray(snapshot.read_bytes())
            data[-5] ^= 1
            snapshot.write_bytes(data)
        resumed = Classifier()
        fit(tmp_path, resumed, with_snapshots(), ckpt_path=tmp_path / LAST)
        assert same(resumed.model, straight[1].model)
        assert ("is corrupted; the weights are made without it" in caplog.text) == (harm == "damaged")

    def test_weights_that_are_not_optimized_must_still_be_those_of_the_run(self, tmp_path: Path) -> None:
        interrupted(tmp_path, Classifier(exclude="2"), 16, with_snapshots())
        resumed = Classifier(exclude="2")
        with torch.no_grad():
            resumed.model[2].bias.add_(1.0)
        with pytest.raises(TrajectoryError, match="are not those that the run had"):
            fit(tmp_path, resumed, with_snapshots(), ckpt_path=tmp_path / LAST)


@pytest.mark.slow
def test_a_resume_is_exact_with_workers(tmp_path: Path) -> None:
    trained, resumed = Classifier(), Classifier()
    seen = fit(tmp_path / "straight", trained, data=Examples(workers=1))
    interrupted(tmp_path / "killed", Classifier(), 13, data=Examples(workers=2))
    watch = fit(tmp_path / "killed", resumed, ckpt_path=tmp_path / "killed" / LAST, data=Examples(workers=2))
    assert equal_after(watch, seen)
    assert same(resumed.model, trained.model)


def test_a_run_that_ended_resumes(straight: tuple[Path, Classifier, Watch], tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), max_steps=12)
    resumed = Classifier()
    watch = fit(tmp_path, resumed, ckpt_path=tmp_path / LAST)
    assert sorted(watch.train) == list(range(13, 21))
    assert equal_after(watch, straight[2])
    assert same(resumed.model, straight[1].model)


def test_it_may_be_killed_more_than_once(straight: tuple[Path, Classifier, Watch], tmp_path: Path) -> None:
    interrupted(tmp_path, Classifier(), 5)
    for step in (4, 9, 9, 14):
        interrupted(tmp_path, Classifier(), step, ckpt_path=tmp_path / LAST)
    resumed = Classifier()
    fit(tmp_path, resumed, ckpt_path=tmp_path / LAST)
    assert same(resumed.model, straight[1].model)


@pytest.mark.parametrize("with_callback", [True, False])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_every_subcommand_gets_the_weights_of_the_checkpoint(
    straight: tuple[Path, Classifier, Watch], verb: str, with_callback: bool, recwarn: pytest.WarningsRecorder
) -> None:
    folder, trained, watch = straight
    fresh = Classifier()
    trainer = make_trainer(folder, *([SeedCheckpoint()] if with_callback else []))
    result = getattr(trainer, verb)(fresh, Examples(), ckpt_path=folder / LAST)
    assert same(fresh.model, trained.model)
    if verb == "validate":
        assert result[0] == watch.val[20]


def test_best_is_the_step_with_the_best_metric(straight: tuple[Path, Classifier, Watch], tmp_path: Path) -> None:
    folder, _, watch = straight
    best = min(watch.val, key=lambda step: watch.val[step]["val/loss"])
    assert torch.load(folder / BEST, weights_only=True)["smezo_pl"]["steps"] == best
    result = make_trainer(folder).validate(Classifier(), Examples(), ckpt_path=folder / BEST)
    assert result[0]["val/loss"] == watch.val[best]["val/loss"]
    other = fit(tmp_path, Classifier(), SeedCheckpoint(monitor="val/loss", mode="max"))
    worst = max(other.val, key=lambda step: other.val[step]["val/loss"])
    assert torch.load(tmp_path / BEST, weights_only=True)["smezo_pl"]["steps"] == worst != best


def test_best_survives_a_resume(straight: tuple[Path, Classifier, Watch], tmp_path: Path) -> None:
    interrupted(tmp_path, Classifier(), 18)
    callback = SeedCheckpoint(every_n_steps=3)
    fit(tmp_path, Classifier(), callback, ckpt_path=tmp_path / LAST)
    watch = straight[2]
    assert callback.best_step == min(watch.val, key=lambda step: watch.val[step]["val/loss"])
    assert callback.best_model_path == str(tmp_path / BEST)
    assert callback.last_model_path == str(tmp_path / LAST)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_several_best_checkpoints_under_names_with_metrics(
    straight: tuple[Path, Classifier, Watch], tmp_path: Path, mode: Literal["min", "max"]
) -> None:
    def best() -> SeedCheckpoint:
        return SeedCheckpoint(every_n_steps=3, mode=mode, save_top_k=2, filename="step{step}-{val/loss:.4f}")

    losses = {step: metrics["val/loss"] for step, metrics in straight[2].val.items()}
    ranked = sorted(losses, key=lambda step: losses[step], reverse=mode == "max")
    interrupted(tmp_path, Classifier(), 14, best())
    resumed = best()
    fit(tmp_path, Classifier(), resumed, ckpt_path=tmp_path / LAST)
    names = [f"step{step}-{losses[step]:.4f}.ckpt" for step in ranked[:2]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", *sorted(names)]
    assert resumed.best_model_path == str(tmp_path / "checkpoints" / names[0])
    assert resumed.best_step == ranked[0]
    for name, step in zip(names, ranked, strict=False):
        [result] = make_trainer(tmp_path).validate(Classifier(), Examples(), tmp_path / "checkpoints" / name)
        assert result["val/loss"] == losses[step]


@pytest.mark.parametrize(
    ("kind", "top", "mode", "value"),
    [
        (SeedCheckpoint, 1, "max", "nan"),
        (SeedCheckpoint, 2, "min", "nan"),
        (WeightCheckpoint, 1, "min", "-inf"),
        (WeightCheckpoint, 2, "max", "inf"),
    ],
)
def test_a_metric_that_is_not_finite_is_never_the_best(
    straight: tuple[Path, Classifier, Watch],
    tmp_path: Path,
    kind: type[WeightCheckpoint],
    top: int,
    mode: Literal["min", "max"],
    value: str,
) -> None:
    class Odd(Classifier):
        def validation_step(self, *args: Any) -> Any:
            result = super().validation_step(*args)
            first = self.trainer.global_step < 10
            self.log("val/score", float(value) if first else 1.0 + self.trainer.global_step)
            return result

    def best() -> WeightCheckpoint:
        return kind(every_n_steps=3, monitor="val/score", mode=mode, save_top_k=top)

    steps = [step for step in sorted(straight[2].val) if step >= 10]
    with pytest.raises(KilledError):
        make_trainer(tmp_path, KillAfter(8), best()).fit(Odd(), Examples())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    callback = best()
    make_trainer(tmp_path, callback).fit(Odd(), Examples(), ckpt_path=tmp_path / LAST)
    assert callback.best_step == (steps[0] if mode == "min" else steps[-1])
    assert callback.state_dict()["best_score"] == 1.0 + callback.best_step
    assert len(callback.best_k_models) == top


def test_lightning_finds_the_best_and_the_last(straight: tuple[Path, Classifier, Watch], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, SeedCheckpoint(every_n_steps=3), max_steps=12)
    trainer.fit(Classifier(), Examples())
    losses = {step: metrics["val/loss"] for step, metrics in straight[2].val.items() if step <= 12}
    [result] = trainer.validate(Classifier(), Examples(), ckpt_path="best")
    assert result["val/loss"] == min(losses.values())
    resumed = Classifier()
    fit(tmp_path, resumed, ckpt_path="last")  # type: ignore[arg-type]
    assert same(resumed.model, straight[1].model)


def test_a_run_of_version_0_1_0_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """After 12 steps, the 4th of the second epoch. The files were written by that version and are never made anew."""
    shutil.copytree(Path(__file__).parent / "version_0_1_0", tmp_path, dirs_exist_ok=True)
    start = load_file(tmp_path / "start.safetensors")
    trained, resumed, callback = Classifier(), Classifier(), SeedCheckpoint(every_n_steps=3)
    for module in (trained, resumed):
        module.model.load_state_dict(start)
    seen = fit(tmp_path / "straight", trained, MaskRefresh(every_n_epochs=1))
    watch = fit(tmp_path, resumed, MaskRefresh(every_n_epochs=1), callback, ckpt_path=tmp_path / LAST)
    assert sorted(watch.seen) == list(range(13, 21))
    assert all(watch.seen[step] == seen.seen[step] for step in watch.seen)
    assert all(watch.epochs[step] == seen.epochs[step] for step in watch.epochs)
    losses = {4: 1.5220499, **{step: metrics["val/loss"] for step, metrics in watch.val.items()}}
    assert callback.best_step == min(losses, key=lambda step: losses[step])
    again = Classifier()
    again.model.load_state_dict(start)
    replay(tmp_path, again.model)
    assert same(again.model, resumed.model)


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor='val/f1' is no metric of this run; there are: .*val/accu"):
        fit(tmp_path, Classifier(), SeedCheckpoint(monitor="val/f1"))


def test_without_a_metric_or_without_validation_there_is_no_best(tmp_path: Path) -> None:
    fit(tmp_path / "a", Classifier(), SeedCheckpoint(monitor=None), max_steps=6)
    fit(tmp_path / "b", Classifier(), limit_val_batches=0, max_steps=6)
    for name in "ab":
        assert (tmp_path / name / LAST).is_file()
        assert not (tmp_path / name / BEST).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"mode": "most"}, "mode must be 'min' or 'max'"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SeedCheckpoint(**settings)


def test_early_stopping_and_fast_dev_run(tmp_path: Path) -> None:
    fit(tmp_path / "a", Classifier(), EarlyStopping("val/loss", patience=1, stopping_threshold=100.0))
    assert Trajectory.read(tmp_path / "a").next_step == 4
    fit(tmp_path / "b", Classifier(), fast_dev_run=3)
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())


def test_the_loggers_folder_is_the_runs(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), logger=CSVLogger(tmp_path, name="name"), log_every_n_steps=1, max_steps=3)
    assert (tmp_path / "name" / "version_0" / LAST).is_file()
    assert (tmp_path / "name" / "version_0" / TRAJECTORY).is_file()


def test_a_resume_into_another_folder_leaves_the_first_alone(
    straight: tuple[Path, Classifier, Watch], tmp_path: Path
) -> None:
    interrupted(tmp_path / "one", Classifier(), 13)
    before = {p: p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()}
    resumed = Classifier()
    fit(tmp_path / "two", resumed, ckpt_path=tmp_path / "one" / LAST)
    assert same(resumed.model, straight[1].model)
    assert {p: p.read_bytes() for p in before} == before
    again = network()
    replay(tmp_path / "two", again)  # the new trajectory is whole: it does not need the old one
    assert same(again, resumed.model)


def test_a_resume_from_an_earlier_checkpoint_keeps_the_later_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, Classifier(), max_steps=12)
    shutil.copy(tmp_path / LAST, tmp_path / "checkpoints" / "twelve.ckpt")
    fit(tmp_path, Classifier(), ckpt_path=tmp_path / LAST)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Classifier(), ckpt_path=tmp_path / "checkpoints" / "twelve.ckpt", max_steps=15)
    assert Trajectory.read(tmp_path).next_step == 15
    assert Trajectory.read(tmp_path / "trajectory-until-20.smezo").next_step == 20
    assert "the trajectory so far is kept as" in caplog.text


def test_a_run_that_ended_before_its_first_step_is_replaced(tmp_path: Path) -> None:
    interrupted(tmp_path, Classifier(), 0)
    fit(tmp_path, Classifier(seed=1), max_steps=3)
    assert Trajectory.read(tmp_path).next_step == 3


@pytest.mark.parametrize("pages", [False, True])
def test_a_run_resumes_whose_trajectory_is_corrupted_after_the_checkpoint(
    straight: tuple[Path, Classifier, Watch], tmp_path: Path, pages: bool, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, Classifier(), 14)
    early = tmp_path / "checkpoints" / "early.ckpt"
    shutil.copy(tmp_path / LAST, early)
    resumed = Classifier()
    fit(tmp_path, resumed, ckpt_path=tmp_path / LAST)
    if pages:
        data = bytearray((tmp_path / TRAJECTORY).read_bytes())
        data[-1024:] = bytes(1024)
        (tmp_path / TRAJECTORY).write_bytes(data)
    else:
        connection = sqlite3.connect(tmp_path / TRAJECTORY)
        connection.execute("UPDATE steps SET data = zeroblob(9) WHERE step = 17")
        connection.commit()
        connection.close()
    assert Trajectory.read(tmp_path, damaged=True).damage
    again = Classifier()
    fit(tmp_path, again, ckpt_path=early)
    assert "its valid part is rewritten" in caplog.text
    assert same(again.model, straight[1].model)
    assert Trajectory.read(tmp_path).next_step == 20
    assert (tmp_path / "trajectory-damaged.smezo").is_file()


def test_a_second_run_in_one_folder_is_refused(straight: tuple[Path, Classifier, Watch]) -> None:
    with pytest.raises(TrajectoryError, match=r"trajectory\.smezo is there already"):
        fit(straight[0], Classifier())
    assert Trajectory.read(straight[0]).next_step == 20


class TestRefused:
    """Checkpoints that are not this model's, or not what was written."""

    @pytest.fixture(autouse=True)
    def copy(self, straight: tuple[Path, Classifier, Watch], tmp_path: Path) -> None:
        self.folder = tmp_path / "run"
        shutil.copytree(straight[0], self.folder)

    def validate(self, module: LightningModule, name: str = LAST) -> None:
        make_trainer(self.folder, SeedCheckpoint()).validate(module, Examples(), ckpt_path=self.folder / name)

    def test_of_other_weights(self) -> None:
        with pytest.raises(TrajectoryError, match="starts from other weights than these"):
            self.validate(Classifier(seed=1))

    def test_of_other_shapes(self) -> None:
        with pytest.raises(TrajectoryError, match=r"another model: '0\.weight' has shape \[24, 12\] there, \[16, 12\]"):
            self.validate(Classifier(width=16))

    def test_of_another_precision(self) -> None:
        with pytest.raises(TrajectoryError, match="trained in float32 and is bfloat16 here"):
            self.validate(Classifier("bfloat16"))

    def test_for_training_too(self) -> None:
        with pytest.raises(TrajectoryError, match="starts from other weights"):
            fit(self.folder, Classifier(seed=1), ckpt_path=self.folder / LAST, max_steps=30)

    def test_corrupted_anywhere(self) -> None:
        data = (self.folder / LAST).read_bytes()
        for place in range(0, len(data), 211):
            wrong = bytearray(data)
            wrong[place] ^= 0x10
            (self.folder / LAST).write_bytes(bytes(wrong))
            with pytest.raises(TrajectoryError, match=r"last\.ckpt.*corrupted"):
                self.validate(Classifier())

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_truncated(self, share: float) -> None:
        size = (self.folder / LAST).stat().st_size
        os.truncate(self.folder / LAST, int(share * size))
        with pytest.raises(TrajectoryError, match="it is corrupted or truncated"):
            self.validate(Classifier())

    def test_without_its_trajectory(self) -> None:
        (self.folder / TRAJECTORY).unlink()
        with pytest.raises(
            TrajectoryError, match="no weights; they come back from the run's trajectory, which is not at"
        ):
            self.validate(Classifier())

    def test_with_its_trajectory_beside_it(self) -> None:
        (self.folder / TRAJECTORY).rename(self.folder / "checkpoints" / TRAJECTORY)
        self.validate(Classifier())

    def test_with_the_trajectory_of_another_run(self, tmp_path: Path) -> None:
        fit(tmp_path / "other", Classifier())
        shutil.copy(tmp_path / "other" / TRAJECTORY, self.folder / TRAJECTORY)
        with pytest.raises(TrajectoryError, match="belongs to another run"):
            self.validate(Classifier())

    def test_with_a_trajectory_that_lost_its_end(self, tmp_path: Path) -> None:
        whole = (self.folder / TRAJECTORY).read_bytes()
        for change, message in (
            ("DELETE FROM steps WHERE step >= 7", "holds only 7: .*--step 7` gives the weights so far"),
            ("DELETE FROM steps", "holds only 0: .*No step is left"),
            ("UPDATE steps SET data = zeroblob(9) WHERE step = 3", "holds only 3: step 3 is corrupted: .*--step 3`"),
        ):
            (self.folder / TRAJECTORY).write_bytes(whole)
            with sqlite3.connect(self.folder / TRAJECTORY) as connection:
                connection.execute(change)
                connection.execute("DELETE FROM marks")
            connection.close()
            with pytest.raises(TrajectoryError, match=f"is the checkpoint after 20 steps, and .* {message}"):
                self.validate(Classifier())

    def test_with_a_trajectory_that_went_another_way(self) -> None:
        early = self.folder / "checkpoints" / "early.ckpt"
        other = self.folder.parent / "other"
        interrupted(other, Classifier(), 13)
        shutil.copy(other / LAST, early)
        shutil.copy(other / TRAJECTORY, self.folder / TRAJECTORY)
        fit(self.folder, Classifier(), ckpt_path=early, data=Examples(order=4))
        later = (self.folder / LAST).read_bytes()
        (self.folder / LAST).write_bytes(early.read_bytes())
        self.validate(Classifier())
        fit(other, Classifier(), ckpt_path=other / LAST)
        shutil.copy(other / TRAJECTORY, self.folder / TRAJECTORY)
        (self.folder / LAST).write_bytes(later)
        with pytest.raises(TrajectoryError, match="the run was resumed from an earlier one and went another way"):
            self.validate(Classifier())

    def test_by_load_from_checkpoint(self) -> None:
        with pytest.raises(TrajectoryError, match="give it to the Trainer"):
            Classifier.load_from_checkpoint(self.folder / LAST)

    def test_that_is_no_checkpoint(self) -> None:
        (self.folder / LAST).write_text("hello")
        with pytest.raises(TrajectoryError, match="cannot be read"):
            self.validate(Classifier())

    def test_that_is_not_there(self) -> None:
        with pytest.raises(FileNotFoundError):
            self.validate(Classifier(), "nowhere.ckpt")


class Plain(LightningModule):
    """A user's own module that knows nothing of this package but the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.automatic_optimization = False

    def configure_optimizers(self) -> SparseMeZO:
        return SparseMeZO(self.named_parameters(), lr=1e-2, kernel="torch")

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.optimizers().step(closure=lambda: loss_of(self.net, *batch))  # type: ignore[union-attr]
        self.log("train/loss", loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", loss_of(self.net, *batch), batch_size=len(batch[1]))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_users_own_module_resumes_as_well(tmp_path: Path) -> None:
    trained, resumed = Plain(), Plain()
    seen = fit(tmp_path / "straight", trained)  # type: ignore[arg-type]
    interrupted(tmp_path / "killed", Plain(), 14)
    watch = fit(tmp_path / "killed", resumed, ckpt_path=tmp_path / "killed" / LAST)  # type: ignore[arg-type]
    assert equal_after(watch, seen)
    assert all(torch.equal(a, b) for a, b in zip(bits(resumed), bits(trained), strict=True))
    fresh = Plain()
    make_trainer(tmp_path, SeedCheckpoint()).validate(fresh, Examples(), ckpt_path=tmp_path / "killed" / LAST)
    assert all(torch.equal(a, b) for a, b in zip(bits(fresh), bits(trained), strict=True))


def whole_weights(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "whole", every_n_train_steps=12, save_top_k=-1, filename="{step}")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_model_checkpoint_beside_it_keeps_working(straight: tuple[Path, Classifier, Watch], tmp_path: Path) -> None:
    fit(tmp_path / "one", Classifier(), whole_weights(tmp_path), max_steps=13)
    [file] = (tmp_path / "whole").iterdir()
    assert "state_dict" in torch.load(file, weights_only=True)
    resumed = Classifier(seed=5)  # its weights are in the file
    watch = fit(tmp_path / "two", resumed, whole_weights(tmp_path / "two"), ckpt_path=file)
    assert sorted(watch.train) == list(range(13, 21))
    assert same(resumed.model, straight[1].model)
    again = network()
    replay(tmp_path / "two", again)  # the trajectory went along, from the first step on
    assert same(again, resumed.model)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_whole_weights_without_their_trajectory_begin_a_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = ModelCheckpoint(tmp_path / "whole", every_n_train_steps=12, save_top_k=-1, filename="{step}")
    fit(tmp_path / "one", Classifier(), whole, max_steps=13)
    (tmp_path / "one" / TRAJECTORY).unlink()
    [file] = (tmp_path / "whole").iterdir()
    resumed, start = Classifier(), Classifier()
    fit(tmp_path / "two", resumed, whole_weights(tmp_path / "two"), ckpt_path=file)
    assert "a new one begins with the weights of the checkpoint" in caplog.text
    start.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    replay(tmp_path / "two", start.model)
    assert same(start.model, resumed.model)


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


class TestWriting:
    """A checkpoint is there whole or not at all."""

    def test_the_one_before_stays_when_the_disk_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "last.ckpt"
        checkpoint_files.write_atomically(path, b"before")
        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(
            TrajectoryError, match=r"No space left on device.; what was there before is intact. Make space"
        ):
            checkpoint_files.write_atomically(path, b"after")
        assert path.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_run_on_a_full_disk_resumes_when_there_is_space(
        self, straight: tuple[Path, Classifier, Watch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, written = checkpoint_files.write_atomically, []

        def full(path: Path, data: bytes) -> None:
            written.append(path)
            if len(written) > 6:
                with monkeypatch.context() as patch:
                    patch.setattr(
                        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
                    )
                    write(path, data)
            write(path, data)

        monkeypatch.setattr(resume, "write_atomically", full)
        with pytest.raises(TrajectoryError, match="No space left"):
            fit(tmp_path, Classifier())
        monkeypatch.setattr(resume, "write_atomically", write)
        resumed = Classifier()
        fit(tmp_path, resumed, ckpt_path=tmp_path / LAST)
        assert same(resumed.model, straight[1].model)

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(TrajectoryError, match="cannot be written"):
            checkpoint_files.write_atomically(tmp_path / "file" / "last.ckpt", b"")

    def test_what_could_not_be_read_back_is_found_before_training(self, tmp_path: Path) -> None:
        module = Classifier()
        module.save_hyperparameters({"folder": tmp_path})
        with pytest.raises(TrajectoryError, match=r"could not be read back.*save_hyperparameters\(ignore"):
            fit(tmp_path, module)


def test_a_run_that_had_ended_has_its_weights(straight: tuple[Path, Classifier, Watch], tmp_path: Path) -> None:
    """Lightning trains no step of it, and comes by no hook of training."""
    shutil.copytree(straight[0], tmp_path / "run")
    again = Classifier()
    watch = fit(tmp_path / "run", again, ckpt_path=tmp_path / "run" / LAST)
    assert not watch.train
    assert same(again.model, straight[1].model)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 2)])
def test_a_resume_is_exact_with_another_number_of_workers(
    straight: tuple[Path, Classifier, Watch], tmp_path: Path, before: int, after: int
) -> None:
    interrupted(tmp_path, Classifier(), 13, data=Examples(workers=before))  # the 6th batch of the second epoch
    resumed = Classifier()
    watch = fit(tmp_path, resumed, ckpt_path=tmp_path / LAST, data=Examples(workers=after))
    assert equal_after(watch, straight[2])
    assert same(resumed.model, straight[1].model)


MORE_KILLS = ((8, 17), (7, 16), (8, 16, 24), (8, 13, 16, 27))


# 8 batches an epoch: resumes from the last one of an epoch, with and without a validation there, and from elsewhere
@pytest.mark.parametrize("validated", [4, 5])
@pytest.mark.parametrize(
    "killed",
    [(8, 16), (9, 17, 24), *(pytest.param(k, marks=pytest.mark.slow) for k in MORE_KILLS)],
    ids=str,
)
def test_epochs_are_counted_through_any_resumes(tmp_path: Path, killed: tuple[int, ...], validated: int) -> None:
    """Masks refreshed every second epoch: a wrong count, or another order of the examples, gives other weights."""
    settings: dict[str, Any] = {"max_steps": 32, "val_check_interval": validated}
    trained, resumed = Classifier(), Classifier()
    seen = fit(tmp_path / "straight", trained, MaskRefresh(every_n_epochs=2), **settings)
    run, ckpt_path = tmp_path / "killed", None
    for step in killed:
        interrupted(run, Classifier(), step, MaskRefresh(every_n_epochs=2), ckpt_path=ckpt_path, **settings)
        ckpt_path = run / LAST
    watch = fit(run, resumed, MaskRefresh(every_n_epochs=2), ckpt_path=ckpt_path, **settings)
    assert max(seen.epochs.values()) == 3
    assert min(watch.train) <= killed[-1] + 1
    assert equal_after(watch, seen)
    assert [row.thresholds for row in Trajectory.read(run).records] == [
        row.thresholds for row in Trajectory.read(tmp_path / "straight").records
    ]
    assert same(resumed.model, trained.model)


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize("kind", [SeedCheckpoint, WeightCheckpoint])
@pytest.mark.parametrize("stopped", [(5, 8, 13), pytest.param((8, 16), marks=pytest.mark.slow)], ids=str)
def test_epochs_are_counted_through_runs_that_are_stopped(
    tmp_path: Path, stopped: tuple[int, ...], kind: type[WeightCheckpoint]
) -> None:
    """A run that is stopped validates once more, and its checkpoint comes after that."""

    def run(folder: Path, *callbacks: Any, ckpt_path: Path | None = None) -> tuple[Watch, Classifier]:
        callbacks = (*callbacks, MaskRefresh(every_n_epochs=2), kind())
        module, watch = Classifier(), Watch()
        trainer = make_trainer(folder, watch, *callbacks, max_steps=32, val_check_interval=5)
        trainer.fit(module, Examples(), ckpt_path=ckpt_path)
        return watch, module

    seen, trained = run(tmp_path / "straight")
    ckpt_path = None
    for step in stopped:
        run(tmp_path / "stopped", StopAfter(step), ckpt_path=ckpt_path)
        ckpt_path = tmp_path / "stopped" / LAST
    watch, resumed = run(tmp_path / "stopped", ckpt_path=ckpt_path)
    assert min(watch.train) == stopped[-1] + 1
    assert equal_after(watch, seen)
    assert same(resumed.model, trained.model)


def test_epochs_are_counted_where_they_end_the_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": -1, "max_epochs": 4}
    trained, resumed = Classifier(), Classifier()
    seen = fit(tmp_path / "straight", trained, MaskRefresh(every_n_epochs=2), **settings)
    run = tmp_path / "killed"
    interrupted(run, Classifier(), 8, MaskRefresh(every_n_epochs=2), **settings)
    interrupted(run, Classifier(), 16, MaskRefresh(every_n_epochs=2), ckpt_path=run / LAST, **settings)
    watch = fit(run, resumed, MaskRefresh(every_n_epochs=2), ckpt_path=run / LAST, **settings)
    assert max(seen.train) == max(watch.train) == 32
    assert equal_after(watch, seen)
    assert same(resumed.model, trained.model)


def test_a_resume_on_another_machine_says_what_differs(
    straight: tuple[Path, Classifier, Watch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "smezo_pl.trajectory.resume")
    interrupted(tmp_path, Classifier(), 14)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        resumed = Classifier()
        fit(tmp_path, resumed, ckpt_path=tmp_path / LAST, max_steps=14)
    finally:
        torch.set_num_threads(before)
    assert "the weights are exact, but the model's forward may differ in its last bits" in caplog.text
    assert f"threads {before} then, {before + 1} now" in caplog.text
