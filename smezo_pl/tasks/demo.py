"""The built-in synthetic sentiment set, so that a first run needs no download."""

from smezo_pl.tasks.task import Source, Task

DEMO = (
    Task(
        name="demo",
        prompt="{sentence|strip} It was",
        candidates={"negative": " terrible", "positive": " great"},
        calibration="It was",
        # Dev and test speak of other things in other words than the training sentences.
        source=Source(dev="validation", test="test"),
    ),
)
