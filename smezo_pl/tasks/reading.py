"""Questions on a passage whose answer the model writes itself, with MeZO's prompts."""

from smezo_pl.tasks.task import FreeText, Source, Task

READING = (
    Task(
        name="squad",
        prompt="Title: {title}\nContext: {context}\nQuestion: {question|strip}\nAnswer:",
        candidates=FreeText("answers.text"),
        objective="lm",
        metrics=("f1", "em"),
        source=Source("rajpurkar/squad"),
        may_be_empty=("title",),
    ),
    Task(
        name="drop",
        prompt="Passage: {passage}\nQuestion: {question|strip}\nAnswer:",
        candidates=FreeText("answers_spans.spans"),
        objective="lm",
        # MeZO takes the spans for alternatives; the official definition takes them together for one answer.
        metrics=("f1", "em", "drop_f1", "drop_em"),
        source=Source("ucinlp/drop"),
    ),
)
