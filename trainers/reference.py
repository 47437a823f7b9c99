"""What a policy is compared with where it learns from preferences: the reference's log-probabilities of completions."""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from trainers.policy import PolicyConfig
from trainers.preference_batch import PreferenceBatch, collate
from trainers.scoring import log_probs_of
from trainers.trainer import AS_WRITTEN, cast, placement
from utils.shapes import Array
from utils.sharding import on_mesh_of


class Reference:
    """Log-probabilities, in nats, summed over the tokens that are learnt.

    `model` is the reference, or a function of the policy that gives it, such as one that takes its adapters off. It
    computes as the policy does: in `compute_dtype`, see `Trainer`, in as many micro-batches, and rounded alike, so
    that where the two are the same network their log-probabilities are.
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
        compiled = partial(jax.jit, compiler_options=AS_WRITTEN)
        self._digest = weights_digest(model) if isinstance(model, nnx.Module) else None
        self._model = jax.jit(cast_to)(model) if isinstance(model, nnx.Module) else model
        self._sums = compiled(lambda model, batch: _sums(cast_to(model), batch, options))
        self._divergence = compiled(lambda *args: _divergence(*map(cast_to, args[:2]), args[2], options))

    def of(self, policy: nnx.Module) -> nnx.Module:
        """The network that this policy is compared with."""
        return self._model if isinstance(self._model, nnx.Module) else self._model(policy)

    def digest(self, policy: nnx.Module) -> str:
        """A name for its weights, in the dtype that they came in."""
        return self._digest or weights_digest(self.of(policy))

    def scored(self, policy: nnx.Module, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch, of which a process may give its rows, with `reference_logps_BC`, on the devices of the policy."""
        with on_mesh_of(policy):
            placed = placement(policy)(batch)
            return replace(placed, reference_logps_BC=self._sums(self.of(policy), placed))

    def with_baseline(self, policy: nnx.Module, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch with `kl_B`, KTO's estimate of how far the policy is from the reference.

        It is the mean log-ratio, at least 0, of prompts with the completion of the row before, over the rows of the
        whole batch whose weight is not 0. Source: KTO, arXiv:2402.01306, sec. 4.1; as there it is biased.
        """
        with on_mesh_of(policy):
            placed = placement(policy)(batch)
            return replace(placed, kl_B=self._divergence(policy, self.of(policy), placed))


def weights_digest(model: nnx.Module) -> str:
    """A name for the numbers of a network, the same however they lie on devices."""

    @jax.jit
    def sums(leaves: list[Array]) -> list[Array]:
        words = [jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32) for x in leaves]
        places = [jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape) * jnp.uint32(2654435761) + 1 for x in words]
        return [jnp.sum(x * place, dtype=jnp.uint32) for x, place in zip(words, places)]

    leaves = jax.tree_util.tree_leaves_with_path(model)
    found = [int(x) for x in sums([leaf for _, leaf in leaves])]
    named = [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves]
    return hashlib.sha256(repr((named, found)).encode()).hexdigest()


class SameWeights:
    """What a checkpoint carries of a network that it does not hold: a resumed run has to have the same one.

    `what` is how the network is called where it is another, `digest` its `weights_digest`. Raises ValueError there.
    """

    def __init__(self, what: str, digest: str):
        self._what, self._digest = what, digest

    def state(self) -> dict[str, str]:
        return {"weights": self._digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["weights"] != self._digest:
            raise ValueError(f"{self._what} is not the network that it was when the run began: its weights changed")


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
) -> ScoredPreferences:
    """What the reference makes of every row of a source, from the file in `cache_dir` where that has been done before.

    `made_by` is, as a value with a repr of its own, all that the numbers depend on beside the source and the weights of
    the reference: the tokenizer, and how it computes. `sizes` and `batch_size` are those of batches. Rows that are left
    out have NaN. A file is written whole or not at all, and made anew where it is damaged.

    Raises ValueError where no row can be used.
    """
    weights = reference.digest(policy)
    key = hashlib.sha256(repr((source.fingerprint, weights, made_by, sorted(sizes.items()))).encode()).hexdigest()
    path = Path(cache_dir) / f"reference-{key}.npy"
    if (kept := _read(path, len(source))) is not None:
        return ScoredPreferences(kept)
    found: dict[int, np.ndarray] = {}
    for rows in _usable(source, batch_size):
        batch = reference.scored(policy, collate(rows, multiple=batch_size, **sizes))
        logps_BC = np.asarray(batch.reference_logps_BC)
        found.update((row.index, logps_C) for row, logps_C in zip(rows, logps_BC))
    missing_C = np.full_like(next(iter(found.values())), np.nan)
    logps_IC = np.stack([found.get(index, missing_C) for index in range(len(source))])
    _write(path, logps_IC)
    return ScoredPreferences(logps_IC)


def _usable(source: PreferenceSource, count: int) -> Iterator[list[Any]]:
    """The rows of a source in runs of `count`, without those to be skipped. Raises ValueError where there are none."""
    waiting, used, last = [], 0, None
    for index in range(len(source)):
        try:
            waiting.append(source[index])
        except BadRow as error:
            if not source.skip_bad:
                raise
            last = error
        if len(waiting) == count:
            yield waiting
            waiting, used = [], used + count
    if waiting:
        yield waiting
    elif not used:
        raise ValueError(f"not one of {len(source):,} {source.unit} can be used, the last: {last}")


def _read(path: Path, count: int) -> np.ndarray | None:
    """The numbers of a file; None where it is not there or not whole."""
    try:
        values = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    return values if len(values) == count else None


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
