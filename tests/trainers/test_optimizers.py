"""Learning rates by hand, and each optimizer against its formula or its promise, on the parameters of a network."""

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.llama import LLaMa, LlamaConfig
from models.llama.lora import LoraConfig, add_lora
from trainers.optimizers import NAMES, SCHEDULES, OptimizerConfig, decayed, make_optimizer, make_schedule

PEAK, STEPS = 0.4, 20
RAMP = [PEAK * (n + 1) / 4 for n in range(4)]  # a warm-up of 4 steps
REST = STEPS - 4
CURVES = {
    "constant": [PEAK] * REST,
    "cosine": [PEAK * (0.25 + 0.75 * (1 + math.cos(math.pi * n / REST)) / 2) for n in range(REST)],
    "linear": [PEAK * (1 - 0.75 * n / REST) for n in range(REST)],
    "wsd": [PEAK] * (REST - 5) + [PEAK * (1 - 0.75 * n / 5) for n in range(5)],
}
NETWORK = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=16,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    rope_scaling=None,
    tie_embeddings=False,
    activation="silu",
    gated=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
    layer_windows=(None, None),
    initializer_range=0.3,
)


def schedule_of(name, **options):
    decay = {"decay_fraction": 0.25} if name == "wsd" else {}
    final = {} if name == "constant" else {"final_fraction": 0.25}
    config = OptimizerConfig(schedule=name, **final, **decay, **options)
    return make_schedule(config, learning_rate=PEAK, num_steps=STEPS)


@pytest.mark.parametrize("warmup", [4, 0.2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name, warmup):
    got = jax.vmap(schedule_of(name, warmup=warmup))(jnp.arange(STEPS))
    np.testing.assert_allclose(got, RAMP + CURVES[name], rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_without_warmup_and_beyond_the_end(name):
    schedule = schedule_of(name)
    assert float(schedule(0)) == pytest.approx(PEAK)
    end = PEAK if name == "constant" else PEAK / 4
    assert [float(schedule(n)) for n in (STEPS, STEPS + 50)] == pytest.approx([end, end])


def test_warmup_of_one_step_or_of_all():
    assert [float(schedule_of("linear", warmup=1)(n)) for n in (0, 1)] == pytest.approx([PEAK, PEAK])
    whole = schedule_of("cosine", warmup=STEPS)
    assert [float(whole(n)) for n in (0, 9, 19)] == pytest.approx([PEAK / 20, PEAK / 2, PEAK])


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(name="sgd"), "name 'sgd' is none of adamw, lion, adafactor, muon"),
        (dict(schedule="step"), "schedule 'step' is none of constant, cosine"),
        (dict(warmup=-1), "warmup -1"),
        (dict(warmup=1.0), "warmup 1.0"),
        (dict(warmup=-0.1), "warmup -0.1"),
        (dict(final_fraction=-0.1), "final_fraction -0.1"),
        (dict(final_fraction=1.1), "final_fraction 1.1"),
        (dict(schedule="constant", final_fraction=0.1), "final_fraction 0.1 means nothing to a constant schedule"),
        (dict(weight_decay=math.nan), "weight_decay nan"),
        (dict(schedule="wsd"), "decay_fraction None belongs to the schedule wsd"),
        (dict(decay_fraction=0.1), "decay_fraction 0.1 belongs to the schedule wsd, not cosine"),
        (dict(schedule="wsd", decay_fraction=0.0), "decay_fraction 0.0"),
        (dict(schedule="wsd", decay_fraction=1.1), "decay_fraction 1.1"),
        (dict(weight_decay=-0.1), "weight_decay -0.1"),
        (dict(b1=1.0), "b1 1.0"),
        (dict(b2=-0.1), "b2 -0.1"),
        (dict(eps=-1e-8), "eps -1e-08"),
        (dict(eps=0.0), "eps 0.0 would divide by zero"),
        (dict(momentum=0.9), "momentum 0.9 means nothing to adamw"),
        (dict(name="lion", eps=1e-8), "eps 1e-08 means nothing to lion"),
        (dict(name="adafactor", b1=0.9), "b1 0.9 means nothing to adafactor"),
        (dict(name="muon", momentum=1.0), "momentum 1.0"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


@pytest.mark.parametrize(
    "options,learning_rate,num_steps,message",
    [
        ({}, 0.0, 10, "learning_rate 0.0"),
        ({}, math.nan, 10, "learning_rate nan"),
        ({}, math.inf, 10, "learning_rate inf"),
        ({}, 0.1, 0, "num_steps 0"),
        (dict(warmup=11), 0.1, 10, "warm-up of 11 steps and decay of 0 do not fit into 10 steps"),
        (dict(warmup=6, schedule="wsd", decay_fraction=0.5), 0.1, 10, "warm-up of 6 steps and decay of 5 do not fit"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(options, learning_rate, num_steps, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(**options), learning_rate=learning_rate, num_steps=num_steps)


# On the parameters of a network.


@cache
def parameters() -> nnx.State:
    """As `Trainer` hands them over; none is zero, biases included."""
    model = jax.eval_shape(lambda: LLaMa(NETWORK, key=jax.random.key(0)))
    return random_like(nnx.state(model, nnx.Param), seed=0)


def random_like(tree, seed: int):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32), tree)


def by_name(tree) -> dict[str, np.ndarray]:
    """Numpy arrays by the parameter's own name, `blocks` left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def path_name(path) -> str:
    return next(str(k.key) for k in reversed(path) if str(getattr(k, "key", "value")) != "value")


MATRICES = {"embed_VD", "unembed_DV", "q_DNH", "k_DKH", "v_DKH", "o_NHD", "gate_DF", "up_DF", "down_FD"}


def optimizer_of(name: str, **options) -> optax.GradientTransformation:
    config = OptimizerConfig(name=name, schedule="constant", **options)
    return make_optimizer(config, learning_rate=PEAK / 4, num_steps=STEPS).transformation


def run(optimizer, gradients, params=None) -> list[dict[str, np.ndarray]]:
    """The parameters after each update."""
    params = parameters() if params is None else params
    state, seen = jax.jit(optimizer.init)(params), []

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
        seen.append(by_name(params))
    return seen


def test_decay_is_of_matrices_alone():
    got = by_name(decayed(parameters()))
    assert {name for name, value in got.items() if value} == MATRICES
    assert len(got) == len(MATRICES) + 12, "norms and biases"


def test_factors_of_adapters_decay():
    key, config = jax.random.key(0), LoraConfig(rank=2, alpha=1.0)
    model = jax.eval_shape(lambda: add_lora(LLaMa(NETWORK, key=key), config, key=key))
    got = jax.tree.leaves(decayed(nnx.state(model, nnx.LoRAParam)))
    assert len(got) == 14 and all(got)


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_biases_are_not_decayed(name):
    """Without gradients, the matrices shrink by the learning rate times the decay, and nothing else moves."""
    before, zeros = by_name(parameters()), jax.tree.map(jnp.zeros_like, parameters())
    [after] = run(optimizer_of(name, weight_decay=0.1), [zeros])
    for key, value in before.items():
        if key in MATRICES:
            np.testing.assert_allclose(after[key], value * (1 - PEAK / 4 * 0.1), rtol=1e-6, err_msg=key)
        else:
            np.testing.assert_array_equal(after[key], value, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_goes_downhill(name):
    """To a target, half of the square distance away being the loss."""
    target = random_like(parameters(), seed=1)
    optimizer = optimizer_of(name)

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.tree.map(jnp.subtract, params, target), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=30)[0][0]

    start, end, goal = by_name(parameters()), by_name(descend(parameters())), by_name(target)
    for key in start:
        assert np.linalg.norm(end[key] - goal[key]) < 0.75 * np.linalg.norm(start[key] - goal[key]), key


GRADIENTS = 4


def gradients():
    return [random_like(parameters(), seed=10 + n) for n in range(GRADIENTS)]


@pytest.mark.parametrize("options", [{}, dict(b1=0.8, b2=0.9, eps=1e-3)], ids=["usual", "own"])
def test_adamw_formula(options):
    lr, decay = PEAK / 4, 0.1
    b1, b2, eps = (options.get(k, usual) for k, usual in (("b1", 0.9), ("b2", 0.95), ("eps", 1e-8)))
    got = run(optimizer_of("adamw", weight_decay=decay, **options), gradients())
    for key, p in by_name(parameters()).items():
        p, m, v = p.astype(np.float64), 0, 0
        for n, g in enumerate(by_name(g)[key].astype(np.float64) for g in gradients()):
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            step = m / (1 - b1 ** (n + 1)) / (np.sqrt(v / (1 - b2 ** (n + 1))) + eps)
            p = p - lr * (step + decay * (key in MATRICES) * p)
            np.testing.assert_allclose(got[n][key], p, rtol=1e-5, atol=1e-6, err_msg=key)


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    got = run(optimizer_of("adamw", weight_decay=0.1, b2=0.98), gradients())
    theirs = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in by_name(parameters()).items()}
    groups = [
        {"params": [p for key, p in theirs.items() if (key in MATRICES) == yes], "weight_decay": 0.1 * yes}
        for yes in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK / 4, betas=(0.9, 0.98), eps=1e-8)
    for n, gradient in enumerate(gradients()):
        for key, value in by_name(gradient).items():
            theirs[key].grad = torch.tensor(value)
        optimizer.step()
        for key, value in theirs.items():
            np.testing.assert_allclose(got[n][key], value.detach(), rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("options", [{}, dict(b1=0.8, b2=0.9)], ids=["usual", "own"])
def test_lion_formula(options):
    lr, decay, b1, b2 = PEAK / 4, 0.1, options.get("b1", 0.9), options.get("b2", 0.99)
    got = run(optimizer_of("lion", weight_decay=decay, **options), gradients())
    for key, p in by_name(parameters()).items():
        m = 0
        for n, g in enumerate(by_name(g)[key] for g in gradients()):
            p = p - lr * (np.sign(b1 * m + (1 - b1) * g) + decay * (key in MATRICES) * p)
            m = b2 * m + (1 - b2) * g
            np.testing.assert_allclose(got[n][key], p, rtol=1e-4, atol=1e-5, err_msg=key)


def test_adafactor_keeps_rows_and_columns_of_large_matrices():
    params = nnx.State({"up_DF": jnp.ones((2, 64, 96)), "norm_D": jnp.ones(64)})
    state = optimizer_of("adafactor").init(params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1)
    assert sizes == [64, 2 * 64, 2 * 96], "the norm whole, of the matrices of each layer a row and a column"


# What of a stacked weight is one matrix: its first so many axes behind the layers are contracted.
INNER = {"q_DNH": 1, "k_DKH": 1, "v_DKH": 1, "o_NHD": 2, "gate_DF": 1, "up_DF": 1, "down_FD": 1}


def test_muon_orthogonalises_each_matrix_of_each_layer():
    """Singular values from 1 to 1/30 come out near each other, whatever the size of the gradient."""
    random = np.random.default_rng(0)
    gradient, expected = by_name(parameters()), {}
    for key, inner in INNER.items():
        shape = gradient[key].shape
        rows = math.prod(shape[1 : 1 + inner])
        flat = random.standard_normal((shape[0], rows, math.prod(shape) // shape[0] // rows))
        u, s, vt = np.linalg.svd(flat, full_matrices=False)
        s = np.geomspace(1, 1 / 30, s.shape[-1]) * np.array([[1e-3], [1e3]])
        gradient[key] = (u * s[:, None] @ vt).reshape(shape)
        expected[key] = (u @ vt).reshape(shape), flat.shape
    gradient = jax.tree_util.tree_map_with_path(lambda p, _: jnp.float32(gradient[path_name(p)]), parameters())
    [after] = run(optimizer_of("muon"), [gradient])
    before = by_name(parameters())
    for key, (polar, shape) in expected.items():
        update = (before[key] - after[key]) / (PEAK / 4)
        values = np.linalg.svd(update.reshape(shape), compute_uv=False) / (0.2 * math.sqrt(max(shape[1:])))
        assert (values > 0.6).all() and (values < 1.3).all(), (key, values)
        cosine = (update * polar).sum() / np.linalg.norm(update) / np.linalg.norm(polar)
        assert cosine > 0.97, key


@pytest.mark.parametrize("options", [{}, dict(b1=0.8, b2=0.9, eps=0.5)], ids=["usual", "own"])
def test_muon_leaves_embeddings_norms_and_biases_to_adam(options):
    """With Nesterov's momentum, which its implementation gives to both parts."""
    b1, b2, eps = (options.get(k, usual) for k, usual in (("b1", 0.9), ("b2", 0.95), ("eps", 1e-8)))
    got = run(optimizer_of("muon", weight_decay=0.1, **options), gradients())
    for key, p in by_name(parameters()).items():
        m, v = 0, 0
        for n, g in enumerate(by_name(g)[key].astype(np.float64) for g in gradients()):
            if key in INNER:
                continue
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            ahead = b1 * m / (1 - b1 ** (n + 2)) + (1 - b1) * g / (1 - b1 ** (n + 1))
            step = ahead / (np.sqrt(v / (1 - b2 ** (n + 1))) + eps)
            p = p - PEAK / 4 * (step + 0.1 * (key in MATRICES) * p)
            np.testing.assert_allclose(got[n][key], p, rtol=1e-4, atol=1e-5, err_msg=key)


def test_muon_has_its_own_momentum():
    one, other = (run(optimizer_of("muon", momentum=m), gradients())[-1] for m in (0.95, 0.5))
    for key in one:
        assert np.array_equal(one[key], other[key]) == (key not in INNER), key


def test_learning_rate_is_that_of_the_updates():
    config = OptimizerConfig(schedule="linear", warmup=2, name="lion")
    transformation, learning_rate = make_optimizer(config, learning_rate=0.1, num_steps=GRADIENTS)
    positive = jax.tree.map(jnp.ones_like, parameters())
    seen = [by_name(parameters()), *run(transformation, [positive] * GRADIENTS)]
    for n, (before, after) in enumerate(pairwise(seen)):
        assert (before["norm_D"] - after["norm_D"]).mean() == pytest.approx(float(learning_rate(n)), rel=1e-5)


def test_usual_values_are_none():
    usual = OptimizerConfig()
    assert replace(usual, b1=0.9, b2=0.95, eps=1e-8) != usual
    one, other = (
        run(make_optimizer(c, learning_rate=0.1, num_steps=4).transformation, gradients())[-1]
        for c in (usual, replace(usual, b1=0.9, b2=0.95, eps=1e-8))
    )
    assert all(np.array_equal(one[key], other[key]) for key in one)
