"""Rows of datasets: a user's own files, a local folder of Parquet files, the Hugging Face hub, the bundled demo."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smezo_pl.data.demo import demo_rows
from smezo_pl.data.files import READERS
from smezo_pl.tasks import Source, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The rows of one split."""

    table: pa.Table | list[dict[str, Any]]
    origin: str  # the file or dataset, for messages
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # what integers of a column stand for, if known
    lines: Sequence[int] = ()  # the line of the file that each row begins on, where there are lines

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.table)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at these indices."""
        if isinstance(self.table, list):
            return [self.table[index] for index in indices]
        taken: list[dict[str, Any]] = self.table.take(pa.array(indices, pa.int64())).to_pylist()
        return taken

    def values(self, column: str) -> list[Any]:
        """The values of a column, None where a row has none."""
        if isinstance(self.table, list):
            return [row.get(column) for row in self.table]
        there = column in self.table.column_names
        return self.table.column(column).to_pylist() if there else [None] * len(self)

    def line(self, index: int) -> str:
        """Where a row is, for messages."""
        return f"line {self.lines[index]}" if self.lines else f"row {index}"


def load_file(name: str | Path, task: Task, split: str, labelled: bool = True) -> Rows:
    """The rows of a user's own file, or of a dataset on the hub: ``owner/name``, with ``@config``, ``:split`` or both.

    The rows must have the task's columns, the label's only if ``labelled``. ``split`` is the hub's where the name has
    none. Errors name the file and the line.
    """
    path = Path(name).expanduser()
    if path.suffix in READERS or path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
        if path.suffix == ".parquet":
            table = _read_parquet(path)
            rows = Rows(table, str(path), _class_names(table.schema))
        else:
            records = READERS[path.suffix](path)
            rows = Rows([row for _, row in records], str(path), lines=[line for line, _ in records if line])
    elif (hub := _HUB_NAME.match(str(name))) and not path.exists():
        rows = _from_hub(Source(hub["name"], hub["config"]), hub["split"] or split)
    else:
        raise ValueError(
            f"{str(name)!r} is neither a file that ends in {', '.join((*READERS, '.parquet'))} nor a dataset on the"
            " hub (owner/name, owner/name@config:split)"
        )
    rows = _checked(rows, task, task.columns if labelled else task.columns[:-1])
    logger.info("%s: %d rows of %s", task.name, len(rows), rows.origin)
    return rows


_HUB_NAME = re.compile(r"(?P<name>[\w-]+/[\w.-]+)(?:@(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?$")


def load_split(task: Task, split: str, data_dir: str | Path | None = None) -> Rows:
    """One split of a task's dataset (``train``, ``validation_matched``, ...), with the columns that the task needs.

    It is in a local folder as ``{task}/{split}*.parquet``, or on the hub if ``data_dir`` is None.
    """
    source = task.source
    if source is None:
        raise ValueError(f"task {task.name!r} names no data source")
    if task.name == "demo" and source.path is None:
        rows = Rows(demo_rows(split), f"demo ({split}, synthetic)", {"label": ("negative", "positive")})
        logger.info("demo: %d bundled synthetic sentences (%s)", len(rows), split)
    elif data_dir is not None:
        rows = _from_folder(task, split, Path(data_dir), source.folder or task.name)
    elif source.path is not None:
        rows = _from_hub(source, split)
    else:
        raise ValueError(f"task {task.name!r} has no dataset on the hub: give data_dir")
    return _checked(rows, task, task.columns)


def _checked(rows: Rows, task: Task, needed: Sequence[str]) -> Rows:
    if not len(rows):
        raise ValueError(f"{rows.origin} holds no rows")
    table = rows.table
    names = (name for row in table for name in row) if isinstance(table, list) else table.column_names
    present = list(dict.fromkeys(names))
    missing = [column for column in needed if column not in present]
    if missing:
        more = f" and {len(present) - 30} others" if len(present) > 30 else ""
        near = get_close_matches(missing[0], present, n=1)
        raise ValueError(
            f"{rows.origin} lacks {'column' if len(missing) == 1 else 'columns'} {', '.join(map(repr, missing))} of"
            f" task {task.name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; it has"
            f" {', '.join(map(repr, present[:30]))}{more}"
        )
    return rows


def _from_folder(task: Task, split: str, data_dir: Path, name: str) -> Rows:
    folder = data_dir / name
    if not folder.is_dir():
        others = sorted(path.name for path in data_dir.iterdir() if path.is_dir()) if data_dir.is_dir() else []
        has = f"it holds {', '.join(others)}" if others else "there is no such folder or it is empty"
        raise FileNotFoundError(f"data_dir {str(data_dir)!r} has no folder {name!r} for task {task.name!r}: {has}")
    files = _split_files(folder, split)
    tables = [_read_parquet(path) for path in files]
    columns = tables[0].column_names
    other = [str(path) for path, table in zip(files, tables, strict=True) if table.column_names != columns]
    if other:
        raise ValueError(f"{', '.join(other)} and {files[0]} have different columns")
    table = pa.concat_tables(tables, promote_options="permissive")
    origin = str(files[0]) if len(files) == 1 else f"{folder}/{split}-*.parquet"
    part = "" if files[0].stem == split or _SHARD.search(files[0].stem) else " (a part of the split, by its name)"
    logger.info("%s: %d rows of %s%s", task.name, table.num_rows, origin, part)
    return Rows(table, origin, _class_names(table.schema))


_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def _split_files(folder: Path, split: str) -> list[Path]:
    """``{split}.parquet``; or all its shards; or the one file that is a part of it, ``{split}_*.parquet``."""
    exact = folder / f"{split}.parquet"
    if exact.is_file():
        return [exact]
    parquet = sorted(folder.glob("*.parquet"))
    shards = [path for path in parquet if _SHARD.sub("", path.stem) == split]
    parts = shards or [path for path in parquet if path.stem.startswith((f"{split}_", f"{split}-"))]
    if not parts:
        held = ", ".join(path.name for path in parquet) or "no Parquet file"
        raise FileNotFoundError(f"{folder} has no {split}*.parquet; it holds {held}")
    if len(parts) > 1 and not shards:
        raise ValueError(
            f"{folder} has {len(parts)} files for split {split!r} and none is called {split}.parquet:"
            f" {', '.join(path.name for path in parts)}"
        )
    return parts


def _read_parquet(path: Path) -> pa.Table:
    try:
        return _plain(pq.read_table(path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"cannot read {path} as Parquet: {error}") from error


def _plain(table: pa.Table) -> pa.Table:
    """A table whose cells can be read one by one, and numbers of 32 bits as short as they are."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:  # texts that are not UTF-8: as bytes, a row of them is refused by its number
        fields = [column.with_type(_as_bytes(column.type)) for column in table.schema]
        table = table.cast(pa.schema(fields, table.schema.metadata))
    for index, column in enumerate(table.schema):
        if column.type == pa.string_view():  # rows of it cannot be taken
            table = table.set_column(index, column.name, table[index].cast(pa.large_string()))
        if column.type == pa.float32():  # 0.1, not 0.10000000149011612
            table = table.set_column(index, column.name, table[index].cast(pa.string()).cast(pa.float64()))
    return table


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    return pa.struct([f.with_type(_as_bytes(f.type)) for f in kind]) if pa.types.is_struct(kind) else kind


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of integer labels, as ``datasets`` writes them into a Parquet file."""
    text = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(text).get("info", {}).get("features", {}) if text else {}
    return {
        column: list(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature
    }


def _from_hub(source: Source, split: str) -> Rows:
    # Imported late: it is slow, and neither local folders nor the demo need it.
    import datasets

    def load(config: str | None, revision: str | None) -> Any:
        return datasets.load_dataset(source.path, config, revision=revision, split=split)

    origin = "/".join(filter(None, (source.path, source.config, split)))
    try:
        try:
            data = load(source.config, source.revision)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            logger.warning("%s is kept as a loading script; its Parquet conversion by the hub is taken instead", origin)
            data = load(source.config, "refs/convert/parquet")
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ConnectionError(
            f"cannot load {origin} from the Hugging Face hub ({error}); check the connection, or give data_dir with"
            f" {{task}}/{split}.parquet"
        ) from error
    logger.info("%d rows of %s from the Hugging Face hub", len(data), origin)
    names = {column: list(f.names) for column, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    return Rows(_plain(data.with_format("arrow")[:]), origin, names)
