"""Pretraining, supervised fine-tuning and reinforcement learning from a YAML file.

    python train.py pretrain --config configs/shakespeare.yaml --data.train=input.txt
    python train.py sft --config configs/sft_small.yaml --trainer.learning_rate=1e-5
    python train.py sft --config configs/sft_small.yaml --resume
    python train.py grpo --config configs/gsm8k_grpo.yaml --data.train=train.jsonl
    python train.py export --run runs/shakespeare --step 1000 --output exported

Flags: --config FILE; --resume goes on from the newest checkpoint in output_dir; every other flag is a setting, whose
keys `python train.py grpo --help` lists, and so for each. `export` writes the model of a checkpoint in Hugging Face's
format.
"""

if __name__ == "__main__":
    from utils.host import restart_with_huge_pages

    restart_with_huge_pages()

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.cli import UsageError, one_line_errors

COMMANDS = ("pretrain", "sft", "grpo", "export")


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
        else:
            _train(command, rest)


def _train(command: str, argv: list[str]) -> None:
    from inference.setup import keep_compiled_programs
    from trainers.observers import RunError
    from trainers.run import prepare, train
    from utils.settings import load_settings

    recipe = _recipes()[command]
    path, argv = _take(argv, "--config")
    resume = "--resume" in argv
    config = load_settings(recipe.config, path, [arg for arg in argv if arg != "--resume"])
    keep_compiled_programs()
    run = prepare(command, recipe, config, resume=resume, cache_dir=_cache_dir())
    for line in run.describe():
        _say(line)
    with _Signals() as signals:
        try:
            state = train(run, resume=resume, interrupted=signals.caught, say=_say)
        except RunError as error:
            raise SystemExit(_fail(error)) from None
    step = int(state.step)
    if signals.caught() and step < run.num_steps:
        _say(f"interrupted and saved at step {step}: go on with --resume")
        raise SystemExit(128 + signals.number)
    if run.exportable:
        _write(state.model, config.output_dir, run.tokenizer_path, config.model.checkpoint)


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
    model, config, tokenizer_path = restore_model(_recipes(), folder, None if step is None else int(step))
    _write(model, output, tokenizer_path, config.model.checkpoint)


def _recipes() -> dict[str, Any]:
    from inference.rollout import sampler
    from trainers.grpo_recipe import GRPORecipe
    from trainers.grpo_trainer import GRPOTrainer
    from trainers.language_model_recipe import LanguageModelRecipe
    from trainers.pretrain_trainer import PretrainTrainer
    from trainers.sft_trainer import SFTTrainer

    return {
        "pretrain": LanguageModelRecipe(PretrainTrainer),
        "sft": LanguageModelRecipe(SFTTrainer),
        "grpo": GRPORecipe(GRPOTrainer, sampler),
    }


def _write(model, folder: str, tokenizer_path: Path, base: str | None) -> None:
    from trainers.export import export

    try:
        for path in export(model, folder, tokenizer_path=tokenizer_path, base=base):
            _say(f"wrote {path}")
    except OSError as error:
        raise SystemExit(_fail(error)) from None


def _print_help(command: str) -> None:
    print(__doc__.strip())
    if command != "export":
        from utils.settings import describe

        print("\nSettings:\n\n" + describe(_recipes()[command].config))


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
    """Remembers the first SIGINT or SIGTERM inside of it; a second one ends the program at once."""

    def __init__(self):
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def caught(self) -> bool:
        return self.number != 0

    def _catch(self, number: int, frame) -> None:
        self.number = number
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
