"""Reward models: a network learns to give the better of two answers the higher score."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from models.llama.scalar import ScalarLLaMa
from trainers.metrics import Throughput
from trainers.policy import PolicyConfig, completion_states
from trainers.preference_batch import PreferenceBatch, num_tokens
from trainers.preference_losses import RewardLossConfig, reward_loss
from trainers.trainer import Loss, Trainer, TrainState, num_runs
from utils.shapes import Array


class RewardTrainer(Trainer):
    """Learns scores of texts from pairs; options as in `Trainer`. Source: arXiv:2203.02155, sec. 3.5, eq. 1.

    A text's score is at its last token, learnt or not. Both texts of a pair go through the network together, behind
    what they begin with in common, which is run once where `policy` has it so.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        config: RewardLossConfig | None = None,
        *,
        policy: PolicyConfig | None = None,
        **options: Any,
    ):
        super().__init__(optimizer, **options)
        self.config, self.policy = config or RewardLossConfig(), policy or PolicyConfig()

    def prepare(
        self, state: TrainState, batches: Iterator[PreferenceBatch], throughput: Throughput
    ) -> tuple[PreferenceBatch, Mapping[str, float]] | None:
        """The next batch, counted."""
        prepared = super().prepare(state, batches, throughput)
        if prepared is not None:
            throughput.add_step(tokens=num_tokens(prepared[0]) * num_runs(state.model))
        return prepared

    def loss(self, model: ScalarLLaMa, batch: PreferenceBatch, key: Array | None) -> Loss:
        """The Bradley-Terry loss of all pairs; see `reward_loss` for its sums and metrics."""
        scores_BC = text_scores(model, batch, config=self.policy, key=key)
        return reward_loss(scores_BC, margins_B=batch.margins_B, weights_B=batch.weights_B, centre=self.config.centre)


def text_scores(model: ScalarLLaMa, batch: PreferenceBatch, *, config: PolicyConfig, key: Array | None = None) -> Array:
    """Scores of the texts that a batch's completions end, float32 [B, C]."""
    x_NPD = completion_states(model.llama, batch, config=config, key=key)
    last_N = batch.lengths_BC.reshape(-1)  # the state 0 is that of the prompt's last token
    x_N1D = jnp.take_along_axis(x_NPD, last_N[:, None, None], axis=1)
    return model.scores(x_N1D)[:, 0].reshape(batch.lengths_BC.shape)
