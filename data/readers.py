"""Rows by number from files, folders and Hugging Face data sets, and the records they stand for."""

from __future__ import annotations

import bisect
import glob
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.readers_base import Bytes, PlainFile, Rows, Scratch
from data.readers_json import open_json, open_json_lines
from data.readers_tables import HubRows, ParquetRows, RowGroups
from data.readers_text import UNITS, open_text
from data.records import BadRow, Record, normalize

__all__ = ["Concatenation", "Rows", "data_files", "open_rows", "read_record"]

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".jsonl.gz", ".json.gz", ".txt.gz")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def open_rows(spec: str | os.PathLike[str], *, split: str | None = None, unit: str = "file") -> Rows:
    """Open a data set for reading by row number; files are indexed now, and read when a row is asked for.

    spec is a file with one of SUFFIXES, a folder (all such files in and below it but hidden ones), a glob pattern
    (`**` for any depth), or a Hugging Face data set, "owner/name" where there is no such path or "hf:name", with
    ":config" behind it where it has several. The files of folders and patterns follow each other by path. unit is how
    text files are cut, see `open_text`; split is of Hugging Face data sets, by default the only one or "train".
    Compressed files are unpacked into the system's temporary folder. Raises FileNotFoundError for what is not there,
    ValueError for what is empty or cannot be read, and for a split or unit without anything to apply to.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}, expected one of {UNITS}")
    spec = os.fspath(spec)
    if not spec:
        raise ValueError("the name of the data is empty")
    name = _hub_name(spec)
    if name is not None:
        if unit != "file":
            raise ValueError(f"unit {unit!r} is for text files, and {spec} is a Hugging Face data set")
        return _open_hub(name, spec, split)
    if split is not None:
        raise ValueError(f"split {split!r} is for Hugging Face data sets, and {spec} is in files")
    paths = _found(spec)
    if unit != "file" and not any(_suffix(path).startswith(".txt") for path in paths):
        raise ValueError(f"unit {unit!r} is for text files, and {spec} has none")
    scratch, groups = Scratch(), RowGroups()
    parts = [_not_empty(_open_file(path, unit, scratch, groups), str(path)) for path in paths]
    return parts[0] if len(parts) == 1 else Concatenation(parts)


class Concatenation(Rows):
    """The rows of several sources, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = tuple(parts)
        self._ends = list(itertools.accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        return f"Concatenation({', '.join(map(repr, self._parts))})"

    def where(self, index: int) -> str:
        part, index = self._part(self._checked(index))
        return part.where(index)

    def _row(self, index: int) -> Mapping[str, Any]:
        part, index = self._part(index)
        return part[index]

    def _part(self, index: int) -> tuple[Rows, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


def read_record(rows: Rows, index: int, *, format: str | None = None) -> Record:
    """Return the record of one row. Raises BadRow, "path:line: why", for a row that cannot be read or is no record."""
    row = rows[index]
    try:
        return normalize(row, format=format)
    except ValueError as error:
        raise BadRow(f"{rows.where(index)}: {error}") from error


def data_files(spec: str | os.PathLike[str]) -> list[Path]:
    """Return the files that `open_rows` reads for a spec, none for a Hugging Face data set. Raises as it does."""
    spec = os.fspath(spec)
    return [] if _hub_name(spec) is not None else _found(spec)


def _hub_name(spec: str) -> str | None:
    """Return the name of a Hugging Face data set, None for files."""
    if spec.startswith("hf:"):
        return spec.removeprefix("hf:")
    like_a_path = spec.endswith((*SUFFIXES, ".bin")) or spec.startswith((".", "~")) or glob.has_magic(spec)
    return None if like_a_path or Path(spec).exists() or not _HUB_NAME.fullmatch(spec) else spec


def _open_hub(name: str, spec: str, split: str | None) -> Rows:
    name, _, config = name.partition(":")
    try:
        rows = HubRows(name, config or None, split)
    except ValueError as error:
        missing = "" if spec.startswith("hf:") else f"there is no path {spec}, and "
        raise ValueError(f"{missing}{error}") from error
    return _not_empty(rows, spec)


def _found(spec: str) -> list[Path]:
    """Return the files that a path or pattern stands for."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return [path]
    matches = glob.glob(str(path), recursive=True) if glob.has_magic(spec) else []
    if not matches:
        what = "no file matches" if glob.has_magic(spec) else "no such file, folder or data set:"
        raise FileNotFoundError(f"{what} {spec}")
    found = {file for match in map(Path, matches) for file in (_in_folder(match) if match.is_dir() else [match])}
    return sorted(found)


def _in_folder(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _suffix(path))
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise ValueError(f"no data in the folder {folder}, which would be files ending in {', '.join(SUFFIXES)}")
    return files


def _suffix(path: Path) -> str:
    """Return which of SUFFIXES a path has, "" for none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")


def _open_file(path: Path, unit: str, scratch: Scratch, groups: RowGroups) -> Rows:
    suffix = _suffix(path)
    if not suffix:
        raise ValueError(f"{path} has none of the endings {', '.join(SUFFIXES)}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    if suffix == ".parquet":
        return ParquetRows(path, groups)
    file: Bytes = scratch.unpack(path) if suffix.endswith(".gz") else PlainFile(path)
    match suffix.removesuffix(".gz"):
        case ".txt":
            return open_text(file, unit)
        case ".jsonl":
            return open_json_lines(file)
    return open_json(file)


def _not_empty(rows: Rows, name: str) -> Rows:
    if not len(rows):
        raise ValueError(f"{name} has no rows")
    return rows
