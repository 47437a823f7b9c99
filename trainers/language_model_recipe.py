"""Runs of pretraining and supervised fine-tuning: packed rows of tokens, evaluated by their loss."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from models.llama import LLaMa, LlamaConfig
from models.llama.tokenizer import Tokenizer
from trainers import parts
from trainers.language_model import LanguageModelTrainer
from trainers.memory_plan import Setting, abstract_batch, tuning
from trainers.observers import counted
from trainers.packed_data import check_length, open_packed
from trainers.recipe import Course, FullBatch, Recipe
from trainers.settings import RunConfig


class LanguageModelRecipe(Recipe):
    """`kind` is the class of the trainer."""

    config = RunConfig

    def __init__(self, kind: type[LanguageModelTrainer]):
        self._kind = kind

    def make_trainer(self, config: RunConfig, num_steps: int) -> LanguageModelTrainer:
        return self._kind(config=config.loss, **parts.trainer_options(config, num_steps))

    def sizes(self, setting: Setting) -> Mapping[str, Any]:
        return tuning(setting)

    def full_batch(self, config: RunConfig, llama: LlamaConfig, mesh: Mesh) -> FullBatch:
        parts.check_batch(config.trainer.batch_size, config.trainer.accumulation_steps, mesh)
        check_length(config.data.sequence_length, llama)
        return FullBatch(abstract_batch(config, mesh), (config.data.sequence_length,) * config.trainer.batch_size)

    def open(
        self,
        config: RunConfig,
        *,
        tokenizer: Tokenizer,
        tokenizer_path: Path,
        llama: LlamaConfig,
        mesh: Mesh,
        cache_dir: str | Path,
    ) -> Callable[[LLaMa], Course]:
        self.full_batch(config, llama, mesh)
        data = open_packed(
            config,
            tokenizer,
            tokenizer_path=tokenizer_path,
            learn_all=self._kind.learns_all,
            mesh=mesh,
            cache_dir=cache_dir,
        )
        trainer = self.make_trainer(config, data.num_steps)

        def course(model: LLaMa) -> Course:
            adapters = None if config.lora is None else parts.size(nnx.state(model, nnx.LoRAParam))
            return Course(
                trainer=trainer,
                data=data.loader,
                num_steps=data.num_steps,
                report=data.report,
                counted=lambda batches, throughput: counted(
                    batches, throughput, model.config, runs=data.runs, adapter_params=adapters
                ),
                evaluate=data.evaluation(trainer.evaluate, config.trainer.eval_batches),
            )

        return course
