"""Completions of prompts under the policy: the batch that policy-gradient trainers learn from, its log-probabilities.

Letters here: B rows, each a prompt with completions of it; C completions of a row; S places of a prompt; M tokens of a
completion; N = B C.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.llama import LLaMa
from trainers.token_log_probs import TokenLogProbs, token_log_probs
from utils.platforms import target_platform
from utils.shapes import Array


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How the model is run for log-probabilities: see `LLaMa.hidden` (remat, attention).

    `prompts` "shared" runs each prompt once for all the completions of its row, which read its keys and values;
    "repeated" runs it in front of each of them, in a row without gaps, as fused attention kernels need it. "auto" is
    repeated on GPUs, shared elsewhere. The numbers are the same.
    """

    remat: Literal["none", "dots", "block", "everything"] = "dots"
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    prompts: Literal["auto", "shared", "repeated"] = "auto"

    @property
    def shares_prompts(self) -> bool:
        if self.prompts == "auto":
            return target_platform() != "gpu"
        return self.prompts == "shared"


class Completions(Protocol):
    """A batch, as far as the model reads it.

    `prompts_BS` int32 is filled from the right, `prompt_lengths_B` counts its tokens, at least 1; `completions_BCM`
    int32 is filled from the left.
    """

    @property
    def prompts_BS(self) -> Array: ...

    @property
    def prompt_lengths_B(self) -> Array: ...

    @property
    def completions_BCM(self) -> Array: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """`Completions` with what is known of them. Leading axes are rows, which micro-batches and devices share out.

    `mask_BCM`, float32, is 1 for the tokens that count, 0 behind the end and in
    completions that are left out. `sampler_logprobs_BCM` are those that the tokens were drawn with; the others, None
    where they are not needed, as in `trainers.policy_losses.policy_loss`.
    """

    prompts_BS: Array
    prompt_lengths_B: Array
    completions_BCM: Array
    mask_BCM: Array
    advantages_BC: Array
    sampler_logprobs_BCM: Array
    rollout_tokens_BC: Array | None = None
    old_logprobs_BCM: Array | None = None
    reference_logprobs_BCM: Array | None = None
    weights_BCM: Array | None = None


def padded_size(length: int, most: int) -> int:
    """The size that prompts or completions are padded to: a power of two, at least 16 and at most `most`, so that
    there are few sizes to compile for."""
    return min(most, max(16, 1 << (length - 1).bit_length()))


def from_the_right(texts: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """Texts of token ids as rows of that size, filled up with zeros in front; int32."""
    rows_BS = np.zeros((len(texts), size), np.int32)
    for row, ids in enumerate(texts):
        rows_BS[row, size - len(ids) :] = ids
    return rows_BS


def completion_log_probs(
    model: LLaMa, batch: Completions, *, temperature: float, config: PolicyConfig, key: Array | None = None
) -> TokenLogProbs:
    """Log-probabilities and entropies under softmax(logits / temperature) of all tokens of completions, [N, M].

    With a `key` the dropout of adapters is on. Places behind the end of a completion hold some finite numbers.
    """
    x_NPD = completion_states(model, batch, config=config, key=key)
    return log_probs_behind(x_NPD, model, batch, temperature=temperature)


def log_probs_behind(x_NPD: Array, model: LLaMa, batch: Completions, *, temperature: float) -> TokenLogProbs:
    """The same, given the states of the completions."""
    targets_NM = batch.completions_BCM.reshape(-1, batch.completions_BCM.shape[-1])
    return token_log_probs(x_NPD[:, :-1], model.unembedding, targets_NM, temperature=temperature)


def completion_states(model: LLaMa, batch: Completions, *, config: PolicyConfig, key: Array | None = None) -> Array:
    """Hidden states x_NPD, P = M + 1, of each prompt's last token and of all tokens of its completion behind it.

    x_NPD[n, m] predicts the token m of completion n, x_NPD[n, m + 1] is the state at that token.
    """
    states = _behind_shared if config.shares_prompts else _behind_repeated
    return states(model, batch, config, key)


def _behind_shared(model: LLaMa, batch: Completions, config: PolicyConfig, key: Array | None) -> Array:
    """Each prompt is run once, all completions behind it."""
    B, C, M = batch.completions_BCM.shape
    S = batch.prompts_BS.shape[1]
    places_BS = jnp.arange(S) - (S - batch.prompt_lengths_B)[:, None]
    options = dict(implementation=config.attention, remat=config.remat)
    keys = (None, None) if key is None else jax.random.split(key)
    x_BSD, prefix = model.hidden(
        batch.prompts_BS,
        positions_BT=jnp.maximum(places_BS, 0),
        segments_BT=(places_BS >= 0).astype(jnp.int32),
        keep_prefix=True,
        key=keys[0],
        **options,
    )
    tokens_NM = batch.completions_BCM.reshape(B * C, M)
    x_NMD, _ = model.hidden(tokens_NM, prefix=prefix, key=keys[1], **options)
    return jnp.concatenate([jnp.repeat(x_BSD[:, -1:], C, axis=0), x_NMD], axis=1)


def _behind_repeated(model: LLaMa, batch: Completions, config: PolicyConfig, key: Array | None) -> Array:
    """The same from rows of a prompt and one completion, without a gap; what is in front of the prompt goes behind."""
    B, C, M = batch.completions_BCM.shape
    S = batch.prompts_BS.shape[1]
    prompts_NS = jnp.repeat(batch.prompts_BS, C, axis=0)
    lengths_N1 = jnp.repeat(batch.prompt_lengths_B, C)[:, None]
    tokens_NT = jnp.concatenate([prompts_NS, batch.completions_BCM.reshape(B * C, M)], axis=1)
    T = S + M
    tokens_NT = jnp.take_along_axis(tokens_NT, (jnp.arange(T) + S - lengths_N1) % T, axis=1)
    x_NTD, _ = model.hidden(
        tokens_NT, lengths_B=lengths_N1[:, 0] + M, implementation=config.attention, remat=config.remat, key=key
    )
    places_NP = lengths_N1 - 1 + jnp.arange(M + 1)
    return jnp.take_along_axis(x_NTD, places_NP[..., None], axis=1)
