"""Knowledge distillation: a student learns the whole distribution that a frozen teacher predicts for each token."""

from collections.abc import Iterator, Mapping
from typing import Any

import optax

from data.batch import Batch
from models.llama import LLaMa
from trainers.distillation import DistillConfig, distillation_loss
from trainers.metrics import Throughput
from trainers.own_samples import OwnSamples
from trainers.trainer import Loss, Trainer, TrainState, WithShared
from utils.shapes import Array


class DistillTrainer(Trainer):
    """Learns from a teacher's predictions; options as in `Trainer`. Sources: arXiv:1503.02531, arXiv:2306.13649.

    Its batches are rows of the data with the `teacher`, which it adds itself; without a teacher it can only be given
    batches that are ready. With `samples` some steps learn from completions that the student draws at that moment, in
    place of the data, which stay where they are.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        config: DistillConfig | None = None,
        *,
        teacher: LLaMa | None = None,
        samples: OwnSamples | None = None,
        **options: Any,
    ):
        super().__init__(optimizer, **options)
        self.config = config or DistillConfig()
        self.teacher, self.samples = teacher, samples

    def with_teacher(self, rows: Batch) -> WithShared:
        """What a step and an evaluation are given."""
        return WithShared(rows, self.teacher)

    def prepare(
        self, state: TrainState, batches: Iterator[Any], throughput: Throughput
    ) -> tuple[Any, Mapping[str, float]] | None:
        """Rows of the data or, in the steps that are for them, the student's own completions; with the teacher."""
        if self.teacher is None:
            return super().prepare(state, batches, throughput)
        if self.samples is not None and self.samples.wanted(step := int(state.step)):
            prepared = self.samples.draw(state.model, step, throughput)
        else:
            prepared = super().prepare(state, batches, throughput)
        if prepared is None:
            return None
        rows, metrics = prepared
        return self.with_teacher(rows), metrics

    def loss(self, model: LLaMa, batch: WithShared, key: Array | None) -> Loss:
        """See `trainers.distillation.distillation_loss`."""
        return distillation_loss(model, batch.shared, batch.rows, key, self.config)
