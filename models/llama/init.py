"""Random weights, made where they are to lie."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from models.llama.config import LlamaConfig
from models.llama.model import LLaMa
from models.llama.names import is_stacked, letters_of, parameter_name
from utils.shapes import Array, DTypeLike
from utils.sharding import named_sharding


def parameter_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """How the parameter of that name lies on a mesh. Raises ValueError, with the name, where the mesh cannot cut it."""
    try:
        return named_sharding("L" * is_stacked(name) + letters_of(name), shape, mesh)
    except ValueError as error:
        raise ValueError(f"parameter {name}: {error}") from None


def random_model(config: LlamaConfig, *, key: Array, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> LLaMa:
    """`LLaMa(config, ...)` with every parameter made on the devices of `mesh` that hold it, by default on one device.

    Raises ValueError where the mesh cannot cut a parameter.
    """

    def make(key: Array) -> LLaMa:
        return LLaMa(config, key=key, dtype=dtype)

    if mesh is None:
        return jax.jit(make)(key)
    shapes = jax.eval_shape(make, key)
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, leaf: parameter_sharding(parameter_name(path), leaf.shape, mesh), shapes
    )
    return jax.jit(make, out_shardings=shardings)(key)
