"""Recognising checkpoints of Hugging Face's, Meta's and llama2.c's layouts and checking that they are whole."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from models.llama.config import LlamaConfig, config_from_hf, gives_scores
from models.llama.files import StoredTensor, Tensor, join, open_indexed, open_safetensors, read_json
from models.llama.llama2c import is_llama2c, open_llama2c, read_header
from models.llama.meta_config import config_from_llama2c, config_from_meta
from models.llama.model import LLaMa
from models.llama.names import HUGGING_FACE, META, SCORE, Layout, Stored, layout, parameter_name, tensors_of
from models.llama.pth import open_pth

_COMPARED_BYTES = 16 * 2**20
_MALFORMED = (TypeError, AttributeError, KeyError, ArithmeticError)  # a config with, say, text for a number
_PART_OF_FOLDER = re.compile(r".*\.pth|pytorch_model.*\.bin|.*\.index\.json")
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, no numbers read yet, that has been found to be whole.

    `names` says which of `tensors` each parameter is; there may be others, to be ignored. With `scores` one of them is
    `SCORE`, the head of a network that has no logits.
    """

    path: Path
    config: LlamaConfig
    tensors: Mapping[str, Tensor]
    names: Mapping[str, Stored]
    scores: bool = False


def load_config(path: str | Path) -> LlamaConfig:
    """The config of a checkpoint, read without its weights as far as its layout allows. Raises as `open_checkpoint`."""
    found = _recognise(Path(path))
    if found.name == "config.json":
        return _config_from_hf(found)[0]
    if found.name == "params.json":
        return _open_meta(found).config
    return config_from_llama2c(read_header(found))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at a path: a Hugging Face or Meta folder, a `.safetensors` or a llama2.c file.

    It may be of a network with scores in place of logits. Raises FileNotFoundError for a missing path, file or part;
    ValueError, naming file and tensor, for files that are damaged, do not fit their config, or describe a network that
    ours is not.
    """
    found = _recognise(Path(path))
    if found.name == "config.json":
        checkpoint = _open_hf(found, Path(path))
    elif found.name == "params.json":
        checkpoint = _open_meta(found)
    else:
        checkpoint = Checkpoint(found, config_from_llama2c(read_header(found)), open_llama2c(found), META)
    _check(checkpoint)
    return checkpoint


def _recognise(path: Path) -> Path:
    """The file that tells the layout: config.json, params.json, or a llama2.c file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file():
        if _PART_OF_FOLDER.fullmatch(path.name):
            raise ValueError(f"{path}: is only a part of a checkpoint; give its folder, {path.parent}")
        if path.suffix != ".safetensors":
            return path
        if not (path.parent / "config.json").is_file():
            raise FileNotFoundError(f"{path.parent / 'config.json'} is not there, and {path.name} needs it")
        return path.parent / "config.json"
    for name in ("config.json", "params.json"):
        if (path / name).is_file():
            return path / name
    candidates = [file for file in sorted(path.glob("*.bin")) if is_llama2c(file)]
    if len(candidates) > 1:
        raise ValueError(f"{path}: several llama2.c files ({', '.join(c.name for c in candidates)}); name one of them")
    if not candidates:
        raise FileNotFoundError(f"{path}: no config.json, params.json or llama2.c file in this folder")
    return candidates[0]


def _config_from_hf(path: Path) -> tuple[LlamaConfig, bool]:
    """The config, and whether the network has scores in place of logits."""
    raw = read_json(path)
    try:
        return config_from_hf(raw), gives_scores(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except _MALFORMED as error:
        raise ValueError(f"{path}: a value of the wrong kind ({error})") from None


def _open_hf(config_path: Path, path: Path) -> Checkpoint:
    (config, scores), folder = _config_from_hf(config_path), config_path.parent
    ways: dict[str, Callable[[Path], dict[str, StoredTensor]]] = {
        "model.safetensors": open_safetensors,
        "model.safetensors.index.json": partial(open_indexed, open_file=open_safetensors),
        "pytorch_model.bin": open_pth,
        "pytorch_model.bin.index.json": partial(open_indexed, open_file=open_pth),
    }
    if path.suffix == ".safetensors" and path.is_file():
        tensors = open_safetensors(path)
    else:
        present = next((name for name in ways if (folder / name).is_file()), None)
        if present is None:
            raise FileNotFoundError(f"{folder}: no weights in this folder; looked for {', '.join(ways)}")
        tensors = ways[present](folder / present)
    names = HUGGING_FACE
    if "embed_tokens.weight" in tensors:
        names = {key: replace(s, name=s.name.removeprefix("model.")) for key, s in names.items()}
    if scores:  # where a training left the output matrix in the file, no score depends on it
        tensors = {name: tensor for name, tensor in tensors.items() if name != names["unembed_DV"].name}
    return Checkpoint(folder, config, _without_copy(tensors, config, names), names, scores)


def _open_meta(params_path: Path) -> Checkpoint:
    params, folder = read_json(params_path), params_path.parent
    parts = sorted(folder.glob("consolidated.*.pth"))
    for number in range(max(1, len(parts))):
        wanted = folder / f"consolidated.{number:02d}.pth"
        if wanted not in parts:
            raise FileNotFoundError(f"{wanted} is not there")
    opened = [open_pth(part) for part in parts]
    for part, tensors in zip(parts, opened):
        if differing := sorted(tensors.keys() ^ opened[0].keys()):
            raise ValueError(f"{part}: does not hold the same tensors as {parts[0].name}: {_some(differing)}")
    try:
        config = config_from_meta(params, {name: [part[name].shape for part in opened] for name in opened[0]})
    except ValueError as error:
        raise ValueError(f"{params_path}: {error}") from None
    except _MALFORMED as error:
        raise ValueError(f"{params_path}: a value of the wrong kind ({error})") from None
    shapes = {tensor: layout_.stored_shape for _, tensor, layout_ in _expected(config, META)}
    vocabulary = shapes["tok_embeddings.weight"]
    joined = {
        name: join(tuple(part[name] for part in opened), shapes.get(name, vocabulary))
        for name in opened[0]
        if name in shapes or name == "output.weight"
    }
    others = {name: tensor for name, tensor in opened[0].items() if name not in joined}
    if {"output.weight", "tok_embeddings.weight"} <= joined.keys():
        tied = _equal(joined["output.weight"], joined["tok_embeddings.weight"])
        config = replace(config, tie_embeddings=tied)
    return Checkpoint(folder, config, _without_copy({**joined, **others}, config, META), META)


def _without_copy(
    tensors: Mapping[str, Tensor], config: LlamaConfig, names: Mapping[str, Stored]
) -> Mapping[str, Tensor]:
    """The tensors without an output matrix that merely repeats tied embeddings; raises ValueError if it differs."""
    embed, unembed = (tensors.get(names[key].name) for key in ("embed_VD", "unembed_DV"))
    if not config.tie_embeddings or embed is None or unembed is None:
        return tensors
    if not _equal(embed, unembed):
        raise ValueError(
            f"{unembed.path}: tensor {unembed.name!r} differs from {embed.name!r}, though the config ties the two"
        )
    return {name: tensor for name, tensor in tensors.items() if tensor is not unembed}


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same bit for bit; stops reading at the first difference."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    step = min(first.rows_within(_COMPARED_BYTES), second.rows_within(_COMPARED_BYTES))
    return all(
        np.ascontiguousarray(first.read(row, row + step)).tobytes()
        == np.ascontiguousarray(second.read(row, row + step)).tobytes()
        for row in range(0, first.shape[0], step)
    )


def _expected(config: LlamaConfig, names: Mapping[str, Stored]) -> list[tuple[str, str, Layout]]:
    """Parameter, stored tensor and layout of all that the network has."""
    skeleton = jax.eval_shape(lambda: LLaMa(config, key=jax.random.key(0)))
    parameters = [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(skeleton)]
    return [
        (parameter, tensor, layout(parameter, names[parameter], config))
        for parameter in parameters
        for tensor in tensors_of(parameter, names[parameter], config)
    ]


def _check(checkpoint: Checkpoint) -> None:
    """Raise ValueError unless exactly the network's tensors are there, in their shapes and a type of weights."""
    expected = {tensor: layout_ for _, tensor, layout_ in _expected(checkpoint.config, checkpoint.names)}
    if checkpoint.scores:
        expected[SCORE.name] = layout("score_D", SCORE, checkpoint.config)
    if missing := [name for name in expected if name not in checkpoint.tensors]:
        raise ValueError(f"{checkpoint.path}: missing {_some(missing)}")
    unexpected = sorted(n for n in checkpoint.tensors if n not in expected and not _HARMLESS.fullmatch(n))
    if unexpected:
        path = checkpoint.tensors[unexpected[0]].path
        raise ValueError(f"{path}: unexpected {_some(unexpected)}, which this network has no place for")
    for name, layout_ in expected.items():
        tensor = checkpoint.tensors[name]
        if tensor.shape != layout_.stored_shape:
            raise ValueError(
                f"{tensor.path}: tensor {name!r} has shape {tensor.shape}, the config asks for {layout_.stored_shape}"
            )
        _ = tensor.dtype


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(repr(name) for name in names[:3])}{more}"
