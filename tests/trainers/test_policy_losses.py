"""Policy losses, their gradients and metrics against the papers' formulas, token by token in float64."""

from functools import partial
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.policy_losses import LOSSES, PolicyLossConfig, policy_loss, top_entropy_weights
from trainers.policy_variants import IMPORTANCE
from trainers.trainer import Loss

B, T, M = 6, 5, 8
LENGTHS = (5, 4, 0, 1, 4, 2)  # of completions; the third is masked

# Options, and which of the inputs that may be None are given.
CASES = {
    "on-policy": ({}, ()),
    "off-policy": ({}, ("old",)),
    "asymmetric": (dict(epsilon=0.1, epsilon_high=0.5), ("old",)),
    "no-epsilon": (dict(epsilon=0.0), ("old",)),
    "delta": (dict(delta=1.6), ("old",)),
    "kl": (dict(beta=0.3), ("old", "reference")),
    "kl-on-policy": (dict(beta=0.3), ("reference",)),
    "kl-watched": ({}, ("old", "reference")),
    "kl-unbiased": (dict(beta=0.3, unbiased_kl=True), ("old", "reference")),
    "capped": (dict(importance_cap=1.3), ("old", "sampler")),
    "capped-on-policy": (dict(importance_cap=1.3), ("sampler",)),
    "watched": ({}, ("old", "sampler")),
    "weights": ({}, ("old", "weights")),
    "part-of-a-rollout": ({}, ("old", "rollout")),
    "all": (
        dict(epsilon=0.15, epsilon_high=0.3, delta=1.7, beta=0.1, importance_cap=1.2),
        ("old", "reference", "sampler", "weights", "rollout"),
    ),
}
OPTIONAL = {
    "old": "old_logprobs_BT",
    "reference": "reference_logprobs_BT",
    "sampler": "sampler_logprobs_BT",
    "weights": "weights_BT",
    "rollout": "rollout_tokens_B",
}


def inputs(*given, seed=0):
    """Log-probabilities, float64, and the other arguments of `policy_loss`; outside the mask there is anything."""
    random = np.random.default_rng(seed)
    mask_BT = np.arange(T) < np.array(LENGTHS)[:, None]
    mask_BT[0, 2] = False  # a hole, such as what a tool said
    logprobs_BT = -random.exponential(1.0, (B, T))
    near = lambda scale: logprobs_BT + scale * random.standard_normal((B, T))  # noqa: E731
    optional = {
        "old": near(0.4),
        "reference": near(0.6),
        "sampler": near(0.5),
        "weights": random.choice([0.0, 1.0], (B, T)),
        "rollout": np.full(B, 3.7),
    }
    arguments = {OPTIONAL[name]: np.float32(optional[name]) if name in given else None for name in OPTIONAL}
    for name in ("old", "reference", "sampler"):
        if name in given:
            arguments[OPTIONAL[name]][~mask_BT] = np.nan
    return logprobs_BT, arguments | {
        "entropy_BT": np.float32(random.exponential(1.0, (B, T))),
        "mask_BT": mask_BT,
        "advantages_B": np.array([1.3, -0.7, 2.0, -1.1, 0.0, 0.4], np.float32),
        "max_completion": M,
    }


def mean(values):
    return sum(values) / max(len(values), 1)


def exact(logprobs_BT, still_BT, arguments, config):
    """Sum, weight and metrics by the papers' formulas; `still_BT` stands for log-probabilities without gradient."""
    metrics, losses = {}, []
    for b in range(B):
        places = [t for t in range(T) if arguments["mask_BT"][b, t]]
        row = {
            name: [float(argument[b, t]) for t in places]
            for name, argument in arguments.items()
            if name.endswith("_BT") and argument is not None
        }
        row |= {"now": [logprobs_BT[b, t] for t in places], "still": [still_BT[b, t] for t in places]}
        losses.append(exact_row(row, float(arguments["advantages_B"][b]), config, metrics))
    count, total = sum(map(len, losses)), sum(map(sum, losses))
    rollout = count if arguments["rollout_tokens_B"] is None else float(arguments["rollout_tokens_B"].sum())
    pair = {
        "grpo": (sum(map(mean, losses)), B),
        "bnpo": (total, count),
        "dr_grpo": (total, B * M),
        "dapo": (total, rollout),
        "cispo": (total, rollout),
    }[config.name]
    return Loss(*pair, {name: (sum(values), len(values)) for name, values in metrics.items()})


def exact_row(row, A, config, metrics):
    """The losses of a completion's active tokens; what is observed of them is appended to the metrics."""

    def observe(name, value):
        metrics.setdefault(name, []).append(value)

    low, high = 1 - config.epsilon, 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    old = row.get("old_logprobs_BT", row["still"])
    logs = [now - then for now, then in zip(row["now"], old)]
    still_logs = [still - then for still, then in zip(row["still"], old)]
    ratios, still_ratios = {
        "token": (np.exp(logs), np.exp(still_logs)),
        "sequence": ([np.exp(mean(logs))] * len(logs), [np.exp(mean(still_logs))] * len(logs)),
        "sequence_token": (
            [np.exp(mean(still_logs)) * np.exp(now - still) for now, still in zip(row["now"], row["still"])],
            [np.exp(mean(still_logs))] * len(logs),
        ),
    }[config.importance]
    for ratio in [np.exp(mean(logs))] if config.importance == "sequence" else ratios:
        below, above = bool(ratio < low and A < 0), bool(ratio > high and A > 0)
        sides = {"low_mean": below, "high_mean": above, "region_mean": below or above}
        for side, happens in sides.items() if config.name != "cispo" else ():
            observe(f"clip_ratio/{side}", happens)
        if config.name == "cispo":
            observe("cispo_clip_ratio", above)
    losses = []
    for t, (now, ratio) in enumerate(zip(row["now"], ratios)):
        bounded = ratio if config.delta is None else min(ratio, config.delta)
        objective = min(bounded * A, min(max(ratio, low), high) * A)
        if config.name == "cispo":
            objective = min(still_ratios[t], high) * A * now
        objective *= row["weights_BT"][t] if "weights_BT" in row else 1
        if "sampler_logprobs_BT" in row:
            drift = old[t] - row["sampler_logprobs_BT"][t]
            observe("sampler_logprob_diff", abs(drift))
            if config.importance_cap is not None:
                observe("sampling/importance_sampling_ratio/mean", min(np.exp(drift), config.importance_cap))
                objective *= min(np.exp(drift), config.importance_cap)
        kl = 0.0
        if "reference_logprobs_BT" in row:
            chance = np.exp(row["reference_logprobs_BT"][t] - now)
            kl = (chance - np.log(chance) - 1) * (ratio if config.unbiased_kl else 1)
            observe("kl", kl)
        observe("entropy", row["entropy_BT"][t])
        losses.append(-objective + config.beta * kl)
    return losses


@partial(jax.jit, static_argnames=("config", "max_completion"))
def value_and_gradient(logprobs_BT, **arguments):
    def total(logprobs_BT):
        loss = policy_loss(logprobs_BT, **arguments)
        return loss.sum, loss

    (_, loss), gradient_BT = jax.value_and_grad(total, has_aux=True)(logprobs_BT)
    return loss, gradient_BT


def config_of(name, importance, case):
    options, given = CASES[case]
    if name == "cispo":
        options = {key: value for key, value in options.items() if key != "delta"}
    return PolicyLossConfig(name=name, importance=importance, **options), given


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("name", LOSSES)
def test_against_the_formulas(name, importance, case):
    """Value, weight, metrics, and the gradient by central differences in float64."""
    config, given = config_of(name, importance, case)
    logprobs_BT, arguments = inputs(*given)
    want = exact(logprobs_BT, logprobs_BT, arguments, config)
    loss, gradient_BT = value_and_gradient(jnp.float32(logprobs_BT), **arguments, config=config)
    assert float(loss.sum) == pytest.approx(want.sum, rel=1e-5, abs=1e-6)
    assert float(loss.weight) == pytest.approx(want.weight, rel=1e-6)
    assert loss.metrics.keys() == want.metrics.keys()
    for metric, pair in want.metrics.items():
        np.testing.assert_allclose(loss.metrics[metric], pair, rtol=1e-5, atol=1e-6, err_msg=metric)
    slope_BT = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
        up, down = (logprobs_BT.copy() for _ in range(2))
        up[b, t] += 1e-6
        down[b, t] -= 1e-6
        pair = (exact(moved, logprobs_BT, arguments, config).sum for moved in (up, down))
        slope_BT[b, t] = (next(pair) - next(pair)) / 2e-6
    np.testing.assert_allclose(gradient_BT, slope_BT, rtol=1e-5, atol=1e-6)


def test_the_cases_clip_on_both_sides_and_in_the_middle():
    """Else the comparison above would prove little."""
    logprobs_BT, arguments = inputs("old", "sampler")
    for importance in IMPORTANCE:
        config = PolicyLossConfig(importance=importance, delta=1.6, epsilon=0.1)
        metrics = value_and_gradient(jnp.float32(logprobs_BT), **arguments, config=config)[0].metrics
        shares = [metrics[f"clip_ratio/{side}_mean"][0] for side in ("low", "high", "region")]
        assert shares[0] > 0 and shares[1] > 0 and shares[2] < metrics["clip_ratio/region_mean"][1]
    active = arguments["mask_BT"]
    above = np.exp(logprobs_BT - arguments["old_logprobs_BT"])[active & (arguments["advantages_B"] < 0)[:, None]]
    assert (above > 1.6).any(), "delta bounds none"


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_in_any_order_add_up(name):
    config, given = config_of(name, "token", "all")
    logprobs_BT, arguments = inputs(*given)
    whole, whole_BT = value_and_gradient(jnp.float32(logprobs_BT), **arguments, config=config)
    parts = []
    for rows in ([4, 0], [3, 2, 5], [1]):
        cut = {key: value[np.array(rows)] if np.ndim(value) else value for key, value in arguments.items()}
        parts.append(value_and_gradient(jnp.float32(logprobs_BT[rows]), **cut, config=config))
    added = jax.tree.map(lambda *x: sum(x), *(loss for loss, _ in parts))
    for one, two in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    gradient_BT = np.concatenate([gradient_BT for _, gradient_BT in parts])
    np.testing.assert_allclose(gradient_BT, whole_BT[np.array([4, 0, 3, 2, 5, 1])], rtol=1e-6)


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_what_is_in_it_change_nothing(name, importance):
    config, given = config_of(name, importance, "all")
    logprobs_BT, arguments = inputs(*given)
    usual, gradient_BT = value_and_gradient(jnp.float32(logprobs_BT), **arguments, config=config)
    assert not gradient_BT[~arguments["mask_BT"]].any()
    wide = {key: np.pad(value, [(0, 0), (0, 3)]) if np.ndim(value) == 2 else value for key, value in arguments.items()}
    hidden = np.pad(np.where(arguments["mask_BT"], logprobs_BT, -np.inf), [(0, 0), (0, 3)], constant_values=np.nan)
    with jax.disable_jit():  # compiled, a product with a mask may become a choice, which hides NaN
        padded, wide_gradient_BT = value_and_gradient(jnp.float32(hidden), **wide, config=config)
    for one, two in zip(jax.tree.leaves((usual, gradient_BT)), jax.tree.leaves((padded, wide_gradient_BT[:, :T]))):
        np.testing.assert_allclose(one, two, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_no_active_token_at_all(name):
    config, given = config_of(name, "sequence", "all")
    logprobs_BT, arguments = inputs(*(set(given) - {"rollout"}))
    arguments["mask_BT"] = np.zeros((B, T), bool)
    loss, gradient_BT = value_and_gradient(jnp.float32(logprobs_BT), **arguments, config=config)
    assert loss.sum == 0 and not gradient_BT.any()
    assert loss.weight == {"grpo": B, "dr_grpo": B * M}.get(name, 0)
    assert np.isfinite(jax.tree.leaves(loss)).all()


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("name", LOSSES)
def test_without_advantage_there_is_only_the_divergence(name, importance):
    logprobs_BT, arguments = inputs("old", "reference")
    arguments["advantages_B"] = np.zeros(B, np.float32)
    loss, gradient_BT = value_and_gradient(
        jnp.float32(logprobs_BT), **arguments, config=PolicyLossConfig(name=name, importance=importance)
    )
    assert loss.sum == 0 and not gradient_BT.any()
    kl, gradient_BT = value_and_gradient(
        jnp.float32(logprobs_BT), **arguments, config=PolicyLossConfig(name=name, importance=importance, beta=0.5)
    )
    assert kl.sum > 0 and gradient_BT[arguments["mask_BT"]].all()


@pytest.mark.parametrize("distance", [100.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("name", LOSSES)
def test_ratios_beyond_float32_have_finite_gradients(name, importance, distance):
    """e^100 is infinite in float32; where a token is clipped it has no gradient, and nowhere NaN."""
    logprobs_BT, arguments = inputs("old", "reference", "sampler")
    for argument, sign in (("old_logprobs_BT", -1), ("reference_logprobs_BT", 1), ("sampler_logprobs_BT", 1)):
        arguments[argument] = np.float32(logprobs_BT + sign * distance)
    config = PolicyLossConfig(name=name, importance=importance, beta=0.1, importance_cap=2.0)
    loss, gradient_BT = value_and_gradient(jnp.float32(logprobs_BT), **arguments, config=config)
    assert np.isfinite(loss.sum) and np.isfinite(gradient_BT).all()
    plain = PolicyLossConfig(name=name, importance=importance)
    _, gradient_BT = value_and_gradient(jnp.float32(logprobs_BT), **arguments, config=plain)
    assert np.isfinite(gradient_BT).all()
    clipped = arguments["advantages_B"] > 0 if distance > 0 else arguments["advantages_B"] < 0
    if name != "cispo":
        assert not gradient_BT[clipped].any()


def test_only_the_log_probabilities_of_now_have_gradients():
    config, given = config_of("dapo", "token", "all")
    logprobs_BT, arguments = inputs(*given)
    floats = {key: value for key, value in arguments.items() if getattr(value, "dtype", None) == np.float32}
    floats.pop("rollout_tokens_B")
    rest = {key: value for key, value in arguments.items() if key not in floats}
    names = set(floats)
    for name in names - {"weights_BT"}:
        floats[name] = np.nan_to_num(floats[name])

    def everything(floats):
        loss = policy_loss(jnp.float32(logprobs_BT), **floats, **rest, config=config)
        return loss.sum + sum(total for total, _ in loss.metrics.values())

    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(everything)(floats)))
    metrics = jax.grad(lambda x: sum(pair[0] for pair in policy_loss(x, **arguments, config=config).metrics.values()))(
        jnp.float32(logprobs_BT)
    )
    assert not metrics.any()


def test_bnpo_and_dapo_differ_where_updates_share_a_rollout():
    """Of dapo each update has its share of one denominator; of bnpo one of its own."""
    logprobs_BT, arguments = inputs()
    active = arguments["mask_BT"].sum()
    arguments["rollout_tokens_B"] = np.full(B, active / B, np.float32)
    weights = {"bnpo": [], "dapo": []}
    for name in weights:
        for rows in (slice(0, 3), slice(3, 6)):
            cut = {key: value[rows] if np.ndim(value) else value for key, value in arguments.items()}
            config = PolicyLossConfig(name=name)
            loss, _ = value_and_gradient(jnp.float32(logprobs_BT[rows]), **cut, config=config)
            weights[name].append(float(loss.weight))
    assert weights["dapo"] == pytest.approx([active / 2, active / 2])
    assert weights["bnpo"] == [4 + 4 + 0, 1 + 4 + 2]


def test_gspo_of_tokens_is_gspo():
    """Where all tokens weigh the same: arXiv:2507.18071, sec. 4.3."""
    logprobs_BT, arguments = inputs("old")
    one, two = (
        value_and_gradient(
            jnp.float32(logprobs_BT), **arguments, config=PolicyLossConfig(name="grpo", importance=importance)
        )
        for importance in ("sequence", "sequence_token")
    )
    np.testing.assert_allclose(one[0].sum, two[0].sum, rtol=1e-6)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_the_tokens_of_highest_entropy(share):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    entropy_BT = np.float32(random.exponential(1.0, (20, 30)))
    mask_BT = random.random((20, 30)) < 0.7
    threshold = torch.quantile(torch.tensor(entropy_BT[mask_BT]), 1 - share).item()
    got = top_entropy_weights(entropy_BT, mask_BT, share)
    np.testing.assert_array_equal(got, (entropy_BT >= threshold) & mask_BT)
    assert float(got.sum()) == pytest.approx(share * mask_BT.sum(), abs=1)
    assert not top_entropy_weights(entropy_BT, np.zeros_like(mask_BT), share).any()


def test_shares_out_of_range():
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"share {share}"):
            top_entropy_weights(np.zeros((2, 2), np.float32), np.ones((2, 2), bool), share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="ppo"), "loss 'ppo' is none of grpo, bnpo, dr_grpo, dapo, cispo"),
        (dict(importance="row"), "importance 'row' is none of token, sequence, sequence_token"),
        (dict(epsilon=-0.1), "epsilon -0.1"),
        (dict(epsilon=1.5), "epsilon 1.5"),
        (dict(epsilon_high=-0.1), "epsilon_high -0.1"),
        (dict(epsilon_high=float("inf")), "epsilon_high inf"),
        (dict(epsilon_high=0.5, delta=1.5), r"delta 1.5 must be finite and above 1 \+ epsilon_high, 1.5"),
        (dict(name="cispo", delta=3.0), "delta 3.0 has no meaning for cispo"),
        (dict(beta=-1.0), "beta -1.0"),
        (dict(beta=float("nan")), "beta nan"),
        (dict(unbiased_kl=True), "unbiased_kl needs beta above 0"),
        (dict(importance_cap=0.0), "importance_cap 0.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossConfig(**options)


def test_options_that_lack_what_they_work_on():
    logprobs_BT, arguments = inputs()
    for options, message in ((dict(beta=0.1), "of a reference"), (dict(importance_cap=2.0), "of the sampler")):
        with pytest.raises(ValueError, match=message):
            policy_loss(jnp.float32(logprobs_BT), **arguments, config=PolicyLossConfig(**options))


def test_the_names_of_the_config_are_those_of_the_tables():
    hints = get_type_hints(PolicyLossConfig)
    assert get_args(hints["name"]) == tuple(LOSSES) and get_args(hints["importance"]) == tuple(IMPORTANCE)
