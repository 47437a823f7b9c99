"""TRL's and tunix's sides of `benchmarks.grpo`: their own trainers in their own loops, told when to go on."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.grpo_work import NUM_BATCHES, Work, done, reward
from benchmarks.peers import (
    BETAS,
    EPSILON,
    LEARNING_RATE,
    MAX_NORM,
    tunix_adamw,
    tunix_mesh,
    tunix_network,
    word_tokenizer,
)
from benchmarks.turns import Order, Turns, peak_resident_bytes

CHECKED = ("prompt_ids", "completion_ids", "advantages")  # by these names in both


def trl_side(order: Order, turns: Turns) -> None:
    """TRL's trainer, whose own loop it is; a turn ends where a step has been logged."""
    import torch
    import transformers
    import trl

    work = order.work
    transformers.logging.set_verbosity_error()
    if work.device == "gpu":
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, as jax does unasked
    dtype = torch.bfloat16 if "halves" in order.settings else torch.float32
    network = transformers.AutoModelForCausalLM.from_pretrained(work.folder, dtype=dtype, attn_implementation="sdpa")
    network.generation_config.eos_token_id = work.network["vocab_size"]  # which is never drawn

    class Trainer(trl.GRPOTrainer):
        def _generate(self, prompts: list) -> Any:
            with turns.timed("rollout"):
                return super()._generate(prompts)

        def _generate_and_score_completions(self, inputs: list) -> dict:
            with turns.timed("prepare"):
                self.rolled_out = super()._generate_and_score_completions(inputs)
            return self.rolled_out

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_log(self, *_: Any, logs: dict, **__: Any) -> None:
            done(turns, **_trl_figures(work, trainer.rolled_out, logs, first=turns.count == 0))
            turns.wait()

    trainer = Trainer(
        network,
        reward,
        args=_trl_config(order),
        train_dataset=_trl_prompts(work),
        processing_class=word_tokenizer(work.network["vocab_size"], end=work.network["vocab_size"]),
        callbacks=[Steps()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def _trl_config(order: Order) -> Any:
    import trl

    work, micro = order.work, order.micro()
    return trl.GRPOConfig(
        output_dir=work.folder,
        max_steps=10**6,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=work.rows // micro,
        num_generations=work.completions,
        max_completion_length=work.new_tokens,
        temperature=1.0,
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        weight_decay=0.0,
        max_grad_norm=MAX_NORM,
        bf16=work.dtype == "bfloat16",
        use_cpu=work.device == "cpu",
        gradient_checkpointing="checkpointing" in order.settings,
        torch_compile="compiled" in order.settings,
        use_transformers_continuous_batching="continuous" in order.settings,
        shuffle_dataset=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=work.device == "gpu",
    )


def _trl_prompts(work: Work) -> Any:
    """A row for each prompt, whose text is its ids."""
    import datasets

    rows = itertools.chain.from_iterable(work.prompt_ids(step) for step in range(NUM_BATCHES))
    return datasets.Dataset.from_list([{"prompt": " ".join(map(str, ids))} for ids in rows])


def _trl_figures(work: Work, rolled_out: dict, logs: dict, *, first: bool) -> dict[str, Any]:
    import torch

    peak = torch.cuda.max_memory_allocated() if work.device == "gpu" else peak_resident_bytes()
    figures = {"tokens": int(rolled_out["completion_mask"].sum()), "grad_norm": logs["grad_norm"], "peak": peak}
    if not first:
        return figures
    return figures | {"entropy": logs["entropy"], "batch": {name: rolled_out[name].tolist() for name in CHECKED}}


def tunix_side(order: Order, turns: Turns) -> None:
    """tunix's learner, whose own loop it is; a turn ends where it asks for the next prompts."""
    import jax
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner

    work = order.work
    cluster = _tunix_cluster(order)
    trainer, generate = cluster.actor_trainer, cluster.generate

    def rollout(*arguments: Any, **options: Any) -> Any:
        with turns.timed("rollout"):
            return generate(*arguments, **options)

    cluster.generate = rollout

    class Learner(GRPOLearner):
        def _generate_and_compute_advantage(self, *arguments: Any, **options: Any) -> Any:
            with turns.timed("prepare"):
                self.rolled_out = super()._generate_and_compute_advantage(*arguments, **options)
            return self.rolled_out

    norms: list = []
    buffer_metrics = trainer._buffer_metrics

    def note_norm(*arguments: Any, additional_metrics: dict, **options: Any) -> Any:
        norms.append(additional_metrics["grad_norm"][0])
        return buffer_metrics(*arguments, additional_metrics=additional_metrics, **options)

    trainer._buffer_metrics = note_norm

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for step in itertools.count():
            turns.wait()
            yield {"prompts": np.array([" ".join(map(str, ids)) for ids in work.prompt_ids(step)])}
            jax.block_until_ready(jax.tree.leaves(trainer.model))
            done(turns, **_tunix_figures(learner.rolled_out, norms, first=step == 0))

    options = GRPOConfig(num_generations=work.completions, num_iterations=1, beta=0.0)
    learner = Learner(cluster, options, lambda completions, **_: reward([text.split() for text in completions]))
    learner.train(batches())


def _tunix_cluster(order: Order) -> Any:
    """One device is actor and rollout; float32."""
    from tunix.rl import rl_cluster
    from tunix.rl.rollout.base_rollout import RolloutConfig

    class Numbers:
        """A tokenizer whose texts are token ids; no id ends a text or pads it."""

        encode = staticmethod(lambda text, **_: [int(word) for word in text.split()])
        decode = staticmethod(lambda ids, **_: " ".join(map(str, ids)))
        bos_id, eos_id, pad_id = (staticmethod(lambda n=n: n) for n in (0, -1, -2))

    work = order.work
    mesh = tunix_mesh()
    micro = order.micro() // work.completions
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=tunix_adamw(),
        eval_every_n_steps=10**6,
        max_steps=10**6,
        mini_batch_size=work.prompts,
        train_micro_batch_size=micro,
        rollout_micro_batch_size=work.prompts,
        compute_logps_micro_batch_size=work.prompts,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=work.new_tokens,
        max_prompt_length=work.prompt_tokens,
        kv_cache_size=work.prompt_tokens + work.new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
    )
    return rl_cluster.RLCluster(
        actor=tunix_network(work.folder, mesh),
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh), training_config=training, rollout_config=rollout
        ),
    )


def _tunix_figures(rolled_out: Any, norms: list, *, first: bool) -> dict[str, Any]:
    """The norm is that of the step where there is one micro-batch, else unknown."""
    grad_norm = float(norms[0]) if len(norms) == 1 else None
    norms.clear()
    tokens = int(np.sum(rolled_out.completion_mask))
    figures = {"tokens": tokens, "grad_norm": grad_norm, "peak": peak_resident_bytes()}
    if not first:
        return figures
    return figures | {"batch": {name: np.asarray(getattr(rolled_out, name)).tolist() for name in CHECKED}}
