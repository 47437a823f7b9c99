"""What adapter_config.json of Hugging Face's `peft` says of which modules, by its own rules.

A module is called by its path in the network of transformers: "model.layers.0.self_attn.q_proj".
Source: https://github.com/huggingface/peft, `LoraConfig` and `check_target_module_exists`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.llama.files import read_json

_ALL_LINEAR = "all-linear"

# What we have no place for; all is off where it is null, false or empty.
_UNSUPPORTED = {
    "use_dora": "weight-decomposed adapters (DoRA) are",
    "modules_to_save": "whole modules trained beside the adapters are",
    "lora_bias": "biases of adapters are",
    "trainable_token_indices": "trained rows of the embeddings are",
    "target_parameters": "adapters of bare parameters are",
    "layer_replication": "replicated layers are",
    "alora_invocation_tokens": "adapters that begin at an invocation (aLoRA) are",
    "use_qalora": "adapters of quantised weights (QALoRA) are",
    "use_bdlora": "block-diagonal adapters (BD-LoRA) are",
    "arrow_config": "routing between adapters is",
    "kasa_config": "adapters that change the base (KaSA) are",
}

# The beginnings that leave the base as it is; the others have trained against another base than the one on the disk.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")

# What is read below, and what says nothing of the numbers.
_KNOWN = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("fan_in_fan_out", "megatron_core", "megatron_config", "ensure_weight_tying", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
}


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Ranks, scales and modules. A pattern of a rank or an alpha ends a module's path; the first that fits counts."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    targets: str | list[str]
    excluded: str | list[str]
    layers: list[int]
    layer_lists: list[str]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def targets_module(self, module: str) -> bool:
        """Whether a linear layer has an adapter. "all-linear" leaves out the output matrix, which is in no block."""
        if _matches(self.excluded, module):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == _ALL_LINEAR:
            return ".layers." in f".{module}"
        if not _matches(self.targets, module):
            return False
        if isinstance(self.targets, str) or module in self.targets or not self.layers:
            return True
        for name in self.layer_lists or [r"[^.]*"]:
            if found := re.match(rf"(?:.*?\.)?{name}\.(\d+)\.", module):
                return int(found[1]) in self.layers
        return False

    def rank_of(self, module: str) -> int:
        return _first_fitting(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _first_fitting(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_peft_config(path: Path) -> PeftConfig:
    """The config in a file; ValueError, naming the file, for anything but plain LoRA and for values of a wrong kind."""
    raw = read_json(path)
    try:
        _refuse_unsupported(raw)
        return _parse(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a value of the wrong kind ({error})") from None


def peft_config(modules: Mapping[str, tuple[int, float]], *, dropout: float, base: str | None) -> dict[str, Any]:
    """The config of adapters of some rank and scale on every layer's modules of these names.

    The alphas are whole numbers where they can be, if need be by way of `use_rslora`.
    """
    alphas = {name: scale * rank for name, (rank, scale) in modules.items()}
    stabilised = {name: scale * math.sqrt(rank) for name, (rank, scale) in modules.items()}
    rslora = not _all_whole(alphas) and _all_whole(stabilised)
    alphas = {name: _tidy(alpha) for name, alpha in (stabilised if rslora else alphas).items()}
    rank, alpha = next(rank for rank, _ in modules.values()), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": list(modules),
        "rank_pattern": {name: own for name, (own, _) in modules.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "modules_to_save": None,
    }


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {raw.get('peft_type')!r}; only LORA is supported")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"bias is {raw['bias']!r}: trained biases are not supported, only 'none'")
    for key, what in _UNSUPPORTED.items():
        if raw.get(key):
            raise ValueError(f"{key} is {json.dumps(raw[key])}: {what} not supported")
    beginning = raw.get("init_lora_weights")
    if (beginning.lower() if isinstance(beginning, str) else beginning) not in _PLAIN_BEGINNINGS:
        raise ValueError(
            f"init_lora_weights is {beginning!r}, which may change the base: not supported; have peft convert the "
            "adapters to plain LoRA when it saves them"
        )
    for key in sorted(raw.keys() - _KNOWN - _UNSUPPORTED.keys()):
        if raw[key]:
            raise ValueError(f"{key} is {json.dumps(raw[key])}: no such thing is known here")


def _parse(raw: Mapping[str, Any]) -> PeftConfig:
    targets = raw.get("target_modules")
    if not targets:
        raise ValueError(f"target_modules is {json.dumps(targets)}: no modules to adapt")
    layers = raw.get("layers_to_transform")
    if layers not in (None, []) and isinstance(targets, str):
        raise ValueError(f"layers_to_transform goes with a list of target_modules, not with {targets!r}")
    lists = raw.get("layers_pattern") or []
    dropout = _number("lora_dropout", raw.get("lora_dropout", 0.0))
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout must be from 0 to below 1, not {dropout}")
    return PeftConfig(
        rank=_rank("r", raw.get("r", 8)),
        alpha=_number("lora_alpha", raw.get("lora_alpha", 8)),
        dropout=dropout,
        rslora=bool(raw.get("use_rslora")),
        targets=_names("target_modules", targets),
        excluded=_names("exclude_modules", raw.get("exclude_modules") or []),
        layers=[_whole("layers_to_transform", x) for x in ([layers] if isinstance(layers, int) else layers or [])],
        layer_lists=[_pattern("layers_pattern", x) for x in ([lists] if isinstance(lists, str) else lists)],
        rank_pattern={
            _pattern("rank_pattern", key): _rank("rank_pattern", x)
            for key, x in (raw.get("rank_pattern") or {}).items()
        },
        alpha_pattern={
            _pattern("alpha_pattern", key): _number("alpha_pattern", x)
            for key, x in (raw.get("alpha_pattern") or {}).items()
        },
    )


def _matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_fitting(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _names(key: str, value: Any) -> str | list[str]:
    """A pattern, checked to be one, or names."""
    if isinstance(value, str):
        return _pattern(key, value)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be a list of names or a pattern, not {json.dumps(value)}")
    return value


def _pattern(key: str, value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{key} {value!r} is no regular expression: {error}") from None
    return value


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} must be a whole number, not {json.dumps(value)}")
    return value


def _rank(key: str, value: Any) -> int:
    if _whole(key, value) < 1:
        raise ValueError(f"{key} must be at least 1, not {value}")
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} must be a number, not {json.dumps(value)}")
    return value


def _tidy(alpha: float) -> float:
    """A whole number where it is one but for rounding."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _all_whole(alphas: Mapping[str, float]) -> bool:
    return all(isinstance(_tidy(alpha), int) for alpha in alphas.values())
