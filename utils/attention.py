"""Attention with a described mask, lowered by XLA anywhere, by cuDNN on NVIDIA, by Pallas splash attention on TPU.

A mask is a small description (`Mask`). Each implementation lowers all of it, or refuses; none ignores a part.
Letters as in `utils.ops`.
"""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp

from utils.blockwise import attend_blockwise
from utils.masks import Mask
from utils.ops import attend
from utils.shapes import Array, Float, Number

__all__ = ["IMPLEMENTATIONS", "Mask", "attention", "choose"]

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
_LANES = 128  # Splash attention works on blocks of this many positions and heads of multiples of this size.
_DRAWN = 2**30  # The largest mask that is drawn for cuDNN: two bytes for each query and key of a row.


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: Number | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Grouped-query attention under `mask`; out_BTNH in the dtype of q. `scale` is by default 1 / sqrt(H).

    `implementation` "auto" takes the fastest of the default backend that can do all that is asked; a forced one that
    cannot raises ValueError with the reason. Queries that may read nothing return unspecified finite values with "xla".
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is none of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = choose(q_BTNH, k_BSKH, mask)
    if implementation == "cudnn":
        return _attend_cudnn(q_BTNH, k_BSKH, v_BSKH, mask, scale)
    if implementation == "splash":
        return _attend_splash(q_BTNH, k_BSKH, v_BSKH, mask, scale)
    if q_BTNH.shape[1] > 1 and mask.offset_B is None:
        return attend_blockwise(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale)
    return attend(q_BTNH, k_BSKH, v_BSKH, mask.draw(q_BTNH.shape[1], k_BSKH.shape[1]), scale=scale)


def choose(
    q_BTNH: Array | jax.ShapeDtypeStruct,
    k_BSKH: Array | jax.ShapeDtypeStruct,
    mask: Mask,
    *,
    platform: str | None = None,
) -> str:
    """The implementation that "auto" stands for: by platform, dtype and mask.

    `platform` is by default that of the default backend: cpu, tpu, cuda (NVIDIA from Ampere on), or gpu (any other).
    Splash attention is left to programs for a single TPU: it cannot be partitioned automatically.

    A fused kernel is worth its launch from two queries up; a single one is bound by reading the cache.
    """
    platform = _platform() if platform is None else platform
    if q_BTNH.shape[1] > 1:
        if platform == "cuda" and not _cudnn_limits(q_BTNH, k_BSKH, mask):
            return "cudnn"
        if platform == "tpu" and jax.device_count() == 1 and not _splash_limits(q_BTNH, k_BSKH, mask):
            return "splash"
    return "xla"


def _platform() -> str:
    """The default backend, "cuda" where it is one that cuDNN's flash attention runs on."""
    backend = jax.default_backend()
    if backend == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
        if re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8:
            return "cuda"
    return backend


def _cudnn_limits(q_BTNH: Array, k_BSKH: Array, mask: Mask) -> str | None:
    """Why cuDNN cannot do this, or None."""
    (B, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention takes bfloat16 or float16, not {q_BTNH.dtype}"
    if H % 8 or H > 128:
        return f"cuDNN attention takes head sizes that are multiples of 8 up to 128, not {H}"
    if (mask.query_segments_BT is not None or _is_shifted(mask)) and B * T * S > _DRAWN:
        return f"cuDNN attention would need a mask of {B} x {T} x {S} in memory, which is more than {_DRAWN}"
    return None


def _is_shifted(mask: Mask) -> bool:
    """Whether cuDNN's own causal mask and window cannot say it: they begin with query 0 at key 0 and are constants."""
    return mask.offset_B is not None or mask.keys_before != 0 or not isinstance(mask.window, int | None)


def _attend_cudnn(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask, scale: float | None) -> Array:
    """What cuDNN cannot be told it gets drawn, as a bias of [B, 1, T, S]: documents, queries behind other keys.

    It has a gradient for even lengths alone: odd ones get a place more, which no query reads.
    """
    if reason := _cudnn_limits(q_BTNH, k_BSKH, mask):
        raise ValueError(reason)
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if T % 2 or S % 2:
        return _attend_cudnn(*_evened(q_BTNH, k_BSKH, v_BSKH, mask), scale)[:, :T]
    drawn_BTS = query_length_B = None
    if _is_shifted(mask):
        drawn_BTS, mask = mask.draw(T, S), Mask(causal=False)
    elif mask.query_segments_BT is not None:
        drawn_BTS = replace(mask, causal=False, window=None, key_length_B=None).draw(T, S)
    if mask.key_length_B is not None:
        query_length_B = jnp.full_like(mask.key_length_B, T)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=None if drawn_BTS is None else drawn_BTS[:, None],
        scale=scale,
        is_causal=mask.causal or mask.window is not None,
        query_seq_lengths=query_length_B,
        key_value_seq_lengths=mask.key_length_B,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )


def _evened(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask) -> tuple[Array, Array, Array, Mask]:
    """Zeros behind an odd number of queries or keys, and a mask that hides the keys."""
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    q_BTNH, k_BSKH, v_BSKH = (
        jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH)
    )
    if mask.query_segments_BT is not None:
        query_BT = jnp.pad(mask.query_segments_BT, ((0, 0), (0, T % 2)), mode="edge")
        key_BS = jnp.pad(mask.key_segments_BS, ((0, 0), (0, S % 2)), mode="edge")
        mask = replace(mask, query_segments_BT=query_BT, key_segments_BS=key_BS)
    unread = mask.causal and not _is_shifted(mask) and T <= S  # no real query is as far as the key behind
    if S % 2 and mask.key_length_B is not None:
        mask = replace(mask, key_length_B=jnp.minimum(mask.key_length_B, S))
    elif S % 2 and not unread:
        mask = replace(mask, key_length_B=jnp.full(B, S, jnp.int32))
    return q_BTNH, k_BSKH, v_BSKH, mask


def _splash_limits(q_BTNH: Array, k_BSKH: Array, mask: Mask) -> str | None:
    """Why splash attention cannot do this, or None. Its mask is a constant of the program, its blocks are 128 wide."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash attention takes bfloat16 or float32, not {q_BTNH.dtype}"
    if T % _LANES or S % _LANES:
        return f"splash attention takes multiples of {_LANES} positions, not {T} queries and {S} keys"
    if mask.offset_B is not None:
        return "splash attention needs query offsets known when compiling, so it cannot continue behind a filled cache"
    if not isinstance(mask.window, int | None):
        return "splash attention needs a window known when compiling, the same for all layers"
    return None


def _attend_splash(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask, scale: float | None) -> Array:
    if reason := _splash_limits(q_BTNH, k_BSKH, mask):
        raise ValueError(reason)
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    B, T, N, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    if mask.window is not None:
        allowed = splash_mask.LocalMask((T, S), (mask.window - 1, 0), offset=mask.keys_before)
    elif mask.causal:
        allowed = splash_mask.CausalMask((T, S), offset=mask.keys_before)
    else:
        allowed = splash_mask.FullMask((T, S))
    block_q, block_kv = math.gcd(T, 512), math.gcd(S, 512)
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([allowed] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
    )
    segments = _splash_segments(mask, B, T, S)
    scale = H**-0.5 if scale is None else scale
    padded = [(0, 0)] * 3 + [(0, -H % _LANES)]  # zero components add nothing to a score
    q_BNTH, k_BKSH, v_BKSH = (
        jnp.pad(x, padded).swapaxes(1, 2) for x in (q_BTNH * jnp.asarray(scale, q_BTNH.dtype), k_BSKH, v_BSKH)
    )
    if segments is None:
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
    else:
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segment_ids=splash.SegmentIds(*segments))
    return out_BNTH.swapaxes(1, 2)[..., :H].astype(q_BTNH.dtype)


def _splash_segments(mask: Mask, B: int, T: int, S: int) -> tuple[Array, Array] | None:
    """Segment numbers of queries and keys that say both the segments and the key lengths of the mask."""
    if mask.query_segments_BT is None and mask.key_length_B is None:
        return None
    query_BT, key_BS = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    if mask.query_segments_BT is not None:
        query_BT, key_BS = mask.query_segments_BT.astype(jnp.int32), mask.key_segments_BS.astype(jnp.int32)
    if mask.key_length_B is not None:
        nobodys = jnp.iinfo(jnp.int32).min
        key_BS = jnp.where(jnp.arange(S) < mask.key_length_B[:, None], key_BS, nobodys)
    return query_BT, key_BS
