"""What a policy learns from: how the completions of a prompt compare with each other, as batches of updates.

All but the drawing and the log-probabilities is on the host. Letters as in `trainers.policy`; P prompts.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from trainers.advantages import advantages, has_spread
from trainers.groups import Group, count_pieces, padded, split_rows
from trainers.in_flight import InFlight
from trainers.policy import PolicyBatch, PolicyConfig
from trainers.policy_losses import PolicyLossConfig, top_entropy_weights
from trainers.rewards import Reward
from trainers.rollouts import RollOut, RolloutConfig
from trainers.scoring import log_probs_of
from trainers.trainer import placement


@dataclass(frozen=True, kw_only=True)
class ExperienceConfig:
    """From rewards to updates.

    `estimator` and `scale_rewards` as in `trainers.advantages`. A rollout is of `updates_per_rollout` batches, each of
    which is an update of its own, in `epochs_per_rollout` rounds: all but the first are off-policy. `mask_truncated`
    leaves completions out that did not come to an end. `dynamic_sampling`: groups without spread are replaced by new
    prompts, in up to so many further rollouts; 0 keeps them. `top_entropy` is the share of tokens that are learnt,
    those of the highest entropy.
    """

    estimator: Literal["group", "rloo"] = "group"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    updates_per_rollout: int = 1
    epochs_per_rollout: int = 1
    mask_truncated: bool = False
    dynamic_sampling: int = 0
    top_entropy: float = 1.0

    def __post_init__(self) -> None:
        for name in ("updates_per_rollout", "epochs_per_rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dynamic_sampling < 0:
            raise ValueError(f"dynamic_sampling must be at least 0, not {self.dynamic_sampling}")
        if not 0 < self.top_entropy <= 1:
            raise ValueError(f"top_entropy {self.top_entropy} must be above 0 and at most 1")


class Experience(InFlight):
    """Makes the batches that a policy learns from by group-relative advantages.

    `rows` is what the rows of a batch must be a multiple of: micro-batches times the devices that share rows out; a
    prompt gets several rows where need be. `reference` is the model that the divergence is measured from, or a function
    of the policy that gives it. Other arguments as in `InFlight`.
    """

    batch = PolicyBatch

    def __init__(
        self,
        roll_out: RollOut,
        rewards: Sequence[Reward],
        decode: Callable[[Sequence[int]], str],
        *,
        rollout: RolloutConfig,
        config: ExperienceConfig | None = None,
        loss: PolicyLossConfig | None = None,
        policy: PolicyConfig | None = None,
        reference: nnx.Module | Callable[[nnx.Module], nnx.Module] | None = None,
        compute_dtype: Any = None,
        micro_batches: int = 1,
        rows: int = 1,
    ):
        self._config = config or ExperienceConfig()
        super().__init__(
            roll_out,
            rewards,
            decode,
            completions=rollout.completions,
            compute_dtype=compute_dtype,
            resample=self._config.dynamic_sampling,
        )
        loss = loss or PolicyLossConfig()
        if loss.beta and reference is None:
            raise ValueError(f"beta {loss.beta} needs a reference model")
        self._rows = rows
        options = dict(micro_batches=micro_batches, temperature=rollout.temperature, config=policy or PolicyConfig())
        self._log_probs = jax.jit(functools.partial(log_probs_of, **options))
        self._reference = self._cast(reference) if isinstance(reference, nnx.Module) else reference

    def observed(self, groups: list[Group]) -> dict[str, float]:
        """The share of groups from which nothing is learnt."""
        return {"frac_reward_zero_std": float(np.mean(~has_spread(np.stack([group.total_C for group in groups]))))}

    def updates(
        self, model: nnx.Module, groups: list[Group], number: int
    ) -> tuple[list[PolicyBatch], dict[str, float]]:
        """With all log-probabilities that the updates need."""
        config = self._config
        advantages_PC = advantages(
            np.stack([group.total_C for group in groups]), estimator=config.estimator, scale=config.scale_rewards
        )
        whole = _batch(groups, advantages_PC, mask_truncated=config.mask_truncated)
        num_updates = config.updates_per_rollout
        if len(groups) % num_updates:
            raise ValueError(f"{len(groups)} prompts cannot be shared evenly by {num_updates} updates")
        size = len(groups) // num_updates
        pieces = count_pieces(size, self._completions, self._rows)
        updates = []
        for start in range(0, len(groups), size):
            update = jax.tree.map(lambda x, start=start: x[start : start + size], whole)
            updates.append(self._with_log_probs(model, split_rows(update, pieces)))
        return updates * config.epochs_per_rollout, {}

    def _with_log_probs(self, policy: nnx.Module, batch: PolicyBatch) -> PolicyBatch:
        """The batch with log-probabilities of the policy now and of the reference, where anything needs them."""
        config = self._config
        placed = placement(policy)(batch)
        changes = {}
        if self._reference is not None:
            is_model = isinstance(self._reference, nnx.Module)
            reference = self._reference if is_model else self._reference(policy)
            changes["reference_logprobs_BCM"] = jax.device_get(self._log_probs(reference, placed)[0])
        if config.updates_per_rollout * config.epochs_per_rollout > 1 or config.top_entropy < 1:
            old_BCM, entropy_BCM = jax.device_get(self._log_probs(policy, placed))
            changes["old_logprobs_BCM"] = old_BCM
            if config.top_entropy < 1:
                B, C, M = entropy_BCM.shape
                rows = [x.reshape(B * C, M) for x in (entropy_BCM, batch.mask_BCM)]
                weights = np.asarray(top_entropy_weights(*rows, config.top_entropy))
                changes["weights_BCM"] = weights.reshape(B, C, M)
        return replace(batch, **changes)


def _batch(groups: Sequence[Group], advantages_PC: np.ndarray, *, mask_truncated: bool) -> PolicyBatch:
    """One row for each prompt."""
    arrays = padded(groups)
    mask_PCM = arrays.pop("mask_BCM")
    if mask_truncated:
        mask_PCM &= np.stack([group.stopped_C for group in groups])[..., None]
    tokens = mask_PCM.sum() / advantages_PC.size
    return PolicyBatch(
        **arrays,
        mask_BCM=mask_PCM.astype(np.float32),
        advantages_BC=advantages_PC,
        rollout_tokens_BC=np.full(advantages_PC.shape, tokens, np.float32),
    )
