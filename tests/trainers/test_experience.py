"""From prompts to the batches of updates, with completions that a script draws; numbers are by hand."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.prompts import Prompt
from inference.rollout import Rollout
from models.llama import PRESETS
from models.llama.init import random_model
from trainers.experience import Experience, ExperienceConfig
from trainers.groups import count_pieces
from trainers.metrics import Throughput
from trainers.policy import PolicyBatch, PolicyConfig, completion_log_probs
from trainers.policy_losses import PolicyLossConfig
from trainers.rewards import Reward, RewardError
from trainers.rollouts import RolloutConfig

M = 4


class Weights(nnx.Module):
    """A model for those who do not run it."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))


class Script:
    """Completions by the number of their prompt, with a stop at "."; `calls` are the prompts and numbers asked for."""

    def __init__(self, *texts: tuple[str, ...]):
        self._texts, self.calls = texts, []

    def __call__(self, model, prompts, numbers) -> Rollout:
        self.calls.append((list(prompts), list(numbers)))
        texts = [text for number in numbers for text in self._texts[number % len(self._texts)]]
        tokens_BM = np.array([[ord(x) for x in text] + [0] * (M - len(text)) for text in texts], np.int32)
        return Rollout(
            tokens_BM,
            np.array([len(text) for text in texts], np.int32),
            np.array([[-n - m / 10 for m in range(M)] for n in range(len(texts))], np.float32),
            np.array([text.endswith(".") for text in texts]),
        )


class Data:
    """Lists of prompts with a place, as a loader has it."""

    def __init__(self, *lists: list[Prompt]):
        self._lists, self.place = lists, 0

    def __iter__(self):
        return self

    def __next__(self) -> list[Prompt]:
        if self.place == len(self._lists):
            raise StopIteration
        self.place += 1
        return self._lists[self.place - 1]

    def state(self) -> int:
        return self.place

    def restore(self, state: int) -> None:
        self.place = state


def prompts(*numbers: int) -> list[Prompt]:
    """Prompt n has n + 1 tokens."""
    return [Prompt(ids=tuple(range(1, n + 2)), prompt=f"prompt {n}", columns={"n": n}, index=n) for n in numbers]


def letters(completions, **_):
    """As many as there are a, nothing for those with z."""
    return [None if "z" in text else text.count("a") for text in completions]


LETTERS = (Reward("letters", letters),)


def experience(roll_out, rewards=LETTERS, **options) -> Experience:
    rollout = options.pop("rollout", RolloutConfig(max_completion_length=M, completions=2))
    config = ExperienceConfig(**{key: options.pop(key) for key in list(options) if key in vars(ExperienceConfig())})
    return Experience(roll_out, rewards, lambda ids: "".join(map(chr, ids)), rollout=rollout, config=config, **options)


SPREAD = ("a.", "aab")  # a group of rewards 1 and 2


# Metrics and batches.


def test_metrics_are_those_worked_out_by_hand():
    def has_b(completions, prompts, n, completion_ids, **_):
        assert prompts == [f"prompt {i}" for i in n] and [chr(ids[0]) for ids in completion_ids] == list("aaazaa")
        return [1.0 if "b" in text else 0.0 for text in completions]

    script = Script(("a.", "aaa."), ("abab", "zbz"), ("aa", "aab."))
    rewards = [Reward("letters", letters, 1.0), Reward("b", has_b, 0.5)]
    own = experience(script, rewards)
    _, metrics = own.next(Weights(), Data(prompts(0, 1, 2)), Throughput())
    # letters: 1 3 | 2 - | 2 2; b: 0 0 | 1 1 | 0 1; together: 1 3 | 2.5 0.5 | 2 2.5
    values = {
        "reward": (1 + 3 + 2.5 + 0.5 + 2 + 2.5) / 6,
        "reward_std": np.std([1, 3, 2.5, 0.5, 2, 2.5], ddof=1),
        "rewards/letters/mean": 10 / 5,
        "rewards/letters/std": math.sqrt((1 + 1 + 0 + 0 + 0) / 4),
        "rewards/b/mean": 3 / 6,
        "rewards/b/std": math.sqrt(6 * 0.25 / 5),
        "frac_reward_zero_std": 0.0,
        "completions/clipped_ratio": 3 / 6,
        "completions/mean_length": (2 + 4 + 4 + 3 + 2 + 4) / 6,
        "completions/min_length": 2,
        "completions/max_length": 4,
        "completions/mean_terminated_length": (2 + 4 + 4) / 3,
        "completions/min_terminated_length": 2,
        "completions/max_terminated_length": 4,
        "num_tokens": 19 + 2 * (1 + 2 + 3),
    }
    assert metrics.pop("rollout_tokens_per_second") > 0
    assert metrics == pytest.approx(values, abs=1e-12) and metrics.keys() == values.keys()


def test_a_batch_has_prompts_from_the_right_completions_from_the_left_and_the_mean_of_the_rollouts_tokens():
    script = Script(("a.", "aab"), ("aaa.", "z"), ("b", "b."))
    batch, metrics = experience(script).next(Weights(), Data(prompts(0, 1, 2)), Throughput())
    assert batch.prompts_BS.shape == (3, 16) and batch.prompts_BS.dtype == np.int32
    assert batch.prompts_BS[2].tolist() == [0] * 13 + [1, 2, 3] and batch.prompt_lengths_B.tolist() == [1, 2, 3]
    assert batch.completions_BCM[0].tolist() == [[97, 46, 0, 0], [97, 97, 98, 0]]
    assert batch.mask_BCM.sum(axis=2).tolist() == [[2, 3], [4, 1], [1, 2]] and batch.mask_BCM[0, 0].tolist() == [
        1,
        1,
        0,
        0,
    ]
    assert np.array_equal(batch.sampler_logprobs_BCM[1, 0], np.float32([-2, -2.1, -2.2, -2.3]))
    assert batch.rollout_tokens_BC == pytest.approx(np.full((3, 2), 13 / 6))
    half = math.sqrt(0.5) / (math.sqrt(0.5) + 1e-4)
    expected = [[-half * math.sqrt(0.5), half * math.sqrt(0.5)], [0, 0], [0, 0]]  # one reward alone; equal ones
    assert batch.advantages_BC == pytest.approx(np.array(expected), abs=1e-6)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert batch.old_logprobs_BCM is None and batch.reference_logprobs_BCM is None and batch.weights_BCM is None


def test_sizes_are_powers_of_two_of_which_there_are_few():
    rollout = RolloutConfig(max_completion_length=M, completions=2)
    for n, size in ((15, 16), (16, 32), (40, 64)):
        batch, _ = experience(Script(SPREAD), rollout=rollout).next(Weights(), Data(prompts(n)), Throughput())
        assert batch.prompts_BS.shape[1] == size and batch.completions_BCM.shape[2] == M


def test_truncated_completions_are_masked_where_that_is_wanted():
    script = Script(SPREAD, ("aa.", "b."))
    batch, _ = experience(script, mask_truncated=True).next(Weights(), Data(prompts(0, 1)), Throughput())
    assert batch.mask_BCM.sum(axis=2).tolist() == [[2, 0], [3, 2]]
    assert (batch.rollout_tokens_BC == np.float32(7 / 4)).all()
    assert batch.advantages_BC[0, 0] < 0 < batch.advantages_BC[0, 1]  # its reward still counts for the others


def test_no_completion_that_ends_and_nothing_but_ends():
    batch, metrics = experience(Script(("ab", "b"))).next(Weights(), Data(prompts(0)), Throughput())
    assert metrics["completions/clipped_ratio"] == 1 and metrics["completions/mean_terminated_length"] == 0
    texts = []
    rewards = [Reward("texts", lambda completions: texts.extend(completions) or [0, 1])]
    batch, metrics = experience(Script((".", ".")), rewards).next(Weights(), Data(prompts(0)), Throughput())
    assert texts == ["", ""] and batch.mask_BCM.sum() == 2 and metrics["completions/mean_length"] == 1
    assert metrics["completions/clipped_ratio"] == 0


def test_rewards_that_never_apply_are_no_numbers_and_teach_nothing():
    batch, metrics = experience(Script(("z", "z."))).next(Weights(), Data(prompts(0)), Throughput())
    assert not batch.advantages_BC.any() and math.isnan(metrics["reward"]) and metrics["frac_reward_zero_std"] == 1


def test_conversations_are_given_and_answered_as_messages():
    seen = []

    def reward(prompts, completions, **_):
        seen.append((prompts, completions))
        return [0, 1]

    asked = replace(prompts(0)[0], prompt=({"role": "user", "content": "why?"},))
    experience(Script(SPREAD), [Reward("own", reward)]).next(Weights(), Data([asked]), Throughput())
    (given, answered), *_ = seen
    assert given == [[{"role": "user", "content": "why?"}]] * 2
    assert answered == [[{"role": "assistant", "content": text}] for text in ("a", "aab")]


# Several updates.


def test_a_rollout_is_shared_by_updates_and_goes_around_again(monkeypatch):
    monkeypatch.setattr(Experience, "_with_log_probs", lambda self, policy, batch: batch)
    script = Script(("a.", "aab"), ("b", "aaa."), ("a", "aa"), ("aaa", "ab"))
    own = experience(script, updates_per_rollout=2, epochs_per_rollout=2)
    data, model, timer = Data(prompts(0, 1, 2, 3), prompts(4, 5, 6, 7)), Weights(), Throughput()
    batches, groups, waiting = [], [], []
    for _ in range(5):
        batches.append(own.next(model, data, timer))
        groups.append(len(own.groups))
        waiting.append(own.num_waiting)
    assert [batch.prompt_lengths_B.tolist() for batch, _ in batches] == [[1, 2], [3, 4], [1, 2], [3, 4], [5, 6]]
    assert groups == [4, 0, 0, 0, 4] and waiting == [3, 2, 1, 0, 3]
    assert [numbers for _, numbers in script.calls] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    rewards = [metrics["reward"] for _, metrics in batches]
    assert len(set(rewards[:4])) == 1
    whole = (2 + 3 + 1 + 4 + 1 + 2 + 3 + 2) / 8  # tokens of a completion in all of the rollout
    assert all((batch.rollout_tokens_BC == np.float32(whole)).all() for batch, _ in batches[:4])
    for _ in range(3):
        own.next(model, data, timer)
    assert own.next(model, data, timer) is None


def test_updates_that_do_not_divide_the_prompts():
    with pytest.raises(ValueError, match="3 prompts cannot be shared evenly by 2 updates"):
        experience(Script(SPREAD), updates_per_rollout=2).next(Weights(), Data(prompts(0, 1, 2)), Throughput())


@pytest.mark.parametrize(("rows", "pieces"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_a_prompt_gets_several_rows_where_there_are_not_enough(rows, pieces):
    script = Script(("a", "aa", "b", "aab"), ("b.", "a.", "aaa", "bb"))
    rollout = RolloutConfig(max_completion_length=M, completions=4)
    whole, _ = experience(script, rollout=rollout).next(Weights(), Data(prompts(0, 3)), Throughput())
    split, _ = experience(script, rollout=rollout, rows=rows).next(Weights(), Data(prompts(0, 3)), Throughput())
    assert split.completions_BCM.shape == (2 * pieces, 4 // pieces, M)
    assert split.prompt_lengths_B.tolist() == [1] * pieces + [4] * pieces
    for name in ("completions_BCM", "mask_BCM", "advantages_BC", "sampler_logprobs_BCM", "rollout_tokens_BC"):
        a, b = getattr(split, name), getattr(whole, name)
        assert np.array_equal(a.reshape(b.shape), b), name


def test_rows_that_cannot_be_cut():
    count_pieces(3, 4, 12)
    with pytest.raises(ValueError, match="batch_size 3 x 4 completions cannot be cut evenly into 8 parts"):
        count_pieces(3, 4, 8)


# Dynamic sampling.

EQUAL = ("a.", "a")


def test_groups_without_spread_are_replaced_by_new_prompts():
    script = Script(EQUAL, SPREAD, EQUAL, EQUAL, ("aa", "b"), EQUAL, SPREAD, SPREAD, SPREAD)
    own = experience(script, dynamic_sampling=3)
    data = Data(*(prompts(*range(n, n + 3)) for n in (0, 3, 6, 9)))
    batch, metrics = own.next(Weights(), data, Throughput())
    assert batch.prompt_lengths_B.tolist() == [2, 5, 7] and data.place == 3  # of prompts 1, 4 and 6
    assert [group.prompt.index for group in own.groups] == [1, 4, 6]
    assert (metrics["dynamic_sampling/rollouts"], metrics["dynamic_sampling/kept"]) == (3, 1)
    assert metrics["frac_reward_zero_std"] == pytest.approx(4 / 9)  # of all that was drawn
    assert [numbers for _, numbers in script.calls] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    _, metrics = own.next(Weights(), data, Throughput())
    assert script.calls[-1][1] == [9, 10, 11]


def test_what_cannot_be_replaced_is_kept():
    for limit, indices, kept in ((1, [1, 4, 0], 2 / 3), (0, [0, 1, 2], None)):
        script = Script(EQUAL, SPREAD, EQUAL, EQUAL, SPREAD, EQUAL)
        own = experience(script, dynamic_sampling=limit)
        batch, metrics = own.next(Weights(), Data(prompts(0, 1, 2), prompts(3, 4, 5)), Throughput())
        assert [group.prompt.index for group in own.groups] == indices
        assert metrics.get("dynamic_sampling/kept") == kept
        assert np.any(batch.advantages_BC, axis=1).tolist() == [i in (1, 4) for i in indices]


def test_dynamic_sampling_ends_with_the_data():
    own = experience(Script(EQUAL), dynamic_sampling=5)
    data = Data(prompts(0, 1), prompts(2, 3))
    _, metrics = own.next(Weights(), data, Throughput())
    assert metrics["dynamic_sampling/rollouts"] == 2 and metrics["dynamic_sampling/kept"] == 0
    assert own.next(Weights(), data, Throughput()) is None


# What fails.


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_prompts_are_given_back_where_something_fails(fails_at, kind):
    calls = []

    def reward(completions, **_):
        calls.append(1)
        if len(calls) == fails_at:
            raise kind("no")
        return letters(completions)

    script = Script(EQUAL, SPREAD, SPREAD, SPREAD)
    own = experience(script, [Reward("own", reward)], dynamic_sampling=1)
    data = Data(prompts(0, 1), prompts(2, 3))
    with pytest.raises(RewardError if kind is ValueError else KeyboardInterrupt):
        own.next(Weights(), data, Throughput())
    assert data.place == 0 and own.state()["prompts"] == 0 and own.state()["waiting"] == []
    calls += [1] * 10  # mended
    batch, _ = own.next(Weights(), data, Throughput())
    expected, _ = experience(Script(EQUAL, SPREAD, SPREAD, SPREAD), dynamic_sampling=1).next(
        Weights(), Data(prompts(0, 1), prompts(2, 3)), Throughput()
    )
    assert same_batch(batch, expected)


def same_batch(a: PolicyBatch, b: PolicyBatch) -> bool:
    for name, x in vars(a).items():
        y = getattr(b, name)
        if (x is None) != (y is None) or (x is not None and (x.dtype != y.dtype or x.tobytes() != y.tobytes())):
            return False
    return True


def test_plain_iterators_have_no_place():
    def fails(**_):
        raise ValueError("no")

    with pytest.raises(RewardError, match=r"reward own raised ValueError: no for completion 0 of 2, .*prompt 0"):
        experience(Script(SPREAD), [Reward("own", fails)]).next(Weights(), iter([prompts(0)]), Throughput())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"updates_per_rollout": 0}, "updates_per_rollout must be at least 1, not 0"),
        ({"epochs_per_rollout": 0}, "epochs_per_rollout must be at least 1, not 0"),
        ({"dynamic_sampling": -1}, "dynamic_sampling must be at least 0, not -1"),
        ({"top_entropy": 0.0}, "top_entropy 0.0 must be above 0"),
        ({"top_entropy": 1.5}, "top_entropy 1.5 must be above 0 and at most 1"),
    ],
)
def test_settings_that_cannot_be(changes, error):
    with pytest.raises(ValueError, match=error):
        ExperienceConfig(**changes)


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="no reward function"):
        experience(Script(SPREAD), [])
    with pytest.raises(ValueError, match=r"beta 0\.1 needs a reference model"):
        experience(Script(SPREAD), loss=PolicyLossConfig(beta=0.1))


# Evaluation.


def test_the_last_list_of_an_evaluation_is_filled_up_and_what_fills_it_does_not_count():
    script = Script(("a.",), ("aa.",), ("aaa.",), ("z",), ("aaaa",))
    metrics = experience(Script(SPREAD)).evaluate(Weights(), iter([prompts(0, 1, 2), prompts(3, 4)]), script)
    assert [numbers for _, numbers in script.calls] == [[0, 1, 2], [3, 4, 4]]  # places in the data
    assert metrics == {
        "loss": -2.5,
        "reward": 2.5,
        "rewards/letters/mean": 2.5,
        "completions/mean_length": (2 + 3 + 4 + 1 + 4) / 5,
    }


# In flight.


def test_what_is_in_flight_is_carried_over_to_the_last_bit(monkeypatch):
    monkeypatch.setattr(Experience, "_with_log_probs", lambda self, policy, batch: batch)

    def fresh() -> Experience:
        return experience(Script(SPREAD, ("z", "z"), ("b", "aaa.")), updates_per_rollout=3)

    lists = prompts(0, 1, 2), prompts(3, 4, 5)
    whole, data = fresh(), Data(*lists)
    expected = [whole.next(Weights(), data, Throughput()) for _ in range(6)]
    for stop in range(1, 6):
        data, first = Data(*lists), fresh()
        for _ in range(stop):
            first.next(Weights(), data, Throughput())
        later = fresh()
        later.restore(json.loads(json.dumps(first.state())))
        for batch, metrics in expected[stop:]:
            own, own_metrics = later.next(Weights(), data, Throughput())
            assert same_batch(own, batch)
            clock = "rollout_tokens_per_second"
            assert repr({**own_metrics, clock: 0}) == repr({**metrics, clock: 0})


# Log-probabilities, of a network.

NETWORK = replace(
    PRESETS["tiny"],
    num_layers=1,
    layer_windows=(None,),
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=128,
    initializer_range=0.3,
)


def test_log_probabilities_are_taken_before_the_first_update():
    model, other = (random_model(NETWORK, key=jax.random.key(seed), mesh=None) for seed in (0, 1))
    script = Script(("a.", "aab."), ("b.", "aa"), ("aaa.", "b"), ("ab.", "aaa."))
    own = experience(
        script,
        rollout=RolloutConfig(max_completion_length=M, completions=2, temperature=0.7),
        loss=PolicyLossConfig(beta=0.1),
        reference=other,
        updates_per_rollout=2,
        top_entropy=0.5,
        mask_truncated=True,
        micro_batches=2,
        rows=2,
    )
    data = Data(prompts(0, 5, 2, 3))
    batches = [own.next(model, data, Throughput())[0] for _ in range(2)]
    for batch in batches:
        active = batch.mask_BCM > 0
        for name, network in (("old_logprobs_BCM", model), ("reference_logprobs_BCM", other)):
            found = completion_log_probs(network, batch, temperature=0.7, config=PolicyConfig())
            expected = np.asarray(found.logprobs_BT).reshape(active.shape)
            assert np.abs(getattr(batch, name) - expected)[active].max() < 1e-5
        entropy = np.asarray(
            completion_log_probs(model, batch, temperature=0.7, config=PolicyConfig()).entropy_BT
        ).reshape(active.shape)
        assert not batch.weights_BCM[~active].any()
        kept = batch.weights_BCM > 0
        least = entropy[kept].min()  # of several tokens: the first ones of a prompt have the same
        assert (entropy[active] > least + 1e-6).sum() <= active.sum() / 2 <= kept.sum() < active.sum()
        assert least > entropy[active & ~kept].max()


def test_a_reference_may_be_made_of_the_policy():
    model = random_model(NETWORK, key=jax.random.key(0), mesh=None)
    own = experience(Script(SPREAD), loss=PolicyLossConfig(beta=0.1), reference=lambda policy: policy)
    batch, _ = own.next(model, Data(prompts(0)), Throughput())
    expected = completion_log_probs(model, batch, temperature=1.0, config=PolicyConfig()).logprobs_BT
    assert np.abs(batch.reference_logprobs_BCM - np.asarray(expected).reshape(1, 2, M)).max() < 1e-5
    assert batch.old_logprobs_BCM is None
    batch, _ = experience(Script(SPREAD), epochs_per_rollout=2).next(model, Data(prompts(0)), Throughput())
    assert np.abs(batch.old_logprobs_BCM - np.asarray(expected).reshape(1, 2, M)).max() < 1e-5
    assert batch.reference_logprobs_BCM is None and batch.weights_BCM is None
