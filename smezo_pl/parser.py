"""The command line's parser: an error names the key, the value and what is allowed, and the nearest known name."""

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from smezo_pl.optim import SparseMeZO

# How jsonargparse names an unknown key: on the command line, in a file, in the arguments of a class.
_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|accept option '|Option ')([\w.+-]+)")

# What it says around an error in the arguments of a class: the type's full name, and the value a second time.
_AROUND = re.compile(r"Type \S*Callable\[.*?\] expects a function or a callable class: |\.* Got value: Namespace\(.*\)")

# Of a value that may be of several types it lists the types twice.
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: .*\s+Errors:\s+- (?P<errors>(?:.|\s)*?)\s+"
    r"Given value type: .*\s+Given value: (?P<value>.*)"
)
_REQUIRED = re.compile(r"the following arguments are required: (?P<keys>.*)")


class SuggestingParser(LightningArgumentParser):
    """Lightning's parser, whose errors name the nearest known key instead of all of the Trainer's hundred options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        message = readable(message)
        hint = suggestion(message, known_keys(self))
        program = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
        if required := _REQUIRED.match(message):  # where the keys begin with the subcommand
            subcommand = required["keys"].partition(".")[0]
            keys = (f"--{key.strip().removeprefix(subcommand + '.')}" for key in required["keys"].split(","))
            message, program = f"{', '.join(keys)} must be given", f"smezo {subcommand}"
        self.exit(2, f"smezo: error: {message}{hint}\n`{program} --help` lists all keys\n")


def readable(message: str) -> str:
    """An error of jsonargparse without Python's names of types, each allowed value once."""
    message = _UNION.sub(_either, message)
    message = re.sub(r"(?:a )?typing\.Literal\[(.*?)\]", r"one of \1", _AROUND.sub("", message))
    return re.sub(r"(?:a )?<class '([\w.]+)'>", lambda found: "null" if found[1] == "NoneType" else found[1], message)


def _either(found: re.Match[str]) -> str:
    """What is wrong within the type that was meant; where none was, all types."""
    parts = [part.strip() for part in re.split(r"\n\s*- ", found["errors"])]
    if reasons := [part.rstrip(".") for part in parts if not part.startswith("Expected ")]:
        return "; ".join(reasons)
    types = " or ".join(part.removeprefix("Expected a ") for part in parts)
    return f"Expected a {types}. Got value: {found['value']}"


def known_keys(parser: ArgumentParser) -> set[str]:
    """Every dotted key that a configuration may hold, those of the optimizer and of all subcommands included."""
    keys = {action.dest for action in parser._actions} - {"help", "subcommand"}
    for action in parser._actions:
        if isinstance(action.choices, dict):  # of subcommands
            keys.update(*(known_keys(choice) for choice in action.choices.values()))
    return keys | {f"model.optimizer.{name}" for name in inspect.signature(SparseMeZO).parameters if name != "params"}


def suggestion(message: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` for an unknown key, or a value that is nearly an allowed one; otherwise empty."""
    if unknown := _UNKNOWN.search(message):
        key = unknown[1].replace(".init_args.", ".")
        options = {name if "." in key else name.rpartition(".")[2]: name for name in sorted(known)}
    elif value := re.search(r"Expected one of (.*)\. Got value: (.*)", message):
        key, options = value[2], {name: name for name in re.findall(r"'([^']*)'", value[1])}
    else:
        return ""
    near = get_close_matches(key, options, n=1, cutoff=0.6)
    return f"; did you mean {options[near[0]]!r}?" if near else ""
