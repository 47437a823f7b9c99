"""PyTorch `.pth` and `.bin` files without PyTorch: a zip archive of a pickle and of the raw numbers of each storage.

A pickle is a program. The unpickler here knows a handful of names, and gives for each of them a stand-in of its own
that builds a description of a tensor; any other name is refused before anything is called. The descriptions are
immutable and are checked against the archive afterwards, so that a hostile file can do no worse than hold bad weights.

Source of the format: https://github.com/pytorch/pytorch, torch/serialization.py and torch/_utils.py.
"""

import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from models.llama.files import StoredTensor

_STORAGES = {
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_OLD_FORMAT = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch's magic number, pickled
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAX_PICKLE_BYTES = 100_000_000


class _Storage(NamedTuple):
    kind: str
    key: str


class _Described(NamedTuple):
    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _Names(dict):
    """Stands in for OrderedDict; attributes that a pickle would set on it (`_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _StandIn:
    """A function under a name of PyTorch's that a pickle may call but not alter."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a stand-in does not change")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_unused: Any) -> _Described:
    return _Described(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_unused: Any) -> Any:
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _StandIn(_Names),
    ("torch._utils", "_rebuild_tensor"): _StandIn(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _StandIn(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _StandIn(_rebuild_parameter),
    **{("torch", name): name for name in _STORAGES},
}


class _TensorUnpickler(pickle.Unpickler):
    """Builds names and descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain tensors are read")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), *_) if kind in _STORAGES:
                return _Storage(kind, key)
        raise pickle.UnpicklingError("it refers to something that is no storage of a known type")


def open_pth(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file written by `torch.save` of a mapping of names to tensors; reads no numbers yet.

    Raises ValueError for a file that is truncated, that is of the format before PyTorch 1.6, or that holds anything
    but tensors.
    """
    with path.open("rb") as file:
        if file.read(len(_OLD_FORMAT)) == _OLD_FORMAT:
            raise ValueError(
                f"{path}: is in the format before PyTorch 1.6; rewrite it with PyTorch: "
                "torch.save(torch.load(path, weights_only=True), path)"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                prefix, tensors = _unpickle(archive)
                records = _records(archive, prefix, path.stat().st_size)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: truncated or not a PyTorch file ({error})") from None
        except Exception as error:  # a hostile pickle can raise anything
            raise ValueError(f"{path}: refused: {error or repr(error)}") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: holds no mapping of names to tensors")
    return {name: _locate(path, name, value, records) for name, value in tensors.items()}


def _unpickle(archive: zipfile.ZipFile) -> tuple[str, Any]:
    """The archive's folder and what its pickle describes."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise zipfile.BadZipFile("no data.pkl in the archive")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in archive.namelist():
        with archive.open(f"{prefix}byteorder") as file:
            if file.read(7) != b"little":
                raise ValueError("its numbers are big-endian")
    info = archive.getinfo(pickles[0])
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"record {info.filename} is compressed, which PyTorch never does")
    if info.file_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"record {info.filename} has {info.file_size} bytes, more than {_MAX_PICKLE_BYTES}")
    data = archive.read(info)
    _check_sizes(data)
    return prefix, _TensorUnpickler(BytesIO(data)).load()


def _check_sizes(data: bytes) -> None:
    """Raise ValueError where a pickle makes the unpickler reserve much more memory than the pickle itself has.

    The unpickler keeps its memo in a list as long as the largest index. Lengths beyond the end fail in `genops`.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and argument > len(data):
            raise ValueError(f"its pickle of {len(data)} bytes uses the memo index {argument}")


def _records(archive: zipfile.ZipFile, prefix: str, file_size: int) -> dict[str, tuple[int, int]]:
    """Where in the file each storage's numbers begin and how many bytes they are."""
    records = {}
    for info in archive.infolist():
        if not info.filename.startswith(f"{prefix}data/"):
            continue
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"record {info.filename} is compressed, which PyTorch never does")
        archive.fp.seek(info.header_offset)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(archive.fp.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or start + info.file_size > file_size:
            raise zipfile.BadZipFile(f"record {info.filename} lies outside of the file")
        records[info.filename.removeprefix(f"{prefix}data/")] = (start, info.file_size)
    return records


def _locate(path: Path, name: Any, value: Any, records: dict[str, tuple[int, int]]) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(value, _Described) or not isinstance(value.storage, _Storage):
        raise ValueError(f"{path}: entry {str(name)[:80]!r} is no tensor")
    storage, offset, shape, strides = value
    lists = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    if not lists or not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError(f"{path}: tensor {name!r} has no sensible shape")
    if storage.key not in records:
        raise ValueError(f"{path}: the numbers of tensor {name!r} are not in the file")
    start, num_bytes = records[storage.key]
    dtype_name, item_size = _STORAGES[storage.kind]
    end = 0 if 0 in shape else offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if end * item_size > num_bytes:
        raise ValueError(f"{path}: truncated: tensor {name!r} needs {end * item_size} bytes, there are {num_bytes}")
    return StoredTensor(
        path, name, dtype_name, shape, start + offset * item_size, None if _row_major(shape, strides) else strides
    )


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie in the order of their indices without gaps; the stride of a single one says nothing."""
    step = 1
    for size, stride in reversed(list(zip(shape, strides))):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
