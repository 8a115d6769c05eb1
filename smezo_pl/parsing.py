"""A parser that answers a misspelt key with the nearest known one."""

import inspect
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from smezo_pl.optim import SparseMeZO

# How jsonargparse names a key that it does not know: on the command line, in a group of a file, in a class's arguments.
_UNKNOWN = (
    re.compile(r"[Uu]nrecognized arguments: --([\w.+-]+)"),
    re.compile(r"does not accept (?:option|nested key|key) '([\w.+-]+)'"),
    re.compile(r"[Oo]ption '([\w.+-]+)' is not accepted"),
    re.compile(r"[Kk]ey [\"']?([\w.+-]+)[\"']? is not expected"),
)


# What jsonargparse says around an error in the arguments of a class: the type's full name, and the value a second time.
_AROUND = re.compile(r"Type \S*Callable\[.*?\] expects a function or a callable class: |\.* Got value: Namespace\(.*\)")


class SuggestingParser(LightningArgumentParser):
    """Lightning's parser, with short errors: what is wrong, what may have been meant, where help is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        message = _AROUND.sub("", message)
        # The usage line, which would come first, names all of the Trainer's hundred options.
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        hint = suggestion(message, known_keys(self))
        sys.stderr.write(f"smezo: error: {message}{hint}\n`{program} --help` lists all keys\n")
        self.exit(2)


def known_keys(parser: ArgumentParser) -> list[str]:
    """Every key that a configuration may hold, in dots, those of the optimizer included."""
    keys: set[str] = set()
    parsers = [parser]
    for current in parsers:
        for action in current._actions:
            if action.dest not in ("help", "subcommand"):
                keys.add(action.dest)
            # Sub-commands hold parsers of their own.
            if isinstance(choices := action.choices, dict):
                parsers.extend(p for p in choices.values() if isinstance(p, ArgumentParser) and p not in parsers)
    keys |= {f"model.optimizer.{name}" for name in inspect.signature(SparseMeZO).parameters if name != "params"}
    return sorted(keys)


def suggestion(message: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` for an error about an unknown key, else nothing."""
    for pattern in _UNKNOWN:
        if found := pattern.search(message):
            key = found.group(1).replace(".init_args.", ".")
            by_last = {name.rpartition(".")[2]: name for name in known}
            options = {name: name for name in known} if "." in key else by_last
            near = get_close_matches(key, options, n=1, cutoff=0.6)
            return f"; did you mean {options[near[0]]!r}?" if near else ""
    return ""
