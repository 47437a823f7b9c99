"""Arrays as JSON and back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from trainers.stored_arrays import dump_arrays, load_arrays


@pytest.mark.parametrize(
    "x",
    [
        np.array([[1.1, -0.0, np.nan], [np.inf, -np.inf, 1e-45]], np.float32),
        np.array([1 / 3, 5e-324], np.float64),
        np.array([[1], [-(2**31)]], np.int32),
        np.array([True, False]),
        np.zeros((0, 3), np.float32),
        np.array(2.5, np.float32),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.array([1.5, -2], ">f4"),
        jnp.arange(3, dtype=jnp.bfloat16),
    ],
    ids=["float32", "float64", "int32", "bool", "empty", "number", "transposed", "big-endian", "bfloat16"],
)
def test_arrays_come_back_to_the_last_bit(x):
    back = load_arrays(json.loads(json.dumps(dump_arrays({"x": x}))))["x"]
    assert back.shape == x.shape and back.dtype == np.dtype(x.dtype).newbyteorder("=")
    assert back.tobytes() == np.asarray(x).astype(back.dtype).tobytes()
    back[...] = 0  # and can be written to


def test_what_is_not_there_stays_so():
    assert load_arrays(dump_arrays({"a": None})) == {"a": None}
