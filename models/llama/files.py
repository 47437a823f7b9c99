"""Tensors in checkpoint files, read only when and as far as they are needed; the safetensors format, in and out.

Files are read with plain reads at an offset, not mapped into memory: mapped pages count as resident memory of the
process, so that loading would seem to need the size of the file on top of that of the weights.

Source of the format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `offset` counts bytes, `strides` elements; row after row where there are no strides."""

    path: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def dtype(self) -> np.dtype:
        """Raises ValueError for a type that is none of weights, such as the whole numbers of quantised ones."""
        if self.dtype_name not in _DTYPES:
            raise ValueError(
                f"{self.path}: tensor {self.name!r} is stored as {self.dtype_name}, which is not supported: known are "
                f"{', '.join(_DTYPES)}; quantised weights need their unquantised checkpoint"
            )
        return _DTYPES[self.dtype_name]

    def rows_within(self, num_bytes: int) -> int:
        """How many rows to read at once for about that many bytes; all, where rows lie between one another."""
        if self.strides is not None:
            return self.shape[0]
        return max(1, num_bytes // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop, by default all. Raises ValueError if the file has become shorter."""
        shape = (len(range(*slice(start, stop).indices(self.shape[0]))), *self.shape[1:])
        if self.strides is None:
            return self._span(start * math.prod(self.shape[1:]), math.prod(shape)).reshape(shape)
        if 0 in shape:
            return np.empty(shape, self.dtype)
        last = sum((size - 1) * stride for size, stride in zip(shape, self.strides))
        span = self._span(start * self.strides[0], last + 1)
        return np.lib.stride_tricks.as_strided(
            span, shape, [stride * self.dtype.itemsize for stride in self.strides], writeable=False
        )

    def _span(self, first: int, count: int) -> np.ndarray:
        size = self.dtype.itemsize
        data = np.fromfile(self.path, np.uint8, count * size, offset=self.offset + first * size)
        if len(data) < count * size:
            raise ValueError(f"{self.path}: truncated within tensor {self.name!r}")
        return data.view(self.dtype)


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor whose slices along `axis` are `parts`, each in its own file; other properties as of StoredTensor."""

    parts: tuple[StoredTensor, ...]
    axis: int

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = list(self.parts[0].shape)
        sizes[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(sizes)

    def rows_within(self, num_bytes: int) -> int:
        return min(part.rows_within(num_bytes // len(self.parts)) for part in self.parts)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop, by default all."""
        if self.axis:
            return np.concatenate([part.read(start, stop) for part in self.parts], axis=self.axis)
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        pieces, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.shape[0])
            if low < high:
                pieces.append(part.read(low, high))
            first += part.shape[0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


Tensor = StoredTensor | JoinedTensor


def join(parts: tuple[StoredTensor, ...], shape: tuple[int, ...]) -> Tensor:
    """The tensor of that shape which the model-parallel parts make up; parts that are whole are copies of each other.

    Raises ValueError where the parts do not give the shape along any one axis.
    """
    if all(part.shape == shape for part in parts):
        return parts[0]
    for axis in range(len(shape)):
        rest = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts if len(part.shape) == len(shape)}
        total = sum(part.shape[axis] for part in parts if len(part.shape) == len(shape))
        if rest == {shape[:axis] + shape[axis + 1 :]} and total == shape[axis]:
            return JoinedTensor(parts, axis)
    shapes = " and ".join(str(part.shape) for part in parts)
    raise ValueError(f"{parts[0].path}: tensor {parts[0].name!r} has shape {shapes}, the config asks for {shape}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file if it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; reads its header only.

    Raises ValueError for a file that is truncated or not safetensors, naming the first tensor that is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little") if len(start) == 8 else _MAX_HEADER_BYTES
        if len(start) == 8 and not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: not a safetensors file (a header of {length} bytes)")
        if 8 + length > size:
            raise ValueError(f"{path}: truncated within its header: the file has only {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return {name: _safetensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except _TruncatedError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error!r})") from None


class _TruncatedError(ValueError):
    pass


def _safetensor(path: Path, name: str, entry: Mapping[str, Any], base: int, file_size: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    shape, dtype_name = tuple(entry["shape"]), entry["dtype"]
    if not all(isinstance(number, int) and number >= 0 for number in (first, last, *shape)) or last < first:
        raise ValueError(f"tensor {name!r} has shape {shape} at {first} to {last}")
    dtype = _DTYPES.get(dtype_name)
    if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} and type {dtype_name} has {last - first} bytes")
    if base + last > file_size:
        raise _TruncatedError(
            f"{path}: truncated: tensor {name!r} ends at byte {base + last}, but the file has {file_size}"
        )
    return StoredTensor(path, name, dtype_name, shape, base + first)


def open_indexed(index: Path, open_file: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of the several files in one folder that a Hugging Face index lists.

    Raises FileNotFoundError for a listed file that is not there, ValueError for one that lacks a listed tensor.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: has no weight_map of tensor names to file names")
    files = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: file name {name!r} leads out of the folder")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} is listed in {index.name} but is not there")
        files[name] = open_file(index.parent / name)
    for tensor, name in weight_map.items():
        if tensor not in files[name]:
            raise ValueError(f"{index.parent / name}: lacks the tensor {tensor!r}, which {index.name} says it holds")
    return {tensor: files[name][tensor] for tensor, name in weight_map.items()}


def write_safetensors(
    path: Path,
    entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    values: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors one after the other; `values` gives each by its name, so that only one need be in memory.

    Raises ValueError for a dtype that is not one of float64, float32, float16 and bfloat16.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in _widest_first(entries):
        dtype, shape = entries[name]
        if dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {name!r} of type {dtype} cannot be written as weights")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in _widest_first(entries):
            dtype, shape = entries[name]
            value = values(name)
            assert value.dtype == dtype and value.shape == shape, name
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))


def _widest_first(entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> Iterable[str]:
    """Names in an order in which every tensor begins at a multiple of its element size."""
    return sorted(entries, key=lambda name: -entries[name][0].itemsize)
