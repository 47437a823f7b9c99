"""The key/value cache against a plain list of tokens for each row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from utils import kvcache

L, B, K, S, H = 2, 3, 2, 8, 4


@pytest.fixture
def empty():
    return kvcache.create(L, B, K, S, H, dtype=jnp.float32)


@partial(jax.jit, donate_argnums=0)
def append(cache, k_LBTKH, v_LBTKH, count_B):
    """New tokens into all layers, as a network does it."""
    for layer in range(L):
        cache = kvcache.write(cache, layer, k_LBTKH[layer], v_LBTKH[layer])
    return kvcache.advance(cache, count_B)


class Lists:
    """The slow cache: the tokens of each row as a list of [L, K, H] keys and values."""

    def __init__(self):
        self.rows = [[] for _ in range(B)]
        self.random = np.random.default_rng(0)

    def append(self, cache, T, counts):
        k, v = self.random.standard_normal((2, L, B, T, K, H), dtype=np.float32)
        for row, count in enumerate(counts):
            self.rows[row] += [(k[:, row, t], v[:, row, t]) for t in range(count)]
        return append(cache, jnp.array(k), jnp.array(v), jnp.array(counts, jnp.int32))

    def check(self, cache):
        np.testing.assert_array_equal(cache.length_B, [len(row) for row in self.rows])
        for layer in range(L):
            k_BSKH, v_BSKH = kvcache.read(cache, layer)
            assert k_BSKH.shape == v_BSKH.shape == (B, S, K, H)
            for b, row in enumerate(self.rows):
                for s, (k, v) in enumerate(row[:S]):
                    np.testing.assert_array_equal(k_BSKH[b, s], k[layer], err_msg=f"key, row {b}, slot {s}")
                    np.testing.assert_array_equal(v_BSKH[b, s], v[layer], err_msg=f"value, row {b}, slot {s}")


def test_an_empty_cache(empty):
    assert empty.capacity == S
    assert empty.k_LBKSH.shape == empty.v_LBKSH.shape == (L, B, K, S, H)
    np.testing.assert_array_equal(empty.length_B, [0] * B)
    assert empty.length_B.dtype == jnp.int32


def test_ragged_rows_are_appended_one_behind_the_other(empty):
    slow, cache = Lists(), empty
    for T, counts in [(3, (3, 1, 2)), (1, (1, 1, 1)), (2, (0, 2, 1)), (1, (1, 0, 1))]:
        cache = slow.append(cache, T, counts)
        slow.check(cache)


def test_what_goes_beyond_the_capacity_is_dropped_and_nothing_else_hurt(empty):
    slow = Lists()
    cache = slow.append(empty, 3, (3, 1, 0))
    cache = slow.append(cache, 4, (4, 4, 4))
    before = jax.device_get(cache)
    k, v = np.full((2, L, B, 4, K, H), 9.0, np.float32)
    cache = append(cache, jnp.array(k), jnp.array(v), jnp.array([4, 4, 4]))
    for got, old in zip((cache.k_LBKSH, cache.v_LBKSH), (before.k_LBKSH, before.v_LBKSH)):
        for b, length in enumerate((7, 5, 4)):
            np.testing.assert_array_equal(got[:, b, :, :length], old[:, b, :, :length])
            np.testing.assert_array_equal(got[:, b, :, length : length + 4], 9.0)
            np.testing.assert_array_equal(got[:, b, :, length + 4 :], 0.0)


def test_a_full_row_keeps_what_it_has(empty):
    slow = Lists()
    cache = slow.append(empty, S, (S, S, S))
    full = jax.device_get(cache)
    cache = append(cache, *(jnp.full((L, B, 2, K, H), 9.0) for _ in range(2)), jnp.zeros(B, jnp.int32))
    np.testing.assert_array_equal(cache.k_LBKSH, full.k_LBKSH)
    np.testing.assert_array_equal(cache.v_LBKSH, full.v_LBKSH)


def test_writing_one_layer_leaves_the_others(empty):
    k, v = jnp.ones((B, 2, K, H)), 2 * jnp.ones((B, 2, K, H))
    cache = jax.jit(kvcache.write)(empty, jnp.int32(1), k, v)
    assert not cache.k_LBKSH[0].any() and not cache.v_LBKSH[0].any()
    assert (cache.k_LBKSH[1, :, :, :2] == 1).all() and (cache.v_LBKSH[1, :, :, :2] == 2).all()
    np.testing.assert_array_equal(cache.length_B, [0] * B)
    k_BSKH, _ = jax.jit(kvcache.read)(cache, jnp.int32(1))
    np.testing.assert_array_equal(k_BSKH[:, :2], k)


def test_reset_all_and_write_again(empty):
    slow = Lists()
    cache = kvcache.reset(slow.append(empty, 3, (3, 1, 2)))
    slow.rows = [[] for _ in range(B)]
    slow.check(cache)
    slow.check(slow.append(cache, 2, (2, 1, 2)))


def test_reset_of_some_rows(empty):
    slow = Lists()
    cache = kvcache.reset(slow.append(empty, 3, (3, 1, 2)), rows_B=jnp.array([True, False, True]))
    slow.rows[0], slow.rows[2] = [], []
    slow.check(cache)
    slow.check(slow.append(cache, 2, (1, 2, 0)))


def test_rows_are_cut_back_to_lengths_but_not_grown(empty):
    slow = Lists()
    cache = kvcache.reset(slow.append(empty, 4, (4, 2, 3)), length_B=jnp.array([1, 7, 0]))
    slow.rows = [slow.rows[0][:1], slow.rows[1], []]
    slow.check(cache)
    cache = kvcache.reset(slow.append(cache, 4, (4, 4, 4)), rows_B=jnp.array([False, True, True]), length_B=2)
    slow.rows = [slow.rows[0], slow.rows[1][:2], slow.rows[2][:2]]
    slow.check(cache)


def test_fork_repeats_rows_side_by_side(empty):
    slow = Lists()
    cache = slow.append(empty, 3, (3, 1, 2))
    forked = kvcache.fork(cache, 2)
    np.testing.assert_array_equal(forked.length_B, [3, 3, 1, 1, 2, 2])
    for name in ("k_LBKSH", "v_LBKSH"):
        both = getattr(forked, name)
        assert both.shape == (L, 2 * B, K, S, H)
        for row in range(2 * B):
            np.testing.assert_array_equal(both[:, row], getattr(cache, name)[:, row // 2])


@pytest.mark.parametrize("dtype,size", [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_num_bytes(dtype, size):
    cache = kvcache.create(L, B, K, S, H, dtype=dtype)
    assert kvcache.num_bytes(cache) == 2 * L * B * K * S * H * size + 4 * B


def test_storage_has_the_dtype_of_the_cache():
    cache = kvcache.create(L, B, K, S, H, dtype=jnp.bfloat16)
    cache = kvcache.write(cache, 0, jnp.full((B, 1, K, H), 1 / 3), jnp.ones((B, 1, K, H)))
    assert cache.k_LBKSH.dtype == cache.v_LBKSH.dtype == jnp.bfloat16


def test_a_donated_append_is_in_place():
    """Every buffer of the result is one of the donated cache, and no temporary is as large as keys or values."""
    cache = jax.eval_shape(lambda: kvcache.create(L, B, K, 64, H, dtype=jnp.float32))
    new = jax.ShapeDtypeStruct((L, B, 1, K, H), jnp.float32)
    compiled = append.lower(cache, new, new, jax.ShapeDtypeStruct((B,), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == kvcache.num_bytes(cache)
    assert memory.temp_size_in_bytes < kvcache.num_bytes(cache) / 2
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and f"{K},64,{H}]" in line]
    assert not copies, copies


def test_a_cache_is_a_pytree(empty):
    doubled = jax.tree.map(lambda x: 2 * x, kvcache.advance(empty, 3))
    assert isinstance(doubled, kvcache.KVCache)
    np.testing.assert_array_equal(doubled.length_B, [6] * B)


@pytest.mark.parametrize("capacity", [4, S, 13])
def test_resize_keeps_what_the_rows_hold(empty, capacity):
    slow = Lists()
    cache = kvcache.resize(slow.append(empty, 3, (3, 1, 2)), capacity)
    assert cache.capacity == capacity
    k, v = (jnp.ones((L, B, 1, K, H)) for _ in range(2))
    after = append(cache, k, v, jnp.ones(B, jnp.int32))
    for b, row in enumerate(slow.rows):
        for s, (key, value) in enumerate(row):
            np.testing.assert_array_equal(after.k_LBKSH[:, b, :, s], key)
            np.testing.assert_array_equal(after.v_LBKSH[:, b, :, s], value)
        assert (after.k_LBKSH[:, b, :, len(row)] == 1).all()


def test_a_split_cache_is_the_stacked_one_layer_by_layer(empty):
    lists = Lists()
    held = lists.append(empty, 5, [5, 2, 0])
    few = kvcache.split(kvcache.resize(held, 6))
    assert few.capacity == 6 and [k.shape for k in few.k_LBKSH] == [(B, K, 6, H)] * L
    twice = [lists.random.standard_normal((2, L, B, 1, K, H), dtype=np.float32) for _ in range(2)]
    ends = []
    for cache in (held, few):
        for (k, v), count_B in zip(twice, (np.array([1, 1, 1]), np.array([0, 1, 1]))):
            cache = append(jax.tree.map(jnp.copy, cache), jnp.array(k), jnp.array(v), jnp.array(count_B, jnp.int32))
        ends.append(cache)
    for layer in range(L):
        for whole, part in zip(kvcache.read(ends[0], layer), kvcache.read(ends[1], layer)):
            np.testing.assert_array_equal(whole[:, :6], part)
    back = kvcache.put_back(held, ends[1])
    np.testing.assert_array_equal(back.length_B, ends[0].length_B)
    for ours, theirs in ((back.k_LBKSH, ends[0].k_LBKSH), (back.v_LBKSH, ends[0].v_LBKSH)):
        np.testing.assert_array_equal(ours[:, :, :, :6], theirs[:, :, :, :6])
    np.testing.assert_array_equal(back.k_LBKSH[:, :, :, 6:], held.k_LBKSH[:, :, :, 6:])
