"""What losses over a large vocabulary share: logits in chunks of positions, and the products of their gradients.

Letters as in `utils.ops`; C are the positions of a chunk, X the chunks.
"""

import jax
import jax.numpy as jnp

from utils.shapes import Array, DTypeLike

# Logits of a chunk, all devices together: 32 MiB of float32 where caches are what counts, 1 GiB elsewhere.
_CPU_LOGITS = 2**23
_ACCELERATOR_LOGITS = 2**28


def count_chunks(B: int, T: int, V: int, chunk_logits: int | None) -> int:
    """How many chunks of positions there are if about `chunk_logits` logits, by default what suits the backend, are
    in memory at once."""
    if chunk_logits is None:
        chunk_logits = _CPU_LOGITS if jax.default_backend() == "cpu" else _ACCELERATOR_LOGITS
    return min(T, max(1, -(-B * T * V // chunk_logits)))


def cut(num_chunks: int, *arrays_BT: Array) -> tuple[Array, ...]:
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
