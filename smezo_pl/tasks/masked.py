"""Prompts with a mask, for models that fill one in: LM-BFF's templates and label words, as in MeZO's experiments.

The template holds the mask where the label word belongs. A label word follows a space and is one token.
"""

from dataclasses import replace

from smezo_pl.tasks.demo import DEMO
from smezo_pl.tasks.glue import GLUE
from smezo_pl.tasks.superglue import SUPERGLUE
from smezo_pl.tasks.task import MASK, Source, Task
from smezo_pl.tasks.topics import TOPICS

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
