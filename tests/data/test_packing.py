"""Packing plans: every token once, documents apart, and the figures told beforehand."""

import numpy as np
import pytest

from data.packing import PACKINGS, best_fit, concat, one_each
from data.store import Counts, TokenStore


def make_store(lengths, *, seed=0, masked=False, gap=0):
    """Documents of random tokens; token ids are unique, so that each can be told by its id. gap tokens lie between."""
    lengths = np.array(lengths, np.int64)
    ends = np.cumsum(lengths + gap)
    total = int(ends[-1]) if len(ends) else 0
    rng = np.random.default_rng(seed)
    return TokenStore(
        name="test",
        tokens=1 + np.arange(total, dtype=np.uint32),
        mask=rng.random(total) < 0.5 if masked else None,
        starts=ends - gap - lengths,
        lengths=lengths,
        fingerprint="f",
        counts=Counts(),
    )


def without_tokens(lengths):
    starts = np.cumsum(lengths) - lengths
    return TokenStore(
        name="test", tokens=None, mask=None, starts=starts, lengths=lengths, fingerprint="f", counts=Counts()
    )


def random_lengths(seed, longest):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(200) < 0.1, longest, rng.integers(1, longest + 1, 200))


def pieces_of(rows):
    """Yield (tokens with the last target, weights, positions) of each segment, after checking the padding."""
    for index in range(len(rows)):
        row = rows[index]
        assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
            name: ((rows.T,), np.float32 if name == "weights" else np.int32)
            for name in ("tokens", "targets", "weights", "segments", "positions")
        }
        used = np.count_nonzero(row["segments"])
        for array in row.values():
            assert not array[used:].any(), "padding has to be zero and at the end"
        assert (np.diff(row["segments"][:used], prepend=0) >= 0).all() and (row["segments"][:used] > 0).all()
        for segment in range(1, row["segments"].max() + 1):
            here = row["segments"] == segment
            tokens, targets = row["tokens"][here], row["targets"][here]
            assert len(tokens), "segments are numbered without gaps"
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            np.testing.assert_array_equal(row["positions"][here], np.arange(len(tokens)))
            yield np.append(tokens, targets[-1]), row["weights"][here]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seed", range(4))
def test_every_target_is_predicted_once_from_the_token_before_it(packing, seed):
    store = make_store(random_lengths(seed, 17), masked=True, gap=2)
    rows = PACKINGS[packing](store, 16)
    weight_of = {}
    for tokens, weights in pieces_of(rows):
        np.testing.assert_array_equal(np.diff(tokens), 1)  # neighbours of one document: ids between have gaps
        for target, weight in zip(tokens[1:], weights):
            assert target not in weight_of
            weight_of[int(target)] = weight
    expected = {}
    for index in range(len(store)):
        tokens, mask = store.document(index)
        expected |= dict(zip(tokens[1:].tolist(), mask[1:].astype(float).tolist()))
    assert weight_of == expected


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("longest", [1, 2, 8, 33])
def test_efficiency_is_what_one_counts(packing, longest):
    lengths = np.append(random_lengths(longest, longest), 2)
    rows = PACKINGS[packing](make_store(lengths), 32)
    places = sum(int(np.count_nonzero(rows[index]["segments"])) for index in range(len(rows)))
    assert rows.num_places == places == (lengths - 1).sum()
    assert rows.efficiency == places / (32 * len(rows))


def test_plans_are_made_without_a_look_at_the_tokens():
    assert all(pack(without_tokens(random_lengths(1, 17)), 16).efficiency > 0.3 for pack in PACKINGS.values())


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_documents_stay_whole(packing):
    store = make_store(random_lengths(2, 17))
    found = sorted(tuple(tokens) for tokens, _ in pieces_of(PACKINGS[packing](store, 16)))
    assert found == sorted(tuple(store.document(d)[0]) for d in range(len(store)) if store.lengths[d] > 1)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_document_longer_than_a_row_is_refused(packing):
    with pytest.raises(ValueError, match=r"document 1 of 18 tokens does not fit a row of 16; cut documents to 17"):
        PACKINGS[packing](make_store([3, 18, 17]), 16)


def test_one_each_has_a_row_for_each_document():
    rows = one_each(make_store([3, 1, 5]), 4)
    assert [int(np.count_nonzero(rows[index]["segments"])) for index in range(len(rows))] == [2, 4]


def naive_best_fit(places, T):
    spaces = []
    for size in sorted(places, reverse=True):
        fitting = [space for space in spaces if space >= size]
        if fitting:
            spaces[spaces.index(min(fitting))] -= size
        else:
            spaces.append(T - size)
    return sorted(T - space for space in spaces)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("T", [1, 7, 64])
def test_best_fit_fills_rows_as_one_document_after_another_would(seed, T):
    lengths = np.append(2, 1 + np.random.default_rng(seed).integers(1, T + 1, 300) // (1 + seed % 3))
    rows = best_fit(make_store(lengths), T)
    fills = sorted(int(np.count_nonzero(rows[index]["segments"])) for index in range(len(rows)))
    assert fills == naive_best_fit([size for size in lengths - 1 if size], T)
    assert len(fills) < 2 or fills[0] + fills[1] > T  # the bound of any-fit: no two rows would fit in one


def test_concat_fills_all_rows_but_the_last():
    rows = concat(make_store([50, 1, 2, 30, 1, 1, 100]), 16)
    fills = [int(np.count_nonzero(rows[index]["segments"])) for index in range(len(rows))]
    assert fills[:-1] == [16] * (len(fills) - 1) and sum(fills) == 49 + 1 + 29 + 99
    assert rows[0]["segments"].tolist() == [1] * 16 and rows[1]["positions"][0] == 0
    assert rows[3]["segments"].tolist() == [1] + [2] + [3] * 14  # ends of 50 and 2, then 30 begins


def test_a_plan_of_a_million_documents_is_tight():
    lengths = 2 + np.random.default_rng(0).geometric(1 / 300, 1_000_000).clip(max=2047)
    rows = best_fit(without_tokens(lengths), 2048)
    assert rows.efficiency > 0.99


@pytest.mark.parametrize("packing", PACKINGS)
def test_nothing_to_predict_is_refused(packing):
    for lengths in ([], [1, 1]):
        with pytest.raises(ValueError, match="test: no document has two tokens"):
            PACKINGS[packing](make_store(lengths), 8)
    with pytest.raises(ValueError, match="at least one place, got 0"):
        PACKINGS[packing](make_store([5]), 0)


def test_rows_beyond_the_end_are_an_index_error():
    rows = concat(make_store([9]), 4)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"row {index} of 2"):
            rows[index]


def test_fingerprints_differ_with_packing_and_length():
    store = make_store([5, 5])
    assert len({pack(store, T).fingerprint for pack in PACKINGS.values() for T in (4, 8)}) == 6
