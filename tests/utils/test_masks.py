"""A mask for a block is that part of the whole mask; `test_attention.py` holds the whole against a double loop."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from utils.masks import Mask

T, S = 9, 11
PARTS = list(itertools.product([True, False], [None, 1, 4], *[[False, True]] * 3))


@pytest.mark.parametrize("causal,window,has_offset,has_lengths,has_segments", PARTS)
def test_a_block_is_a_part_of_the_whole(causal, window, has_offset, has_lengths, has_segments):
    random = np.random.default_rng(0)
    mask = Mask(
        causal=causal,
        window=window,
        offset_B=jnp.array([0, 3]) if has_offset else None,
        key_length_B=jnp.array([5, 12]) if has_lengths else None,
        query_segments_BT=random.integers(0, 3, (2, T)) if has_segments else None,
        key_segments_BS=random.integers(0, 3, (2, S)) if has_segments else None,
    )
    whole = np.broadcast_to(mask.draw(T, S), (2, T, S))
    for (a, b), (first, last) in itertools.product([(0, 9), (0, 4), (4, 9), (8, 9)], [(0, 11), (0, 3), (5, 11)]):
        part = mask.block((a, b), (first, last)).draw(b - a, last - first)
        np.testing.assert_array_equal(np.broadcast_to(part, (2, b - a, last - first)), whole[:, a:b, first:last])


def test_a_block_of_a_block():
    mask = Mask(window=5, key_length_B=jnp.array([7]))
    twice = mask.block((2, 9), (1, 11)).block((1, 4), (2, 8))
    np.testing.assert_array_equal(twice.draw(3, 6), mask.block((3, 6), (3, 9)).draw(3, 6))
