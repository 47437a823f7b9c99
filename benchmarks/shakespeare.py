"""A character model of the size that nanoGPT trains on a CPU: our `train.py` beside a plain loop in torch.

    python -m benchmarks.shakespeare --text input.txt

Both are timed as whole processes, from start to exit: reading the text, compiling, training, evaluating as often as
`configs/shakespeare.yaml` says, and writing the model. The torch loop takes its numbers from that file too, and runs
eagerly and through torch.compile. Caches of compiled programs and of tokens are empty before the first run of each
side, and kept for its later ones. Sides take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire

from models.llama import PRESETS
from trainers.settings import RunConfig
from utils.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/shakespeare.yaml"
SIDES = ("ropewalk", "torch", "torch-compiled")


def main(text: str, steps: int = 2000, runs: int = 2) -> None:
    """Print a Markdown table: seconds of each side's first and later runs, and the loss over the held-out text.

    Args:
        text: A text file; its last tenth is held out.
        steps: Of training; warm-up is at most half of them.
        runs: Of each side.
    """
    settings = _read_settings(str(Path(text).resolve()), steps)
    done: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as base:
        for run in range(runs):
            for side in SIDES:
                print(f"{side}, run {run + 1} of {runs}", file=sys.stderr, flush=True)
                cache, output = Path(base) / "caches" / side, Path(base) / side / str(run)
                output.mkdir(parents=True)
                train = _run_ours if side == "ropewalk" else _run_torch
                done[side].append(train(settings | {"compiled": side == "torch-compiled"}, output, cache))
    print(f"{steps} steps of {settings['batch_size']} x {settings['context']} characters; seconds of the ", end="")
    print("whole process; nats per character of the last tenth of the text\n")
    print("| side | first run s | later runs s | validation |\n|---|---:|---:|---:|")
    for side, results in done.items():
        first, *later = [result["seconds"] for result in results]
        again = f"{statistics.median(later):.1f}" if later else ""
        print(f"| {side} | {first:.1f} | {again} | {statistics.mean(result['nll'] for result in results):.4f} |")


def _read_settings(text: str, steps: int) -> dict[str, Any]:
    """The fields of the torch loop's Settings but for `compiled` and `save_to`, from the configuration file.

    Raises ValueError where the file describes something that the torch loop is not.
    """
    config = load_settings(RunConfig, ROOT / CONFIG)
    preset, changes = PRESETS[config.model.preset], config.model.changes
    optimizer, trainer = config.optimizer, config.trainer
    own = "num_layers num_heads num_kv_heads hidden_size intermediate_size tie_embeddings"
    own += " initializer_range rms_norm_eps rope_theta"
    network = {name: changes.get(name, getattr(preset, name)) for name in own.split()}
    if network["num_heads"] != (kv_heads := network.pop("num_kv_heads")):
        raise ValueError(f"the torch loop has as many key heads as heads, {network['num_heads']}, not {kv_heads}")
    if (optimizer.name, optimizer.schedule) != ("adamw", "cosine"):
        raise ValueError(f"the torch loop has adamw and cosine, not {optimizer.name} and {optimizer.schedule}")
    warmup = optimizer.warmup if isinstance(optimizer.warmup, int) else round(optimizer.warmup * steps)
    return network | {
        "text": text,
        "steps": steps,
        "context": config.data.sequence_length,
        "validation_fraction": config.data.validation_fraction,
        "batch_size": trainer.batch_size,
        "learning_rate": trainer.learning_rate,
        "max_grad_norm": trainer.max_grad_norm,
        "eval_every": trainer.eval_every,
        "seed": trainer.seed,
        "warmup": min(warmup, steps // 2),
        "final_fraction": 0.1 if optimizer.final_fraction is None else optimizer.final_fraction,
        "weight_decay": optimizer.weight_decay,
        "b1": 0.9 if optimizer.b1 is None else optimizer.b1,
        "b2": 0.95 if optimizer.b2 is None else optimizer.b2,
        "eps": 1e-8 if optimizer.eps is None else optimizer.eps,
    }


def _run_ours(settings: dict[str, Any], output: Path, cache: Path) -> dict[str, float]:
    """Seconds and the loss over the whole held-out text, in a run that follows the file but for text and steps."""
    flags = [f"--data.train={settings['text']}", f"--output_dir={output / 'run'}", "--trainer.eval_batches=null"]
    flags += [f"--trainer.steps={settings['steps']}", f"--optimizer.warmup={settings['warmup']}"]
    command = ["train.py", "pretrain", "--config", CONFIG, *flags]
    seconds, _ = _seconds_and_output(command, XDG_CACHE_HOME=str(cache), JAX_PLATFORMS="cpu")
    lines = map(json.loads, (output / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = {line["step"]: line["validation/nll"] for line in lines if "validation/nll" in line}
    return {"seconds": seconds, "nll": losses[settings["steps"]]}


def _run_torch(settings: dict[str, Any], output: Path, cache: Path) -> dict[str, float]:
    told = json.dumps(settings | {"save_to": str(output / "model.pt")})
    command = ["-m", "benchmarks.shakespeare_torch", told]
    seconds, out = _seconds_and_output(command, TORCHINDUCTOR_CACHE_DIR=str(cache))
    return {"seconds": seconds, "nll": json.loads(out.splitlines()[-1])["nll"]}


def _seconds_and_output(arguments: list[str], **environment: str) -> tuple[float, str]:
    """Of a Python program, from start to exit."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return seconds, done.stdout


if __name__ == "__main__":
    fire.Fire(main)
