"""A byte-level BPE tokenizer made of some texts, in the files that checkpoints keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"

# As Llama 3 cuts text, without English contractions and with every digit on its own: words with the space before them,
# digits, punctuation, white space.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+(?!\S)|\s+"


def train_tokenizer(
    texts: Iterable[str],
    folder: str | Path,
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    plain_tokens: Sequence[str] = (),
    eos_token: str = END_OF_TEXT,
    chat_template: str | None = None,
) -> int:
    """Learn merges from texts and write tokenizer.json and tokenizer_config.json to a folder; returns the vocabulary.

    Any text can be encoded: all 256 bytes are tokens. A digit is never merged with anything, so numbers are read digit
    by digit. END_OF_TEXT and `special_tokens` come first; `plain_tokens` are single tokens that are ordinary text.
    `vocab_size` is the most tokens there are; few texts give fewer. `eos_token` ends documents and completions.
    Raises ValueError for a vocabulary without room for the bytes and the added tokens, and for an unknown `eos_token`.
    """
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

    special = list(dict.fromkeys([END_OF_TEXT, *special_tokens]))
    if eos_token not in special:
        raise ValueError(f"eos_token {eos_token!r} is none of the special tokens {', '.join(special)}")
    smallest = 256 + len(special) + len(plain_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} has no room for all bytes and added tokens, which are {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(plain_tokens),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain_tokens])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    settings |= {} if chat_template is None else {"chat_template": chat_template}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    return tokenizer.get_vocab_size(with_added_tokens=True)


def _write(path: Path, text: str) -> None:
    """In one move, so that a file is whole or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
