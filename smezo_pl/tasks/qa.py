"""Multiple choice whose candidates are columns of the data set. The tasks that Sparse MeZO adds to MeZO's.

The papers name neither prompts nor objectives for them; like COPA they are trained on the right choice's tokens alone.
"""

from smezo_pl.tasks.task import ListCandidates, Source, Task

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
