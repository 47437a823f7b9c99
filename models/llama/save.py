"""Writing checkpoints that Hugging Face's `transformers` reads."""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.config import config_to_hf
from models.llama.files import read_json, write_safetensors
from models.llama.model import LLaMa
from models.llama.names import HUGGING_FACE, SCORE, Layout, is_stacked, layout, parameter_name, tensors_of
from utils.distributed import exchange, is_first, on_host, spans_processes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_INDEX = "model.safetensors.index.json"
_OUR_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_PARTIAL = ".partial"
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class _Source:
    """Where the numbers of a tensor to be written come from; `layer` None is a parameter outside the blocks."""

    array: jax.Array
    layer: int | None
    layout: Layout
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.layout.stored_shape) * self.dtype.itemsize

    def value(self) -> np.ndarray:
        return self.layout.to_stored(on_host(self.array, self.layer)).astype(self.dtype, copy=False)


def save_pretrained(
    model: LLaMa,
    path: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that `transformers` and `load_pretrained` read: safetensors, `config.json`, tokenizer files.

    `dtype` None keeps that of the parameters. `tokenizer_from` is a folder whose tokenizer files are copied and whose
    configs give the ids of the special tokens, which are null otherwise. A file holds at most `max_shard_bytes` of
    tensors, or a single larger one.

    Everything is first written beside its final name and `config.json` comes last, so a save that is interrupted
    leaves no folder that looks whole. An earlier save in the folder is replaced: its weights always, its tokenizer
    files where `tokenizer_from` is another folder; with None, tokenizer files that are there stay. Needs host memory
    for one tensor. Of a network that lies on the devices of several processes, each of them calls this, to gather its
    tensors one by one, and process 0 writes.

    Raises ValueError for a network that no Hugging Face architecture describes or that has adapters, NotADirectoryError
    where a path is a file, FileNotFoundError where `tokenizer_from` is not there.
    """
    if model.blocks.adapters is not None:
        raise ValueError("the network has adapters: write them with save_peft, or merge_lora first")
    config = config_to_hf(model.config) | token_ids(tokenizer_from)
    write_checkpoint(model, config, path, dtype=dtype, tokenizer_from=tokenizer_from, max_shard_bytes=max_shard_bytes)


def write_checkpoint(
    model: Any,
    config: Mapping[str, Any],
    path: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None,
    tokenizer_from: str | Path | None,
    max_shard_bytes: int,
    tokenizer_config: Mapping[str, Any] = _NOTHING,
) -> None:
    """Write a network, or one with a head, with that `config.json`, as `save_pretrained` says.

    `tokenizer_config` is laid over the `tokenizer_config.json` that is copied. The type that `config.json` states is
    the network's own: a head may be wider.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; a checkpoint is a folder")
    changes = {"tokenizer_config.json": tokenizer_config}
    copied = {file: changes.get(file.name, _NOTHING) for file in _tokenizer_files(tokenizer_from)}
    sources = _sources(model, None if dtype is None else jnp.dtype(dtype))
    stated = jnp.result_type(*(source.dtype for tensor, source in sources.items() if tensor != SCORE.name))
    config = {**config, "torch_dtype": stated.name}
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, not {max_shard_bytes}")

    if shared := spans_processes(model):
        exchange()  # nobody is still reading what is replaced
    if shared and not is_first():
        _write_weights(None, sources, max_shard_bytes)
        exchange()
        return
    _write(path, sources, config, copied, tokenizer_from, max_shard_bytes)
    if shared:
        exchange()


def _write(
    path: Path,
    sources: Mapping[str, _Source],
    config: Mapping[str, Any],
    copied: Mapping[Path, Mapping[str, Any]],
    tokenizer_from: str | Path | None,
    max_shard_bytes: int,
) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for stale in path.glob(f"*{_PARTIAL}"):
        if _is_ours(stale.name.removesuffix(_PARTIAL)):
            stale.unlink()
    names = _write_weights(path, sources, max_shard_bytes)
    for file, changes in copied.items():
        if changes:
            _write_json(path / (file.name + _PARTIAL), read_json(file) | changes)
        else:
            shutil.copyfile(file, path / (file.name + _PARTIAL))
        names.append(file.name)
    _write_json(path / f"config.json{_PARTIAL}", config)
    for name in (*names, "config.json"):
        _flush(path / (name + _PARTIAL))

    (path / "config.json").unlink(missing_ok=True)
    other_tokenizer = tokenizer_from is not None and not path.samefile(tokenizer_from)
    for old in path.iterdir():
        if _OUR_WEIGHTS.fullmatch(old.name) or (other_tokenizer and old.name in TOKENIZER_FILES):
            old.unlink()
    for name in (*names, "config.json"):
        os.replace(path / (name + _PARTIAL), path / name)


def _is_ours(name: str) -> bool:
    """Whether a save may write a file of that name."""
    return name == "config.json" or name in TOKENIZER_FILES or _OUR_WEIGHTS.fullmatch(name) is not None


def _flush(path: Path) -> None:
    """Wait until a file is on the disk, so that a crash after its renaming cannot leave it empty."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sources(model: Any, dtype: np.dtype | None) -> dict[str, _Source]:
    """All tensors by name, in the order of the layers."""
    sources, places = {}, {**HUGGING_FACE, "score_D": SCORE}
    for key, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = parameter_name(key)
        stored = places[name]
        own_layout = layout(name, stored, model.config)
        for layer, tensor in enumerate(tensors_of(name, stored, model.config)):
            sources[tensor] = _Source(leaf, layer if is_stacked(name) else None, own_layout, dtype or leaf.dtype)
    layers = model.config.num_layers
    return dict(sorted(sources.items(), key=lambda item: layers if item[1].layer is None else item[1].layer))


def _write_weights(path: Path | None, sources: Mapping[str, _Source], max_shard_bytes: int) -> list[str]:
    """Write the weights under partial names, or with None only gather them; returns the final names."""
    shards: list[list[str]] = [[]]
    filled = 0
    for tensor, source in sources.items():
        if shards[-1] and filled + source.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += source.num_bytes
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards):
        entries = {tensor: (sources[tensor].dtype, sources[tensor].layout.stored_shape) for tensor in shard}
        file = Path(os.devnull) if path is None else path / (name + _PARTIAL)
        write_safetensors(file, entries, lambda tensor: sources[tensor].value(), metadata={"format": "pt"})
    if count > 1 and path is not None:
        total = sum(source.num_bytes for source in sources.values())
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        _write_json(path / (_INDEX + _PARTIAL), {"metadata": {"total_size": total}, "weight_map": weight_map})
        names.append(_INDEX)
    return names


def _tokenizer_files(folder: str | Path | None) -> list[Path]:
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder to take a tokenizer from")
    return [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]


def token_ids(folder: str | Path | None) -> dict[str, Any]:
    """What the configs of a folder say about the ids of special tokens, as keys of `config.json`."""
    ids: dict[str, Any] = dict.fromkeys(_TOKEN_IDS)
    if folder is not None:
        for name in ("config.json", "generation_config.json"):
            if (Path(folder) / name).is_file():
                found = read_json(Path(folder) / name)
                ids |= {key: found[key] for key in _TOKEN_IDS if found.get(key) is not None}
    return ids


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
