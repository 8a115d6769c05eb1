import pytest

from smezo_pl.callbacks.figures import Curve, curve_figure, density_figure, gradient_figure
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
