"""Supervised fine-tuning: of prompts with completions and of chats, the answers are learnt."""

from trainers.language_model import LanguageModelTrainer


class SFTTrainer(LanguageModelTrainer):
    """Learns completions and what the assistant says, with the token that ends a turn; of plain text, all of it."""

    learns_all = False
