"""Proximal policy optimisation with a critic: completions are drawn and scored, policy and critic learn from them."""

from collections.abc import Iterator, Mapping
from typing import Any

import optax
from flax import nnx

from trainers.actor_critic import ActorCritic, judge
from trainers.metrics import Throughput
from trainers.policy import PolicyConfig
from trainers.ppo_experience import PPOBatch, PPOExperience
from trainers.ppo_losses import PPOLossConfig, ppo_loss
from trainers.rollouts import RolloutConfig
from trainers.trainer import Loss, Trainer, TrainState
from utils.shapes import Array


class PPOTrainer(Trainer):
    """Trains an `ActorCritic` on rewards of its own completions; options as in `Trainer`.

    `rollout` says how completions are drawn, which the trainer has to know: their temperature is that of its
    log-probabilities. `experience` draws and scores them; without one the trainer can only be given batches that are
    ready. Source: arXiv:1707.06347, for language models arXiv:1909.08593 and arXiv:2203.02155.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        config: PPOLossConfig | None = None,
        *,
        rollout: RolloutConfig,
        policy: PolicyConfig | None = None,
        experience: PPOExperience | None = None,
        **options: Any,
    ):
        super().__init__(optimizer, **options)
        self.config, self.rollout = config or PPOLossConfig(), rollout
        self.policy = policy or PolicyConfig()
        self.experience = experience

    def prepare(
        self, state: TrainState, batches: Iterator[Any], throughput: Throughput
    ) -> tuple[PPOBatch, Mapping[str, float]] | None:
        """The next mini-batch of the rollout; where there is none left, prompts are rolled out and scored."""
        if self.experience is None:
            return super().prepare(state, batches, throughput)
        return self.experience.next(state.model, batches, throughput)

    def loss(self, model: ActorCritic | nnx.Module, batch: PPOBatch, key: Array | None) -> Loss:
        """The loss of policy and critic over all completions; see `trainers.ppo_losses` for its sums and metrics."""
        now = judge(model, batch, temperature=self.rollout.temperature, config=self.policy, key=key)

        def rows(x_BCM: Array) -> Array:
            return x_BCM.reshape(now.logprobs_BT.shape)

        return ppo_loss(
            now.logprobs_BT,
            now.values_BT,
            old_logprobs_BT=rows(batch.old_logprobs_BCM),
            old_values_BT=rows(batch.old_values_BCM),
            advantages_BT=rows(batch.advantages_BCM),
            returns_BT=rows(batch.returns_BCM),
            mask_BT=rows(batch.mask_BCM),
            entropy_BT=now.entropy_BT,
            config=self.config,
        )
