"""What a question asks for (TREC)."""

from smezo_pl.tasks.task import Source, Task

TOPICS = (
    Task(
        name="trec",
        prompt="Question: {text|strip}\nType:",
        candidates={
            "ABBR": " Abbreviation",
            "ENTY": " Entity",
            "DESC": " Description",
            "HUM": " Human",
            "LOC": " Location",
            "NUM": " Number",
        },
        label="coarse_label",
        named_labels=True,
        metrics=("accuracy", "f1_macro"),
        calibration="Type:",
        # It has no validation split; the hub keeps a loading script beside its own conversion.
        source=Source("CogComp/trec", revision="refs/convert/parquet", test="test"),
    ),
)
