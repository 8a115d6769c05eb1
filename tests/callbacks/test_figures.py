"""Figures show what they are given, and a curve keeps a few hundred points of any run."""

from pathlib import Path

import pytest

from smezo_pl.callbacks.figures import MOST_POINTS, Curve, curve_figure, density_figure, gradient_figure
from smezo_pl.optim import MaskStat


@pytest.mark.parametrize("count", [1, 2, 500])
def test_gradients_are_counted(count: int) -> None:
    [axes] = gradient_figure([float(i % 7) for i in range(count)]).axes
    assert sum(patch.get_height() for patch in axes.patches) == count


def test_density_goes_over_the_layers_of_each_kind() -> None:
    stats = [MaskStat(f"model.layers.{i}.{kind}.weight", 100, 20 + i, 0.1) for i in range(5) for kind in ("q", "k")]
    [axes] = density_figure([*stats, MaskStat("model.embed.weight", 10, 10, None)]).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn["q"] == drawn["k"] == [0.2, 0.21, 0.22, 0.23, 0.24]
    assert drawn["model.embed"] == [1.0, 1.0]


def test_density_of_a_model_without_layers_goes_by_tensor() -> None:
    [axes] = density_figure([MaskStat("a", 4, 1, 0.1), MaskStat("b", 8, 8, None)]).axes
    assert [patch.get_width() for patch in axes.patches] == [0.25, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_a_curve_shows_what_there_is() -> None:
    train = [(float(i), 1.0) for i in range(1, 30)]
    loss, accuracy = curve_figure("title", train, [(0, 1.0), (30, 0.5)], [(0, 0.5), (30, 0.75)]).axes
    assert {line.get_label() for line in loss.lines} == {"training batches", "their running mean", "held out"}
    assert [text.get_text() for text in accuracy.texts] == ["0.500", "0.750"]
    assert len(curve_figure("title", [], [(0, 1.0)], []).axes) == 1


def test_a_task_without_accuracy_shows_another_metric() -> None:
    curve = Curve()
    curve.add_held_out(0, {"loss": 1.0, "em": 0.1, "f1": 0.2})
    curve.add_held_out(5, {"loss": 0.9, "em": 0.2, "f1": 0.4})
    _, right = curve.draw("title").axes
    assert right.get_ylabel() == "f1, held out"
    assert [text.get_text() for text in right.texts] == ["0.200", "0.400"]


class TestCurve:
    """A few hundred points of any run."""

    def test_short_runs_are_kept_as_they_are(self) -> None:
        curve = Curve()
        for step in range(1, 6):
            curve.add_train(float(step))
        assert curve.state_dict()["means"] == [1.0, 2.0, 3.0, 4.0, 5.0]

    def test_long_runs_are_kept_as_means(self) -> None:
        curve = Curve()
        for step in range(1, 10_001):
            curve.add_train(float(step))
        state = curve.state_dict()
        span = state["span"]
        assert MOST_POINTS / 2 <= len(state["means"]) < MOST_POINTS
        assert state["means"][0] == (1 + span) / 2
        assert sum(state["means"]) * span + state["sum"] == 10_000 * 10_001 / 2

    def test_a_state_is_resumed(self) -> None:
        one, two = Curve(), Curve()
        for step in range(1, 1001):
            one.add_train(step**0.5)
        two.load_state_dict(one.state_dict())
        for curve in (one, two):
            for step in range(1001, 1500):
                curve.add_train(step**0.5)
            curve.add_held_out(1500, {"loss": 1.0, "accuracy": 0.5, "other": 3.0})
        assert one.state_dict() == two.state_dict()
        assert one.state_dict()["held_out"] == {1500: {"loss": 1.0, "accuracy": 0.5, "other": 3.0}}

    def test_a_loss_that_is_not_finite_leaves_no_hole(self) -> None:
        curve = Curve()
        for loss in (1.0, float("nan"), float("inf"), 2.0):
            curve.add_train(loss)
        assert curve.state_dict()["means"] == [1.0, 1.0, 1.0, 2.0]

    @pytest.mark.parametrize("points", [0, 1, 3, 300])
    def test_every_run_can_be_drawn(self, points: int, tmp_path: Path) -> None:
        curve = Curve()
        for step in range(1, points + 1):
            curve.add_train(1.0 / step)
        for accuracy in ({}, {"accuracy": 0.5}):
            if points:
                curve.add_held_out(points, {"loss": 0.3, **accuracy})
            figure = curve.draw("title")
            figure.savefig(tmp_path / "curve.png")
            assert len(figure.axes) == (2 if accuracy and points else 1)
