"""Bytes that training takes of each device, by part, worked out before anything is allocated.

What lies there from step to step is counted array by array. What a step needs on top is worked out from the sizes of
the network, the batch and the mesh, for each of the moments at which it may be the most: parts that are never alive
together are not added up. Letters as in `utils.ops`; the sizes of a device's own part are lower case.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from utils.array_bytes import LANES, filled, least_bytes

_FIELDS = 5  # of a batch, 4 bytes for each token
_BLOCK, _BLOCKS = 128, 16  # of queries, see `utils.blockwise`


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes by letter; `tied` embeddings are the output matrix too, `gated` feed-forward layers have a third matrix."""

    L: int
    D: int
    F: int
    N: int
    K: int
    H: int
    V: int
    tied: bool
    gated: bool


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes on a device, of what lies there between steps and of what follows its shapes.

    `copy` is the blocks' weights in the dtype that is computed in, where that is another; `gradients` those of the
    blocks in that dtype, `sums` those of all that is trained in float32.
    """

    parameters: int
    optimizer: int
    copy: int = 0
    gradients: int = 0
    sums: int = 0


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """`rows` of completions that are drawn together, over all devices, with `slots` for keys and values each.

    `policy` are the bytes on a device of the weights that they are drawn with, where those are not the parameters.
    """

    rows: int
    slots: int
    policy: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides on the memory of a training step.

    `rows` of `length` tokens, over all devices, in `pieces` micro-batches. `mesh` has the sizes of the axes data, fsdp,
    tensor and sequence. `itemsize` is that of the dtype that is computed in, `stored` that of the parameters; `remat`
    a key of `models.llama.model.REMAT`, `attention` the implementation, `chunk` the logits of a device at once.
    `trains_all` tells the whole network from adapters. A token reads up to `keys` others, by default those of its row.
    `others` are the bytes on a device of networks beside the trained one, such as a reference; `second` is one that is
    trained along with it on the same rows, such as a critic. So many rows as belong `together` are called `rows_are`.
    """

    network: Network
    held: Held
    mesh: Mapping[str, int]
    platform: str
    rows: int
    length: int
    pieces: int
    itemsize: int
    stored: int
    remat: str
    attention: str
    chunk: int
    trains_all: bool
    keys: int | None = None
    rollout: "Rollout | None" = None
    others: int = 0
    second: Network | None = None
    rows_are: str = "rows"
    together: int = 1

    def over(self, *axes: str) -> int:
        """Devices along these axes together."""
        return math.prod(self.mesh.get(axis, 1) for axis in axes)

    def cut(self, size: int, *axes: str) -> int:
        """A device's share of a dimension, which is whole where it cannot be cut evenly."""
        devices = self.over(*axes)
        return size // devices if size % devices == 0 else size

    @cached_property
    def b(self) -> int:
        """Rows of a micro-batch on a device."""
        return -(-self.rows // (self.pieces * self.over("data", "fsdp")))

    @cached_property
    def t(self) -> int:
        return -(-self.length // self.over("sequence"))

    # A device's part of the network's widths.
    @cached_property
    def f(self) -> int:
        return self.cut(self.network.F, "tensor")

    @cached_property
    def v(self) -> int:
        return self.cut(self.network.V, "tensor")

    @cached_property
    def n(self) -> int:
        return self.cut(self.network.N, "tensor")

    @cached_property
    def k(self) -> int:
        return self.cut(self.network.K, "tensor")

    @property
    def stream(self) -> int:
        """Bytes of the hidden states of a device's tokens."""
        return self.b * self.t * self.network.D * self.itemsize

    @property
    def wide(self) -> int:
        """Bytes of one array of the feed-forward layer's width."""
        return self.b * self.t * self.f * self.itemsize

    def heads(self, count: int, tokens: int) -> int:
        """Bytes of so many heads of tokens; splash attention fills them up to whole tiles."""
        H = self.network.H
        return self.b * tokens * count * (filled(H, LANES) if self.attention == "splash" else H) * self.itemsize


Parts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on a device, by part, at each of the moments that may be the peak."""

    moments: Mapping[str, Parts]

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.moments[self.moment].values())

    def as_dict(self) -> dict[str, Any]:
        return {"peak": self.peak, "moment": self.moment, "moments": {k: dict(v) for k, v in self.moments.items()}}


def estimate(step: Step) -> Estimate:
    """Bytes of each part at the moments of a step."""
    held, matrix = step.held, output_matrix(step)
    always = {
        "parameters": held.parameters,
        "optimizer": held.optimizer,
        "batch": _FIELDS * 4 * step.pieces * step.b * step.t,
    }
    if step.others:
        always["other networks"] = step.others
    moments = {}
    if step.rollout is not None:
        moments["rollout"] = always | rollout_parts(step, step.rollout)
    if step.pieces > 1:
        always["sums of gradients"] = held.sums
    during = always | {"weights to compute with": held.copy, "kept activations": kept(step)}
    moments["loss"] = during | {
        "logits": chunk_bytes(step),
        "output matrix": matrix["gathered"] + matrix["gradient"],
        "hidden states": 4 * step.stream,
    }
    moments["backward"] = during | {
        "gradients": held.gradients,
        "output matrix": matrix["left"],
        "layer": layer_activations(step),
        "layer's weights": layer_weights(step),
    }
    # Added up already they are at their place, else in two dtypes: one leaf is turned after the other.
    gradients = 0 if step.pieces > 1 else 2 * held.gradients
    moments["update"] = always | {"gradients": gradients, "output matrix": matrix["left"] + matrix["embeddings"]}
    return Estimate(moments=moments)


def rollout_parts(step: Step, rollout: Rollout) -> Parts:
    """What drawing completions takes beside the state."""
    rows = step.cut(rollout.rows, "data", "fsdp")
    return {
        "policy": rollout.policy,
        "keys and values": cache_bytes(step, rows=rollout.rows, slots=rollout.slots),
        "logits": 3 * rows * step.v * 4,
    }


def kept(step: Step) -> int:
    """Bytes that the forward pass keeps for the backward pass: those that `models.llama.model.REMAT` speaks of."""
    if step.second is not None:
        networks = (step.network, step.second)
        return sum(kept(dataclasses.replace(step, network=own, second=None)) for own in networks)
    L = step.network.L
    if step.remat == "block":
        return L * step.stream
    if step.remat == "everything":
        return L // group_size(L) * step.stream
    return L * (_kept_of_all(step) if step.remat == "none" else _kept_of_dots(step))


def group_size(L: int) -> int:
    """Layers of a group under remat "everything"."""
    return max(d for d in range(1, math.isqrt(L) + 1) if L % d == 0)


def _kept_of_dots(step: Step) -> int:
    """Of a layer: its input, all products but the last, which nothing reads, attention's output and its softmax."""
    products = 2 if step.network.gated else 1
    return 2 * step.stream + products * step.wide + _kept_of_attention(step)


def _kept_of_attention(step: Step) -> int:
    """Queries, keys, values, the output, and of each query's softmax the logarithm of the denominator."""
    softmax = step.b * step.t * step.n * 4
    return step.heads(2 * step.n + 2 * step.k, step.t) + softmax


def _kept_of_all(step: Step) -> int:
    """Of a layer all that some derivative reads: three float32 arrays for each norm, what goes into the products, the
    output of attention in the kernel's order of dimensions and in ours, and six arrays of the activation's parts."""
    norms = 2 * (3 * step.stream * 4 // step.itemsize + step.stream)
    output = step.b * step.t * step.n * step.network.H * step.itemsize
    parts = 6 if step.network.gated else 4
    return norms + parts * step.wide + _kept_of_attention(step) + output


def cache_bytes(step: Step, *, rows: int, slots: int) -> int:
    """Bytes of keys and values of so many rows and slots, and of the rows' lengths."""
    b = step.cut(rows, "data", "fsdp")
    shape = (step.network.L, b, step.k, slots, step.network.H)
    return 2 * least_bytes(shape, step.itemsize, platform=step.platform) + 4 * b


def count_chunks(step: Step) -> int:
    """As `trainers.vocabulary.count_chunks` has it."""
    return min(step.t, max(1, -(-step.b * step.t * step.v // step.chunk)))


def chunk_bytes(step: Step) -> int:
    """Bytes of the logits of a chunk, float32."""
    return step.b * -(-step.t // count_chunks(step)) * step.v * 4


def output_matrix(step: Step) -> dict[str, int]:
    """Bytes of the output matrix as it is gathered for the loss, of its gradient there and behind the loss, and of that
    of the embeddings."""
    whole, devices = step.network.D * step.v, step.over("fsdp", "sequence")
    gathered = whole * step.itemsize if devices > 1 or step.stored != step.itemsize else 0
    if not step.trains_all:
        return {"gathered": gathered, "gradient": 0, "left": 0, "embeddings": 0}
    gradient = whole * (4 if count_chunks(step) > 1 else step.itemsize)
    left = gradient if step.platform == "cpu" else whole * step.itemsize // devices
    return {"gathered": gathered, "gradient": gradient, "left": left, "embeddings": whole * 4 // devices}


def layer_activations(step: Step) -> int:
    """Bytes of what the backward pass of a layer has at hand: its own of the feed-forward layer's width, and of the
    residual stream's, and attention's operands.

    Where attention is computed again its softmax is kept as the kernel writes it, filled up from one number of each
    query to a row of a tile, while the feed-forward layer is gone through; behind that there is more of the stream.
    """
    size, splash = 3 * step.wide + 2 * step.stream, step.attention == "splash"
    if step.remat in ("block", "everything"):
        softmax = splash * step.b * step.t * step.n * LANES * 4
        size = max(4 * step.wide + step.stream + softmax, 3 * step.wide + 4 * step.stream)
    if splash:
        size += step.heads(2 * step.n, step.t) + step.heads(2 * step.k, step.keys or step.length)
    if step.attention == "xla":  # scores, weights and their gradients of a block of queries
        block = min(step.t, max(_BLOCK, -(-step.t // (_BLOCKS * _BLOCK)) * _BLOCK))
        size += 3 * step.b * step.n * block * (step.keys or step.length) * 4
    if step.remat == "everything":
        size += group_size(step.network.L) * step.stream
    return size


def layer_weights(step: Step) -> int:
    """Bytes of a layer's weights as they are gathered for it, and of their gradients before they are cut again."""
    network, c = step.network, step.itemsize
    if step.over("fsdp", "sequence") == 1:
        return 0
    wide, heads = network.D * step.f * c, network.D * (2 * step.n + 2 * step.k) * network.H * c
    size = (2 if network.gated else 1) * wide + heads + (wide if step.trains_all else 0)
    if step.remat == "everything":  # slices of the group's weights and of their gradients
        own = (3 if network.gated else 2) * wide + heads
        size += group_size(network.L) * own // step.over("fsdp", "sequence") * (1 + step.trains_all)
    return size


def largest(estimate: Callable[[int], Estimate], *, capacity: int, multiple: int) -> int:
    """The most rows that fit, a multiple of `multiple`; 0 where not even the smallest batch does."""

    def fits(count: int) -> bool:
        return estimate(count * multiple).peak <= capacity

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * multiple


def table(estimate: Estimate) -> list[str]:
    """Lines of a table of parts by moments, with the peak marked."""
    unit, size = ("GiB", 2**30) if estimate.peak >= 2**30 else ("MiB", 2**20)
    named = dict.fromkeys(part for own in estimate.moments.values() for part in own)
    parts = [part for part in named if any(own.get(part) for own in estimate.moments.values())]
    rows = [(f"memory of a device, {unit}", *estimate.moments)]
    for part in parts:
        rows.append((part, *(f"{own[part] / size:,.2f}" if own.get(part) else "" for own in estimate.moments.values())))
    totals = {name: f"{sum(own.values()) / size:,.2f}" for name, own in estimate.moments.items()}
    rows.append(("together", *(f"*{total}" if name == estimate.moment else total for name, total in totals.items())))
    width = max(len(first) for first, *_ in rows)
    return [f"{first:<{width}}" + "".join(f"{cell:>11}" for cell in cells) for first, *cells in rows]
