"""GLUE in causal form. SST-2's prompt is MeZO's; no official source has the others, they follow MeZO's style."""

from smezo_pl.tasks.task import Source, Task

_PATH = "nyu-mll/glue"

GLUE = (
    Task(
        name="sst2",
        prompt="{sentence|strip} It was",
        candidates={"negative": " terrible", "positive": " great"},
        calibration="It was",
        source=Source(_PATH, "sst2"),
    ),
    Task(
        name="mnli",
        prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes, No or Maybe?\n',
        candidates={"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
        calibration="",
        source=Source(_PATH, "mnli", test="validation_matched"),
    ),
    Task(
        name="qnli",
        prompt=(
            "Passage: {sentence}\nQuestion: {question|strip}\nIs it possible to answer this question"
            " based only on the information in the passage? Yes or No?\n"
        ),
        candidates={"entailment": "Yes", "not_entailment": "No"},
        calibration="",
        source=Source(_PATH, "qnli"),
    ),
    Task(
        name="mrpc",
        prompt="{sentence1} {sentence2} Is the second sentence a paraphrase of the first?\n",
        candidates={"not_equivalent": "No", "equivalent": "Yes"},
        metrics=("accuracy", "f1"),
        calibration="",
        source=Source(_PATH, "mrpc"),
    ),
    Task(
        name="qqp",
        prompt="{question1} {question2} Is the second sentence a paraphrase of the first?\n",
        candidates={"not_duplicate": "No", "duplicate": "Yes"},
        metrics=("accuracy", "f1"),
        calibration="",
        source=Source(_PATH, "qqp"),
        # A few questions of the official set are blank.
        may_be_empty=("question1", "question2"),
    ),
    Task(
        name="cola",
        prompt="{sentence} This is",
        candidates={"unacceptable": " incorrect", "acceptable": " correct"},
        metrics=("matthews", "accuracy"),
        calibration="This is",
        source=Source(_PATH, "cola"),
    ),
)
