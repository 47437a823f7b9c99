"""What learning from preferences gets: prompts with two answers each, or with one that is or is not wanted.

Letters as in `trainers.policy`: B rows, C completions of a row, S places of a prompt, M tokens of a completion. Pairs
have C = 2, the chosen completion and the rejected one; unpaired data have C = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from data.preferences import Preference
from trainers.policy import from_the_right, padded_size
from utils.shapes import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """Leading axes are rows, which micro-batches and devices share out; as `trainers.policy.Completions`.

    `mask_BCM`, float32, is 1 for the tokens that are learnt. `lengths_BC`, int32, counts all tokens of a completion.
    `weights_B`, float32, is 0 for rows that only fill a batch up. `margins_B`, float32, says of pairs by how much the
    chosen completion is better, 0 where the data do not; `desirable_B`, float32, of unpaired data whether the
    completion is wanted. `reference_logps_BC`, float32, are the reference's log-probabilities of completions, summed
    over the mask, in nats; `kl_B` KTO's baseline, the same in all rows. What is not needed is None.
    """

    prompts_BS: Array
    prompt_lengths_B: Array
    completions_BCM: Array
    mask_BCM: Array
    lengths_BC: Array
    weights_B: Array
    margins_B: Array | None = None
    desirable_B: Array | None = None
    reference_logps_BC: Array | None = None
    kl_B: Array | None = None


def collate(
    rows: Sequence[Preference],
    *,
    max_prompt_length: int,
    max_completion_length: int,
    multiple: int = 1,
) -> PreferenceBatch:
    """Rows side by side, numpy, filled up with rows of weight 0 to a `multiple`.

    Prompts and completions are padded to powers of two up to the maxima, so that there are few sizes. Rows of pairs and
    unpaired rows do not mix.
    """
    B = -(-len(rows) // multiple) * multiple
    C = len(rows[0].completions)
    S = padded_size(max(len(row.prompt_ids) for row in rows), max_prompt_length)
    M = padded_size(max(len(ids) for row in rows for ids in row.completions), max_completion_length)
    lengths_B = np.ones(B, np.int32)
    completions_BCM, mask_BCM = np.zeros((B, C, M), np.int32), np.zeros((B, C, M), np.float32)
    lengths_BC, weights_B = np.ones((B, C), np.int32), np.zeros(B, np.float32)
    for b, row in enumerate(rows):
        lengths_B[b], weights_B[b] = len(row.prompt_ids), 1
        for c, (ids, mask) in enumerate(zip(row.completions, row.masks, strict=True)):
            lengths_BC[b, c] = len(ids)
            completions_BCM[b, c, : len(ids)] = ids
            mask_BCM[b, c, : len(ids)] = mask
    return PreferenceBatch(
        prompts_BS=from_the_right([row.prompt_ids for row in rows] + [()] * (B - len(rows)), S),
        prompt_lengths_B=lengths_B,
        completions_BCM=completions_BCM,
        mask_BCM=mask_BCM,
        lengths_BC=lengths_BC,
        weights_B=weights_B,
        margins_B=_column([row.margin or 0.0 for row in rows], B) if C == 2 else None,
        desirable_B=_column([float(row.desirable) for row in rows], B) if C == 1 else None,
    )


def num_tokens(batch: PreferenceBatch) -> int:
    """Tokens of prompts and completions, each prompt once, without what fills up."""
    real_B = np.asarray(batch.weights_B) > 0
    return int(np.asarray(batch.prompt_lengths_B)[real_B].sum() + np.asarray(batch.lengths_BC)[real_B].sum())


def _column(values: Sequence[float], B: int) -> np.ndarray:
    return np.array([*values, *[0.0] * (B - len(values))], np.float32)
