"""Pretraining: every token of a text is learnt."""

from trainers.language_model import LanguageModelTrainer


class PretrainTrainer(LanguageModelTrainer):
    """Learns all of every document, of chats and prompts too."""

    learns_all = True
