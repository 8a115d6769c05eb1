import pytest

from smezo_pl.tasks import MASKED, TASKS, Task, get_task, make_example, make_task, masked_form

SINGLE = "a fine film, though long "
THREE = ["Yes", "Maybe", "No"]
FIVE = ["terrible", "bad", "okay", "good", "great"]
PREMISE, HYPOTHESIS = "The dog ran home.", "An animal moved."


@pytest.mark.parametrize(
    ("name", "row", "text", "words"),
    [
        ("demo", {"sentence": SINGLE}, "a fine film, though long It was<mask>.", ["terrible", "great"]),
        ("sst2", {"sentence": SINGLE}, "a fine film, though long It was<mask>.", ["terrible", "great"]),
        (
            "sst5",
            {"text": SINGLE},
            "a fine film, though long It was<mask>.",
            ["terrible", "bad", "okay", "good", "great"],
        ),
        ("cola", {"sentence": "He go."}, "He go. This is<mask>.", ["incorrect", "correct"]),
        (
            "trec",
            {"text": "Who ran ?"},
            "<mask>: Who ran ?",
            ["Expression", "Entity", "Description", "Human", "Location", "Number"],
        ),
        *(
            (
                name,
                {"premise": PREMISE, "hypothesis": HYPOTHESIS},
                "The dog ran home?<mask>, an animal moved.",
                words,
            )
            for name, words in (
                ("mnli", ["Yes", "Maybe", "No"]),
                ("snli", ["Yes", "Maybe", "No"]),
                ("rte", ["Yes", "No"]),
            )
        ),
        (
            "qnli",
            {"question": "Who ran home?", "sentence": "The dog did."},
            "Who ran home?<mask>, the dog did.",
            ["Yes", "No"],
        ),
        (
            "mrpc",
            {"sentence1": "A dog ran.", "sentence2": "The dog ran."},
            "A dog ran.<mask>, the dog ran.",
            ["No", "Yes"],
        ),
        (
            "qqp",
            {"question1": "Who ran?", "question2": "Which dog ran?"},
            "Who ran?<mask>, which dog ran?",
            ["No", "Yes"],
        ),
    ],
)
def test_prompts_and_words(name: str, row: dict[str, str], text: str, words: list[str]) -> None:
    task = MASKED[name]
    label = task.labels[1]
    example = make_example(task, {**row, task.label: label, "idx": 0})
    assert (example.prompt, example.label) == (text, 1)
    assert example.candidates == tuple(" " + word for word in words)


def test_a_masked_form_has_its_tasks_labels_and_data() -> None:
    assert set(MASKED) >= {"sst2", "sst5", "mnli", "snli", "rte", "qnli", "qqp", "mrpc", "cola", "trec"}
    for name, task in MASKED.items():
        assert task.is_masked and task.objective == "classification"
        if name in TASKS:
            assert (task.labels, task.source, task.label) == (TASKS[name].labels, TASKS[name].source, TASKS[name].label)
            assert not TASKS[name].is_masked
            assert masked_form(TASKS[name]) is task
    assert get_task("sst5") is MASKED["sst5"] and get_task("sst2") is TASKS["sst2"]


def test_an_own_task_with_a_mask() -> None:
    task = make_task({"prompt": "{title} In short:<mask>.", "candidates": [" sports", " politics"]})
    assert task.is_masked and masked_form(task) is task
    assert make_example(task, {"title": "Goal!", "label": 1}).prompt == "Goal! In short:<mask>."


def test_a_task_without_a_mask_has_no_masked_form() -> None:
    with pytest.raises(
        ValueError, match="task 'copa' has no prompt with a mask.*write one with <mask> in it.*cola, demo"
    ):
        masked_form(TASKS["copa"])
    own = make_task({"name": "sst2", "prompt": "{text} is", "candidates": [" good", " bad"]})
    with pytest.raises(ValueError, match="task 'sst2' has no prompt with a mask"):
        masked_form(own)


def test_prompts_that_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt must hold <mask> once at most, got 'a<mask> {b}<mask>'"):
        Task(name="two", prompt="a<mask> {b}<mask>", candidates={"0": " x", "1": " y"})
    with pytest.raises(ValueError, match="'lm' has <mask> in its prompt: its candidates must be a word for each label"):
        Task(name="lm", prompt="{b}<mask>", candidates={"0": " x", "1": " y"}, objective="lm")
    with pytest.raises(ValueError, match="'qa' has <mask> in its prompt"):
        make_task({"name": "qa", "prompt": "{b}<mask>", "target": "c"})
