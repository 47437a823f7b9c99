"""Random weights, made where they are to lie."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from models.llama.config import LlamaConfig
from models.llama.lora import factor_letters
from models.llama.model import LLaMa
from models.llama.names import is_stacked, letters_of, parameter_name
from utils.shapes import Array, DTypeLike
from utils.sharding import shardings

_T = TypeVar("_T")


def parameter_shardings(model: Any, mesh: Mesh) -> Any:
    """How the parameters of a network lie on a mesh, adapters too, and those of whatever has networks as parts.

    Raises ValueError, with the name, for one that the mesh cannot cut.
    """

    def letters(path: tuple) -> str:
        name = parameter_name(path)
        if ".adapters." in name:
            return factor_letters(*name.split(".")[-2:])
        return "L" * is_stacked(name) + letters_of(name)

    return shardings(model, mesh, letters=letters, called=lambda path: f"parameter {parameter_name(path)}")


def random_model(config: LlamaConfig, *, key: Array, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> LLaMa:
    """`LLaMa(config, ...)` with every parameter made on the devices of `mesh` that hold it, by default on one device.

    Raises ValueError where the mesh cannot cut a parameter.
    """

    return made_on(mesh, lambda key: LLaMa(config, key=key, dtype=dtype), key)


def made_on(mesh: Mesh | None, make: Callable[[Array], _T], key: Array) -> _T:
    """make(key), of parameters made on the devices that hold them. Raises ValueError as `parameter_shardings` does."""
    if mesh is None:
        return jax.jit(make)(key)
    shapes = jax.eval_shape(make, key)
    return jax.jit(make, out_shardings=parameter_shardings(shapes, mesh))(key)
