"""What the sides of `benchmarks.dpo` are told. Without what is heavy, for any environment."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from benchmarks.peers import LOWEST_ID

BETA = 0.1
NUM_BATCHES = 64  # of pairs; then the first again
END_ID = LOWEST_ID - 1  # the last token of every completion: TRL writes one behind those that have none
SETTINGS = {
    "ours": r"pages|micro\d+|shared|repeated|none|dots|block|everything",
    "trl": r"pages|micro\d+|checkpointing|compiled",
    "tunix": r"pages",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What every side is to do: steps from the checkpoint in `folder`, beside the reference in `reference`.

    A step learns from `pairs` pairs of completions of `completion_tokens` tokens, each of a prompt of `prompt_tokens`:
    the sigmoid loss of DPO with `BETA`, the reference's log-probabilities computed in the step, one AdamW update.
    """

    folder: str
    reference: str
    pairs: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def rows(self) -> int:
        """Pairs, which micro-batches share out."""
        return self.pairs

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """prompt, chosen and rejected: ids of a step's pairs, int32, the same for every side."""
        vocabulary = json.loads((Path(self.folder) / "config.json").read_text())["vocab_size"]
        rng = np.random.default_rng(step % NUM_BATCHES)
        lengths = {"prompt": self.prompt_tokens, "chosen": self.completion_tokens, "rejected": self.completion_tokens}
        ids = {name: rng.integers(LOWEST_ID, vocabulary, (self.pairs, n), np.int32) for name, n in lengths.items()}
        for name in ("chosen", "rejected"):
            ids[name][:, -1] = END_ID
        return ids

    def texts(self, step: int) -> list[dict[str, str]]:
        """The same for each pair as texts whose words are ids: see `benchmarks.peers.word_tokenizer`."""
        batch = self.batch(step)
        text = {name: [" ".join(map(str, row)) for row in ids] for name, ids in batch.items()}
        for name in ("chosen", "rejected"):
            text[name] = [f" {words.removesuffix(str(END_ID))}<end>" for words in text[name]]
        return [dict(zip(text, rows)) for rows in zip(*text.values())]
