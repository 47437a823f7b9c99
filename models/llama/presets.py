"""Configs of known sizes, for random weights: Meta's, and ours from a laptop up."""

from dataclasses import replace

from models.llama.config import LlamaConfig
from utils.rope import Llama3Scaling, RopeScaling


def _preset(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    context: int,
    *,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
    tied: bool = False,
    eps: float = 1e-5,
) -> LlamaConfig:
    """A plain Llama: SiLU-gated, no biases, no windows, heads that divide the width."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        max_position_embeddings=context,
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=tied,
        activation="silu",
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        layer_windows=(None,) * layers,
        initializer_range=0.02,
    )


def _gpt(layers: int, width: int, heads: int) -> LlamaConfig:
    """GPT-3's shapes with Llama's norm and positions: plain GELU layers of four times the width, tied embeddings.

    Source: arXiv:2005.14165, tab. 2.1.
    """
    plain = _preset(layers, width, heads, heads, 4 * width, 50304, 2048, tied=True)
    return replace(plain, activation="gelu", gated=False)


def _stretched(factor: float) -> Llama3Scaling:
    return Llama3Scaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)


PRESETS: dict[str, LlamaConfig] = {
    # Ours, from a test to a workstation.
    "tiny": _preset(8, 128, 4, 1, 256, 512, 512, tied=True),
    "small": _preset(12, 384, 12, 3, 1024, 16000, 1024, tied=True),
    "medium": _preset(20, 640, 16, 4, 2048, 20000, 2048, tied=True),
    "505m": _preset(24, 1280, 20, 5, 3712, 50000, 2048, tied=True),
    "qa": _preset(10, 512, 8, 8, 1376, 16000, 1024, tied=True),
    "gpt-125m": _gpt(12, 768, 12),
    "gpt-350m": _gpt(24, 1024, 16),
    "gpt-760m": _gpt(24, 1536, 16),
    "gpt-1b": _gpt(24, 2048, 16),
    # arXiv:2302.13971, tab. 2
    "llama-7b": _preset(32, 4096, 32, 32, 11008, 32000, 2048, eps=1e-6),
    "llama-13b": _preset(40, 5120, 40, 40, 13824, 32000, 2048, eps=1e-6),
    "llama-33b": _preset(60, 6656, 52, 52, 17920, 32000, 2048, eps=1e-6),
    "llama-65b": _preset(80, 8192, 64, 64, 22016, 32000, 2048),
    # arXiv:2307.09288, tab. 1
    "llama-2-7b": _preset(32, 4096, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": _preset(40, 5120, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": _preset(80, 8192, 64, 8, 28672, 32000, 4096),
    # arXiv:2407.21783, tab. 3, and the checkpoints' config.json
    "llama-3-8b": _preset(32, 4096, 32, 8, 14336, 128256, 8192, theta=5e5),
    "llama-3-70b": _preset(80, 8192, 64, 8, 28672, 128256, 8192, theta=5e5),
    "llama-3.1-8b": _preset(32, 4096, 32, 8, 14336, 128256, 131072, theta=5e5, scaling=_stretched(8.0)),
    "llama-3.1-70b": _preset(80, 8192, 64, 8, 28672, 128256, 131072, theta=5e5, scaling=_stretched(8.0)),
    "llama-3.1-405b": _preset(126, 16384, 128, 8, 53248, 128256, 131072, theta=5e5, scaling=_stretched(8.0)),
    "llama-3.2-1b": _preset(16, 2048, 32, 8, 8192, 128256, 131072, theta=5e5, scaling=_stretched(32.0), tied=True),
    "llama-3.2-3b": _preset(28, 3072, 24, 8, 8192, 128256, 131072, theta=5e5, scaling=_stretched(32.0), tied=True),
    "llama-3.3-70b": _preset(80, 8192, 64, 8, 28672, 128256, 131072, theta=5e5, scaling=_stretched(8.0)),
    # Their checkpoints' config.json
    "tinyllama-1.1b": _preset(22, 2048, 32, 4, 5632, 32000, 2048),
    "smollm2-135m": _preset(30, 576, 9, 3, 1536, 49152, 8192, theta=1e5, tied=True),
    "smollm2-360m": _preset(32, 960, 15, 5, 2560, 49152, 8192, theta=1e5, tied=True),
    "smollm2-1.7b": _preset(24, 2048, 32, 32, 8192, 49152, 8192, theta=130000.0, tied=True),
}
