"""From logits to tokens: pure transforms of logits that compose, a draw from a key, and log-probabilities.

Every function takes and returns float32 logits [B, V]; a token that is ruled out has logit -inf. Parameters may be
numbers or arrays [B], one for each row, and may be traced, except where noted.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from utils.log_probs import log_probs as token_log_probs
from utils.shapes import Array, Bool, Float, Int, Number

_BLOCK = 256  # tokens of the vocabulary that are drawn from together
_COLDEST = 1e-6  # Logits divided by less may leave the range of float32.


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy: the most likely token, whatever the other filters say.

    top_k keeps the k likeliest tokens; top_p the smallest set of likeliest tokens whose probability reaches p; min_p
    those with at least min_p times the probability of the likeliest. repetition_penalty > 1 makes tokens of the prompt
    and the completion less likely. banned_tokens are never drawn. max_consecutive_newlines caps runs of newlines in the
    text (the decode loop has to be given what each token holds).

    Raises ValueError for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    banned_tokens: tuple[int, ...] = ()
    max_consecutive_newlines: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _COLDEST <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or at least {_COLDEST:g}, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if self.max_consecutive_newlines is not None and self.max_consecutive_newlines < 1:
            raise ValueError(f"max_consecutive_newlines must be at least 1, not {self.max_consecutive_newlines}")


PRESETS: dict[str, SamplingParams] = {
    "standard": SamplingParams(temperature=0.8, top_p=0.95),
    "creative": SamplingParams(temperature=1.1, min_p=0.05, repetition_penalty=1.05),
    "conservative": SamplingParams(temperature=0.3, top_k=40, top_p=0.9),
}


def scale_temperature(logits_BV: Float[Array, "B V"], temperature: Number) -> Float[Array, "B V"]:
    """Divide by the temperature, which must be above 0."""
    return logits_BV / _column(temperature)


def keep_top_k(logits_BV: Float[Array, "B V"], k: Number) -> Float[Array, "B V"]:
    """Rule out all but the k largest logits of each row; ties with the k-th stay."""
    k = jnp.asarray(k)
    k = k[:, None] if k.ndim else k
    threshold_B1 = _lowest_kept(logits_BV, lambda above_BV: jnp.sum(above_BV, axis=-1, keepdims=True) < k)
    return jnp.where(_ordered_bits(logits_BV) < threshold_B1, -jnp.inf, logits_BV)


def keep_top_p(logits_BV: Float[Array, "B V"], p: Number) -> Float[Array, "B V"]:
    """Keep the smallest set of likeliest tokens that holds probability p or more: a token stays as long as those
    likelier than itself hold less than p. Ties stay or go together. Source: arXiv:1904.09751, sec. 3.1.
    """
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    p = _column(p)
    threshold_B1 = _lowest_kept(
        probs_BV, lambda above_BV: (jnp.sum(jnp.where(above_BV, probs_BV, 0), axis=-1, keepdims=True) < p) | (p >= 1)
    )
    return jnp.where(_ordered_bits(probs_BV) < threshold_B1, -jnp.inf, logits_BV)


def keep_min_p(logits_BV: Float[Array, "B V"], p: Number) -> Float[Array, "B V"]:
    """Rule out tokens less likely than p times the likeliest. Source: arXiv:2407.01082."""
    threshold_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(_column(p))
    return jnp.where(logits_BV < threshold_B1, -jnp.inf, logits_BV)


def penalize_repetition(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "#B V"], penalty: Number
) -> Float[Array, "B V"]:
    """Divide positive and multiply negative logits of tokens seen before by the penalty. Source: arXiv:1909.05858."""
    penalty = _column(penalty)
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def ban(logits_BV: Float[Array, "B V"], banned_BV: Bool[Array, "*#BV"]) -> Float[Array, "B V"]:
    """Rule out the tokens where `banned_BV` (its B may be 1) is True."""
    return jnp.where(banned_BV, -jnp.inf, logits_BV)


def draw(logits_BV: Float[Array, "B V"], keys_B: Array) -> Int[Array, "B"]:
    """One token for each row from softmax(logits), each row from its own PRNG key; int32 [B].

    By inversion in two steps, a block of the vocabulary and a token of it: two random numbers for a row instead of V,
    which on XLA's CPU backend take longer than all else. Between them they tell probabilities of 1e-13 apart. Tokens
    that are ruled out are never drawn. Source: Devroye, Non-Uniform Random Variate Generation (1986), sec. III.2.
    """
    B, V = logits_BV.shape
    logits_BV = logits_BV.astype(jnp.float32)
    weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    weight_BXC = jnp.pad(weight_BV, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_B = _invert(weight_BXC.sum(axis=-1), uniform_B2[:, 0])
    weight_BC = jnp.take_along_axis(weight_BXC, block_B[:, None, None], axis=1)[:, 0]
    return block_B * _BLOCK + _invert(weight_BC, uniform_B2[:, 1])


def _invert(weight_BX: Array, uniform_B: Array) -> Array:
    """The first place of each row up to which the weights are more than that share of all; int32 [B]."""
    sum_BX = jnp.cumsum(weight_BX, axis=-1)
    place_B = jnp.sum(sum_BX <= uniform_B[:, None] * sum_BX[:, -1:], axis=-1, dtype=jnp.int32)
    return jnp.minimum(place_B, weight_BX.shape[-1] - 1)  # NaN compares as nothing does


def log_probs(logits_BV: Float[Array, "B V"], tokens_B: Int[Array, "B"]) -> Float[Array, "B"]:
    """Natural log of the probability of each row's token under softmax(logits), float32 [B]; the trainers' own too."""
    return token_log_probs(logits_BV, tokens_B)


def _ordered_bits(x: Array) -> Array:
    """int32 that order as the float32 do."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _lowest_kept(values_BV: Array, few_above: Callable[[Array], Array]) -> Array:
    """The lowest threshold, as ordered bits [B, 1], such that what is above it is still few enough.

    `few_above` says so, [B, 1], of the places above a threshold. Bisection over the bits of float32 finds it exactly in
    32 passes over the values, which is faster than sorting them on every backend.
    """
    bits_BV = _ordered_bits(values_BV)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B1, high_B1 = bounds  # few above high; too many above low - 1
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)
        few_B1 = few_above(bits_BV > middle_B1)
        return jnp.where(few_B1, low_B1, middle_B1 + 1), jnp.where(few_B1, middle_B1, high_B1)

    bounds = jnp.min(bits_BV, axis=-1, keepdims=True), jnp.max(bits_BV, axis=-1, keepdims=True)
    return jax.lax.fori_loop(0, 32, halve, bounds)[1]


def _column(value: Number) -> Array:
    """A number, or one for each row, as something that broadcasts against [B, V]."""
    value = jnp.asarray(value, jnp.float32)
    return value[:, None] if value.ndim else value


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class NewlineTable:
    """What each token's text holds of newlines, int32 [V]: how many it begins and ends with, and its longest run.

    `only_V` is True for a token of nothing but newlines, or of nothing at all.
    """

    leading_V: Array
    trailing_V: Array
    longest_V: Array
    only_V: Array

    @staticmethod
    def of(token_bytes: Sequence[bytes]) -> "NewlineTable":
        """The table of a vocabulary, given the bytes of each token."""
        leading = [len(b) - len(b.lstrip(b"\n")) for b in token_bytes]
        trailing = [len(b) - len(b.rstrip(b"\n")) for b in token_bytes]
        longest = [max(map(len, re.findall(rb"\n+", b)), default=0) for b in token_bytes]
        only = [n == len(b) for b, n in zip(token_bytes, leading)]
        return NewlineTable(
            leading_V=jnp.array(leading, jnp.int32),
            trailing_V=jnp.array(trailing, jnp.int32),
            longest_V=jnp.array(longest, jnp.int32),
            only_V=jnp.array(only, bool),
        )

    def too_many(self, run_B: Array, cap: Number) -> Array:
        """bool [B, V]: True where a token behind `run_B` newlines would make a run longer than `cap`."""
        return (run_B[:, None] + self.leading_V > cap) & (self.leading_V > 0) | (self.longest_V > cap)

    def run_after(self, run_B: Array, tokens_B: Array) -> Array:
        """Newlines at the end of the text after one more token, int32 [B]."""
        return jnp.where(self.only_V[tokens_B], run_B, 0) + self.trailing_V[tokens_B]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SamplingRules:
    """SamplingParams made ready for a compiled loop: a part that is switched off is None and costs nothing.

    Numbers are traced, so that a new temperature needs no new compilation; `greedy` is static.
    """

    greedy: bool = field(metadata={"static": True})
    temperature: Array
    top_k: Array | None
    top_p: Array | None
    min_p: Array | None
    repetition_penalty: Array | None
    banned_V: Array | None
    newlines: NewlineTable | None
    newline_cap: Array | None

    @staticmethod
    def of(params: SamplingParams, *, vocab_size: int, newlines: NewlineTable | None = None) -> "SamplingRules":
        """Raises ValueError for banned tokens outside the vocabulary, or a newline cap without a table."""
        outside = [token for token in params.banned_tokens if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"banned tokens {outside} are outside the vocabulary of {vocab_size}")
        cap = params.max_consecutive_newlines
        if cap is not None and newlines is None:
            raise ValueError("max_consecutive_newlines needs the newline table of the tokenizer")
        number = lambda value, off: None if value == off else np.float32(value)  # noqa: E731
        banned_V = np.zeros(vocab_size, bool)
        banned_V[list(params.banned_tokens)] = True
        greedy = params.temperature == 0
        return SamplingRules(
            greedy=greedy,
            top_k=None if greedy or params.top_k is None else np.int32(min(params.top_k, vocab_size)),
            temperature=np.float32(1.0 if greedy else params.temperature),
            top_p=None if greedy else number(params.top_p, 1.0),
            min_p=None if greedy else number(params.min_p, 0.0),
            repetition_penalty=number(params.repetition_penalty, 1.0),
            banned_V=banned_V if params.banned_tokens else None,
            newlines=None if cap is None else newlines,
            newline_cap=None if cap is None else np.int32(min(cap, 2**30)),
        )

    def filter(self, logits_BV: Array, *, seen_BV: Array | None = None, newline_run_B: Array | None = None) -> Array:
        """The logits that a token is drawn from: penalty, bans, temperature, top-k, top-p, min-p, in this order.

        The order is that of `transformers`. `seen_BV` and `newline_run_B` are needed where the rules look at them.
        """
        if self.repetition_penalty is not None:
            logits_BV = penalize_repetition(logits_BV, seen_BV, self.repetition_penalty)
        if self.banned_V is not None:
            logits_BV = ban(logits_BV, self.banned_V)
        if self.newlines is not None:
            logits_BV = ban(logits_BV, self.newlines.too_many(newline_run_B, self.newline_cap))
        if self.greedy:
            return logits_BV
        logits_BV = scale_temperature(logits_BV, self.temperature)
        if self.top_k is not None:
            logits_BV = keep_top_k(logits_BV, self.top_k)
        if self.top_p is not None:
            logits_BV = keep_top_p(logits_BV, self.top_p)
        if self.min_p is not None:
            logits_BV = keep_min_p(logits_BV, self.min_p)
        return logits_BV

    def draw(self, filtered_BV: Array, keys_B: Array) -> Array:
        """One token for each row from filtered logits, int32 [B]; the likeliest where greedy (the first of equals)."""
        # top_k of one is the argmax, NaN and ties alike, and on XLA's CPU backend twice as fast.
        return jax.lax.top_k(filtered_BV, 1)[1][:, 0] if self.greedy else draw(filtered_BV, keys_B)

    def log_probs(self, logits_BV: Array, filtered_BV: Array, tokens_B: Array) -> tuple[Array, Array]:
        """Natural-log probabilities [B] of the drawn tokens: under the distribution drawn from, and under
        softmax(logits / temperature) without any filter (temperature 1 where greedy)."""
        plain_B = log_probs(scale_temperature(logits_BV, self.temperature), tokens_B)
        return jnp.zeros_like(plain_B) if self.greedy else log_probs(filtered_BV, tokens_B), plain_B
