"""Log-probabilities of completions: the same however prompts are laid out and rows are cut, and as they were drawn."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inference.rollout import sampler
from models.llama import LLaMa
from models.llama.presets import PRESETS
from trainers.groups import split_rows
from trainers.grpo_trainer import GRPOTrainer
from trainers.policy import PolicyBatch, PolicyConfig, completion_log_probs
from trainers.policy_losses import LOSSES, PolicyLossConfig
from trainers.rollouts import RolloutConfig
from utils.rope import DynamicScaling

V, S, M, C = 61, 7, 6, 4
LENGTHS = np.array([7, 3, 1], np.int32)
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


def network() -> LLaMa:
    return LLaMa(NETWORK, key=jax.random.key(0))


def batch_of(seed: int = 0) -> PolicyBatch:
    random = np.random.default_rng(seed)
    shape = (len(LENGTHS), C, M)
    count_BC = random.integers(1, M + 1, shape[:2])
    return PolicyBatch(
        prompts_BS=random.integers(0, V, (len(LENGTHS), S), np.int32),
        prompt_lengths_B=LENGTHS,
        completions_BCM=random.integers(0, V, shape, np.int32),
        mask_BCM=(np.arange(M) < count_BC[..., None]).astype(np.float32),
        advantages_BC=random.standard_normal(shape[:2]).astype(np.float32),
        sampler_logprobs_BCM=random.normal(-4, 1, shape).astype(np.float32),
        old_logprobs_BCM=random.normal(-4, 1, shape).astype(np.float32),
        rollout_tokens_BC=np.full(shape[:2], count_BC.mean(), np.float32),
    )


def log_probs(model: LLaMa, batch: PolicyBatch, temperature: float = 1.0, **options):
    run = jax.jit(lambda m, b: completion_log_probs(m, b, temperature=temperature, config=PolicyConfig(**options)))
    return run(model, batch)


@pytest.mark.parametrize("prompts", ["shared", "repeated"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_log_probs_are_those_of_plain_texts(prompts, temperature):
    model, batch = network(), batch_of()
    got = log_probs(model, batch, temperature, prompts=prompts)
    for row, length in enumerate(LENGTHS):
        prompt = batch.prompts_BS[row, S - length :]
        for number in range(C):
            completion = batch.completions_BCM[row, number]
            logits_TV = model(jnp.array([*prompt, *completion])[None])[0][0] / temperature
            want_TV = np.asarray(jax.nn.log_softmax(logits_TV.astype(jnp.float32)))[length - 1 : -1]
            want_M = want_TV[np.arange(M), completion]
            np.testing.assert_allclose(got.logprobs_BT[row * C + number], want_M, atol=2e-5)
            entropy_M = -(np.exp(want_TV) * want_TV).sum(-1)
            np.testing.assert_allclose(got.entropy_BT[row * C + number], entropy_M, atol=2e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pieces", [2, 4])
def test_neither_the_layout_of_prompts_nor_the_cut_of_groups_changes_a_loss(name, pieces):
    batch = batch_of()
    rollout, config = RolloutConfig(max_completion_length=M, completions=C), PolicyLossConfig(name=name)

    def result(batch, **options):
        trainer = GRPOTrainer(optax.sgd(1.0), config, rollout=rollout, policy=PolicyConfig(**options))
        loss, gradient = jax.jit(
            jax.value_and_grad(
                lambda m: (lambda own: (own.sum / own.weight, own))(trainer.loss(m, batch, None)), has_aux=True
            )
        )(network())
        return loss, gradient

    (want, parts), gradient = result(batch, prompts="shared")
    others = [
        (batch, "repeated", "none"),
        (split_rows(batch, pieces), "shared", "dots"),
        (split_rows(batch, pieces), "repeated", "block"),
    ]
    for own, prompts, remat in others:
        (got, own_parts), own_gradient = result(own, prompts=prompts, remat=remat)
        assert float(got) == pytest.approx(float(want), rel=2e-6, abs=1e-6)
        assert float(own_parts.weight) == pytest.approx(float(parts.weight), rel=1e-6)
        for x, y in zip(jax.tree.leaves(own_gradient), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6 * max(1, np.abs(y).max()) * 10)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 1.7])
@pytest.mark.parametrize("prompts", ["shared", "repeated"])
def test_the_sampler_and_the_trainer_agree(temperature, prompts):
    model = network()
    random = np.random.default_rng(3)
    texts = [random.integers(0, V, length).tolist() for length in LENGTHS]
    draw = sampler(
        max_new_tokens=M,
        num_samples=C,
        temperature=temperature,
        top_k=20,  # log-probabilities are those before the filters
        top_p=0.9,
        min_p=0.0,
        stop_ids=frozenset({5, 6, 44}),
        seed=0,
    )
    drawn = draw(model, texts, [11, 12, 13])
    assert drawn.stopped_B.any() and not drawn.stopped_B.all()
    prompts_BS = np.zeros((len(texts), S), np.int32)
    for row, text in enumerate(texts):
        prompts_BS[row, S - len(text) :] = text
    batch = replace(
        batch_of(),
        prompts_BS=prompts_BS,
        completions_BCM=drawn.tokens_BM.reshape(len(texts), C, M),
        old_logprobs_BCM=None,
    )
    got = np.asarray(log_probs(model, batch, temperature, prompts=prompts).logprobs_BT)
    for row, count in enumerate(drawn.count_B):
        np.testing.assert_allclose(got[row, :count], drawn.logprobs_BM[row, :count], atol=1e-5)


@pytest.mark.parametrize("prompts", ["shared", "repeated"])
def test_padding_does_not_turn_tokens_of_networks_with_dynamic_scaling(prompts):
    """Up to its context nothing is scaled; padded to sizes of which there are few, rows are longer than that."""
    context = int(LENGTHS[1:].max()) + M
    scaling = DynamicScaling(factor=8.0, original_context=context)
    scaled = replace(NETWORK, max_position_embeddings=context, rope_scaling=scaling)
    batch = jax.tree.map(lambda x: x[1:], batch_of())
    want = log_probs(network(), batch, prompts=prompts).logprobs_BT
    got = log_probs(LLaMa(scaled, key=jax.random.key(0)), batch, prompts=prompts).logprobs_BT
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_completion_of_one_token():
    batch = batch_of()
    short = replace(batch, completions_BCM=batch.completions_BCM[:, :, :1])
    for prompts in ("shared", "repeated"):
        one, whole = log_probs(network(), short, prompts=prompts), log_probs(network(), batch, prompts=prompts)
        np.testing.assert_allclose(one.logprobs_BT, whole.logprobs_BT[:, :1], atol=1e-5)
