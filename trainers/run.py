"""A run from its settings: model, data and trainer are made, training begins or goes on, results are written."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from data.records import BadRow
from models.llama import check_vocabulary, load_tokenizer
from trainers import memory_plan, parts
from trainers.checkpoints import Checkpointer, Restored
from trainers.export import CHECKPOINTS, last_command, restorable
from trainers.flops import peak_flops
from trainers.logs import METRICS_FILE, MetricWriter, open_writers
from trainers.memory import PartMemory
from trainers.metrics import Throughput
from trainers.observers import BadSteps, Evaluator, Recorder, RunError, Saver
from trainers.progress import ProgressBar
from trainers.recipe import Course, Recipe, Stateful
from trainers.rewards import RewardError
from trainers.settings import CommonConfig
from trainers.trainer import Observer, Trainer, TrainState
from utils.distributed import exchange
from utils.settings import diff, to_dict

_SHARED_SECONDS = 10.0  # in which what is new on a network disk is seen everywhere


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run needs, made and checked; nothing has been trained yet."""

    config: CommonConfig
    command: str
    tokenizer_path: Path
    mesh: Mesh
    model: nnx.Module
    course: Course

    @property
    def trainer(self) -> Trainer:
        return self.course.trainer

    @property
    def num_steps(self) -> int:
        return self.course.num_steps

    @property
    def exportable(self) -> bool:
        """Whether the network can be written in Hugging Face's format."""
        return parts.hugging_face_config(self.model.config) is not None

    def describe(self) -> list[str]:
        """Lines on the run: its data, its network, its devices."""
        trained = parts.size(nnx.state(self.model, self.trainer.trainable))
        total = parts.size(nnx.state(self.model, nnx.Param))
        of = f"{trained:,} of {total:,}" if trained < total else f"{total:,}"
        shape = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        device = jax.devices()[0].device_kind
        lines = [
            *self.course.report,
            f"training {of} parameters for {self.num_steps:,} steps on {self.mesh.size} {device} ({shape})",
        ]
        if not self.exportable:
            lines.append("Hugging Face has no architecture for this network: hf/ will not be written")
        return lines


def prepare(
    command: str,
    recipe: Recipe,
    config: CommonConfig,
    *,
    resume: bool,
    cache_dir: str | Path,
    say: Callable[[str], None] = lambda line: None,
) -> Run:
    """Make what a run needs. `command` is what the recipe is called in the checkpoints.

    `say` gets lines on the memory that the run will take, before the weights are made. Raises ValueError and OSError,
    in one line, for what is missing or does not fit together.
    """
    _check_settings(command, config, resume)
    holds_run = _check_output(Path(config.output_dir), resume)
    if holds_run and (begun := last_command(config.output_dir)) not in (None, command):
        raise ValueError(f"{config.output_dir} holds a run of {begun}: go on with it as {begun}")
    _check_shared(Path(config.output_dir))
    mesh = parts.make_mesh(config.mesh)
    tokenizer_path = parts.tokenizer_path(config, anew=not holds_run)
    tokenizer = load_tokenizer(tokenizer_path)
    llama = parts.network_config(config.model, tokenizer)
    check_vocabulary(llama, tokenizer)
    opened = recipe.open(
        config, tokenizer=tokenizer, tokenizer_path=tokenizer_path, llama=llama, mesh=mesh, cache_dir=cache_dir
    )
    for line in memory_plan.report(recipe.memory_step(config, llama, mesh), mesh):
        say(line)
    model = recipe.make_model(config, llama, mesh, random=False)
    return Run(
        config=config,
        command=command,
        tokenizer_path=tokenizer_path,
        mesh=mesh,
        model=model,
        course=opened(model),
    )


def train(run: Run, *, resume: bool, interrupted: Callable[[], bool], say: Callable[[str], None]) -> TrainState:
    """Train to the last step, or until `interrupted` is true, and leave a checkpoint of where it stands.

    `say` gets lines for the user. Raises RunError for what fails on the way; before that, ValueError and OSError for a
    checkpoint or logs that do not fit.
    """
    config, folder = run.config, Path(run.config.output_dir)
    state = run.trainer.init(run.model, jax.random.key(config.trainer.seed))
    with contextlib.ExitStack() as opened:
        opened.enter_context(jax.set_mesh(run.mesh))  # see `utils.sharding.current_mesh`
        opened.callback(run.course.data.close)
        checkpointer = opened.enter_context(Checkpointer(folder / CHECKPOINTS, config.checkpoint))
        restored = _restore(checkpointer, run, state, say) if resume else None
        if restored is not None:
            state = restored.state
            for name, part in _carried(run).items():
                if name in restored.data_state:
                    part.restore(restored.data_state[name])
                else:
                    say(f"the checkpoint holds no {name}: that begins anew")
        resume_step = _resume_step(resume, restored)
        writer = open_writers(
            folder,
            process_index=jax.process_index(),
            resume_step=resume_step,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=to_dict(config),
        )
        observers = run.course.observers(folder, resume_step)
        state = _fit(run, state, checkpointer, restored, writer, observers, interrupted, say)
        for line in run.course.summary():
            say(line)
        return state


def _fit(
    run: Run,
    state: TrainState,
    checkpointer: Checkpointer,
    restored: Restored | None,
    writer: MetricWriter,
    observers: tuple[Observer, ...],
    interrupted: Callable[[], bool],
    say: Callable[[str], None],
) -> TrainState:
    """Train, evaluate, save; what fails once a step is done is a RunError."""
    config, steps = run.config.trainer, run.num_steps
    throughput = Throughput(peak_flops=_peak(run), memory=PartMemory())
    style = "silent" if jax.process_index() else run.config.log.progress
    progress = ProgressBar(steps, first_step=int(state.step), style=style)
    recorder = Recorder(writer, progress, throughput, every_steps=config.log_every, num_steps=steps)
    evaluator = _evaluator(run, recorder, throughput, restored)
    saver = Saver(
        checkpointer,
        _carried(run) | ({} if evaluator is None else {"evaluator": evaluator}),
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
            if evaluator is not None and evaluator.due is not None:
                evaluator.evaluate(evaluator.due, state)
            if evaluator is None or not evaluator.stopped:
                own = [evaluator] if evaluator else []
                observers = [saver.remember, recorder, *observers, bad_steps, *own, saver]
                batches = run.course.counted(run.course.data, throughput)
                state = run.trainer.fit(state, batches, num_steps=steps, observers=observers, throughput=throughput)
                bad_steps.finish()
        checkpointer.wait()
    except (RewardError, BadRow) as error:
        if isinstance(error, BadRow) and not recorder.began:  # a mistake like others, which are found earlier
            raise
        if jax.process_count() > 1:  # the others may be on their way into the next step, which saving would wait for
            raise RunError(str(error)) from error
        step = saver.rescue()
        checkpointer.wait()
        saved = "nothing is lost: no step was done" if step is None else f"saved at step {step}: go on with --resume"
        raise RunError(f"{error}; {saved}") from error
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


def _check_settings(command: str, config: CommonConfig, resume: bool) -> None:
    """Raise ValueError, in all processes, where one has other settings, but for logs and for paths on its machine."""
    own = to_dict(config) | {"command": command, "resume": resume}
    own |= dict.fromkeys(("output_dir", "tokenizer", "log"))
    for section in ("model", "teacher", "critic", "reference"):
        if isinstance(own.get(section), dict):
            own[section] = own[section] | dict.fromkeys(own[section].keys() & {"checkpoint", "cache_dir"})
    own["data"] = own["data"] | dict.fromkeys(("train", "validation", "cache_dir"))
    values = exchange(own)
    for index, other in enumerate(values):
        if changed := diff(values[0], other):
            raise ValueError(f"process {index} has other settings than process 0: {', '.join(changed)}")


def _check_shared(folder: Path) -> None:
    """Raise ValueError, in all processes, where one of them does not see what process 0 writes to the folder."""
    if jax.process_count() == 1:
        return
    name = exchange(f".shared-{secrets.token_hex(8)}")[0]
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".shared-*"):
            stale.unlink(missing_ok=True)
        (folder / name).touch()
    exchange()
    end = time.monotonic() + _SHARED_SECONDS
    while not (seen := (folder / name).exists()) and time.monotonic() < end:
        time.sleep(0.5)
    blind = [str(index) for index, sees in enumerate(exchange(seen)) if not sees]
    if jax.process_index() == 0:
        (folder / name).unlink()
    if blind:
        raise ValueError(
            f"output_dir {folder} of process {', '.join(blind)} is not that of process 0: it must be on a disk that "
            "all processes share"
        )


def _carried(run: Run) -> dict[str, Stateful]:
    """What a checkpoint keeps of the run beside its state, by name."""
    return {"loader": run.course.data, **run.course.carried}


def _evaluator(run: Run, recorder: Recorder, throughput: Throughput, restored: Restored | None) -> Evaluator | None:
    """What evaluates now and then; None where there is nothing to validate on."""
    if run.course.evaluate is None:
        return None
    config = run.config.trainer
    evaluator = Evaluator(
        run.course.evaluate,
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
