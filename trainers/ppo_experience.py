"""What PPO learns from: completions with their rewards, values and divergence, as mini-batches of several epochs.

All but the drawing and what is asked of networks is on the host. Letters as in `trainers.policy`; P prompts.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from models.llama import LLaMa
from trainers.actor_critic import ActorCritic, judge
from trainers.groups import Group, count_pieces, mean, padded, split_rows
from trainers.in_flight import InFlight
from trainers.policy import PolicyConfig
from trainers.ppo_losses import ESTIMATORS, explained_variance, gae, token_rewards, whiten
from trainers.rewards import Reward
from trainers.rollouts import RollOut, RolloutConfig
from trainers.scoring import log_probs_of, scored
from trainers.trainer import placement
from utils.shapes import Array


@dataclass(frozen=True, kw_only=True)
class PPOExperienceConfig:
    """From rewards to updates.

    `gamma` and `lam` as in `trainers.ppo_losses.gae`. `kl_coef` weighs the divergence from the reference in the rewards
    of tokens, as `kl_estimator` has it, one of `ESTIMATORS`; 0: there is no reference. `missing_eos_penalty` is taken
    off the score of completions that did not come to an end. With `whiten_rewards` those of tokens are whitened, as
    advantages always are, before these are made of them. A rollout is of `mini_batches` batches, each of which is an
    update of its own, in `epochs` rounds; each round shuffles anew which rows are in which.
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    missing_eos_penalty: float = 0.0
    whiten_rewards: bool = False
    epochs: int = 4
    mini_batches: int = 1

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        for name in ("kl_coef", "missing_eos_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {getattr(self, name)}")
        if self.kl_estimator not in ESTIMATORS:
            raise ValueError(f"kl_estimator {self.kl_estimator!r} is none of {', '.join(ESTIMATORS)}")
        for name in ("epochs", "mini_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PPOBatch:
    """`trainers.policy.Completions` with what is known of them, as in `trainers.ppo_losses.ppo_loss`.

    Leading axes are rows, which micro-batches and devices share out. `mask_BCM`, float32, is 1 for the tokens that are
    learnt.
    """

    prompts_BS: Array
    prompt_lengths_B: Array
    completions_BCM: Array
    mask_BCM: Array
    old_logprobs_BCM: Array
    old_values_BCM: Array
    advantages_BCM: Array
    returns_BCM: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """The completions of a rollout with their scores, NaN where no reward applies, before the networks are asked."""

    prompts_BS: Array
    prompt_lengths_B: Array
    completions_BCM: Array
    mask_BCM: Array
    sampler_logprobs_BCM: Array
    scores_BC: Array


@dataclass(frozen=True)
class _Known:
    """What is known of the tokens of a rollout, [N, M]; the reference's log-probabilities are None without one."""

    mask_NM: np.ndarray
    scores_N: np.ndarray
    logprobs_NM: np.ndarray
    entropy_NM: np.ndarray
    values_NM: np.ndarray
    sampler_logprobs_NM: np.ndarray
    reference_logprobs_NM: np.ndarray | None


class PPOExperience(InFlight):
    """Makes the batches that policy and critic learn from.

    `reference` is the network that the divergence is measured from, or a function of the policy that gives it. `rows`
    is what the rows of a batch must be a multiple of: micro-batches times the devices that share rows out; a prompt
    gets several rows where need be. `seed` decides how rounds are shuffled. Other arguments as in `InFlight`.

    Completions that no reward applies to are not learnt from.
    """

    batch = PPOBatch

    def __init__(
        self,
        roll_out: RollOut,
        rewards: Sequence[Reward],
        decode: Callable[[Sequence[int]], str],
        *,
        rollout: RolloutConfig,
        config: PPOExperienceConfig | None = None,
        policy: PolicyConfig | None = None,
        reference: LLaMa | Callable[[LLaMa], LLaMa] | None = None,
        compute_dtype: Any = None,
        micro_batches: int = 1,
        rows: int = 1,
        seed: int = 0,
    ):
        super().__init__(roll_out, rewards, decode, completions=rollout.completions, compute_dtype=compute_dtype)
        self._config, self._rows, self._seed = config or PPOExperienceConfig(), rows, seed
        if self._config.kl_coef and reference is None:
            raise ValueError(f"kl_coef {self._config.kl_coef} needs a reference model")
        options = dict(micro_batches=micro_batches, temperature=rollout.temperature, config=policy or PolicyConfig())
        self._judge = jax.jit(functools.partial(scored, judge, **options))
        self._log_probs = jax.jit(functools.partial(log_probs_of, **options))
        self._reference = self._cast(reference) if isinstance(reference, nnx.Module) else reference

    def policy_of(self, model: ActorCritic) -> LLaMa:
        return model.policy

    def updates(self, model: ActorCritic, groups: list[Group], number: int) -> tuple[list[PPOBatch], dict[str, float]]:
        """With advantages and returns by the critic as it is now."""
        drawn = self._drawn(groups)
        known = self._ask(model, drawn)
        config, mask_NM = self._config, known.mask_NM
        reference_NM = known.logprobs_NM if known.reference_logprobs_NM is None else known.reference_logprobs_NM
        rewards_NM = token_rewards(
            known.scores_N,
            known.logprobs_NM,
            reference_NM,
            mask_NM,
            kl_coef=config.kl_coef,
            estimator=config.kl_estimator,
        )
        if config.whiten_rewards:
            rewards_NM = whiten(rewards_NM, mask_NM)
        advantages_NM, returns_NM = gae(rewards_NM, known.values_NM, mask_NM, gamma=config.gamma, lam=config.lam)
        arrays_NM = dict(
            mask_BCM=mask_NM.astype(np.float32),
            old_logprobs_BCM=known.logprobs_NM,
            old_values_BCM=known.values_NM,
            advantages_BCM=whiten(advantages_NM, mask_NM),
            returns_BCM=returns_NM,
        )
        batch = PPOBatch(
            prompts_BS=drawn.prompts_BS,
            prompt_lengths_B=drawn.prompt_lengths_B,
            completions_BCM=drawn.completions_BCM,
            **{name: x_NM.reshape(drawn.completions_BCM.shape) for name, x_NM in arrays_NM.items()},
        )
        metrics = self._objective(known)
        metrics["value/explained_variance"] = explained_variance(known.values_NM, returns_NM, mask_NM)
        return list(self._shuffled(batch, len(groups), number)), metrics

    def _drawn(self, groups: list[Group]) -> _Drawn:
        """In as many rows as micro-batches and devices want; scores have the penalty in them."""
        num_updates = self._config.mini_batches
        if len(groups) % num_updates:
            raise ValueError(f"{len(groups)} prompts cannot be shared evenly by {num_updates} mini-batches")
        stopped_PC = np.stack([group.stopped_C for group in groups])
        scores_PC = np.stack([group.total_C for group in groups]) - self._config.missing_eos_penalty * ~stopped_PC
        arrays = padded(groups)
        mask_PCM = arrays.pop("mask_BCM") & ~np.isnan(scores_PC)[..., None]
        pieces = count_pieces(len(groups) // num_updates, self._completions, self._rows)
        return split_rows(_Drawn(**arrays, mask_BCM=mask_PCM, scores_BC=scores_PC.astype(np.float32)), pieces)

    def _ask(self, model: ActorCritic, drawn: _Drawn) -> _Known:
        """All that policy, critic and reference say of a rollout, as many rows at once as an update has."""
        size = len(drawn.prompt_lengths_B) // self._config.mini_batches
        place, reference = placement(model), self._reference
        if reference is not None and not isinstance(reference, nnx.Module):
            reference = reference(model.policy)
        found = []
        for start in range(0, len(drawn.prompt_lengths_B), size):
            rows = place(jax.tree.map(lambda x, start=start: x[start : start + size], drawn))
            judged = self._judge(model, rows)
            found.append((*judged, *([] if reference is None else self._log_probs(reference, rows)[:1])))
        M = drawn.completions_BCM.shape[-1]
        judged_NM = [np.concatenate(x).reshape(-1, M) for x in zip(*jax.device_get(found))]
        return _Known(
            drawn.mask_BCM.reshape(-1, M),
            drawn.scores_BC.reshape(-1),
            *judged_NM[:3],
            drawn.sampler_logprobs_BCM.reshape(-1, M),
            judged_NM[3] if reference is not None else None,
        )

    def _objective(self, known: _Known) -> dict[str, float]:
        """What is to be made large, and what it is made of: means over completions of sums over their tokens."""
        config, mask_NM = self._config, known.mask_NM
        own_N = mask_NM.any(axis=1)
        scores = mean(known.scores_N[own_N])
        metrics = {
            "objective/scores": scores,
            "objective/rlhf_reward": scores,
            "objective/entropy": mean(np.where(mask_NM, known.entropy_NM, 0).sum(axis=1)[own_N]),
            "sampler_logprob_diff": mean(np.abs(known.logprobs_NM - known.sampler_logprobs_NM)[mask_NM]),
        }
        if known.reference_logprobs_NM is not None:
            log_NM = np.where(mask_NM, known.reference_logprobs_NM - known.logprobs_NM, 0).astype(np.float64)
            kl = mean(ESTIMATORS[config.kl_estimator](log_NM).sum(axis=1)[own_N])
            metrics |= {"objective/kl": kl, "objective/non_score_reward": 0.0 - config.kl_coef * kl}
            metrics["objective/rlhf_reward"] += metrics["objective/non_score_reward"]
        return metrics

    def _shuffled(self, batch: PPOBatch, num_prompts: int, number: int) -> Iterator[PPOBatch]:
        """The mini-batches of all rounds; the order is that of the seed, the rollout and the round alone.

        Prompts are shuffled, with all their rows, of which there are more where there are more devices.
        """
        places = np.arange(len(batch.prompt_lengths_B)).reshape(num_prompts, -1)
        for epoch in range(self._config.epochs):
            order = np.random.default_rng((self._seed, number, epoch)).permutation(num_prompts)
            for chosen in np.split(order, self._config.mini_batches):
                rows = places[chosen].reshape(-1)
                yield jax.tree.map(lambda x, rows=rows: x[rows], batch)
