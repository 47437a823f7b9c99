"""The LLaMA-family decoder as a Flax NNX module that is used as an immutable pytree.

Letters as in `utils.ops`. All blocks are one `TransformerBlock` whose arrays have a leading layer axis L; `lax.scan`
runs it, so compile time does not grow with depth. A parameter's suffix letters give its shape, without that L.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.llama.config import LlamaConfig
from utils import kvcache
from utils.attention import Mask, attention
from utils.kvcache import KVCache
from utils.ops import add_bias, contract, feed_forward, rms_norm, rotate
from utils.rope import rope_angles
from utils.shapes import Array, DTypeLike, Float, Int


@dataclass(frozen=True)
class _Initializer:
    """Makes the parameters of one module: sizes by letter, in `dtype`, with `num_layers` in front where it is given."""

    config: LlamaConfig
    keys: Callable[[], Array]
    dtype: DTypeLike
    num_layers: int | None = None

    def _shape(self, letters: str) -> tuple[int, ...]:
        c = self.config
        size = {"V": c.vocab_size, "D": c.hidden_size, "F": c.intermediate_size}
        size |= {"N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim}
        stack = () if self.num_layers is None else (self.num_layers,)
        return (*stack, *(size[letter] for letter in letters))

    def normal(self, letters: str) -> nnx.Param:
        values = jax.random.normal(self.keys(), self._shape(letters), jnp.float32)
        return nnx.Param((values * self.config.initializer_range).astype(self.dtype))

    def ones(self, letters: str) -> nnx.Param:
        return nnx.Param(jnp.ones(self._shape(letters), self.dtype))

    def zeros(self, letters: str, *, present: bool) -> nnx.Param | None:
        return nnx.Param(jnp.zeros(self._shape(letters), self.dtype)) if present else None


class TransformerBlock(nnx.Module):
    """Attention and feed-forward layer, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, init: _Initializer):
        self.config = config
        self.attn_norm_D = init.ones("D")
        self.q_DNH = init.normal("DNH")
        self.k_DKH = init.normal("DKH")
        self.v_DKH = init.normal("DKH")
        self.o_NHD = init.normal("NHD")
        self.q_bias_NH = init.zeros("NH", present=config.qkv_bias)
        self.k_bias_KH = init.zeros("KH", present=config.qkv_bias)
        self.v_bias_KH = init.zeros("KH", present=config.qkv_bias)
        self.o_bias_D = init.zeros("D", present=config.out_bias)
        self.q_norm_H = init.ones("H") if config.qk_norm else None
        self.k_norm_H = init.ones("H") if config.qk_norm else None
        self.mlp_norm_D = init.ones("D")
        self.gate_DF = init.normal("DF") if config.gated else None
        self.up_DF = init.normal("DF")
        self.down_FD = init.normal("FD")
        self.gate_bias_F = init.zeros("F", present=config.mlp_bias and config.gated)
        self.up_bias_F = init.zeros("F", present=config.mlp_bias)
        self.down_bias_D = init.zeros("D", present=config.mlp_bias)

    def __call__(
        self,
        x_BTD: Array,
        angles: tuple[Array, Array],
        mask: Mask,
        *,
        cache: KVCache | None = None,
        layer: Array | int = 0,
        from_empty: bool = False,
        implementation: str = "auto",
    ) -> tuple[Array, KVCache | None]:
        """x_BTD of one layer in, that of the next out; `layer` is the slice of the cache to use.

        `angles` are the cosines and sines, each [B, T, P], of the positions. Called inside the scan, that is on arrays
        without their layer axis.
        """
        eps = self.config.rms_norm_eps
        q_BTNH, k_BTKH, v_BTKH = self.project(rms_norm(x_BTD, self.attn_norm_D[...], eps=eps), angles)
        if cache is not None:
            cache = kvcache.write(cache, layer, k_BTKH, v_BTKH)
        k_BSKH, v_BSKH = (k_BTKH, v_BTKH) if cache is None or from_empty else kvcache.read(cache, layer)
        mixed_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, mask, implementation=implementation)
        out_BTD = contract("BTNH,NHD->BTD", mixed_BTNH, self.o_NHD[...])
        x_BTD = x_BTD + add_bias(out_BTD, _value(self.o_bias_D))

        out_BTD = feed_forward(
            rms_norm(x_BTD, self.mlp_norm_D[...], eps=eps),
            self.up_DF[...],
            self.down_FD[...],
            activation=self.config.activation,
            gate_DF=_value(self.gate_DF),
            biases=(_value(self.gate_bias_F), _value(self.up_bias_F), _value(self.down_bias_D)),
        )
        return x_BTD + out_BTD, cache

    def project(self, x_BTD: Array, angles: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Queries and keys, turned to their positions, and values."""
        q_BTNH = add_bias(contract("BTD,DNH->BTNH", x_BTD, self.q_DNH[...]), _value(self.q_bias_NH))
        k_BTKH = add_bias(contract("BTD,DKH->BTKH", x_BTD, self.k_DKH[...]), _value(self.k_bias_KH))
        v_BTKH = add_bias(contract("BTD,DKH->BTKH", x_BTD, self.v_DKH[...]), _value(self.v_bias_KH))
        if self.config.qk_norm:
            q_BTNH = rms_norm(q_BTNH, self.q_norm_H[...], eps=self.config.rms_norm_eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm_H[...], eps=self.config.rms_norm_eps)
        return rotate(q_BTNH, *angles), rotate(k_BTKH, *angles), v_BTKH


class LLaMa(nnx.Module):
    """A decoder-only language model. It is its parameters: `jax.jit`, `jax.grad` and `jax.tree.map` take it as it is.

    It computes in the dtype of its parameters (norm statistics, rotary angles, softmax and logits in float32).
    """

    def __init__(self, config: LlamaConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Random weights: normal matrices, norms of one, biases of zero. Sizes come from `config`."""
        draws = iter(jax.random.split(key, 16))
        init = _Initializer(config, lambda: next(draws), dtype)
        self.config = config
        self.embed_VD = init.normal("VD")
        self.blocks = TransformerBlock(config, _Initializer(config, init.keys, dtype, config.num_layers))
        self.norm_D = init.ones("D")
        self.unembed_DV = None if config.tie_embeddings else init.normal("DV")

    def __call__(self, tokens_BT: Int[Array, "B T"], **options: Any) -> tuple[Float[Array, "B T V"], KVCache | None]:
        """Logits, float32 [B, T, V]; those at t predict token t + 1. Options and cache as in `hidden`."""
        x_BTD, cache = self.hidden(tokens_BT, **options)
        return self.unembed(x_BTD), cache

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "B T"] | None = None,
        segments_BT: Int[Array, "B T"] | None = None,
        lengths_B: Int[Array, "B"] | None = None,
        cache: KVCache | None = None,
        from_empty: bool = False,
        implementation: str = "auto",
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The normalised hidden states x_BTD that `unembed` turns into logits, and the cache with the new tokens in it.

        `tokens_BT` int32, each row filled from the left. `lengths_B` counts the real tokens of each row, by default T;
        what stands behind them never reaches the real ones. `positions_BT` defaults to 0, 1, 2, … behind what the
        cache holds. Tokens attend only within their number in `segments_BT` (packed documents; not with a cache).
        `from_empty` is the caller's word that all rows of the cache are empty, so that attention need not look into it.
        `implementation` is that of attention, see `utils.attention`.
        """
        B, T = tokens_BT.shape
        if cache is not None and segments_BT is not None:
            raise ValueError("segments_BT and a cache do not go together: give each document a row of its own")
        start_B = None if cache is None or from_empty else cache.length_B
        count_B = jnp.full(B, T, jnp.int32) if lengths_B is None else lengths_B
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
            positions_BT = positions_BT if start_B is None else positions_BT + start_B[:, None]
        c = self.config
        angles = rope_angles(
            positions_BT,
            c.head_dim,
            base=c.rope_theta,
            scaling=c.rope_scaling,
            length_B=_text_length(positions_BT, lengths_B),
        )
        mask = Mask(causal=True, offset_B=start_B, query_segments_BT=segments_BT, key_segments_BS=segments_BT)

        def layer(carry, inputs):
            x_BTD, cache = carry
            block, index, window = inputs
            return block(
                x_BTD,
                angles,
                mask.with_window(c.layer_windows[0] if window is None else window),
                cache=cache,
                layer=index,
                from_empty=from_empty,
                implementation=implementation,
            ), None

        layers = (self.blocks, jnp.arange(c.num_layers), _mixed_windows(c))
        (x_BTD, cache), _ = jax.lax.scan(layer, (self.embed_VD[...][tokens_BT], cache), layers)
        cache = None if cache is None else kvcache.advance(cache, count_B)
        return rms_norm(x_BTD, self.norm_D[...], eps=c.rms_norm_eps), cache

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, float32 [B, T, V], of hidden states."""
        if self.unembed_DV is None:
            return contract("BTD,VD->BTV", x_BTD, self.embed_VD[...], dtype=jnp.float32)
        return contract("BTD,DV->BTV", x_BTD, self.unembed_DV[...], dtype=jnp.float32)


def _value(parameter: nnx.Param | None) -> Array | None:
    return None if parameter is None else parameter[...]


def _mixed_windows(config: LlamaConfig) -> Array | None:
    """Windows by layer as data for the scan, or None where all layers share one and it can be a constant.

    Full attention is a window longer than any text.
    """
    if len(set(config.layer_windows)) == 1:
        return None
    return jnp.array([2**30 if window is None else window for window in config.layer_windows], jnp.int32)


def _text_length(positions_BT: Array, lengths_B: Array | None) -> Array | None:
    """Tokens in each row's text up to its last real token, or None where every token is real."""
    if lengths_B is None:
        return None
    last_B = jnp.maximum(lengths_B - 1, 0)
    return jnp.take_along_axis(positions_BT, last_B[:, None], axis=1)[:, 0] + 1
