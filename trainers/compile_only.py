"""The step of a run, compiled for a TPU slice that is not here: what it takes, what it does, how long it would last.

Nothing of the data, the tokenizer or the weights is read. Arrays are shapes with shardings in place of values; the
program is the one that a run on the slice would compile.
"""

import contextlib
import importlib.util
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from models.llama import PRESETS, LlamaConfig
from trainers import parts
from trainers.flops import training_flops
from trainers.recipe import FullBatch, Recipe
from trainers.settings import CommonConfig
from utils import hlo, hlo_counts, sharding
from utils.chips import Slice
from utils.hlo_counts import Collective, Counts

_STEPS = 100  # of a run whose end does not matter
_BLOCK = 512  # positions of a block of splash attention


@dataclass(frozen=True)
class Memory:
    """Bytes of each chip, as the compiler sees them. `aliased` are results that lie where arguments were."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries - self.aliased


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least for its products, its memory traffic and its collectives."""

    compute: float
    memory: float
    links: float

    @property
    def overlapped(self) -> float:
        """Where all three go on at the same time."""
        return max(self.compute, self.memory, self.links)

    @property
    def in_turn(self) -> float:
        """Where nothing overlaps."""
        return self.compute + self.memory + self.links


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled step of `num_tokens` on a slice.

    `model_flops` are those of `trainers.flops`, of all chips. Where the program does not fit, `needed` is what the
    compiler says it takes of a chip, and there are no counts.
    """

    slice: Slice
    mesh: Mesh
    llama: LlamaConfig
    full: FullBatch
    model_flops: int
    seconds: float
    memory: Memory | None = None
    needed: int | None = None
    counts: Counts | None = None
    text: str = ""

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.slice.chip.usable_bytes

    @property
    def roofline(self) -> Roofline:
        chip, counts = self.slice.chip, self.counts
        links = sum(own.total_bytes / self.ring_speed(own) for own in counts.collectives)
        return Roofline(counts.flops / chip.flops, counts.hbm_bytes / chip.hbm_speed, links)

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation at so many seconds for a step."""
        return self.model_flops / (seconds * self.slice.num_chips * self.slice.chip.flops)

    def ring_speed(self, own: Collective) -> float:
        """Bytes/s of a collective: over all links along the axes of the slice in which its first group lies."""
        devices = self.mesh.devices.flat
        places = [devices[member].coords for member in own.members] or [device.coords for device in devices]
        axes = tuple(axis for axis in range(len(self.slice.shape)) if len({place[axis] for place in places}) > 1)
        return self.slice.ring_speed(axes or (0,))


def compile_step(recipe: Recipe, config: CommonConfig, on: Slice) -> Program:
    """The program of a run's step. Raises ValueError, in one line, for settings that do not fit the slice."""
    llama = network(config)
    mesh = make_mesh(config, on)
    with jax.set_mesh(mesh):
        trainer = recipe.make_trainer(config, _STEPS)
        if trainer.compute_dtype == jnp.float16:
            raise ValueError("trainer.compute_dtype float16 is for GPUs: TPUs compute in bfloat16")
        model = recipe.abstract_model(config, llama, mesh)
        state, full = trainer.abstract_init(model), recipe.full_batch(config, llama, mesh)
        adapters = None if config.lora is None else parts.size(nnx.state(model, nnx.LoRAParam))
        flops = training_flops(llama, full.lengths, adapter_params=adapters)
        start = time.perf_counter()
        lowered = trainer.step.lower(state, full.batch)
        about = dict(slice=on, mesh=mesh, llama=llama, full=full, model_flops=flops)
        try:
            program, text = compiled(lowered)
        except jax.errors.JaxRuntimeError as error:
            seconds = time.perf_counter() - start
            return Program(**about, seconds=seconds, needed=bytes_needed(str(error)))
    seconds = time.perf_counter() - start
    counts = hlo_counts.count(hlo.parse(text), attention_share=_causal_share(full))
    return Program(**about, seconds=seconds, memory=memory_of(program), counts=counts, text=text)


def network(config: CommonConfig) -> LlamaConfig:
    """What the network is, without a look at the tokenizer: the vocabulary is the preset's unless it is changed."""
    preset = PRESETS.get(config.model.preset)
    return parts.network_config(config.model, SimpleNamespace(vocab_size=getattr(preset, "vocab_size", None)))


def make_mesh(config: CommonConfig, on: Slice) -> Mesh:
    """The mesh of the chips of a slice. Raises ValueError without libtpu, and where the settings do not fit it."""
    shape = config.mesh.shape(on.num_chips)
    return sharding.make_mesh(shape, slice_devices(on))


def slice_devices(on: Slice) -> list[Any]:
    """Descriptions of the chips, for which jax can compile. Raises ValueError where libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs libtpu: pip install 'ropewalk[aot]', on Linux x86-64")
    from jax.experimental import topologies

    closed = [*on.closed, *[False] * (3 - len(on.shape))]
    host = [1, 1, 1] if on.num_chips == 1 else [2, 2, 1]
    return topologies.get_topology_desc(
        platform="tpu", topology_name=on.name, wrap=closed, chips_per_host_bounds=host
    ).devices


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The program and its text, which libtpu writes itself: `as_text` of the program cannot print some of them."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        undo.callback(jax.config.update, "jax_enable_compilation_cache", jax.config.jax_enable_compilation_cache)
        jax.config.update("jax_enable_compilation_cache", False)  # a program out of the cache has no text
        program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        written = Path(folder).glob("*.after_optimizations.txt")
        path = max(written, key=lambda path: path.stat().st_size)
        return program, path.read_text(encoding="utf-8", errors="replace")


def memory_of(program: jax.stages.Compiled) -> Memory:
    """What a program takes of each device."""
    found = program.memory_analysis()
    return Memory(*(getattr(found, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp", "alias")))


def bytes_needed(message: str) -> int | None:
    """What a program takes of a device that it does not fit, as far as the compiler's message tells.

    Raises ValueError for a message about anything else.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        raise ValueError(f"XLA does not compile this program: {' '.join(message.split())[:300]}")
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message) or re.search(
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message
    )
    return round(float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2])))) if found else None


def _causal_share(full: FullBatch) -> float:
    """The share of blocks of queries and keys that causal attention goes through, in rows of one length.

    Too much where a window leaves out more, too little where queries stand behind a shared prompt.
    """
    blocks = max(1, max(full.lengths) // _BLOCK)
    return (blocks + 1) / (2 * blocks)
