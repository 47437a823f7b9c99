"""Pretraining, fine-tuning, learning from preferences, reinforcement learning and distillation from a YAML file.

    python train.py pretrain --config configs/shakespeare.yaml --data.train=input.txt
    python train.py sft --config configs/sft_small.yaml --trainer.learning_rate=1e-5
    python train.py sft --config configs/sft_small.yaml --resume
    python train.py dpo --config configs/dpo_small.yaml --data.train=preferences.json
    python train.py reward --config configs/reward_small.yaml --data.train=preferences.json
    python train.py ppo --config configs/ppo_small.yaml --data.train=prompts.jsonl
    python train.py grpo --config configs/gsm8k_grpo.yaml --data.train=train.jsonl
    python train.py distill --config configs/distill_small.yaml --data.train=text.txt
    python train.py export --run runs/shakespeare --step 1000 --output exported

Flags: --config FILE; --resume goes on from the newest checkpoint in output_dir; every other flag is a setting, whose
keys `python train.py grpo --help` lists, and so for each. `export` writes the model of a checkpoint in Hugging Face's
format.

--compile_only --topology v5p:4x4x4 trains nothing: it compiles the step for that TPU slice, which need not be here, and
prints what it takes of each chip and how long it would last at least; --report FILE writes the same as JSON. Data,
tokenizer and weights are not read.

Several processes train as one: srun, mpirun, TPU pods and Kubernetes say by the environment how many there are; else
start each with --coordinator HOST:PORT, a free port of the host of process 0, --num_processes N and --process_id I,
counted from 0. They wait for each other for --start_timeout seconds, by default 300.
"""

if __name__ == "__main__":
    from utils.host import restart_with_huge_pages

    restart_with_huge_pages()

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.ahead_of_time import AHEAD_OF_TIME
from utils.cli import UsageError, one_line_errors

COMMANDS = ("pretrain", "sft", "dpo", "reward", "ppo", "grpo", "distill", "export")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 2 for a mistake, 1 for a run that failed on its way, 130 or 143 if told."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors("train.py"):
        if not argv or argv[0] in ("--help", "-h", "help"):
            print(__doc__.strip())
            return
        command, *rest = argv
        if command not in COMMANDS:
            raise UsageError(f"{command!r} is none of the commands {', '.join(COMMANDS)}; see --help")
        if "--help" in rest or "-h" in rest:
            _print_help(command)
        elif command == "export":
            _export(rest)
        elif "--compile_only" in rest:
            _compile_only(command, [arg for arg in rest if arg != "--compile_only"])
        elif stray := _named(rest, ("--compile_only", "--topology", "--report")):
            raise UsageError(f"{stray}: --topology and --report go with --compile_only, which takes no value")
        else:
            _train(command, rest)


def _named(argv: list[str], flags: Sequence[str]) -> str | None:
    """The first of the arguments that is one of these flags, with a value or without."""
    return next((arg for arg in argv if arg.partition("=")[0] in flags), None)


def _train(command: str, argv: list[str]) -> None:
    from utils.distributed import leave, shared_end
    from utils.settings import load_settings

    recipe = _recipes()[command]
    path, argv = _take(argv, "--config")
    place, argv = _take_place(argv)
    resume = "--resume" in argv
    config = load_settings(recipe.config, path, [arg for arg in argv if arg != "--resume"])
    with shared_end(), one_line_errors("train.py"):
        _meet(*place, config.output_dir)
        code = _run(command, recipe, config, resume)
        leave()
    if code:
        raise SystemExit(code)


def _run(command: str, recipe: Any, config: Any, resume: bool) -> int:
    """Train and export; the exit code."""
    from inference.setup import keep_compiled_programs
    from trainers.observers import RunError
    from trainers.run import prepare, train
    from utils.distributed import blame, is_first

    say = _say if is_first() else lambda line: None
    keep_compiled_programs()
    run = prepare(command, recipe, config, resume=resume, cache_dir=_cache_dir(), say=say)
    for line in run.describe():
        say(line)
    with _Signals() as signals:
        try:
            state = train(run, resume=resume, interrupted=signals.stop, say=say)
        except RunError as error:
            blame(error)
            raise SystemExit(_fail(error)) from None
    step = int(state.step)
    if signals.stopped and step < run.num_steps:
        say(f"interrupted and saved at step {step}: go on with --resume")
        return 128 + signals.stopped
    if run.exportable:
        _write(recipe.exports(state.model), config.output_dir, run.tokenizer_path, config.model.checkpoint, say)
    return 0


def _compile_only(command: str, argv: list[str]) -> None:
    """Print what the step of a run would be on a TPU slice."""
    from utils.chips import slice_of

    topology, argv = _take(argv, "--topology")
    report, argv = _take(argv, "--report")
    path, argv = _take(argv, "--config")
    if topology is None:
        raise UsageError("--compile_only needs a --topology, such as v5p:4x4x4")
    if stray := _named(argv, ("--resume", "--coordinator", "--num_processes", "--process_id", "--start_timeout")):
        raise UsageError(f"{stray} is for training, which --compile_only does not do")
    on = slice_of(topology)
    os.environ.update(AHEAD_OF_TIME)  # jax and libtpu read them when they start
    from trainers import compile_report
    from trainers.compile_only import compile_step
    from utils.settings import load_settings

    recipe = _recipes()[command]
    if not any(arg.partition("=")[0] == "--tokenizer" for arg in argv):
        argv = [*argv, "--tokenizer=unread"]
    program = compile_step(recipe, load_settings(recipe.config, path, argv), on)
    if report is not None:
        Path(report).write_text(json.dumps(compile_report.values(program), indent=2) + "\n", encoding="utf-8")
    for line in compile_report.lines(program):
        print(line)


def _meet(place: Any, seconds: float, output_dir: str) -> None:
    """Start jax among the other processes of the run, if there are others."""
    from utils.clusters import find_place, jax_may_use_tpu
    from utils.distributed import start

    place = place or find_place(os.environ, on_tpu=jax_may_use_tpu, seconds=seconds)
    if place is not None:
        start(place, seconds=seconds, lost=lambda line: _end_at_once(line, output_dir))


def _end_at_once(line: str, output_dir: str) -> None:
    """End this process, whatever it is at, because of another; called in a thread of its own."""
    from trainers.export import last_step

    found: list[int | None] = []

    def look() -> None:
        with contextlib.suppress(OSError):
            found.append(last_step(output_dir))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(10)  # a shared disk may have gone with the other process
    saved = f"the last checkpoint is step {found[0]}: go on with --resume" if found and found[0] is not None else ""
    restore = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar has hidden the cursor
    os.write(2, f"{restore}train.py: {line}; {saved or 'nothing has been saved'}\n".encode())
    os._exit(1)


def _export(argv: list[str]) -> None:
    from trainers.export import restore_model

    folder, argv = _take(argv, "--run")
    step, argv = _take(argv, "--step")
    output, argv = _take(argv, "--output")
    if argv:
        raise UsageError(f"unknown {argv[0]!r}: export takes --run, --step and --output")
    if folder is None or output is None:
        raise UsageError("export needs --run, the output folder of a run, and --output, a new folder")
    if step is not None and not step.isdecimal():
        raise UsageError(f"--step must be a whole number, not {step!r}")
    networks, config, tokenizer_path = restore_model(_recipes(), folder, None if step is None else int(step))
    _write(networks, output, tokenizer_path, config.model.checkpoint, _say)


def _recipes() -> dict[str, Any]:
    from inference.rollout import sampler
    from trainers.distill_recipe import DistillRecipe
    from trainers.distill_trainer import DistillTrainer
    from trainers.dpo_trainer import DPOTrainer
    from trainers.grpo_recipe import GRPORecipe
    from trainers.grpo_trainer import GRPOTrainer
    from trainers.language_model_recipe import LanguageModelRecipe
    from trainers.ppo_recipe import PPORecipe
    from trainers.ppo_trainer import PPOTrainer
    from trainers.preference_recipe import DPORecipe, RewardRecipe
    from trainers.pretrain_trainer import PretrainTrainer
    from trainers.reward_trainer import RewardTrainer
    from trainers.sft_trainer import SFTTrainer

    return {
        "pretrain": LanguageModelRecipe(PretrainTrainer),
        "sft": LanguageModelRecipe(SFTTrainer),
        "dpo": DPORecipe(DPOTrainer),
        "reward": RewardRecipe(RewardTrainer),
        "ppo": PPORecipe(PPOTrainer, sampler),
        "grpo": GRPORecipe(GRPOTrainer, sampler),
        "distill": DistillRecipe(DistillTrainer, sampler),
    }


def _write(networks, folder: str, tokenizer_path: Path, base: str | None, say: Callable[[str], None]) -> None:
    from trainers.export import export

    try:
        for path in export(networks, folder, tokenizer_path=tokenizer_path, base=base):
            say(f"wrote {path}")
    except OSError as error:
        raise SystemExit(_fail(error)) from None


def _print_help(command: str) -> None:
    print(__doc__.strip())
    if command != "export":
        from utils.settings import describe

        print("\nSettings:\n\n" + describe(_recipes()[command].config))


def _take_place(argv: list[str]) -> tuple[tuple[Any, float], list[str]]:
    """Which process this one is by its flags, None without them, and how long to wait; and the other arguments."""
    from utils.clusters import make_place

    names = ("--coordinator", "--num_processes", "--process_id")
    values = []
    for name in names:
        value, argv = _take(argv, name)
        values.append(value)
    text, argv = _take(argv, "--start_timeout")
    seconds = 300.0
    if text is not None:
        if not text.isdecimal() or not int(text):
            raise UsageError(f"--start_timeout must be a positive number of seconds, not {text!r}")
        seconds = float(text)
    given = any(value is not None for value in values)
    return (make_place(*values, names=names) if given else None, seconds), argv


def _take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag, --flag value or --flag=value, and the other arguments."""
    value, rest, args = None, [], list(argv)
    while args:
        arg = args.pop(0)
        if arg != flag and not arg.startswith(flag + "="):
            rest.append(arg)
            continue
        if value is not None:
            raise UsageError(f"{flag} is given twice")
        if arg == flag and (not args or args[0].startswith("--")):
            raise UsageError(f"{flag} needs a value")
        value = args.pop(0) if arg == flag else arg.partition("=")[2]
    return value, rest


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ropewalk" / "tokens"


class _Signals(contextlib.AbstractContextManager):
    """Remembers the first SIGINT or SIGTERM inside of it; a second one ends the program at once.

    `stopped` is the signal that the run was stopped by, in this process or in another; 0 for none.
    """

    def __init__(self):
        self.stopped = 0
        self._caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self) -> bool:
        """Whether to stop now; asked once after each step, so that all processes stop after the same one."""
        from utils.distributed import stop_now

        self.stopped = stop_now(self._caught)
        return self.stopped != 0

    def _catch(self, number: int, frame) -> None:
        self._caught = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # not by print, which the signal may have interrupted
            os.write(2, b"finishing the step and saving; once more to end at once\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fail(error: Exception) -> int:
    """Say why a run failed on its way; its exit code."""
    if os.environ.get("ROPEWALK_DEBUG"):
        raise error
    _say(f"train.py: {' '.join(str(error).split()) or type(error).__name__}")
    return 1


if __name__ == "__main__":
    main()
