"""The estimate of a training step's memory beside the compiler's figure, for TPU slices that need not be there.

    python -m benchmarks.memory
    python -m benchmarks.memory --cases cases.jsonl --output results.jsonl

Each case, by default those of CASES, is compiled ahead of time in a process of its own; it needs libtpu, and a minute.
The compiler's figure is what `memory_analysis` of `Trainer.step` says: arguments + results + temporaries - what results
share with arguments; where compilation runs out of memory, what it says that the program needs.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire

_1B, _8B = dict(preset="llama-3.2-1b"), dict(preset="llama-3.1-8b")
_ADAPTERS = dict(lora=16, dtype="bfloat16")
# Rows are those of a step, over all devices; the mesh is data x fsdp x tensor x sequence.
CASES: tuple[dict[str, Any], ...] = (
    _1B | dict(topology="v5e:1x1", mesh=[1, 1, 1, 1], rows=1, length=1024, remat="block"),
    _1B | dict(topology="v5e:1x1", mesh=[1, 1, 1, 1], rows=32, length=2048, remat="block", **_ADAPTERS),
    _1B | dict(topology="v5e:2x2", mesh=[1, 4, 1, 1], rows=16, length=2048, remat="dots", **_ADAPTERS),
    _1B | dict(topology="v5e:2x4", mesh=[1, 8, 1, 1], rows=48, length=2048, remat="dots"),
    _1B | dict(topology="v6e:2x4", mesh=[1, 1, 8, 1], rows=8, length=2048, remat="dots"),
    _8B | dict(topology="v5e:4x4", mesh=[1, 8, 2, 1], rows=96, length=2048, remat="block"),
    _8B | dict(topology="v5e:4x4", mesh=[1, 8, 2, 1], rows=104, length=2048, remat="block"),
    _8B | dict(topology="v6e:4x4", mesh=[1, 4, 4, 1], rows=4, length=4096, remat="block"),
    _8B | dict(topology="v6e:4x4", mesh=[1, 4, 4, 1], rows=16, length=4096, remat="block"),
    _8B | dict(topology="v6e:4x4", mesh=[1, 16, 1, 1], rows=112, length=8192, remat="block"),
    _8B | dict(topology="v6e:4x4", mesh=[2, 4, 2, 1], rows=32, length=4096, remat="block"),
    _8B | dict(topology="v6e:4x4", mesh=[1, 4, 1, 4], rows=4, length=32768, remat="block"),
)


def main(cases: str | None = None, output: str | None = None, case: dict[str, Any] | None = None) -> None:
    """Compile the cases and print the table; `output` keeps a line of JSON for each. `case` is that of one process."""
    if case is not None:
        print(json.dumps(measure(case)))  # fire has read the JSON
        return
    chosen = CASES if cases is None else [json.loads(line) for line in Path(cases).read_text().splitlines() if line]
    print("| slice | model | mesh | rows | T | remat | else | estimate, GiB | compiler, GiB | ratio |")
    print("|---|---|---|---:|---:|---|---|---:|---:|---:|")
    for found in run(chosen):
        print(_line(found), flush=True)
        if output is not None:
            with open(output, "a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


def run(cases: Any) -> Iterator[dict[str, Any]]:
    """Each case with what was found, from a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for case in cases:
        command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(case)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
        yield json.loads(lines[-1])


def measure(case: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The case with the estimate and the compiler's sizes, bytes; `fits` is whether it compiles.

    `options` are the compiler's.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    from trainers import memory_plan
    from trainers.language_model_recipe import LanguageModelRecipe
    from trainers.sft_trainer import SFTTrainer
    from utils.memory import estimate as estimate_of
    from utils.sharding import AXES

    devices = topologies.get_topology_desc(platform="tpu", topology_name=case["topology"]).devices
    mesh = Mesh(np.array(devices).reshape(case["mesh"]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    config, llama = settings(case)
    with jax.set_mesh(mesh):
        trainer = make_trainer(config)
        estimate = estimate_of(LanguageModelRecipe(SFTTrainer).memory_step(config, llama, mesh))
        model = memory_plan.abstract_model(llama, mesh, dtype=config.model.dtype, lora=config.lora)
        state = trainer.abstract_init(model)
        batch = memory_plan.abstract_batch(config, mesh)
        found = case | {"estimate": estimate.as_dict()}
        try:
            compiled = trainer.step.lower(state, batch).compile(options or None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = re.search(r"HLO temporaries \(([\d.]+)G\)", str(error))
            return found | {"fits": False, "compiler": {"total": int(float(needed[1]) * 2**30) if needed else 0}}
    memory = compiled.memory_analysis()
    sizes = {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp", "alias")}
    total = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    return found | {"fits": True, "compiler": sizes | {"total": total}}


def settings(case: dict[str, Any]) -> tuple[Any, Any]:
    """The settings of a fine-tuning run, and the network's."""
    from data.datasets import DataConfig
    from models.llama import PRESETS, LoraConfig
    from trainers.language_model import LanguageModelConfig
    from trainers.optimizers import OptimizerConfig
    from trainers.settings import MeshConfig, ModelConfig, RunConfig, TrainerConfig

    rank = case.get("lora")
    config = RunConfig(
        output_dir="unused",
        tokenizer="unused",
        model=ModelConfig(preset=case["preset"], dtype=case.get("dtype", "float32")),
        data=DataConfig(train="unused", sequence_length=case["length"], packing="best_fit"),
        trainer=TrainerConfig(
            batch_size=case["rows"], accumulation_steps=case.get("pieces", 1), learning_rate=1e-4, steps=100
        ),
        optimizer=OptimizerConfig(name=case.get("optimizer", "adamw")),
        loss=LanguageModelConfig(remat=case["remat"], attention=case.get("attention", "auto")),
        lora=None if rank is None else LoraConfig(rank=rank, alpha=2.0 * rank),
        mesh=MeshConfig(**dict(zip(("data", "fsdp", "tensor", "sequence"), case["mesh"]))),
    )
    return config, PRESETS[case["preset"]]


def make_trainer(config: Any) -> Any:
    """The trainer of those settings."""
    from trainers import parts
    from trainers.sft_trainer import SFTTrainer

    return SFTTrainer(config=config.loss, **parts.trainer_options(config, 100))


def _line(found: dict[str, Any]) -> str:
    known = ("topology", "preset", "mesh", "rows", "length", "remat", "estimate", "compiler", "fits")
    rest = ", ".join(f"{key} {value}" for key, value in found.items() if key not in known)
    mine, theirs = found["estimate"]["peak"] / 2**30, found["compiler"]["total"] / 2**30
    fits = "" if found["fits"] else ", does not fit"
    figures = (f"{mine:.2f}", f"{theirs:.2f}{fits}", f"{mine / theirs:.3f}" if theirs else "")
    mesh = "x".join(map(str, found["mesh"]))
    names = ("topology", "preset", "rows", "length", "remat")
    topology, preset, rows, length, remat = (str(found[name]) for name in names)
    return "| " + " | ".join((topology, preset, mesh, rows, length, remat, rest, *figures)) + " |"


if __name__ == "__main__":
    fire.Fire(main)
