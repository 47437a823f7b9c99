"""Losses of preferences and of scores, their gradients and metrics against the papers' formulas, in float64."""

import math
from dataclasses import fields, replace
from functools import partial
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.preference_losses import LOSSES, PreferenceLossConfig, kto_loss, preference_loss, reward_loss
from trainers.preference_variants import OPTIONS
from trainers.trainer import Loss

B, M = 7, 6
LENGTHS = np.array([[6, 3], [1, 6], [2, 2], [0, 0], [4, 5], [5, 1], [3, 6]])  # the fourth row fills up, without a token
WEIGHTS = np.array([1, 1, 1, 0, 1, 0, 1], np.float32)  # and the sixth, with tokens
DESIRABLE = np.array([1, 0, 0, 1, 1, 0, 1], np.float32)
ANOTHER = dict(
    label_smoothing=0.2,
    length_normalised=True,
    simpo_gamma=1.3,
    sft_weight=0.7,
    desirable_weight=1.7,
    undesirable_weight=0.4,
)
DISTANCES = {"near": 0.3, "far": 3.0, "extreme": 2000.0}  # of the reference, nats for each token
PAIRED = list(LOSSES)


def inputs(distance="near", *, C=2, seed=0):
    """Log-probabilities, float64, and the other arguments of the losses; outside the mask there is anything."""
    random = np.random.default_rng(seed)
    mask_BCM = np.arange(M) < LENGTHS[:, :C, None]
    mask_BCM[0, :, 1] = False  # a hole, such as what a tool said
    logprobs_BCM = -random.exponential(1.0, (B, C, M))
    tokens_BC = mask_BCM.sum(-1)
    noise_BC = DISTANCES[distance] * tokens_BC * random.standard_normal((B, C))
    arguments = {
        "mask_BCM": mask_BCM,
        "reference_logps_BC": np.float32((logprobs_BCM * mask_BCM).sum(-1) + noise_BC),
        "weights_B": WEIGHTS,
    }
    if C == 1:
        arguments |= {"kl_B": np.full(B, 0.37, np.float32), "desirable_B": DESIRABLE}
    return logprobs_BCM, arguments


def dirty(logprobs_BCM, arguments):
    """The same with anything where nothing is to be read."""
    used_BCM = arguments["mask_BCM"] & (WEIGHTS != 0)[:, None, None]
    garbage_BCM = np.resize([np.nan, np.inf, -np.inf, 5.0], used_BCM.shape)
    rest = {
        name: np.where((WEIGHTS != 0).reshape(-1, *[1] * (value.ndim - 1)), value, np.float32(np.nan))
        for name, value in arguments.items()
        if name in ("reference_logps_BC", "kl_B")
    }
    return np.where(used_BCM, logprobs_BCM, garbage_BCM), arguments | rest


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def logistic(x):
    return np.exp(log_sigmoid(x))


def win(chosen, rejected):
    return 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0


def exact(logprobs_BCM, arguments, config):
    """Sum, weight and metrics of pairs by the papers' formulas, row by row."""
    total, metrics = 0.0, {}
    for b in np.flatnonzero(WEIGHTS):
        both = [logprobs_BCM[b, c][arguments["mask_BCM"][b, c]] for c in range(2)]
        loss, seen = exact_pair(both, arguments["reference_logps_BC"][b].astype(float), config)
        total += WEIGHTS[b] * loss
        for name, value in seen.items():
            metrics.setdefault(name, []).append(WEIGHTS[b] * value)
    weight = WEIGHTS.sum()
    return Loss(total, weight, {name: (sum(values), weight) for name, values in metrics.items()})


def exact_pair(both, references, config):
    beta, smoothing = config.beta, config.label_smoothing
    logps = [tokens.sum() for tokens in both]
    averages = [tokens.mean() for tokens in both]
    ratios = [logp - reference for logp, reference in zip(logps, references)]
    if config.name == "ipo" or config.length_normalised:
        ratios = [ratio / len(tokens) for ratio, tokens in zip(ratios, both)]
    if config.name in ("simpo", "orpo"):
        ratios = averages
    u_w, u_l = ratios
    h = u_w - u_l
    odds = [average - np.log(-np.expm1(average)) for average in averages]
    loss = {
        "sigmoid": lambda: -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h),
        "ipo": lambda: (h - 1 / (2 * beta)) ** 2,
        "hinge": lambda: max(0.0, 1 - beta * h),
        "robust": lambda: (
            (-(1 - smoothing) * log_sigmoid(beta * h) + smoothing * log_sigmoid(-beta * h)) / (1 - 2 * smoothing)
        ),
        "apo_zero": lambda: 1 - logistic(beta * u_w) + logistic(beta * u_l),
        "apo_down": lambda: 1 + logistic(beta * u_w) - logistic(beta * h),
        "simpo": lambda: -log_sigmoid(beta * averages[0] - beta * averages[1] - config.simpo_gamma),
        "orpo": lambda: -averages[0] - beta * log_sigmoid(odds[0] - odds[1]),
    }[config.name]()
    loss -= config.sft_weight * averages[0]
    seen = {
        "rewards/chosen": beta * u_w,
        "rewards/rejected": beta * u_l,
        "rewards/accuracies": win(u_w, u_l),
        "rewards/margins": beta * h,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    if config.name == "orpo" or config.sft_weight:
        seen["nll_loss"] = -averages[0]
    if config.name == "orpo":
        seen |= {"log_odds_ratio": log_sigmoid(odds[0] - odds[1]), "log_odds_chosen": odds[0] - odds[1]}
    return loss, seen


def exact_kto(logprobs_BCM, arguments, config):
    total, metrics = 0.0, {}
    for b in np.flatnonzero(WEIGHTS):
        logp = logprobs_BCM[b, 0][arguments["mask_BCM"][b, 0]].sum()
        r, z = logp - float(arguments["reference_logps_BC"][b, 0]), float(arguments["kl_B"][b])
        if arguments["desirable_B"][b]:
            side, loss = "chosen", config.desirable_weight * (1 - logistic(config.beta * (r - z)))
        else:
            side, loss = "rejected", config.undesirable_weight * (1 - logistic(config.beta * (z - r)))
        total += WEIGHTS[b] * loss
        for name, value in ((f"rewards/{side}", config.beta * r), (f"logps/{side}", logp), ("kl", z)):
            metrics.setdefault(name, []).append((WEIGHTS[b] * value, WEIGHTS[b]))
    return Loss(total, WEIGHTS.sum(), {name: tuple(map(sum, zip(*pairs))) for name, pairs in metrics.items()})


def slopes(formula, point):
    """Central differences."""
    found = np.zeros_like(point)
    for place in np.ndindex(point.shape):
        up, down = point.copy(), point.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        found[place] = (formula(up).sum - formula(down).sum) / 2e-5
    return found


@partial(jax.jit, static_argnames=("loss_of", "config"))
def value_and_gradient(logprobs_BCM, loss_of, **arguments):
    def total(logprobs_BCM):
        loss = loss_of(logprobs_BCM, **arguments)
        return loss.sum, loss

    (_, loss), gradient_BCM = jax.value_and_grad(total, has_aux=True)(logprobs_BCM)
    return loss, gradient_BCM


def run(logprobs_BCM, arguments, config):
    loss_of = preference_loss if config.paired else kto_loss
    return value_and_gradient(jnp.float32(logprobs_BCM), loss_of, **arguments, config=config)


def compare(got, want, gradient, slope):
    largest = max(
        1.0, *(abs(float(total)) for total, _ in want.metrics.values())
    )  # rows of either sign add up to little
    assert float(got.sum) == pytest.approx(want.sum, rel=2e-5, abs=1e-6 * largest)
    assert float(got.weight) == want.weight
    assert got.metrics.keys() == want.metrics.keys()
    for metric, pair in want.metrics.items():
        np.testing.assert_allclose(got.metrics[metric], pair, rtol=1e-5, atol=1e-5, err_msg=metric)
    np.testing.assert_allclose(gradient, slope, rtol=2e-5, atol=1e-5 * max(1, np.abs(slope).max()))


def configs(name, beta):
    """The plain loss, each of its options on its own, and all of them."""
    plain = PreferenceLossConfig(name=name, beta=beta)
    changes = [{}, *({option: ANOTHER[option]} for option in OPTIONS[name])]
    return [replace(plain, **change) for change in [*changes, {option: ANOTHER[option] for option in OPTIONS[name]}]]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize("name", PAIRED)
def test_pairs_against_the_formulas(name, beta, distance):
    """Value, weight, metrics, and the gradient by central differences in float64."""
    logprobs_BCM, arguments = inputs(distance)
    for config in configs(name, beta):
        got, gradient_BCM = run(*dirty(logprobs_BCM, arguments), config)
        formula = partial(exact, arguments=arguments, config=config)
        compare(got, formula(logprobs_BCM), gradient_BCM, slopes(formula, logprobs_BCM))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_kto_against_the_formulas(beta, distance):
    logprobs_BCM, arguments = inputs(distance, C=1)
    for config in configs("kto", beta):
        got, gradient_BCM = run(*dirty(logprobs_BCM, arguments), config)
        formula = partial(exact_kto, arguments=arguments, config=config)
        compare(got, formula(logprobs_BCM), gradient_BCM, slopes(formula, logprobs_BCM))


def test_the_distances_reach_both_ends_of_the_losses():
    """Else the comparisons above would prove little."""
    logprobs_BCM, arguments = inputs("extreme")
    for config, low, high in ((PreferenceLossConfig(), 1e-30, 100), (PreferenceLossConfig(name="hinge"), 0, 100)):
        losses = [
            exact_pair(
                [logprobs_BCM[b, c][arguments["mask_BCM"][b, c]] for c in range(2)],
                arguments["reference_logps_BC"][b],
                config,
            )[0]
            for b in np.flatnonzero(WEIGHTS)
        ]
        assert min(losses) <= low and max(losses) > high


@pytest.mark.parametrize(("margin", "value"), [(0, 0.6931), (1, 0.3133), (2, 0.1269)])
def test_known_values_of_the_logistic_loss(margin, value):
    config = PreferenceLossConfig(beta=0.5)
    loss = preference_loss(
        jnp.float32([[[-1.0, -2.0], [-2.0, -1.0]]]),
        mask_BCM=np.ones((1, 2, 2), bool),
        reference_logps_BC=np.float32([[-3 - 2 * margin, -3]]),
        weights_B=np.ones(1, np.float32),
        config=config,
    )
    assert float(loss.sum) == pytest.approx(value, abs=5e-5)
    scores = reward_loss(
        jnp.float32([[margin + 0.5, 0.5]]), margins_B=None, weights_B=np.ones(1, np.float32), centre=0.0
    )
    assert float(scores.sum) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sigmoid", math.log(2)), ("ipo", 6.25), ("hinge", 1), ("robust", math.log(2)), ("apo_zero", 1), ("apo_down", 1)],
)
def test_losses_and_accuracy_where_policy_and_reference_are_the_same(name, value):
    logprobs_BCM, arguments = inputs()
    arguments["reference_logps_BC"] = np.where(arguments["mask_BCM"], np.float32(logprobs_BCM), 0).sum(-1)
    loss, _ = run(logprobs_BCM, arguments, PreferenceLossConfig(name=name, beta=0.2))
    assert float(loss.sum / loss.weight) == pytest.approx(value, rel=1e-5)
    assert loss.metrics["rewards/accuracies"] == (0.5 * WEIGHTS.sum(), WEIGHTS.sum())


@pytest.mark.parametrize("name", OPTIONS)
def test_micro_batches_in_any_order_add_up(name):
    config = configs(name, 0.3)[-1]
    logprobs_BCM, arguments = inputs(C=2 if config.paired else 1)
    whole, whole_BCM = run(logprobs_BCM, arguments, config)
    pieces = ([4, 0, 3], [2, 5], [6, 1])
    parts = []
    for rows in pieces:
        cut = {key: value[np.array(rows)] for key, value in arguments.items()}
        parts.append(run(logprobs_BCM[np.array(rows)], cut, config))
    added = jax.tree.map(lambda *x: sum(x), *(loss for loss, _ in parts))
    for one, two in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    gradient_BCM = np.concatenate([gradient_BCM for _, gradient_BCM in parts])
    np.testing.assert_allclose(gradient_BCM, whole_BCM[np.concatenate(pieces)], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_not_to_be_read_changes_nothing(name):
    config = configs(name, 0.3)[-1]
    logprobs_BCM, arguments = inputs(C=2 if config.paired else 1)
    usual = run(logprobs_BCM, arguments, config)
    assert not usual[1][~arguments["mask_BCM"] | (WEIGHTS == 0)[:, None, None]].any()
    with jax.disable_jit():  # compiled, a product with a mask may become a choice, which hides NaN
        padded = run(*dirty(logprobs_BCM, arguments), config)
    for one, two in zip(jax.tree.leaves(usual), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_only_rows_that_fill_up(name):
    config = PreferenceLossConfig(name=name)
    logprobs_BCM, arguments = inputs(C=2 if config.paired else 1)
    loss, gradient_BCM = run(logprobs_BCM, arguments | {"weights_B": np.zeros(B, np.float32)}, config)
    assert not any(jax.tree.leaves(loss)) and not gradient_BCM.any()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_answer_without_tokens_to_learn_is_finite(name):
    config = PreferenceLossConfig(name=name)
    logprobs_BCM, arguments = inputs(C=2 if config.paired else 1)
    arguments["mask_BCM"][1] = False
    loss, gradient_BCM = run(logprobs_BCM, arguments, config)
    assert np.isfinite(jax.tree.leaves(loss)).all() and np.isfinite(gradient_BCM).all()


@pytest.mark.parametrize("value", [0.0, -1e-9, -1e-7, -1e-3, -50.0, -1e4])
def test_odds_of_certain_and_of_hopeless_answers_are_finite(value):
    logprobs_BCM = np.full((B, 2, M), value)
    for other in (0.0, -1.0, -1e4):
        for side in range(2):
            logprobs_BCM[:, side] = other
            loss, gradient_BCM = run(logprobs_BCM, inputs()[1], PreferenceLossConfig(name="orpo"))
            assert np.isfinite(jax.tree.leaves(loss)).all() and np.isfinite(gradient_BCM).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_only_log_probabilities_of_now_have_gradients(name):
    config = configs(name, 0.3)[-1]
    logprobs_BCM, arguments = inputs(C=2 if config.paired else 1)
    loss_of = preference_loss if config.paired else kto_loss
    floats = {key: value for key, value in arguments.items() if key in ("reference_logps_BC", "kl_B")}
    gradients = jax.grad(lambda x: loss_of(jnp.float32(logprobs_BCM), **(arguments | x), config=config).sum)(floats)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))

    def seen(x):
        return sum(pair[0] for pair in loss_of(x, **arguments, config=config).metrics.values())

    assert not jax.grad(seen)(jnp.float32(logprobs_BCM)).any()


@pytest.mark.parametrize("option", [field.name for field in fields(PreferenceLossConfig) if field.name != "name"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_the_loss_or_is_refused(name, option):
    value = (ANOTHER | {"beta": 0.25})[option]
    plain = PreferenceLossConfig(name=name)
    if option != "beta" and option not in OPTIONS[name]:
        with pytest.raises(ValueError, match=f"loss '{name}' has no use for {option} {value}"):
            replace(plain, **{option: value})
        return
    logprobs_BCM, arguments = inputs(C=2 if plain.paired else 1)
    one, two = (run(logprobs_BCM, arguments, config)[0] for config in (plain, replace(plain, **{option: value})))
    assert abs(float(one.sum - two.sum)) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="dpo"), "loss 'dpo' is none of sigmoid, ipo, hinge, robust, apo_zero, apo_down, simpo, orpo, kto"),
        (dict(beta=0.0), "beta 0.0 must be above 0"),
        (dict(beta=math.inf), "beta inf"),
        (dict(beta=math.nan), "beta nan"),
        (dict(label_smoothing=0.5), "label_smoothing 0.5 must be at least 0 and below 0.5"),
        (dict(name="robust", label_smoothing=-0.1), "label_smoothing -0.1"),
        (dict(name="ipo", length_normalised=True), "loss 'ipo' has no use for length_normalised True"),
        (dict(name="simpo", simpo_gamma=-1.0), "simpo_gamma -1.0"),
        (dict(sft_weight=math.nan), "sft_weight nan"),
        (dict(name="kto", desirable_weight=-1.0), "desirable_weight -1.0"),
        (dict(name="kto", undesirable_weight=math.inf), "undesirable_weight inf"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLossConfig(**options)


def test_losses_that_lack_what_they_work_on():
    logprobs_BCM, arguments = inputs()
    single_BCM, single = inputs(C=1)
    for name in OPTIONS:
        config = PreferenceLossConfig(name=name)
        if not config.paired:
            with pytest.raises(ValueError, match="loss 'kto' is not of pairs"):
                preference_loss(jnp.float32(logprobs_BCM), **arguments, config=config)
            continue
        with pytest.raises(ValueError, match=f"loss '{name}' is of pairs"):
            kto_loss(jnp.float32(single_BCM), **single, config=config)
        without = arguments | {"reference_logps_BC": None}
        if config.needs_reference:
            with pytest.raises(ValueError, match=f"loss '{name}' needs the log-probabilities of a reference"):
                preference_loss(jnp.float32(logprobs_BCM), **without, config=config)
        else:
            one, two = (run(logprobs_BCM, given, config)[0].sum for given in (arguments, without))
            assert one == two


def test_the_names_of_the_config_are_those_of_the_tables():
    assert get_args(get_type_hints(PreferenceLossConfig)["name"]) == tuple(OPTIONS) == (*LOSSES, "kto")


def scores(scale=1.0):
    random = np.random.default_rng(1)
    scores_B2 = scale * random.standard_normal((B, 2))
    scores_B2[2] = 0.7  # a tie
    return scores_B2, np.float32(random.exponential(1.0, B))


def exact_reward(scores_B2, margins_B, centre):
    total, seen = 0.0, {}
    for b in np.flatnonzero(WEIGHTS):
        chosen, rejected = scores_B2[b]
        margin = 0.0 if margins_B is None else float(margins_B[b])
        total -= WEIGHTS[b] * log_sigmoid(chosen - rejected - margin)
        total += WEIGHTS[b] * centre * (chosen + rejected) ** 2
        values = {"accuracy": win(chosen, rejected), "margin": chosen - rejected, "mean_reward": np.mean(scores_B2[b])}
        for name, value in (values | {"rewards/chosen": chosen, "rewards/rejected": rejected}).items():
            seen.setdefault(name, []).append(WEIGHTS[b] * value)
    weight = WEIGHTS.sum()
    return Loss(total, weight, {name: (sum(values), weight) for name, values in seen.items()})


def reward_and_gradient(scores_B2, margins_B, centre, weights_B=WEIGHTS):
    def total(scores_B2):
        loss = reward_loss(scores_B2, margins_B=margins_B, weights_B=weights_B, centre=centre)
        return loss.sum, loss

    (_, loss), gradient_B2 = jax.value_and_grad(total, has_aux=True)(jnp.float32(scores_B2))
    return loss, gradient_B2


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("centre", [0.0, 0.01])
@pytest.mark.parametrize("with_margins", [False, True])
def test_scores_against_the_formulas(with_margins, centre, scale):
    scores_B2, margins_B = scores(scale)
    margins_B = margins_B if with_margins else None
    dirty_B2 = np.where((WEIGHTS != 0)[:, None], scores_B2, np.nan)
    dirty_B = None if margins_B is None else np.where(WEIGHTS != 0, margins_B, np.float32(np.nan))
    got, gradient_B2 = reward_and_gradient(dirty_B2, dirty_B, centre)
    formula = partial(exact_reward, margins_B=margins_B, centre=centre)
    compare(got, formula(scores_B2), gradient_B2, slopes(formula, scores_B2))


def test_micro_batches_of_scores_add_up_and_margins_have_no_gradient():
    scores_B2, margins_B = scores()
    whole, _ = reward_and_gradient(scores_B2, margins_B, 0.01)
    pieces = [np.array(rows) for rows in ([5, 0], [1, 2, 3], [6, 4])]
    parts = [reward_and_gradient(scores_B2[rows], margins_B[rows], 0.01, WEIGHTS[rows])[0] for rows in pieces]
    for one, two in zip(jax.tree.leaves(jax.tree.map(lambda *x: sum(x), *parts)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    of_margins = jax.grad(lambda m: reward_loss(scores_B2, margins_B=m, weights_B=WEIGHTS, centre=0.0).sum)
    assert not of_margins(jnp.float32(margins_B)).any()
    for centre in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"centre {centre}"):
            reward_and_gradient(scores_B2, margins_B, centre)
