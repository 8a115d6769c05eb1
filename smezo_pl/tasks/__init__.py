"""Tasks as data: prompts, candidates, labels, metrics and where the datasets come from."""

from smezo_pl.tasks.builtin import MASKED, TASKS, get_task, masked_form
from smezo_pl.tasks.custom import make_task
from smezo_pl.tasks.example import Example, make_example
from smezo_pl.tasks.labels import LabelReading
from smezo_pl.tasks.task import GeneratedAnswer, ListCandidates, Loss, Source, Task
from smezo_pl.tasks.text import ExampleError

__all__ = [
    "MASKED",
    "TASKS",
    "Example",
    "ExampleError",
    "GeneratedAnswer",
    "LabelReading",
    "ListCandidates",
    "Loss",
    "Source",
    "Task",
    "get_task",
    "make_example",
    "make_task",
    "masked_form",
]
