"""Every built-in task: a row in the dataset's columns, from its file to the text that the model reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from smezo_pl import PromptDataModule
from smezo_pl.tasks import TASKS, get_task, make_example
from smezo_pl.tasks.task import columns_in


class Case(NamedTuple):
    task: str
    row: dict[str, Any]
    prompt: str
    candidates: tuple[str, ...]
    label: int
    correct: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None


CASES = [
    Case(
        "demo",
        {"sentence": "The plot was superb.", "label": 1},
        "The plot was superb. It was",
        (" terrible", " great"),
        1,
    ),
    Case(
        "sst2",
        {"sentence": "contains no wit , only labored gags ", "label": 0},
        "contains no wit , only labored gags It was",
        (" terrible", " great"),
        0,
    ),
    Case(
        "rte",
        {"premise": "It rained.", "hypothesis": "It was dry.", "label": 1},
        'It rained.\nDoes this mean that "It was dry." is true? Yes or No?\n',
        ("Yes", "No"),
        1,
    ),
    Case(
        "cb",
        {"premise": "It was a complex language.", "hypothesis": "the language was peeled down", "label": 2},
        'Suppose It was a complex language. Can we infer that "the language was peeled down"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        2,
    ),
    Case(
        "boolq",
        {"passage": "Onyx -- A stone.", "question": "is there such a thing as green onyx", "label": 1},
        "Onyx -- A stone. Is there such a thing as green onyx?\n",
        ("No", "Yes"),
        1,
    ),
    Case(
        "wsc",
        {"text": "Mark told Pete lies. He was sad.", "span1_text": "Mark", "span2_text": "He", "label": 0},
        'Mark told Pete lies. He was sad.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n',
        ("No", "Yes"),
        0,
    ),
    Case(
        "wic",
        {"word": "place", "sentence1": "Come to my place.", "sentence2": "No place for it.", "label": 0},
        'Does the word "place" have the same meaning in these two sentences? Yes, No?\n'
        "Come to my place.\nNo place for it.\n",
        ("No", "Yes"),
        0,
    ),
    Case(
        "multirc",
        {"paragraph": "A force acts.", "question": "What acts? ", "answer": "A force", "label": 1},
        'A force acts.\nQuestion: What acts?\nI found this answer "A force". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    Case(
        "copa",
        {
            "premise": "My body cast a shadow over the grass. ",
            "choice1": "The sun was rising.",
            "choice2": "I cut the Grass. ",
            "question": "cause",
            "label": 0,
        },
        "My body cast a shadow over the grass because",
        (" the sun was rising.", " I cut the Grass."),
        0,
    ),
    Case(
        "copa",
        {"premise": "It rained", "choice1": "A b.", "choice2": "C d.", "question": "effect", "label": 1},
        "It rained so",
        (" a b.", " c d."),
        1,
    ),
    Case(
        "record",
        {
            "passage": "Chelsea beat Ljubljana.\n@highlight\nMourinho was happy\n@highlight\nCech was not",
            "query": "He said that @placeholder made it difficult for @placeholder.",
            "entities": ["Chelsea", "Ljubljana", "Mourinho", "Chelsea"],
            "answers": ["Ljubljana", "Chelsea"],
        },
        "Chelsea beat Ljubljana.\n- Mourinho was happy\n- Cech was not\n-",
        (
            " He said that Chelsea made it difficult for Chelsea.",
            " He said that Ljubljana made it difficult for Ljubljana.",
            " He said that Mourinho made it difficult for Mourinho.",
        ),
        1,
        (0, 1),
    ),
    Case(
        "mnli",
        {"premise": "It rained.", "hypothesis": "It was dry.", "label": 2},
        'It rained.\nDoes this mean that "It was dry." is true? Yes, No or Maybe?\n',
        ("Yes", "Maybe", "No"),
        2,
    ),
    Case(
        "qnli",
        {"question": "Who was first?", "sentence": "Ann was first.", "label": 0},
        "Passage: Ann was first.\nQuestion: Who was first?\nIs it possible to answer this question"
        " based only on the information in the passage? Yes or No?\n",
        ("Yes", "No"),
        0,
    ),
    Case(
        "mrpc",
        {"sentence1": "Ann won .", "sentence2": "It was Ann who won .", "label": 1},
        "Ann won . It was Ann who won . Is the second sentence a paraphrase of the first?\n",
        ("No", "Yes"),
        1,
    ),
    Case(
        "qqp",
        {"question1": "Who won?", "question2": "Who was first?", "label": 0},
        "Who won? Who was first? Is the second sentence a paraphrase of the first?\n",
        ("No", "Yes"),
        0,
    ),
    Case(
        "cola",
        {"sentence": "Which boy's, mother, did you meet?", "label": 0},
        "Which boy's, mother, did you meet? This is",
        (" incorrect", " correct"),
        0,
    ),
    Case(
        "trec",
        {"text": "How far is it ?", "coarse_label": 1},
        "Question: How far is it ?\nType:",
        (" Abbreviation", " Entity", " Description", " Human", " Location", " Number"),
        5,
        # Another order than the hub's: the name counts, not the number.
        names=("DESC", "NUM", "ABBR", "HUM", "LOC", "ENTY"),
    ),
    Case(
        "piqa",
        {"goal": "open a jar ", "sol1": "twist the lid", "sol2": " shout at it ", "label": 0},
        "Question: open a jar\nAnswer:",
        (" twist the lid", " shout at it"),
        0,
    ),
    Case(
        "siqa",
        {
            "context": "Ann met Bob.",
            "question": "How does Ann feel?",
            "answerA": "glad",
            "answerB": "sad",
            "answerC": "tired",
            "label": "2",
        },
        "Question: Ann met Bob. How does Ann feel?\nAnswer:",
        (" glad", " sad", " tired"),
        1,
    ),
    Case(
        "aqua",
        {
            "question": "What is 20 + 1?",
            "options": ["A)21", "B)21.5", "C)22", "D)22.5", "E)23"],
            "correct": "C",
        },
        "Question: What is 20 + 1?\nAnswer:",
        (" 21", " 21.5", " 22", " 22.5", " 23"),
        2,
    ),
    Case(
        "squad",
        {
            "title": "1973_oil_crisis",
            "context": "It began in October 1973.",
            "question": " When did it begin? ",
            "answers": {"text": ["October 1973", "in October 1973", "October 1973"], "answer_start": [12, 9, 12]},
        },
        "Title: 1973_oil_crisis\nContext: It began in October 1973.\nQuestion: When did it begin?\nAnswer:",
        (" October 1973\n",),
        0,
    ),
    Case(
        "drop",
        {
            "passage": "They won 3 games.",
            "question": "How many?",
            "answers_spans": {"spans": ["3", "three games"], "types": ["number", "span"]},
        },
        "Passage: They won 3 games.\nQuestion: How many?\nAnswer:",
        (" 3\n",),
        0,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_prompt_and_candidates(case: Case) -> None:
    example = make_example(get_task(case.task), case.row, label_names=case.names)
    assert (example.prompt, example.candidates) == (case.prompt, case.candidates)
    assert (example.label, example.correct) == (case.label, case.correct or (case.label,))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)
def test_a_row_of_a_file_is_read_as_that_text(
    case: Case, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The local folder and split are the task's own; the tokens are decoded again."""
    task = get_task(case.task)
    assert task.source is not None
    label = {task.label: case.names[case.row[task.label]]} if case.names else {}
    folder = tmp_path / (task.source.folder or task.name)
    folder.mkdir()
    file = folder / f"{task.source.test}.parquet"
    pq.write_table(pa.Table.from_pylist([{**case.row, **label}]), file)
    files = {"test_file": str(file)} if task.source.path is None else {"data_dir": tmp_path}
    data = PromptDataModule(case.task, tokenizer=tiny_tokenizer, **files)
    [encoded] = data.encoded("test")
    prompt = tiny_tokenizer.decode(list(encoded.prompt), clean_up_tokenization_spaces=False)
    assert prompt == "<s>" + case.prompt
    assert tuple(tiny_tokenizer.decode(list(tokens)) for tokens in encoded.candidates) == case.candidates
    assert encoded.label == case.label
    assert tuple(encoded.generated_after) == (encoded.prompt if task.is_generation else ())


def test_every_task_is_written_out() -> None:
    assert {case.task for case in CASES} == set(TASKS)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_labels_are_classified_and_texts_are_trained_on(task: Any) -> None:
    labels = isinstance(task.candidates, Mapping) and not any(map(columns_in, task.candidate_templates))
    assert task.objective == ("classification" if labels else "lm")


@pytest.mark.parametrize(("name", "rows"), [("cb", 250), ("copa", 400), ("wsc", 554)])
def test_small_training_splits_are_used_whole(name: str, rows: int) -> None:
    assert TASKS[name].num_train + TASKS[name].num_dev == rows
    assert TASKS["sst2"].num_train + TASKS["sst2"].num_dev > rows
