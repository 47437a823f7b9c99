"""A tokenizer whose tokens are the characters of some texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def write_character_tokenizer(texts: Iterable[str], folder: str | Path) -> None:
    """Write a tokenizer.json to a folder: a token for each character in the texts, in the order of their code points.

    Characters that are not in the texts become one token more, U+FFFD. There are no special tokens.
    """
    import tokenizers
    from tokenizers import decoders, models

    characters: set[str] = {UNKNOWN}
    for text in texts:
        characters.update(text)
    vocabulary = {character: number for number, character in enumerate(sorted(characters))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "tokenizer.json.partial"
    tokenizer.save(str(partial))
    partial.replace(folder / "tokenizer.json")
