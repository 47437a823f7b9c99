"""What losses over a large vocabulary share: logits in chunks of positions, and the products of their gradients.

Letters as in `utils.ops`; C are the positions of a chunk, X the chunks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from utils.platforms import target_platform
from utils.shapes import Array, DTypeLike
from utils.sharding import axes_of, current_mesh, fitting

# Logits of a chunk on a device: 32 MiB of float32 where caches are what counts, 1 GiB elsewhere.
CPU_LOGITS = 2**23
ACCELERATOR_LOGITS = 2**28


class Cut(NamedTuple):
    """How an output matrix is cut in the program of a device: the mesh axis of its vocabulary, None where it is whole,
    and those of its model axis, which is dimension `place`."""

    words: str | None = None
    width: tuple[str, ...] = ()
    place: int = 0


def on_own_tokens(
    own: Callable[..., Any], letters: str, x_BTD: Array, weight: Array, *arrays_BT: Array, summed: bool
) -> Any:
    """own(cut, x_BTD, weight, *arrays_BT): on a mesh of `jax.set_mesh` each device goes through its own tokens.

    Results are sums over tokens, added up, or else arrays [B, T]. `own` has to be a function with a gradient of its
    own, see `jax.custom_vjp`: by the part of the vocabulary and of the model axis that the device has, and of
    cotangents that it has summed over the axis of the vocabulary, as that is what sums over an axis transpose to.
    """

    def first(cuts: Sequence[Cut], weights: Sequence[Array], x_BTD: Array, *arrays_BT: Array) -> Any:
        return own(cuts[0], x_BTD, weights[0], *arrays_BT)

    return on_own_tokens_of(first, ((letters, weight),), x_BTD, *arrays_BT, summed=summed)


def on_own_tokens_of(
    own: Callable[..., Any], matrices: Sequence[tuple[str, Array]], *arrays_BT: Array, summed: bool
) -> Any:
    """own(cuts, weights, *arrays_BT), as `on_own_tokens`, with the output matrices of several networks.

    `matrices` are letters and weight of each. They may be of any width, and have one vocabulary, which is cut alike.
    Arrays may have dimensions behind T, which are whole.
    """
    mesh = current_mesh()
    if mesh is None:
        return own((Cut(),) * len(matrices), tuple(weight for _, weight in matrices), *arrays_BT)
    tokens = fitting("BT", arrays_BT[0].shape[:2], mesh)
    lying = tuple(fitting(letters, weight.shape, mesh) for letters, weight in matrices)
    cut_over = tuple(axis for entry in tokens for axis in axes_of(entry))
    cuts = tuple(_cut_of(letters, spec) for (letters, _), spec in zip(matrices, lying))

    def local(weights: tuple[Array, ...], *arrays_BT: Array) -> Any:
        results = own(cuts, weights, *arrays_BT)
        return jax.lax.psum(results, cut_over) if summed and cut_over else results

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(lying, *(tokens,) * len(arrays_BT)),
        out_specs=PartitionSpec() if summed else tokens,
        check_vma=False,
    )(tuple(weight for _, weight in matrices), *arrays_BT)


def _cut_of(letters: str, lying: PartitionSpec) -> Cut:
    place = letters.index("D")
    return Cut(lying[letters.index("V")], axes_of(lying[place]), place)


def gather(weight: Array, cut: Cut) -> Array:
    """The output matrix with its model axis whole: once for all chunks."""
    return jax.lax.all_gather(weight, cut.width, axis=cut.place, tiled=True) if cut.width else weight


def scatter(dweight: Array, cut: Cut) -> Array:
    """Gradients by the output matrix that `gather` returned, summed; each device gets its part."""
    if not cut.width:
        return dweight
    return jax.lax.psum_scatter(dweight, cut.width, scatter_dimension=cut.place, tiled=True)


def count_chunks(B: int, T: int, V: int, chunk_logits: int | None) -> int:
    """How many chunks of positions there are if about `chunk_logits` logits, by default what suits the backend, are
    in memory at once."""
    if chunk_logits is None:
        chunk_logits = CPU_LOGITS if target_platform() == "cpu" else ACCELERATOR_LOGITS
    return min(T, max(1, -(-B * T * V // chunk_logits)))


def in_chunks(num_chunks: int, *arrays_BT: Array) -> tuple[Array, ...]:
    """Arrays [B, T, ...] as [X, B, C, ...], filled up with zeros."""
    T = arrays_BT[0].shape[1]
    C = -(-T // num_chunks)

    def cut_one(x_BT: Array) -> Array:
        x_BT = jnp.pad(x_BT, [(0, 0), (0, num_chunks * C - T)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], num_chunks, C, *x_BT.shape[2:]), 1, 0)

    return tuple(cut_one(x_BT) for x_BT in arrays_BT)


def join(x_XBC: Array, T: int) -> Array:
    """[X, B, C, ...] as [B, T, ...], without what filled it up."""
    X, B, C = x_XBC.shape[:3]
    return jnp.moveaxis(x_XBC, 0, 1).reshape(B, X * C, *x_XBC.shape[3:])[:, :T]


def logits_of(letters: str, x_BCD: Array, weight: Array) -> Array:
    """Logits of a chunk, float32 [B, C, V]; the output matrix is DV or VD."""
    return jnp.einsum(f"BCD,{letters}->BCV", x_BCD, weight, preferred_element_type=jnp.float32)


def gradients_of(
    letters: str, x_BCD: Array, weight: Array, dlogits_BCV: Array, dtype: DTypeLike
) -> tuple[Array, Array]:
    """Gradients by x_BCD, in `dtype`, and by the output matrix, in float32, given those by the logits."""
    dlogits_BCV = dlogits_BCV.astype(x_BCD.dtype)
    dx_BCD = jnp.einsum(f"BCV,{letters}->BCD", dlogits_BCV, weight, preferred_element_type=dtype)
    first, second = (x_BCD, dlogits_BCV) if letters == "DV" else (dlogits_BCV, x_BCD)
    spec = "BCD,BCV->DV" if letters == "DV" else "BCV,BCD->VD"
    return dx_BCD, jnp.einsum(spec, first, second, preferred_element_type=jnp.float32)
