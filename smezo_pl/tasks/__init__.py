"""Tasks as data: prompts, candidates, labels and where the data sets lie. Scoring of a batch."""

from difflib import get_close_matches

from smezo_pl.tasks.builtin import DEMO, GLUE, MASKED, QA, READING, SUPERGLUE, TOPICS, masked_form
from smezo_pl.tasks.custom import make_task as make_task
from smezo_pl.tasks.example import Example, ExampleError, make_example
from smezo_pl.tasks.task import GeneratedAnswer, ListCandidates, Loss, Source, Task

TASKS: dict[str, Task] = {task.name: task for task in (*DEMO, *GLUE, *SUPERGLUE, *TOPICS, *QA, *READING)}
"""The built-in tasks by name."""

__all__ = [
    "MASKED",
    "TASKS",
    "Example",
    "ExampleError",
    "GeneratedAnswer",
    "ListCandidates",
    "Loss",
    "Source",
    "Task",
    "get_task",
    "make_example",
    "make_task",
    "masked_form",
]


def get_task(name: str) -> Task:
    """The built-in task of that name.

    Raises:
        ValueError: If there is none; the message says which names are near and which there are.
    """
    # A few have a prompt with a mask alone.
    known = {**MASKED, **TASKS}
    if name in known:
        return known[name]
    near = get_close_matches(name.lower().replace("-", "").replace("_", ""), TASKS, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(f"unknown task {name!r}{hint} There are {', '.join(sorted(known))}")
