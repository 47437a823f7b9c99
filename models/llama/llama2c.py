"""Checkpoints of llama2.c in its first format: a header of seven numbers, then all weights in float32.

Source: https://github.com/karpathy/llama2.c, export.py (legacy_export) and run.c.
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

from models.llama.files import StoredTensor

_HEADER = struct.Struct("<7i")
_NEWER_MAGIC = 0x616B3432  # "ak42", at the head of versions 1 and 2
_PLAUSIBLE = 2**24


class Llama2cHeader(NamedTuple):
    """Sizes as stored, except that `vocab_size` is positive and `tied` holds what its sign says."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context: int
    tied: bool


def is_llama2c(path: Path) -> bool:
    """Whether a file begins like a llama2.c checkpoint; its length is not looked at."""
    try:
        read_header(path)
    except ValueError:
        return False
    return True


def read_header(path: Path) -> Llama2cHeader:
    """The header of a llama2.c file. Raises ValueError if it is none of the first format."""
    with path.open("rb") as file:
        raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size:
        raise ValueError(f"{path}: truncated within its header: the file has only {len(raw)} bytes")
    dim, hidden, layers, heads, kv_heads, vocab, context = _HEADER.unpack(raw)
    if dim == _NEWER_MAGIC:
        raise ValueError(f"{path}: is a llama2.c file of version {hidden}; export it again as version 0")
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), context)
    if not all(0 < size < _PLAUSIBLE for size in sizes) or dim % (2 * heads) or heads % kv_heads:
        raise ValueError(f"{path}: not a llama2.c checkpoint (it begins with {sizes})")
    return Llama2cHeader(dim, hidden, layers, heads, kv_heads, abs(vocab), context, vocab > 0)


def open_llama2c(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a llama2.c file under Meta's names.

    Raises ValueError for a file whose length is not what its header says.
    """
    h = read_header(path)
    head_dim = h.hidden_size // h.num_heads
    square, kv = (h.hidden_size, h.hidden_size), (h.num_kv_heads * head_dim, h.hidden_size)
    up = (h.intermediate_size, h.hidden_size)
    plan: list[tuple[str, tuple[int, ...]]] = [("tok_embeddings.weight", (h.vocab_size, h.hidden_size))]
    for name, shape in (
        ("attention_norm", (h.hidden_size,)),
        ("attention.wq", square),
        ("attention.wk", kv),
        ("attention.wv", kv),
        ("attention.wo", square),
        ("ffn_norm", (h.hidden_size,)),
        ("feed_forward.w1", up),
        ("feed_forward.w2", up[::-1]),
        ("feed_forward.w3", up),
    ):
        plan += [(f"layers.{layer}.{name}.weight", shape) for layer in range(h.num_layers)]
    plan += [("norm.weight", (h.hidden_size,)), ("rope.freqs", (2, h.context, head_dim // 2))]
    if not h.tied:
        plan.append(("output.weight", (h.vocab_size, h.hidden_size)))

    size, offset, tensors = path.stat().st_size, _HEADER.size, {}
    for name, shape in plan:
        tensors[name] = StoredTensor(path, name, "F32", shape, offset)
        offset += 4 * math.prod(shape)
        if offset > size:
            raise ValueError(f"{path}: truncated: tensor {name!r} ends at byte {offset}, but the file has {size}")
    if offset != size:
        raise ValueError(f"{path}: has {size} bytes where its header asks for {offset}")
    return tensors
