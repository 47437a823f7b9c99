"""One contract for every trainer; parity with torch; packing; what a bad gradient does; precision; meshes."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from data.batch import Batch
from models.llama import LLaMa, LlamaConfig, load_pretrained, save_pretrained
from models.llama.lora import LoraConfig, add_lora
from tests.trainers.contract import MAKERS
from tests.trainers.runs import RECIPES
from trainers.grpo_trainer import GRPOTrainer
from trainers.language_model import LanguageModelConfig
from trainers.optimizers import OptimizerConfig, make_optimizer
from trainers.policy import PolicyBatch, PolicyConfig
from trainers.pretrain_trainer import PretrainTrainer
from trainers.rollouts import RolloutConfig
from trainers.sft_trainer import SFTTrainer
from trainers.trainer import Loss, LossScale, Trainer

NETWORK = LlamaConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    rope_scaling=None,
    tie_embeddings=False,
    activation="silu",
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    layer_windows=(None, None),
    initializer_range=0.2,
)
B, T = 8, 12
PLAIN = LanguageModelConfig(remat="none")


@cache
def _weights(config: LlamaConfig) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    skeleton = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: LLaMa(config, key=jax.random.key(0))))
    norm = ["norm" in jax.tree_util.keystr(path) for path, _ in skeleton]
    return [n + 0.2 * random.standard_normal(x.shape, np.float32) for n, (_, x) in zip(norm, skeleton)]


def network(dtype="float32", config: LlamaConfig = NETWORK) -> LLaMa:
    """The same every time, in arrays of its own: a step uses them up."""
    structure = jax.tree.structure(jax.eval_shape(lambda: LLaMa(config, key=jax.random.key(0))))
    return jax.tree.unflatten(structure, [jnp.array(x, dtype) for x in _weights(config)])


def documents(*rows: tuple[int, ...], seed: int = 0, width: int = T) -> Batch:
    """Packed documents of these lengths by row, padding behind them; every second weight is 0.5, some are 0."""
    random = np.random.default_rng(seed)
    shape = (len(rows), width)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    tokens, targets = (random.integers(0, NETWORK.vocab_size, shape, np.int32) for _ in range(2))
    weights = random.choice([0, 0.5, 1, 1], shape).astype(np.float32)
    for b, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            part = slice(start, start + length)
            segments[b, part], positions[b, part] = number + 1, np.arange(length)
            targets[b, start : start + length - 1] = tokens[b, start + 1 : start + length]
            weights[b, start + length - 1] = 0
            start += length
        weights[b, start:] = 0
    return Batch(tokens_BT=tokens, targets_BT=targets, weights_BT=weights, segments_BT=segments, positions_BT=positions)


# Rows of very different weight, so that a mean of micro-batches' means is not the mean.
UNEVEN = ((12,), (5, 7), (3,), (2,), (4, 4), (6, 1, 5), (2, 2), (9,))


def adamw(**options) -> dict:
    """An optimizer and its learning rate, as a trainer takes them."""
    config = OptimizerConfig(**(dict(schedule="constant", eps=1e-6) | options))
    optimizer, learning_rate = make_optimizer(config, learning_rate=1e-2, num_steps=10)
    return dict(optimizer=optimizer, learning_rate=learning_rate)


def leaves(tree) -> list[np.ndarray]:
    def value(x):
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    return [value(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(one, other) -> None:
    for x, y in zip(leaves(one), leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def assert_near(one, other, tolerance=1e-5) -> None:
    for x, y in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max(initial=0)))


# What every trainer promises. A new trainer gets an entry: how to make one, and a batch of rows of different weight.

LANGUAGE_MODELS = (PretrainTrainer, SFTTrainer)
CONTRACT: dict[type[Trainer], tuple[Callable[..., Trainer], Callable[[int], Any]]] = {
    kind: (partial(kind, config=PLAIN), lambda seed: documents(*UNEVEN, seed=seed)) for kind in LANGUAGE_MODELS
}
NOISY = {kind: dict(config=replace(PLAIN, dropout=0.2)) for kind in CONTRACT}
METRICS = {kind: {"nll", "accuracy", "entropy", "packing"} for kind in CONTRACT}
WEIGHTS = dict.fromkeys(CONTRACT, "weights_BT")  # of the tokens of a batch


def completions(seed: int = 0) -> PolicyBatch:
    """Eight prompts with two completions each, of different lengths, and log-probabilities of other policies."""
    random = np.random.default_rng(seed)
    C, S, M = 2, 5, 6
    shape = (B, C, M)
    count_BC = random.integers(1, M + 1, (B, C))
    count_BC[:2] = [[M, 1], [0, 2]]
    near = [np.log(random.uniform(0.02, 0.04, shape)).astype(np.float32) for _ in range(2)]
    return PolicyBatch(
        prompts_BS=random.integers(0, NETWORK.vocab_size, (B, S), np.int32),
        prompt_lengths_B=random.integers(1, S + 1, B).astype(np.int32),
        completions_BCM=random.integers(0, NETWORK.vocab_size, shape, np.int32),
        mask_BCM=(np.arange(M) < count_BC[..., None]).astype(np.float32),
        advantages_BC=random.standard_normal((B, C)).astype(np.float32),
        sampler_logprobs_BCM=near[0],
        old_logprobs_BCM=near[1],
    )


CONTRACT[GRPOTrainer] = (
    partial(GRPOTrainer, rollout=RolloutConfig(max_completion_length=6), policy=PolicyConfig(remat="none")),
    completions,
)
METRICS[GRPOTrainer] = {"entropy", "sampler_logprob_diff", *(f"clip_ratio/{x}_mean" for x in ("low", "high", "region"))}
WEIGHTS[GRPOTrainer] = "mask_BCM"
STEP_METRICS = {"loss", "weight", "grad_norm", "learning_rate", "skipped"}

every_trainer = pytest.mark.parametrize("kind", CONTRACT, ids=lambda kind: kind.__name__)
every_noisy_trainer = pytest.mark.parametrize("kind", NOISY, ids=lambda kind: kind.__name__)


@cache
def made(kind: type[Trainer], **options) -> Trainer:
    """One for all tests, so that its step is compiled once."""
    return CONTRACT[kind][0](**adamw(), **options)


def batch_of(kind: type[Trainer], seed: int = 0) -> Any:
    return CONTRACT[kind][1](seed)


def weight_of(kind: type[Trainer], batch: Any) -> float:
    return getattr(batch, WEIGHTS[kind]).sum()


def started(trainer: Trainer, model: nnx.Module | None = None, seed: int = 0):
    return trainer.init(network() if model is None else model, jax.random.key(seed))


def test_every_trainer_is_under_contract(repo_root):
    """Under this one, or as the trainer of a command under that of `tests.trainers.test_contract`."""
    kept = CONTRACT.keys() | {RECIPES[command]._kind for command in MAKERS}
    for path in (repo_root / "trainers").glob("*_trainer.py"):
        module = importlib.import_module(f"trainers.{path.stem}")
        kinds = [x for _, x in inspect.getmembers(module, inspect.isclass) if issubclass(x, Trainer)]
        own = [kind for kind in kinds if kind.__module__ == module.__name__]
        assert own and not set(own) - kept, f"give {own} an entry in CONTRACT, or a command an entry in MAKERS"


@every_trainer
def test_a_step_counts_reports_and_uses_up_its_state(kind):
    trainer = made(kind)
    state = first = started(trainer)
    for number in range(3):
        state, metrics = trainer.step(state, batch_of(kind, number))
        assert (int(state.step), int(state.skipped)) == (number + 1, 0)
    assert set(metrics) == METRICS[kind] | STEP_METRICS
    assert all(value.shape == () and np.isfinite(value) for value in metrics.values())
    assert float(metrics["weight"]) == weight_of(kind, batch_of(kind, 2))
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first.model, first.opt_state)))
    assert trainer.step._cache_size() == 1, "a step compiles once"


@every_noisy_trainer
def test_the_same_key_gives_the_same_steps_and_another_key_other_noise(kind):
    trainer = CONTRACT[kind][0](**adamw(), **NOISY[kind])

    def run(seed):
        state, seen = started(trainer, seed=seed), []
        for _ in range(2):
            state, metrics = trainer.step(state, batch_of(kind))
            seen.append(metrics)
        return state, seen

    one, again, other = run(0), run(0), run(1)
    assert_same(one, again)
    assert float(other[1][0]["loss"]) != float(one[1][0]["loss"])
    evaluated = [trainer.evaluate(network(), [batch_of(kind)])["loss"] for _ in range(2)]
    assert evaluated[0] == evaluated[1] == made(kind).evaluate(network(), [batch_of(kind)])["loss"]


@every_noisy_trainer
def test_no_key_is_no_noise(kind):
    trainer = CONTRACT[kind][0](**adamw(), **NOISY[kind])
    quiet, noisy = (jax.jit(trainer.loss)(network(), batch_of(kind), key) for key in (None, jax.random.key(0)))
    assert_near(quiet, jax.jit(made(kind).loss)(network(), batch_of(kind), jax.random.key(0)), 1e-6)
    assert float(quiet.sum) != float(noisy.sum)


@every_trainer
def test_micro_batches_add_up_to_the_batch(kind):
    batch = batch_of(kind)
    results = []
    for count in (1, 4):
        trainer = CONTRACT[kind][0](optax.sgd(1.0), max_grad_norm=0.1, accumulation_steps=count)
        state, metrics = trainer.step(started(trainer), batch)
        results.append((state.model, metrics))
    assert float(metrics["grad_norm"]) > 0.1, "clipping has nothing to do"
    assert_near(*results, 1e-6)


@every_trainer
def test_the_gradient_is_divided_by_the_weight_and_clipped(kind):
    trainer, rate = CONTRACT[kind][0](optax.sgd(1.0), max_grad_norm=None), 1.0
    model, batch = network(), batch_of(kind)
    gradient = jax.jit(jax.grad(lambda model: trainer.loss(model, batch, None).sum))(model)
    weight = weight_of(kind, batch)
    got, metrics = trainer.step(started(trainer), batch)
    assert_near(got.model, jax.tree.map(lambda p, g: p - rate * g / weight, model, gradient), 1e-6)
    norm = float(optax.tree.norm(gradient)) / weight
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)

    clipped = CONTRACT[kind][0](optax.sgd(1.0), max_grad_norm=norm / 3)
    got, metrics = clipped.step(started(clipped), batch)
    assert_near(got.model, jax.tree.map(lambda p, g: p - rate * g / weight / 3, model, gradient), 1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5), "reported as it was"


def others(padding: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Other values where there is padding."""
    assert padding.any()
    random = np.random.default_rng(5)
    return np.where(padding, random.integers(0, NETWORK.vocab_size, x.shape), x).astype(x.dtype)


def padded_documents(batch: Batch) -> tuple[Batch, Batch]:
    padding = batch.segments_BT == 0
    tokens_BT, targets_BT = others(padding, batch.tokens_BT), others(padding, batch.targets_BT)
    longer = jax.tree.map(lambda x: np.pad(x, [(0, 0), (0, 5)]), batch)
    return replace(batch, tokens_BT=tokens_BT, targets_BT=targets_BT), longer


def padded_completions(batch: PolicyBatch) -> tuple[PolicyBatch, PolicyBatch]:
    before = np.arange(batch.prompts_BS.shape[1]) < (batch.prompts_BS.shape[1] - batch.prompt_lengths_B)[:, None]
    behind = batch.mask_BCM == 0
    values = {name: getattr(batch, f"{name}_BCM") for name in ("completions", "sampler_logprobs", "old_logprobs")}
    values = {f"{name}_BCM": x for name, x in values.items()}
    changed = replace(
        batch,
        prompts_BS=others(before, batch.prompts_BS),
        **{name: others(behind, x) for name, x in values.items()},
    )
    values["mask_BCM"] = batch.mask_BCM
    longer = {name: np.pad(x, [(0, 0), (0, 0), (0, 3)]) for name, x in values.items()}
    return changed, replace(batch, prompts_BS=np.pad(batch.prompts_BS, [(0, 0), (2, 0)]), **longer)


@every_trainer
def test_padding_never_counts(kind):
    trainer, batch = made(kind), batch_of(kind)
    changed, longer = (padded_completions if kind is GRPOTrainer else padded_documents)(batch)
    assert_same(trainer.step(started(trainer), batch), trainer.step(started(trainer), changed))

    one, two = (trainer.evaluate(network(), [b]) for b in (batch, longer))
    assert two.pop("packing", 0) < one.pop("packing", 1)
    assert one == pytest.approx(two, rel=1e-6)


@every_trainer
def test_evaluation_is_the_mean_over_all_weights(kind):
    trainer, model = made(kind), network()
    first, second = documents((12,), (2,)), documents((7, 5), (3, 9), (12,), (2, 3), seed=1)
    if kind is GRPOTrainer:
        first, second = jax.tree.map(lambda x: x[:2], completions()), completions(1)
    sums = [jax.jit(trainer.loss)(model, batch, None) for batch in (first, second)]
    got = trainer.evaluate(model, [first, second])
    assert set(got) == METRICS[kind] | {"loss", "weight"} and all(type(x) is float for x in got.values())
    assert got["weight"] == sum(float(loss.weight) for loss in sums)
    assert got["loss"] == pytest.approx(sum(float(loss.sum) for loss in sums) / got["weight"], rel=1e-6)
    for name in METRICS[kind]:
        total, weight = (sum(float(loss.metrics[name][i]) for loss in sums) for i in (0, 1))
        assert got[name] == pytest.approx(total / weight, rel=1e-6), name
    means = [trainer.evaluate(model, [batch])["loss"] for batch in (first, second)]
    assert got["loss"] != pytest.approx(sum(means) / 2, rel=1e-3), "a mean of means would do"
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        trainer.evaluate(model, [])
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        trainer.evaluate(model, [replace(first, **{WEIGHTS[kind]: 0 * getattr(first, WEIGHTS[kind])})])


@every_trainer
def test_a_step_reports_the_loss_before_its_update(kind):
    trainer, batch = made(kind), batch_of(kind)
    _, metrics = trainer.step(started(trainer), batch)
    want = trainer.evaluate(network(), [batch])
    assert {name: float(metrics[name]) for name in want} == pytest.approx(want, rel=1e-5)


# Against torch.


def next_tokens(*rows: tuple[int, ...], seed: int) -> Batch:
    """Rows that torch sees whole: one document each, as long as the row."""
    batch = documents(*rows, seed=seed)
    random = np.random.default_rng(seed)
    weights = random.choice([0, 0.5, 1], (B, T)) * np.geomspace(1, 0.01, B)[:, None]
    return replace(batch, weights_BT=weights.astype(np.float32))


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory):
    """Ten steps of `transformers` and torch from the same weights: gradients of the first, losses, norms, the end."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("torch")
    save_pretrained(network(), folder / "start")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    matrices = [p for name, p in model.named_parameters() if "norm" not in name]
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=norms, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-6)
    _, learning_rate = torch_optimizer()
    losses, gradient_norms = [], []
    for number in range(10):
        batch = torch_batch(number)
        logits = model(torch.tensor(batch.tokens_BT).long()).logits
        each = torch.nn.functional.cross_entropy(
            logits.reshape(B * T, -1), torch.tensor(batch.targets_BT).reshape(-1).long(), reduction="none"
        )
        weights = torch.tensor(batch.weights_BT).reshape(-1)
        loss = (each * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        if number == 0:
            values = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = float(learning_rate(number))
        optimizer.step()
        losses.append(loss.item())
        gradient_norms.append(norm.item())
    model.save_pretrained(folder / "end")
    model.load_state_dict(values, strict=False)
    model.save_pretrained(folder / "gradients")
    end, gradients = (load_pretrained(folder / name) for name in ("end", "gradients"))
    return dict(gradients=gradients, losses=losses, norms=gradient_norms, end=end)


def torch_optimizer():
    config = OptimizerConfig(schedule="cosine", warmup=3, weight_decay=0.1, eps=1e-6)
    return make_optimizer(config, learning_rate=1e-2, num_steps=10)


def torch_batch(number: int) -> Batch:
    return next_tokens(*[(T,)] * B, seed=number)


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_ten_steps_equal_those_of_torch_and_transformers(torch_run, accumulation_steps):
    optimizer, learning_rate = torch_optimizer()
    trainer = SFTTrainer(
        optimizer, learning_rate=learning_rate, accumulation_steps=accumulation_steps, max_grad_norm=0.5
    )
    batch = torch_batch(0)
    weight = batch.weights_BT.sum()
    gradients = jax.jit(jax.grad(lambda model: trainer.loss(model, batch, None).sum / weight))(network())
    assert_near(gradients, torch_run["gradients"])

    seen = []
    end = trainer.fit(
        started(trainer),
        map(torch_batch, range(10)),
        num_steps=10,
        observers=[lambda step, state, metrics: seen.append(metrics)],
    )
    np.testing.assert_allclose([float(m["loss"]) for m in seen], torch_run["losses"], rtol=1e-5)
    np.testing.assert_allclose([float(m["grad_norm"]) for m in seen], torch_run["norms"], rtol=1e-5)
    assert min(torch_run["norms"]) > 0.5, "clipping has nothing to do"
    assert_near(end.model, torch_run["end"])
    moved = [np.abs(x - y).max() for x, y in zip(leaves(end.model), leaves(network()))]
    assert min(moved) > 1e-2, "too little happened to compare"


# Documents of a row, and tokens that are not learnt.


@jax.jit
def loss_and_gradient(model, batch):
    trainer = made(SFTTrainer)
    return jax.value_and_grad(lambda model: trainer.loss(model, batch, None).sum)(model)


def test_a_packed_document_has_the_loss_and_gradient_that_it_has_alone():
    lengths = (5, 1, 4, 2)
    packed = documents(lengths)
    packed = replace(packed, weights_BT=packed.weights_BT + (packed.targets_BT > 5))
    start = 0
    for number, length in enumerate(lengths):
        part = slice(start, start + length)
        alone = jax.tree.map(lambda x, part=part: np.pad(x[:, part], [(0, 0), (0, T - x[:, part].shape[1])]), packed)
        alone = replace(alone, segments_BT=(alone.segments_BT > 0).astype(np.int32))
        inside = replace(packed, weights_BT=packed.weights_BT * (packed.segments_BT == number + 1))
        want, got = loss_and_gradient(network(), alone), loss_and_gradient(network(), inside)
        assert float(want[0]) > 1 and inside.weights_BT.sum() == alone.weights_BT.sum()
        assert_near(got, want)
        start += length
    apart = replace(packed, positions_BT=2 * packed.positions_BT)
    assert float(loss_and_gradient(network(), apart)[0]) != float(loss_and_gradient(network(), packed)[0])


def test_targets_that_are_not_learnt_change_nothing():
    batch = documents(*UNEVEN)
    unlearnt = batch.weights_BT == 0
    changed = replace(batch, targets_BT=np.where(unlearnt, (batch.targets_BT + 7) % 37, batch.targets_BT))
    assert (unlearnt & (batch.segments_BT > 0)).sum() > 10
    assert_same(loss_and_gradient(network(), changed), loss_and_gradient(network(), batch))
    learnt = replace(batch, targets_BT=np.where(unlearnt, batch.targets_BT, (batch.targets_BT + 7) % 37))
    assert float(loss_and_gradient(network(), learnt)[0]) != float(loss_and_gradient(network(), batch)[0])


# Gradients that are not finite, and the precision of the computation.


class Regression(nnx.Module):
    """A line; `poison` has no part in it but can spoil its gradient."""

    def __init__(self, dtype=jnp.float32):
        self.weight_DV = nnx.Param(jnp.ones((3, 2), dtype))
        self.poison = nnx.Param(jnp.zeros((), dtype))


class RegressionTrainer(Trainer):
    def loss(self, model, batch, key):
        x_BD, y_BV = batch["x_BD"], batch["y_BV"]
        self.dtype = model.weight_DV[...].dtype
        error_BV = (x_BD.astype(self.dtype) @ model.weight_DV[...]).astype(jnp.float32) - y_BV
        total = jnp.square(error_BV).sum() + batch["spoil_B"].sum() * jnp.sqrt(model.poison[...])
        count = jnp.float32(len(x_BD))
        return Loss(total.astype(jnp.float32), count, {"error": (jnp.abs(error_BV).sum(), 2 * count)})


def points(seed=0, *, spoil=0.0, size=1.0) -> dict:
    random = np.random.default_rng(seed)
    x_BD = random.standard_normal((8, 3)).astype(np.float32) * size
    return dict(x_BD=x_BD, y_BV=x_BD @ np.array([[1, 2], [0, -1], [3, 1]], np.float32), spoil_B=np.full(8, spoil, "f"))


def test_a_trainer_from_outside_learns():
    trainer = RegressionTrainer(optax.adam(0.1))
    state = trainer.init(Regression(), jax.random.key(0))
    before = trainer.evaluate(state.model, [points()])
    # The square root has no slope at 0, so this would be skipped if its gradient were not held away from it.
    state = replace(state, model=jax.tree.map(lambda x: x + 0.5, state.model))
    state = trainer.fit(state, (points(seed) for seed in range(100)), num_steps=100)
    after = trainer.evaluate(state.model, [points()])
    assert int(state.skipped) == 0 and after["error"] < before["error"] / 10


@pytest.mark.parametrize("spoilt", ["gradient", "loss"])
def test_an_update_that_is_not_finite_is_left_out_and_counted(spoilt):
    """With a finite loss an infinite gradient, and with a loss that is no number."""
    trainer = RegressionTrainer(optax.adam(0.1), learning_rate=optax.linear_schedule(1.0, 0.0, 10))
    model = jax.tree.map(lambda x: x + 0.5, Regression())
    state, _ = trainer.step(trainer.init(model, jax.random.key(0)), points(0))
    bad = points(1)
    if spoilt == "loss":
        bad["y_BV"] = np.where(np.arange(2) == 1, np.nan, bad["y_BV"])
    else:
        state = replace(state, model=jax.tree.map(lambda x: x if x.ndim else 0 * x, state.model))
        bad = points(1, spoil=1.0)
    model, opt_state = leaves(state.model), leaves(state.opt_state)
    state, metrics = trainer.step(state, bad)
    assert np.isfinite(metrics["loss"]) == (spoilt == "gradient") and not np.isfinite(metrics["grad_norm"])
    assert_same((state.model, state.opt_state), (model, opt_state))
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (2, 1, 1)
    if spoilt == "gradient":
        return
    state, metrics = trainer.step(state, points(2))
    assert (int(state.step), int(state.skipped)) == (3, 1) and float(metrics["learning_rate"]) == pytest.approx(0.9)
    assert not np.array_equal(leaves(state.model)[-1], model[-1])


def test_a_batch_without_weight_is_left_out():
    trainer, batch = made(SFTTrainer), documents(*UNEVEN)
    state, _ = trainer.step(started(trainer), replace(batch, weights_BT=0 * batch.weights_BT))
    assert_same(state.model, network())
    assert int(state.skipped) == 1


def test_float16_scale_halves_at_an_overflow_and_doubles_after_many_good_updates():
    trainer = RegressionTrainer(optax.adam(0.01), compute_dtype="float16")
    state = trainer.init(jax.tree.map(lambda x: x + 0.5, Regression()), jax.random.key(0))
    assert float(state.loss_scale.value) == 2.0**16
    model = leaves(state.model)
    state, metrics = trainer.step(state, points(size=30.0))
    assert trainer.dtype == jnp.float16
    assert float(metrics["loss_scale"]) == 2.0**16 and np.isfinite(metrics["loss"])
    assert float(state.loss_scale.value) == 2.0**15 and int(state.skipped) == 1
    assert_same(state.model, model)

    state = replace(state, loss_scale=LossScale(value=jnp.float32(8), good_updates=jnp.int32(1998)))
    state, _ = trainer.step(state, points())
    assert (float(state.loss_scale.value), int(state.loss_scale.good_updates)) == (8, 1999)
    state, _ = trainer.step(state, points())
    assert (float(state.loss_scale.value), int(state.loss_scale.good_updates)) == (16, 0)
    assert int(state.skipped) == 1 and not np.array_equal(leaves(state.model)[-1], model[-1])


def test_float16_scale_finds_its_way_below_one():
    """Gradients are sums, so a large batch can overflow without any scale."""
    trainer = RegressionTrainer(optax.adam(0.01), compute_dtype="float16")
    state = trainer.init(jax.tree.map(lambda x: x + 0.5, Regression()), jax.random.key(0))
    state = replace(state, loss_scale=LossScale(value=jnp.float32(2), good_updates=jnp.int32(0)))
    batch = points(size=120.0)
    for _ in range(8):
        state, _ = trainer.step(state, batch)
    assert int(state.skipped) < 8
    assert 0 < float(state.loss_scale.value) < 1


@pytest.mark.parametrize("dtype,tolerance", [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_half_precision_is_of_the_computation_alone(dtype, tolerance):
    """Parameters and optimizer state stay float32; the gradient is near that of float32, whatever the loss scale."""
    trainer = SFTTrainer(optax.sgd(1.0), config=PLAIN, compute_dtype=dtype, max_grad_norm=None, accumulation_steps=2)
    exact = SFTTrainer(optax.sgd(1.0), config=PLAIN, max_grad_norm=None, accumulation_steps=2)
    state, want = started(trainer), started(exact)
    if dtype == "float16":
        state = replace(state, loss_scale=replace(state.loss_scale, value=jnp.float32(256)))
    batch = documents(*UNEVEN)
    (state, metrics), (want, want_metrics) = trainer.step(state, batch), exact.step(want, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.model)} == {jnp.dtype("float32")}
    assert int(state.skipped) == 0
    assert float(metrics["loss"]) == pytest.approx(float(want_metrics["loss"]), rel=tolerance)
    assert float(metrics["loss"]) != float(want_metrics["loss"])
    moves = [[new - old for new, old in zip(leaves(s.model), leaves(network()))] for s in (state, want)]
    for got, other in zip(*moves):
        assert np.linalg.norm(got - other) < tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32", "float16"])
def test_the_loss_sees_parameters_of_the_compute_dtype(compute_dtype):
    trainer = RegressionTrainer(optax.adam(0.1), compute_dtype=compute_dtype)
    state, _ = trainer.step(trainer.init(Regression(), jax.random.key(0)), points())
    assert trainer.dtype == compute_dtype and state.model.weight_DV[...].dtype == jnp.float32
    trainer.evaluate(state.model, [points()])
    assert trainer.dtype == compute_dtype


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_parameters_in_half_precision_keep_it_and_so_does_their_state(accumulation_steps):
    trainer = RegressionTrainer(optax.adam(0.1), accumulation_steps=accumulation_steps)
    model = jax.tree.map(lambda x: x + 0.5, Regression(jnp.bfloat16))
    gradient = jax.jit(jax.grad(lambda model: trainer.loss(model, points(), None).sum))(model)
    state = trainer.init(model, jax.random.key(0))
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    for number in range(2):
        state, metrics = trainer.step(state, points())
        if number == 0 and accumulation_steps == 1:  # the norm's own sum is float32
            want = np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in leaves(gradient))) / 8
            assert float(metrics["grad_norm"]) == pytest.approx(want, rel=1e-6)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == dtypes
    assert trainer.step._cache_size() == 1, "the second step is another program"


# Parts of a network.


def test_frozen_parameters_have_no_optimizer_state_and_stay_as_they_are():
    model = add_lora(
        network(), LoraConfig(rank=2, alpha=4.0, dropout=0.1, targets=("q", "down")), key=jax.random.key(1)
    )
    trainer = SFTTrainer(**adamw(weight_decay=0.1), config=PLAIN, trainable=nnx.LoRAParam)
    state = trainer.init(model, jax.random.key(0))
    adapters = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1]
    assert sorted(sizes) == sorted(2 * [leaf.size for leaf in adapters]), "two moments of each factor"
    a_start = np.asarray(model.blocks.adapters.q_DNH.a[...])
    for number in range(2):
        state, metrics = trainer.step(state, documents(*UNEVEN, seed=number))
    assert_same(nnx.state(state.model, nnx.Not(nnx.LoRAParam)), nnx.state(network(), nnx.Param))
    adapter = state.model.blocks.adapters.q_DNH
    assert np.abs(adapter.b[...]).max() > 1e-3 and np.abs(adapter.a[...] - a_start).max() > 1e-4
    assert int(state.skipped) == 0 and np.isfinite(metrics["loss"])


def test_a_filter_chooses_parameters_by_their_place():
    trainer = SFTTrainer(**adamw(), config=PLAIN, trainable=nnx.PathContains("unembed_DV"))
    state, _ = trainer.step(trainer.init(network(), jax.random.key(0)), documents(*UNEVEN))
    changed = [
        jax.tree_util.keystr(path)
        for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(network()), jax.tree.leaves(state.model))
        if not np.array_equal(old, new)
    ]
    assert len(changed) == 1 and "unembed_DV" in changed[0]


# The loop.


def test_fit_ends_after_its_steps_at_the_end_of_the_batches_and_where_an_observer_says_so():
    trainer = RegressionTrainer(optax.adam(0.1))
    drawn, seen = [], []

    def batches():
        for seed in range(6):
            drawn.append(seed)
            yield points(seed)

    def observe(step, state, metrics):
        assert step == int(state.step) and np.isfinite(metrics["loss"])
        seen.append(step)
        return step == 5

    state = trainer.init(Regression(), jax.random.key(0))
    state = replace(state, model=jax.tree.map(lambda x: x + 0.5, state.model))
    state = trainer.fit(state, batches(), num_steps=2, observers=[observe])
    assert (int(state.step), drawn) == (2, [0, 1]), "no batch is drawn that is not used"
    source = batches()
    state = trainer.fit(state, source, num_steps=100, observers=[observe, lambda *_: seen.append(None)])
    assert int(state.step) == 5 and next(source)["x_BD"] is not None and drawn[-1] == 3
    assert seen == [1, 2, 3, None, 4, None, 5, None], "all observers see the last step"
    state = trainer.fit(state, batches(), num_steps=100)
    assert int(state.step) == 11
    assert trainer.fit(state, batches(), num_steps=11) is state


def test_prepare_comes_before_the_step():
    class Scaled(RegressionTrainer):
        def prepare(self, state, batches, throughput):
            batch, metrics = super().prepare(state, batches, throughput)
            factor = float(state.model.weight_DV[0, 0])
            return batch | {"y_BV": batch["y_BV"] * factor}, metrics | {"factor": factor}

    seen = []
    for kind, batch in ((Scaled, points()), (RegressionTrainer, points() | {"y_BV": 1.5 * points()["y_BV"]})):
        trainer = kind(optax.adam(0.1))
        state = trainer.init(jax.tree.map(lambda x: x + 0.5, Regression()), jax.random.key(0))
        trainer.fit(state, [batch], num_steps=1, observers=[lambda step, state, metrics: seen.append(metrics)])
    assert float(seen[0]["loss"]) == float(seen[1]["loss"])
    assert seen[0]["factor"] == 1.5 and "factor" not in seen[1], "observers get the metrics of preparing along"


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(accumulation_steps=0), "accumulation_steps must be at least 1, not 0"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be positive, not 0.0"),
        (dict(max_grad_norm=float("nan")), "max_grad_norm must be positive, not nan"),
        (dict(compute_dtype="float64"), "compute_dtype 'float64' is none of auto, float32"),
    ],
)
def test_trainer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        RegressionTrainer(optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    "options", [dict(dropout=1.0), dict(dropout=-0.1), dict(label_smoothing=1.0), dict(z_loss=-1.0)], ids=str
)
def test_language_model_config_refuses(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} {next(iter(options.values()))}"):
        LanguageModelConfig(**options)


def test_what_cannot_be_trained_is_refused():
    trainer = RegressionTrainer(optax.sgd(0.1), trainable=nnx.LoRAParam)
    with pytest.raises(ValueError, match="nothing to train"):
        trainer.init(Regression(), jax.random.key(0))
    trainer = RegressionTrainer(optax.sgd(0.1), accumulation_steps=3)
    with pytest.raises(ValueError, match="8 rows cannot be cut evenly into 3"):
        trainer.step(trainer.init(Regression(), jax.random.key(0)), points())


def test_every_field_of_the_language_model_config_is_read():
    batch, key = documents(*UNEVEN), jax.random.key(0)

    def loss(**options):
        trainer = SFTTrainer(optax.sgd(0.1), replace(PLAIN, **options))
        return float(jax.jit(trainer.loss)(network(), batch, key).sum)

    for options in (dict(dropout=0.5), dict(z_loss=0.1), dict(label_smoothing=0.1)):
        assert loss(**options) != loss(), options
    with pytest.raises(ValueError, match="multiples of 128"):
        loss(attention="splash")
    with pytest.raises(ValueError, match="remat 'some'"):
        loss(remat="some")


# On a mesh: eight devices, in a process of its own.

ON_A_MESH = """
import importlib.util, json, sys
import jax, numpy as np
from utils.sharding import make_mesh, named_sharding
spec = importlib.util.spec_from_file_location("test_trainer", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
)
mesh = make_mesh((2, 2, 2, 1))

def placed(model):
    def put(path, leaf):
        name = next(str(k.name) for k in reversed(path) if getattr(k, "name", "value") != "value")
        letters = ("L" if "blocks" in str(path[0]) else "") + name.rpartition("_")[2]
        return jax.device_put(leaf, named_sharding(letters, leaf.shape, mesh))
    return jax.tree_util.tree_map_with_path(put, model)

def run(model, accumulation_steps):
    trainer = tests.SFTTrainer(
        # AdamW divides small gradients by small numbers: an eps that does not blow rounding up.
        **tests.adamw(weight_decay=0.1, eps=1e-4), config=tests.PLAIN, accumulation_steps=accumulation_steps
    )
    state = trainer.init(model, jax.random.key(0))
    losses, programs = [], []
    batches = [tests.documents(*tests.UNEVEN, seed=n) for n in range(3)]
    def observe(step, state, metrics):
        losses.append(float(metrics["loss"]))
        programs.append(len(compiled))
    state = trainer.fit(state, batches, num_steps=3, observers=[observe])
    losses.append(trainer.evaluate(state.model, batches)["loss"])
    return state, losses, programs[-1] - programs[0]

config = tests.replace(tests.NETWORK, vocab_size=38)
said = []
for accumulation_steps in (2,):
    one, one_losses, _ = run(tests.network(config=config), accumulation_steps)
    eight, eight_losses, later = run(placed(tests.network(config=config)), accumulation_steps)
    tests.assert_near((eight.model, eight.opt_state), (one.model, one.opt_state))
    np.testing.assert_allclose(eight_losses, one_losses, rtol=1e-5)
    shardings = [str(leaf.sharding.spec) for leaf in jax.tree.leaves(placed(tests.network(config=config)))]
    for tree in (eight.model, eight.opt_state[0].mu, eight.opt_state[0].nu):
        same = [leaf.sharding.is_equivalent_to(own.sharding, leaf.ndim) for leaf, own in
                zip(jax.tree.leaves(tree), jax.tree.leaves(placed(tests.network(config=config))), strict=True)]
        assert all(same), same
    said.append(later)
assert compiled
print(json.dumps([said, sorted(set(shardings))]))
"""


def test_eight_devices_equal_one_and_optimizer_state_lies_as_its_parameter(repo_root):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, __file__], env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    programs, shardings = json.loads(done.stdout)
    assert programs == [0], "a later step is another program"
    assert any("fsdp" in s and "tensor" in s for s in shardings)
