"""Rollouts for training: what is drawn does not depend on its neighbours, and log-probabilities are the model's own."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.rollout import Rollout, sampler
from models.llama import LLaMa
from models.llama.init import random_model
from tests.models.llama.checkpoints import TINY

MODEL = random_model(
    replace(TINY, num_layers=2, layer_windows=(None, 6), initializer_range=0.15), key=jax.random.key(0), mesh=None
)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21]]


def rolled(prompts=PROMPTS, numbers=None, *, model: LLaMa = MODEL, **options) -> Rollout:
    defaults = dict(max_new_tokens=8, num_samples=3, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, seed=0)
    roll_out: Callable = sampler(**defaults | dict(stop_ids=frozenset({3, 40})) | options)
    return roll_out(model, prompts, range(len(prompts)) if numbers is None else numbers)


def test_arrays_and_where_completions_end():
    rollout = rolled(num_samples=8)
    assert rollout.tokens_BM.shape == rollout.logprobs_BM.shape == (32, 8)
    assert (rollout.tokens_BM.dtype, rollout.logprobs_BM.dtype) == (np.int32, np.float32)
    assert rollout.stopped_B.any() and not rollout.stopped_B.all()
    for tokens_M, count, logprobs_M, stopped in zip(*rollout):
        own = tokens_M[:count].tolist()
        assert not {3, 40} & set(own[:-1]) and (own[-1] in (3, 40)) == stopped
        assert stopped or count == 8
        assert not tokens_M[count:].any() and (logprobs_M[:count] < 0).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9}], ids=["all", "filtered"])
def test_log_probabilities_are_those_of_a_forward_pass(temperature, filters):
    """Under softmax(logits / temperature), whatever the filters leave out."""
    rollout = rolled(temperature=temperature, **filters)
    rows, T = [], 18
    for row, (tokens_M, count) in enumerate(zip(rollout.tokens_BM, rollout.count_B)):
        own = [*PROMPTS[row // 3], *tokens_M[:count].tolist()]
        rows.append(own + [0] * (T - len(own)))
    logits_BTV = np.asarray(_forward(MODEL, jnp.array(rows)), np.float64) / temperature
    logprobs_BTV = logits_BTV - np.log(np.exp(logits_BTV - logits_BTV.max()).sum(-1, keepdims=True)) - logits_BTV.max()
    for row, (tokens_M, count, own_M, _) in enumerate(zip(*rollout)):
        first = len(PROMPTS[row // 3])
        expected = [logprobs_BTV[row, first + m - 1, tokens_M[m]] for m in range(count)]
        assert np.abs(own_M[:count] - expected).max() < 1e-5


_forward = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


def same_rows(a: Rollout, rows_a: slice, b: Rollout, rows_b: slice) -> bool:
    exact = all(
        np.array_equal(getattr(a, x)[rows_a], getattr(b, x)[rows_b]) for x in ("tokens_BM", "count_B", "stopped_B")
    )
    return exact and np.allclose(a.logprobs_BM[rows_a], b.logprobs_BM[rows_b], atol=1e-5)


def test_a_completion_comes_from_its_number_whatever_else_is_in_the_batch():
    together = rolled()
    for place, number in ((0, 0), (2, 2), (1, 1)):
        alone = rolled([PROMPTS[place]], [number])
        assert same_rows(alone, slice(0, 3), together, slice(3 * place, 3 * place + 3))
    turned = rolled(PROMPTS[::-1], range(4)[::-1])
    assert same_rows(turned, slice(0, 3), together, slice(9, 12))
    more = rolled(num_samples=5)
    assert same_rows(more, slice(5, 8), together, slice(3, 6))
    for changes in ({"numbers": [7, 1, 2, 3]}, {"seed": 1}):
        other = rolled(**changes)
        assert not np.array_equal(other.tokens_BM[:3], together.tokens_BM[:3])
    assert len({tuple(row) for row in together.tokens_BM[:3].tolist()}) == 3  # samples differ


@pytest.mark.parametrize("rows_at_once", [4, 9])
def test_parts_of_a_rollout_draw_as_the_whole(rows_at_once):
    whole, parts = rolled(num_samples=4), rolled(num_samples=4, rows_at_once=rows_at_once)
    for x, y in zip(parts[:2] + parts[3:], whole[:2] + whole[3:], strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(parts.logprobs_BM, whole.logprobs_BM, atol=1e-5)


def test_the_same_prompt_twice_draws_apart():
    rollout = rolled([PROMPTS[0], PROMPTS[0]], num_samples=1)
    assert not np.array_equal(*rollout.tokens_BM)


def test_all_stop_at_once():
    rollout = rolled(stop_ids=frozenset(range(TINY.vocab_size)))
    assert (rollout.count_B == 1).all() and rollout.stopped_B.all() and not rollout.tokens_BM[:, 1:].any()


def test_none_stops():
    rollout = rolled(stop_ids=frozenset())
    assert (rollout.count_B == 8).all() and not rollout.stopped_B.any()


def test_one_token():
    longer, one = rolled(), rolled(max_new_tokens=1)
    assert one.tokens_BM.shape == (12, 1) and np.array_equal(one.tokens_BM[:, 0], longer.tokens_BM[:, 0])
    assert np.array_equal(one.stopped_B, np.isin(one.tokens_BM[:, 0], (3, 40)))


def test_greedy_completions_are_one():
    rollout = rolled(temperature=0.0, num_samples=2)
    assert np.array_equal(rollout.tokens_BM[0::2], rollout.tokens_BM[1::2])


def test_the_context_is_the_limit():
    model = random_model(replace(MODEL.config, max_position_embeddings=16), key=jax.random.key(0), mesh=None)
    rollout = rolled([PROMPTS[2], PROMPTS[1]], model=model, max_new_tokens=20, stop_ids=frozenset())
    assert rollout.tokens_BM.shape == (6, 20)
    assert rollout.count_B.tolist() == [6] * 3 + [15] * 3 and not rollout.stopped_B.any()


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 64], "leaves no room in a context of 64"),
        ([[99]], "outside the vocabulary"),
    ],
)
def test_prompts_that_cannot_be(prompts, error):
    with pytest.raises(ValueError, match=error):
        rolled(prompts)


@pytest.mark.parametrize("changes", [{"top_p": 2.0}, {"num_samples": 0}, {"seed": -1}, {"max_new_tokens": 0}])
def test_options_that_cannot_be(changes):
    with pytest.raises(ValueError):
        rolled(**changes)
