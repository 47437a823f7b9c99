"""Supervised fine-tuning: of prompts and answers, or chats, the answers are learnt."""

from typing import Any

import optax

from data.batch import Batch
from models.llama import LLaMa
from trainers.language_model import LanguageModelConfig, language_model_loss
from trainers.trainer import Loss, Trainer
from utils.shapes import Array


class SFTTrainer(Trainer):
    """Next-token prediction where the batch has weights: `data` gives them to assistant turns and completions alone.

    Options as in `Trainer` and `LanguageModelConfig`.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        config: LanguageModelConfig | None = None,
        **options: Any,
    ):
        super().__init__(optimizer, **options)
        self.config = config or LanguageModelConfig()

    def loss(self, model: LLaMa, batch: Batch, key: Array | None) -> Loss:
        return language_model_loss(model, batch, key, self.config)
