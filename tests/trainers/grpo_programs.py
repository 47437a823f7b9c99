"""The programs of a step of GRPO, compiled for a TPU slice that is not here; prints what they take, as JSON.

    python -m tests.trainers.grpo_programs v5e:2x4 configs/llama3_1b_grpo.yaml --model.preset=llama-3.2-1b ...

Every program is the compiled function that a run calls, on arrays that are shapes with shardings: a program's results
lie where its compiler has put them, and go into the next one so. A process of its own, since libtpu may end it.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from inference import decode
from inference.completion import Request, buffer_size, cache_size
from models.llama import PRESETS, LLaMa
from models.llama.init import parameter_sharding
from models.llama.names import parameter_name
from sampling import SamplingParams, SamplingRules
from trainers import parts
from trainers.experience import Experience, _pieces
from trainers.grpo_trainer import GRPOTrainer
from trainers.policy import PolicyBatch
from trainers.rewards import load_rewards
from trainers.settings import GRPORunConfig
from trainers.trainer import TrainState, _shardings_like
from utils import kvcache
from utils.kvcache import KVCache
from utils.settings import load_settings
from utils.sharding import batch_spec, mesh_of


def main(slice_name: str, path: str, flags: list[str]) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=slice_name).devices
    jax.default_backend, jax.device_count = lambda: "tpu", lambda: len(devices)  # what the settings are read for
    config = load_settings(GRPORunConfig, path, flags)
    shape = config.mesh.shape(len(devices))
    mesh = Mesh(np.array(devices).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    llama = PRESETS[config.model.preset]
    model = jax.eval_shape(lambda: LLaMa(llama, key=jax.random.key(0), dtype=jnp.dtype(config.model.dtype)))
    model = jax.tree_util.tree_map_with_path(
        lambda path, x: given(x, parameter_sharding(parameter_name(path), x.shape, mesh)), model
    )
    found = dict(learning(config, model))
    policy = found.pop("policy")
    for name, own in rollout(config, policy):
        found[name] = own
    print(json.dumps(found))


def given(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def compile(function: Callable, *args: Any, static: dict[str, Any] | None = None, **arrays: Any) -> tuple[Any, dict]:
    """The results of a compiled function, as shapes with shardings, and what it takes of each device."""
    static = static or {}
    with jax.set_mesh(mesh_of(args)):
        compiled = function.lower(*args, **arrays, **static).compile()
    results = jax.eval_shape(partial(function, **static), *args, **arrays)
    memory = compiled.memory_analysis()
    sizes = {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp", "alias")}
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b\w+\[([\d,]+)\]", compiled.as_text())}
    print(function, sizes, file=sys.stderr, flush=True)
    total = sizes["argument"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    return jax.tree.map(given, results, compiled.output_shardings), sizes | {"bytes": total, "shapes": sorted(shapes)}


def learning(config: GRPORunConfig, model: LLaMa) -> Iterator[tuple[str, Any]]:
    """The step, the policy that completions are drawn from, and log-probabilities under it."""
    mesh, steps = mesh_of(model), config.trainer.accumulation_steps
    trainer = GRPOTrainer(
        config=config.loss, rollout=config.rollout, policy=config.policy, **parts.trainer_options(config, 100)
    )
    rows = steps * mesh.shape["data"] * mesh.shape["fsdp"]
    experience = Experience(
        None,
        load_rewards(config.rewards),
        str,
        rollout=config.rollout,
        config=config.experience,
        loss=config.loss,
        policy=config.policy,
        compute_dtype=trainer.compute_dtype,
        micro_batches=steps,
        rows=rows,
    )
    batch, state = largest_batch(config, mesh, rows), first_state(trainer, model)
    policy, yielded = compile(experience._cast, model)
    yield "policy", policy
    yield "state", sum(_local_bytes(leaf) for leaf in jax.tree.leaves(state))
    yield "cast", yielded
    yield "scoring", compile(experience._log_probs, policy, batch)[1]
    after, yielded = compile(trainer.step, state, batch)
    same = [a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in zip(*map(jax.tree.leaves, (after[0], state)))]
    yield "train", yielded | {"lies_as_before": all(same)}


def first_state(trainer: GRPOTrainer, model: LLaMa) -> TrainState:
    """`Trainer.init` without arrays."""
    trained, whole = nnx.state(model, trainer.trainable), NamedSharding(mesh_of(model), PartitionSpec())
    opt_state = jax.eval_shape(trainer.optimizer.init, trained)
    shardings = _shardings_like(opt_state, trained)
    trainer._shardings = jax.tree.map(lambda x: x.sharding, trained), shardings
    zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    key = given(jax.eval_shape(lambda: jax.random.key(0)), whole)
    opt_state = jax.tree.map(given, opt_state, shardings)
    return TrainState(model=model, opt_state=opt_state, step=zero, key=key, skipped=zero)


def largest_batch(config: GRPORunConfig, mesh: Mesh, rows: int) -> PolicyBatch:
    """That of an update, all prompts and completions as long as they may be."""
    prompts, completions = config.trainer.batch_size, config.rollout.completions
    pieces = _pieces(prompts, completions, rows)
    B, C, M = prompts * pieces, completions // pieces, config.rollout.max_completion_length
    number = partial(_rows, mesh)
    return PolicyBatch(
        prompts_BS=number((B, config.data.max_prompt_length), jnp.int32),
        prompt_lengths_B=number((B,), jnp.int32),
        completions_BCM=number((B, C, M), jnp.int32),
        mask_BCM=number((B, C, M)),
        advantages_BC=number((B, C)),
        sampler_logprobs_BCM=number((B, C, M)),
        rollout_tokens_BC=number((B, C)),
    )


def rollout(config: GRPORunConfig, policy: LLaMa) -> Iterator[tuple[str, Any]]:
    """`inference.rollout.roll_out` of the prompts of a rollout, all as long as they may be, in one piece each."""
    mesh, llama, own = mesh_of(policy), policy.config, config.rollout
    P, S = config.trainer.batch_size * config.experience.updates_per_rollout, config.data.max_prompt_length
    assert S <= decode.PREFILL_CHUNK
    sampling = SamplingParams(temperature=own.temperature, top_k=own.top_k, top_p=own.top_p, min_p=own.min_p)
    request = Request(
        max_new_tokens=own.max_completion_length, num_samples=own.completions, sampling=sampling, logprobs=True
    )
    capacity, dtype = cache_size(policy, S, request), policy.norm_D.dtype
    sizes = (llama.num_layers, P, llama.num_kv_heads, capacity, llama.head_dim)
    empty = placed(jax.eval_shape(partial(kvcache.create, *sizes, dtype=dtype)), mesh)
    last_BD = jax.ShapeDtypeStruct((P, llama.hidden_size), dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    tokens_BT, counts_B = _rows(mesh, (P, S), jnp.int32), _rows(mesh, (P,), jnp.int32)
    (_, cache), yielded = compile(
        decode._prefill_piece, policy, empty, last_BD, tokens_BT, counts_B, static={"from_empty": True}
    )
    yield "prefill", yielded | lying(cache)
    cache, yielded = compile(jax.jit(kvcache.fork, static_argnames="copies"), cache, static={"copies": own.completions})
    yield "fork", yielded | lying(cache)
    N = P * own.completions
    rules = SamplingRules.of(sampling, vocab_size=llama.vocab_size, newlines=None)
    stop_E = np.array([128001, 128009], np.int32)
    state, yielded = compile(
        decode.begin,
        policy,
        placed(cache, mesh),
        _rows(mesh, (N, llama.hidden_size), dtype),
        rules,
        stop_E,
        keys_B=_rows(mesh, (N,), jax.random.key(0).dtype),
        limit_B=_rows(mesh, (N,), jnp.int32),
        static={"max_new_tokens": buffer_size(policy, request), "logprobs": True},
    )
    yield "begin", yielded | lying(state.cache)
    after, yielded = compile(decode.decode, policy, state, rules, stop_E, jax.ShapeDtypeStruct((), jnp.int32))
    same = [a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in zip(*map(jax.tree.leaves, (after, state)))]
    yield "decode", yielded | lying(after.cache) | {"lies_as_before": all(same)}


def placed(cache: KVCache, mesh: Mesh) -> KVCache:
    """`inference.decode.place_cache` without arrays."""
    rows = batch_spec(mesh)
    spec = {5: PartitionSpec(None, *rows), 1: rows}
    return jax.tree.map(lambda x: given(x, NamedSharding(mesh, spec[x.ndim])), cache)


def lying(cache: KVCache) -> dict[str, list[int]]:
    """The shape of all keys, and of those on a device."""
    k = cache.k_LBKSH
    return {"keys": list(k.shape), "keys_on_device": list(k.sharding.shard_shape(k.shape))}


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, batch_spec(mesh)))


def _local_bytes(x: jax.ShapeDtypeStruct) -> int:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 8
    return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
