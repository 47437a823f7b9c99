"""Rows that go on from a shared prefix: the same hidden states and gradients as whole texts, for every kind of mask."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama import LLaMa
from models.llama.model import REMAT
from models.llama.presets import PRESETS

PROMPTS, COPIES, NEW = (5, 9, 2), 3, 7
S = 9
SMALL = replace(
    PRESETS["tiny"],
    num_layers=4,
    hidden_size=32,
    intermediate_size=48,
    vocab_size=61,
    head_dim=8,
    layer_windows=(None,) * 4,
)
NETWORKS = {
    "plain": SMALL,
    "window": replace(SMALL, layer_windows=(4,) * 4),
    "mixed windows": replace(SMALL, layer_windows=(None, 4, 8, 2)),
}


def texts():
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 61, length) for length in PROMPTS]
    completions_BCT = random.integers(0, 61, (len(PROMPTS), COPIES, NEW))
    prompts_BS, real_BS = np.zeros((len(PROMPTS), S), np.int32), np.zeros((len(PROMPTS), S), np.int32)
    for row, prompt in enumerate(prompts):
        prompts_BS[row, S - len(prompt) :], real_BS[row, S - len(prompt) :] = prompt, 1
    return prompts, completions_BCT, prompts_BS, real_BS


def shared(model, prompts_BS, real_BS, completions_BCT, remat="none", implementation="auto"):
    """Hidden states of the prompts' places and of the completions'."""
    positions_BS = jnp.maximum(jnp.cumsum(real_BS, axis=-1) - 1, 0)
    options = dict(remat=remat, implementation=implementation)
    x_BSD, prefix = model.hidden(
        prompts_BS, positions_BT=positions_BS, segments_BT=real_BS, keep_prefix=True, **options
    )
    x_BTD, none = model.hidden(completions_BCT.reshape(-1, NEW), prefix=prefix, **options)
    assert none is None
    return x_BSD, x_BTD.reshape(*completions_BCT.shape, -1)


def whole(model, prompts, completions_BCT):
    """The same, each text in a row of its own."""
    rows = []
    for prompt, completions_CT in zip(prompts, completions_BCT):
        tokens_CT = np.concatenate([np.tile(prompt, (COPIES, 1)), completions_CT], axis=1)
        rows.append((len(prompt), model.hidden(jnp.array(tokens_CT))[0]))
    return rows


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("remat", REMAT)
def test_rows_behind_a_prefix_are_those_of_whole_texts(name, remat):
    model = LLaMa(replace(NETWORKS[name], initializer_range=0.15), key=jax.random.key(0))
    prompts, completions_BCT, prompts_BS, real_BS = texts()
    weight_D = jax.random.normal(jax.random.key(1), (32,))

    def one(model):
        x_BSD, x_BCTD = shared(model, prompts_BS, real_BS, completions_BCT, remat)
        return jnp.sum(jnp.sin(x_BCTD @ weight_D)), (x_BSD, x_BCTD)

    def other(model):
        rows = whole(model, prompts, completions_BCT)
        return sum(jnp.sum(jnp.sin(x_CTD[:, length:] @ weight_D)) for length, x_CTD in rows), rows

    (_, (x_BSD, x_BCTD)), gradient = jax.jit(jax.value_and_grad(one, has_aux=True))(model)
    (_, rows), expected = jax.jit(jax.value_and_grad(other, has_aux=True))(model)
    for row, (length, x_CTD) in enumerate(rows):
        np.testing.assert_allclose(x_BCTD[row], x_CTD[:, length:], atol=5e-5)
        np.testing.assert_allclose(x_BSD[row, S - length :], x_CTD[0, :length], atol=5e-5)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=5e-5 * max(1, np.abs(y).max()))


def test_rows_of_a_group_do_not_see_each_other_and_padding_is_seen_by_none():
    model = LLaMa(replace(SMALL, initializer_range=0.15), key=jax.random.key(0))
    _, completions_BCT, prompts_BS, real_BS = texts()
    _, before = shared(model, prompts_BS, real_BS, completions_BCT)
    changed_BCT = completions_BCT.copy()
    changed_BCT[0, 1] = (changed_BCT[0, 1] + 1) % 61
    padded_BS = np.where(real_BS == 1, prompts_BS, 17)
    _, after = shared(model, padded_BS, real_BS, changed_BCT)
    same = np.ones(completions_BCT.shape[:2], bool)
    same[0, 1] = False
    np.testing.assert_array_equal(np.asarray(after)[same], np.asarray(before)[same])
    assert np.abs(np.asarray(after - before)[0, 1]).max() > 0.01


def test_a_prefix_without_cache_segments_or_odd_rows():
    model = LLaMa(SMALL, key=jax.random.key(0))
    _, _, prompts_BS, real_BS = texts()
    _, prefix = model.hidden(prompts_BS, segments_BT=real_BS, keep_prefix=True)
    with pytest.raises(ValueError, match="4 rows cannot go on from a prefix of 3"):
        model.hidden(jnp.zeros((4, 2), jnp.int32), prefix=prefix)
    with pytest.raises(ValueError, match="without cache and segments"):
        model.hidden(jnp.zeros((3, 2), jnp.int32), segments_BT=jnp.ones((3, 2), jnp.int32), prefix=prefix)
