"""The built-in tasks."""

from dataclasses import replace

from smezo_pl.tasks.task import MASK, GeneratedAnswer, ListCandidates, Source, Task

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


_SUPERGLUE_PATH = "aps/super_glue"

SUPERGLUE = (
    Task(
        name="rte",
        prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        candidates={"entailment": "Yes", "not_entailment": "No"},
        calibration="",
        source=Source(_SUPERGLUE_PATH, "rte"),
    ),
    Task(
        name="cb",
        prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        candidates={"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
        metrics=("accuracy", "f1_macro"),
        calibration="",
        source=Source(_SUPERGLUE_PATH, "cb"),
        # The training split holds 250.
        num_train=150,
        num_dev=100,
    ),
    Task(
        name="boolq",
        prompt="{passage} {question|question}\n",
        candidates={"False": "No", "True": "Yes"},
        calibration="",
        source=Source(_SUPERGLUE_PATH, "boolq"),
    ),
    Task(
        name="wsc",
        prompt=(
            '{text}\nIn the previous sentence, does the pronoun "{span2_text|lower}" refer to {span1_text}?'
            " Yes or No?\n"
        ),
        candidates={"False": "No", "True": "Yes"},
        calibration="",
        source=Source(_SUPERGLUE_PATH, "wsc.fixed", folder="wsc.fixed"),
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
        source=Source(_SUPERGLUE_PATH, "wic"),
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
        source=Source(_SUPERGLUE_PATH, "multirc"),
    ),
    Task(
        name="copa",
        prompt="{premise|no_period} {question}",
        words={"question": {"effect": "so", "cause": "because"}},
        candidates={"choice1": " {choice1|lower_first}", "choice2": " {choice2|lower_first}"},
        objective="lm",
        calibration="{question}",
        source=Source(_SUPERGLUE_PATH, "copa"),
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
        source=Source(_SUPERGLUE_PATH, "record"),
    ),
)


QA = (
    Task(
        name="piqa",
        prompt="Question: {goal|strip}\nAnswer:",
        candidates={"0": " {sol1|strip}", "1": " {sol2|strip}"},
        objective="lm",
        # The hub keeps a loading script, which `datasets` no longer runs, beside its own conversion.
        source=Source("ybisk/piqa", revision="refs/convert/parquet"),
    ),
    Task(
        name="siqa",
        prompt="Question: {context|strip} {question|strip}\nAnswer:",
        candidates={"1": " {answerA|strip}", "2": " {answerB|strip}", "3": " {answerC|strip}"},
        objective="lm",
        # A copy of allenai/social_i_qa, which is kept as a loading script.
        source=Source("lighteval/siqa"),
    ),
    Task(
        name="aqua",
        prompt="Question: {question|strip}\nAnswer:",
        # Ours: neither paper gives a prompt for it.
        candidates=ListCandidates(
            "options", text=" @option", slot="@option", filter="option", names=("A", "B", "C", "D", "E")
        ),
        objective="lm",
        label="correct",
        source=Source("deepmind/aqua_rat", "raw"),
    ),
)


READING = (
    Task(
        name="squad",
        prompt="Title: {title}\nContext: {context}\nQuestion: {question|strip}\nAnswer:",
        candidates=GeneratedAnswer("answers.text"),
        objective="lm",
        metrics=("f1", "em"),
        source=Source("rajpurkar/squad"),
        may_be_empty=("title",),
    ),
    Task(
        name="drop",
        prompt="Passage: {passage}\nQuestion: {question|strip}\nAnswer:",
        candidates=GeneratedAnswer("answers_spans.spans"),
        objective="lm",
        # MeZO takes the spans for alternatives; the official definition takes them together for one answer.
        metrics=("f1", "em", "drop_f1", "drop_em"),
        source=Source("ucinlp/drop"),
    ),
)


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


_CAUSAL = {task.name: task for task in (*DEMO, *GLUE, *SUPERGLUE, *TOPICS)}
_IT_WAS = "{sentence|strip} It was" + MASK + "."
_PAIR = "{premise|strip|[:-1]}?" + MASK + ", {hypothesis|strip|lc}"
_ENTAILED = {"entailment": " Yes", "neutral": " Maybe", "contradiction": " No"}


def _form(name: str, prompt: str, **words: str) -> Task:
    """A task's masked form; the labels keep their order."""
    task = _CAUSAL[name]
    assert tuple(words) == task.labels
    return replace(
        task, prompt=prompt, candidates={label: " " + word for label, word in words.items()}, calibration=None
    )


MASKED: dict[str, Task] = {
    task.name: task
    for task in (
        _form("demo", _IT_WAS, negative="terrible", positive="great"),
        _form("sst2", _IT_WAS, negative="terrible", positive="great"),
        Task(
            name="sst5",
            prompt="{text|strip} It was" + MASK + ".",
            candidates={
                "very negative": " terrible",
                "negative": " bad",
                "neutral": " okay",
                "positive": " good",
                "very positive": " great",
            },
            source=Source("SetFit/sst5", test="test"),
        ),
        _form("mnli", _PAIR, entailment="Yes", neutral="Maybe", contradiction="No"),
        Task(name="snli", prompt=_PAIR, candidates=_ENTAILED, source=Source("stanfordnlp/snli")),
        _form("rte", _PAIR, entailment="Yes", not_entailment="No"),
        _form(
            "qnli",
            "{question|strip|[:-1]}?" + MASK + ", {sentence|strip|lc}",
            entailment="Yes",
            not_entailment="No",
        ),
        _form("mrpc", "{sentence1|strip}" + MASK + ", {sentence2|strip|lc}", not_equivalent="No", equivalent="Yes"),
        _form("qqp", "{question1|strip}" + MASK + ", {question2|strip|lc}", not_duplicate="No", duplicate="Yes"),
        _form("cola", "{sentence|strip} This is" + MASK + ".", unacceptable="incorrect", acceptable="correct"),
        _form(
            "trec",
            MASK + ": {text|strip}",
            ABBR="Expression",
            ENTY="Entity",
            DESC="Description",
            HUM="Human",
            LOC="Location",
            NUM="Number",
        ),
    )
}
"""The masked forms of the built-in tasks by name. sst5 and snli have no other."""


def masked_form(task: str | Task) -> Task:
    """The form of a task that a model with a mask is shown.

    Args:
        task: Name of a built-in task, or a task; one whose prompt holds the mask is such a form already.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(task, Task):
        if task.is_masked:
            return task
        known = _CAUSAL.get(task.name)
        name = task.name if known is not None and known.prompt == task.prompt else ""
    else:
        name = task
    if name in MASKED:
        return MASKED[name]
    called = repr(task.name if isinstance(task, Task) else task)
    raise ValueError(
        f"task {called} has no prompt with a mask, which a masked language model fills in: write one with {MASK} in it,"
        f" for instance '{{text}} It was{MASK}.', or take one of {', '.join(sorted(MASKED))}"
    )
