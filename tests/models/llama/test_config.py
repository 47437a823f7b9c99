"""The config: its own checks, and its translation from and to config.json."""

import dataclasses
import math

import pytest

from models.llama.config import LlamaConfig, config_from_hf, config_to_hf
from utils.rope import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
CONFIG = config_from_hf({"architectures": ["LlamaForCausalLM"], **SMALL})


def llama(**changes) -> LlamaConfig:
    return config_from_hf({"architectures": ["LlamaForCausalLM"], **SMALL, **changes})


@pytest.mark.parametrize(
    "changes,names",
    [
        (dict(vocab_size=0), ["vocab_size", "0"]),
        (dict(hidden_size=32.0), ["hidden_size", "32.0"]),
        (dict(num_layers=True), ["num_layers", "True"]),
        (dict(max_position_embeddings=-1), ["max_position_embeddings", "-1"]),
        (dict(rms_norm_eps=0.0), ["rms_norm_eps", "0.0"]),
        (dict(rope_theta=-1.0), ["rope_theta", "-1.0"]),
        (dict(rope_theta=float("nan")), ["rope_theta", "nan"]),
        (dict(rope_theta=float("inf")), ["rope_theta", "inf"]),
        (dict(rope_theta="1e4"), ["rope_theta", "'1e4'"]),
        (dict(rms_norm_eps=float("inf")), ["rms_norm_eps", "inf"]),
        (dict(rms_norm_eps=True), ["rms_norm_eps", "True"]),
        (dict(initializer_range=-0.1), ["initializer_range", "-0.1"]),
        (dict(initializer_range=float("nan")), ["initializer_range", "nan"]),
        (dict(tie_embeddings="false"), ["tie_embeddings", "'false'"]),
        (dict(gated=1), ["gated", "1"]),
        (dict(qkv_bias=None), ["qkv_bias", "None"]),
        (dict(out_bias="no"), ["out_bias", "'no'"]),
        (dict(mlp_bias=0), ["mlp_bias", "0"]),
        (dict(qk_norm=[]), ["qk_norm", "[]"]),
        (dict(layer_windows=(None, 2.5)), ["2.5"]),
        (dict(layer_windows=(True, None)), ["True"]),
        (dict(num_kv_heads=3), ["num_heads 4", "num_kv_heads 3"]),
        (dict(head_dim=7), ["head_dim", "7"]),
        (dict(activation="tanh"), ["'tanh'", "silu"]),
        (dict(layer_windows=(None,)), ["1 entries", "2 layers"]),
        (dict(layer_windows=(None, 0)), ["(None, 0)"]),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes, names):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(CONFIG, **changes)
    assert all(name in str(caught.value) for name in names), caught.value


def test_no_field_has_a_default():
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(LlamaConfig))
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.vocab_size = 1


# What the families' config.json say, apart from names and sizes of no interest. Checked: the values that matter arrive.

_BOOKKEEPING = dict(torch_dtype="bfloat16", transformers_version="4.40.0", use_cache=True, initializer_range=0.02)
_LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_act="silu",
    bos_token_id=1,
    eos_token_id=2,
    pretraining_tp=1,
    rope_scaling=None,
    **_BOOKKEEPING,
)
_LLAMA_3 = dict(_LLAMA, attention_bias=False, attention_dropout=0.0, mlp_bias=False, vocab_size=128256)
_QWEN = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_act="silu", attention_dropout=0.0)
_QWEN |= dict(_BOOKKEEPING, bos_token_id=151643, eos_token_id=151645)


def sizes(layers, width, heads, kv_heads, ffn, context, **more):
    return dict(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        max_position_embeddings=context,
        **more,
    )


def stretched(factor):
    return dict(
        factor=factor,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    )


YARN = YarnScaling(factor=4.0, original_context=100, beta_fast=32.0, beta_slow=1.0, attention_factor=1.0, truncate=True)
LLAMA_3_SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)

REAL = {
    "llama-1": (
        # As the first conversions have it: no kv heads, no rope keys; the old spelling of the class.
        dict(
            architectures=["LLaMAForCausalLM"],
            model_type="llama",
            hidden_act="silu",
            hidden_size=4096,
            intermediate_size=11008,
            initializer_range=0.02,
            max_sequence_length=2048,
            num_attention_heads=32,
            num_hidden_layers=32,
            pad_token_id=-1,
            bos_token_id=0,
            eos_token_id=1,
            rms_norm_eps=1e-6,
            torch_dtype="float16",
            transformers_version="4.27.0.dev0",
            use_cache=True,
            vocab_size=32000,
        ),
        dict(num_kv_heads=32, head_dim=128, rope_theta=10000.0, rope_scaling=None, max_position_embeddings=2048),
    ),
    "llama-2-70b": (
        dict(_LLAMA, **sizes(80, 8192, 64, 8, 28672, 4096), rms_norm_eps=1e-5, vocab_size=32000)
        | dict(tie_word_embeddings=False, pad_token_id=0),
        dict(num_kv_heads=8, head_dim=128, tie_embeddings=False, rms_norm_eps=1e-5),
    ),
    "llama-3-8b": (
        dict(_LLAMA_3, **sizes(32, 4096, 32, 8, 14336, 8192), rms_norm_eps=1e-5, rope_theta=500000.0)
        | dict(bos_token_id=128000, eos_token_id=128001, tie_word_embeddings=False),
        dict(rope_theta=500000.0, rope_scaling=None, vocab_size=128256, qkv_bias=False, mlp_bias=False),
    ),
    "llama-3.1-8b-instruct": (
        dict(_LLAMA_3, **sizes(32, 4096, 32, 8, 14336, 131072), rms_norm_eps=1e-5, rope_theta=500000.0)
        | dict(rope_scaling=stretched(8.0), eos_token_id=[128001, 128008, 128009], tie_word_embeddings=False),
        dict(rope_scaling=LLAMA_3_SCALING, max_position_embeddings=131072),
    ),
    "llama-3.2-1b": (
        dict(_LLAMA_3, **sizes(16, 2048, 32, 8, 8192, 131072), rms_norm_eps=1e-5, rope_theta=500000.0)
        | dict(rope_scaling=stretched(32.0), head_dim=64, tie_word_embeddings=True),
        dict(
            rope_scaling=dataclasses.replace(LLAMA_3_SCALING, factor=32.0),
            head_dim=64,
            tie_embeddings=True,
        ),
    ),
    "llama-3.3-70b-instruct": (
        dict(_LLAMA_3, **sizes(80, 8192, 64, 8, 28672, 131072), rms_norm_eps=1e-5, rope_theta=500000.0)
        | dict(rope_scaling=stretched(8.0), head_dim=128, tie_word_embeddings=False),
        dict(rope_scaling=LLAMA_3_SCALING, num_layers=80),
    ),
    "tinyllama": (
        dict(_LLAMA, **sizes(22, 2048, 32, 4, 5632, 2048), rms_norm_eps=1e-5, vocab_size=32000)
        | dict(attention_bias=False, rope_theta=10000.0, tie_word_embeddings=False),
        dict(num_kv_heads=4, head_dim=64),
    ),
    "smollm2-135m-instruct": (
        dict(_LLAMA, **sizes(30, 576, 9, 3, 1536, 8192), rms_norm_eps=1e-5, vocab_size=49152)
        | dict(attention_bias=False, attention_dropout=0.0, mlp_bias=False, is_llama_config=True, pad_token_id=2)
        | dict(
            rope_interleaved=False, rope_theta=100000, tie_word_embeddings=True, initializer_range=0.041666666666666664
        )
        | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
        dict(num_heads=9, num_kv_heads=3, rope_theta=100000.0, tie_embeddings=True, initializer_range=1 / 24),
    ),
    "deepseek-r1-distill-llama-8b": (
        dict(_LLAMA_3, **sizes(32, 4096, 32, 8, 14336, 131072), rms_norm_eps=1e-5, rope_theta=500000.0)
        | dict(rope_scaling=stretched(8.0), bos_token_id=128000, eos_token_id=128001, tie_word_embeddings=False),
        dict(rope_scaling=LLAMA_3_SCALING),
    ),
    "deepseek-r1-distill-qwen-7b": (
        dict(_QWEN, **sizes(28, 3584, 28, 4, 18944, 131072), rms_norm_eps=1e-6, rope_theta=10000, vocab_size=152064)
        | dict(sliding_window=4096, use_sliding_window=False, max_window_layers=28, use_mrope=False),
        dict(qkv_bias=True, out_bias=False, layer_windows=(None,) * 28, rope_theta=10000.0),
    ),
    "mistral-7b-v0.1": (
        dict(_LLAMA, **sizes(32, 4096, 32, 8, 14336, 32768), rms_norm_eps=1e-5, vocab_size=32000)
        | dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096, rope_theta=10000.0)
        | dict(tie_word_embeddings=False),
        dict(layer_windows=(4096,) * 32, rope_theta=10000.0),
    ),
    "mistral-7b-v0.2": (
        dict(_LLAMA, **sizes(32, 4096, 32, 8, 14336, 32768), rms_norm_eps=1e-5, vocab_size=32000)
        | dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None, rope_theta=1000000.0)
        | dict(attention_dropout=0.0, tie_word_embeddings=False),
        dict(layer_windows=(None,) * 32, rope_theta=1e6),
    ),
    "mistral-7b-v0.3": (
        dict(_LLAMA, **sizes(32, 4096, 32, 8, 14336, 32768), rms_norm_eps=1e-5, vocab_size=32768)
        | dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None, rope_theta=1000000.0)
        | dict(attention_dropout=0.0, tie_word_embeddings=False),
        dict(layer_windows=(None,) * 32, vocab_size=32768),
    ),
    "qwen2-0.5b": (
        dict(_QWEN, **sizes(24, 896, 14, 2, 4864, 131072), rms_norm_eps=1e-6, rope_theta=1000000.0, vocab_size=151936)
        | dict(sliding_window=131072, use_sliding_window=False, max_window_layers=24, tie_word_embeddings=True),
        dict(qkv_bias=True, tie_embeddings=True, head_dim=64, layer_windows=(None,) * 24),
    ),
    "qwen2.5-7b-instruct": (
        dict(_QWEN, **sizes(28, 3584, 28, 4, 18944, 32768), rms_norm_eps=1e-6, rope_theta=1000000.0, vocab_size=152064)
        | dict(sliding_window=131072, use_sliding_window=False, max_window_layers=28, tie_word_embeddings=False),
        dict(qkv_bias=True, tie_embeddings=False, qk_norm=False),
    ),
    "qwen2.5-with-the-yarn-of-its-readme": (
        dict(_QWEN, **sizes(28, 3584, 28, 4, 18944, 32768), rms_norm_eps=1e-6, rope_theta=1000000.0, vocab_size=152064)
        | dict(rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn")),
        dict(
            rope_scaling=YarnScaling(
                factor=4.0,
                original_context=32768,
                beta_fast=32.0,
                beta_slow=1.0,
                attention_factor=1 + 0.1 * math.log(4),
                truncate=True,
            )
        ),
    ),
    "qwen3-0.6b": (
        dict(_QWEN, **sizes(28, 1024, 16, 8, 3072, 40960), rms_norm_eps=1e-6, rope_theta=1000000, vocab_size=151936)
        | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=128, attention_bias=False)
        | dict(rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=28)
        | dict(tie_word_embeddings=True),
        dict(qk_norm=True, head_dim=128, qkv_bias=False, out_bias=False, tie_embeddings=True),
    ),
    "qwen3-4b-2507-as-transformers-5-writes-it": (
        dict(_QWEN, **sizes(36, 2560, 32, 8, 9728, 262144), rms_norm_eps=1e-6, vocab_size=151936, dtype="bfloat16")
        | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=128, attention_bias=False)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=5000000.0), layer_types=["full_attention"] * 36)
        | dict(sliding_window=None, use_sliding_window=False, max_window_layers=36, pad_token_id=None),
        dict(qk_norm=True, rope_theta=5e6, rope_scaling=None),
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs(name):
    raw, want = REAL[name]
    config = config_from_hf(raw)
    assert {field: getattr(config, field) for field in want} == want
    assert (config.num_layers, config.hidden_size) == (raw["num_hidden_layers"], raw["hidden_size"])
    assert config.activation == "silu" and config.gated


@pytest.mark.parametrize("name", REAL)
def test_real_configs_round_trip(name):
    config = config_from_hf(REAL[name][0])
    assert config_from_hf(config_to_hf(config)) == config


CLASSIC_AND_NEW = [
    (dict(rope_theta=5000.0), dict(rope_type="default", rope_theta=5000.0), None),
    (
        dict(rope_theta=5000.0, rope_scaling=dict(type="linear", factor=2.0)),
        dict(rope_type="linear", factor=2.0, rope_theta=5000.0),
        LinearScaling(factor=2.0),
    ),
    (
        dict(rope_theta=5000.0, rope_scaling=dict(type="dynamic", factor=2.0)),
        dict(rope_type="dynamic", factor=2.0, rope_theta=5000.0),
        DynamicScaling(factor=2.0, original_context=256),
    ),
    (
        dict(rope_theta=5000.0, rope_scaling=stretched(4.0)),
        dict(stretched(4.0), rope_theta=5000.0),
        dataclasses.replace(LLAMA_3_SCALING, factor=4.0),
    ),
    (
        dict(
            rope_theta=5000.0,
            rope_scaling=dict(type="yarn", factor=2, attention_factor=1.5, beta_fast=16, truncate=False),
        ),
        dict(rope_type="yarn", factor=2.0, attention_factor=1.5, beta_fast=16, truncate=False, rope_theta=5000.0),
        YarnScaling(
            factor=2.0, original_context=256, beta_fast=16.0, beta_slow=1.0, attention_factor=1.5, truncate=False
        ),
    ),
]


@pytest.mark.parametrize("classic,new,scaling", CLASSIC_AND_NEW)
def test_classic_and_new_rope_keys_mean_the_same(classic, new, scaling):
    old = llama(max_position_embeddings=256, **classic)
    assert old.rope_theta == 5000.0 and old.rope_scaling == scaling
    assert llama(max_position_embeddings=256, rope_parameters=new) == old
    assert config_from_hf(config_to_hf(old)) == old


def test_both_spellings_of_the_rope_type_together():
    scaling = dict(type="linear", rope_type="linear", factor=2.0)
    assert llama(rope_scaling=scaling).rope_scaling == LinearScaling(factor=2.0)


def qwen2(**changes):
    return config_from_hf({"architectures": ["Qwen2ForCausalLM"], **SMALL, "num_key_value_heads": 4, **changes})


def test_windows_of_qwen():
    on = dict(use_sliding_window=True, sliding_window=8)
    assert qwen2(sliding_window=8).layer_windows == (None, None)
    assert qwen2(**on).layer_windows == (None, None), "by default only layers from 28 on have windows"
    assert qwen2(**on, max_window_layers=1).layer_windows == (None, 8)
    assert qwen2(**on, max_window_layers=0).layer_windows == (8, 8)
    types = ["sliding_attention", "full_attention"]
    assert qwen2(**on, layer_types=types).layer_windows == (8, None)
    assert qwen2(layer_types=types, sliding_window=8).layer_windows == (None, None)


def test_windows_of_mistral_and_llama():
    mistral = {"architectures": ["MistralForCausalLM"], **SMALL, "num_key_value_heads": 4}
    assert config_from_hf(mistral).layer_windows == (4096, 4096)
    assert config_from_hf({**mistral, "sliding_window": None}).layer_windows == (None, None)
    assert config_from_hf({**mistral, "sliding_window": 5}).layer_windows == (5, 5)
    assert llama(sliding_window=5).layer_windows == (None, None)


def test_biases_of_qwen2_are_those_of_its_queries_keys_and_values():
    for changes in (dict(), dict(attention_bias=True)):
        config = qwen2(**changes)
        assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, False, False)


def test_dynamic_rope_begins_at_the_whole_context():
    """As in transformers, whatever else the checkpoint calls original."""
    scaling = dict(type="dynamic", factor=2.0, original_max_position_embeddings=128)
    config = llama(max_position_embeddings=256, rope_scaling=scaling)
    assert config.rope_scaling == DynamicScaling(factor=2.0, original_context=256)


def test_model_type_stands_in_for_missing_architectures():
    assert config_from_hf({"model_type": "llama", **SMALL}) == CONFIG


@pytest.mark.parametrize("changes,words", [
    (dict(architectures=["GemmaForCausalLM"]), ["GemmaForCausalLM", "LlamaForCausalLM"]),
    (dict(architectures=None, model_type="gemma"), ["'gemma'"]),
    (dict(architectures=None), ["None"]),
    (dict(quantization_config=dict(quant_method="gptq", bits=4)), ["gptq", "unquantised"]),
    (dict(num_experts=8), ["num_experts"]),
    (dict(logit_softcap=30.0, attention_multiplier=0.5), ["attention_multiplier, logit_softcap"]),
    (dict(vocab_size=None), ["vocab_size"]),
    (dict(hidden_size=None, num_hidden_layers=None), ["hidden_size, num_hidden_layers"]),
    (dict(hidden_act="tanh"), ["'tanh'"]),
    (dict(hidden_size=34), ["34", "4"]),
    (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), ["longrope"]),
    (dict(rope_scaling=dict(rope_type="linear")), ["linear", "factor"]),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), ["llama3", "low_freq_factor"]),
    (dict(rope_scaling=dict(rope_type="linear", factor=2.0, short_factor=[1.0])), ["short_factor"]),
    (dict(rope_scaling=dict(rope_type="linear", factor=2.0, partial_rotary_factor=0.5)), ["partial_rotary_factor"]),
    (dict(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    (dict(architectures=["Qwen2ForCausalLM"], layer_types=["chunked_attention"] * 2), ["chunked_attention"]),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(changes, words):
    with pytest.raises(ValueError) as caught:
        llama(**changes)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("changes,words", [
    (dict(rope_scaling="linear"), ["rope_scaling", "'linear'"]),
    (dict(rope_parameters=[1]), ["rope_parameters", "[1]"]),
    (dict(quantization_config="gptq"), ["quantization_config", "'gptq'"]),
    (dict(architectures="LlamaForCausalLM"), ["architectures"]),
    (dict(architectures=[["LlamaForCausalLM"]]), ["architectures"]),
    (dict(architectures=None, model_type=["llama"]), ["model_type"]),
    (dict(hidden_act=["silu"]), ["hidden_act", "['silu']"]),
    (dict(hidden_size="32"), ["hidden_size", "'32'"]),
    (dict(num_attention_heads=0), ["num_attention_heads", "0"]),
    (dict(num_hidden_layers=2.0), ["num_hidden_layers", "2.0"]),
    (dict(max_position_embeddings=[4]), ["max_position_embeddings", "[4]"]),
    (dict(rope_theta=[1]), ["rope_theta", "[1]"]),
    (dict(rope_theta=10**400), ["rope_theta", "10000"]),
    (dict(rms_norm_eps="1e-5"), ["rms_norm_eps", "'1e-5'"]),
    (dict(initializer_range=[]), ["initializer_range", "[]"]),
    (dict(attention_bias="false"), ["attention_bias", "'false'"]),
    (dict(tie_word_embeddings="false"), ["tie_word_embeddings", "'false'"]),
    (dict(layer_types=[[1]] * 2), ["layer_types"]),
    (dict(layer_types=5), ["layer_types"]),
    (dict(architectures=["MistralForCausalLM"], sliding_window="5"), ["sliding_window", "'5'"]),
    (dict(architectures=["Qwen2ForCausalLM"], max_window_layers=[2]), ["max_window_layers", "[2]"]),
    (dict(rope_scaling=dict(type="linear", factor=[2.0])), ["factor", "[2.0]"]),
    (dict(rope_scaling=dict(type="linear", factor=0)), ["factor", "0"]),
    (dict(rope_scaling=dict(type=["linear"], factor=2.0)), ["['linear']"]),
    (dict(rope_scaling=dict(type="dynamic", factor=None)), ["factor", "None"]),
    (dict(rope_scaling=dict(type="linear", factor=2.0, rope_theta={})), ["rope_theta", "{}"]),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, original_max_position_embeddings="8")), ["'8'"]),
    (dict(rope_scaling=dict(type="yarn", factor=None, original_max_position_embeddings=[])), ["[]"]),
    (dict(rope_scaling=dict(type="yarn", factor=None, original_max_position_embeddings=0)), ["original", "0"]),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, beta_fast={1: 2})), ["beta_fast"]),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, mscale="a", mscale_all_dim=1)), ["mscale", "'a'"]),
    (dict(rope_scaling=dict(type="yarn", factor=2.0, truncate="no")), ["truncate", "'no'"]),
    (
        dict(rope_scaling=dict(type="llama3", factor=8.0, low_freq_factor=1, high_freq_factor="4")),
        ["high_freq_factor", "'4'"],
    ),
])  # fmt: skip
def test_values_of_the_wrong_kind_are_refused_by_name(changes, words):
    test_what_cannot_be_honoured_is_refused_by_name(changes, words)


def test_bookkeeping_is_harmless_but_invented_keys_are_not():
    assert llama(attn_implementation="sdpa", _flash_attn_2_enabled=True) == CONFIG
    for key in ("num_nextn_predict_layers_unused", "architectures_version"):
        with pytest.raises(ValueError, match=key):
            llama(**{key: 1})


def test_dynamic_scaling_of_another_context_is_not_written():
    scaling = DynamicScaling(factor=2.0, original_context=128)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling, max_position_embeddings=256)
    with pytest.raises(ValueError, match=r"original_context 128 .* max_position_embeddings 256"):
        config_to_hf(config)
    config = dataclasses.replace(config, max_position_embeddings=128)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    "scaling,expected",
    [
        (None, 256),
        (LinearScaling(factor=4.0), 256),
        (LLAMA_3_SCALING, 256),
        (DynamicScaling(factor=2.5, original_context=128), 320),
        (DynamicScaling(factor=1.5, original_context=128), 256),
        (YARN, 400),
        (dataclasses.replace(YARN, factor=2.0), 256),
    ],
)
def test_the_longest_text_counts_what_scaling_adds(scaling, expected):
    config = dataclasses.replace(CONFIG, max_position_embeddings=256, rope_scaling=scaling)
    assert config.max_text_length == expected and isinstance(config.max_text_length, int)


def test_keys_that_are_switched_off_are_harmless():
    assert llama(num_experts=0, logit_softcap=None, some_flag=False, quantization_config=None) == CONFIG


@pytest.mark.parametrize(
    "changes",
    [
        dict(gated=False),
        dict(out_bias=True),
        dict(qk_norm=True, mlp_bias=True),
        dict(layer_windows=(4, 8)),
        dict(layer_windows=(4, None), qk_norm=False),
        dict(qkv_bias=True, mlp_bias=True),
    ],
)
def test_what_no_hugging_face_class_computes_is_refused(changes):
    with pytest.raises(ValueError, match="no Hugging Face architecture"):
        config_to_hf(dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    "changes,family",
    [
        (dict(), "llama"),
        (dict(mlp_bias=True), "llama"),
        (dict(qkv_bias=True, out_bias=True), "llama"),
        (dict(activation="gelu_tanh", head_dim=16, tie_embeddings=True), "llama"),
        (dict(activation="gelu"), "llama"),
        (dict(activation="relu"), "llama"),
        (dict(layer_windows=(5, 5)), "mistral"),
        (dict(qkv_bias=True), "qwen2"),
        (dict(qkv_bias=True, layer_windows=(None, 5)), "qwen2"),
        (dict(qkv_bias=True, layer_windows=(5, None)), "qwen2"),
        (dict(qk_norm=True), "qwen3"),
        (dict(qk_norm=True, qkv_bias=True, out_bias=True, layer_windows=(5, 5)), "qwen3"),
    ],
)
def test_round_trip_through_config_json(changes, family):
    config = dataclasses.replace(CONFIG, **changes)
    raw = config_to_hf(config)
    assert raw["model_type"] == family
    assert config_from_hf(raw) == config


@pytest.mark.parametrize("changes", [dict(), dict(layer_windows=(5, 5)), dict(qkv_bias=True, layer_windows=(None, 5))])
def test_transformers_reads_what_is_written(changes):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, rope_scaling=LLAMA_3_SCALING, max_position_embeddings=16384, **changes)
    raw = config_to_hf(config)
    theirs = transformers.AutoConfig.for_model(**raw)
    assert config_from_hf(theirs.to_dict() | {"architectures": raw["architectures"]}) == config
