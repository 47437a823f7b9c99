"""From prompts to PPO's mini-batches, with completions that a script draws and networks that say what they are told."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.llama.init import random_model
from tests.trainers.test_actor_critic import NETWORK, actor_critic
from tests.trainers.test_experience import LETTERS, Data, Script, prompts, same_batch
from trainers.actor_critic import judge
from trainers.metrics import Throughput
from trainers.policy import PolicyConfig, completion_log_probs
from trainers.ppo_experience import PPOExperience, PPOExperienceConfig, _Known
from trainers.ppo_losses import gae, token_rewards, whiten
from trainers.rewards import Reward
from trainers.rollouts import RolloutConfig

M = 4
SCRIPT = ("a.", "aab"), ("aaa.", "b."), ("ab", "aa."), ("aaaa", "bb.")


class Weights(nnx.Module):
    """A model for those who do not run it."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))

    @property
    def policy(self) -> "Weights":
        return self


def experience(*texts, rewards=LETTERS, **options) -> PPOExperience:
    rollout = options.pop("rollout", RolloutConfig(max_completion_length=M, completions=2))
    names = [name for name in options if name in vars(PPOExperienceConfig())]
    config = PPOExperienceConfig(**{name: options.pop(name) for name in names})
    decode = lambda ids: "".join(map(chr, ids))  # noqa: E731
    options.setdefault("reference", lambda policy: policy)
    return PPOExperience(Script(*(texts or SCRIPT)), rewards, decode, rollout=rollout, config=config, **options)


@pytest.fixture
def told(monkeypatch) -> dict[str, np.ndarray]:
    """What the networks say of each token, in rows of completions; filled in by the first rollout of a test."""
    said: dict[str, np.ndarray] = {}

    def ask(self, model, drawn):
        shape = drawn.completions_BCM.reshape(-1, drawn.completions_BCM.shape[-1]).shape
        draw = np.random.default_rng(5)
        for name in ("logprobs_NM", "entropy_NM", "values_NM", "reference_logprobs_NM"):
            said[name] = draw.standard_normal(shape).astype(np.float32)
        if self._reference is None:
            said["reference_logprobs_NM"] = None
        said.update(mask_NM=drawn.mask_BCM.reshape(shape), scores_N=drawn.scores_BC.reshape(-1))
        return _Known(**said, sampler_logprobs_NM=said["logprobs_NM"] + np.float32(0.25))

    monkeypatch.setattr(PPOExperience, "_ask", ask)
    return said


def first(own: PPOExperience, *numbers: int):
    """The batches of the rounds of a first rollout, and its metrics."""
    data, batches = Data(prompts(*(numbers or range(4)))), []
    batch, metrics = own.next(Weights(), data, Throughput())
    while own.num_waiting:
        batches.append(batch)
        batch, _ = own.next(Weights(), data, Throughput())
    return [*batches, batch], metrics


# Advantages and metrics.


def test_advantages_are_those_of_the_rewards_of_tokens_whitened_over_the_rollout(told):
    [batch], _ = first(experience(epochs=1, gamma=0.9, lam=0.8, kl_coef=0.3))
    order = batch.prompt_lengths_B - 1  # prompt n has n + 1 tokens
    mask = told["mask_NM"]
    assert mask.sum(axis=1).tolist() == [2, 3, 4, 2, 2, 3, 4, 3]
    assert told["scores_N"].tolist() == [1, 2, 3, 0, 1, 2, 4, 0]
    rewards = token_rewards(
        told["scores_N"], told["logprobs_NM"], told["reference_logprobs_NM"], mask, kl_coef=0.3, estimator="k1"
    )
    advantages, returns = gae(rewards, told["values_NM"], mask, gamma=0.9, lam=0.8)
    white = whiten(advantages, mask)
    assert white[mask].mean() == pytest.approx(0, abs=1e-6) and white[mask].std() == pytest.approx(1, abs=1e-5)
    for name, want in (
        ("advantages_BCM", white),
        ("returns_BCM", returns),
        ("old_logprobs_BCM", told["logprobs_NM"]),
        ("old_values_BCM", told["values_NM"]),
        ("mask_BCM", mask.astype(np.float32)),
    ):
        np.testing.assert_array_equal(getattr(batch, name), want.reshape(4, 2, M)[order], err_msg=name)


def test_rewards_of_tokens_are_whitened_where_that_is_wanted(told):
    [batch], _ = first(experience(epochs=1, whiten_rewards=True, lam=1.0))
    order, mask = batch.prompt_lengths_B - 1, told["mask_NM"]
    rewards = token_rewards(
        told["scores_N"], told["logprobs_NM"], told["reference_logprobs_NM"], mask, kl_coef=0.05, estimator="k1"
    )
    _, returns = gae(whiten(rewards, mask), told["values_NM"], mask, gamma=1.0, lam=1.0)
    np.testing.assert_array_equal(batch.returns_BCM, returns.reshape(4, 2, M)[order])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_objective_is_worked_out_completion_by_completion(told, estimator):
    own = experience(kl_coef=0.3, kl_estimator=estimator, missing_eos_penalty=0.5)
    _, metrics = first(own)
    scores = [1, 2 - 0.5, 3, 0, 1 - 0.5, 2, 4 - 0.5, 0]
    kls, entropies = [], []
    for n, count in enumerate((2, 3, 4, 2, 2, 3, 4, 3)):
        logs = [float(told["reference_logprobs_NM"][n, m]) - float(told["logprobs_NM"][n, m]) for m in range(count)]
        kls.append(sum(-log if estimator == "k1" else math.exp(log) - 1 - log for log in logs))
        entropies.append(sum(float(told["entropy_NM"][n, m]) for m in range(count)))
    want = {
        "objective/scores": np.mean(scores),
        "objective/kl": np.mean(kls),
        "objective/entropy": np.mean(entropies),
        "objective/non_score_reward": -0.3 * np.mean(kls),
        "objective/rlhf_reward": np.mean(scores) - 0.3 * np.mean(kls),
        "sampler_logprob_diff": 0.25,
        "reward": np.mean([1, 2, 3, 0, 1, 2, 4, 0]),
        "rewards/letters/mean": np.mean([1, 2, 3, 0, 1, 2, 4, 0]),
        "completions/clipped_ratio": 3 / 8,
        "completions/mean_length": 23 / 8,
        "num_tokens": 23 + 2 * (1 + 2 + 3 + 4),
    }
    assert {name: metrics[name] for name in want} == pytest.approx(want, rel=1e-5)
    assert metrics["value/explained_variance"] < 1
    assert "frac_reward_zero_std" not in metrics  # a completion is compared with the critic, not with its group


def test_without_a_weight_there_is_no_reference_and_no_divergence(told):
    [batch], metrics = first(experience(epochs=1, kl_coef=0.0, lam=1.0, reference=None))
    assert not {"objective/kl", "objective/non_score_reward"} & metrics.keys()
    assert metrics["objective/rlhf_reward"] == metrics["objective/scores"] == 13 / 8
    scores = told["scores_N"].reshape(4, 2)[batch.prompt_lengths_B - 1]
    np.testing.assert_allclose(batch.returns_BCM[..., 0], scores, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"kl_coef 0\.05 needs a reference model"):
        experience(reference=None)


def test_what_no_reward_applies_to_is_not_learnt(told):
    [batch], metrics = first(experience(("a.", "z"), ("z.", "aa."), epochs=1), 0, 1)
    order = batch.prompt_lengths_B - 1
    assert batch.mask_BCM.sum(axis=2).tolist() == np.array([[2, 0], [0, 3]])[order].tolist()
    assert metrics["objective/scores"] == metrics["reward"] == 1.5
    assert all(np.isfinite(x).all() for x in vars(batch).values())
    [batch], metrics = first(experience(("z.", "z"), epochs=1), 0)
    assert batch.mask_BCM.sum() == 0 and math.isnan(metrics["objective/scores"]) and math.isnan(metrics["reward"])


# Rounds of mini-batches.


def test_each_round_goes_through_all_rows_in_another_order(told):
    batches, _ = first(experience(epochs=3, mini_batches=2))
    lengths = [batch.prompt_lengths_B.tolist() for batch in batches]
    assert len(batches) == 6 and all(len(own) == 2 for own in lengths)
    rounds = [lengths[i] + lengths[i + 1] for i in (0, 2, 4)]
    assert all(sorted(own) == [1, 2, 3, 4] for own in rounds) and len({tuple(own) for own in rounds}) > 1
    for batch in batches:  # a row keeps its own
        for row, length in enumerate(batch.prompt_lengths_B):
            n = 2 * (length - 1)
            assert np.array_equal(batch.old_values_BCM[row], told["values_NM"][n : n + 2])


def test_the_order_is_that_of_the_seed_the_rollout_and_the_round(told):
    def orders(seed: int, count: int) -> list[list[int]]:
        own = experience(epochs=2, seed=seed)
        data = Data(*[prompts(*range(8))] * count)
        return [own.next(Weights(), data, Throughput())[0].prompt_lengths_B.tolist() for _ in range(2 * count)]

    two = orders(0, 2)
    assert two[:2] == orders(0, 1) and two != orders(1, 2)
    assert len({tuple(own) for own in two}) == 4


def test_mini_batches_are_the_same_however_many_devices_share_their_rows(told):
    few, _ = first(experience(epochs=2, mini_batches=2))
    many, _ = first(experience(epochs=2, mini_batches=2, rows=4))
    for own, split in zip(few, many, strict=True):
        assert own.completions_BCM.shape == (2, 2, M) and split.completions_BCM.shape == (4, 1, M)
        assert split.prompt_lengths_B.tolist() == np.repeat(own.prompt_lengths_B, 2).tolist()
        for name in ("completions_BCM", "advantages_BCM", "returns_BCM", "old_values_BCM", "mask_BCM"):
            x, y = getattr(own, name), getattr(split, name)
            assert np.array_equal(x.reshape(y.shape), y), name


def test_mini_batches_that_do_not_divide_the_prompts(told):
    with pytest.raises(ValueError, match="3 prompts cannot be shared evenly by 2 mini-batches"):
        first(experience(mini_batches=2), 0, 1, 2)


def test_what_is_in_flight_is_carried_over_to_the_last_bit(told):
    lists = prompts(0, 1, 2, 3), prompts(4, 5, 6, 7)
    whole, data = experience(epochs=2, mini_batches=2), Data(*lists)
    expected = [whole.next(Weights(), data, Throughput()) for _ in range(8)]
    for stop in (1, 3, 4, 6):
        data, own = Data(*lists), experience(epochs=2, mini_batches=2)
        for _ in range(stop):
            own.next(Weights(), data, Throughput())
        later = experience(epochs=2, mini_batches=2)
        later.restore(json.loads(json.dumps(own.state())))
        for batch, metrics in expected[stop:]:
            found, found_metrics = later.next(Weights(), data, Throughput())
            assert same_batch(found, batch)
            clock = "rollout_tokens_per_second"
            assert repr({**found_metrics, clock: 0}) == repr({**metrics, clock: 0})


def test_prompts_are_given_back_where_a_reward_fails(told):
    def fails(**_):
        raise ValueError("no")

    own, data = experience(rewards=[Reward("own", fails)]), Data(prompts(0, 1))
    with pytest.raises(RuntimeError, match="reward own raised ValueError: no"):
        own.next(Weights(), data, Throughput())
    assert data.place == 0 and own.num_waiting == 0
    with pytest.raises(ValueError, match="no reward function"):
        experience(rewards=[])


# What networks say.


@pytest.mark.parametrize("kind", ["head", "separate"])
def test_policy_critic_and_reference_are_asked_for_each_row(kind):
    """In mini-batches, micro-batches and rows of a part of a prompt's completions, as without any of these."""
    model = actor_critic(kind)
    other = random_model(NETWORK, key=jax.random.key(9))
    own = experience(
        rewards=[Reward("ones", ones)],
        reference=other,
        epochs=1,
        mini_batches=2,
        kl_coef=0.1,
        gamma=0.9,
        lam=1.0,
        rollout=RolloutConfig(max_completion_length=M, completions=2, temperature=0.7),
        micro_batches=2,
        rows=4,
    )
    own._roll_out = small(own._roll_out)
    data = Data(prompts(0, 5, 2, 3))
    batches = [own.next(model, data, Throughput())[0] for _ in range(2)]
    assert all(batch.completions_BCM.shape == (4, 1, M) for batch in batches)
    for batch in batches:
        found = judge(model, batch, temperature=0.7, config=PolicyConfig())
        reference = completion_log_probs(other, batch, temperature=0.7, config=PolicyConfig()).logprobs_BT
        active = batch.mask_BCM[:, 0] > 0
        for name, want in (("old_logprobs_BCM", found.logprobs_BT), ("old_values_BCM", found.values_BT)):
            assert np.abs(getattr(batch, name)[:, 0] - want)[active].max() < 1e-5, name
        for row, tokens in enumerate(batch.completions_BCM[:, 0]):  # with lambda 1: discounted sums of rewards
            divergence = np.float64(found.logprobs_BT[row] - reference[row])[active[row]]
            rewards = -0.1 * divergence
            rewards[-1] += list(tokens).count(1)
            want = sum(0.9**t * reward for t, reward in enumerate(rewards))
            assert batch.returns_BCM[row, 0, 0] == pytest.approx(want, abs=1e-5)
    together = np.concatenate([batch.advantages_BCM[batch.mask_BCM > 0] for batch in batches])
    assert together.mean() == pytest.approx(0, abs=1e-6) and together.std() == pytest.approx(1, abs=1e-5)


def small(roll_out):
    """The script's draws as tokens that a network of 32 knows: letters less 96, and 31 for what is none."""

    def drawn(model, texts, numbers):
        rollout = roll_out(model, texts, numbers)
        tokens = rollout.tokens_BM
        known = np.where(tokens > 96, tokens - 96, np.where(tokens > 0, 31, 0))
        return rollout._replace(tokens_BM=known.astype(np.int32))

    return drawn


def ones(completion_ids, **_):
    return [ids.count(1) for ids in completion_ids]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"gamma": 1.1}, r"gamma must be from 0 to 1, not 1\.1"),
        ({"lam": -0.1}, r"lam must be from 0 to 1, not -0\.1"),
        ({"kl_coef": -1.0}, r"kl_coef must be at least 0 and finite, not -1\.0"),
        ({"missing_eos_penalty": math.inf}, "missing_eos_penalty must be at least 0 and finite, not inf"),
        ({"kl_estimator": "k2"}, "kl_estimator 'k2' is none of k1, k3"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"mini_batches": 0}, "mini_batches must be at least 1, not 0"),
    ],
)
def test_settings_that_cannot_be(changes, error):
    with pytest.raises(ValueError, match=error):
        replace(PPOExperienceConfig(), **changes)
