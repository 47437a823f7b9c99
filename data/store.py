"""Token ids of a data set on disk, written once and read by memory map.

A folder holds tokens.bin (little-endian uint16, or uint32 for more than 65536 ids), mask.bin (one byte a token, absent
where everything is learnt), offsets.bin (int64, where each document begins, and the end of the last) and meta.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Counts", "TokenStore", "digest", "open_bin", "split", "token_dtype"]

FORMAT = 1
TOKENS, MASK, OFFSETS, META = "tokens.bin", "mask.bin", "offsets.bin", "meta.json"
_CHUNK = 1 << 22  # tokens


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the rows of a data set. learnt_tokens counts targets, so no document's first token."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    learnt_tokens: int = 0
    dropped_empty: int = 0
    truncated: int = 0
    skipped_bad: int = 0
    first_bad: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenStore:
    """Documents of tokens: document d is tokens[starts[d]:starts[d] + lengths[d]].

    mask has a bool for each token, True where it is to be predicted; it is None if all are. The fingerprint is of the
    content. counts are of the whole data set, also in a part of it.
    """

    name: str
    tokens: np.ndarray
    mask: np.ndarray | None
    starts: np.ndarray
    lengths: np.ndarray
    fingerprint: str
    counts: Counts

    @classmethod
    def open(cls, folder: str | Path, *, name: str | None = None) -> TokenStore:
        """Open what `build` wrote. Raises ValueError for a folder whose files are not as its meta.json says."""
        folder = Path(folder)
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"{folder}: token store of format {meta['format']}, expected {FORMAT}; delete it")
        counts = Counts(**meta["counts"])
        offsets = _map(folder / OFFSETS, "<i8", counts.documents + 1)
        return cls(
            name=name or str(folder),
            tokens=_map(folder / TOKENS, meta["dtype"], counts.tokens),
            mask=_map(folder / MASK, "?", counts.tokens) if meta["masked"] else None,
            starts=offsets[:-1],
            lengths=np.diff(offsets),
            fingerprint=meta["fingerprint"],
            counts=counts,
        )

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens start to stop of the whole stream as int32, and which of them are learnt."""
        tokens = self.tokens[start:stop].astype(np.int32)
        return tokens, np.ones(len(tokens), bool) if self.mask is None else np.asarray(self.mask[start:stop])

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = int(self.starts[index])
        return self.read(start, start + int(self.lengths[index]))

    def part(self, starts: np.ndarray, lengths: np.ndarray, label: Any) -> TokenStore:
        """Return some of the documents, or pieces of them; the label says which, for the fingerprint."""
        fingerprint = digest([self.fingerprint, label])
        return dataclasses.replace(self, starts=starts, lengths=lengths, fingerprint=fingerprint)


def digest(value: Any) -> str:
    """Return a hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def open_bin(path: str | Path, *, vocab_size: int, dtype: str | None = None, eos_id: int | None = None) -> TokenStore:
    """Open a file of bare little-endian token ids, all of them learnt.

    dtype is uint16 or uint32, by default the smaller one that holds the vocabulary. A document ends with each eos_id;
    without one the file is one stream. The file is read once from end to end.
    Raises ValueError for a size that is no number of ids, and for an id that is not below vocab_size.
    """
    path = Path(path).expanduser()
    if dtype not in (None, "uint16", "uint32"):
        raise ValueError(f"{path}: tokens of {dtype!r}, expected uint16 or uint32")
    dtype = np.dtype(token_dtype(vocab_size) if dtype is None else dtype).newbyteorder("<")
    size, width = path.stat().st_size, dtype.itemsize
    if size % width or not size:
        raise ValueError(f"{path}: {size} bytes are no {dtype.name} tokens of {width} bytes each")
    tokens = np.memmap(path, dtype, mode="r")
    ends, content = _scan(path, tokens, vocab_size, eos_id)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    counts = Counts(rows=len(ends), documents=len(ends), tokens=len(tokens), learnt_tokens=len(tokens) - len(ends))
    return TokenStore(
        name=str(path),
        tokens=tokens,
        mask=None,
        starts=starts,
        lengths=ends - starts,
        fingerprint=digest([content, dtype.name, eos_id]),
        counts=counts,
    )


def split(store: TokenStore, fraction: float, *, seed: int) -> tuple[TokenStore, TokenStore]:
    """Hold out a part of the documents: return the larger part and the one held out.

    Drawn at random, and at least one. Where that is more than the fraction and everything is learnt, the longest
    document is cut instead, and its tail held out. Raises ValueError where nothing would be left to train on.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold out must be between 0 and 1, got {fraction}")
    if fraction * len(store) < 1 and store.mask is None:
        return _split_longest(store, fraction)
    held = max(1, round(fraction * len(store)))
    if held >= len(store):
        raise ValueError(f"{store.name}: holding out {fraction} of {len(store)} documents leaves none")
    chosen = np.zeros(len(store), bool)
    chosen[np.random.default_rng(seed).permutation(len(store))[:held]] = True
    label = ["split", fraction, seed]
    kept, out = (store.part(store.starts[which], store.lengths[which], label) for which in (~chosen, chosen))
    return kept, dataclasses.replace(out, fingerprint=digest([out.fingerprint, "held out"]))


def _split_longest(store: TokenStore, fraction: float) -> tuple[TokenStore, TokenStore]:
    longest = int(store.lengths.argmax())
    held = max(2, round(fraction * store.num_tokens))
    lengths = store.lengths - held * (np.arange(len(store)) == longest)
    if lengths[longest] < 2:
        raise ValueError(f"{store.name}: holding out {fraction} of {store.num_tokens} tokens leaves none to learn")
    begin = store.starts[[longest]] + lengths[longest]
    kept = store.part(store.starts, lengths, ["without a tail", longest, held])
    return kept, store.part(begin, np.array([held]), ["tail", longest, held])


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _map(path: Path, dtype: str, length: int) -> np.ndarray:
    size = path.stat().st_size
    if size != length * np.dtype(dtype).itemsize:
        raise ValueError(f"{path}: {size} bytes, expected {length} of {np.dtype(dtype).name}; delete the folder")
    return np.memmap(path, dtype, mode="r")


def _scan(path: Path, tokens: np.ndarray, vocab_size: int, eos_id: int | None) -> tuple[np.ndarray, str]:
    """Check the ids; return where the documents end, and a hash of the content."""
    content = hashlib.blake2b()
    ends = []
    for start in range(0, len(tokens), _CHUNK):
        chunk = np.asarray(tokens[start : start + _CHUNK])
        if (highest := int(chunk.max())) >= vocab_size:
            place = start + int(chunk.argmax())
            raise ValueError(f"{path}: token {place} is {highest}, not below vocab_size {vocab_size}; wrong dtype?")
        content.update(chunk)
        if eos_id is not None:
            ends.append(start + 1 + np.flatnonzero(chunk == eos_id))
    if eos_id is None or not len(ends[-1]) or ends[-1][-1] != len(tokens):
        ends.append(np.array([len(tokens)]))
    return np.concatenate(ends), content.hexdigest()
