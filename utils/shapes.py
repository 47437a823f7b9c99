"""Shape annotations of array parameters, such as Float[Array, "B T D"].

They are jaxtyping's where it is installed, and the tests check them at every call; elsewhere they are plain arrays.
Numpy's arrays are taken wherever jax's are.
"""

import jax
import numpy as np
from jax.typing import DTypeLike

Array = jax.Array | np.ndarray
Number = int | float | np.number | Array  # one, or one for each row

try:
    from jaxtyping import Bool, Float, Int
except ImportError:

    class Float:
        def __class_getitem__(cls, item: tuple[type, str]) -> type:
            return item[0]

    Bool = Int = Float

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "Number"]
