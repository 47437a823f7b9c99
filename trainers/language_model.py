"""The loss that pretraining and supervised fine-tuning share: the next token's cross-entropy over a packed batch."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import optax

from data.batch import Batch
from models.llama import LLaMa
from trainers.losses import cross_entropy
from trainers.trainer import Loss, Trainer
from utils.shapes import Array


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """How the model is run for the loss: see `LLaMa.hidden` (remat, dropout, attention) and `cross_entropy`."""

    dropout: float = 0.0
    remat: Literal["none", "dots", "block", "everything"] = "dots"
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be at least 0 and below 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing {self.label_smoothing} must be at least 0 and below 1")
        if self.z_loss < 0:
            raise ValueError(f"z_loss {self.z_loss} must not be negative")


def language_model_loss(model: LLaMa, batch: Batch, key: Array | None, config: LanguageModelConfig) -> Loss:
    """The cross-entropy of the targets, in nats, over their weights. Documents of a row do not see each other.

    Metrics: `nll`, the cross-entropy without smoothing and z term; `accuracy`, the share of targets that were the most
    likely token; `entropy` of the predictions, in nats; `packing`, the share of places that hold a token.
    """
    x_BTD, _ = model.hidden(
        batch.tokens_BT,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
        implementation=config.attention,
        remat=config.remat,
        dropout_rate=config.dropout,
        key=key,
    )
    sums = cross_entropy(
        x_BTD,
        model.unembedding,
        batch.targets_BT,
        batch.weights_BT,
        z_loss=config.z_loss,
        label_smoothing=config.label_smoothing,
    )
    weight = batch.weights_BT.sum()
    metrics = {"nll": (sums.nll, weight), "accuracy": (sums.correct, weight), "entropy": (sums.entropy, weight)}
    filled = (batch.segments_BT > 0).astype(jnp.float32)
    return Loss(sums.loss, weight, metrics | {"packing": (filled.sum(), jnp.float32(filled.size))})


class LanguageModelTrainer(Trainer):
    """Next-token prediction; options as in `Trainer` and `LanguageModelConfig`.

    `learns_all` says what its data are to give weight to: every token, or completions and assistant turns alone.
    """

    learns_all: ClassVar[bool]

    def __init__(
        self, optimizer: optax.GradientTransformation, config: LanguageModelConfig | None = None, **options: Any
    ):
        super().__init__(optimizer, **options)
        self.config = config or LanguageModelConfig()

    def loss(self, model: LLaMa, batch: Batch, key: Array | None) -> Loss:
        return language_model_loss(model, batch, key, self.config)
