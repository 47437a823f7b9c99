"""How arrays lie on a mesh of devices: the letters of a shape decide, by one table of rules.

Letters as in `utils.ops`. Mesh axes are called `data`, `fsdp`, `tensor` and `sequence`; a mesh may have any of them.
"""

from collections.abc import Sequence

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
