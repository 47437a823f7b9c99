"""Direct preference optimisation and its kin: of two answers to a prompt the better one is made likelier."""

from collections.abc import Iterator, Mapping
from typing import Any

import optax

from models.llama import LLaMa
from trainers.metrics import Throughput
from trainers.policy import PolicyConfig, completion_log_probs
from trainers.preference_batch import PreferenceBatch, num_tokens
from trainers.preference_losses import PreferenceLossConfig, kto_loss, preference_loss
from trainers.reference import Reference
from trainers.trainer import AS_WRITTEN, Loss, Trainer, TrainState, num_runs
from utils.shapes import Array


class DPOTrainer(Trainer):
    """Learns from preferences, without a reward model; options as in `Trainer`. Source: arXiv:2305.18290.

    `config` chooses among the losses of that family. `reference` gives the log-probabilities that those of the policy
    are compared with; without one they have to be in the batches, unless the loss needs none. Chosen and rejected
    completions go through the model together, behind their prompt, which is run once where `policy` has it so.
    """

    compiler_options = AS_WRITTEN  # differences from the reference are small

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        config: PreferenceLossConfig | None = None,
        *,
        policy: PolicyConfig | None = None,
        reference: Reference | None = None,
        **options: Any,
    ):
        super().__init__(optimizer, **options)
        self.config, self.policy = config or PreferenceLossConfig(), policy or PolicyConfig()
        self.reference = reference

    def prepare(
        self, state: TrainState, batches: Iterator[PreferenceBatch], throughput: Throughput
    ) -> tuple[PreferenceBatch, Mapping[str, float]] | None:
        """The next batch, with what the reference says of it."""
        with throughput.waiting():
            batch = next(batches, None)
        if batch is None:
            return None
        throughput.add_step(tokens=num_tokens(batch) * num_runs(state.model))
        return self.scored(state.model, batch), {}

    def scored(self, model: LLaMa, batch: PreferenceBatch) -> PreferenceBatch:
        """A batch with all that the loss reads, where it is not there yet. Raises ValueError for what is missing."""
        if not self.config.needs_reference:
            return batch
        missing = batch.reference_logps_BC is None, not self.config.paired and batch.kl_B is None
        if not any(missing):
            return batch
        if self.reference is None:
            raise ValueError(f"loss {self.config.name!r} needs a reference, and the batch has none of its numbers")
        batch = self.reference.scored(model, batch) if missing[0] else batch
        return self.reference.with_baseline(model, batch) if missing[1] else batch

    def loss(self, model: LLaMa, batch: PreferenceBatch, key: Array | None) -> Loss:
        """The loss of all rows; see `trainers.preference_losses` for its sums and metrics."""
        now = completion_log_probs(model, batch, temperature=1.0, config=self.policy, key=key)
        logprobs_BCM = now.logprobs_BT.reshape(batch.completions_BCM.shape)
        common = dict(
            mask_BCM=batch.mask_BCM,
            reference_logps_BC=batch.reference_logps_BC,
            weights_B=batch.weights_B,
            config=self.config,
        )
        if self.config.paired:
            return preference_loss(logprobs_BCM, **common)
        return kto_loss(logprobs_BCM, kl_B=batch.kl_B, desirable_B=batch.desirable_B, **common)
