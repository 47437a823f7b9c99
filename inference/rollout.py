"""Completions of prompts as arrays, for training on them: prompts are prefilled once and forked to their samples."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from inference.completion import Request, check_prompts, decode_all, start
from models.llama import LLaMa
from sampling import SamplingParams


class Rollout(NamedTuple):
    """What was drawn, numpy arrays; row b is sample b % C of prompt b // C, where each prompt has C samples.

    Row b drew the first `count_B`[b] of `tokens_BM`, int32, with zeros behind; `stopped_B` tells whether the last of
    them is a stop token. `logprobs_BM`, float32, are natural logs under softmax(logits / temperature).
    """

    tokens_BM: np.ndarray
    count_B: np.ndarray
    logprobs_BM: np.ndarray
    stopped_B: np.ndarray


def roll_out(
    model: LLaMa, prompts: Sequence[Sequence[int]], request: Request, *, numbers: Sequence[int] | None = None
) -> Rollout:
    """Draw `request.num_samples` completions of each prompt, all at once, on the devices that the model lies on.

    `numbers` are those that the samples of a prompt draw their keys from, by default its place in the list, see
    `Request`. M is `request.max_new_tokens`. A completion never outgrows the model's context.
    Raises ValueError for an empty prompt or one that fills the context.
    """
    check_prompts(model, prompts)
    numbers = range(len(prompts)) if numbers is None else numbers
    samples = range(request.num_samples)
    request = replace(request, logprobs=True)
    state, rules, stop_E = start(model, prompts, request, indices=list(numbers), samples=samples)
    state = decode_all(model, state, rules, stop_E)
    tokens_BM, count_B, logprobs_BM = jax.device_get((state.tokens_BM, state.count_B, state.plain_logprobs_BM))
    last_B = np.take_along_axis(tokens_BM, np.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
    M = request.max_new_tokens
    return Rollout(tokens_BM[:, :M], count_B, logprobs_BM[:, :M], (count_B > 0) & np.isin(last_B, stop_E))


def sampler(
    *,
    max_new_tokens: int,
    num_samples: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    stop_ids: frozenset[int],
    seed: int,
    rows_at_once: int | None = None,
) -> Callable[[LLaMa, Sequence[Sequence[int]], Sequence[int]], Rollout]:
    """What trainers draw completions with: `roll_out` of a model, prompts and their numbers, with these options.

    `rows_at_once` bounds the completions, and so the cache, that are in memory together; the draws stay the same.

    Raises ValueError for options out of range.
    """
    request = Request(
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        sampling=SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        stop_ids=stop_ids,
        seed=seed,
    )

    def draw(model: LLaMa, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> Rollout:
        size = len(prompts) if rows_at_once is None else max(1, rows_at_once // num_samples)
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        drawn = [roll_out(model, prompts[part], request, numbers=numbers[part]) for part in parts]
        return drawn[0] if len(drawn) == 1 else Rollout(*map(np.concatenate, zip(*drawn)))

    return draw
