"""Seconds from the start of a process to the first token on its standard output.

    python -m benchmarks.startup --peer hf

Writes a random checkpoint with a byte-level tokenizer to a temporary folder, starts `generate.py --stream` on it a few
times in turn with the same in `transformers`, and prints the medians. The compilation cache is warm after the first
run, which is not counted.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire

_PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
inputs = tokenizer("the quick brown fox", return_tensors="pt", return_token_type_ids=False)
class Streamer(TextStreamer):
    def put(self, value):
        print(value.tolist(), flush=True)
with torch.inference_mode():
    model.generate(**inputs, max_new_tokens=16, do_sample=False, streamer=Streamer(tokenizer, skip_prompt=True))
"""


def main(shape: str = "small", runs: int = 5, peer: str | None = None) -> None:
    """Print the median seconds of ours and, with --peer hf, of `transformers`."""
    with tempfile.TemporaryDirectory() as folder:
        _write_checkpoint(shape, folder)
        ours = [sys.executable, "generate.py", "--ckpt_dir", folder, "--prompt", "the quick brown fox", "--stream"]
        commands = {"ropewalk": [*ours, "--max_new_tokens", "16", "--temperature", "0", "--device", "cpu"]}
        if peer:
            commands["transformers"] = [sys.executable, "-c", _PEER, folder]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(runs + 1):
            for name, command in commands.items():
                took = _seconds_to_first_byte(command)
                if run:
                    seconds[name].append(took)
    print(f"| `{shape}`, process start to first token | s |\n|---|---:|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} |")


def _write_checkpoint(shape: str, folder: str) -> None:
    """A random model of the shape, and a tokenizer of all bytes."""
    import jax
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from models.llama import PRESETS, LLaMa, save_pretrained

    jax.config.update("jax_platforms", "cpu")
    save_pretrained(jax.jit(lambda key: LLaMa(PRESETS[shape], key=key))(jax.random.key(0)), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    (Path(folder) / "tokenizer_config.json").write_text(settings)


def _seconds_to_first_byte(command: list[str]) -> float:
    started = time.perf_counter()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        first = process.stdout.read(1)
        took = time.perf_counter() - started
        _, problems = process.communicate()
    if not first:
        raise RuntimeError(problems.decode()[-2000:])
    return took


if __name__ == "__main__":
    fire.Fire(main)
