"""The console script ``smezo``, also ``python -m smezo_pl``."""

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name

from smezo_pl import __version__
from smezo_pl.commands import SUBCOMMANDS

_HELP = """\
usage: smezo SUBCOMMAND [--config FILE] [--GROUP.KEY VALUE ...]

Sparse MeZO: fine-tune language models with forward passes alone.

subcommands:
{subcommands}

examples:
  smezo fit --config configs/sst2.yaml --model.pretrained facebook/opt-1.3b
  smezo fit --config configs/sst2.yaml --model.optimizer.lr 1e-5 --trainer.max_steps 500
  smezo test --config runs/sst2/version_0/config.yaml --ckpt_path runs/sst2/version_0/checkpoints/last.ckpt
  smezo fit --print_config > mine.yaml

`smezo SUBCOMMAND --help` lists the keys of a subcommand, `smezo fit --model.optimizer.help` those of the optimizer."""


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand; ``args`` are what follows ``smezo``, None for those of the command line."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help", "help"):
        lines = (f"  {name:<11}{summary}" for name, (_, summary) in SUBCOMMANDS.items())
        print(_HELP.format(subcommands="\n".join(lines)))
        return
    if args[0] == "--version":
        print(f"smezo_pl {__version__}")
        return
    if args[0] not in SUBCOMMANDS:
        near = get_close_matches(args[0], SUBCOMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        names = ", ".join(SUBCOMMANDS)
        print(f"smezo: error: unknown subcommand {args[0]!r}{hint} Subcommands are {names}", file=sys.stderr)
        sys.exit(2)
    try:
        resolve_name(f"smezo_pl.{SUBCOMMANDS[args[0]][0]}")(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # `smezo show ... | head` has read enough; Python would complain once more when it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # What the package raises on purpose is for the user to read.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        mistakes = (AssertionError, AttributeError, LookupError, NameError, NotImplementedError)
        on_purpose = raised_in.is_relative_to(Path(__file__).parent) and not isinstance(error, mistakes)
        resume = getattr(error, "resume_command", None)
        if os.environ.get("SMEZO_TRACEBACK") or not on_purpose:
            if resume is None:
                raise
            traceback.print_exc()
        else:
            print(f"smezo: error: {error}\n(SMEZO_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        if resume is not None:
            print(f"to resume:\n{resume}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
