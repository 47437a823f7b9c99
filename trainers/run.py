"""A run from its settings: model, data and trainer are made, training begins or goes on, results are written."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from data.chat import choose_template
from data.datasets import Datasets, open_datasets
from data.loading import Loader
from models.llama import LLaMa, LlamaConfig, check_vocabulary, load_tokenizer
from trainers import parts
from trainers.checkpoints import Checkpointer, Restored
from trainers.export import CHECKPOINTS, restorable
from trainers.flops import peak_flops
from trainers.language_model import LanguageModelTrainer
from trainers.logs import METRICS_FILE, MetricWriter, open_writers
from trainers.metrics import Throughput
from trainers.observers import BadSteps, Evaluator, Recorder, RunError, Saver, counted
from trainers.progress import ProgressBar
from trainers.settings import RunConfig
from trainers.trainer import Trainer, TrainState
from utils.settings import diff, to_dict


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run needs, made and checked; nothing has been trained yet."""

    config: RunConfig
    command: str
    tokenizer_path: Path
    datasets: Datasets
    loader: Loader
    num_steps: int
    trainer: Trainer
    mesh: Mesh
    model: LLaMa

    @property
    def exportable(self) -> bool:
        """Whether the network can be written in Hugging Face's format."""
        return parts.hugging_face_config(self.model.config) is not None

    def describe(self) -> list[str]:
        """Lines on the run: its data, its network, its devices."""
        rows, train = self.datasets, self.datasets.train
        efficiency = sum(own.num_places for own in train) / sum(len(own) * own.T for own in train)
        trained = _size(nnx.state(self.model, self.trainer.trainable))
        total = _size(nnx.state(self.model, nnx.Param))
        of = f"{trained:,} of {total:,}" if trained < total else f"{total:,}"
        shape = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        lines = [
            *rows.report,
            f"{sum(map(len, train)):,} rows to train on, {efficiency:.1%} filled; "
            f"{sum(map(len, rows.validation)):,} to validate on; {self.num_steps:,} steps",
            f"training {of} parameters on {self.mesh.size} {jax.devices()[0].device_kind} ({shape})",
        ]
        if not self.exportable:
            lines.append("Hugging Face has no architecture for this network: hf/ will not be written")
        return lines


def prepare(
    command: str, make: type[LanguageModelTrainer], config: RunConfig, *, resume: bool, cache_dir: str | Path
) -> Run:
    """Make what a run needs. `make` is the Trainer subclass; `command` is what it is called in the checkpoints.

    Raises ValueError and OSError, in one line, for what is missing or does not fit together.
    """
    holds_run = _check_output(Path(config.output_dir), resume)
    mesh = parts.make_mesh(config.mesh)
    parts.check_batch(config.trainer.batch_size, config.trainer.accumulation_steps, mesh)
    tokenizer_path = parts.tokenizer_path(config, anew=not holds_run)
    tokenizer = load_tokenizer(tokenizer_path)
    llama = parts.network_config(config.model, tokenizer)
    check_vocabulary(llama, tokenizer)
    _check_length(config.data.sequence_length, llama)
    datasets = open_datasets(
        config.data,
        tokenizer,
        tokenizer_name=parts.fingerprint(tokenizer_path),
        template=choose_template(tokenizer, config.data.chat_template),
        learn_all=make.learns_all,
        seed=config.trainer.seed,
        cache_dir=config.data.cache_dir or cache_dir,
    )
    loader = _loader(config, datasets, num_epochs=None)
    num_steps = _num_steps(config, datasets)
    return Run(
        config=config,
        command=command,
        tokenizer_path=tokenizer_path,
        datasets=datasets,
        loader=loader,
        num_steps=num_steps,
        trainer=parts.make_trainer(make, config, num_steps),
        mesh=mesh,
        model=parts.make_model(config, llama, mesh),
    )


def train(run: Run, *, resume: bool, interrupted: Callable[[], bool], say: Callable[[str], None]) -> TrainState:
    """Train to the last step, or until `interrupted` is true, and leave a checkpoint of where it stands.

    `say` gets lines for the user. Raises RunError for what fails on the way; before that, ValueError and OSError for a
    checkpoint or logs that do not fit.
    """
    config, folder = run.config, Path(run.config.output_dir)
    state = run.trainer.init(run.model, jax.random.key(config.trainer.seed))
    with contextlib.ExitStack() as opened:
        opened.callback(run.loader.close)
        checkpointer = opened.enter_context(Checkpointer(folder / CHECKPOINTS, config.checkpoint))
        restored = _restore(checkpointer, run, state, say) if resume else None
        if restored is not None:
            state = restored.state
            run.loader.restore(restored.data_state["loader"])
        writer = open_writers(
            folder,
            process_index=jax.process_index(),
            resume_step=_resume_step(resume, restored),
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=to_dict(config),
        )
        return _fit(run, state, checkpointer, restored, writer, interrupted, say)


def _fit(
    run: Run,
    state: TrainState,
    checkpointer: Checkpointer,
    restored: Restored | None,
    writer: MetricWriter,
    interrupted: Callable[[], bool],
    say: Callable[[str], None],
) -> TrainState:
    """Train, evaluate, save; what fails once a step is done is a RunError."""
    config, steps = run.config.trainer, run.num_steps
    throughput = Throughput(peak_flops=_peak(run))
    style = "silent" if jax.process_index() else run.config.log.progress
    progress = ProgressBar(steps, first_step=int(state.step), style=style)
    recorder = Recorder(writer, progress, throughput, every_steps=config.log_every, num_steps=steps)
    evaluator = _evaluator(run, recorder, throughput, restored)
    saver = Saver(
        checkpointer,
        run.loader,
        evaluator,
        throughput,
        settings=restorable(
            run.command,
            config=run.config,
            num_steps=steps,
            llama=run.model.config,
            tokenizer_path=run.tokenizer_path,
        ),
        num_steps=steps,
        interrupted=interrupted,
    )
    bad_steps = BadSteps(config.max_bad_steps, skipped=int(state.skipped))
    try:
        with contextlib.closing(writer), contextlib.closing(progress):
            if evaluator is not None and restored is None and config.eval_at_start:
                evaluator.evaluate(0, state)
            if evaluator is None or not evaluator.stopped:
                observers = [recorder, bad_steps, *([evaluator] if evaluator else []), saver]
                batches = _counted(run, throughput)
                state = run.trainer.fit(state, batches, num_steps=steps, observers=observers, throughput=throughput)
                bad_steps.finish()
        checkpointer.wait()
    except (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if not (recorder.began or isinstance(error, OSError)):  # as by an option that is refused when it is compiled
            raise
        raise RunError(" ".join(str(error).split()) or type(error).__name__) from error
    if evaluator is not None and evaluator.stopped:
        say(f"stopped at step {int(state.step)}: {config.patience} evaluations without a lower loss")
    return state


def _check_output(folder: Path, resume: bool) -> bool:
    """Whether the folder holds checkpoints of a run.

    Raises ValueError where it holds a run that is not to be resumed, OSError where nothing can be written to it.
    """
    metrics, checkpoints = folder / METRICS_FILE, folder / CHECKPOINTS
    holds_run = checkpoints.is_dir() and Checkpointer(checkpoints).latest() is not None
    if not resume and (holds_run or (metrics.is_file() and metrics.stat().st_size)):
        raise ValueError(f"output_dir {folder} holds a run: go on with it by --resume, or give another folder")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"output_dir {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {folder}: {nearest} may not be written to")
    return holds_run


def _check_length(sequence_length: int, llama: LlamaConfig) -> None:
    if sequence_length > llama.max_text_length:
        raise ValueError(
            f"data.sequence_length {sequence_length} is longer than the model's context of {llama.max_text_length}"
        )


def _loader(config: RunConfig, datasets: Datasets, num_epochs: int | None) -> Loader:
    return Loader(
        datasets.train,
        batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        weights=datasets.weights,
        num_epochs=num_epochs,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _num_steps(config: RunConfig, datasets: Datasets) -> int:
    if config.trainer.steps is not None:
        return config.trainer.steps
    with contextlib.closing(_loader(config, datasets, num_epochs=1)) as epoch:
        return max(1, math.ceil(config.trainer.epochs * epoch.num_rows / config.trainer.batch_size))


def _counted(run: Run, throughput: Throughput) -> Iterator[Any]:
    adapters = None if run.config.lora is None else _size(nnx.state(run.model, nnx.LoRAParam))
    return counted(run.loader, throughput, run.model.config, processes=jax.process_count(), adapter_params=adapters)


def _evaluator(run: Run, recorder: Recorder, throughput: Throughput, restored: Restored | None) -> Evaluator | None:
    """What evaluates on the validation data, always the same batches of rows drawn at random; None without data."""
    if not run.datasets.validation:
        return None
    config = run.config.trainer
    loader = Loader(
        run.datasets.validation,
        batch_size=config.batch_size // config.accumulation_steps,
        seed=config.seed,
        num_epochs=1,
        prefetch=0,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    def evaluate(state: TrainState) -> Mapping[str, float]:
        loader.seek(0)
        batches: Iterator[Any] = itertools.islice(loader, config.eval_batches)
        return run.trainer.evaluate(state.model, batches)

    evaluator = Evaluator(
        evaluate,
        recorder,
        throughput,
        every_steps=config.eval_every,
        num_steps=run.num_steps,
        patience=config.patience,
    )
    if restored is not None and "evaluator" in restored.data_state:
        evaluator.restore(restored.data_state["evaluator"])
    return evaluator


def _restore(checkpointer: Checkpointer, run: Run, state: TrainState, say: Callable[[str], None]) -> Restored | None:
    """What the newest checkpoint holds; None, said so, where there is none yet."""
    if checkpointer.latest() is None:
        say("no checkpoint yet: beginning at step 0")
        return None
    for leaf in jax.tree.leaves((state.model, state.opt_state)):
        leaf.delete()  # so that memory need not hold both
    restored = checkpointer.restore(state)
    if (command := restored.settings["command"]) != run.command:
        raise ValueError(f"{run.config.output_dir} holds a run of {command}: go on with it as {command}")
    for line in (*restored.warnings, *restored.version_changes()):
        say(line)
    if changed := diff(restored.settings["config"], to_dict(run.config)):
        say(f"settings that are not those of the checkpoint: {', '.join(changed)}")
    say(f"going on from step {restored.step}")
    return restored


def _resume_step(resume: bool, restored: Restored | None) -> int | None:
    if restored is not None:
        return restored.step
    return -1 if resume else None


def _peak(run: Run) -> float | None:
    dtype = run.trainer.compute_dtype or jnp.dtype(run.config.model.dtype)
    peak = peak_flops(jax.devices()[0].device_kind, dtype)
    return None if peak is None else peak * jax.device_count()


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
