"""Distillation losses against numpy in float64 and TRL; what they spare in memory and work; meshes."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.distillation_losses import Distillation, DistillationLossConfig, distillation
from trainers.losses import cross_entropy

B, T, D, E, V = 3, 7, 5, 6, 11
ALL = 2 * B * T * V
# One chunk; four of two positions, the last of one; one for each position.
CHUNKS = {"whole": 10 * ALL, "uneven": ALL // 3, "single": 1}
SHAPES = {"DV": (D, V), "VD": (V, D)}
LOSSES = {
    "forward": {},
    "reverse": dict(kind="reverse_kl"),
    "even": dict(kind="jsd"),
    "jsd": dict(kind="jsd", beta=0.1, temperature=0.7),
    "hot": dict(temperature=2.5, hard_weight=0.3),
    "hot-reverse": dict(kind="reverse_kl", temperature=2.5, hard_weight=0.3),
    "hot-jsd": dict(kind="jsd", beta=0.8, temperature=2.5, hard_weight=0.3),
    "hard": dict(hard_weight=1.0),
}


def inputs(letters: str, dtype: str = "float32", teacher_letters: str | None = None):
    """Of the student, of the teacher, targets and weights."""
    random = np.random.default_rng(0)
    x_BTD = jnp.asarray(random.standard_normal((B, T, D)), dtype)
    weight = jnp.asarray(random.standard_normal(SHAPES[letters]), dtype)
    teacher_x_BTE = jnp.asarray(random.standard_normal((B, T, E)), "float32")
    teacher_weight = jnp.asarray(random.standard_normal((E, V)), "float32")
    if (teacher_letters or letters) == "VD":
        teacher_weight = teacher_weight.T
    targets_BT = random.integers(0, V, (B, T), np.int32)
    weights_BT = random.choice([0, 0.5, 1, 3], (B, T)).astype(np.float32)
    return x_BTD, weight, teacher_x_BTE, teacher_weight, targets_BT, weights_BT


@partial(jax.jit, static_argnames=("letters", "teacher_letters", "config", "chunk_logits"))
def value_and_gradients(letters, x_BTD, weight, *rest, teacher_letters=None, config=None, chunk_logits=None):
    teacher_x_BTE, teacher_weight, *targets = rest
    teacher = teacher_x_BTE, (teacher_letters or letters, teacher_weight)

    def total(x_BTD, weight):
        sums = distillation(x_BTD, (letters, weight), *teacher, *targets, config=config, chunk_logits=chunk_logits)
        return sums.loss, sums

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x_BTD, weight)


def log_softmax(logit_V: np.ndarray) -> np.ndarray:
    return logit_V - logit_V.max() - np.log(np.exp(logit_V - logit_V.max()).sum())


def exact(letters, x, weight, teacher_x, teacher_weight, targets, weights, *, kind="forward_kl", **options):
    """Position by position from the definitions, in float64."""
    heat, hard, beta = (options.get(*pair) for pair in (("temperature", 1), ("hard_weight", 0), ("beta", 0.5)))
    sums = np.zeros(5)
    for b, t in np.ndindex(*targets.shape):
        logit_V = np.einsum(f"D,{letters}->V", x[b, t], weight)
        teacher_V = np.einsum(f"D,{letters}->V", teacher_x[b, t], teacher_weight)
        p_V, q_V = (np.exp(log_softmax(own / heat)) for own in (teacher_V, logit_V))
        m_V = beta * p_V + (1 - beta) * q_V
        between = {"forward_kl": kl(p_V, q_V), "reverse_kl": kl(q_V, p_V)}
        between["jsd"] = beta * kl(p_V, m_V) + (1 - beta) * kl(q_V, m_V)
        plain_V, target = log_softmax(logit_V), targets[b, t]
        nll, entropy = -plain_V[target], -(np.exp(plain_V) @ plain_V)
        loss = (1 - hard) * heat**2 * between[kind] + hard * nll
        sums += weights[b, t] * np.array([loss, between[kind], nll, plain_V.argmax() == target, entropy])
    return Distillation(*sums)


def kl(p_V: np.ndarray, q_V: np.ndarray) -> float:
    return float(p_V @ (np.log(p_V) - np.log(q_V)))


def in_double(*arrays):
    return [np.asarray(x).astype(np.float64 if x.dtype.kind not in "iu" else np.int64) for x in arrays]


@pytest.mark.parametrize(("letters", "chunks"), [("DV", "whole"), ("VD", "uneven"), ("DV", "single")])
@pytest.mark.parametrize("name", LOSSES)
def test_sums_and_gradients_against_double_precision(letters, name, chunks):
    """The gradient along random directions, by central differences of the exact loss."""
    arrays, config = inputs(letters), DistillationLossConfig(**LOSSES[name])
    (loss, sums), grads = value_and_gradients(letters, *arrays, config=config, chunk_logits=CHUNKS[chunks])
    x, weight, *rest = in_double(*arrays)
    want = exact(letters, x, weight, *rest, **LOSSES[name])
    assert loss == sums.loss
    for field, got, other in zip(Distillation._fields, sums, want):
        assert got.dtype == jnp.float32 and got.shape == ()
        assert float(got) == pytest.approx(other, rel=3e-6), field

    random = np.random.default_rng(1)
    for _ in range(3):
        step = [1e-5 * random.standard_normal(a.shape) for a in (x, weight)]
        up, down = (exact(letters, x + s * step[0], weight + s * step[1], *rest, **LOSSES[name]).loss for s in (1, -1))
        along = sum((np.asarray(g, np.float64) * s).sum() for g, s in zip(grads, step))
        assert 2 * along == pytest.approx(up - down, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("beta", "own"),
    [(0, {}), (1, dict(kind="reverse_kl")), *((beta, dict(kind="jsd", beta=beta)) for beta in (0.1, 0.5, 0.9))],
)
def test_against_trl(beta, own, temperature):
    """Values and gradients; TRL's are without the square of the temperature."""
    torch = pytest.importorskip("torch")
    loss = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    arrays = x, weight, teacher_x, teacher_weight, targets, weights = inputs("DV")
    weights[:] = weights > 0
    config = DistillationLossConfig(temperature=temperature, **own)
    (got, _), grads = value_and_gradients("DV", *arrays, config=config, chunk_logits=60)

    x, weight = (torch.tensor(a, requires_grad=True) for a in in_double(x, weight))
    teacher = torch.tensor(np.einsum("BTD,DV->BTV", *in_double(teacher_x, teacher_weight)))
    labels = torch.tensor(np.where(weights > 0, targets, -100))
    want = temperature**2 * loss(x @ weight, teacher, labels, beta=beta, temperature=temperature, reduction="sum")
    want.backward()
    assert float(got) == pytest.approx(want.item(), rel=3e-6)
    for ours, other in zip(grads, (x.grad, weight.grad)):
        np.testing.assert_allclose(ours, other, rtol=0, atol=3e-6 * other.abs().max().item())


def test_the_ends_of_jsd_are_the_two_divergences():
    x, weight, teacher_x, *rest = inputs("DV")
    arrays = [0.3 * x, weight, 0.3 * teacher_x, *rest]  # near enough to each other for the ends to be near

    def results(**options):
        (loss, _), grads = value_and_gradients("DV", *arrays, config=DistillationLossConfig(**options))
        return jax.tree.leaves((loss, grads))

    near = 1e-3
    for kind, beta in (("forward_kl", near), ("reverse_kl", 1 - near)):
        for one, other in zip(results(kind=kind), results(kind="jsd", beta=beta), strict=True):
            scale = float(jnp.max(jnp.abs(one)))
            np.testing.assert_allclose(other / near, one, rtol=0, atol=0.02 * scale)


def test_hard_labels_alone_are_cross_entropy():
    x, weight, _, _, targets, weights = arrays = inputs("VD")
    (loss, sums), grads = value_and_gradients("VD", *arrays, config=DistillationLossConfig(hard_weight=1.0))
    want = cross_entropy(x, ("VD", weight), targets, weights)
    np.testing.assert_allclose((loss, sums.correct, sums.entropy), (want.loss, want.correct, want.entropy), rtol=1e-6)
    own = jax.grad(lambda *xw: cross_entropy(xw[0], ("VD", xw[1]), targets, weights).loss, (0, 1))(x, weight)
    for got, other in zip(grads, own):
        np.testing.assert_allclose(got, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    x, weight, _, _, targets, weights = inputs("DV")
    config = DistillationLossConfig(**LOSSES[name] | {"hard_weight": 0.0})
    (loss, sums), grads = value_and_gradients("DV", x, weight, x, weight, targets, weights, config=config)
    assert abs(float(loss)) < 1e-5 and float(sums.nll) > 1
    assert all(np.abs(g).max() < 1e-5 for g in grads)


@pytest.mark.parametrize("letters", SHAPES)
def test_the_value_is_the_same_with_and_without_gradients(letters):
    other = {"DV": "VD", "VD": "DV"}[letters]
    config = DistillationLossConfig(**LOSSES["hot-jsd"])
    x, weight, teacher_x, teacher_weight, *rest = arrays = inputs(letters, teacher_letters=other)
    (_, want), _ = value_and_gradients(letters, *arrays, teacher_letters=other, config=config, chunk_logits=60)
    got = jax.jit(
        lambda x, w: distillation(
            x, (letters, w), teacher_x, (other, teacher_weight), *rest, config=config, chunk_logits=60
        )
    )(x, weight)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    same = value_and_gradients(letters, *inputs(letters), config=config, chunk_logits=60)[0][1]
    np.testing.assert_allclose(got, same, rtol=1e-6)  # the letters of the teacher change nothing


def test_bfloat16_is_close_and_stays():
    """The student's; the teacher's dtype is its own affair."""
    config = DistillationLossConfig(**LOSSES["hot-jsd"])
    for letters in SHAPES:
        x, weight, *rest = inputs(letters, "bfloat16")
        (loss, sums), grads = value_and_gradients(letters, x, weight, *rest, config=config, chunk_logits=60)
        wide = [x.astype(jnp.float32), weight.astype(jnp.float32)]
        (want_loss, want), want_grads = value_and_gradients(letters, *wide, *rest, config=config, chunk_logits=60)
        np.testing.assert_allclose((loss, sums.divergence), (want_loss, want.divergence), rtol=1e-6)
        for got, other in zip(grads, want_grads):
            assert got.dtype == jnp.bfloat16
            np.testing.assert_allclose(got.astype(np.float32), other, atol=1e-2 * np.abs(other).max())


def test_gradients_are_of_the_loss_and_the_student_alone():
    x, weight, teacher_x, teacher_weight, *rest = inputs("DV")

    def gradient(function):
        def total(x, teacher_x, teacher_weight):
            return function(distillation(x, ("DV", weight), teacher_x, ("DV", teacher_weight), *rest))

        return jax.grad(total, (0, 1, 2))(x, teacher_x, teacher_weight)

    once, *of_teacher = gradient(lambda sums: sums.loss)
    assert once.any() and not any(own.any() for own in of_teacher)
    np.testing.assert_allclose(gradient(lambda sums: -3 * sums.loss + sums.entropy)[0], -3 * once, rtol=1e-6)
    assert not gradient(lambda sums: sum(sums[1:]))[0].any()


def test_places_without_weight_take_no_part_and_may_have_any_target():
    x, weight, teacher_x, teacher_weight, targets, weights = inputs("DV")
    options = dict(config=DistillationLossConfig(**LOSSES["hot-jsd"]), chunk_logits=60)
    usual = value_and_gradients("DV", x, weight, teacher_x, teacher_weight, targets, weights, **options)
    targets = np.where(weights == 0, -100, targets)
    teacher_x = jnp.where(weights[..., None] == 0, 3.0, teacher_x)
    odd = value_and_gradients("DV", x, weight, teacher_x, teacher_weight, targets, weights, **options)
    jax.tree.map(np.testing.assert_array_equal, usual, odd)
    assert not usual[1][0][weights == 0].any()
    nothing = value_and_gradients("DV", x, weight, teacher_x, teacher_weight, targets, 0 * weights, **options)
    assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_large_logits_overflow_nothing(kind):
    """Of tokens that one network is sure of and the other rules out."""
    x, targets, weights = jnp.ones((1, 2, D)), np.array([[3, 4]], np.int32), np.ones((1, 2), np.float32)
    weight, teacher_weight = (jnp.zeros((D, V)).at[:, token].set(1e3) for token in (3, 4))
    config = DistillationLossConfig(kind=kind)
    (loss, sums), grads = value_and_gradients("DV", x, weight, x, teacher_weight, targets, weights, config=config)
    # beta KL(P || M) + (1 - beta) KL(Q || M) of distributions that share nothing, for each of two positions.
    assert float(loss) == pytest.approx(2 * np.log(2) if kind == "jsd" else 2 * 5e3)
    assert sums.correct == 1
    assert all(np.isfinite(g).all() for g in grads)


def test_small_gradients_of_float16_outlive_the_loss_scale():
    """A gradient of 2 ** -25 by a logit is nothing in float16; times a loss scale of 2 ** 14 it is something."""
    x_BTD, weight = jnp.ones((1, 1, 1), jnp.float16), jnp.zeros((1, 4096), jnp.float16)
    sure = jnp.full((1, 4096), -50.0).at[0, 0].set(50.0)
    targets_BT, weights_BT = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 2.0**-13)

    def loss(weight):
        teacher = x_BTD.astype(jnp.float32), ("DV", sure)
        return 2.0**14 * distillation(x_BTD, ("DV", weight), *teacher, targets_BT, weights_BT).loss

    np.testing.assert_allclose(np.asarray(jax.grad(loss)(weight))[0, 1:], 2.0 / 4096, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(kind="kl"), "'kl' is none of forward_kl, reverse_kl, jsd"),
        (dict(temperature=0.0), "temperature must be above 0 and finite, not 0.0"),
        (dict(hard_weight=1.5), "hard_weight 1.5 must be from 0 to 1"),
        (dict(beta=0.5), "beta 0.5 is for kind jsd, not for forward_kl"),
        (dict(kind="jsd", beta=0.0), "beta 0.0 must be above 0 and below 1"),
    ],
)
def test_options_out_of_range(options, line):
    with pytest.raises(ValueError, match=line):
        DistillationLossConfig(**options)


def test_networks_of_different_vocabularies_are_refused():
    x, weight, teacher_x, teacher_weight, *rest = inputs("DV")
    with pytest.raises(ValueError, match="vocabulary of 11 tokens is not the teacher's of 10"):
        distillation(x, ("DV", weight), teacher_x, ("DV", teacher_weight[:, 1:]), *rest)


@pytest.mark.parametrize("name", ["hot", "hot-jsd"])
def test_a_large_vocabulary_is_never_whole_in_memory(name):
    sizes = {"B": 2, "T": 1024, "D": 64, "E": 96, "V": 128256}
    f32, i32 = jnp.float32, jnp.int32
    arrays = [("BTD", f32), ("VD", f32), ("BTE", f32), ("VE", f32), ("BT", i32), ("BT", f32)]
    shapes = [jax.ShapeDtypeStruct(tuple(sizes[x] for x in spec), dtype) for spec, dtype in arrays]
    compiled = value_and_gradients.lower("VD", *shapes, config=DistillationLossConfig(**LOSSES[name])).compile()
    whole = 2 * 1024 * 128256 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 4


def test_the_vocabulary_is_gone_through_four_times():
    """Logits of both networks, and one product for each gradient; nothing is computed again."""
    x, weight, teacher_x, teacher_weight, *rest = inputs("DV")

    def loss(x, weight):
        return distillation(x, ("DV", weight), teacher_x, ("DV", teacher_weight), *rest).loss

    assert str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weight)).count("dot_general") == 4


ON_A_MESH = """
import importlib.util, itertools, re, sys
import jax, numpy as np
from utils.sharding import make_mesh, place_rows
spec = importlib.util.spec_from_file_location("test_distillation_losses", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)

# Rows, tokens, both model axes and vocabulary: all cut; those that cannot be cut evenly.
SIZES = [(4, 16, 8, 12, 48), (3, 15, 8, 6, 48), (4, 16, 5, 8, 48), (3, 7, 5, 5, 11)]
MESHES = [(2, 2, 2, 1), (1, 1, 8, 1), (1, 1, 1, 8), (8, 1, 1, 1)]
sides = [*itertools.product(SIZES, [(1, 2, 2, 2)]), *itertools.product([SIZES[0], SIZES[-1]], MESHES)]
for n, (sizes, shape) in enumerate(sides):
    tests.B, tests.T, tests.D, tests.E, tests.V = sizes
    tests.SHAPES = {"DV": (sizes[2], sizes[4]), "VD": (sizes[4], sizes[2])}
    letters, other = ("DV", "VD")[n % 2], ("DV", "VD")[n // 2 % 2]
    name = ("hot", "reverse", "hot-jsd")[n % 3]
    options = dict(config=tests.DistillationLossConfig(**tests.LOSSES[name]), teacher_letters=other, chunk_logits=200)
    mesh, arrays = make_mesh(shape), tests.inputs(letters, teacher_letters=other)
    one = tests.value_and_gradients(letters, *arrays, **options)
    lying = ("BTD", letters, "BTE", other, "BT", "BT")
    placed = [place_rows(x, mesh, letters=own) for x, own in zip(arrays, lying)]
    with jax.set_mesh(mesh):
        many = tests.value_and_gradients(letters, *placed, **options)
        lowered = tests.value_and_gradients.lower(letters, *placed, **options)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str((shape, sizes, letters, name)))
    if sizes == SIZES[0] and shape[2] > 1:
        logits = set(re.findall(r"f32[[][0-9]+,[0-9]+,([0-9]+)[]]", lowered.compile().as_text()))
        assert str(48 // shape[2]) in logits and "48" not in logits, (shape, logits)
print("same")
"""


def test_eight_devices_equal_one(repo_root):
    """Each has its tokens and its part of the vocabulary; sums and gradients are those of all."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, __file__], env=os.environ | own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same"]
