"""What a policy is compared with where it learns from preferences: the reference's log-probabilities of completions."""

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.preferences import PreferenceSource
from data.records import BadRow
from data.row_sources import TooLong
from trainers.policy import PolicyConfig
from trainers.preference_batch import PreferenceBatch, collate
from trainers.scoring import log_probs_of
from trainers.trainer import cast, placement
from utils.shapes import Array
from utils.sharding import on_mesh_of


class Reference:
    """Log-probabilities, in nats, summed over the tokens that are learnt.

    `model` is the reference, or a function of the policy that gives it, such as one that takes its adapters off. It
    computes as the policy does: in `compute_dtype`, see `Trainer`, and in as many micro-batches.
    """

    def __init__(
        self,
        model: nnx.Module | Callable[[Any], nnx.Module],
        *,
        policy: PolicyConfig | None = None,
        compute_dtype: Any = None,
        micro_batches: int = 1,
    ):
        options = dict(config=policy or PolicyConfig(), micro_batches=micro_batches, temperature=1.0)
        cast_to = partial(cast, dtype=compute_dtype)
        self._model = jax.jit(cast_to)(model) if isinstance(model, nnx.Module) else model
        self._sums = jax.jit(lambda model, batch: _sums(cast_to(model), batch, options))
        self._divergence = jax.jit(lambda *args: _divergence(*map(cast_to, args[:2]), args[2], options))

    def scored(self, policy: nnx.Module, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch, of which a process may give its rows, with `reference_logps_BC`, on the devices of the policy."""
        with on_mesh_of(policy):
            placed = placement(policy)(batch)
            return replace(placed, reference_logps_BC=self._sums(self._of(policy), placed))

    def with_baseline(self, policy: nnx.Module, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch with `kl_B`, KTO's estimate of how far the policy is from the reference.

        It is the mean log-ratio, at least 0, of prompts with the completion of the row before, over the rows of the
        whole batch whose weight is not 0. Source: KTO, arXiv:2402.01306, sec. 4.1; as there it is biased.
        """
        with on_mesh_of(policy):
            placed = placement(policy)(batch)
            return replace(placed, kl_B=self._divergence(policy, self._of(policy), placed))

    def _of(self, policy: nnx.Module) -> nnx.Module:
        return self._model if isinstance(self._model, nnx.Module) else self._model(policy)


def _sums(model: nnx.Module, batch: PreferenceBatch, options: Mapping[str, Any]) -> Array:
    logprobs_BCM, _ = log_probs_of(model, batch, **options)
    return jnp.sum(jnp.where(batch.mask_BCM > 0, logprobs_BCM, 0), axis=-1)


def _divergence(policy: nnx.Module, reference: nnx.Module, batch: PreferenceBatch, options: Mapping[str, Any]) -> Array:
    others = {name: jnp.roll(getattr(batch, name), 1, axis=0) for name in ("completions_BCM", "mask_BCM")}
    weights_B = batch.weights_B * jnp.roll(batch.weights_B, 1)  # rows that only fill up have no completion
    mixed = replace(batch, **others)
    ratio_B = (_sums(policy, mixed, options) - _sums(reference, mixed, options))[:, 0]
    mean = jnp.sum(jnp.where(weights_B > 0, ratio_B, 0)) / jnp.maximum(jnp.sum(weights_B > 0), 1)
    return jnp.full_like(ratio_B, jnp.maximum(mean, 0))


@dataclass(frozen=True)
class ScoredPreferences:
    """Log-probabilities of the reference, made once for all rows of a source; row i is that of `source[i]`."""

    logps_IC: np.ndarray

    def batch(self, rows: Sequence[Any], **sizes: Any) -> PreferenceBatch:
        """`trainers.preference_batch.collate` of the rows, with what the reference makes of them."""
        batch = collate(rows, **sizes)
        logps_BC = np.zeros(batch.lengths_BC.shape, np.float32)
        logps_BC[: len(rows)] = self.logps_IC[[row.index for row in rows]]
        return replace(batch, reference_logps_BC=logps_BC)


def score_all(
    source: PreferenceSource,
    reference: Reference,
    policy: nnx.Module,
    *,
    cache_dir: str | Path,
    made_by: Any,
    sizes: Mapping[str, int],
    batch_size: int,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> ScoredPreferences:
    """What the reference makes of every row of a source, from the file in `cache_dir` where that has been done before.

    `made_by` is, as a value with a repr of its own, all that the numbers depend on beside the source: the reference
    and how it computes. `sizes` and `batch_size` are those of batches. Rows that are left out have NaN. A file is
    written whole or not at all.
    """
    key = hashlib.sha256(repr((source.fingerprint, made_by, sorted(sizes.items()))).encode()).hexdigest()
    path = Path(cache_dir) / f"reference-{key}.npy"
    if path.is_file():
        return ScoredPreferences(np.load(path))
    found: dict[int, np.ndarray] = {}
    waiting: list[Any] = []

    def score() -> None:
        batch = reference.scored(policy, collate(waiting, multiple=batch_size, **sizes))
        logps_BC = np.asarray(batch.reference_logps_BC)
        found.update((row.index, logps_C) for row, logps_C in zip(waiting, logps_BC))
        waiting.clear()

    for index in range(len(source)):
        try:
            waiting.append(source[index])
        except (TooLong, BadRow):
            if not source.skip_bad:
                raise
        if len(waiting) == batch_size:
            score()
            say(index + 1, len(source))
    if waiting:
        score()
    C = next(iter(found.values())).size
    logps_IC = np.stack([found.get(index, np.full(C, np.nan, np.float32)) for index in range(len(source))])
    _write(path, logps_IC)
    return ScoredPreferences(logps_IC)


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("wb") as file:
            np.save(file, values)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def files_of(checkpoint: str | Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a checkpoint's files: what tells it from another one."""
    path = Path(checkpoint).absolute()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
