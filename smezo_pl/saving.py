"""A trained network as a folder in Hugging Face's format, which takes the place of no other files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Trainer

from smezo_pl import __version__

MARKER = "smezo_pl.json"
"""File of an output that names its files: these may be replaced, others may not."""


def check_output(folder: str, trainer: Trainer, pretrained: str | None) -> None:
    """Refuse a folder that `save_network` would spoil.

    Args:
        folder: The folder, which need not exist.
        trainer: The Trainer, whose run and checkpoints have folders.
        pretrained: Name or path of the model that is trained.

    Raises:
        ValueError: If it is one of those folders or holds one, or holds files but no earlier output.
    """
    where = Path(folder).resolve()
    given = f"save_pretrained={folder!r}"
    used = [("the run", Path(trainer.log_dir or trainer.default_root_dir))]
    used += [("the run's checkpoints", Path(getattr(c, "dirpath", None) or ".")) for c in trainer.checkpoint_callbacks]
    if pretrained is not None and (base := Path(pretrained)).exists():
        used.append(("the model that is trained", base if base.is_dir() else base.parent))
    for what, path in used:
        path = path.resolve()
        if where == path or where in path.parents:
            held = "is" if where == path else "holds"
            raise ValueError(
                f"{given} {held} the folder of {what} ({path}), whose files must stay: choose a new folder"
            )
    check_place(where, given)
    if where.is_dir() and any(where.iterdir()) and not (where / MARKER).is_file():
        raise ValueError(
            f"{given} is not empty and no earlier output, whose files a {MARKER} names: choose a new or an empty folder"
        )


def check_place(folder: Path, given: str) -> None:
    """Refuse a folder that cannot be made or written; ``given`` is how the message names it."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{given} is {'' if nearest == folder else 'below '}a file: choose a new folder")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{given}: {nearest} cannot be written by this user: choose another folder")


def save_network(network: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a network, and a tokenizer if it is not None, to a folder that `check_output` let through.

    The files of an earlier output are removed, as those of another kind of model would be read with the new ones.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # within the folder, as what is above it can be another file system, or not writable
    with TemporaryDirectory(dir=folder, prefix=".part-") as part:
        for source in (network, tokenizer):
            if source is not None:
                source.save_pretrained(part)
        files = sorted(str(path.relative_to(part)) for path in Path(part).rglob("*") if path.is_file())
        Path(part, MARKER).write_text(json.dumps({"smezo_pl": __version__, "files": files}, indent=2) + "\n")
        for name in _earlier(folder):
            (folder / name).unlink(missing_ok=True)
        for name in (*files, MARKER):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(part, name), folder / name)


def _earlier(folder: Path) -> list[str]:
    """Files of the output that a folder holds."""
    if not (folder / MARKER).is_file():
        return []
    names = [str(name) for name in json.loads((folder / MARKER).read_text())["files"]]
    return [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]
