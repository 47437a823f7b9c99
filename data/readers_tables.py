"""Rows of Parquet files and of Hugging Face data sets; both need what the `data` extra installs."""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from data.readers_base import Rows
from data.records import BadRow

_EXTRA = 'pip install "ropewalk[data]"'


class RowGroups:
    """The row groups of Parquet files that were read last."""

    def __init__(self, kept: int = 2) -> None:
        self._kept = kept
        self._tables: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, group: int) -> Any:
        with self._lock:
            key = (path, group)
            if key not in self._tables:
                while len(self._tables) >= self._kept:
                    self._tables.popitem(last=False)
                with _parquet(path).ParquetFile(path) as file:
                    self._tables[key] = file.read_row_group(group)
            self._tables.move_to_end(key)
            return self._tables[key]


class ParquetRows(Rows):
    """Rows of a Parquet file, of which whole row groups are read; best read in order, or nearly.

    Keys with null inside a row are left out: a column of structs has the keys of all rows.
    """

    def __init__(self, path: Path, groups: RowGroups) -> None:
        """Raises ValueError without pyarrow, and for a file that is no Parquet file."""
        parquet = _parquet(path)
        try:
            with parquet.ParquetFile(path) as file:
                metadata = file.metadata
                sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no valid Parquet file: {_one_line(error)}") from error
        self._path = path
        self._groups = groups
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        return f"ParquetRows({str(self._path)!r}, {len(self)} rows)"

    def where(self, index: int) -> str:
        return f"{self._path}:{self._checked(index) + 1}"

    def _row(self, index: int) -> Mapping[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        begin = int(self._ends[group - 1]) if group else 0
        try:
            return _without_nulls(self._groups.get(self._path, group).slice(index - begin, 1).to_pylist()[0])
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the system's failure, not the row's
                raise
            raise BadRow(f"{self.where(index)}: {_one_line(error)}") from error


class HubRows(Rows):
    """Rows of one split of a Hugging Face data set, which `datasets` maps into memory from its cache.

    Keys with null are left out as in `ParquetRows`.
    """

    def __init__(self, name: str, config: str | None, split: str | None) -> None:
        """Raises ValueError without `datasets`, for a data set that it cannot load, and for a split it has not."""
        datasets = _imported("datasets", f"the Hugging Face data set {name}")
        try:
            loaded = datasets.load_dataset(name, config, split=split)
        except Exception as error:
            why = f"{type(error).__name__}: {_one_line(error)}"
            raise ValueError(f"cannot load the Hugging Face data set {name}: {why}") from error
        if split is None:
            splits = sorted(loaded)
            split = splits[0] if len(splits) == 1 else "train"
            if split not in splits:
                raise ValueError(f"{name} has no split 'train'; name one of {splits}")
            loaded = loaded[split]
        self._name = f"{':'.join(filter(None, (name, config)))}[{split}]"
        self._data = loaded

    def __len__(self) -> int:
        return len(self._data)

    @property
    def fingerprint(self) -> str:
        """What `datasets` calls the content and all that was done to it."""
        return self._data._fingerprint

    def __repr__(self) -> str:
        return f"HubRows({self._name!r}, {len(self)} rows)"

    def where(self, index: int) -> str:
        return f"{self._name}:{self._checked(index) + 1}"

    def _row(self, index: int) -> Mapping[str, Any]:
        return _without_nulls(self._data[index])


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet(path: Path) -> ModuleType:
    return _imported("pyarrow.parquet", f"the Parquet file {path}")


def _imported(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what} needs {module.partition('.')[0]}: {_EXTRA} ({error})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
