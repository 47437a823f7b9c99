"""What crosses from the host to the devices: rows of tokens with their targets."""

from dataclasses import dataclass

import jax

from utils.shapes import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed or padded documents; every array is [B, T].

    targets_BT[b, t] is the token behind tokens_BT[b, t] in the same document; where there is none, or it is not to be
    learnt, weights_BT is 0. segments_BT numbers the documents of a row from 1, padding is 0. positions_BT are places
    within the document. Tokens, targets, segments and positions are int32, weights float32.
    """

    tokens_BT: Array
    targets_BT: Array
    weights_BT: Array
    segments_BT: Array
    positions_BT: Array
