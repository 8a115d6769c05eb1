"""The console script ``smezo``, also ``python -m smezo_pl``."""

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from smezo_pl import __version__
from smezo_pl.commands import VERBS

_HELP = """\
usage: smezo VERB [--config FILE] [--GROUP.KEY VALUE ...]

Sparse MeZO: fine-tune language models from forward passes alone.

verbs:
{verbs}

examples:
  smezo fit --config configs/sst2.yaml --model.pretrained facebook/opt-1.3b
  smezo fit --config configs/sst2.yaml --model.optimizer.lr 1e-5 --trainer.max_steps 500
  smezo test --config runs/sst2/version_0/config.yaml --ckpt_path runs/sst2/version_0/checkpoints/last.ckpt
  smezo fit --print_config > mine.yaml

`smezo VERB --help` lists every key of a verb, `smezo fit --model.optimizer.help` those of the optimizer."""


def main(args: Sequence[str] | None = None) -> None:
    """Run a verb.

    Args:
        args: The words after ``smezo``; None: those of the command line.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS)) + 3
        print(_HELP.format(verbs="\n".join(f"  {name:<{width}}{verb.summary}" for name, verb in VERBS.items())))
        return
    if words[0] == "--version":
        print(f"smezo_pl {__version__}")
        return
    verb = VERBS.get(words[0])
    if verb is None:
        near = get_close_matches(words[0], VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"smezo: error: there is no verb {words[0]!r}{hint} The verbs are {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    try:
        getattr(import_module(verb.module), verb.function)(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # `smezo show ... | head` has read enough; Python would complain once more when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("SMEZO_TRACEBACK") or not _is_message(error):
            raise
        print(f"smezo: error: {error}\n(SMEZO_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        sys.exit(1)


def _is_message(error: Exception) -> bool:
    """Whether the package raised it to say something, rather than by mistake."""
    mistakes = (AssertionError, AttributeError, LookupError, NameError, NotImplementedError)
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
    return ours and not isinstance(error, mistakes)


if __name__ == "__main__":
    main()
