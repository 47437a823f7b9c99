"""Which stored tensor each parameter of the network is, and with which order of axes.

A parameter is named by its path in `models.llama.model.LLaMa`; its suffix letters are its axes, behind L in the blocks.
A stored tensor's axes are given as groups of letters, a group being one stored dimension: "NH D" is a matrix of N * H
rows and D columns, and "1 D" a single row, of a parameter that is a vector. Letters as in `utils.ops`, and two more for
Meta's order of query and key rows: there a head's rows are pairs, so H is written PR, R being the two components of a
rotary pair; in ours H is RP, all first components in front of all second ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from models.llama.config import LlamaConfig


@dataclass(frozen=True)
class Stored:
    """Where a parameter is stored: the tensor's name, with `{layer}` in the blocks, and its axes."""

    name: str
    axes: str


_BLOCK = "model.layers.{layer}."

HUGGING_FACE: Mapping[str, Stored] = {
    "embed_VD": Stored("model.embed_tokens.weight", "V D"),
    "blocks.attn_norm_D": Stored(_BLOCK + "input_layernorm.weight", "D"),
    "blocks.q_DNH": Stored(_BLOCK + "self_attn.q_proj.weight", "NH D"),
    "blocks.k_DKH": Stored(_BLOCK + "self_attn.k_proj.weight", "KH D"),
    "blocks.v_DKH": Stored(_BLOCK + "self_attn.v_proj.weight", "KH D"),
    "blocks.o_NHD": Stored(_BLOCK + "self_attn.o_proj.weight", "D NH"),
    "blocks.q_bias_NH": Stored(_BLOCK + "self_attn.q_proj.bias", "NH"),
    "blocks.k_bias_KH": Stored(_BLOCK + "self_attn.k_proj.bias", "KH"),
    "blocks.v_bias_KH": Stored(_BLOCK + "self_attn.v_proj.bias", "KH"),
    "blocks.o_bias_D": Stored(_BLOCK + "self_attn.o_proj.bias", "D"),
    "blocks.q_norm_H": Stored(_BLOCK + "self_attn.q_norm.weight", "H"),
    "blocks.k_norm_H": Stored(_BLOCK + "self_attn.k_norm.weight", "H"),
    "blocks.mlp_norm_D": Stored(_BLOCK + "post_attention_layernorm.weight", "D"),
    "blocks.gate_DF": Stored(_BLOCK + "mlp.gate_proj.weight", "F D"),
    "blocks.up_DF": Stored(_BLOCK + "mlp.up_proj.weight", "F D"),
    "blocks.down_FD": Stored(_BLOCK + "mlp.down_proj.weight", "D F"),
    "blocks.gate_bias_F": Stored(_BLOCK + "mlp.gate_proj.bias", "F"),
    "blocks.up_bias_F": Stored(_BLOCK + "mlp.up_proj.bias", "F"),
    "blocks.down_bias_D": Stored(_BLOCK + "mlp.down_proj.bias", "D"),
    "norm_D": Stored("model.norm.weight", "D"),
    "unembed_DV": Stored("lm_head.weight", "V D"),
}

# The head of `models.llama.scalar.ScalarLLaMa`, score_D, beside the tensors of its network in Hugging Face's files.
SCORE = Stored("score.weight", "1 D")

# Meta's files and llama2.c's.
META: Mapping[str, Stored] = {
    "embed_VD": Stored("tok_embeddings.weight", "V D"),
    "blocks.attn_norm_D": Stored("layers.{layer}.attention_norm.weight", "D"),
    "blocks.q_DNH": Stored("layers.{layer}.attention.wq.weight", "NPR D"),
    "blocks.k_DKH": Stored("layers.{layer}.attention.wk.weight", "KPR D"),
    "blocks.v_DKH": Stored("layers.{layer}.attention.wv.weight", "KH D"),
    "blocks.o_NHD": Stored("layers.{layer}.attention.wo.weight", "D NH"),
    "blocks.mlp_norm_D": Stored("layers.{layer}.ffn_norm.weight", "D"),
    "blocks.gate_DF": Stored("layers.{layer}.feed_forward.w1.weight", "F D"),
    "blocks.up_DF": Stored("layers.{layer}.feed_forward.w3.weight", "F D"),
    "blocks.down_FD": Stored("layers.{layer}.feed_forward.w2.weight", "D F"),
    "norm_D": Stored("norm.weight", "D"),
    "unembed_DV": Stored("output.weight", "V D"),
}


@dataclass(frozen=True)
class Layout:
    """How one layer of a parameter and its stored tensor turn into each other, on numpy arrays.

    `letters` are the parameter's axes without L, behind the 1 of a single row, `axes` the stored ones, `size` the size
    of each letter's axis.
    """

    letters: str
    axes: str
    size: Mapping[str, int]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.size[letter] for letter in group) for group in self.axes.split())

    @property
    def cut_axis(self) -> int:
        """The parameter's axis that stored rows run along: a range of it is a range of rows."""
        return self.letters.index(self._flat[0])

    @property
    def rows_per_cut(self) -> int:
        """Stored rows for each index of `cut_axis`."""
        return self.stored_shape[0] // self.size[self._flat[0]]

    @property
    def _flat(self) -> str:
        return self.axes.replace(" ", "")

    @property
    def _own(self) -> str:
        return self.letters.replace("H", "RP") if "P" in self.axes else self.letters

    def from_stored(self, rows: np.ndarray) -> np.ndarray:
        """The parameter's layer, or the part of it that `rows` are: all stored rows or a range of `cut_axis`."""
        cut = len(rows) // self.rows_per_cut
        split = rows.reshape(cut, *(self.size[letter] for letter in self._flat[1:]))
        ordered = split.transpose([self._flat.index(letter) for letter in self._own])
        shape = [self.size[letter] for letter in self.letters]
        shape[self.cut_axis] = cut
        return ordered.reshape(shape)

    def to_stored(self, value: np.ndarray) -> np.ndarray:
        """The stored tensor of a parameter's layer."""
        split = value.reshape([self.size[letter] for letter in self._own])
        return split.transpose([self._own.index(letter) for letter in self._flat]).reshape(self.stored_shape)


def layout(parameter: str, stored: Stored, config: LlamaConfig) -> Layout:
    """The layout of a parameter of the network that `config` describes."""
    size = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "P": config.head_dim // 2,
        "R": 2,
        "1": 1,
    }
    return Layout("1" * stored.axes.count("1") + letters_of(parameter), stored.axes, size)


def letters_of(parameter: str) -> str:
    """A parameter's axes but L: the letters that its name ends with."""
    return parameter.rpartition("_")[2]


def is_stacked(parameter: str) -> bool:
    """Whether a parameter has a leading axis L."""
    return parameter.startswith("blocks.")


def tensors_of(parameter: str, stored: Stored, config: LlamaConfig) -> list[str]:
    """The names of a parameter's stored tensors, one for each layer in the blocks."""
    if not is_stacked(parameter):
        return [stored.name]
    return [stored.name.format(layer=layer) for layer in range(config.num_layers)]


def parameter_name(path: tuple[Any, ...]) -> str:
    """The name of the parameter at a leaf's path in the module: its path in the network, also where that is a part."""
    *outer, last = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").split(".")
    return ".".join([*outer[outer.index("blocks") :], last] if "blocks" in outer else [last])
