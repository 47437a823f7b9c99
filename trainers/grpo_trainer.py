"""Group relative policy optimisation: completions are drawn, scored, and made likelier by how they compare."""

from collections.abc import Iterator, Mapping
from typing import Any

import optax
from flax import nnx

from models.llama import LLaMa
from trainers.experience import Experience
from trainers.metrics import Throughput
from trainers.policy import PolicyBatch, PolicyConfig, completion_log_probs
from trainers.policy_losses import PolicyLossConfig, policy_loss
from trainers.rollouts import RolloutConfig
from trainers.trainer import Loss, Trainer, TrainState
from utils.shapes import Array


class GRPOTrainer(Trainer):
    """Learns from rewards of its own completions; options as in `Trainer`. Source: arXiv:2402.03300, sec. 4.1.

    `config` chooses among the losses of that family, `rollout` says how completions are drawn, which the trainer has
    to know: their temperature is that of its log-probabilities. `experience` draws and scores them; without one the
    trainer can only be given batches that are ready.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        config: PolicyLossConfig | None = None,
        *,
        rollout: RolloutConfig,
        policy: PolicyConfig | None = None,
        experience: Experience | None = None,
        **options: Any,
    ):
        super().__init__(optimizer, **options)
        self.config, self.rollout = config or PolicyLossConfig(), rollout
        self.policy = policy or PolicyConfig()
        self.experience = experience

    def prepare(
        self, state: TrainState, batches: Iterator[Any], throughput: Throughput
    ) -> tuple[PolicyBatch, Mapping[str, float]] | None:
        """The next update's share of the rollout; where there is none left, prompts are rolled out and scored."""
        if self.experience is None:
            return super().prepare(state, batches, throughput)
        return self.experience.next(state.model, batches, throughput)

    def loss(self, model: LLaMa | nnx.Module, batch: PolicyBatch, key: Array | None) -> Loss:
        """The policy loss of all completions; see `trainers.policy_losses` for its sums and metrics."""
        now = completion_log_probs(model, batch, temperature=self.rollout.temperature, config=self.policy, key=key)
        N, M = now.logprobs_BT.shape

        def rows(x_BCM: Array | None) -> Array | None:
            return None if x_BCM is None else x_BCM.reshape(N, M)

        return policy_loss(
            now.logprobs_BT,
            entropy_BT=now.entropy_BT,
            mask_BT=rows(batch.mask_BCM),
            advantages_B=batch.advantages_BC.reshape(N),
            old_logprobs_BT=rows(batch.old_logprobs_BCM),
            sampler_logprobs_BT=rows(batch.sampler_logprobs_BCM),
            reference_logprobs_BT=rows(batch.reference_logprobs_BCM),
            weights_BT=rows(batch.weights_BCM),
            rollout_tokens_B=None if batch.rollout_tokens_BC is None else batch.rollout_tokens_BC.reshape(N),
            max_completion=self.rollout.max_completion_length,
            config=self.config,
        )
