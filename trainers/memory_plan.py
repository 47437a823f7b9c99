"""What a run will take of each device, from its settings, before anything is allocated: see `utils.memory`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from data.batch import Batch
from models.llama import LLaMa, LlamaConfig, LoraConfig
from models.llama.init import parameter_shardings
from models.llama.lora import add_lora
from models.llama.names import is_stacked, parameter_name
from trainers import parts
from trainers.rollouts import RolloutConfig
from trainers.settings import CommonConfig, RunConfig
from trainers.trainer import abstract, shardings_like
from trainers.vocabulary import ACCELERATOR_LOGITS, CPU_LOGITS
from utils import memory
from utils.array_bytes import device_bytes
from utils.attention import Mask, choose
from utils.chips import chip_of
from utils.host import host_memory
from utils.platforms import target_platform
from utils.sharding import named_sharding, size_of

_STEPS = 10**9  # enough for any warm-up: optimizer state does not depend on it


def report(step: memory.Step, mesh: Mesh) -> list[str]:
    """Lines for the start of a run: the table, the largest batch that fits, and a warning where the run's does not."""
    estimate, available = memory.estimate(step), capacity(mesh)
    lines = memory.table(estimate)
    if available is None:
        return lines
    together = step.together
    multiple = step.pieces * step.over("data", "fsdp") * together

    def of_rows(rows: int) -> memory.Estimate:
        scale = rows / step.rows
        rollout = step.rollout and dataclasses.replace(step.rollout, rows=max(1, round(step.rollout.rows * scale)))
        return memory.estimate(dataclasses.replace(step, rows=rows, rollout=rollout))

    most, what = memory.largest(of_rows, capacity=available, multiple=multiple), step.rows_are
    fits = (
        f"the largest batch that fits has {most // together:,} {what}"
        if most
        else f"not even a batch of {multiple // together:,} {what} fits"
    )
    pieces = f", in {step.pieces} micro-batches" if step.pieces > 1 else ""
    lines.append(f"* the peak, of {available / 2**30:,.2f} GiB; {fits}{pieces}")
    if estimate.peak > available:
        lines.append(
            f"warning: by this estimate {step.rows // together:,} {what} do not fit into the memory of a device"
        )
    return lines


def capacity(mesh: Mesh) -> int | None:
    """Bytes that a program may use of a device, as far as they are known.

    Devices of a CPU share the machine's memory, or what the process's group may use of it.
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return host_memory() // jax.local_device_count()
    if (chip := chip_of(device.device_kind)) is not None:
        return chip.usable_bytes
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # of a device that is not here
        return None


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the memory of a step depends on beside the sizes of its batch.

    `model` is the run's, with shapes and shardings in place of arrays; `compute` the dtype that is computed in.
    """

    config: CommonConfig
    llama: LlamaConfig
    mesh: Mesh
    model: nnx.Module
    compute: np.dtype
    platform: str

    def frozen_bytes(self, model: nnx.Module) -> int:
        """Bytes on a device of another network, in the dtype that is computed in."""
        leaves = [abstract(leaf, leaf.sharding, self.compute) for leaf in jax.tree.leaves(model)]
        return device_bytes(leaves, platform=self.platform)

    def attention(self, chosen: str, length: int) -> str:
        """The implementation for rows of that length that "auto" stands for."""
        return _attention(chosen, self.llama, length, self.compute, self.mesh)


def step_of(
    config: CommonConfig,
    llama: LlamaConfig,
    mesh: Mesh,
    *,
    model: nnx.Module,
    sizes: Callable[[Setting], Mapping[str, Any]],
) -> memory.Step:
    """What of the settings decides on the memory of a step; `sizes` gives what the algorithm's batches decide.

    Raises ValueError where the mesh cannot cut a parameter.
    """
    platform = _platform(mesh)
    with jax.set_mesh(mesh):
        options = parts.trainer_options(config, _STEPS)
    compute = compute_dtype(config, mesh)
    return memory.Step(
        network=network_of(llama),
        held=_held(model, options["optimizer"], options["trainable"], compute, platform),
        mesh=dict(mesh.shape),
        platform=platform,
        pieces=config.trainer.accumulation_steps,
        itemsize=compute.itemsize,
        stored=jnp.dtype(config.model.dtype).itemsize,
        chunk=CPU_LOGITS if platform == "cpu" else ACCELERATOR_LOGITS,
        trains_all=config.lora is None,
        **sizes(Setting(config, llama, mesh, model, compute, platform)),
    )


def tuning(setting: Setting) -> dict[str, Any]:
    """Rows of packed texts."""
    config, T = setting.config, setting.config.data.sequence_length
    return dict(
        rows=config.trainer.batch_size,
        length=T,
        remat=config.loss.remat,
        attention=setting.attention(config.loss.attention, T),
    )


def behind_prompts(setting: Setting, *, completions: int, max_completion_length: int) -> dict[str, Any]:
    """Rows are completions; each has its share of the prompt that it goes on from, or the whole."""
    config, prompt = setting.config, setting.config.data.max_prompt_length
    with jax.set_mesh(setting.mesh):
        share = completions if config.policy.shares_prompts else 1
    return dict(
        rows=config.trainer.batch_size * completions,
        rows_are="completions",
        length=max_completion_length + -(-prompt // share),
        keys=prompt + max_completion_length,
        remat=config.policy.remat,
        attention=setting.attention(config.policy.attention, max_completion_length),
    )


def drawing(setting: Setting, rollout: RolloutConfig, *, prompts: int, prompt_length: int, policy: nnx.Module) -> Any:
    """What drawing the completions of so many prompts takes; `policy` is the network that draws."""
    drawn = prompts * rollout.completions
    same = jnp.dtype(setting.config.model.dtype) == setting.compute
    return memory.Rollout(
        rows=min(drawn, rollout.rows_at_once or drawn),
        slots=min(prompt_length + rollout.max_completion_length, setting.llama.max_text_length),
        policy=0 if same else setting.frozen_bytes(policy),
    )


def _platform(mesh: Mesh) -> str:
    with jax.set_mesh(mesh):
        return target_platform()


def compute_dtype(config: CommonConfig, mesh: Mesh) -> np.dtype:
    """What a run computes in, as `Trainer` chooses it; float32 stands for the parameters' own."""
    chosen = config.trainer.compute_dtype
    if chosen == "auto":
        chosen = config.model.dtype if _platform(mesh) == "cpu" else "bfloat16"
    return jnp.dtype(chosen)


def _attention(chosen: str, llama: LlamaConfig, T: int, dtype: np.dtype, mesh: Mesh) -> str:
    """The implementation that "auto" stands for."""
    if chosen != "auto":
        return chosen
    rows = size_of(mesh, "data", "fsdp")
    q_BTNH, k_BSKH = (
        jax.ShapeDtypeStruct((rows, T, heads, llama.head_dim), dtype) for heads in (llama.num_heads, llama.num_kv_heads)
    )
    windows = set(llama.layer_windows)
    segments_BT = np.zeros((1, 1), np.int32)  # no array of jax: the mesh may be of devices that are not here
    window = windows.pop() if len(windows) == 1 else segments_BT[0, 0]
    with jax.set_mesh(mesh):
        return choose(q_BTNH, k_BSKH, Mask(window=window, query_segments_BT=segments_BT, key_segments_BS=segments_BT))


def network_of(llama: LlamaConfig) -> memory.Network:
    """The sizes of a network."""
    return memory.Network(
        L=llama.num_layers,
        D=llama.hidden_size,
        F=llama.intermediate_size,
        N=llama.num_heads,
        K=llama.num_kv_heads,
        H=llama.head_dim,
        V=llama.vocab_size,
        tied=llama.tie_embeddings,
        gated=llama.gated,
    )


def _held(model: nnx.Module, optimizer: Any, trainable: Any, compute: np.dtype, platform: str) -> memory.Held:
    size = functools.partial(device_bytes, platform=platform)
    trained = nnx.state(model, trainable)
    opt_state = jax.eval_shape(optimizer.init, trained)
    shardings = shardings_like(opt_state, trained)
    cast = [leaf for leaf in _of_blocks(model) if leaf.dtype != compute]
    return memory.Held(
        parameters=size(model),
        optimizer=size(jax.tree.map(abstract, opt_state, shardings)),
        copy=size([abstract(leaf, leaf.sharding, compute) for leaf in cast]),
        gradients=size([abstract(leaf, leaf.sharding, compute) for leaf in _of_blocks(trained)]),
        sums=size([abstract(leaf, leaf.sharding, jnp.float32) for leaf in jax.tree.leaves(trained)]),
    )


def _of_blocks(tree: Any) -> list[Any]:
    """The arrays of the blocks of all networks in a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if is_stacked(parameter_name(path))]


def abstract_model(
    llama: LlamaConfig, mesh: Mesh, *, dtype: Any = jnp.float32, lora: LoraConfig | None = None
) -> LLaMa:
    """The network, and its adapters, with shapes and shardings in place of arrays.

    Raises ValueError where the mesh cannot cut a parameter.
    """

    def make(key: Any) -> LLaMa:
        model = LLaMa(llama, key=key, dtype=dtype)
        return model if lora is None else add_lora(model, lora, key=key)

    return laid_out(make, mesh)


def laid_out(make: Callable[[Any], nnx.Module], mesh: Mesh) -> Any:
    """What a function of a random key makes of networks, with shapes and shardings in place of arrays.

    Raises ValueError where the mesh cannot cut a parameter.
    """
    shapes = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
    return jax.tree.map(abstract, shapes, parameter_shardings(shapes, mesh))


def abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
    """A batch of the run without arrays."""
    shape = (config.trainer.batch_size, config.data.sequence_length)
    sharding = named_sharding("BT", shape, mesh)
    fields = {
        field.name: jnp.float32 if field.name == "weights_BT" else jnp.int32 for field in dataclasses.fields(Batch)
    }
    return Batch(**{name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in fields.items()})
