"""The parts of a run, each made as the settings say: devices, tokenizer, network, weights, trainer."""

import dataclasses
import hashlib
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from data.characters import write_character_tokenizer
from data.datasets import texts
from models.llama import (
    PRESETS,
    LLaMa,
    LlamaConfig,
    check_vocabulary,
    load_config,
    load_pretrained,
    load_tokenizer,
)
from models.llama.config import config_to_hf
from models.llama.init import random_model
from models.llama.lora import add_lora
from models.llama.save import TOKENIZER_FILES
from models.llama.scalar import HeadParam
from models.llama.tokenizer import Tokenizer
from trainers.optimizers import make_optimizer
from trainers.settings import CommonConfig, MeshConfig, ModelConfig
from utils import sharding
from utils.distributed import exchange

CHARACTERS = "characters"  # the tokenizer that is made of the training text


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of all devices. Raises ValueError where the settings do not fit them."""
    return sharding.make_mesh(config.shape(jax.device_count()))


def check_batch(batch_size: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Raise ValueError where the rows of a micro-batch cannot be cut over the mesh."""
    rows, data, fsdp = batch_size // accumulation_steps, mesh.shape["data"], mesh.shape["fsdp"]
    if rows % (data * fsdp):
        raise ValueError(
            f"batch_size {batch_size} / accumulation_steps {accumulation_steps}, {rows} rows, cannot be cut evenly "
            f"over data x fsdp, {data} x {fsdp} devices"
        )


def trainer_options(config: CommonConfig, num_steps: int) -> dict[str, Any]:
    """The options of `Trainer` that the settings describe."""
    optimizer = make_optimizer(config.optimizer, learning_rate=config.trainer.learning_rate, num_steps=num_steps)
    return dict(
        optimizer=optimizer.transformation,
        learning_rate=optimizer.learning_rate,
        accumulation_steps=config.trainer.accumulation_steps,
        max_grad_norm=config.trainer.max_grad_norm,
        compute_dtype=config.trainer.compute_dtype,
        trainable=nnx.Param if config.lora is None else nnx.Any(nnx.LoRAParam, HeadParam),
    )


def make_model(config: CommonConfig, llama: LlamaConfig, mesh: Mesh) -> LLaMa:
    """The checkpoint's weights or random ones, and adapters where the settings want some."""
    if config.model.checkpoint is None:
        return make_random_model(config, llama, mesh)
    model = load_pretrained(config.model.checkpoint, dtype=jnp.dtype(config.model.dtype), mesh=mesh)
    return adapted(model, config)


def make_random_model(config: CommonConfig, llama: LlamaConfig, mesh: Mesh) -> LLaMa:
    """The same with random weights whatever the settings say: something to restore a checkpoint into."""
    key = jax.random.key(config.trainer.seed)
    model = random_model(llama, key=key, dtype=jnp.dtype(config.model.dtype), mesh=mesh)
    return adapted(model, config)


def adapted(model: LLaMa, config: CommonConfig) -> LLaMa:
    """The network with the adapters that the settings want, if any."""
    lora, key = config.lora, jax.random.key(config.trainer.seed)
    return model if lora is None else add_lora(model, lora, key=jax.random.fold_in(key, 1))


def network_config(config: ModelConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """What the network is. Raises ValueError for an unknown preset, and for changes of it that make no network."""
    if config.checkpoint is not None:
        return load_config(config.checkpoint)
    if config.preset not in PRESETS:
        raise ValueError(f"model.preset {config.preset!r} is none of {', '.join(PRESETS)}")
    preset = PRESETS[config.preset]
    known = {field.name for field in dataclasses.fields(preset)} | {"window"}
    if unknown := sorted(set(config.changes) - known):
        raise ValueError(f"model.changes has {', '.join(unknown)}, which is no field of a network's config")
    changes = {"vocab_size": tokenizer.vocab_size, **config.changes}
    layers, window = changes.get("num_layers", preset.num_layers), changes.pop("window", None)
    if "layer_windows" not in changes:
        changes["layer_windows"] = (window,) * layers if isinstance(layers, int) else ()
    return dataclasses.replace(preset, **changes)


def hugging_face_config(llama: LlamaConfig) -> Mapping[str, Any] | None:
    """Its config.json; None for a network that no architecture of Hugging Face's describes."""
    try:
        return config_to_hf(llama)
    except ValueError:
        return None


def tokenizer_path(config: CommonConfig, *, anew: bool) -> Path:
    """Where the tokenizer is. One of the text's characters is made where there is none yet, or `anew`."""
    if config.tokenizer != CHARACTERS:
        path = Path(config.tokenizer or config.model.checkpoint)
        if not config.tokenizer and not path.exists():
            raise FileNotFoundError(f"model.checkpoint {path}: no such file or folder")
        return path if config.tokenizer or path.is_dir() else path.parent
    folder = Path(config.output_dir) / "tokenizer"
    if jax.process_index() == 0 and (anew or not (folder / "tokenizer.json").exists()):
        data = config.data
        write_character_tokenizer(texts(data.train_sources, skip_bad=data.on_bad_row == "skip"), folder)
    exchange()
    return folder


def check_there(setting: str, path: str | Path) -> None:
    """Raise FileNotFoundError, with the name of the setting, for a path where nothing is."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{setting} {path}: no such file or folder")


def check_tokenizer(setting: str, checkpoint: str, tokenizer: Tokenizer) -> None:
    """Raise ValueError where a checkpoint's ids mean something else than the run's; without a tokenizer it is taken."""
    path = Path(checkpoint)
    check_vocabulary(load_config(path), tokenizer)
    try:
        other = load_tokenizer(path if path.is_dir() else path.parent)
    except FileNotFoundError:
        return
    pairs = [(own.encode(string.printable), own.special_tokens) for own in (tokenizer, other)]
    if pairs[0] != pairs[1]:
        raise ValueError(f"{setting} {checkpoint} has another tokenizer than the run: ids mean something else")


def fingerprint(path: Path) -> str:
    """A hash of the files that make up a tokenizer."""
    folder, names = (path, TOKENIZER_FILES) if path.is_dir() else (path.parent, (path.name, *TOKENIZER_FILES))
    files = [folder / sub / name for sub in ("", "original") for name in names]
    content = [(file.name, file.read_bytes()) for file in files if file.is_file()]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def size(tree: Any) -> int:
    """Numbers in all arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
