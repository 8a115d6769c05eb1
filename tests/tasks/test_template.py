import pytest

from smezo_pl.tasks.task import FILTERS, Template


def test_columns_are_named_once_in_order() -> None:
    assert Template("{b} {a|strip} {b|lower}").columns == ("b", "a")


def test_braces_in_a_value_are_text() -> None:
    assert Template("<{a}>").render({"a": "{b} {{c}}"}) == "<{b} {{c}}>"


def test_doubled_braces_are_braces() -> None:
    template = Template("{{{a}}} {{b}}")
    assert template.columns == ("a",)
    assert template.render({"a": "x"}) == "{x} {b}"


def test_filters_apply_from_left_to_right() -> None:
    assert Template("{a|strip|lower}").render({"a": " AB "}) == "ab"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("strip", " a b\n", "a b"),
        ("lower", "He", "he"),
        ("question", " is it so", "Is it so?"),
        ("question", "is it so?", "Is it so?"),
        ("question", "is it so ??", "Is it so?"),
        ("question", "", "?"),
        ("lower_first", "The sun rose.", "the sun rose."),
        ("lower_first", "I saw It.", "I saw It."),
        ("lower_first", "I'm Here.", "i'm Here."),
        ("no_period", "It rained. ", "It rained"),
        ("no_period", "It rained..", "It rained."),
        ("no_period", "It rained!", "It rained!"),
        ("bullets", "A.\n@highlight\nB\n@highlight\nC", "A.\n- B\n- C"),
        ("option", "A)21", "21"),
        ("option", "B ) 3.5 m", "3.5 m"),
        ("option", "(21)", "(21)"),
    ],
)
def test_filter(name: str, text: str, expected: str) -> None:
    assert FILTERS[name](text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a { b", r"has a lone '\{' at 2"),
        ("a } b", r"has a lone '\}' at 2"),
        ("a {} b", "has braces without a column name"),
        ("{a|shout}", "unknown filter 'shout'; there are strip, lower"),
    ],
)
def test_bad_template(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template(text)
