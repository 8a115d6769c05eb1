"""A user's own task, from the keys of a YAML file."""

from collections.abc import Mapping, Sequence
from typing import Any

from smezo_pl.tasks.task import READINGS, GeneratedAnswer, ListCandidates, Loss, Reading, Task, columns_in, unknown

KEYS = {
    "prompt": "text with columns in braces",
    "candidates": "a mapping from labels to texts, a list of texts, or {column: ...} for a column that holds a list",
    "target": "column of the answer that the model generates",
    "label": "column of the label, 'label' by default",
    "label_is": "position, text or name: how the labels are read",
    "metric": "a name or a list of names",
    "objective": "classification or lm",
    "name": "the task's name",
    "words": "for a column, its values and what stands for them in the prompt",
    "may_be_empty": "columns that may be blank",
    "group": "columns that the answers to one question share",
    "calibration": "a content-free prompt",
    "max_new_tokens": "most tokens of a generated answer",
    "stop": "a text, or a list of texts, that ends a generated answer",
}
"""The keys of a task, and their values."""

_LIST_KEYS = ("column", "text", "filter", "names")
_SLOT = "\0"


def make_task(keys: Mapping[str, Any], name: str = "own") -> Task:
    r"""A task from its keys.

    Either ``candidates`` or ``target`` is required:

    - ``candidates: {0: " sports", 1: " politics"}``: for each value of the label column, the text of the answer;
    - ``candidates: [" sports", " politics"]``: the same, all labels being positions (0, 1, ...) or all texts;
    - ``candidates: [" {choice1}", " {choice2}"]`` (or a mapping): multiple choice, the texts come from columns;
    - ``candidates: {column: options}``: multiple choice, a column holds the list of texts;
    - ``target: summary``: the model generates the answer; ``answers.text`` is a field of a structured column, and a
      column that holds a list holds several references.

    Args:
        keys: The keys, see `KEYS`.
        name: The task's name if there is no key ``name``.

    Raises:
        ValueError: For an unknown or missing key, or an invalid value; the message names the key.
    """
    for key in keys:
        if key not in KEYS:
            raise unknown("task has no key", str(key), KEYS)
    prompt = _text(keys, "prompt")
    if ("candidates" in keys) == ("target" in keys):
        raise ValueError(
            "task needs either `candidates`, to choose from, or `target`, the column of an answer that the model"
            f" generates; it has {'both' if 'target' in keys else 'neither'}"
        )
    generation = "target" in keys
    if not generation and (extra := [key for key in ("max_new_tokens", "stop") if key in keys]):
        raise ValueError(f"task: {extra[0]!r} is for answers that the model generates, and this task has candidates")
    candidates = _target(keys) if generation else _candidates(keys["candidates"])
    # As in the papers: labels are classified, multiple choice and generation are trained on the gold text.
    labels = isinstance(candidates, Mapping) and not any(map(columns_in, candidates.values()))
    objective: Loss = "classification" if labels else "lm"
    return Task(
        name=str(keys.get("name", name)),
        prompt=prompt,
        candidates=candidates,
        label=str(keys.get("label", "label")),
        label_is=_label_is(keys),
        objective=keys.get("objective", objective),
        metrics=_texts(keys, "metric", ("em", "f1") if generation else ("accuracy",)),
        words=_words(keys.get("words", {})),
        may_be_empty=_texts(keys, "may_be_empty", ()),
        group=_texts(keys, "group", ()),
        calibration=_in_quotes("'calibration'", keys["calibration"]) if keys.get("calibration") is not None else None,
    )


def _candidates(value: Any) -> Mapping[str, str] | ListCandidates:
    if isinstance(value, Mapping) and "column" in value:
        for key in value:
            if key not in _LIST_KEYS:
                raise unknown("task: candidates from a column have no key", str(key), _LIST_KEYS)
        return ListCandidates(
            str(value["column"]),
            text=_in_quotes("the text of an option", value.get("text", " {option}")).replace("{option}", _SLOT),
            slot=_SLOT,
            filter=value.get("filter"),
            names=tuple(str(name) for name in value.get("names", ())),
        )
    if isinstance(value, Mapping):
        labels, texts = [str(label) for label in value], list(value.values())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        # The label of a listed candidate is its text, or its index where the text comes from columns.
        labels = [str(index) if "{" in str(text) else str(text).strip() for index, text in enumerate(value)]
        texts = list(value)
    else:
        raise ValueError(f"task: candidates must be {KEYS['candidates']}; got {value!r}")
    texts = [_in_quotes("the text of a candidate", text) for text in texts]
    if len(set(labels)) < len(labels):
        raise ValueError(f"task: two candidates have the same label, {labels}")
    return dict(zip(labels, texts, strict=True))


def _label_is(keys: Mapping[str, Any]) -> tuple[Reading, ...]:
    listed = not isinstance(keys.get("candidates", {}), Mapping)
    if "label_is" not in keys:
        return ("position", "text") if listed else ()
    kind = keys["label_is"]
    if kind not in READINGS or (listed and kind == "name"):
        raise ValueError(
            f"task: 'label_is' must be {KEYS['label_is']}, and a list of candidates has no names; got {kind!r}"
        )
    return (kind,)


def _target(keys: Mapping[str, Any]) -> GeneratedAnswer:
    stop = _texts(keys, "stop", ("\n",))
    # As with candidates, the space before an answer belongs to the answer, and none follows a line break.
    space = "" if str(keys["prompt"]).endswith("\n") else " "
    text = f"{space}{{answer}}{stop[0] if stop else ''}"
    new_tokens = keys.get("max_new_tokens", GeneratedAnswer.max_new_tokens)
    return GeneratedAnswer(_text(keys, "target"), text, new_tokens, stop)


def _text(keys: Mapping[str, Any], key: str) -> str:
    value = keys.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"task needs {key!r}: {KEYS[key]}; got {value!r}")
    return value


def _in_quotes(what: str, text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"task: {what} must be in quotes, got {text!r} ({type(text).__name__}); YAML takes a bare Yes, No or number"
            " for something else"
        )
    return text


def _texts(keys: Mapping[str, Any], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    value = keys.get(key, default)
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"task: {key!r} must be {KEYS[key]}; got {value!r}")
    return tuple(values)


def _words(value: Any) -> dict[str, dict[str, str]]:
    if not isinstance(value, Mapping) or not all(isinstance(words, Mapping) for words in value.values()):
        raise ValueError(f"task: 'words' must be {KEYS['words']}; got {value!r}")
    return {
        str(column): {str(key): _in_quotes(f"the word for {key!r}", word) for key, word in words.items()}
        for column, words in value.items()
    }
