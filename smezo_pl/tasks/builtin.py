"""The built-in tasks, with the prompts and verbalizers of MeZO (https://arxiv.org/abs/2305.17333, appendix E)."""

from dataclasses import replace
from difflib import get_close_matches
from functools import partial

from smezo_pl.tasks.task import MASK, GeneratedAnswer, ListCandidates, Source, Task

# A mapping's order is the dataset's own, so where a file has no names a number is a position in it.
_ordered = partial(Task, label_is=("name", "position", "text"))
_glue = partial(Source, "nyu-mll/glue")
_superglue = partial(Source, "aps/super_glue")
_sentiment = partial(
    _ordered,
    prompt="{sentence|strip} It was",
    candidates={"negative": " terrible", "positive": " great"},
    calibration="It was",
)
_NO_YES = {"False": "No", "True": "Yes"}
_IS_PARAPHRASE = "Is the second sentence a paraphrase of the first?\n"

_CAUSAL = (
    # Dev and test are about other subjects in other words than the training sentences.
    _sentiment("demo", source=Source(dev="validation", test="test")),
    # GLUE
    _sentiment("sst2", source=_glue("sst2")),
    _ordered(
        name="mnli",
        prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes, No or Maybe?\n',
        candidates={"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
        calibration="",
        source=_glue("mnli", test="validation_matched"),
    ),
    _ordered(
        name="qnli",
        prompt=(
            "Passage: {sentence}\nQuestion: {question|strip}\nIs it possible to answer this question"
            " based only on the information in the passage? Yes or No?\n"
        ),
        candidates={"entailment": "Yes", "not_entailment": "No"},
        calibration="",
        source=_glue("qnli"),
    ),
    _ordered(
        name="mrpc",
        prompt="{sentence1} {sentence2} " + _IS_PARAPHRASE,
        candidates={"not_equivalent": "No", "equivalent": "Yes"},
        metrics=("accuracy", "f1"),
        calibration="",
        source=_glue("mrpc"),
    ),
    _ordered(
        name="qqp",
        prompt="{question1} {question2} " + _IS_PARAPHRASE,
        candidates={"not_duplicate": "No", "duplicate": "Yes"},
        metrics=("accuracy", "f1"),
        calibration="",
        source=_glue("qqp"),
        # A few questions of the official dataset are blank.
        may_be_empty=("question1", "question2"),
    ),
    _ordered(
        name="cola",
        prompt="{sentence} This is",
        candidates={"unacceptable": " incorrect", "acceptable": " correct"},
        metrics=("matthews", "accuracy"),
        calibration="This is",
        source=_glue("cola"),
    ),
    # SuperGLUE
    _ordered(
        name="rte",
        prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        candidates={"entailment": "Yes", "not_entailment": "No"},
        calibration="",
        source=_superglue("rte"),
    ),
    _ordered(
        name="cb",
        prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        candidates={"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
        metrics=("accuracy", "f1_macro"),
        calibration="",
        source=_superglue("cb"),
        # The training split holds 250.
        num_train=150,
        num_dev=100,
    ),
    _ordered(
        name="boolq",
        prompt="{passage} {question|question}\n",
        candidates=_NO_YES,
        calibration="",
        source=_superglue("boolq"),
    ),
    _ordered(
        name="wsc",
        prompt=(
            '{text}\nIn the previous sentence, does the pronoun "{span2_text|lower}" refer to {span1_text}?'
            " Yes or No?\n"
        ),
        candidates=_NO_YES,
        calibration="",
        source=_superglue("wsc.fixed", folder="wsc.fixed"),
        # The training split holds 554, and MeZO's scripts take 500 of them for dev.
        num_train=54,
        num_dev=500,
    ),
    _ordered(
        name="wic",
        prompt=(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
        ),
        candidates=_NO_YES,
        calibration="",
        source=_superglue("wic"),
    ),
    _ordered(
        name="multirc",
        prompt=(
            '{paragraph}\nQuestion: {question|strip}\nI found this answer "{answer}". Is that correct? Yes or No?\n'
        ),
        candidates=_NO_YES,
        calibration="",
        metrics=("accuracy", "f1a", "em"),
        group=("paragraph", "question"),
        source=_superglue("multirc"),
    ),
    _ordered(
        name="copa",
        prompt="{premise|no_period} {question}",
        words={"question": {"effect": "so", "cause": "because"}},
        candidates={"choice1": " {choice1|lower_first}", "choice2": " {choice2|lower_first}"},
        objective="lm",
        calibration="{question}",
        source=_superglue("copa"),
        # The training split holds 400.
        num_train=300,
        num_dev=100,
    ),
    Task(
        name="record",
        prompt="{passage|bullets}\n-",
        candidates=ListCandidates("entities", text=" {query|strip}", slot="@placeholder"),
        label="answers",
        label_is=("text",),
        objective="lm",
        metrics=("accuracy", "f1", "em"),
        calibration="-",
        source=_superglue("record"),
    ),
    # Topics
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
        metrics=("accuracy", "f1_macro"),
        calibration="Type:",
        # It has no validation split; the hub keeps a loading script beside its own conversion.
        source=Source("CogComp/trec", revision="refs/convert/parquet", test="test"),
    ),
    # Multiple choice
    Task(
        name="piqa",
        prompt="Question: {goal|strip}\nAnswer:",
        candidates={"0": " {sol1|strip}", "1": " {sol2|strip}"},
        objective="lm",
        # The hub keeps a loading script beside its own conversion.
        source=Source("ybisk/piqa", revision="refs/convert/parquet"),
    ),
    Task(
        name="siqa",
        prompt="Question: {context|strip} {question|strip}\nAnswer:",
        candidates={"1": " {answerA|strip}", "2": " {answerB|strip}", "3": " {answerC|strip}"},
        objective="lm",
        # A copy of allenai/social_i_qa, which is stored as a loading script.
        source=Source("lighteval/siqa"),
    ),
    Task(
        name="aqua",
        # This package's own prompt: neither paper gives one.
        prompt="Question: {question|strip}\nAnswer:",
        candidates=ListCandidates(
            "options", text=" @option", slot="@option", filter="option", names=("A", "B", "C", "D", "E")
        ),
        objective="lm",
        label="correct",
        label_is=("name",),
        source=Source("deepmind/aqua_rat", "raw"),
    ),
    # Generation
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
        # MeZO takes the spans as alternatives; the official definition takes them together as one answer.
        metrics=("f1", "em", "drop_f1", "drop_em"),
        source=Source("ucinlp/drop"),
    ),
)

_IT_WAS = "{sentence|strip} It was" + MASK + "."
_ENTAILS = "{premise|strip|[:-1]}?" + MASK + ", {hypothesis|strip|lc}"

_MASKED_FORMS = {
    "demo": (_IT_WAS, "terrible", "great"),
    "sst2": (_IT_WAS, "terrible", "great"),
    "mnli": (_ENTAILS, "Yes", "Maybe", "No"),
    "rte": (_ENTAILS, "Yes", "No"),
    "qnli": ("{question|strip|[:-1]}?" + MASK + ", {sentence|strip|lc}", "Yes", "No"),
    "mrpc": ("{sentence1|strip}" + MASK + ", {sentence2|strip|lc}", "No", "Yes"),
    "qqp": ("{question1|strip}" + MASK + ", {question2|strip|lc}", "No", "Yes"),
    "cola": ("{sentence|strip} This is" + MASK + ".", "incorrect", "correct"),
    "trec": (MASK + ": {text|strip}", "Expression", "Entity", "Description", "Human", "Location", "Number"),
}
"""Prompt of a task for masked language models, and a word for each of its labels in their order."""

_MASKED_ONLY = (
    _ordered(
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
    _ordered(
        name="snli",
        prompt=_ENTAILS,
        candidates={"entailment": " Yes", "neutral": " Maybe", "contradiction": " No"},
        source=Source("stanfordnlp/snli"),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _CAUSAL}
"""The built-in tasks for causal language models by name."""


def _masked(task: Task, prompt: str, *words: str) -> Task:
    candidates = {label: " " + word for label, word in zip(task.labels, words, strict=True)}
    return replace(task, prompt=prompt, candidates=candidates, calibration=None)


MASKED: dict[str, Task] = {name: _masked(TASKS[name], *form) for name, form in _MASKED_FORMS.items()}
MASKED |= {task.name: task for task in _MASKED_ONLY}
"""The built-in tasks for masked language models by name. sst5 and snli have no causal form."""


def get_task(name: str) -> Task:
    """The built-in task of that name, in its causal form where it has one.

    Raises:
        ValueError: If there is none; the message names similar ones and lists all.
    """
    known = {**MASKED, **TASKS}
    if name in known:
        return known[name]
    near = get_close_matches(name.lower().replace("-", "").replace("_", ""), TASKS, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(f"unknown task {name!r}{hint} Choose from {', '.join(sorted(known))}")


def masked_form(task: Task) -> Task:
    """The form of a task that a masked language model is shown: the task itself if its prompt holds the mask.

    Raises:
        ValueError: If there is none.
    """
    if task.is_masked:
        return task
    causal = TASKS.get(task.name)
    if task.name in MASKED and causal is not None and causal.prompt == task.prompt:
        return MASKED[task.name]
    raise ValueError(
        f"task {task.name!r} has no prompt with a mask, which a masked language model predicts: write one with {MASK}"
        f" in it, for instance '{{text}} It was{MASK}.', or take one of {', '.join(sorted(MASKED))}"
    )
