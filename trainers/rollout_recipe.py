"""Runs that learn from rewards of sampled completions, with everything in one process: what they have in common."""

import abc
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from data.chat import choose_template
from data.prompts import Prompts, open_prompts
from data.row_loading import RowLoader
from models.llama import LLaMa, LlamaConfig, remove_lora
from models.llama.tokenizer import Tokenizer
from trainers import parts
from trainers.completions_log import CompletionsLog
from trainers.groups import count_pieces
from trainers.in_flight import InFlight
from trainers.memory_plan import Setting, behind_prompts, drawing
from trainers.recipe import Course, FullBatch, Recipe
from trainers.reference import SameWeights, weights_digest
from trainers.rewards import load_rewards
from trainers.rollouts import RollOut
from trainers.settings import CommonConfig
from trainers.trainer import Observer, Trainer, TrainState
from utils.rope import DynamicScaling
from utils.sharding import batch_spec


class RolloutRecipe(Recipe):
    """`kind` is the class of the trainer; `sampler` makes what draws completions, `inference.rollout.sampler`.

    A subclass says what is made of rollouts, an `experience` of the batches that `abstract_batch` describes, and how
    many `updates` share one.
    """

    command: ClassVar[str]

    def __init__(self, kind: Callable[..., Trainer], sampler: Callable[..., RollOut]):
        self._kind, self._sampler = kind, sampler

    @abc.abstractmethod
    def experience(self, config: Any, model: Any, /, *arguments: Any, **options: Any) -> InFlight:
        """What draws and scores completions, with these arguments and options and those that the algorithm adds."""

    @abc.abstractmethod
    def abstract_batch(self, config: Any, sizes: tuple[int, int, int, int]) -> Any:
        """Shapes of a batch of B rows, C completions of M tokens and prompts of S, with what the settings need."""

    @abc.abstractmethod
    def updates(self, config: Any) -> tuple[int, int]:
        """Updates that a rollout is shared out to, and rounds in which they are gone through."""

    @abc.abstractmethod
    def needs_reference(self, config: Any) -> bool:
        """Whether a divergence from a reference is measured."""

    def policy_of(self, model: Any) -> LLaMa:
        """The network that completions are drawn from."""
        return model

    def make_trainer(self, config: Any, num_steps: int, *, experience: InFlight | None = None) -> Trainer:
        return self._kind(
            config=config.loss,
            rollout=config.rollout,
            policy=config.policy,
            experience=experience,
            **parts.trainer_options(config, num_steps),
        )

    def sizes(self, setting: Setting) -> Mapping[str, Any]:
        config, length = setting.config, setting.config.data.max_prompt_length
        prompts = config.trainer.batch_size * self.updates(config)[0]
        kept = self.needs_reference(config) and config.lora is None
        return behind_prompts(
            setting,
            completions=config.rollout.completions,
            max_completion_length=config.rollout.max_completion_length,
        ) | {
            "rollout": drawing(setting, config.rollout, prompts=prompts, prompt_length=length, policy=setting.model),
            "others": setting.frozen_bytes(self.policy_of(setting.model)) if kept else 0,
        }

    def full_batch(self, config: Any, llama: LlamaConfig, mesh: Mesh) -> FullBatch:
        """All prompts and completions as long as they may be; each completion counts with its prompt."""
        check_length(config, llama)
        prompts, completions = config.trainer.batch_size, config.rollout.completions
        pieces = count_pieces(prompts, completions, num_rows(config, mesh))
        S, M = config.data.max_prompt_length, config.rollout.max_completion_length
        batch = self.abstract_batch(config, (prompts * pieces, completions // pieces, M, S))
        sharding = NamedSharding(mesh, batch_spec(mesh))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)
        return FullBatch(batch, (S + M,) * (prompts * completions))

    def check(self, config: Any, llama: LlamaConfig, tokenizer: Tokenizer) -> None:
        """Raise ValueError and OSError for settings of the algorithm that do not fit together."""
        return None

    def open(
        self,
        config: Any,
        *,
        tokenizer: Tokenizer,
        tokenizer_path: Path,
        llama: LlamaConfig,
        mesh: Mesh,
        cache_dir: str | Path,
    ) -> Callable[[Any], Course]:
        if jax.process_count() > 1:
            raise ValueError(
                f"{self.command} runs in one process, of any number of devices, and not in {jax.process_count()}"
            )
        rows = num_rows(config, mesh)
        count_pieces(config.trainer.batch_size, config.rollout.completions, rows)
        check_length(config, llama)
        self.check(config, llama, tokenizer)
        prompts = open_prompts(
            config.data,
            tokenizer,
            template=choose_template(tokenizer, config.data.chat_template),
            seed=config.trainer.seed,
        )
        if prompts.validation is not None:  # else it would be found out after `eval_every` steps
            next(RowLoader(prompts.validation, batch_size=1, seed=config.trainer.seed, num_epochs=1))
        rewards = load_rewards(config.rewards)
        roll_out = self._roll_out(config, tokenizer)
        size = config.trainer.batch_size * self.updates(config)[0]
        loader = RowLoader(prompts.train, batch_size=size, seed=config.trainer.seed)
        num_steps = self._num_steps(config, prompts)

        def course(model: Any) -> Course:
            trainer = self.make_trainer(config, num_steps)
            reference = self._reference(config, model)
            own = isinstance(reference, LLaMa)
            trainer.experience = experience = self.experience(
                config,
                model,
                roll_out,
                rewards,
                lambda ids: tokenizer.decode(ids, skip_special=True),
                rollout=config.rollout,
                config=config.experience,
                policy=config.policy,
                reference=reference,
                compute_dtype=trainer.compute_dtype,
                micro_batches=config.trainer.accumulation_steps,
                rows=rows,
            )
            return Course(
                trainer=trainer,
                data=loader,
                num_steps=num_steps,
                report=(*prompts.report, *self._lines(config, tokenizer)),
                summary=lambda: loader.summary,
                evaluate=self._evaluation(config, prompts, experience, tokenizer),
                carried={"experience": experience}
                | ({"reference": SameWeights("the reference", weights_digest(reference))} if own else {}),
                observers=lambda *place: _observers(config, experience, [reward.name for reward in rewards], *place),
            )

        return course

    def _roll_out(self, config: Any, tokenizer: Tokenizer, **changes: Any) -> RollOut:
        own = config.rollout
        options = dict(
            max_new_tokens=own.max_completion_length,
            num_samples=own.completions,
            temperature=own.temperature,
            top_k=own.top_k,
            top_p=own.top_p,
            min_p=own.min_p,
            rows_at_once=own.rows_at_once,
            stop_ids=frozenset(tokenizer.stop_ids),
            seed=config.trainer.seed,
        )
        return self._sampler(**(options | changes))

    def _evaluation(
        self, config: Any, prompts: Prompts, experience: InFlight, tokenizer: Tokenizer
    ) -> Callable[[TrainState], Mapping[str, float]] | None:
        """Mean rewards of greedy completions of the validation prompts; None without any."""
        if prompts.validation is None:
            return None
        greedy = self._roll_out(config, tokenizer, num_samples=1, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0)
        size = config.trainer.batch_size * config.rollout.completions

        def evaluate(state: TrainState) -> Mapping[str, float]:
            loader = RowLoader(prompts.validation, batch_size=size, seed=config.trainer.seed, num_epochs=1)
            batches = itertools.islice(loader, config.trainer.eval_batches)
            return experience.evaluate(state.model, batches, greedy)

        return evaluate

    def _reference(self, config: Any, model: Any) -> LLaMa | Callable[[LLaMa], LLaMa] | None:
        """What the divergence is measured from: the base under adapters, else a copy of the policy as it begins."""
        if not self.needs_reference(config):
            return None
        if config.lora is not None:
            return remove_lora
        return jax.tree.map(jnp.copy, self.policy_of(model))  # the run's own arrays are used up by its first step

    def _num_steps(self, config: Any, prompts: Prompts) -> int:
        if config.trainer.steps is not None:
            return config.trainer.steps
        rounds = config.trainer.epochs * self.updates(config)[1]
        return max(1, math.ceil(rounds * len(prompts.train) / config.trainer.batch_size))

    def _lines(self, config: Any, tokenizer: Tokenizer) -> tuple[str, ...]:
        size, own, (updates, rounds) = config.trainer.batch_size, config.rollout, self.updates(config)
        line = f"rollouts of {size * updates} prompts x {own.completions} completions for {updates} updates each"
        line += f", {rounds} times" if rounds > 1 else ""
        if tokenizer.stop_ids:
            return (line,)
        return line, f"the tokenizer names no token that ends a completion: all have {own.max_completion_length} tokens"


def num_rows(config: CommonConfig, mesh: Mesh) -> int:
    """What the rows of an update must be a multiple of: micro-batches times the devices that share rows out."""
    return config.trainer.accumulation_steps * mesh.shape["data"] * mesh.shape["fsdp"]


def check_length(config: Any, llama: LlamaConfig, whose: str = "the model's") -> None:
    """Raise ValueError where prompts and completions may be longer than `whose` network can read."""
    prompt, completion = config.data.max_prompt_length, config.rollout.max_completion_length
    if prompt + completion > llama.max_text_length:
        raise ValueError(
            f"data.max_prompt_length {prompt} and rollout.max_completion_length {completion} are together longer than "
            f"{whose} context of {llama.max_text_length}"
        )
    scaling = llama.rope_scaling
    if isinstance(scaling, DynamicScaling) and prompt + completion > scaling.original_context:
        raise ValueError(
            f"data.max_prompt_length {prompt} and rollout.max_completion_length {completion} are together longer than "
            f"{scaling.original_context} tokens: beyond them dynamic RoPE scaling turns all tokens anew with each one, "
            "and log-probabilities are not those that completions were drawn with"
        )


def _observers(
    config: Any, experience: InFlight, names: list[str], folder: Path, resume_step: int | None
) -> tuple[Observer, ...]:
    """What writes completions down, where the settings want it."""
    log = config.log
    if log.completions_every is None:
        return ()
    own = CompletionsLog(
        folder,
        experience,
        names,
        every_steps=log.completions_every,
        shown=log.completions_shown,
        table=log.progress != "silent",
        resume_step=resume_step,
    )
    return (own,)
