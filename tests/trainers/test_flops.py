"""Counted FLOPs against the products in traced programs and against XLA's own count; peaks against data sheets."""

import math
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from models.llama import PRESETS
from models.llama.config import LlamaConfig
from models.llama.model import LLaMa
from trainers import flops
from utils.attention import Mask

TINY = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    rope_scaling=None,
    tie_embeddings=False,
    activation="silu",
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    layer_windows=(None,) * 3,
    initializer_range=0.02,
)
CONFIGS = {
    "plain": TINY,
    "tied-one-kv-head": replace(TINY, tie_embeddings=True, num_kv_heads=1),
    "not-gated": replace(TINY, gated=False, mlp_bias=True, qkv_bias=True, qk_norm=True),
    "window": replace(TINY, layer_windows=(5,) * 3),
}
# Two rows of documents 1, 2, … with padding behind them.
SEGMENTS_BT = np.array([[1] * 7 + [2] * 4 + [3] + [0] * 2, [1] * 13 + [0]])
LENGTHS = [7, 4, 1, 13]


def traced_products(jaxpr, *, times: int = 1):
    """(FLOPs, whether it has batch axes) of every product of matrices, those of scans as often as they run.

    Products with weights have no batch axes, those of attention have two: the row and the head.
    """
    for equation in jaxpr.eqns:
        repeats = times
        if equation.primitive.name == "dot_general":
            left, right = (operand.aval.shape for operand in equation.invars)
            (contract, contract_right), (batch, batch_right) = equation.params["dimension_numbers"]
            free = math.prod(n for axis, n in enumerate(right) if axis not in (*contract_right, *batch_right))
            yield 2 * times * math.prod(left) * free, bool(batch)
            assert [left[axis] for axis in contract] == [right[axis] for axis in contract_right]
        elif equation.primitive.name == "scan":
            repeats *= equation.params["length"]
        else:
            assert equation.primitive.name != "while", "the number of turns is not known"
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from traced_products(inner, times=repeats)


def step_flops(config: LlamaConfig, *, trained=lambda name: True) -> tuple[int, int]:
    """Traced FLOPs of a gradient on SEGMENTS_BT: with weights for a token, and of attention if all keys are read."""
    model = jax.eval_shape(lambda: LLaMa(config, key=jax.random.key(0)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    chosen = [trained(jax.tree_util.keystr(path)) for path, _ in leaves]
    assert any(chosen)

    def loss(free, fixed, tokens_BT, segments_BT):
        free, fixed = iter(free), iter(fixed)
        model = jax.tree.unflatten(tree, [next(free) if one else next(fixed) for one in chosen])
        return jnp.sum(jnp.square(model(tokens_BT, segments_BT=segments_BT, implementation="xla")[0]))

    parts = [[leaf for (_, leaf), one in zip(leaves, chosen) if one is wanted] for wanted in (True, False)]
    rows_BT = jax.ShapeDtypeStruct(SEGMENTS_BT.shape, jnp.int32)
    traced = jax.make_jaxpr(jax.value_and_grad(loss))(*parts, rows_BT, rows_BT).jaxpr
    # Without what nobody asks for, as XLA leaves it out: hand-written gradients are traced for all operands.
    traced, _ = dce_jaxpr(traced, [True] * len(traced.outvars))
    products = list(traced_products(traced))
    weights = sum(count for count, batched in products if not batched)
    assert weights % SEGMENTS_BT.size == 0
    return weights // SEGMENTS_BT.size, sum(count for count, batched in products if batched)


def drawn_pairs(segments_BT: np.ndarray, window: int | None) -> int:
    """Pairs that the mask of attention allows to tokens that are no padding."""
    segments_BT = jnp.asarray(segments_BT)
    mask = Mask(causal=True, window=window, query_segments_BT=segments_BT, key_segments_BS=segments_BT)
    T = segments_BT.shape[1]
    return int(jnp.sum(mask.draw(T, T) & (segments_BT > 0)[:, :, None]))


@pytest.mark.parametrize("name", CONFIGS)
def test_training_costs_what_its_traced_products_cost(name):
    config = CONFIGS[name]
    per_token, attention = step_flops(config)
    B, T = SEGMENTS_BT.shape
    pairs = drawn_pairs(SEGMENTS_BT, config.layer_windows[0])
    once, rest = divmod(attention * 6, 7)  # of seven products one, the scores, is computed again backward
    needed = once * pairs // (B * T * T)
    assert rest == 0 and needed * B * T * T == once * pairs
    assert flops.training_flops(config, LENGTHS) == per_token * sum(LENGTHS) + needed


def test_layers_have_windows_of_their_own():
    config = replace(TINY, layer_windows=(None, 3, 5))
    pairs = sum(drawn_pairs(SEGMENTS_BT, window) for window in (None, 3, 5))
    assert flops.attention_flops(config, LENGTHS) == 4 * config.num_heads * config.head_dim * pairs


def test_frozen_weights_cost_no_gradients_of_their_own():
    # Norms have no products: what is left is forward, gradients of inputs, and attention whole.
    per_token, attention = step_flops(TINY, trained=lambda name: "norm" in name)
    whole_per_token, whole_attention = step_flops(TINY)
    assert per_token * 3 == whole_per_token * 2 and attention == whole_attention
    frozen, whole = (flops.training_flops(TINY, LENGTHS, adapter_params=n) for n in (0, None))
    assert whole - frozen == (whole_per_token - per_token) * sum(LENGTHS)


def test_an_adapter_has_all_three_products():
    D, F, R, T = 16, 24, 3, 5

    def loss(a_DR, b_RF, w_DF, x_TD):
        return jnp.sum(jnp.square(x_TD @ w_DF + x_TD @ a_DR @ b_RF))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((D, R), (R, F), (D, F), (T, D))]
    gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 3)))(*shapes)
    traced = sum(count for count, _ in traced_products(gradient.jaxpr))
    assert traced == T * (2 * 2 * D * F + 6 * (D * R + R * F))
    with_adapter, without = (flops.training_flops(TINY, LENGTHS, adapter_params=n) for n in (D * R + R * F, 0))
    assert (with_adapter - without) * T == (traced - T * 2 * 2 * D * F) * sum(LENGTHS)


def test_xla_counts_the_same_but_for_small_change():
    # A single layer, because XLA counts the body of a loop once. It counts norms and softmax too, and all T^2 pairs.
    T = 32
    config = replace(TINY, hidden_size=128, intermediate_size=256, head_dim=32, num_layers=1, layer_windows=(None,))
    model = jax.eval_shape(lambda: LLaMa(config, key=jax.random.key(0)))
    run = jax.jit(lambda model, tokens_BT: model(tokens_BT, implementation="xla")[0])
    counted = run.lower(model, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile().cost_analysis()["flops"]
    ours = T * flops.matrix_flops(config) + 4 * config.num_heads * config.head_dim * T * T
    assert ours < counted < 1.05 * ours


def test_a_real_network_by_hand():
    # Llama 3.2 1B: per layer q and o 2048 x 2048, k and v 2048 x 512, three of 2048 x 8192; 16 layers; 128256 words.
    config = PRESETS["llama-3.2-1b"]
    matrices = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192) + 2048 * 128256
    assert matrices == 1_235_746_816  # the parameters of the network without its norms
    pairs = 8192 * 8193 // 2
    assert flops.training_flops(config, [8192]) == 6 * matrices * 8192 + 12 * 16 * 32 * 64 * pairs
    # PaLM's 6 N + 12 L H Q T with half the keys, to a token.
    palm = 6 * matrices + 12 * 16 * 32 * 64 * 8192 / 2
    assert flops.training_flops(config, [8192]) / 8192 == pytest.approx(palm, rel=1e-4)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_pairs_are_those_of_the_mask(window):
    assert flops.attended_pairs(LENGTHS, window) == drawn_pairs(SEGMENTS_BT, window)


def test_pairs_of_long_documents_do_not_overflow():
    assert flops.attended_pairs(np.full(1000, 2**20, np.int32)) == 1000 * 2**19 * (2**20 + 1)
    assert flops.attended_pairs([]) == 0
    assert flops.training_flops(TINY, []) == 0


def test_documents_are_found_in_packed_rows():
    assert sorted(flops.document_lengths(SEGMENTS_BT).tolist()) == sorted(LENGTHS)
    # A number that comes to stand beside itself across rows, or in a row again, is another document.
    again_BT = np.array([[0, 2, 2, 1], [1, 1, 0, 1]])
    assert flops.document_lengths(again_BT).tolist() == [2, 1, 2, 1]
    assert flops.document_lengths(np.zeros((2, 3), int)).tolist() == []


@pytest.mark.parametrize("lengths", [[3, -1], [2.5], 7, [[3]]])
def test_senseless_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match=r"-1 tokens|whole numbers, not"):
        flops.training_flops(TINY, lengths)


def test_senseless_adapters_are_refused():
    with pytest.raises(ValueError, match="-4"):
        flops.training_flops(TINY, [3], adapter_params=-4)


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-40GB", jnp.float32, 156),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 989.5),
        ("NVIDIA H100 PCIe", "float16", 756.5),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "float32", 183),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 3090", "bfloat16", 71),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla T4", "float32", 8.1),
        ("TPU v3", "bfloat16", 61.5),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "float32", 918),
        ("TPU7x", "bfloat16", 1153.5),
    ],
)
def test_peaks_of_known_devices(kind, dtype, teraflops):
    assert flops.peak_flops(kind, dtype) == teraflops * 1e12


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "float32"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA L40", "bfloat16"),
        ("Tesla T4", "bfloat16"),
        ("TPU v4", "float16"),
        ("NVIDIA H100 PCIe", "int8"),
    ],
)
def test_no_peak_is_guessed(kind, dtype):
    assert flops.peak_flops(kind, dtype) is None


def test_half_precision_is_never_slower_in_the_table():
    for kind, (*halves, single) in flops._TFLOPS.items():
        assert any(half is not None for half in halves), kind
        assert all(half >= single for half in halves if half is not None), kind


def test_measured_peak_is_the_best_size():
    # Every timing lasts `pace` on this clock, so the larger size is 8 times faster, and the pace decides the repeats.
    def clock(pace):
        ticks = iter(range(1000))
        return lambda: next(ticks) * pace

    one = flops.measured_matmul_peak("float32", sizes=(8, 16), repeats=2, patience=1, clock=clock(0.15))
    assert one == pytest.approx(2 * 16**3 / 0.15)
    ten = flops.measured_matmul_peak("float32", sizes=(8,), repeats=2, clock=clock(0.01))
    assert ten == pytest.approx(10 * 2 * 8**3 / 0.01)
    impatient = flops.measured_matmul_peak("bfloat16", sizes=(8, 16), repeats=2, patience=0.1, clock=clock(0.15))
    assert impatient == pytest.approx(2 * 8**3 / 0.15)


def test_measured_peak_is_of_this_machine():
    assert 1e7 < flops.measured_matmul_peak("float32", sizes=(256,), repeats=1) < 1e16


def test_products_in_a_row_stay_finite():
    x_MM = flops._compiled_products(64, 40, "float32")()
    assert 0.1 < float(jnp.std(x_MM)) < 10


def test_peak_memory_of_the_process_rises_and_stays():
    before = flops.peak_memory_bytes()
    block = np.ones(2**25)  # 256 MiB
    during = flops.peak_memory_bytes()
    del block
    assert 2**20 < before < 2**42
    # The kernel's counts are some pages off, and the peak so far may have been higher than what is in use.
    slack = 2**22
    assert during >= max(2**28, before - slack)
    assert flops.peak_memory_bytes() >= during - slack


def test_peak_memory_without_linux_records(monkeypatch):
    import resource

    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(resource, "getrusage", lambda _: type("Usage", (), {"ru_maxrss": 3000})())
    monkeypatch.setattr(sys, "platform", "linux")
    assert flops.peak_memory_bytes() == 3000 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert flops.peak_memory_bytes() == 3000


def test_peak_memory_of_an_accelerator(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": 5, "bytes_in_use": 9}), Device({"peak_bytes_in_use": 7}), Device(None)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert flops.peak_memory_bytes() == 7
    monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])
    assert flops.peak_memory_bytes() is None
