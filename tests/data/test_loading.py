"""Batches: the same sequence for any number of processes, from any place in it, and to its exact end."""

import json
import threading
import time

import numpy as np
import pytest

from data.batch import Batch
from data.loading import Loader
from data.packing import concat, one_each
from data.store import Counts, TokenStore

T = 4


def make_rows(count, *, first=0, name="test"):
    """Rows told by their first token, which counts from first + 1."""
    tokens = np.zeros((count, T + 1), np.uint32)
    tokens[:, 0] = 1 + first + np.arange(count)
    store = TokenStore(
        name=name,
        tokens=tokens.ravel(),
        mask=None,
        starts=np.arange(count) * (T + 1),
        lengths=np.full(count, T + 1),
        fingerprint=f"{name} {first} {count}",
        counts=Counts(),
    )
    return one_each(store, T)


def make_loader(rows, **options):
    return Loader(rows if isinstance(rows, list) else [rows], **{"batch_size": 4} | options)


def ids(batch):
    return batch.tokens_BT[:, 0].tolist()


def take(loader, count):
    return [ids(next(loader)) for _ in range(count)]


def take_rows(loader, count):
    return [row for batch in take(loader, count) for row in batch]


def test_a_batch_holds_the_rows_as_they_are():
    rows = make_rows(6)
    batch = next(make_loader(rows, shuffle=False))
    assert isinstance(batch, Batch)
    for name in ("tokens", "targets", "weights", "segments", "positions"):
        array = getattr(batch, f"{name}_BT")
        assert isinstance(array, np.ndarray)
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
        np.testing.assert_array_equal(array, [rows[index][name] for index in range(4)])


@pytest.mark.parametrize("count", [1, 3, 4, 10, 2000, 2001])
def test_every_epoch_has_every_row_once_in_a_new_order(count):
    loader = make_loader(make_rows(count))
    flat = take_rows(loader, count)  # four epochs
    epochs = [flat[start : start + count] for start in range(0, 4 * count, count)]
    assert all(sorted(epoch) == list(range(1, count + 1)) for epoch in epochs)
    if count > 4:
        assert epochs[0] != sorted(epochs[0])
        assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("count", [48, 2400])
def test_the_seed_alone_decides_the_order(count):
    rows = make_rows(count)
    one, same, other = (take_rows(make_loader(rows, seed=seed), count // 2) for seed in (7, 7, 8))
    assert one == same
    epochs = {tuple(run[start : start + count]) for run in (one, other) for start in (0, count)}
    assert len(epochs) == 4, "the second epoch of one seed is the first of the next"


@pytest.mark.parametrize("threads,prefetch", [(1, 1), (2, 8), (4, 0)])
def test_threads_do_not_change_the_order(threads, prefetch):
    rows = make_rows(50)
    assert take(make_loader(rows, threads=threads, prefetch=prefetch), 30) == take(make_loader(rows), 30)


@pytest.mark.parametrize("options", [{}, {"weights": [0.7, 0.3]}, {"num_epochs": 3}, {"shuffle": False}])
def test_shards_of_processes_make_up_the_global_batch(options):
    rows = [make_rows(21), make_rows(34, first=100)]
    whole = take(make_loader(rows, **options), 12)
    shards = [take(make_loader(rows, process_index=index, process_count=2, **options), 12) for index in range(2)]
    assert [first + second for first, second in zip(*shards)] == whole


@pytest.mark.parametrize("before,after", [(1, 1), (1, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("options", [{}, {"weights": [5, 1]}, {"num_epochs": 3}])
def test_a_restored_run_goes_on_where_the_state_was_taken(before, after, options):
    rows = [make_rows(13), make_rows(10, first=100)]
    whole = take(make_loader(rows, **options), 15)
    saved = []
    for index in range(before):
        loader = make_loader(rows, process_index=index, process_count=before, prefetch=6, **options)
        take(loader, 7)
        time.sleep(0.01)  # lets batches be fetched ahead, which must not count
        saved.append(json.dumps(loader.state()))
    assert len(set(saved)) == 1, "the state is that of all processes"
    shards = []
    for index in range(after):
        loader = make_loader(rows, process_index=index, process_count=after, **options)
        take(loader, 2)
        loader.restore(json.loads(saved[0]))
        assert loader.state() == json.loads(saved[0])
        shards.append(take(loader, 8))
    assert [[row for part in parts for row in part] for parts in zip(*shards)] == whole[7:]


class CountingRows:
    """Rows that count how often they are read, wait for leave, or fail."""

    def __init__(self, rows):
        self.rows, self.T, self.fingerprint = rows, rows.T, rows.fingerprint
        self.reads = 0
        self.failing = ()
        self.error = OSError("disk gone")
        self.leave = threading.Event()
        self.leave.set()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads += 1
        self.leave.wait()
        if index in self.failing:
            raise self.error
        return self.rows[index]


def test_restoring_reads_nothing_of_what_was_before():
    rows = CountingRows(make_rows(1000))
    loader = make_loader(rows, prefetch=0)
    loader.restore(loader.state() | {"batches": 10**12})
    assert rows.reads == 0
    next(loader)
    assert rows.reads == 4


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_failed_read_loses_no_batch(prefetch):
    rows = CountingRows(make_rows(40))
    loader = make_loader(rows, shuffle=False, prefetch=prefetch)
    assert take(loader, 2) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    rows.failing = range(12, 16)
    loader.seek(2)
    assert take(loader, 1) == [[9, 10, 11, 12]]
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            next(loader)
        assert loader.state()["batches"] == 3
    rows.failing = ()
    assert take(loader, 2) == [[13, 14, 15, 16], [17, 18, 19, 20]]


def test_an_interrupt_loses_no_batch():
    rows = CountingRows(make_rows(40))
    loader = make_loader(rows, shuffle=False, prefetch=3)
    assert take(loader, 1) == [[1, 2, 3, 4]]
    rows.error, rows.failing = KeyboardInterrupt(), range(40)
    loader.seek(1)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    rows.failing = ()
    assert take(loader, 2) == [[5, 6, 7, 8], [9, 10, 11, 12]]


def test_close_ends_the_threads_while_they_fetch():
    before = set(threading.enumerate())
    rows = CountingRows(make_rows(40))
    loader = make_loader(rows, prefetch=8)
    next(loader)
    rows.leave.clear()
    loader.seek(5)
    loader.close()
    rows.leave.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()  # returns, or the test does not
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_the_last_batch_of_an_evaluation_is_filled_up_with_padding():
    loader = make_loader(make_rows(10), shuffle=False, num_epochs=1)
    assert (loader.num_rows, loader.num_batches) == (10, 3)
    batches = list(loader)
    assert [ids(batch) for batch in batches] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert batches[-1].weights_BT.sum(axis=1).tolist() == [T, T, 0, 0]
    assert not batches[-1].segments_BT[2:].any()
    assert list(loader) == []
    loader.seek(2)
    assert [ids(batch) for batch in loader] == [[9, 10, 0, 0]]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_padding_and_ends_are_the_same_in_every_process(process_count):
    shards = [
        [
            ids(batch)
            for batch in make_loader(make_rows(9), num_epochs=3, process_index=index, process_count=process_count)
        ]
        for index in range(process_count)
    ]
    assert [len(shard) for shard in shards] == [7] * process_count
    flat = [row for parts in zip(*shards) for part in parts for row in part]
    assert flat[27:] == [0]
    assert sorted(flat[:27]) == sorted(3 * list(range(1, 10)))


def test_batches_of_one_row_without_end():
    assert sorted(take_rows(make_loader(make_rows(3), batch_size=1), 3)) == [1, 2, 3]


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.9, 0.1], [3, 1], [1000, 1]])
def test_weights_are_the_shares_of_the_rows(weights):
    loader = make_loader([make_rows(7), make_rows(1000, first=100)], batch_size=100, weights=weights)
    flat = np.array(take_rows(loader, 200))
    share = weights[0] / sum(weights)
    assert abs((flat <= 100).mean() - share) < 0.01 * min(share, 1 - share) + 1e-4
    seen = flat[flat <= 100][: 7 * (np.count_nonzero(flat <= 100) // 7)].reshape(-1, 7)
    assert (np.sort(seen, axis=1) == np.arange(1, 8)).all(), "a source repeats when all of it was seen"


def test_sources_without_weights_are_one_data_set():
    flat = take_rows(make_loader([make_rows(3), make_rows(9, first=100)]), 6)
    assert sorted(flat[:12]) == sorted(flat[12:]) == [1, 2, 3, *range(101, 110)]
    assert flat[:12] != flat[12:]


def test_a_weighted_epoch_ends_with_the_first_source_that_is_through():
    loader = make_loader([make_rows(10), make_rows(90, first=100)], weights=[1, 1], num_epochs=2)
    flat = np.concatenate([ids(batch) for batch in loader])
    assert len(flat) == 40 and sorted(flat[flat <= 100]) == sorted(2 * list(range(1, 11)))


def test_equal_sources_in_a_mixture_have_orders_of_their_own():
    flat = take_rows(make_loader([make_rows(50), make_rows(50, first=100)], weights=[1, 1]), 25)
    assert [row for row in flat if row <= 100] != [row - 100 for row in flat if row > 100]


def test_a_state_of_other_data_is_refused():
    rows = make_rows(10)
    state = make_loader(rows).state()
    others = [
        make_loader(make_rows(11)),
        make_loader([rows, rows]),
        make_loader(rows, seed=1),
        make_loader(rows, shuffle=False),
        make_loader(rows, weights=[1]),
        make_loader(concat(rows.store, T)),
    ]
    for loader in others:
        with pytest.raises(ValueError, match="the saved place is in other data"):
            loader.restore(state)
    with pytest.raises(ValueError, match="in batches of 4 rows, these have 2"):
        make_loader(rows, batch_size=2).restore(state)
    make_loader(rows, num_epochs=3, threads=1).restore(state)


def test_a_place_behind_the_end_is_refused():
    loader = make_loader(make_rows(10), num_epochs=1)
    with pytest.raises(ValueError, match="batch 4 of 3"):
        loader.restore(make_loader(make_rows(10)).state() | {"batches": 4})


@pytest.mark.parametrize(
    "options,message",
    [
        ({"process_count": 3}, "a batch of 4 rows cannot be shared evenly by 3 processes"),
        ({"batch_size": 0}, "a batch of 0 rows"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"weights": [1, 2]}, r"1 sources need as many weights above 0, got \[1, 2\]"),
        ({"weights": [0]}, "weights above 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
        ({"prefetch": -1}, "prefetch_buffer_size must be non-negative"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(make_rows(5), **options)


def test_sources_must_agree_in_length():
    rows = make_rows(5)
    with pytest.raises(ValueError, match=r"different lengths: \[4, 8\]"):
        make_loader([rows, concat(rows.store, 8)])
    with pytest.raises(ValueError, match="no data"):
        make_loader([])
