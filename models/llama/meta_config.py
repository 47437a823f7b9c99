"""What Meta's `params.json` and the header of a llama2.c file say about a network."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.llama.config import LlamaConfig
from models.llama.llama2c import Llama2cHeader
from utils.rope import Llama3Scaling

# `multiple_of` and `ffn_dim_multiplier` only round the feed-forward width, which the weights tell.
_READ_KEYS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "use_scaled_rope"),
    *("rope_scaling_factor", "max_seq_len", "multiple_of", "ffn_dim_multiplier", "max_batch_size"),
}
_CONTEXTS = {500000.0: 8192, 1000000.0: 16384}  # Llama 3 and Code Llama, by rope_theta


def config_from_meta(params: Mapping[str, Any], shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> LlamaConfig:
    """The config that a `params.json`, as parsed, and the shapes of the stored tensors describe.

    `shapes` has for each tensor its shape in each model-parallel part. Where the file states no context length it is
    that of the released models; embeddings count as tied where no output matrix is stored.

    Raises ValueError for a missing key or tensor, and for any key that would change the forward pass.
    """
    if unknown := sorted(key for key, value in params.items() if key not in _READ_KEYS and value):
        raise ValueError(f"params.json has keys that this network does not implement: {', '.join(unknown)}")
    for key in ("dim", "n_layers", "n_heads"):
        if type(params.get(key)) is not int or params[key] < 1:
            raise ValueError(f"params.json: {key} must be a positive whole number, not {params.get(key)!r}")
    dim, num_heads, theta = params["dim"], params["n_heads"], float(params.get("rope_theta") or 10000.0)
    if dim % num_heads:
        raise ValueError(f"params.json: dim {dim} is not a multiple of n_heads {num_heads}")
    scaled = bool(params.get("use_scaled_rope"))
    return LlamaConfig(
        vocab_size=_vocab_size(params, shapes),
        hidden_size=dim,
        intermediate_size=_rows(shapes, "layers.0.feed_forward.w1.weight"),
        num_layers=params["n_layers"],
        num_heads=num_heads,
        num_kv_heads=params.get("n_kv_heads") or num_heads,
        head_dim=dim // num_heads,
        max_position_embeddings=params.get("max_seq_len") or (131072 if scaled else _CONTEXTS.get(theta, 4096)),
        rms_norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=_scaling(params) if scaled else None,
        tie_embeddings="output.weight" not in shapes,
        **_plain(params["n_layers"]),
    )


def config_from_llama2c(header: Llama2cHeader) -> LlamaConfig:
    """The config of a llama2.c checkpoint, whose norm epsilon and rotary base the format fixes."""
    return LlamaConfig(
        vocab_size=header.vocab_size,
        hidden_size=header.hidden_size,
        intermediate_size=header.intermediate_size,
        num_layers=header.num_layers,
        num_heads=header.num_heads,
        num_kv_heads=header.num_kv_heads,
        head_dim=header.hidden_size // header.num_heads,
        max_position_embeddings=header.context,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_embeddings=header.tied,
        **_plain(header.num_layers),
    )


def _plain(num_layers: int) -> dict[str, Any]:
    """What all of Meta's networks have in common."""
    return {
        "activation": "silu",
        "gated": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "layer_windows": (None,) * num_layers,
        "initializer_range": 0.02,
    }


def _scaling(params: Mapping[str, Any]) -> Llama3Scaling:
    """The scaling of Llama 3.1 and 3.2, whose factor params.json seldom states.

    Source: the config.json of the models on Hugging Face, 32 for Llama 3.2 1B and 3B (dim 2048 and 3072), else 8.
    """
    factor = float(params.get("rope_scaling_factor") or (32 if params["dim"] <= 3072 else 8))
    return Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)


def _vocab_size(params: Mapping[str, Any], shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> int:
    """As stated, or if that is -1 as stored: the output matrix is cut by rows, the embeddings by rows or by columns."""
    if params.get("vocab_size", -1) != -1:
        return params["vocab_size"]
    if "output.weight" in shapes:
        return _rows(shapes, "output.weight")
    parts = shapes.get("tok_embeddings.weight", ())
    by_columns = len(parts) > 1 and all(part[-1:] != (params["dim"],) for part in parts)
    return _rows({"tok_embeddings.weight": parts[:1] if by_columns else parts}, "tok_embeddings.weight")


def _rows(shapes: Mapping[str, Sequence[tuple[int, ...]]], name: str) -> int:
    if not shapes.get(name):
        raise ValueError(f"the tensor {name!r} is missing")
    return sum(part[0] for part in shapes[name] if part)
