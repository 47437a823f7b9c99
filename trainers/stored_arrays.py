"""Arrays as JSON values, bit for bit: for what a checkpoint keeps beside the state of training."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np


def dump_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays, or None, by name as JSON values; of little-endian bytes in base64."""
    return {name: None if x is None else _dump(np.asarray(x)) for name, x in arrays.items()}


def load_arrays(stored: Mapping[str, Any]) -> dict[str, np.ndarray | None]:
    """The arrays that `dump_arrays` was given."""
    return {name: None if x is None else _load(x) for name, x in stored.items()}


def _dump(x: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(x, x.dtype.newbyteorder("<")).tobytes()
    return {"dtype": x.dtype.name, "shape": list(x.shape), "data": base64.b64encode(data).decode()}


def _load(stored: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(stored["dtype"])
    x = np.frombuffer(base64.b64decode(stored["data"]), dtype.newbyteorder("<"))
    return x.astype(dtype).reshape(stored["shape"])
