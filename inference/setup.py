"""What the command-line programs share: device and dtype, checkpoint and tokenizer, sampling flags."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from models.llama import LLaMa, check_vocabulary, load_config, load_pretrained, load_tokenizer
from models.llama.tokenizer import Tokenizer
from sampling import PRESETS, SamplingParams

DEVICES = ("auto", "cpu", "gpu", "tpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUICKSTART = "runs/quickstart/grpo/hf"  # where `make quickstart` puts its model


def load(ckpt_dir: str | None, tokenizer_path: str | None, *, dtype: str, device: str) -> tuple[LLaMa, Tokenizer]:
    """The model on the device that was asked for, and its tokenizer; without a `ckpt_dir`, the quickstart's.

    Raises ValueError or OSError with what to do, for an absent device, a missing or broken file, a tokenizer with more
    tokens than the model has embeddings.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    choose_device(device)
    keep_compiled_programs()
    path = Path(QUICKSTART if ckpt_dir is None else ckpt_dir)
    if ckpt_dir is None and not path.exists():
        raise FileNotFoundError(
            f"no --ckpt_dir, and no {QUICKSTART} in this folder: `make quickstart` makes it in some minutes"
        )
    if not path.exists():
        raise FileNotFoundError(f"--ckpt_dir {ckpt_dir}: no such folder or file")
    if tokenizer_path is not None and not Path(tokenizer_path).exists():
        raise FileNotFoundError(f"--tokenizer_path {tokenizer_path}: no such folder or file")
    try:
        tokenizer = load_tokenizer(tokenizer_path or (path if path.is_dir() else path.parent))
    except FileNotFoundError as error:
        load_config(path)  # where there is no checkpoint either, say that instead
        raise FileNotFoundError(f"{error}; name one with --tokenizer_path") from None
    on_cpu = jax.default_backend() == "cpu"
    model = load_pretrained(path, dtype=("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype)
    check_vocabulary(model.config, tokenizer)
    return model, tokenizer


def choose_device(device: str) -> None:
    """Make `device` the platform of everything that follows. Raises ValueError where there is none."""
    if device not in DEVICES:
        raise ValueError(f"--device {device!r} is none of {', '.join(DEVICES)}")
    if device != "auto":
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {device}: jax finds none here") from None


def keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, so that the next start need not compile them again.

    A folder that the user has set by JAX_COMPILATION_CACHE_DIR is left alone. Where none can be made, none is kept.
    """
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ropewalk" / "jax"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def sampling_params(preset: str, flags: Mapping[str, Any]) -> SamplingParams:
    """The preset with the flags that were given, those that are not None."""
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset!r} is none of {', '.join(PRESETS)}")
    return replace(PRESETS[preset], **{key: value for key, value in flags.items() if value is not None})


def with_banned(params: SamplingParams, banned: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> SamplingParams:
    """The parameters with tokens banned that are given as ids or as the text of a single token."""
    tokens = []
    for text in banned:
        if text in tokenizer.special_tokens:
            tokens.append(tokenizer.special_tokens[text])
            continue
        ids = [int(text)] if text.isdecimal() else tokenizer.encode(text)
        with contextlib.suppress(ValueError):
            ids = ids if len(ids) < 2 else _without_dummy_prefix(ids, text, tokenizer)
        if len(ids) != 1:
            raise ValueError(f"--banned_tokens {text!r} is {len(ids)} tokens, {ids}: give the ids to ban one by one")
        if not ids[0] < vocab_size:
            raise ValueError(f"--banned_tokens {ids[0]} is outside the vocabulary of {vocab_size}")
        tokens.append(ids[0])
    return replace(params, banned_tokens=tuple(tokens))


def _without_dummy_prefix(ids: list[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids without the lone space that SentencePiece tokenizers put in front of a text."""
    return ids[1:] if not text.startswith(" ") and tokenizer.token_bytes(ids[0]) == b" " else ids
