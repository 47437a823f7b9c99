"""A run from its settings: model, data and trainer are made, training begins or goes on, results are written."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh

from data.characters import write_character_tokenizer
from data.chat import choose_template
from data.datasets import Datasets, open_datasets, texts
from data.loading import Loader
from models.llama import PRESETS, LLaMa, LlamaConfig, check_vocabulary, load_config, load_pretrained, load_tokenizer
from models.llama.init import random_model
from models.llama.lora import add_lora, merge_lora
from models.llama.peft import save_peft
from models.llama.save import TOKENIZER_FILES, save_pretrained
from models.llama.tokenizer import Tokenizer
from trainers.checkpoints import Checkpointer, Restored
from trainers.flops import peak_flops
from trainers.logs import open_writers
from trainers.metrics import Throughput
from trainers.observers import BadSteps, Evaluator, Recorder, Saver, counted
from trainers.optimizers import make_optimizer
from trainers.progress import ProgressBar
from trainers.settings import ModelConfig, RunConfig
from trainers.snapshots import read_info
from trainers.trainer import Trainer, TrainState
from utils.settings import diff, from_dict, to_dict

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run needs, made and checked; nothing has been trained yet."""

    config: RunConfig
    command: str
    mesh: Mesh
    tokenizer_path: Path
    datasets: Datasets
    loader: Loader
    num_steps: int
    trainer: Trainer
    model: LLaMa

    def describe(self) -> list[str]:
        """Lines on the run: its data, its network, its devices."""
        trained = _size(nnx.state(self.model, self.trainer.trainable))
        total = _size(nnx.state(self.model, nnx.Param))
        of = f"{trained:,} of {total:,}" if trained < total else f"{total:,}"
        shape = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        efficiency = sum(rows.num_places for rows in self.datasets.train) / sum(
            len(rows) * rows.T for rows in self.datasets.train
        )
        return [
            *self.datasets.report,
            f"{sum(map(len, self.datasets.train)):,} rows to train on, {efficiency:.1%} filled; "
            f"{sum(map(len, self.datasets.validation)):,} to validate on; {self.num_steps:,} steps",
            f"training {of} parameters on {self.mesh.size} {jax.devices()[0].device_kind} ({shape})",
        ]


def prepare(command: str, make: Callable[..., Trainer], config: RunConfig, *, cache_dir: str | Path) -> Run:
    """Make what a run needs. `make` is the Trainer subclass; `command` is what it is called in the checkpoints.

    Raises ValueError and OSError, in one line, for what is missing or does not fit together.
    """
    mesh = make_mesh(config)
    tokenizer_path = _tokenizer_path(config)
    tokenizer = load_tokenizer(tokenizer_path)
    llama = _llama_config(config.model, tokenizer)
    check_vocabulary(llama, tokenizer)
    _check_length(config.data.sequence_length, llama)
    template = choose_template(tokenizer, config.data.chat_template)
    datasets = open_datasets(
        config.data,
        tokenizer,
        tokenizer_name=_fingerprint(tokenizer_path),
        template=template,
        seed=config.trainer.seed,
        cache_dir=config.data.cache_dir or cache_dir,
    )
    loader = Loader(
        datasets.train,
        batch_size=config.trainer.batch_size,
        seed=config.trainer.seed,
        weights=config.data.weights,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    num_steps = _num_steps(config, datasets)
    trainer = make_trainer(make, config, num_steps)
    return Run(
        config=config,
        command=command,
        mesh=mesh,
        tokenizer_path=tokenizer_path,
        datasets=datasets,
        loader=loader,
        num_steps=num_steps,
        trainer=trainer,
        model=_model(config, llama, mesh),
    )


def train(run: Run, *, resume: bool, interrupted: Callable[[], bool], say: Callable[[str], None]) -> TrainState:
    """Train to the last step, or until `interrupted` is true, and leave a checkpoint of where it stands.

    `say` gets lines for the user. Raises RunError for a run that cannot go on, OSError where the disk fails.
    """
    config, trainer = run.config, run.trainer
    state = trainer.init(run.model, jax.random.key(config.trainer.seed))
    folder = Path(config.output_dir)
    with Checkpointer(folder / CHECKPOINTS, config.checkpoint) as checkpointer:
        restored = _restore(checkpointer, run, state, say) if resume else None
        first_step = 0
        if restored is not None:
            state, first_step = restored.state, restored.step
            run.loader.restore(restored.data_state["loader"])
        writer = open_writers(
            folder,
            process_index=jax.process_index(),
            resume_step=_resume_step(resume, restored),
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=to_dict(config),
        )
        progress = ProgressBar(
            run.num_steps,
            first_step=first_step,
            style="silent" if jax.process_index() else config.log.progress,
        )
        try:
            state = _fit(run, state, checkpointer, restored, writer, progress, interrupted)
        finally:
            progress.close()
            writer.close()
            run.loader.close()
    return state


def _fit(
    run: Run,
    state: TrainState,
    checkpointer: Checkpointer,
    restored: Restored | None,
    writer: Any,
    progress: ProgressBar,
    interrupted: Callable[[], bool],
) -> TrainState:
    config, steps = run.config.trainer, run.num_steps
    throughput = Throughput(peak_flops=_peak(run))
    recorder = Recorder(writer, progress, throughput, every_steps=config.log_every, num_steps=steps)
    evaluator = None
    if run.datasets.validation:
        evaluator = Evaluator(
            _evaluation(run),
            recorder,
            throughput,
            every_steps=config.eval_every,
            num_steps=steps,
            patience=config.patience,
        )
        if restored is not None:
            evaluator.restore(restored.data_state["evaluator"])
    saver = Saver(
        checkpointer,
        run.loader,
        evaluator,
        throughput,
        settings={"command": run.command, "config": to_dict(run.config)},
        num_steps=steps,
        interrupted=interrupted,
    )
    bad_steps = BadSteps(config.max_bad_steps, skipped=int(state.skipped))
    observers = [recorder, bad_steps, *([evaluator] if evaluator else []), saver]
    batches = counted(
        run.loader,
        throughput,
        state.model.config,
        processes=jax.process_count(),
        adapter_params=None if run.config.lora is None else _size(nnx.state(state.model, nnx.LoRAParam)),
    )
    state = run.trainer.fit(state, batches, num_steps=steps, observers=observers, throughput=throughput)
    bad_steps.finish()
    return state


def export(model: LLaMa, folder: str | Path, *, tokenizer_path: Path, base: str | None) -> list[Path]:
    """Write a model for others: Hugging Face's format to `hf/`, and adapters also in PEFT's to `adapter/`."""
    folder = Path(folder)
    source = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    written = [folder / "hf"]
    if model.blocks.adapters is not None:
        save_peft(model, folder / "adapter", base_model_name_or_path=base)
        written.append(folder / "adapter")
        model = merge_lora(model)
    save_pretrained(model, folder / "hf", tokenizer_from=source)
    return written


def restore_model(
    trainers: Mapping[str, Callable[..., Trainer]], folder: str | Path, step: int | None
) -> tuple[LLaMa, RunConfig, Path]:
    """The model of a run's checkpoint, the run's settings and the path of its tokenizer; None is the newest step.

    `folder` is the run's output folder, wherever it lies now; `trainers` are the classes by the command of the run.
    Raises OSError and ValueError for a folder without such a checkpoint.
    """
    checkpoints = Path(folder) / CHECKPOINTS
    with Checkpointer(checkpoints) as checkpointer:
        newest = checkpointer.latest() if step is None else step
        if newest not in checkpointer.steps():
            raise ValueError(f"{checkpoints} has no checkpoint{'' if step is None else f' of step {step}'}")
        settings = read_info(checkpoints / str(newest))["settings"]
        config = from_dict(RunConfig, settings["config"], source=str(checkpoints / str(newest)))
        config = dataclasses.replace(config, output_dir=str(folder))
        mesh, tokenizer_path = make_mesh(config), _tokenizer_path(config)
        llama = _llama_config(config.model, load_tokenizer(tokenizer_path))
        trainer = make_trainer(trainers[settings["command"]], config, num_steps=1)
        model = _random(config, llama, mesh)
        return checkpointer.restore(trainer.init(model, jax.random.key(0)), newest).state.model, config, tokenizer_path


def make_mesh(config: RunConfig) -> Mesh:
    """The mesh of all devices. Raises ValueError where the settings do not fit them, or the batch does not fit it."""
    shape = config.mesh.shape(jax.device_count())
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows = config.trainer.batch_size // config.trainer.accumulation_steps
    if rows % (shape[0] * shape[1]):
        raise ValueError(
            f"batch_size / accumulation_steps, {rows} rows, cannot be cut evenly over data x fsdp, "
            f"{shape[0]} x {shape[1]} devices"
        )
    return mesh


def make_trainer(make: Callable[..., Trainer], config: RunConfig, num_steps: int) -> Trainer:
    """The trainer that the settings describe."""
    optimizer = make_optimizer(config.optimizer, learning_rate=config.trainer.learning_rate, num_steps=num_steps)
    return make(
        optimizer.transformation,
        config.loss,
        learning_rate=optimizer.learning_rate,
        accumulation_steps=config.trainer.accumulation_steps,
        max_grad_norm=config.trainer.max_grad_norm,
        compute_dtype=config.trainer.compute_dtype,
        trainable=nnx.Param if config.lora is None else nnx.LoRAParam,
    )


def _model(config: RunConfig, llama: LlamaConfig, mesh: Mesh) -> LLaMa:
    if config.model.checkpoint is None:
        return _random(config, llama, mesh)
    return _adapted(load_pretrained(config.model.checkpoint, dtype=jnp.dtype(config.model.dtype), mesh=mesh), config)


def _random(config: RunConfig, llama: LlamaConfig, mesh: Mesh) -> LLaMa:
    key = jax.random.key(config.trainer.seed)
    return _adapted(random_model(llama, key=key, dtype=jnp.dtype(config.model.dtype), mesh=mesh), config)


def _adapted(model: LLaMa, config: RunConfig) -> LLaMa:
    if config.lora is None:
        return model
    return add_lora(model, config.lora, key=jax.random.fold_in(jax.random.key(config.trainer.seed), 1))


def _llama_config(config: ModelConfig, tokenizer: Tokenizer) -> LlamaConfig:
    if config.checkpoint is not None:
        return load_config(config.checkpoint)
    if config.preset not in PRESETS:
        raise ValueError(f"model.preset {config.preset!r} is none of {', '.join(PRESETS)}")
    preset = PRESETS[config.preset]
    known = {field.name: field for field in dataclasses.fields(preset)} | {"window": None}
    if unknown := sorted(set(config.changes) - set(known)):
        raise ValueError(f"model.changes has {', '.join(unknown)}, which is no field of a network's config")
    changes = {"vocab_size": tokenizer.vocab_size, **config.changes}
    layers, window = changes.get("num_layers", preset.num_layers), changes.pop("window", None)
    if "layer_windows" not in changes:
        changes["layer_windows"] = (window,) * layers if isinstance(layers, int) else ()
    return dataclasses.replace(preset, **changes)


def _check_length(sequence_length: int, llama: LlamaConfig) -> None:
    if sequence_length > llama.max_text_length:
        raise ValueError(
            f"data.sequence_length {sequence_length} is longer than the model's context of {llama.max_text_length}"
        )


def _tokenizer_path(config: RunConfig) -> Path:
    if config.tokenizer != "characters":
        path = Path(config.tokenizer or config.model.checkpoint)
        return path if config.tokenizer or path.is_dir() else path.parent
    folder = Path(config.output_dir) / "tokenizer"
    if not (folder / "tokenizer.json").exists() and jax.process_index() == 0:
        write_character_tokenizer(texts(config.data.train_sources), folder)
    return folder


def _fingerprint(path: Path) -> str:
    """A hash of the files that make up a tokenizer."""
    folder, names = (path, TOKENIZER_FILES) if path.is_dir() else (path.parent, (path.name, *TOKENIZER_FILES))
    files = [folder / sub / name for sub in ("", "original") for name in names]
    content = [(file.name, file.read_bytes()) for file in files if file.is_file()]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _num_steps(config: RunConfig, datasets: Datasets) -> int:
    if config.trainer.steps is not None:
        return config.trainer.steps
    rows = sum(len(rows) for rows in datasets.train)
    return max(1, math.ceil(config.trainer.epochs * rows / config.trainer.batch_size))


def _evaluation(run: Run) -> Callable[[TrainState], Mapping[str, float]]:
    """Evaluates a state on the validation data, always the same batches."""
    loader = Loader(
        run.datasets.validation,
        batch_size=run.config.trainer.batch_size // run.config.trainer.accumulation_steps,
        shuffle=False,
        num_epochs=1,
        prefetch=0,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    def evaluate(state: TrainState) -> Mapping[str, float]:
        loader.seek(0)
        batches: Iterator[Any] = itertools.islice(loader, run.config.trainer.eval_batches)
        return run.trainer.evaluate(state.model, batches)

    return evaluate


def _restore(checkpointer: Checkpointer, run: Run, state: TrainState, say: Callable[[str], None]) -> Restored | None:
    """What the newest checkpoint holds; None, said so, where there is none yet."""
    if checkpointer.latest() is None:
        say("no checkpoint yet: beginning at step 0")
        return None
    restored = checkpointer.restore(state)
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
