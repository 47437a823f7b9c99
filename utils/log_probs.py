"""Log-probabilities of tokens and the entropy of what they are drawn from: one code for sampler and trainer.

Everything is float32 and in nats; logits may have any dtype and any leading dimensions. A logit of -inf rules a token
out; each row needs one that is not.
"""

import jax.numpy as jnp

from utils.shapes import Array, Float, Int


def log_probs(logits: Float[Array, "*N V"], tokens: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """Natural log of the probability of each row's token under softmax(logits)."""
    logits = logits.astype(jnp.float32)
    top, _, total = _softmax_parts(logits)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return ((chosen - top) - jnp.log(total))[..., 0]


def log_sum_exp(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """The logarithm of softmax's denominator."""
    top, _, total = _softmax_parts(logits.astype(jnp.float32))
    return (top + jnp.log(total))[..., 0]


def entropy(logits: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """The entropy of softmax(logits)."""
    logits = logits.astype(jnp.float32)
    top, exp, total = _softmax_parts(logits)
    below = jnp.where(exp > 0, logits - top, 0)
    return (jnp.log(total) - jnp.sum(exp * below, axis=-1, keepdims=True) / total)[..., 0]


def _softmax_parts(logits: Array) -> tuple[Array, Array, Array]:
    """The largest logit [..., 1], exponentials of the distances to it [..., V], and their sum [..., 1]."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    return top, exp, jnp.sum(exp, axis=-1, keepdims=True)
