"""Runs that learn from preferences: DPO and its kin, and reward models."""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from data.chat import choose_template
from data.preferences import Preferences, PreferenceSource, open_preferences
from data.row_loading import RowLoader
from models.llama import LLaMa, LlamaConfig, load_pretrained, remove_lora
from models.llama.checkpoint import open_checkpoint
from models.llama.scalar import ScalarLLaMa, load_scalar, random_scalar
from models.llama.tokenizer import Tokenizer
from trainers import parts
from trainers.memory_plan import Setting, behind_prompts, laid_out
from trainers.preference_batch import PreferenceBatch, collate
from trainers.preference_settings import DPORunConfig, RewardRunConfig
from trainers.recipe import Course, FullBatch, Recipe, Stateful
from trainers.reference import Reference, SameWeights, ScoredPreferences, score_all
from trainers.trainer import Trainer, TrainState
from utils.distributed import check_same
from utils.rope import DynamicScaling
from utils.sharding import batch_spec, process_rows

Collate = Callable[..., PreferenceBatch]


class DPORecipe(Recipe):
    """`kind` is the class of the trainer."""

    config = DPORunConfig

    def __init__(self, kind: Callable[..., Trainer]):
        self._kind = kind

    def make_trainer(self, config: DPORunConfig, num_steps: int, *, reference: Reference | None = None) -> Any:
        options = parts.trainer_options(config, num_steps)
        return self._kind(config=config.loss, policy=config.policy, reference=reference, **options)

    def sizes(self, setting: Setting) -> Mapping[str, Any]:
        config = setting.config
        kept = config.loss.needs_reference and not config.reference.precompute
        own = kept and (config.lora is None or config.reference.checkpoint is not None)
        return _sizes(setting, config.loss.paired) | {"others": setting.frozen_bytes(setting.model) if own else 0}

    def full_batch(self, config: DPORunConfig, llama: LlamaConfig, mesh: Mesh) -> FullBatch:
        return _full_batch(config, llama, mesh, paired=config.loss.paired, reference=config.loss.needs_reference)

    def open(
        self,
        config: DPORunConfig,
        *,
        tokenizer: Tokenizer,
        tokenizer_path: Path,
        llama: LlamaConfig,
        mesh: Mesh,
        cache_dir: str | Path,
    ) -> Callable[[LLaMa], Course]:
        own, folder = config.reference, Path(config.reference.cache_dir or cache_dir)
        _check_reference(config, llama, folder)
        data = _Data(config, tokenizer, llama, mesh, paired=config.loss.paired, whole=False)
        words = parts.fingerprint(tokenizer_path)

        def course(model: LLaMa) -> Course:
            reference = self._reference(config, model, mesh)
            trainer = self.make_trainer(config, data.num_steps, reference=reference)
            carried = {} if reference is None else {"reference": SameWeights("the reference", reference.digest(model))}
            makers: tuple[Collate, Collate] = (collate, collate)
            if own.precompute:
                score = partial(self._scored, config, reference, model, folder=folder, words=words, sizes=data.sizes)
                sources = data.preferences.train, data.preferences.validation
                makers = tuple(collate if source is None else score(source).batch for source in sources)
                trainer.reference = reference = None  # so that its arrays may go
            return data.course(trainer, *makers, prepared=trainer.scored, carried=carried)

        return course

    def _reference(self, config: DPORunConfig, model: LLaMa, mesh: Mesh) -> Reference | None:
        """The reference of a run, None where the loss has no use for one."""
        if not config.loss.needs_reference:
            return None
        compute = self.make_trainer(config, 1).compute_dtype
        if config.reference.checkpoint is not None:
            dtype = jnp.dtype(config.model.dtype)
            network: Any = load_pretrained(config.reference.checkpoint, dtype=dtype, mesh=mesh)
        elif config.lora is not None:
            network = remove_lora
        elif config.reference.precompute or compute not in (None, jnp.dtype(config.model.dtype)):
            network = model  # its numbers are taken before the first step, or cast to others
        else:
            network = jax.tree.map(jnp.copy, model)
        return Reference(
            network,
            policy=config.policy,
            compute_dtype=compute,
            micro_batches=config.trainer.accumulation_steps,
        )

    def _scored(
        self,
        config: DPORunConfig,
        reference: Reference,
        model: LLaMa,
        source: PreferenceSource,
        *,
        folder: Path,
        words: str,
        sizes: Mapping[str, int],
    ) -> ScoredPreferences:
        trainer, device = config.trainer, jax.devices()[0].device_kind
        computed = (trainer.compute_dtype, trainer.accumulation_steps, trainer.batch_size, config.policy, config.mesh)
        return score_all(
            source,
            reference,
            model,
            cache_dir=folder,
            made_by=(words, computed, device, jax.device_count(), jax.__version__),
            sizes=sizes,
            batch_size=trainer.batch_size,
        )


class RewardRecipe(Recipe):
    """`kind` is the class of the trainer."""

    config = RewardRunConfig

    def __init__(self, kind: Callable[..., Trainer]):
        self._kind = kind

    def make_trainer(self, config: RewardRunConfig, num_steps: int) -> Trainer:
        return self._kind(config=config.loss, policy=config.policy, **parts.trainer_options(config, num_steps))

    def make_model(self, config: RewardRunConfig, llama: LlamaConfig, mesh: Mesh, *, random: bool) -> ScalarLLaMa:
        dtype = jnp.dtype(config.model.dtype)
        if random or config.model.checkpoint is None:
            model = random_scalar(llama, key=jax.random.key(config.trainer.seed), dtype=dtype, mesh=mesh)
        else:
            model = load_scalar(config.model.checkpoint, dtype=dtype, mesh=mesh)
        return ScalarLLaMa(parts.adapted(model.llama, config), model.score_D[...])

    def abstract_model(self, config: RewardRunConfig, llama: LlamaConfig, mesh: Mesh) -> ScalarLLaMa:
        def make(key: Any) -> ScalarLLaMa:
            model = random_scalar(llama, key=key, dtype=jnp.dtype(config.model.dtype))
            return ScalarLLaMa(parts.adapted(model.llama, config), model.score_D[...])

        return laid_out(make, mesh)

    def sizes(self, setting: Setting) -> Mapping[str, Any]:
        return _sizes(setting, paired=True)

    def full_batch(self, config: RewardRunConfig, llama: LlamaConfig, mesh: Mesh) -> FullBatch:
        return _full_batch(config, llama, mesh, paired=True, reference=False)

    def open(
        self,
        config: RewardRunConfig,
        *,
        tokenizer: Tokenizer,
        tokenizer_path: Path,
        llama: LlamaConfig,
        mesh: Mesh,
        cache_dir: str | Path,
    ) -> Callable[[ScalarLLaMa], Course]:
        data = _Data(config, tokenizer, llama, mesh, paired=True, whole=True)
        trainer = self.make_trainer(config, data.num_steps)
        return lambda model: data.course(trainer, collate, collate)


class _Data:
    """The preferences of a run, opened, with what its settings say of their batches."""

    def __init__(
        self,
        config: DPORunConfig | RewardRunConfig,
        tokenizer: Tokenizer,
        llama: LlamaConfig,
        mesh: Mesh,
        *,
        paired: bool,
        whole: bool,
    ):
        parts.check_batch(config.trainer.batch_size, config.trainer.accumulation_steps, mesh)
        _check_length(config, llama)
        self._config, self._share = config, process_rows(mesh)
        self.sizes = {
            "max_prompt_length": config.data.max_prompt_length,
            "max_completion_length": config.data.max_completion_length,
        }
        self.preferences: Preferences = open_preferences(
            config.data,
            tokenizer,
            template=choose_template(tokenizer, config.data.chat_template),
            seed=config.trainer.seed,
            paired=paired,
            whole=whole,
        )
        sources = filter(None, (self.preferences.train, self.preferences.validation))
        check_same("data", [source.fingerprint for source in sources])
        self.num_steps = config.trainer.steps or max(
            1, math.ceil(config.trainer.epochs * len(self.preferences.train) / config.trainer.batch_size)
        )

    def course(
        self,
        trainer: Trainer,
        train: Collate,
        validation: Collate,
        *,
        prepared: Callable[[Any, PreferenceBatch], PreferenceBatch] = lambda model, batch: batch,
        carried: Mapping[str, Stateful] | None = None,
    ) -> Course:
        """The course of a run, whose batches `train` and `validation` put together and `prepared` completes."""
        loader = self._loader(self.preferences.train, train)

        def evaluate(state: TrainState) -> Mapping[str, float]:
            batches = self._loader(self.preferences.validation, validation, num_epochs=1)
            some = itertools.islice(batches, self._config.trainer.eval_batches)
            return trainer.evaluate(state.model, map(partial(prepared, state.model), some))

        return Course(
            trainer=trainer,
            data=loader,
            num_steps=self.num_steps,
            report=self.preferences.report,
            evaluate=None if self.preferences.validation is None else evaluate,
            carried=carried or {},
            summary=lambda: loader.summary,
        )

    def _loader(self, source: PreferenceSource, put_together: Collate, **options: Any) -> Iterator[PreferenceBatch]:
        trainer = self._config.trainer
        return RowLoader(
            source,
            batch_size=trainer.batch_size,
            seed=trainer.seed,
            process_index=self._share[0],
            process_count=self._share[1],
            collate=partial(put_together, multiple=trainer.batch_size, **self.sizes),
            **options,
        )


def _sizes(setting: Setting, paired: bool) -> dict[str, Any]:
    length = setting.config.data.max_completion_length
    sizes = behind_prompts(setting, completions=1 + paired, max_completion_length=length)
    return sizes | ({"rows_are": "pairs", "together": 2} if paired else {})


def _full_batch(config: Any, llama: LlamaConfig, mesh: Mesh, *, paired: bool, reference: bool) -> FullBatch:
    """All prompts and completions as long as they may be; each completion counts with its prompt."""
    parts.check_batch(config.trainer.batch_size, config.trainer.accumulation_steps, mesh)
    _check_length(config, llama)
    B, C = config.trainer.batch_size, 1 + paired
    S, M = config.data.max_prompt_length, config.data.max_completion_length
    sharding = NamedSharding(mesh, batch_spec(mesh))

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = PreferenceBatch(
        prompts_BS=array(B, S, dtype=jnp.int32),
        prompt_lengths_B=array(B, dtype=jnp.int32),
        completions_BCM=array(B, C, M, dtype=jnp.int32),
        mask_BCM=array(B, C, M),
        lengths_BC=array(B, C, dtype=jnp.int32),
        weights_B=array(B),
        margins_B=array(B) if paired else None,
        desirable_B=None if paired else array(B),
        reference_logps_BC=array(B, C) if reference else None,
        kl_B=None if paired else array(B),
    )
    return FullBatch(batch, (S + M,) * (B * C))


def _check_reference(config: DPORunConfig, llama: LlamaConfig, cache_dir: Path) -> None:
    """Raise ValueError and OSError for a reference that cannot be compared with, or whose numbers cannot be kept."""
    own = config.reference
    if own.precompute and jax.process_count() > 1:
        raise ValueError(f"reference.precompute is for one process, and there are {jax.process_count()}")
    if own.precompute:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"reference.cache_dir {cache_dir}: {error.strerror or error}") from error
        if not os.access(cache_dir, os.W_OK | os.X_OK):
            raise PermissionError(f"reference.cache_dir {cache_dir} may not be written to")
    if own.checkpoint is None:
        return
    parts.check_there("reference.checkpoint", own.checkpoint)
    opened = open_checkpoint(own.checkpoint)
    if opened.scores:
        raise ValueError(f"reference.checkpoint {own.checkpoint} gives scores: the reference is a language model")
    if opened.config.vocab_size != llama.vocab_size:
        raise ValueError(
            f"reference.checkpoint {own.checkpoint} has {opened.config.vocab_size} token ids, the model "
            f"{llama.vocab_size}: they cannot be compared"
        )


def _check_length(config: Any, llama: LlamaConfig) -> None:
    prompt, completion = config.data.max_prompt_length, config.data.max_completion_length
    most, what = llama.max_text_length, "the model's context"
    if isinstance(llama.rope_scaling, DynamicScaling):
        most, what = llama.rope_scaling.original_context, "what dynamic RoPE scaling leaves as it is"
    if prompt + completion > most:
        raise ValueError(
            f"data.max_prompt_length {prompt} and data.max_completion_length {completion} are together longer than "
            f"{what}, {most}"
        )
