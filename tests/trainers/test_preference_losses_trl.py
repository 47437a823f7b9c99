"""trl's own trainers of preferences beside our losses: the same checkpoint and tokens, loss, gradients and metrics."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.llama import load_pretrained
from trainers.policy import PolicyConfig, completion_log_probs
from trainers.preference_losses import PreferenceLossConfig, kto_loss, preference_loss, reward_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

B, S, M, V = 6, 5, 7, 53
PROMPTS = (5, 3, 1, 4, 2, 5)
LENGTHS = np.array([[7, 3], [1, 6], [2, 2], [4, 7], [3, 1], [6, 5]])
EVEN = np.array(
    [[4, 3], [4, 6], [4, 2], [4, 7], [4, 1], [4, 5]]
)  # for losses of trl that average over all chosen tokens
DESIRABLE = [True, False, True, True, False, False]
REWARDS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins"))
LOGPS = ("logps/chosen", "logps/rejected")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    prompts_BS: np.ndarray
    prompt_lengths_B: np.ndarray
    completions_BCM: np.ndarray
    mask_BCM: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Token ids of prompts and of the completions of each."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]

    def batch(self) -> Batch:
        """As ours: prompts padded on the left, completions on the right."""
        C = len(self.completions[0])
        prompts_BS = np.zeros((B, S), np.int32)
        completions_BCM, mask_BCM = np.zeros((B, C, M), np.int32), np.zeros((B, C, M), np.float32)
        for b, prompt in enumerate(self.prompts):
            prompts_BS[b, S - len(prompt) :] = prompt
            for c, ids in enumerate(self.completions[b]):
                completions_BCM[b, c, : len(ids)], mask_BCM[b, c, : len(ids)] = ids, 1
        return Batch(
            prompts_BS, np.array([len(prompt) for prompt in self.prompts], np.int32), completions_BCM, mask_BCM
        )

    def only(self, c: int, shift: int = 0) -> "Rows":
        """Completion c of each row, of the row `shift` before it."""
        return Rows(self.prompts, [[self.completions[b - shift][c]] for b in range(B)])


def rows(prompts=PROMPTS, lengths=LENGTHS) -> Rows:
    random = np.random.default_rng(0)
    ids = lambda n: random.integers(3, V, n).tolist()  # noqa: E731
    return Rows([ids(n) for n in prompts], [[ids(n) for n in pair] for pair in lengths])


def vocabulary():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{n}": n for n in range(3, V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def causal_lm():
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=False)
    config = transformers.LlamaConfig(**sizes, attn_implementation="eager", pad_token_id=0, eos_token_id=1)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of a policy and of its reference, their weights large enough that everything in them matters."""
    found = []
    torch.manual_seed(0)
    for name in ("policy", "reference"):
        model = causal_lm()
        for parameter, value in model.named_parameters():
            torch.nn.init.normal_(value, mean=1.0 if "norm" in parameter else 0.0, std=0.15)
        found.append(str(tmp_path_factory.mktemp(name)))
        model.save_pretrained(found[-1])
    return found


def load(folder, kind="AutoModelForCausalLM", **options):
    return getattr(transformers, kind).from_pretrained(folder, dtype="float32", attn_implementation="eager", **options)


def options_of(folder, config_class, **options):
    common = dict(output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")
    return config_class(**common, per_device_train_batch_size=B, max_length=None, **options)


def pairs_dataset():
    return datasets.Dataset.from_dict({"prompt": ["w3 w4"] * B, "chosen": [" w5"] * B, "rejected": [" w6 w7"] * B})


@pytest.fixture(scope="module")
def dpo(folders):
    return trl.DPOTrainer(
        model=load(folders[0]),
        ref_model=load(folders[1]),
        args=options_of(folders[0], trl.DPOConfig),
        processing_class=vocabulary(),
        train_dataset=pairs_dataset(),
    )


def reference_free(kind, folder):
    """The trainer of that name, of those without a reference that trl calls experimental."""
    module = pytest.importorskip(f"trl.experimental.{kind.lower()}")
    options = options_of(folder, getattr(module, f"{kind}Config"))
    options.max_length = 32
    return getattr(module, f"{kind}Trainer")(
        model=load(folder), args=options, processing_class=vocabulary(), train_dataset=pairs_dataset()
    )


@pytest.fixture(scope="module")
def cpo(folders):
    return reference_free("CPO", folders[0])


@pytest.fixture(scope="module")
def orpo(folders):
    return reference_free("ORPO", folders[0])


@pytest.fixture(scope="module")
def kto(folders):
    columns = {"prompt": ["w3 w4"] * B, "completion": [" w5"] * B, "label": DESIRABLE}
    return trl.KTOTrainer(
        model=load(folders[0]),
        ref_model=load(folders[1]),
        args=options_of(folders[0], trl.KTOConfig),
        processing_class=vocabulary(),
        train_dataset=datasets.Dataset.from_dict(columns),
    )


loaded = cache(load_pretrained)


@jax.jit
def log_probs(model, batch, cotangent_BCM):
    """Our log-probabilities, and their gradients by the parameters, times the cotangents."""

    def total(model):
        logprobs_BT = completion_log_probs(model, batch, temperature=1.0, config=PolicyConfig()).logprobs_BT
        logprobs_BCM = logprobs_BT.reshape(batch.completions_BCM.shape)
        return jnp.sum(logprobs_BCM * cotangent_BCM), logprobs_BCM

    return jax.value_and_grad(total, has_aux=True)(model)


def our_log_probs(folder, batch):
    return log_probs(loaded(folder), batch, jnp.zeros(batch.mask_BCM.shape))[0][1]


def our_sums(folder, batch):
    return (np.asarray(our_log_probs(folder, batch)) * batch.mask_BCM).sum(-1)


def ours(folder, batch, loss_of, **arguments):
    """Loss, metrics and gradients: those by the log-probabilities first, and with them those by the parameters."""

    def total(logprobs_BCM):
        weights_B = jnp.ones(B)
        loss = loss_of(logprobs_BCM, mask_BCM=batch.mask_BCM, weights_B=weights_B, **arguments)
        return loss.sum / loss.weight, {name: pair[0] / pair[1] for name, pair in loss.metrics.items()}

    gradient = jax.value_and_grad(total, has_aux=True)
    (loss, metrics), cotangent_BCM = gradient(our_log_probs(folder, batch))
    return loss, metrics, log_probs(loaded(folder), batch, cotangent_BCM)[1]


def read_gradients(parameters, folder):
    """As a model of ours, as if they were weights; 0 for what theirs lacks."""
    copy = causal_lm()
    copy.load_state_dict({name: torch.zeros_like(value) for name, value in copy.named_parameters()})
    gradients = {name: value.grad.clone() for name, value in parameters if value.grad is not None}
    copy.load_state_dict(gradients, strict=False)
    copy.save_pretrained(folder)
    return load_pretrained(folder)


def assert_near(got, want):
    largest = max(float(np.abs(np.asarray(leaf)).max()) for leaf in jax.tree.leaves(want))
    assert largest > 1e-3, "there is nothing to compare"
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * max(largest, 1))


def compare(got, trainer, loss, metrics, folder, *, names):
    """Ours beside the loss and metrics of a trainer, whose gradients are taken here."""
    trainer.model.zero_grad()
    loss.backward()
    assert float(got[0]) == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    assert_near(got[2], read_gradients(trainer.model.named_parameters(), folder))
    for name in names:
        assert float(got[1][name]) == pytest.approx(metrics[name], abs=1e-5, rel=1e-5), name


DPO = {
    "sigmoid": dict(),
    "sigmoid_norm": dict(name="sigmoid", length_normalised=True),
    "ipo": dict(name="ipo"),
    "hinge": dict(name="hinge"),
    "robust": dict(name="robust", label_smoothing=0.2),
    "apo_zero": dict(name="apo_zero"),
    "apo_down": dict(name="apo_down"),
    "sft": dict(sft_weight=0.6),
}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", DPO)
def test_dpo(dpo, folders, tmp_path, loss_type, beta):
    config = PreferenceLossConfig(beta=beta, **DPO[loss_type])
    data = rows(lengths=EVEN if config.sft_weight else LENGTHS)
    got = ours(
        folders[0],
        data.batch(),
        preference_loss,
        reference_logps_BC=our_sums(folders[1], data.batch()),
        config=config,
    )
    dpo.beta, dpo.label_smoothing = beta, config.label_smoothing
    dpo.loss_types, dpo.loss_weights = [loss_type], [1.0]
    if config.sft_weight:
        dpo.loss_types, dpo.loss_weights = ["sigmoid", "sft"], [1.0, config.sft_weight]
    examples = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, (chosen, rejected) in zip(data.prompts, data.completions)
    ]
    dpo._metrics["train"].clear()
    dpo.model.train()
    loss = dpo._compute_loss(dpo.model, dpo.data_collator(examples), False)
    metrics = {name: values[0] for name, values in dpo._metrics["train"].items()}
    names = LOGPS if config.averages else REWARDS + LOGPS  # their rewards are of sums
    compare(got, dpo, loss, metrics, tmp_path, names=names)


def experimental_batch(trainer, data):
    """What the collator of trl's trainers without a reference makes of the rows."""
    examples = []
    for prompt, pair in zip(data.prompts, data.completions):
        example = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, ids in zip(("chosen", "rejected"), pair):
            example[f"{side}_input_ids"] = prompt + ids
            example[f"{side}_attention_mask"] = [1] * len(prompt + ids)
            example[f"{side}_labels"] = [-100] * len(prompt) + ids
        examples.append(example)
    return trainer.data_collator(examples)


@pytest.mark.parametrize(("sft_weight", "gamma"), [(0.0, 0.5), (0.0, 1.2), (0.8, 0.5)])
def test_simpo(cpo, folders, tmp_path, sft_weight, gamma):
    config = PreferenceLossConfig(name="simpo", beta=2.0, simpo_gamma=gamma, sft_weight=sft_weight)
    data = rows(lengths=EVEN if sft_weight else LENGTHS)
    got = ours(folders[0], data.batch(), preference_loss, reference_logps_BC=None, config=config)
    cpo.loss_type, cpo.beta, cpo.simpo_gamma, cpo.label_smoothing = "simpo", 2.0, gamma, 0.0
    cpo.cpo_alpha = sft_weight
    loss, metrics = cpo.get_batch_loss_metrics(cpo.model, experimental_batch(cpo, data))
    names = [*REWARDS, "nll_loss"] if sft_weight else REWARDS  # their logps are averages
    compare(got, cpo, loss, metrics, tmp_path, names=names)


def test_conservative_dpo(cpo, folders, tmp_path):
    """Their DPO has lost its label smoothing; their CPO is it with a reference for which all is alike."""
    config = PreferenceLossConfig(beta=0.3, label_smoothing=0.15)
    data = rows()
    references = dict(reference_logps_BC=np.zeros((B, 2), np.float32))
    got = ours(folders[0], data.batch(), preference_loss, **references, config=config)
    cpo.loss_type, cpo.beta, cpo.label_smoothing, cpo.cpo_alpha = "sigmoid", 0.3, 0.15, 0.0
    loss, metrics = cpo.get_batch_loss_metrics(cpo.model, experimental_batch(cpo, data))
    compare(got, cpo, loss, metrics, tmp_path, names=REWARDS + LOGPS)


@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize("whole", [False, True])
def test_orpo(orpo, folders, tmp_path, whole, beta):
    """Their first term is over prompts too, and over all tokens at once: `whole` is where that makes no difference,
    with prompts of one token, which nothing predicts, and chosen completions of one length."""
    config = PreferenceLossConfig(name="orpo", beta=beta)
    data = rows(prompts=[1] * B, lengths=EVEN) if whole else rows()
    got = ours(folders[0], data.batch(), preference_loss, reference_logps_BC=None, config=config)
    orpo.beta = beta
    batch = experimental_batch(orpo, data)
    loss, metrics = orpo.get_batch_loss_metrics(orpo.model, batch)
    names = [*REWARDS, "log_odds_ratio", "log_odds_chosen", *(["nll_loss"] if whole else [])]
    if not whole:
        chosen_logps, rejected_logps, *_ = orpo.concatenated_forward(orpo.model, batch)
        loss = -chosen_logps.mean() - orpo.odds_ratio_loss(chosen_logps, rejected_logps)[0].mean()
    compare(got, orpo, loss, metrics, tmp_path, names=names)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
@pytest.mark.parametrize("c", [0, 1])
def test_kto(kto, folders, tmp_path, c, weights):
    """The baseline is of the same prompts, each with the completion of the row before it; once it is below 0."""
    beta = 0.7
    config = PreferenceLossConfig(name="kto", beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    matched, mismatched = rows().only(c), rows().only(c, shift=1)
    kl = float(np.mean(our_sums(folders[0], mismatched.batch()) - our_sums(folders[1], mismatched.batch())))
    assert kl > 0.1 if c else kl < -0.1
    got = ours(
        folders[0],
        matched.batch(),
        kto_loss,
        reference_logps_BC=our_sums(folders[1], matched.batch()),
        kl_B=np.full(B, max(kl, 0), np.float32),
        desirable_B=np.float32(DESIRABLE),
        config=config,
    )
    kto.beta, (kto.desirable_weight, kto.undesirable_weight) = beta, weights
    examples = [
        {"prompt_ids": prompt, "completion_ids": ids, "KL_completion_ids": other, "label": label}
        for prompt, [ids], [other], label in zip(
            matched.prompts, matched.completions, mismatched.completions, DESIRABLE
        )
    ]
    kto._metrics["train"].clear()
    kto.model.train()
    loss = kto._compute_loss(kto.model, kto.data_collator(examples), False)
    metrics = {name: values[0] for name, values in kto._metrics["train"].items()}
    compare(got, kto, loss, metrics, tmp_path, names=["kl", *REWARDS[:2], *LOGPS])


@pytest.fixture(scope="module")
def reward(folders):
    model = load(folders[0], "AutoModelForSequenceClassification", num_labels=1)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return trl.RewardTrainer(
        model=model,
        args=options_of(folders[0], trl.RewardConfig),
        processing_class=vocabulary(),
        train_dataset=pairs_dataset(),
    )


@partial(jax.jit, static_argnames="centre")
def our_scores(weights, tokens_BCT, lengths_BC, margins_B, centre):
    """Loss, metrics and gradients from a model and a head that reads the last token of each text."""

    def total(weights):
        model, head_D = weights
        x_NTD, _ = model.hidden(tokens_BCT.reshape(2 * B, -1), lengths_B=lengths_BC.reshape(-1))
        last_ND = x_NTD[jnp.arange(2 * B), lengths_BC.reshape(-1) - 1]
        scores_B2 = (last_ND @ head_D).reshape(B, 2)
        loss = reward_loss(scores_B2, margins_B=margins_B, weights_B=jnp.ones(B), centre=centre)
        return loss.sum / loss.weight, {name: pair[0] / pair[1] for name, pair in loss.metrics.items()}

    return jax.value_and_grad(total, has_aux=True)(weights)


@pytest.mark.parametrize("with_margins", [False, True])
@pytest.mark.parametrize("centre", [None, 0.01])
def test_reward(reward, folders, tmp_path, centre, with_margins):
    data = rows()
    margins_B = np.float32([0.5, 0.0, 1.0, 2.0, 0.1, 0.3]) if with_margins else np.zeros(B, np.float32)
    texts = [[prompt + ids for ids in pair] for prompt, pair in zip(data.prompts, data.completions)]
    tokens_BCT, lengths_BC = np.zeros((B, 2, S + M), np.int32), np.array([[*map(len, pair)] for pair in texts])
    for b, c in np.ndindex(B, 2):
        tokens_BCT[b, c, : len(texts[b][c])] = texts[b][c]
    head_D = reward.model.score.weight.detach().numpy()[0]
    weights = loaded(folders[0]), jnp.array(head_D)
    (got, metrics), gradients = our_scores(weights, tokens_BCT, lengths_BC, margins_B, centre=centre or 0.0)

    reward.args.center_rewards_coefficient = centre
    examples = [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in texts]
    if with_margins:
        examples = [example | {"margin": float(margin)} for example, margin in zip(examples, margins_B)]
    reward._metrics["train"].clear()
    reward.model.train()
    reward.model.zero_grad()
    loss = reward.compute_loss(reward.model, reward.data_collator(examples))
    loss.backward()
    assert float(got) == pytest.approx(loss.item(), abs=1e-5, rel=1e-5)
    want = read_gradients(reward.model.named_parameters(), tmp_path), reward.model.score.weight.grad.numpy()[0]
    assert_near(gradients, want)
    for name in ("accuracy", "margin", "mean_reward"):
        assert float(metrics[name]) == pytest.approx(reward._metrics["train"][name][0], abs=1e-5), name
