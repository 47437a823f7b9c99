"""Presets have the sizes that they are known by."""

import jax
import pytest

from models.llama.model import LLaMa
from models.llama.presets import PRESETS

# Parameters, counted with embeddings once where tied: published ones where a checkpoint has them.
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
ABOUT = {
    "tiny": 1e6,
    "small": 25e6,
    "medium": 112e6,
    "505m": 505e6,
    "gpt-125m": 125e6,
    "gpt-350m": 350e6,
    "gpt-760m": 760e6,
    "gpt-1b": 1.3e9,
}


def count(name: str) -> int:
    skeleton = jax.eval_shape(lambda: LLaMa(PRESETS[name], key=jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(skeleton))


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    assert count(name) == PARAMETERS[name]


@pytest.mark.parametrize("name", ABOUT)
def test_own_sizes(name):
    assert count(name) == pytest.approx(ABOUT[name], rel=0.2)


@pytest.mark.parametrize(
    "name,layers,width,heads,kv_heads",
    [("tiny", 8, 128, 4, 1), ("small", 12, 384, 12, 3), ("medium", 20, 640, 16, 4), ("qa", 10, 512, 8, 8)],
)
def test_own_shapes(name, layers, width, heads, kv_heads):
    c = PRESETS[name]
    assert (c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads) == (layers, width, heads, kv_heads)


def test_promised_details():
    assert (PRESETS["medium"].intermediate_size, PRESETS["medium"].vocab_size) == (2048, 20000)
    assert PRESETS["505m"].vocab_size == 50000
    assert PRESETS["qa"].max_position_embeddings == 1024


def test_every_preset_is_counted():
    assert PRESETS.keys() == PARAMETERS.keys() | ABOUT.keys() | {"qa"}
