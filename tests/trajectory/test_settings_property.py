"""Runs resumed with any settings: report, state in use and the trajectory's replay agree, or the resume is refused."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from smezo_pl.callbacks import MaskRefresh, RunMetrics, SeedCheckpoint
from smezo_pl.callbacks.figures import Curve
from smezo_pl.trajectory.log import Trajectory
from smezo_pl.trajectory.replaying import replay
from tests.trajectory.runs import Examples, make_trainer, network, same
from tests.trajectory.test_settings import LAST, Small

DEFAULTS = {"lr": 1e-6, "eps": 1e-3, "sparsity": 0.8, "weight_decay": 0.0, "mask": "small", "mask_update": "dynamic"}
DEFAULTS |= {"num_samples": 1, "seed": 0, "noise": "gaussian", "maximize": False, "max_skipped": 20}  # type: ignore[dict-item]
FIXED = {"mask", "mask_update", "seed", "noise", "maximize"}

CHOICES: dict[str, Any] = {
    "lr": [1e-2, 1e-3],
    "eps": [1e-3, 1e-2],
    "sparsity": [0.8, 0.5],
    "weight_decay": [0.0, 0.1],
    "num_samples": [1, 2],
    "max_skipped": [20, 5],
    "mask": ["small", "random", "dense"],
    "mask_update": ["dynamic", "constant"],
    "seed": [0, 7],
    "noise": ["gaussian", "rademacher"],
    "maximize": [False, True],
}
# what cannot change is drawn for the resumed run mostly as it was, or most examples would be refused
SETTINGS = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in CHOICES.items()})
CHANGED = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(values) for name, values in CHOICES.items() if name not in FIXED}
)
FIXED_CHANGED = st.one_of(st.just({}), SETTINGS.map(lambda drawn: {k: v for k, v in drawn.items() if k in FIXED}))
SCHEDULES: dict[str, tuple[Any, Any]] = {  # and the factor of a step
    "none": (None, lambda step: 1.0),
    "slow": (lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)), lambda step: 1 / (1 + step)),
    "halves": (lambda o: lr_scheduler.StepLR(o, 2, 0.5), lambda step: 0.5 ** (step // 2)),
}


@pytest.fixture(autouse=True)
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Curve, "draw", lambda *_: MagicMock())


def train(folder: Path, steps: int, schedule: str, refresh: bool, given: dict[str, Any]) -> Small:
    module = Small(SCHEDULES[schedule][0], kernel="torch", **given)
    callbacks = [MaskRefresh(every_n_steps=100)] if refresh else []
    checkpoint = folder / LAST if steps > 2 else None
    trainer = make_trainer(
        folder, RunMetrics(table=False), SeedCheckpoint(monitor=None), *callbacks, max_steps=steps, limit_val_batches=0
    )
    trainer.fit(module, Examples(), ckpt_path=checkpoint)
    return module


@settings(max_examples=8, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SETTINGS, CHANGED, FIXED_CHANGED, st.sampled_from([*SCHEDULES]), st.sampled_from([*SCHEDULES]), st.booleans())
def test_report_state_and_replay_agree(
    first: dict[str, Any],
    changed: dict[str, Any],
    fixed: dict[str, Any],
    schedule: str,
    other: str,
    refresh: bool,
) -> None:
    then, now = DEFAULTS | first, {**changed, **fixed}
    differing = {name for name, value in now.items() if value != then[name]}
    refused = differing & FIXED or (schedule != "none" and other == "none")
    refused = refused or ("sparsity" in differing and then["mask"] == "small" and not refresh)
    with TemporaryDirectory() as name:
        folder = Path(name)
        train(folder, 2, schedule, refresh, first)
        if refused:
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            with pytest.raises(ValueError, match=r"cannot change|had an lr_scheduler"):
                train(folder, 5, other, refresh, now)
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
            return
        module = train(folder, 5, other, refresh, now)
        report = json.loads((folder / "metrics.json").read_text())["hyperparameters"]
        trajectory, again = Trajectory.read(folder), network()
        replay(trajectory, again)
    expected = then | now
    optimizer: Any = module.optimizers()
    [group] = optimizer.param_groups
    assert expected.items() <= report.items()
    assert expected.items() <= module.hparams["sparse_mezo"].items()
    assert (report["seed"], report["num_samples"]) == (optimizer.optimizer.seed, optimizer.optimizer.num_samples)
    for key in ("eps", "sparsity", "weight_decay", "mask", "mask_update", "maximize"):
        assert group[key] == expected[key]
    for record in trajectory.records[2:]:
        assert (record.eps, record.weight_decay) == ((expected["eps"],), (expected["weight_decay"],))
        assert (record.sparsity, record.samples) == ((expected["sparsity"],), expected["num_samples"])
        assert record.lr == pytest.approx((expected["lr"] * SCHEDULES[other][1](record.step),))
    changes = [set(event.facts["changes"]) for event in trajectory.events_of("settings")]
    names = differing | ({"lr_scheduler"} if schedule != other else set())
    assert changes == ([names] if names else [])
    assert same(again, module.model)
