"""The loss of distillation: how far a student's predictions for a packed batch are from a frozen teacher's."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from data.batch import Batch
from models.llama import LLaMa
from trainers.distillation_losses import DistillationLossConfig, distillation
from trainers.trainer import Loss
from utils.shapes import Array


@dataclass(frozen=True, kw_only=True)
class DistillConfig(DistillationLossConfig):
    """What the loss is, and how the student is run for it: see `LLaMa.hidden` (remat, dropout, attention).

    The teacher is run with the same attention, and without dropout.
    """

    dropout: float = 0.0
    remat: Literal["none", "dots", "block", "everything"] = "dots"
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")


def distillation_loss(model: LLaMa, teacher: LLaMa, rows: Batch, key: Array | None, config: DistillConfig) -> Loss:
    """The distillation loss over the weights of the targets. Documents of a row do not see each other.

    Metrics: `divergence`, in nats, at the loss's temperature; of the student's predictions of the targets `nll`,
    `accuracy`, the share that were the most likely token, and `entropy`; `packing`, the share of places that hold a
    token.
    """
    places = dict(positions_BT=rows.positions_BT, segments_BT=rows.segments_BT, implementation=config.attention)
    teacher = jax.lax.stop_gradient(teacher)
    teacher_x_BTE, _ = teacher.hidden(rows.tokens_BT, **places)
    x_BTD, _ = model.hidden(rows.tokens_BT, **places, remat=config.remat, dropout_rate=config.dropout, key=key)
    sums = distillation(
        x_BTD,
        model.unembedding,
        teacher_x_BTE,
        teacher.unembedding,
        rows.targets_BT,
        rows.weights_BT,
        config=config,
    )
    weight = rows.weights_BT.sum()
    metrics = {"divergence": sums.divergence, "nll": sums.nll, "accuracy": sums.correct, "entropy": sums.entropy}
    filled = (rows.segments_BT > 0).astype(jnp.float32)
    packing = filled.sum(), jnp.float32(filled.size)
    return Loss(sums.loss, weight, {name: (own, weight) for name, own in metrics.items()} | {"packing": packing})
