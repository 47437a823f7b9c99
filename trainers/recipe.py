"""What an algorithm brings to a run: the class of its settings, and what it makes of them."""

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from models.llama import LLaMa, LlamaConfig
from models.llama.tokenizer import Tokenizer
from trainers import parts
from trainers.memory_plan import Setting, abstract_model, step_of
from trainers.metrics import Throughput
from trainers.settings import CommonConfig
from trainers.trainer import Observer, Trainer, TrainState
from utils.memory import Step


class Stateful(Protocol):
    """Something whose place a checkpoint carries over, as JSON values."""

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Data(Stateful, Protocol):
    """Batches of the training data, one after another."""

    def __iter__(self) -> "Data": ...

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Course:
    """A run's trainer with its data; nothing has been trained yet.

    `report` are lines on the data. `counted` wraps the data so that `Throughput` hears of tokens and FLOPs. `evaluate`
    is None where there is nothing to validate on. `carried` is saved and restored beside the data. `observers` makes
    those that the algorithm adds, of the run's output folder and the step that it goes on from (None: a new run).
    `summary` are lines on what the data turned out to be, for the end of training.
    """

    trainer: Trainer
    data: Data
    num_steps: int
    report: tuple[str, ...]
    counted: Callable[[Data, Throughput], Iterable[Any]] = lambda data, throughput: data
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None
    carried: Mapping[str, Stateful] = field(default_factory=dict)
    observers: Callable[[Path, int | None], tuple[Observer, ...]] = lambda folder, resume_step: ()
    summary: Callable[[], tuple[str, ...]] = lambda: ()


@dataclass(frozen=True)
class FullBatch:
    """A batch of a run with shapes and shardings in place of arrays, all its rows as long as they may be.

    `lengths` are those of its texts in tokens.
    """

    batch: Any
    lengths: tuple[int, ...]


class Recipe(abc.ABC):
    """How an algorithm's runs are made."""

    config: type[CommonConfig]

    @abc.abstractmethod
    def make_trainer(self, config: Any, num_steps: int) -> Trainer:
        """The trainer alone: whose state a checkpoint of such a run holds."""

    def make_model(self, config: Any, llama: LlamaConfig, mesh: Mesh, *, random: bool) -> nnx.Module:
        """What is trained, from the run's checkpoint; with `random` weights something to restore a checkpoint into.

        Its `config` is the network's.
        """
        return (parts.make_random_model if random else parts.make_model)(config, llama, mesh)

    def abstract_model(self, config: Any, llama: LlamaConfig, mesh: Mesh) -> nnx.Module:
        """The same with shapes and shardings in place of arrays."""
        return abstract_model(llama, mesh, dtype=jnp.dtype(config.model.dtype), lora=config.lora)

    def exports(self, model: Any) -> Mapping[str, nnx.Module]:
        """The networks that are written for others when a run ends, by the name of their folder."""
        return {"hf": model}

    @abc.abstractmethod
    def sizes(self, setting: Setting) -> Mapping[str, Any]:
        """Fields of `utils.memory.Step` that the algorithm's batches decide."""

    def memory_step(self, config: Any, llama: LlamaConfig, mesh: Mesh) -> Step:
        """What decides on the memory of a step. Raises ValueError where the mesh cannot cut a parameter."""
        model = self.abstract_model(config, llama, mesh)
        return step_of(config, llama, mesh, model=model, sizes=self.sizes)

    @abc.abstractmethod
    def full_batch(self, config: Any, llama: LlamaConfig, mesh: Mesh) -> FullBatch:
        """The largest batch that a step gets, without data. Raises ValueError where it cannot be cut over the mesh."""

    @abc.abstractmethod
    def open(
        self,
        config: Any,
        *,
        tokenizer: Tokenizer,
        tokenizer_path: Path,
        llama: LlamaConfig,
        mesh: Mesh,
        cache_dir: str | Path,
    ) -> Callable[[LLaMa], Course]:
        """Open the data and check the settings; what is returned needs the model, which may be large.

        Raises ValueError and OSError, in one line, for what is missing or does not fit together.
        """
