"""Rewards of tokens, advantages and PPO's loss: by hand, and against float64 versions written token by token."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.ppo_losses import PPOLossConfig, explained_variance, gae, ppo_loss, token_rewards, whiten

B, T = 4, 6
# Two completions of several tokens with a gap each, as where a tool spoke; one that is whole; one that is left out.
MASK_BT = np.array([[1, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)


# Generalised advantage estimation.


def test_advantages_worked_out_by_hand():
    """gamma 0.9, lambda 0.95, so that gamma lambda is 0.855; rewards 0 0 1, values 0.5 0.4 0.3.

    δ = 0 + 0.9 0.4 - 0.5 = -0.14, 0 + 0.9 0.3 - 0.4 = -0.13, 1 - 0.3 = 0.7
    A = 0.7; -0.13 + 0.855 0.7 = 0.4685; -0.14 + 0.855 0.4685 = 0.2605675
    """
    rewards, values = np.float32([[0, 0, 1]]), np.float32([[0.5, 0.4, 0.3]])
    advantages, returns = gae(rewards, values, np.ones((1, 3), bool), gamma=0.9, lam=0.95)
    np.testing.assert_allclose(advantages, [[0.2605675, 0.4685, 0.7]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0.7605675, 0.8685, 1.0]], rtol=1e-6)
    assert advantages.dtype == returns.dtype == np.float32


def test_a_gap_of_observations_changes_nothing():
    """The same tokens with two of a tool in the middle and padding behind, which have any rewards and values."""
    rewards, values = np.float32([[0, 0, 9, 9, 1, np.nan]]), np.float32([[0.5, 0.4, 7, np.inf, 0.3, np.nan]])
    mask = np.float32([[1, 1, 0, 0, 1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.95)
    np.testing.assert_allclose(advantages, [[0.2605675, 0.4685, 0, 0, 0.7, 0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0.7605675, 0.8685, 0, 0, 1.0, 0]], rtol=1e-6)


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_l (gamma lambda)^l δ_(t + l): arXiv:1506.02438, eq. 16, as a sum of its own for each token."""
    ahead = [*values[1:], 0.0]
    deltas = [r + gamma * next_value - v for r, next_value, v in zip(rewards, ahead, values)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.95), (1.0, 0.95), (1.0, 1.0), (0.7, 0.0), (0.0, 0.5)])
def test_advantages_are_the_sums_of_the_definition_over_the_active_tokens(gamma, lam):
    draw = np.random.default_rng(0)
    rewards_BT, values_BT = draw.standard_normal((2, B, T))
    advantages_BT, returns_BT = gae(np.float32(rewards_BT), np.float32(values_BT), MASK_BT, gamma=gamma, lam=lam)
    assert not advantages_BT[~MASK_BT].any() and not returns_BT[~MASK_BT].any()
    for b in range(B):
        own = MASK_BT[b]
        want = by_definition(rewards_BT[b, own].tolist(), values_BT[b, own].tolist(), gamma, lam)
        np.testing.assert_allclose(advantages_BT[b, own], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(returns_BT[b, own], want + values_BT[b, own], rtol=1e-5, atol=1e-6)


def test_with_lambda_1_returns_are_the_sums_of_discounted_rewards():
    """Whatever the values: arXiv:1506.02438, eq. 18."""
    values = np.float32([[3, -2, 5, 1]])
    _, returns = gae(np.float32([[1, 0, 2, 4]]), values, np.ones((1, 4)), gamma=0.5, lam=1.0)
    np.testing.assert_allclose(returns, [[1 + 0.25 * 2 + 0.125 * 4, 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4]], rtol=1e-6)


# Whitening.


def test_whitened_values_have_mean_0_and_deviation_1_over_the_active_tokens_of_all_rows():
    draw = np.random.default_rng(1)
    values_BT = np.float32(5 + 3 * draw.standard_normal((B, T)))
    values_BT[~MASK_BT] = np.nan
    white_BT = whiten(values_BT, MASK_BT)
    assert white_BT.dtype == np.float32 and not white_BT[~MASK_BT].any()
    own = np.float64(values_BT[MASK_BT])
    np.testing.assert_allclose(white_BT[MASK_BT], (own - own.mean()) / own.std(), rtol=1e-5)
    assert abs(white_BT[MASK_BT].mean()) < 1e-6 and white_BT[MASK_BT].std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mask", [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
def test_values_without_a_spread_become_0(mask):
    assert not whiten(np.float32([[0.1, 0.1, 0.1]]), np.float32([mask])).any()


# Rewards of tokens.


def test_the_score_is_at_the_last_active_token_and_the_divergence_at_all_of_them():
    """log(π / ref) is 0.5 and -0.25; k3 of them is e^-0.5 + 0.5 - 1 and e^0.25 - 0.25 - 1."""
    mask = np.bool_([[1, 0, 1, 0], [0, 0, 0, 0]])
    now = np.float32([[-1.0, np.nan, -2.25, np.nan]] * 2)
    reference = np.float32([[-1.5, 1, -2.0, np.inf]] * 2)
    scores = np.float64([3.0, np.nan])
    k1 = token_rewards(scores, now, reference, mask, kl_coef=0.2)
    np.testing.assert_allclose(k1, [[-0.1, 0, 3.05, 0], [0] * 4], rtol=1e-6)
    k3 = token_rewards(scores, now, reference, mask, kl_coef=0.2, estimator="k3")
    np.testing.assert_allclose(k3[0, [0, 2]], [-0.2 * 0.10653066, 3 - 0.2 * 0.034025417], rtol=1e-6)
    assert k1.dtype == np.float32 and not token_rewards(scores * 0, now, reference, mask, kl_coef=0.0).any()


def test_a_divergence_beyond_float32_stays_finite():
    far = np.float32([[-1e4]]), np.float32([[0.0]]), np.float32([[1]])
    assert np.isfinite(token_rewards(np.zeros(1), *far, kl_coef=1.0, estimator="k3")).all()


def test_explained_variance_by_hand():
    """Returns 0 2 4 have variance 8/3; errors 0 1 -1 have 2/3."""
    mask = np.bool_([[1, 1, 1, 0]])
    returns = np.float32([[0, 2, 4, np.nan]])
    assert explained_variance(np.float32([[0, 1, 5, np.nan]]), returns, mask) == pytest.approx(0.75)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(np.float32([[7, 7, 7, 7]]), returns, mask) == 0
    assert math.isnan(explained_variance(returns, np.float32([[1, 1, 1, 1]]), mask))


# The loss.

CASES = {
    "usual": {},
    "tight": dict(epsilon=0.05, value_epsilon=0.1, vf_coef=0.5),
    "free-values": dict(value_epsilon=None, vf_coef=1.0),
}


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict]:
    """Log-probabilities and values, float64, and the other arguments of `ppo_loss`; outside the mask is anything."""
    draw = np.random.default_rng(seed)
    logprobs_BT, values_BT = -draw.exponential(1.0, (B, T)), draw.standard_normal((B, T))
    arguments = {
        "old_logprobs_BT": logprobs_BT + 0.3 * draw.standard_normal((B, T)),
        "old_values_BT": values_BT + 0.4 * draw.standard_normal((B, T)),
        "advantages_BT": draw.standard_normal((B, T)),
        "returns_BT": values_BT + draw.standard_normal((B, T)),
        "entropy_BT": draw.exponential(1.0, (B, T)),
    }
    arguments = {name: np.where(MASK_BT, x_BT, np.nan).astype(np.float32) for name, x_BT in arguments.items()}
    return logprobs_BT, values_BT, {**arguments, "mask_BT": MASK_BT}


def exact(logprobs_BT, values_BT, arguments, config) -> tuple[float, int, dict[str, float]]:
    """Sum, weight, and the sums of the metrics."""
    total, count, metrics = 0.0, 0, dict.fromkeys(NAMES, 0.0)
    for b, t in zip(*np.nonzero(MASK_BT)):
        own = {name: float(x_BT[b, t]) for name, x_BT in arguments.items()}
        log = logprobs_BT[b, t] - own["old_logprobs_BT"]
        ratio, value, old, A, R = math.exp(log), values_BT[b, t], own["old_values_BT"], own["advantages_BT"], 0.0
        R = own["returns_BT"]
        clipped = min(max(ratio, 1 - config.epsilon), 1 + config.epsilon)
        policy = -min(ratio * A, clipped * A)
        errors = [(value - R) ** 2]
        if config.value_epsilon is not None:
            errors.append((min(max(value, old - config.value_epsilon), old + config.value_epsilon) - R) ** 2)
        total, count = total + policy + config.vf_coef * 0.5 * max(errors), count + 1
        observed = (
            *(policy, 0.5 * max(errors), 0.5 * log**2, (clipped - ratio) * A < 0),
            *(own["entropy_BT"], ratio, errors[-1] > errors[0], value),
        )
        for name, number in zip(NAMES, observed, strict=True):
            metrics[name] += number
    return total, count, metrics


NAMES = (
    *("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg"),
    *("policy/entropy_avg", "policy/ratio", "value/clipfrac_avg", "value/mean"),
)


@partial(jax.jit, static_argnames="config")
def value_and_gradients(logprobs_BT, values_BT, **arguments):
    def total(pair):
        loss = ppo_loss(*pair, **arguments)
        return loss.sum, loss

    (_, loss), gradients = jax.value_and_grad(total, has_aux=True)((logprobs_BT, values_BT))
    return loss, gradients


@pytest.mark.parametrize("case", CASES)
def test_against_the_formulas(case):
    """Value, weight, metrics, and both gradients by central differences in float64."""
    config = PPOLossConfig(**CASES[case])
    *pair, arguments = inputs()
    want = exact(*pair, arguments, config)
    loss, gradients = value_and_gradients(*map(jnp.float32, pair), **arguments, config=config)
    assert float(loss.sum) == pytest.approx(want[0], rel=1e-5) and float(loss.weight) == want[1] == MASK_BT.sum()
    assert loss.metrics.keys() == want[2].keys()
    for name, (total, weight) in loss.metrics.items():
        assert float(total) == pytest.approx(want[2][name], rel=1e-5, abs=1e-6), name
        assert float(weight) == want[1]
    for which, gradient_BT in enumerate(gradients):
        slope_BT = np.zeros((B, T))
        for place in np.ndindex(B, T):
            sums = []
            for step in (1e-6, -1e-6):
                moved = [x_BT.copy() for x_BT in pair]
                moved[which][place] += step
                sums.append(exact(*moved, arguments, config)[0])
            slope_BT[place] = (sums[0] - sums[1]) / 2e-6
        np.testing.assert_allclose(gradient_BT, slope_BT, rtol=1e-4, atol=1e-6)


def test_the_cases_clip_ratios_and_values_and_not_all_of_them():
    """Else the comparison above would prove little."""
    *pair, arguments = inputs()
    loss, _ = value_and_gradients(*map(jnp.float32, pair), **arguments, config=PPOLossConfig())
    for name in ("policy/clipfrac_avg", "value/clipfrac_avg"):
        assert 0 < loss.metrics[name][0] < MASK_BT.sum()


def test_micro_batches_in_any_order_add_up():
    *pair, arguments = inputs()
    whole, whole_gradients = value_and_gradients(*map(jnp.float32, pair), **arguments, config=PPOLossConfig())
    pieces = [np.array([2, 0]), np.array([3, 1])]
    parts = [
        value_and_gradients(
            *(jnp.float32(x[rows]) for x in pair),
            **{name: x[rows] for name, x in arguments.items()},
            config=PPOLossConfig(),
        )
        for rows in pieces
    ]
    added = jax.tree.map(lambda *x: sum(x), *(loss for loss, _ in parts))
    for one, two in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    for which in range(2):
        gradient_BT = np.concatenate([gradients[which] for _, gradients in parts])
        np.testing.assert_allclose(gradient_BT, whole_gradients[which][np.concatenate(pieces)], rtol=1e-6)


def test_what_is_outside_the_mask_has_no_gradient_and_no_say():
    *pair, arguments = inputs()
    usual, _ = value_and_gradients(*map(jnp.float32, pair), **arguments, config=PPOLossConfig())
    hidden = [jnp.float32(np.where(MASK_BT, x_BT, np.nan)) for x_BT in pair]
    with jax.disable_jit():  # compiled, a product with a mask may become a choice, which hides NaN
        loss, gradients = value_and_gradients(*hidden, **arguments, config=PPOLossConfig())
    for one, two in zip(jax.tree.leaves(loss), jax.tree.leaves(usual), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-6, atol=1e-7)
    assert all(np.isfinite(x_BT).all() and not x_BT[~MASK_BT].any() for x_BT in gradients)


def test_no_active_token_at_all():
    *pair, arguments = inputs()
    arguments["mask_BT"] = np.zeros((B, T), bool)
    loss, gradients = value_and_gradients(*map(jnp.float32, pair), **arguments, config=PPOLossConfig())
    assert loss.sum == 0 and loss.weight == 0 and not any(x_BT.any() for x_BT in gradients)
    assert np.isfinite(jax.tree.leaves(loss)).all()


@pytest.mark.parametrize("distance", [100.0, -100.0, 1e4])
def test_ratios_beyond_float32_have_finite_gradients(distance):
    logprobs_BT, values_BT, arguments = inputs()
    arguments["old_logprobs_BT"] = np.float32(logprobs_BT - distance)
    loss, (gradient_BT, _) = value_and_gradients(
        jnp.float32(logprobs_BT), jnp.float32(values_BT), **arguments, config=PPOLossConfig()
    )
    assert np.isfinite(loss.sum) and np.isfinite(gradient_BT).all()
    clipped = MASK_BT & (np.nan_to_num(arguments["advantages_BT"]) * distance > 0)
    assert clipped.any() and not gradient_BT[clipped].any()


def test_a_first_update_is_that_of_the_plain_objective():
    """Old and new are the same: ratios are 1, nothing is clipped, the gradients are -A and vf_coef (V - R)."""
    logprobs_BT, values_BT, arguments = inputs()
    arguments |= {"old_logprobs_BT": np.float32(logprobs_BT), "old_values_BT": np.float32(values_BT)}
    loss, gradients = value_and_gradients(
        jnp.float32(logprobs_BT), jnp.float32(values_BT), **arguments, config=PPOLossConfig(vf_coef=0.3)
    )
    for name in ("policy/approxkl_avg", "policy/clipfrac_avg", "value/clipfrac_avg"):
        assert loss.metrics[name][0] == 0
    assert loss.metrics["policy/ratio"][0] == MASK_BT.sum()
    own = MASK_BT
    np.testing.assert_allclose(gradients[0][own], -arguments["advantages_BT"][own], rtol=1e-6)
    np.testing.assert_allclose(gradients[1][own], 0.3 * (values_BT - arguments["returns_BT"])[own], rtol=1e-4)


def test_only_log_probabilities_and_values_of_now_have_gradients():
    *pair, arguments = inputs()
    mask_BT = arguments.pop("mask_BT")
    arguments = {name: np.nan_to_num(x_BT) for name, x_BT in arguments.items()}
    now = list(map(jnp.float32, pair))

    def everything(now, arguments):
        return ppo_loss(*now, **arguments, mask_BT=mask_BT, config=PPOLossConfig())

    gradients = jax.grad(lambda x: everything(now, x).sum)(arguments)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))
    of_metrics = jax.grad(lambda x: sum(total for total, _ in everything(x, arguments).metrics.values()))(now)
    assert not any(leaf.any() for leaf in of_metrics)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"epsilon": 0.0}, "epsilon 0.0 must be above 0 and at most 1"),
        ({"epsilon": 1.5}, "epsilon 1.5 must be above 0 and at most 1"),
        ({"value_epsilon": 0.0}, "value_epsilon 0.0 must be above 0 and finite"),
        ({"vf_coef": 0.0}, "vf_coef 0.0 must be above 0 and finite"),
        ({"vf_coef": math.inf}, "vf_coef inf must be above 0"),
    ],
)
def test_settings_that_cannot_be(changes, error):
    with pytest.raises(ValueError, match=error):
        PPOLossConfig(**changes)
