"""Log-probabilities and entropies of logits against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sampling
from utils.log_probs import entropy, log_probs, log_sum_exp

V = 13


def exact(logits, tokens):
    """Row by row in float64: log-probabilities, entropies, and logarithms of denominators."""
    results = np.zeros((3, *tokens.shape))
    for place in np.ndindex(*tokens.shape):
        logit_V = np.asarray(logits, np.float64)[place]
        log_sum = np.log(np.exp(logit_V - logit_V.max()).sum()) + logit_V.max()
        logprob_V = logit_V - log_sum
        kept_V = logprob_V[np.isfinite(logprob_V)]
        results[(slice(None), *place)] = logprob_V[tokens[place]], -(np.exp(kept_V) * kept_V).sum(), log_sum
    return results


def inputs(shape, scale=3.0):
    random = np.random.default_rng(0)
    logits = (scale * random.standard_normal((*shape, V))).astype(np.float32)
    return logits, np.asarray(random.integers(0, V, shape), np.int32)


@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (2, 3, 2)])
def test_against_double_precision(shape):
    logits, tokens = inputs(shape)
    got = np.array([log_probs(logits, tokens), entropy(logits), log_sum_exp(logits)])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact(logits, tokens), rtol=1e-6, atol=1e-6)


def test_logits_of_any_dtype_are_computed_with_in_float32():
    logits, tokens = inputs((50,))
    half = jnp.asarray(logits, jnp.bfloat16)
    for function in (lambda x: log_probs(x, tokens), entropy, log_sum_exp):
        np.testing.assert_array_equal(function(half), function(half.astype(jnp.float32)))


def test_far_from_zero_nothing_is_lost():
    """Adding the same to all logits changes no probability; the numbers here are exact in float32."""
    logits, tokens = inputs((50,))
    logits = np.round(logits * 64) / 64
    for shift in (-(2.0**15), 2.0**15):
        np.testing.assert_array_equal(log_probs(logits + np.float32(shift), tokens), log_probs(logits, tokens))
        np.testing.assert_array_equal(entropy(logits + np.float32(shift)), entropy(logits))
    assert np.isfinite(log_probs(1e30 * logits, tokens)).all()


def test_tokens_that_are_ruled_out():
    logits, tokens = inputs((4,))
    logits[0] = -np.inf
    logits[0, 3] = 2.0
    logits[1, 5:] = -np.inf
    tokens[:2] = 3
    want = exact(logits, tokens)
    np.testing.assert_allclose([log_probs(logits, tokens), entropy(logits)], want[:2], rtol=1e-6, atol=1e-6)
    assert log_probs(logits, np.array([4, 5, 0, 0], np.int32))[:2].tolist() == [-np.inf] * 2


def test_the_sampler_has_the_same():
    logits, tokens = inputs((4,))
    ours, theirs = (str(jax.make_jaxpr(function)(logits, tokens)) for function in (log_probs, sampling.log_probs))
    assert ours == theirs
