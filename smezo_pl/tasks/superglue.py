"""SuperGLUE with MeZO's prompts for large models."""

from smezo_pl.tasks.task import ListCandidates, Source, Task

_PATH = "aps/super_glue"

SUPERGLUE = (
    Task(
        name="rte",
        prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        candidates={"entailment": "Yes", "not_entailment": "No"},
        calibration="",
        source=Source(_PATH, "rte"),
    ),
    Task(
        name="cb",
        prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        candidates={"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
        metrics=("accuracy", "f1_macro"),
        calibration="",
        source=Source(_PATH, "cb"),
        # The training split holds 250.
        num_train=150,
        num_dev=100,
    ),
    Task(
        name="boolq",
        prompt="{passage} {question|question}\n",
        candidates={"False": "No", "True": "Yes"},
        calibration="",
        source=Source(_PATH, "boolq"),
    ),
    Task(
        name="wsc",
        prompt=(
            '{text}\nIn the previous sentence, does the pronoun "{span2_text|lower}" refer to {span1_text}?'
            " Yes or No?\n"
        ),
        candidates={"False": "No", "True": "Yes"},
        calibration="",
        source=Source(_PATH, "wsc.fixed", folder="wsc.fixed"),
        # The training split holds 554, and MeZO's scripts take 500 of them for dev.
        num_train=54,
        num_dev=500,
    ),
    Task(
        name="wic",
        prompt=(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
        ),
        candidates={"False": "No", "True": "Yes"},
        calibration="",
        source=Source(_PATH, "wic"),
    ),
    Task(
        name="multirc",
        prompt=(
            '{paragraph}\nQuestion: {question|strip}\nI found this answer "{answer}". Is that correct? Yes or No?\n'
        ),
        candidates={"False": "No", "True": "Yes"},
        calibration="",
        metrics=("accuracy", "f1a", "em"),
        group=("paragraph", "question"),
        source=Source(_PATH, "multirc"),
    ),
    Task(
        name="copa",
        prompt="{premise|no_period} {question}",
        words={"question": {"effect": "so", "cause": "because"}},
        candidates={"choice1": " {choice1|lower_first}", "choice2": " {choice2|lower_first}"},
        objective="lm",
        calibration="{question}",
        source=Source(_PATH, "copa"),
        # The training split holds 400.
        num_train=300,
        num_dev=100,
    ),
    Task(
        name="record",
        prompt="{passage|bullets}\n-",
        candidates=ListCandidates("entities", text=" {query|strip}", slot="@placeholder"),
        label="answers",
        objective="lm",
        metrics=("accuracy", "f1", "em"),
        calibration="-",
        source=Source(_PATH, "record"),
    ),
)
