"""DPO and reward trainers on batches: what the loss is made of, for every layout of the rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.preferences import Preference
from models.llama import LLaMa, LoraConfig, add_lora, remove_lora
from models.llama.lora import adapters_of
from models.llama.presets import PRESETS
from models.llama.scalar import random_scalar
from trainers.dpo_trainer import DPOTrainer
from trainers.metrics import Throughput
from trainers.policy import PolicyConfig
from trainers.preference_batch import PreferenceBatch, collate, num_tokens
from trainers.preference_losses import PreferenceLossConfig, RewardLossConfig
from trainers.reference import Reference, weights_digest
from trainers.reward_trainer import RewardTrainer, text_scores

V = 61
NETWORK = replace(
    PRESETS["tiny"],
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    vocab_size=V,
    head_dim=8,
    layer_windows=(None, 5),
    initializer_range=0.3,
)
SIZES = dict(max_prompt_length=12, max_completion_length=9)


def network(seed: int = 0) -> LLaMa:
    return LLaMa(NETWORK, key=jax.random.key(seed))


def preference(draw: np.random.Generator, index: int, completions: int = 2, **changes) -> Preference:
    ids = [tuple(draw.integers(0, V, draw.integers(1, 9)).tolist()) for _ in range(completions)]
    masks = [(*(bool(x) for x in draw.random(len(own) - 1) < 0.8), True) for own in ids]
    about = dict(
        prompt_ids=tuple(draw.integers(0, V, draw.integers(1, 12)).tolist()),
        completions=tuple(ids),
        masks=tuple(masks),
        margin=None,
        desirable=None if completions == 2 else bool(index % 2),
        index=index,
        cut=(0,) * (1 + completions),
    )
    return Preference(**about | changes)


def rows(count: int, completions: int = 2, seed: int = 0) -> list[Preference]:
    draw = np.random.default_rng(seed)
    return [preference(draw, index, completions) for index in range(count)]


def log_prob(model: LLaMa, prompt: tuple[int, ...], ids: tuple[int, ...], mask: tuple[bool, ...]) -> float:
    """Of the tokens of a completion that are learnt, from the logits of the plain text."""
    text = jnp.array([*prompt, *ids])
    logprobs_TV = jax.nn.log_softmax(model(text[None])[0][0].astype(jnp.float32))
    own = [logprobs_TV[len(prompt) - 1 + place, token] for place, token in enumerate(ids) if mask[place]]
    return float(sum(own))


@pytest.mark.parametrize("prompts", ["shared", "repeated"])
def test_the_reference_gives_what_plain_texts_have(prompts):
    model, own = network(), rows(3)
    reference = Reference(model, policy=PolicyConfig(prompts=prompts), micro_batches=2)
    batch = reference.scored(network(1), collate(own, multiple=4, **SIZES))
    want = [[log_prob(model, row.prompt_ids, *pair) for pair in zip(row.completions, row.masks)] for row in own]
    np.testing.assert_allclose(batch.reference_logps_BC[:3], want, atol=1e-4)


def test_the_baseline_of_kto_is_of_completions_of_the_row_before():
    policy, model, own = network(1), network(), rows(3, completions=1)
    filled = collate(own, multiple=4, **SIZES)
    got_B = Reference(model, micro_batches=2).with_baseline(policy, filled).kl_B
    mixed = [(own[i].prompt_ids, own[i - 1].completions[0], own[i - 1].masks[0]) for i in (1, 2)]  # 0 follows a filler
    want = np.mean([log_prob(policy, *text) - log_prob(model, *text) for text in mixed])
    other = Reference(policy).with_baseline(model, filled).kl_B
    assert want != 0 and np.asarray([got_B, other]).min() == 0  # one of the two directions is negative
    np.testing.assert_allclose(np.maximum(want, 0), got_B, atol=1e-4)
    np.testing.assert_allclose(np.maximum(-want, 0), other, atol=1e-4)


def first_step(trainer, model, batch: PreferenceBatch) -> tuple[dict[str, float], list[np.ndarray]]:
    state = trainer.init(jax.tree.map(jnp.copy, model), jax.random.key(0))
    prepared, _ = trainer.prepare(state, iter([batch]), Throughput())
    state, metrics = trainer.step(state, prepared)
    return {name: float(value) for name, value in metrics.items()}, [
        np.asarray(x) for x in jax.tree.leaves(state.model)
    ]


def test_rows_that_fill_up_count_for_nothing():
    own, model = rows(3), network(1)
    trainer = DPOTrainer(optax.sgd(1.0), reference=Reference(network()))
    plain, filled = (first_step(trainer, model, collate(own, multiple=size, **SIZES)) for size in (3, 5))
    assert plain[0]["weight"] == filled[0]["weight"] == 3 and plain[0]["loss"] == pytest.approx(filled[0]["loss"], 1e-5)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(plain[1], filled[1], strict=True))


def test_under_adapters_the_base_is_the_reference():
    own, base = rows(4), network()
    model = add_lora(base, LoraConfig(rank=2, alpha=4.0), key=jax.random.key(2))
    for adapter in adapters_of(model).values():
        adapter.b[...] = adapter.b[...] + 0.1
    by_base, by_function = Reference(base), Reference(remove_lora)
    batch = collate(own, **SIZES)
    want, got = (each.scored(model, batch).reference_logps_BC for each in (by_base, by_function))
    np.testing.assert_array_equal(want, got)
    assert np.abs(got - Reference(lambda policy: policy).scored(model, batch).reference_logps_BC).max() > 1e-2


@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_a_reference_that_is_missing_is_said_so(name):
    trainer = DPOTrainer(optax.sgd(1.0), PreferenceLossConfig(name=name))
    batch = collate(rows(2, completions=1 + (name != "kto")), **SIZES)
    with pytest.raises(ValueError, match=f"loss '{name}' needs a reference"):
        first_step(trainer, network(), batch)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference_need_none(name):
    batch = collate(rows(4), **SIZES)
    trainer = DPOTrainer(optax.sgd(0.1), PreferenceLossConfig(name=name))
    metrics, _ = first_step(trainer, network(), batch)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 1e-3


def test_policy_and_reference_that_are_the_same_begin_at_a_margin_of_nothing():
    trainer = DPOTrainer(optax.sgd(0.1), reference=Reference(network()))
    metrics, _ = first_step(trainer, network(), collate(rows(4), **SIZES))
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-5) and abs(metrics["rewards/margins"]) < 1e-5


@pytest.mark.parametrize("prompts", ["shared", "repeated"])
@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_in_half_precision_policy_and_reference_are_rounded_alike(prompts, remat):
    policy = PolicyConfig(prompts=prompts, remat=remat)
    reference = Reference(network(), policy=policy, compute_dtype=jnp.bfloat16)
    trainer = DPOTrainer(optax.sgd(0.1), policy=policy, reference=reference, compute_dtype="bfloat16")
    metrics, _ = first_step(trainer, network(), collate(rows(8), **SIZES))
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0 and metrics["rewards/accuracies"] == 0.5
    assert metrics["grad_norm"] > 1e-3


@pytest.mark.parametrize("prompts", ["shared", "repeated"])
def test_a_text_is_scored_at_its_last_token(prompts):
    model, own = random_scalar(NETWORK, key=jax.random.key(3)), rows(4)
    got = text_scores(model, collate(own, **SIZES), config=PolicyConfig(prompts=prompts))
    for row, scores in zip(own, got):
        for ids, score in zip(row.completions, scores):
            x_1TD, _ = model.llama.hidden(jnp.array([[*row.prompt_ids, *ids]]))
            np.testing.assert_allclose(score, model.scores(x_1TD)[0, -1], atol=1e-4)


def test_margins_and_centring_reach_the_loss():
    model, own = random_scalar(NETWORK, key=jax.random.key(3)), rows(4)
    margin = [replace(row, margin=1.5) for row in own]
    losses = [
        first_step(RewardTrainer(optax.sgd(0.1), RewardLossConfig(centre=centre)), model, collate(data, **SIZES))[0][
            "loss"
        ]
        for centre, data in ((0.0, own), (0.5, own), (0.0, margin))
    ]
    assert losses[1] > losses[0] + 1e-3 and losses[2] > losses[0] + 1e-3


def test_the_digest_of_weights_tells_networks_apart_wherever_they_lie():
    digests = [weights_digest(own) for own in (network(), network(), network(1))]
    assert digests[0] == digests[1] != digests[2]
    swapped = jax.tree.map(lambda x: x[..., ::-1], network())
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network())
    assert len({digests[0], weights_digest(swapped), weights_digest(halves)}) == 3


def test_padding_comes_in_few_sizes():
    own = rows(5)
    batch = collate(own, multiple=4, max_prompt_length=40, max_completion_length=100)
    assert batch.prompts_BS.shape == (8, 16) and batch.completions_BCM.shape == (8, 2, 16)
    assert collate(own, **SIZES).prompts_BS.shape == (5, 12)
    assert num_tokens(batch) == sum(len(row.prompt_ids) + sum(map(len, row.completions)) for row in own)
    assert batch.weights_B.tolist() == [1] * 5 + [0] * 3
