"""The packed rows of a run: opened as its settings say, loaded for this process, validated on."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from data.batch import Batch
from data.chat import choose_template
from data.datasets import Datasets, open_datasets
from data.loading import Loader
from models.llama import LlamaConfig
from models.llama.tokenizer import Tokenizer
from trainers import parts
from trainers.settings import CommonConfig
from trainers.trainer import TrainState
from utils.distributed import check_same, first_process_first
from utils.sharding import process_rows


@dataclass(frozen=True, kw_only=True)
class PackedData:
    """`loader` has the rows to train on for `num_steps`, of which this process loads one of `runs` equal runs.

    `validation` has those to validate on, always the same drawn at random; None without any.
    """

    loader: Loader
    num_steps: int
    runs: int
    report: tuple[str, ...]
    validation: Loader | None

    def evaluation(
        self, evaluate: Callable[[Any, Iterable[Batch]], Mapping[str, float]], num_batches: int | None
    ) -> Callable[[TrainState], Mapping[str, float]] | None:
        """What evaluates a state on up to so many validation batches, by `evaluate` of a model and batches."""
        if self.validation is None:
            return None

        def own(state: TrainState) -> Mapping[str, float]:
            self.validation.seek(0)
            batches: Iterator[Batch] = itertools.islice(self.validation, num_batches)
            return evaluate(state.model, batches)

        return own


def open_packed(
    config: CommonConfig,
    tokenizer: Tokenizer,
    *,
    tokenizer_path: Path,
    learn_all: bool,
    mesh: Mesh,
    cache_dir: str | Path,
) -> PackedData:
    """Open the data sets of a run. Raises ValueError and OSError, in one line, for what is missing or bad."""
    datasets = first_process_first(
        lambda: open_datasets(
            config.data,
            tokenizer,
            tokenizer_name=parts.fingerprint(tokenizer_path),
            template=choose_template(tokenizer, config.data.chat_template),
            learn_all=learn_all,
            seed=config.trainer.seed,
            cache_dir=config.data.cache_dir or cache_dir,
        )
    )
    share = process_rows(mesh)
    loader = _loader(config, datasets, None, share)
    check_same("data", [loader.fingerprint, *(rows.fingerprint for rows in datasets.validation)])
    return PackedData(
        loader=loader,
        num_steps=_num_steps(config, datasets),
        runs=share[1],
        report=_report(datasets),
        validation=_validation(config, datasets, share),
    )


def check_length(sequence_length: int, llama: LlamaConfig, whose: str = "model") -> None:
    """Raise ValueError where a row is longer than the network's context."""
    if sequence_length > llama.max_text_length:
        raise ValueError(
            f"data.sequence_length {sequence_length} is longer than the {whose}'s context of {llama.max_text_length}"
        )


def _report(datasets: Datasets) -> tuple[str, ...]:
    train = datasets.train
    filled = sum(own.num_places for own in train) / sum(len(own) * own.T for own in train)
    rows, validation = sum(map(len, train)), sum(map(len, datasets.validation))
    return (*datasets.report, f"{rows:,} rows to train on, {filled:.1%} filled; {validation:,} to validate on")


def _loader(
    config: CommonConfig, datasets: Datasets, num_epochs: int | None, share: tuple[int, int] = (0, 1)
) -> Loader:
    """`share` is which of how many equal runs of each batch's rows are loaded."""
    return Loader(
        datasets.train,
        batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        weights=datasets.weights,
        num_epochs=num_epochs,
        process_index=share[0],
        process_count=share[1],
    )


def _num_steps(config: CommonConfig, datasets: Datasets) -> int:
    if config.trainer.steps is not None:
        return config.trainer.steps
    with contextlib.closing(_loader(config, datasets, 1)) as epoch:
        return max(1, math.ceil(config.trainer.epochs * epoch.num_rows / config.trainer.batch_size))


def _validation(config: CommonConfig, datasets: Datasets, share: tuple[int, int]) -> Loader | None:
    if not datasets.validation:
        return None
    return Loader(
        datasets.validation,
        batch_size=config.trainer.batch_size // config.trainer.accumulation_steps,
        seed=config.trainer.seed,
        num_epochs=1,
        prefetch=0,
        process_index=share[0],
        process_count=share[1],
    )
