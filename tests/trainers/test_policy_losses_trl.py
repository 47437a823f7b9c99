"""trl's own GRPOTrainer beside our losses: the same checkpoint and tokens, loss, gradients, metrics and advantages."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama import load_pretrained
from trainers.advantages import advantages, combine, has_spread
from trainers.policy_losses import PolicyLossConfig, policy_loss, top_entropy_weights
from trainers.token_log_probs import token_log_probs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

B, S, T, M, V = 8, 6, 7, 9, 53
TEMPERATURE = 0.8
PROMPT_LENGTHS = (6, 6, 3, 3, 4, 4, 1, 1)
LENGTHS = (7, 3, 5, 0, 1, 7, 2, 4)  # one is masked, as a truncated completion is
REWARDS = np.array([[1, 0.5], [0, np.nan], [0.25, 3], [2, -1], [np.nan, np.nan], [0, 0], [1, 1], [1, 1]])
WEIGHTS = np.array([1.0, 0.5])


@dataclass(frozen=True)
class Both:
    trainer: "trl.GRPOTrainer"
    folder: str


def vocabulary():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{n}": n for n in range(3, V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def reward_of(column):
    def reward(completions, **columns):
        return [None if np.isnan(row[column]) else float(row[column]) for row in REWARDS]

    reward.__name__ = f"reward_{column}"
    return reward


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Their trainer, around a random checkpoint whose weights are large enough that everything in it matters."""
    folder = str(tmp_path_factory.mktemp("llama"))
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=False)
    config = transformers.LlamaConfig(**sizes, attn_implementation="eager", pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    options = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=B,
        num_generations=2,
        max_completion_length=M,
        temperature=TEMPERATURE,
        reward_weights=WEIGHTS.tolist(),
    )
    trainer = trl.GRPOTrainer(
        model=model,
        args=options,
        reward_funcs=[reward_of(0), reward_of(1)],
        processing_class=vocabulary(),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w3 w4"] * B}),
    )
    trainer.current_gradient_accumulation_steps = 1
    return Both(trainer, folder)


def rollout():
    """Prompts padded on the left, completions on the right, and what is known of them; as numpy, float32 and int."""
    random = np.random.default_rng(0)
    logprobs = lambda: np.float32(-random.exponential(3.0, (B, T)))  # noqa: E731
    return {
        "prompt_ids": random.integers(3, V, (B, S)),
        "prompt_mask": (np.arange(S)[::-1] < np.array(PROMPT_LENGTHS)[:, None]).astype(np.int64),
        "completion_ids": random.integers(1, V, (B, T)),
        "completion_mask": (np.arange(T) < np.array(LENGTHS)[:, None]).astype(np.int64),
        "advantages": np.array([1.5, -0.7, 2.0, 1.0, -1.1, 0.3, 0.0, -0.4], np.float32),
        "ref_per_token_logps": logprobs(),
        "noise": np.float32(0.5 * random.standard_normal((2, B, T))),
    }


@jax.jit
def log_probs(model, places, cotangent_BT):
    """Our log-probabilities and entropies of the completions, and the gradients of the former times the cotangents."""
    prompt_ids, completion_ids, prompt_mask, completion_mask = places
    tokens = jnp.concatenate([prompt_ids, completion_ids], axis=1).astype(jnp.int32)
    segments = jnp.concatenate([prompt_mask, completion_mask], axis=1).astype(jnp.int32)  # padding is 0

    def total(model):
        x_BTD, _ = model.hidden(tokens, segments_BT=segments)
        targets_BT, before = tokens[:, S:], x_BTD[:, S - 1 : -1]
        found = token_log_probs(before, model.unembedding, targets_BT, temperature=TEMPERATURE, chunk_logits=1000)
        return jnp.sum(found.logprobs_BT * cotangent_BT), found

    (_, found), gradients = jax.value_and_grad(total, has_aux=True)(model)
    return found, gradients


def our_log_probs(model, inputs, cotangent_BT=None):
    places = [inputs[name] for name in ("prompt_ids", "completion_ids", "prompt_mask", "completion_mask")]
    return log_probs(model, places, np.zeros((len(places[0]), T), np.float32) if cotangent_BT is None else cotangent_BT)


def ours(model, inputs, config, quantile=1.0):
    """Loss, metrics and gradients: those by the log-probabilities first, and with them those by the parameters."""
    found, _ = our_log_probs(model, inputs)
    mask_BT = inputs["completion_mask"].astype(np.float32)

    def total(logprobs_BT):
        loss = policy_loss(
            logprobs_BT,
            entropy_BT=found.entropy_BT,
            mask_BT=mask_BT,
            advantages_B=inputs["advantages"],
            old_logprobs_BT=inputs.get("old_per_token_logps"),
            reference_logprobs_BT=inputs.get("ref_per_token_logps"),
            sampler_logprobs_BT=inputs.get("sampling_per_token_logps"),
            weights_BT=None if quantile == 1 else top_entropy_weights(found.entropy_BT, mask_BT, quantile),
            rollout_tokens_B=inputs.get("rollout_tokens_B"),
            max_completion=M,
            config=config,
        )
        return loss.sum / loss.weight, {name: pair[0] / pair[1] for name, pair in loss.metrics.items()}

    (loss, metrics), cotangent_BT = jax.jit(jax.value_and_grad(total, has_aux=True))(found.logprobs_BT)
    return loss, metrics, our_log_probs(model, inputs, cotangent_BT)[1]


def theirs(both, inputs, config, folder, *, quantile=1.0, updates=1):
    """Their loss, metrics and gradients, the latter read by our loader as if they were weights."""
    trainer = both.trainer
    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = config.name, config.importance, config.beta
    trainer.epsilon_low, trainer.epsilon_high = config.epsilon, config.clip_high - (config.name != "cispo")
    trainer.top_entropy_quantile = quantile
    trainer.args.delta, trainer.args.use_bias_correction_kl = config.delta, config.unbiased_kl
    trainer.args.steps_per_generation = updates
    trainer.use_vllm = config.importance_cap is not None
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    inputs.setdefault("num_items_in_batch", inputs["completion_mask"].sum())
    if trainer.use_vllm:
        difference = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * inputs["completion_mask"]
        inputs["importance_sampling_ratio"] = difference.exp().clamp(max=config.importance_cap)
    trainer._metrics["train"].clear()
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    trainer.use_vllm = False
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    copy = transformers.LlamaForCausalLM(trainer.model.config)
    copy.load_state_dict(gradients)
    copy.save_pretrained(folder)
    return loss.item(), metrics, load_pretrained(folder)


def assert_near(got, want):
    largest = max(float(np.abs(np.asarray(leaf)).max()) for leaf in jax.tree.leaves(want))
    assert largest > 1e-3, "there is nothing to compare"
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * max(largest, 1))


def compare(both, folder, inputs, config, *, updates=1, **options):
    ours_has = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
    theirs_has = {name: value for name, value in inputs.items() if name != "rollout_tokens_B"}
    loss, metrics, gradients = ours(load_pretrained(both.folder), ours_has, config, **options)
    want, want_metrics, want_gradients = theirs(both, theirs_has, config, folder, updates=updates, **options)
    assert float(loss) == pytest.approx(want, abs=1e-5, rel=1e-5)
    assert_near(gradients, want_gradients)
    shared = want_metrics.keys() & metrics.keys()
    assert {"entropy"} < shared
    for name in shared:
        assert float(metrics[name]) == pytest.approx(want_metrics[name], abs=1e-5), name
    return metrics


OPTIONS = {
    "on-policy": {},
    "off-policy": {},
    "asymmetric": dict(epsilon=0.1, epsilon_high=0.4),
    "delta": dict(delta=1.5),
    "kl": dict(beta=0.05),
    "kl-unbiased": dict(beta=0.05, unbiased_kl=True),
    "capped": dict(importance_cap=1.2),
    "top-entropy": {},
}


def inputs_of(both, name, config):
    inputs = rollout()
    noise = inputs.pop("noise")
    logprobs = np.asarray(our_log_probs(load_pretrained(both.folder), inputs)[0].logprobs_BT)
    if name != "on-policy":
        inputs["old_per_token_logps"] = logprobs + noise[0]
    if config.importance_cap is not None:
        inputs["sampling_per_token_logps"] = logprobs + noise[1]
    if not config.beta:
        del inputs["ref_per_token_logps"]
    else:
        inputs["ref_per_token_logps"] = logprobs + noise[1]
    return inputs


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_loss_gradients_and_metrics(both, tmp_path, name, options, importance):
    if name == "cispo" and options == "delta":
        pytest.skip("cispo has no delta")
    config = PolicyLossConfig(name=name, importance=importance, **OPTIONS[options])
    inputs = inputs_of(both, options, config)
    quantile = 0.4 if options == "top-entropy" else 1.0
    metrics = compare(both, tmp_path, inputs, config, quantile=quantile)
    if options == "off-policy" and importance == "token" and name != "cispo":
        assert 0 < metrics["clip_ratio/low_mean"] < 0.5 and 0 < metrics["clip_ratio/high_mean"] < 0.5


@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_updates_that_share_a_rollout(both, tmp_path, name):
    """A half of the rollout with the denominator of the whole."""
    config = PolicyLossConfig(name=name)
    inputs = inputs_of(both, "off-policy", config)
    tokens = inputs["completion_mask"].sum()
    half = {key: value[: B // 2] for key, value in inputs.items()}
    assert half["completion_mask"].sum() != tokens / 2
    half |= {"num_items_in_batch": tokens, "rollout_tokens_B": np.full(B // 2, tokens / B, np.float32)}
    compare(both, tmp_path, half, config, updates=2)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(both, monkeypatch, scale):
    trainer = both.trainer
    completions = [ids[: max(n, 1)].tolist() for ids, n in zip(rollout()["completion_ids"], LENGTHS)]
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *_: (completions, None))
    monkeypatch.setattr(trainer, "scale_rewards", scale)
    monkeypatch.setattr(trainer, "beta", 0.0)
    trainer.args.steps_per_generation = 1
    trainer._metrics["train"].clear()
    trainer.model.train()
    found = trainer._generate_and_score_completions([{"prompt": "w3 w4"}] * B)
    rewards_BC = combine(REWARDS, WEIGHTS).reshape(-1, 2)
    got = advantages(rewards_BC, estimator="group", scale=scale)
    np.testing.assert_allclose(got.reshape(-1), found["advantages"].numpy(), rtol=1e-5, atol=1e-5)
    assert found["advantages"].abs().max() > 0.1
    if scale != "batch":  # theirs does not count groups of fewer than two known rewards
        same_B = ~has_spread(rewards_BC) & ~np.isnan(rewards_BC).any(axis=1)
        assert trainer._metrics["train"]["frac_reward_zero_std"][0] == same_B.mean()
