"""Shape annotations of array parameters, such as Float[Array, "B T D"].

They are jaxtyping's where it is installed, and the tests check them at every call; elsewhere they are plain arrays.
"""

from jax import Array

try:
    from jaxtyping import Bool, Float, Int
except ImportError:

    class Float:
        def __class_getitem__(cls, item: tuple[type, str]) -> type:
            return item[0]

    Bool = Int = Float

__all__ = ["Array", "Bool", "Float", "Int"]
