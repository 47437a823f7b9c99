"""How arrays lie on a mesh of devices: the letters of a shape decide, by one table of rules.

Letters as in `utils.ops`. Mesh axes are called `data`, `fsdp`, `tensor` and `sequence`; a mesh may have any of them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The mesh axis over which a parameter's dimension is cut; None keeps it whole.
RULES: dict[str, str | None] = {
    "V": "tensor",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "D": "fsdp",
    "L": None,
    "H": None,
}


def partition_spec(letters: str, mesh: Mesh) -> PartitionSpec:
    """The mesh axis of each letter's dimension; axes that the mesh lacks are left out.

    Raises ValueError for a letter without a rule and for two letters on one mesh axis.
    """
    if unknown := set(letters) - set(RULES):
        raise ValueError(f"no sharding rule for {', '.join(sorted(unknown))} of the shape {letters}")
    axes = [RULES[letter] if RULES[letter] in mesh.axis_names else None for letter in letters]
    for axis in mesh.axis_names:
        if axes.count(axis) > 1:
            both = " and ".join(letter for letter, own in zip(letters, axes) if own == axis)
            raise ValueError(f"dimensions {both} of the shape {letters} would both lie on the mesh axis {axis!r}")
    return PartitionSpec(*axes)


def named_sharding(letters: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose dimensions, of sizes `shape`, are `letters`.

    Raises ValueError where a mesh axis does not divide its dimension, and as `partition_spec` does.
    """
    if len(letters) != len(shape):
        raise ValueError(f"letters {letters} do not fit the shape {tuple(shape)}")
    spec = partition_spec(letters, mesh)
    for letter, size, axis in zip(letters, shape, spec):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"dimension {letter} of size {size} cannot be cut evenly over the {mesh.shape[axis]} devices "
                f"of the mesh axis {axis!r}"
            )
    return NamedSharding(mesh, spec)


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """Rows are cut over the mesh axes `data` and `fsdp`, as far as the mesh has them."""
    return PartitionSpec(tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names) or None)


def keep_rows(x: jax.Array) -> jax.Array:
    """Inside of a compiled function: x with its first axis cut over the mesh of `jax.set_mesh` as rows of a batch are.

    Without such a mesh, and where the rows cannot be cut evenly, x as it is, and left to the compiler: it may cut the
    model axis instead, as the embeddings are, and then gather all rows for each attention.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = batch_spec(mesh)
    devices = int(np.prod([mesh.shape[name] for name in spec[0] or ()], dtype=int))
    return x if x.shape[0] % devices else jax.lax.with_sharding_constraint(x, spec)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that arrays lie on, or None."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)), None)


def place_rows(x: Any, mesh: Mesh | None, *, axis: int = 0) -> Any:
    """An array of rows along `axis`, cut over the mesh as rows of a batch are; whole on each device where they cannot
    be cut evenly, and as it is without a mesh."""
    if mesh is None:
        return x
    rows = batch_spec(mesh)[0] or ()
    devices = int(np.prod([mesh.shape[name] for name in rows], dtype=int))
    spec = PartitionSpec(*[None] * axis, rows) if x.shape[axis] % devices == 0 else PartitionSpec()
    return jax.device_put(x, NamedSharding(mesh, spec))
