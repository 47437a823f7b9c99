"""What a checkpoint decides about a network, and its translation from and to Hugging Face's `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.ops import ACTIVATIONS
from utils.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    is_finite,
    yarn_attention_factor,
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The architecture of a LLaMA-family network. A checkpoint decides every field, so none has a default.

    `layer_windows` has an entry for each layer: None for full attention, w for sliding-window attention in which a
    token sees itself and the w - 1 tokens before it. `gated` tells a gated feed-forward layer from a plain one.
    `out_bias` is that of the attention output, `mlp_bias` that of all feed-forward matrices.
    `initializer_range` is the standard deviation of random weights.

    Raises ValueError where fields do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_embeddings: bool
    activation: str
    gated: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_windows: tuple[int | None, ...]
    initializer_range: float

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            if not is_finite(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a positive finite number, not {getattr(self, name)!r}")
        if not is_finite(self.initializer_range) or self.initializer_range < 0:
            raise ValueError(f"initializer_range must be a finite number from 0, not {self.initializer_range!r}")
        for name in ("tie_embeddings", "gated", "qkv_bias", "out_bias", "mlp_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but rotary embedding turns pairs")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if len(self.layer_windows) != self.num_layers:
            raise ValueError(f"layer_windows has {len(self.layer_windows)} entries for {self.num_layers} layers")
        for window in self.layer_windows:
            if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
                raise ValueError(f"a sliding window must be a whole number of at least 1 token: {self.layer_windows}")

    @property
    def max_text_length(self) -> int:
        """Tokens that positions are made for, RoPE scaling included."""
        if isinstance(self.rope_scaling, DynamicScaling | YarnScaling):
            stretched = int(self.rope_scaling.factor * self.rope_scaling.original_context)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings


# Of the same network in `transformers`: what a missing key of config.json means. Only keys that older files leave out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
    "LlamaModel": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# Of the same networks with scores of texts in place of logits.
_SCALAR_ARCHITECTURES = {
    "LlamaForSequenceClassification": "llama",
    "MistralForSequenceClassification": "mistral",
    "Qwen2ForSequenceClassification": "qwen2",
    "Qwen3ForSequenceClassification": "qwen3",
}

_ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_READ_KEYS = frozenset(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters "
    "tie_word_embeddings hidden_act attention_bias mlp_bias sliding_window use_sliding_window max_window_layers "
    "layer_types initializer_range num_labels id2label".split()
)

_KINDS: dict[str, tuple[str, ...]] = {
    "an object": ("rope_scaling", "rope_parameters", "quantization_config", "id2label"),
    "a list of strings": ("architectures", "layer_types"),
    "a string": ("model_type", "hidden_act"),
    "true or false": ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    "a number": ("rms_norm_eps", "rope_theta", "initializer_range"),
    "a whole number": ("sliding_window", "max_window_layers"),
    "a positive whole number": (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "num_labels",
    ),
}

# Keys of config.json that say nothing about the forward pass of a decoder: bookkeeping, training-time
# settings, and generation defaults (token ids are read with the tokenizer).
_HARMLESS_KEYS = frozenset(
    "_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash transformers_version auto_map "
    "transformers.js_config torch_dtype dtype use_cache return_dict output_attentions output_hidden_states "
    "attention_dropout hidden_dropout classifier_dropout label2id problem_type finetuning_task "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id forced_bos_token_id "
    "forced_eos_token_id tokenizer_class prefix task_specific_params pretraining_tp use_mrope rope_interleaved "
    "is_llama_config unsloth_fixed unsloth_version chunk_size_feed_forward gradient_checkpointing "
    "attn_implementation _flash_attn_2_enabled max_sequence_length keys_to_ignore_at_inference "
    "is_encoder_decoder is_decoder is_composition torchscript do_sample temperature top_k top_p min_length max_length "
    "num_beams num_return_sequences repetition_penalty length_penalty no_repeat_ngram_size early_stopping "
    "bad_words_ids suppress_tokens begin_suppress_tokens diversity_penalty num_beam_groups typical_p "
    "encoder_no_repeat_ngram_size remove_invalid_values exponential_decay_length_penalty return_dict_in_generate "
    "output_scores use_bfloat16 pruned_heads tf_legacy_loss".split()
)


def config_from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """The config that a Hugging Face `config.json`, as parsed, describes (classic keys and those of transformers 5).

    That of a network that `gives_scores` has tied embeddings, as there is no output matrix. Raises ValueError for an
    unsupported architecture, quantised weights, a missing key, and any key that is not known to leave the forward pass
    alone, and as `gives_scores`.
    """
    _check_kinds(raw)
    family = _family(raw)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unnamed")
        raise ValueError(f"quantised weights (quant_method {method!r}) are not supported: use unquantised ones")
    # A key that is switched off (false, 0, null, empty) changes nothing, whatever it would mean if it were on.
    unknown = sorted(k for k, v in raw.items() if k not in _READ_KEYS | _HARMLESS_KEYS and v)
    if unknown:
        raise ValueError(f"config.json has keys that this {family} network does not implement: {', '.join(unknown)}")

    values = _DEFAULTS[family] | {key: value for key, value in raw.items() if value is not None}
    if "sliding_window" in raw and raw["sliding_window"] is None:
        values["sliding_window"] = None
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if key not in values
    ]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if values.get("hidden_act", "silu") not in _ACTIVATION_NAMES:
        raise ValueError(f"hidden_act {values['hidden_act']!r} is none of {', '.join(_ACTIVATION_NAMES)}")
    num_heads = values["num_attention_heads"]
    if "head_dim" not in values and values["hidden_size"] % num_heads:
        raise ValueError(f"hidden_size {values['hidden_size']} is not a multiple of num_attention_heads {num_heads}")
    rope_theta, rope_scaling = _rope_from_hf(values)
    attention_bias = bool(values.get("attention_bias", False))
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads", num_heads),
        head_dim=values.get("head_dim", values["hidden_size"] // num_heads),
        max_position_embeddings=values["max_position_embeddings"],
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=gives_scores(raw) or values.get("tie_word_embeddings", False),
        activation=_ACTIVATION_NAMES[values.get("hidden_act", "silu")],
        gated=True,
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=family != "qwen2" and attention_bias,
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        layer_windows=_windows_from_hf(family, values),
        initializer_range=values.get("initializer_range", 0.02),
    )


def gives_scores(raw: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a network with a score of a text in place of logits.

    Raises ValueError for several labels; without a word about them there are two, as in transformers.
    """
    name = next(iter(raw.get("architectures") or ()), None)
    if name not in _SCALAR_ARCHITECTURES:
        return False
    labels = len(raw.get("id2label") or ()) or raw.get("num_labels") or 2
    if labels != 1:
        raise ValueError(f"{name} of {labels} labels is not supported: a reward model or critic has 1")
    return True


def _check_kinds(raw: Mapping[str, Any]) -> None:
    """Raise ValueError where a key that is read has a value of the wrong kind; null counts as not stated."""
    for kind, keys in _KINDS.items():
        for key in keys:
            if raw.get(key) is not None and not _is_kind(raw[key], kind):
                raise ValueError(f"{key} must be {kind}, not {raw[key]!r:.80}")


def _is_kind(value: Any, kind: str) -> bool:
    match kind:
        case "an object":
            return isinstance(value, Mapping)
        case "a list of strings":
            return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        case "a string":
            return isinstance(value, str)
        case "true or false":
            return isinstance(value, bool)
        case "a number":
            return is_finite(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and (value > 0 or kind == "a whole number")


def config_to_hf(config: LlamaConfig, *, scores: bool = False) -> dict[str, Any]:
    """The `config.json` of the Hugging Face architecture that computes the same, with `scores` in place of logits.

    Raises ValueError where none of llama, mistral, qwen2 and qwen3 does.
    """
    family = _family_of(config)
    scaling, context = config.rope_scaling, config.max_position_embeddings
    if isinstance(scaling, DynamicScaling) and scaling.original_context != context:
        raise ValueError(
            f"dynamic scaling of original_context {scaling.original_context} in a network of max_position_embeddings "
            f"{context}: config.json has only one number for both"
        )
    windows = {window for window in config.layer_windows if window is not None}
    names = _SCALAR_ARCHITECTURES if scores else _ARCHITECTURES
    architecture = {v: k for k, v in reversed(names.items())}[family]
    raw: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "initializer_range": config.initializer_range,
    }
    if family in ("llama", "qwen3"):
        raw["attention_bias"] = config.qkv_bias
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if family == "mistral":
        raw["sliding_window"] = config.layer_windows[0]
    if family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = bool(windows)
        raw["sliding_window"] = next(iter(windows), None)
        raw["max_window_layers"] = config.num_layers
        raw["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in config.layer_windows]
    if scores:
        raw |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return raw


def _family(raw: Mapping[str, Any]) -> str:
    """llama, mistral, qwen2 or qwen3, by `architectures`, else by `model_type`."""
    names = raw.get("architectures") or []
    if names:
        known = _ARCHITECTURES | _SCALAR_ARCHITECTURES
        if names[0] not in known:
            raise ValueError(f"architecture {names[0]} is not supported; known: {', '.join(known)}")
        return known[names[0]]
    if raw.get("model_type") not in _DEFAULTS:
        raise ValueError(f"model_type {raw.get('model_type')!r} is not supported; known: {', '.join(_DEFAULTS)}")
    return raw["model_type"]


def _family_of(config: LlamaConfig) -> str:
    """The architecture that has all that the config asks for, in the order of plainness."""
    same_window = len(set(config.layer_windows)) == 1
    one_window = len({w for w in config.layer_windows if w is not None}) <= 1
    no_window = same_window and config.layer_windows[0] is None
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    if config.gated and one_window:
        if not config.qk_norm and no_window and config.qkv_bias == config.out_bias:
            return "llama"
        if not config.qk_norm and same_window and not any(biases):
            return "mistral"
        if not config.qk_norm and biases == (True, False, False):
            return "qwen2"
        if config.qk_norm and config.qkv_bias == config.out_bias and not config.mlp_bias:
            return "qwen3"
    raise ValueError(
        "no Hugging Face architecture of llama, mistral, qwen2, qwen3 has this combination: "
        f"gated={config.gated}, qkv_bias={config.qkv_bias}, out_bias={config.out_bias}, mlp_bias={config.mlp_bias}, "
        f"qk_norm={config.qk_norm}, windows={sorted({str(w) for w in config.layer_windows})}"
    )


def _windows_from_hf(family: str, values: Mapping[str, Any]) -> tuple[int | None, ...]:
    num_layers, window = values["num_hidden_layers"], values.get("sliding_window")
    if family in ("qwen2", "qwen3") and not values.get("use_sliding_window", False):
        window = None
    if family == "llama":
        window = None  # transformers' Llama has no windows, so a stray key means nothing
    types = values.get("layer_types")
    if types is None:
        first = values.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types {sorted(unknown)} are not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rope_from_hf(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = _number("rope_theta", rope.pop("rope_theta", values.get("rope_theta", 10000.0)))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    context = values["max_position_embeddings"]
    original = rope.pop("original_max_position_embeddings", context)
    try:
        match kind:
            case "default":
                scaling = None
            case "linear":
                scaling = LinearScaling(factor=_number("factor", rope.pop("factor")))
            case "dynamic":
                scaling = DynamicScaling(factor=_number("factor", rope.pop("factor")), original_context=context)
            case "llama3":
                scaling = Llama3Scaling(
                    factor=_number("factor", rope.pop("factor")),
                    low_freq_factor=_number("low_freq_factor", rope.pop("low_freq_factor")),
                    high_freq_factor=_number("high_freq_factor", rope.pop("high_freq_factor")),
                    original_context=original,
                )
            case "yarn":
                scaling = _yarn_from_hf(rope, original, context)
            case _:
                raise ValueError(f"rope_type {kind!r} is not supported; known: default, linear, dynamic, llama3, yarn")
    except KeyError as error:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {error}") from None
    if left := sorted(k for k, v in rope.items() if v is not None):
        raise ValueError(f"rope_scaling of type {kind!r} has unknown keys: {', '.join(left)}")
    return theta, scaling


def _number(name: str, value: Any) -> float:
    """A value as a float; raises ValueError for anything but a finite number that fits."""
    try:
        if is_finite(value):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(f"{name} must be a finite number, not {value!r:.80}")


def _yarn_from_hf(rope: dict[str, Any], original: int, context: int) -> YarnScaling:
    factor = rope.pop("factor")
    if factor is None:
        factor = context / (_number("original_max_position_embeddings", original) or 1)  # YarnScaling refuses the 0
    factor = _number("factor", factor)
    mscale, mscale_all_dim = (_number(key, rope.pop(key, None) or 0) for key in ("mscale", "mscale_all_dim"))
    attention_factor = rope.pop("attention_factor", None)
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor, mscale, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=_number("beta_fast", rope.pop("beta_fast", None) or 32),
        beta_slow=_number("beta_slow", rope.pop("beta_slow", None) or 1),
        attention_factor=_number("attention_factor", attention_factor),
        truncate=rope.pop("truncate", True),
    )


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case DynamicScaling():
            return {"rope_type": "dynamic", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context,
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_context,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
