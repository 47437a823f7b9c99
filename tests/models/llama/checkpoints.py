"""Tiny random networks, and writers of checkpoint layouts that are independent of the code under test."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.llama.config import LlamaConfig
from models.llama.model import LLaMa
from utils.rope import Llama3Scaling, YarnScaling

TINY = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_embeddings=False,
    activation="silu",
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    layer_windows=(None,) * 3,
    initializer_range=0.02,
)

FAMILIES = {
    "mha": replace(TINY, num_kv_heads=4),
    "gqa-tied": replace(TINY, tie_embeddings=True),
    "mqa-wide-heads": replace(TINY, num_kv_heads=1, head_dim=16),
    "all-biases": replace(TINY, qkv_bias=True, out_bias=True, mlp_bias=True),
    "mistral-window": replace(TINY, layer_windows=(5,) * 3),
    "qwen2": replace(TINY, qkv_bias=True),
    "qwen2-late-window": replace(TINY, qkv_bias=True, layer_windows=(None, 5, 5), tie_embeddings=True),
    "qwen3": replace(TINY, qk_norm=True, tie_embeddings=True),
    "llama3-rope": replace(
        TINY,
        rope_theta=500.0,
        rope_scaling=Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16),
    ),
    "yarn-rope": replace(
        TINY,
        rope_theta=500.0,
        rope_scaling=YarnScaling(
            factor=4.0, original_context=16, beta_fast=32.0, beta_slow=1.0, attention_factor=1.2, truncate=True
        ),
    ),
}


def random_model(config: LlamaConfig, *, seed: int = 0, dtype: Any = jnp.float32) -> LLaMa:
    """A network none of whose parameters are zero or one, norms and biases included."""
    rng = np.random.default_rng(seed)
    model = LLaMa(config, key=jax.random.key(seed), dtype=dtype)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), dtype), model)


def assert_same_weights(left: LLaMa, right: LLaMa) -> None:
    """Equal parameters, bit for bit and in the same places."""
    pairs = (dict(jax.tree_util.tree_leaves_with_path(model)) for model in (left, right))
    ours, theirs = ({jax.tree_util.keystr(path): leaf for path, leaf in pair.items()} for pair in pairs)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[name]), err_msg=name)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows of Hugging Face's order in Meta's: the two halves of each head shuffled together."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def meta_tensors(tensors: Mapping[str, np.ndarray], config: LlamaConfig) -> dict[str, np.ndarray]:
    """Hugging Face tensors under Meta's names and in Meta's order."""
    inner = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    outer = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    renamed = {}
    for name, value in tensors.items():
        stem = name.removesuffix(".weight")
        if stem in outer:
            renamed[f"{outer[stem]}.weight"] = value
            continue
        _, _, layer, own = stem.split(".", 3)
        heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}.get(own)
        renamed[f"layers.{layer}.{inner[own]}.weight"] = value if heads is None else interleaved(value, heads)
    return renamed


def meta_params(config: LlamaConfig, **changes: Any) -> dict[str, Any]:
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": 8,
        "norm_eps": config.rms_norm_eps,
    }
    return params | changes


def split_parts(tensors: Mapping[str, np.ndarray], parts: int, *, embed_axis: int) -> list[dict[str, np.ndarray]]:
    """Model-parallel parts: Llama 1 and 2 cut the embeddings by columns (axis 1), Llama 3 by rows (axis 0)."""
    result: list[dict[str, np.ndarray]] = [{} for _ in range(parts)]
    for name, value in tensors.items():
        axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        axis = embed_axis if name.startswith("tok_embeddings") else axis
        pieces = [value] * parts if value.ndim == 1 else np.split(value, parts, axis=axis)
        for part, piece in zip(result, pieces):
            part[name] = piece
    return result


def llama2c_bytes(tensors: Mapping[str, np.ndarray], config: LlamaConfig) -> bytes:
    """A llama2.c file of version 0 of Meta-named tensors."""
    c = config
    vocab = c.vocab_size if c.tie_embeddings else -c.vocab_size
    sizes = (c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads, vocab)
    out = [struct.pack("<7i", *sizes, c.max_position_embeddings), tensors["tok_embeddings.weight"].tobytes()]
    for name in (
        *("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ):
        out += [tensors[f"layers.{layer}.{name}.weight"].tobytes() for layer in range(c.num_layers)]
    out.append(tensors["norm.weight"].tobytes())
    out.append(np.full(c.max_position_embeddings * c.head_dim, 7, np.float32).tobytes())
    if not c.tie_embeddings:
        out.append(tensors["output.weight"].tobytes())
    return b"".join(out)


class _Global:
    """Pickled as a name in a module that need not be there."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Call:
    def __init__(self, function: _Global, *args: Any):
        self.function, self.args = function, args


class _Pickler(pickle._Pickler):  # the one written in Python, which lets a name be written without importing it
    """Writes what `torch.save` writes without PyTorch: names of its functions, and storages as persistent ids."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)

    def persistent_id(self, obj: Any) -> Any:
        return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
        elif isinstance(obj, tuple) and obj[:1] == ("storage",):
            self._save_elements(obj)
            self.write(pickle.BINPERSID)
        else:
            super().save(obj, save_persistent_id)

    def _save_elements(self, items: tuple[Any, ...]) -> None:
        self.write(pickle.MARK)
        for item in items:
            self.save(item)
        self.write(pickle.TUPLE)


def stored(kind: str, key: str, count: int) -> tuple[Any, ...]:
    """A reference to a storage, as `torch.save` writes it."""
    return ("storage", _Global("torch", kind), key, "cpu", count)


def rebuilt(storage: Any, offset: Any, shape: Any, strides: Any) -> Any:
    """A tensor, as `torch.save` writes it."""
    hooks = _Call(_Global("collections", "OrderedDict"))
    return _Call(_Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, hooks)


def call(module: str, name: str, *args: Any) -> Any:
    """A call of any function, as a pickle writes it."""
    return _Call(_Global(module, name), *args)


def name_of(module: str, name: str) -> Any:
    """A name in a module, as a pickle writes it."""
    return _Global(module, name)


def pickled(value: Any) -> bytes:
    out = io.BytesIO()
    _Pickler(out).dump(value)
    return out.getvalue()


def write_pth(
    path: Path, program: bytes, storages: Mapping[str, bytes], *, compression: int = zipfile.ZIP_STORED
) -> None:
    """An archive as `torch.save` writes it, of a ready pickle and the bytes of its storages."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file, by the library."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))
