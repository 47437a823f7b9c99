"""Runs of distillation: a frozen teacher beside the student, rows of the data or of the student's own completions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from data.batch import Batch
from data.chat import choose_template
from data.prompts import open_prompts
from data.row_loading import RowLoader
from models.llama import LLaMa, LlamaConfig, load_config, load_pretrained
from models.llama.tokenizer import Tokenizer
from trainers import parts
from trainers.distill_settings import DistillRunConfig, OnPolicyConfig
from trainers.flops import attention_flops, document_lengths, matrix_flops, training_flops
from trainers.memory_plan import Setting, abstract_batch, abstract_model, compute_dtype, drawing, tuning
from trainers.metrics import Throughput
from trainers.own_samples import OwnSamples
from trainers.packed_data import check_length, open_packed
from trainers.recipe import Course, FullBatch, Recipe
from trainers.rollouts import RollOut
from trainers.trainer import Trainer, WithShared
from utils.array_bytes import device_bytes


class DistillRecipe(Recipe):
    """`kind` is the class of the trainer; `sampler` makes what draws completions, `inference.rollout.sampler`."""

    config = DistillRunConfig

    def __init__(self, kind: Callable[..., Trainer], sampler: Callable[..., RollOut]):
        self._kind, self._sampler = kind, sampler

    def make_trainer(self, config: DistillRunConfig, num_steps: int, **parts_of_run: Any) -> Trainer:
        return self._kind(config=config.loss, **parts_of_run, **parts.trainer_options(config, num_steps))

    def sizes(self, setting: Setting) -> Mapping[str, Any]:
        config = setting.config
        teacher = _abstract_teacher(config, setting.mesh)
        fields = tuning(replace(setting, config=_of_longest_rows(config)))
        fields |= {"others": device_bytes(jax.tree.leaves(teacher), platform=setting.platform)}
        if (own := config.on_policy) is None:
            return fields
        prompts, length = _num_prompts(config, own), own.prompts.max_prompt_length
        rollout = drawing(setting, own.rollout, prompts=prompts, prompt_length=length, policy=setting.model)
        return fields | {"rollout": rollout}

    def full_batch(self, config: DistillRunConfig, llama: LlamaConfig, mesh: Mesh) -> FullBatch:
        parts.check_batch(config.trainer.batch_size, config.trainer.accumulation_steps, mesh)
        _check_networks(config, llama)
        longest = _of_longest_rows(config)
        batch = WithShared(abstract_batch(longest, mesh), _abstract_teacher(config, mesh))
        return FullBatch(batch, (longest.data.sequence_length,) * config.trainer.batch_size)

    def open(
        self,
        config: DistillRunConfig,
        *,
        tokenizer: Tokenizer,
        tokenizer_path: Path,
        llama: LlamaConfig,
        mesh: Mesh,
        cache_dir: str | Path,
    ) -> Callable[[LLaMa], Course]:
        if config.on_policy is not None and jax.process_count() > 1:
            raise ValueError(f"on_policy draws in one process, of any number of devices, not in {jax.process_count()}")
        self.full_batch(config, llama, mesh)
        parts.check_tokenizer("teacher.checkpoint", config.teacher.checkpoint, tokenizer)
        learn_all = config.learn == "all"
        data = open_packed(
            config, tokenizer, tokenizer_path=tokenizer_path, learn_all=learn_all, mesh=mesh, cache_dir=cache_dir
        )
        prompts, lines = _open_prompts(config, tokenizer)

        def course(model: LLaMa) -> Course:
            dtype = compute_dtype(config, mesh)
            teacher = load_pretrained(config.teacher.checkpoint, dtype=_teacher_dtype(config, mesh), mesh=mesh)
            samples = None if prompts is None else self._samples(config, tokenizer, prompts, dtype)
            trainer = self.make_trainer(config, data.num_steps, teacher=teacher, samples=samples)
            adapters = None if config.lora is None else parts.size(nnx.state(model, nnx.LoRAParam))

            def evaluate(model: LLaMa, batches: Iterable[Batch]) -> Mapping[str, float]:
                return trainer.evaluate(model, (WithShared(batch, teacher) for batch in batches))

            return Course(
                trainer=trainer,
                data=data.loader,
                num_steps=data.num_steps,
                report=(*data.report, *lines, f"learning from {config.teacher.checkpoint}, {_described(teacher)}"),
                counted=lambda batches, throughput: _counted(
                    batches, throughput, model.config, teacher.config, runs=data.runs, adapter_params=adapters
                ),
                evaluate=data.evaluation(evaluate, config.trainer.eval_batches),
                carried={} if prompts is None else {"prompts": prompts},
                summary=lambda: () if prompts is None else prompts.summary,
            )

        return course

    def _samples(self, config: DistillRunConfig, tokenizer: Tokenizer, prompts: RowLoader, dtype: Any) -> OwnSamples:
        own, seed = config.on_policy.rollout, config.trainer.seed
        roll_out = self._sampler(
            max_new_tokens=own.max_completion_length,
            num_samples=own.completions,
            temperature=own.temperature,
            top_k=own.top_k,
            top_p=own.top_p,
            min_p=own.min_p,
            rows_at_once=own.rows_at_once,
            stop_ids=frozenset(tokenizer.stop_ids),
            seed=seed,
        )
        return OwnSamples(
            roll_out,
            prompts,
            share=config.on_policy.share,
            seed=seed,
            max_length=config.on_policy.max_length,
            compute_dtype=dtype,
        )


def _counted(
    batches: Iterable[Batch],
    throughput: Throughput,
    student: LlamaConfig,
    teacher: LlamaConfig,
    *,
    runs: int,
    adapter_params: int | None,
) -> Iterator[Batch]:
    """As `trainers.observers.counted`, with the teacher's forward pass."""
    for batch in batches:
        lengths = document_lengths(batch.segments_BT)
        tokens = int(lengths.sum())
        flops = training_flops(student, lengths, adapter_params=adapter_params)
        flops += tokens * matrix_flops(teacher) + attention_flops(teacher, lengths)
        throughput.add_step(tokens=tokens * runs, flops=flops * runs)
        yield batch


def _open_prompts(config: DistillRunConfig, tokenizer: Tokenizer) -> tuple[RowLoader | None, tuple[str, ...]]:
    """What loads the prompts that the student completes, None without any, and lines on them."""
    if (own := config.on_policy) is None:
        return None, ()
    template = choose_template(tokenizer, own.prompts.chat_template)
    prompts = open_prompts(own.prompts, tokenizer, template=template, seed=config.trainer.seed)
    loader = RowLoader(prompts.train, batch_size=_num_prompts(config, own), seed=config.trainer.seed)
    rest = "" if tokenizer.stop_ids else f"; no token ends one: all have {own.rollout.max_completion_length} tokens"
    return loader, (*prompts.report, f"{own.share:.0%} of the steps learn from the student's own completions{rest}")


def _num_prompts(config: DistillRunConfig, own: OnPolicyConfig) -> int:
    return config.trainer.batch_size // own.rollout.completions


def _of_longest_rows(config: DistillRunConfig) -> DistillRunConfig:
    """The settings with the longest rows that a step may have for those of the data."""
    length = config.data.sequence_length
    if config.on_policy is not None:
        length = max(length, config.on_policy.max_length)
    return replace(config, data=replace(config.data, sequence_length=length))


def _check_networks(config: DistillRunConfig, llama: LlamaConfig) -> None:
    """Raise ValueError for a teacher of another vocabulary, and for rows that are too long for one of the networks."""
    parts.check_there("teacher.checkpoint", config.teacher.checkpoint)
    teacher = load_config(config.teacher.checkpoint)
    if teacher.vocab_size != llama.vocab_size:
        raise ValueError(
            f"teacher.checkpoint {config.teacher.checkpoint} has a vocabulary of {teacher.vocab_size} tokens, the "
            f"student one of {llama.vocab_size}: they cannot be compared"
        )
    for whose, network in (("model", llama), ("teacher", teacher)):
        check_length(config.data.sequence_length, network, whose)
        if config.on_policy is not None and config.on_policy.max_length > network.max_text_length:
            raise ValueError(
                f"on_policy.prompts.max_prompt_length {config.on_policy.prompts.max_prompt_length} and "
                f"on_policy.rollout.max_completion_length {config.on_policy.rollout.max_completion_length} are "
                f"together longer than the {whose}'s context of {network.max_text_length}"
            )


def _teacher_dtype(config: DistillRunConfig, mesh: Mesh) -> Any:
    return compute_dtype(config, mesh) if config.teacher.dtype == "auto" else jnp.dtype(config.teacher.dtype)


def _abstract_teacher(config: DistillRunConfig, mesh: Mesh) -> LLaMa:
    return abstract_model(load_config(config.teacher.checkpoint), mesh, dtype=_teacher_dtype(config, mesh))


def _described(teacher: LLaMa) -> str:
    leaves = jax.tree.leaves(teacher)
    return f"{parts.size(leaves):,} parameters in {leaves[0].dtype}"
