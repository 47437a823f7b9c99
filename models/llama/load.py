"""Reading weights straight into (sharded) device arrays.

Each parameter is put together in host buffers that are the shards of the final array: a few rows of a stored tensor
at a time are read, cast, and written to their place. On CPU a buffer then becomes the array without being copied;
elsewhere it is freed once it has been sent. So beside the weights themselves only a few rows are ever in memory.
"""

from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from models.llama.checkpoint import Checkpoint, open_checkpoint
from models.llama.config import LlamaConfig
from models.llama.files import Tensor
from models.llama.init import parameter_shardings
from models.llama.model import LLaMa
from models.llama.names import Layout, is_stacked, layout, parameter_name, tensors_of

_READ_BYTES = 16 * 2**20
_TILE_ROWS = 32  # a transposed copy of more rows at once falls out of the processor's cache
_ALIGNMENT = 64  # bytes; of buffers that jax takes over without a copy on CPU

Bounds = tuple[tuple[int, int], ...]  # start and stop along each axis


class HasVocabulary(Protocol):
    """A tokenizer, as far as it matters here."""

    @property
    def vocab_size(self) -> int: ...


def load_pretrained(
    path: str | Path, *, dtype: jax.typing.DTypeLike | None = jnp.float32, mesh: Mesh | None = None
) -> LLaMa:
    """The network of a checkpoint: a Hugging Face or Meta folder, a `.safetensors` or a llama2.c file.

    `dtype` None keeps the stored type, the widest where tensors differ; float64 becomes float32 unless jax has it
    enabled. On a `mesh` parameters lie as `utils.sharding` has it, otherwise on the default device.

    Raises FileNotFoundError for a missing path, file or part; ValueError, naming file and tensor, for files that are
    damaged, do not fit their config, or describe a network that ours is not, as one with scores in place of logits is
    none, and for weights that the mesh cannot cut.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.scores:
        raise ValueError(f"{path}: a reward model or critic, which gives texts a score and has no next tokens to tell")
    return load_network(checkpoint, dtype=dtype, mesh=mesh)


def load_network(
    checkpoint: Checkpoint, *, dtype: jax.typing.DTypeLike | None = jnp.float32, mesh: Mesh | None = None
) -> LLaMa:
    """The network of an opened checkpoint, without the head that it may have for scores; all else as above."""
    dtype = _stored_dtype(checkpoint) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"weights cannot be {dtype}: choose float32, bfloat16 or float16")
    skeleton = jax.eval_shape(lambda: LLaMa(checkpoint.config, key=jax.random.key(0), dtype=dtype))
    leaves = [(parameter_name(key), leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(skeleton)]
    shardings = [None] * len(leaves) if mesh is None else jax.tree.leaves(parameter_shardings(skeleton, mesh))
    arrays = [_load(checkpoint, name, leaf, sharding) for (name, leaf), sharding in zip(leaves, shardings)]
    return jax.tree.unflatten(jax.tree.structure(skeleton), arrays)


def check_vocabulary(config: LlamaConfig, tokenizer: HasVocabulary) -> None:
    """Raise ValueError if the tokenizer has ids, or names special ones, for which the network has no embedding.

    Looks at `bos_id`, `eos_id` and `stop_ids` where the tokenizer has them.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the network only {config.vocab_size}: "
            "they do not belong together"
        )
    named = [(name, getattr(tokenizer, name, None)) for name in ("bos_id", "eos_id")]
    named += [("stop id", token_id) for token_id in sorted(getattr(tokenizer, "stop_ids", ()))]
    for name, token_id in named:
        if token_id is not None and not 0 <= token_id < config.vocab_size:
            raise ValueError(f"the tokenizer's {name} {token_id} is none of the network's {config.vocab_size} ids")


def _stored_dtype(checkpoint: Checkpoint) -> np.dtype:
    used = {
        checkpoint.tensors[name].dtype
        for parameter, stored in checkpoint.names.items()
        for name in tensors_of(parameter, stored, checkpoint.config)
        if name in checkpoint.tensors
    }
    return jnp.result_type(*(jax.dtypes.canonicalize_dtype(dtype) for dtype in used))


def _load(
    checkpoint: Checkpoint, name: str, abstract: jax.ShapeDtypeStruct, sharding: NamedSharding | None
) -> jax.Array:
    """One parameter, read layer by layer."""
    shape, stored = abstract.shape, checkpoint.names[name]
    if sharding is None:
        places = [tuple((0, size) for size in shape)]
    else:
        places = [_bounds(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()]
    shards = {place: _aligned([stop - start for start, stop in place], abstract.dtype) for place in places}
    layout_ = layout(name, stored, checkpoint.config)
    for layer, tensor in enumerate(tensors_of(name, stored, checkpoint.config)):
        targets = {place[1:]: shard[layer] for place, shard in shards.items()} if is_stacked(name) else shards
        _fill(targets, checkpoint.tensors[tensor], layout_)
    if sharding is None:
        return jax.block_until_ready(jax.device_put(shards[places[0]], may_alias=True))
    return jax.block_until_ready(
        jax.make_array_from_callback(shape, sharding, lambda index: shards[_bounds(index, shape)])
    )


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape))


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array of unset numbers that begins at a multiple of _ALIGNMENT."""
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _fill(targets: dict[Bounds, np.ndarray], tensor: Tensor, layout_: Layout) -> None:
    """Read a tensor, some rows at a time, into those parts of its parameter's layer that are wanted."""
    axis, per = layout_.cut_axis, layout_.rows_per_cut
    step = max(1, tensor.rows_within(_READ_BYTES) // per)
    for first in range(0, tensor.shape[0] // per, step):
        last = min(first + step, tensor.shape[0] // per)
        wanted = {b: target for b, target in targets.items() if b[axis][0] < last and first < b[axis][1]}
        if not wanted:
            continue
        part = layout_.from_stored(tensor.read(first * per, last * per))
        for bounds, target in wanted.items():
            low, high = max(first, bounds[axis][0]), min(last, bounds[axis][1])
            source = tuple(slice(*pair) for pair in bounds)
            source = _at(source, axis, low - first, high - first)
            own = _at((slice(None),) * target.ndim, axis, low - bounds[axis][0], high - bounds[axis][0])
            _copy(target[own], part[source], axis, max(1, _TILE_ROWS // per))


def _at(index: tuple[slice, ...], axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*index[:axis], slice(start, stop), *index[axis + 1 :])


def _copy(target: np.ndarray, source: np.ndarray, axis: int, step: int) -> None:
    """target[...] = source, cast, `step` indices of `axis` at a time.

    Equal types are copied and bfloat16 is widened as whole numbers, which numpy does several times faster.
    """
    shift = 0
    if target.dtype == source.dtype:
        target, source = (a.view(f"u{a.itemsize}") for a in (target, source))
    elif source.dtype == ml_dtypes.bfloat16 and target.dtype == np.float32:
        target, source, shift = target.view(np.uint32), source.view(np.uint16), 16
    for start in range(0, source.shape[axis], step):
        tile = _at((slice(None),) * source.ndim, axis, start, start + step)
        target[tile] = source[tile]
        if shift:
            target[tile] <<= shift
