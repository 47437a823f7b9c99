"""A network that gives texts a score in place of logits: reward models and critics, and their checkpoints.

In `transformers` they are `LlamaForSequenceClassification` and the like, of one label.
"""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.llama.checkpoint import Checkpoint, open_checkpoint
from models.llama.config import LlamaConfig, config_to_hf
from models.llama.init import made_on
from models.llama.load import load_network
from models.llama.model import LLaMa
from models.llama.names import SCORE, layout
from models.llama.save import token_ids, write_checkpoint
from models.llama.tokenizer import load_tokenizer
from utils.shapes import Array, DTypeLike, Float
from utils.sharding import named_sharding

# What a token is called that can stand behind a text: one for padding, one for what has no token, one for nothing yet.
_FILLERS = (r"\W*(pad|finetune_right_pad_id)\W*", r"\W*unk\W*", r".*(reserved|unused).*")


class HeadParam(nnx.Param):
    """The parameter of a head, which is trained even where those of its network are not."""


class ScalarLLaMa(nnx.Module):
    """A network without output matrix, and a head of one row on its hidden states. It is its parameters, as `LLaMa` is.

    The head is kept in float32 whatever the network, and scores are float32: it is small, and trained where the network
    is not. A trainer that computes in half precision rounds it with the rest.
    """

    def __init__(self, llama: LLaMa, score_D: Array):
        """Raises ValueError for a network with an output matrix."""
        if llama.unembed_DV is not None:
            raise ValueError("a network with scores has no output matrix: give one of tied embeddings")
        self.llama = llama
        self.score_D = HeadParam(score_D.astype(jnp.float32))

    @property
    def config(self) -> LlamaConfig:
        return self.llama.config

    def scores(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Scores, float32 [B, T], of texts that end at t, from `llama.hidden`; a text's own is at its last token."""
        return jnp.einsum(
            "BTD,D->BT", x_BTD.astype(jnp.float32), self.score_D[...], precision=jax.lax.Precision.HIGHEST
        )


def load_scalar(path: str | Path, *, dtype: DTypeLike | None = jnp.float32, mesh: Mesh | None = None) -> ScalarLLaMa:
    """The network of a checkpoint with its head, or that of a language model with a head of zeros.

    Takes Hugging Face's sequence classification networks of one label, and all that `load_pretrained` takes, whose
    output matrix is left out. `dtype` is that of the network, see `load_pretrained`, which says what is raised.
    """
    checkpoint = open_checkpoint(path)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, tie_embeddings=True))
    head_D = _head(checkpoint)
    llama = load_network(checkpoint, dtype=dtype, mesh=mesh)
    if mesh is None:
        return ScalarLLaMa(llama, jnp.asarray(head_D))
    sharding = named_sharding("D", head_D.shape, mesh)
    return ScalarLLaMa(llama, jax.make_array_from_callback(head_D.shape, sharding, lambda index: head_D[index]))


def random_scalar(
    config: LlamaConfig, *, key: Array, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> ScalarLLaMa:
    """Random weights, made where they are to lie, see `random_model`; embeddings are tied whatever the config says.

    Raises ValueError where the mesh cannot cut a parameter.
    """

    def make(key: Array) -> ScalarLLaMa:
        llama = LLaMa(replace(config, tie_embeddings=True), key=key, dtype=dtype)
        score_D = jax.random.normal(jax.random.fold_in(key, 1), (config.hidden_size,), jnp.float32)
        return ScalarLLaMa(llama, score_D * config.initializer_range)

    return made_on(mesh, make, key)


def save_scalar(
    model: ScalarLLaMa,
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that `transformers`, for sequence classification, and `load_scalar` read; as `save_pretrained`.

    `transformers` takes a text's score at the last token that is not padding, so that padding may be no token that
    texts end with: `config.json` and the tokenizer's settings name the tokenizer's own padding, else another token
    that stands for no text, else none, and then `transformers` scores texts one by one only.

    Raises as `save_pretrained`.
    """
    if model.llama.blocks.adapters is not None:
        raise ValueError("the network has adapters: write them with save_peft, or merge_lora first")
    config = config_to_hf(model.config, scores=True) | token_ids(tokenizer_from)
    padding = _padding(tokenizer_from, model.config.vocab_size)
    write_checkpoint(
        model,
        config | {"pad_token_id": None if padding is None else padding[0]},
        path,
        dtype=dtype,
        tokenizer_from=tokenizer_from,
        max_shard_bytes=max_shard_bytes,
        tokenizer_config={} if padding is None else {"pad_token": padding[1]},
    )


def _head(checkpoint: Checkpoint) -> np.ndarray:
    """The head of a checkpoint in float32; zeros where it has none."""
    if not checkpoint.scores:
        return np.zeros(checkpoint.config.hidden_size, np.float32)
    row_1D = layout("score_D", SCORE, checkpoint.config).from_stored(checkpoint.tensors[SCORE.name].read())
    return row_1D[0].astype(np.float32)


def _padding(folder: str | Path | None, vocab_size: int) -> tuple[int, str] | None:
    """The id and name of a token that no text ends with; None where a folder has no tokenizer, or it no such token."""
    try:
        tokenizer = None if folder is None else load_tokenizer(folder)
    except FileNotFoundError:
        tokenizer = None
    if tokenizer is None:
        return None
    ends = {*tokenizer.stop_ids, tokenizer.eos_id}
    usable = {name: own for name, own in tokenizer.special_tokens.items() if own < vocab_size and own not in ends}
    chosen = [name for name, own in usable.items() if own == tokenizer.pad_id]
    chosen += [name for pattern in _FILLERS for name in usable if re.fullmatch(pattern, name, re.IGNORECASE)]
    return (usable[chosen[0]], chosen[0]) if chosen else None
