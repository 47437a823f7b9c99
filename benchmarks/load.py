"""How long loading a checkpoint takes and how much host memory it needs beside the weights.

    python -m benchmarks.load [--dtype float32|bfloat16] [--dir FOLDER] [--keep]

Writes a random Hugging Face checkpoint of the shapes of Llama 3.2 1B in bfloat16, unless FOLDER already holds it, and
loads it in a fresh process. The file is in the page cache then, so the time is that of the program, not of the disk.
Memory is read from Linux's /proc.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from models.llama.checkpoint import load_config
from models.llama.config import LlamaConfig, config_to_hf
from models.llama.files import write_safetensors
from models.llama.load import load_pretrained
from models.llama.names import HUGGING_FACE, layout, tensors_of
from models.llama.presets import PRESETS

CONFIG = PRESETS["llama-3.2-1b"]
_PARAMETERS = "embed_VD attn_norm_D q_DNH k_DKH v_DKH o_NHD mlp_norm_D gate_DF up_DF down_FD norm_D"


def write_checkpoint(folder: Path, config: LlamaConfig = CONFIG) -> None:
    """A random checkpoint of a plain, tied network in bfloat16, written tensor by tensor."""
    bfloat16, rng = np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)
    shapes = {}
    for name, stored in HUGGING_FACE.items():
        if name.removeprefix("blocks.") in _PARAMETERS.split():
            shape = layout(name, stored, config).stored_shape
            shapes |= dict.fromkeys(tensors_of(name, stored, config), (bfloat16, shape))

    def random(tensor: str) -> np.ndarray:
        shape = shapes[tensor][1]
        return (rng.standard_normal(shape, np.float32) * config.initializer_range).astype(bfloat16)

    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", shapes, random, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """Seconds, final bytes of the weights, and the growth of this process's peak memory over what it held before."""
    jax.block_until_ready(jax.device_put(np.zeros(1, np.float32)))  # start the backend before measuring
    before = _memory_bytes("VmRSS")
    start = time.perf_counter()
    model = load_pretrained(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {"seconds": seconds, "weights": weights, "peak_growth": _memory_bytes("VmHWM") - before}


def _memory_bytes(field: str) -> int:
    """A line of /proc/self/status; unlike getrusage's, its peak is not inherited from the parent process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--dir", type=Path, help="folder of the checkpoint, by default a temporary one")
    parser.add_argument("--keep", action="store_true", help="do not remove the checkpoint afterwards")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.dir, options.dtype)))
        return
    folder = options.dir or Path(tempfile.mkdtemp(prefix="load-benchmark-"))
    created = not (folder / "config.json").is_file()
    try:
        if created:
            write_checkpoint(folder)
        elif load_config(folder) != CONFIG:
            parser.error(f"{folder} holds another checkpoint")
        command = [sys.executable, "-m", "benchmarks.load", "--measure", "--dir", str(folder), "--dtype", options.dtype]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        stored = (folder / "model.safetensors").stat().st_size
    finally:
        if created and not options.keep:
            for name in ("model.safetensors", "config.json"):
                (folder / name).unlink(missing_ok=True)
            if options.dir is None:
                folder.rmdir()
    extra = result["peak_growth"] - result["weights"]
    print(f"{options.dtype}: {result['seconds']:.2f} s, {stored / result['seconds'] / 1e9:.2f} GB/s of file")
    print(f"weights {result['weights'] / 2**30:.2f} GiB, peak {extra / 2**30:+.3f} GiB beside them")


if __name__ == "__main__":
    main()
