"""The reward that a trained reward model gives: its score of a prompt with a completion."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data.chat import choose_template, encode_chat
from data.examples import tokenize
from data.records import CompletionRecord
from data.records_messages import parse_tools
from models.llama import ScalarLLaMa, check_vocabulary, load_scalar, load_tokenizer
from models.llama.checkpoint import open_checkpoint
from models.llama.tokenizer import Tokenizer
from utils.shapes import Array, Float, Int
from utils.sharding import on_mesh_of

_SHORTEST = 64  # tokens that a row has room for at least; longer ones for twice as many, and so on

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """The score that a reward model gives a prompt with its completion.

    `checkpoint` is a folder that `save_scalar` wrote, as the exports of reward training are, or another of Hugging
    Face's sequence classification networks of one label, with a tokenizer. A text is tokenised as in reward training:
    plain text between BOS, by the tokenizer's convention, and EOS, where there is one; a conversation by the template
    `chat_template`, a built-in name or a file, by default the tokenizer's own, with the column `tools` where there is
    one. Of more than `max_length` tokens, by default as many as the network can read, the last ones count. Weights are
    held in `dtype`; they are loaded at the first call, onto the mesh of `jax.set_mesh` where there is one.

    `batch_size` texts are scored at a time. Rows are filled up to few lengths, and which one is a matter of the text
    alone, so that its score does not depend on the texts beside it.

    Raises OSError and ValueError for a checkpoint that is not whole or not a reward model's, without a tokenizer or
    with one of another vocabulary, and for options out of range.
    """

    checkpoint: str
    max_length: int | None = None
    batch_size: int = 8
    chat_template: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        opened = open_checkpoint(self.checkpoint)
        if not opened.scores:
            raise ValueError(f"{self.checkpoint}: a language model, which gives texts no score; a reward model does")
        check_vocabulary(opened.config, self._tokenizer)
        context = opened.config.max_text_length
        if self.max_length is not None and not 1 <= self.max_length <= context:
            raise ValueError(f"max_length must be from 1 to the network's {context} tokens, not {self.max_length}")
        _ = self._template

    def __call__(
        self, *, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float]:
        tools = columns.get("tools") or [None] * len(prompts)
        rows = [self._encode(*own) for own in zip(prompts, completions, tools, strict=True)]
        scores_N = np.empty(len(rows), np.float32)
        with on_mesh_of(self._model):
            for places, tokens_BT, lengths_B in self._batches(rows):
                scores_N[places] = np.asarray(_scores(self._model, tokens_BT, lengths_B))[: len(places)]
        return scores_N.tolist()

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.checkpoint)

    @functools.cached_property
    def _template(self) -> str:
        return choose_template(self._tokenizer, self.chat_template)

    @functools.cached_property
    def _model(self) -> ScalarLLaMa:
        mesh = jax.sharding.get_mesh()
        return load_scalar(self.checkpoint, dtype=jnp.dtype(self.dtype), mesh=None if mesh.empty else mesh)

    @property
    def _limit(self) -> int:
        return self.max_length or self._model.config.max_text_length

    def _encode(self, prompt: str | Messages, completion: str | Messages, tools: Any) -> np.ndarray:
        """The ids of a text, its last `_limit`."""
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("prompt and completion must both be text or both be messages")
        if isinstance(prompt, str):
            ids = tokenize(CompletionRecord(prompt=prompt, completion=completion), self._tokenizer).tokens
        else:
            messages, tools = [*prompt, *completion], parse_tools(tools)
            ids = encode_chat(self._tokenizer, messages, template=self._template, tools=tools)
        if not len(ids):
            raise ValueError("a text without tokens has no score")
        return np.asarray(ids[-self._limit :], np.int32)

    def _batches(self, rows: Sequence[np.ndarray]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Places of some rows of one length, filled up, and their tokens_BT and lengths_B, filled up with rows."""
        by_length: dict[int, list[int]] = {}
        for place, ids in enumerate(rows):
            by_length.setdefault(self._room(len(ids)), []).append(place)
        for T, places in by_length.items():
            for start in range(0, len(places), self.batch_size):
                own = places[start : start + self.batch_size]
                tokens_BT, lengths_B = np.zeros((self.batch_size, T), np.int32), np.ones(self.batch_size, np.int32)
                for row, place in enumerate(own):
                    lengths_B[row] = len(rows[place])
                    tokens_BT[row, : lengths_B[row]] = rows[place]
                yield own, tokens_BT, lengths_B

    def _room(self, length: int) -> int:
        """The length that a row of so many tokens is filled up to."""
        return min(max(_SHORTEST, 1 << (length - 1).bit_length()), self._limit)


@jax.jit
def _scores(model: ScalarLLaMa, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"]) -> Float[Array, "B"]:
    """The scores, float32 [B], at the last of the real tokens of each row."""
    x_BTD, _ = model.llama.hidden(tokens_BT, lengths_B=lengths_B)
    x_B1D = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)
    return model.scores(x_B1D)[:, 0]
