"""Transforms of logits against `transformers` and plain numpy, draws against their distribution."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sampling import (
    PRESETS,
    NewlineTable,
    SamplingParams,
    SamplingRules,
    ban,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_probs,
    penalize_repetition,
    scale_temperature,
)

B, V = 6, 97
LOGITS = np.random.default_rng(0).standard_normal((B, V)).astype(np.float32) * 3
SEEN = np.random.default_rng(1).random((B, V)) < 0.2


def softmax64(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kept(logits) -> np.ndarray:
    return np.asarray(logits) > -np.inf


def assert_filtered(got, want_kept, logits=LOGITS):
    """Exactly these are kept, and those as they were."""
    np.testing.assert_array_equal(kept(got), want_kept)
    np.testing.assert_array_equal(np.asarray(got)[want_kept], logits[want_kept])


def slow_top_p(probs, p):
    """Likeliest first, until p is reached."""
    result = np.zeros(probs.shape, bool)
    for row, keep in zip(probs, result):
        total = 0.0
        for token in np.argsort(-row):
            keep[token] = True
            total += row[token]
            if total >= p:
                break
    return result


# One filter at a time.


@pytest.mark.parametrize("k", [1, 2, 40, V, 1000])
def test_top_k(k):
    ranks = np.argsort(np.argsort(-LOGITS, axis=-1), axis=-1)
    assert_filtered(jax.jit(keep_top_k)(LOGITS, k), ranks < k)


def test_top_k_keeps_ties():
    logits = np.array([[2.0, 1.0, 1.0, 0.0]], np.float32)
    assert_filtered(keep_top_k(logits, 2), np.array([[True, True, True, False]]), logits)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p(p):
    assert_filtered(jax.jit(keep_top_p)(LOGITS, p), slow_top_p(softmax64(LOGITS), p))


def test_top_p_keeps_ties_together():
    even = np.zeros((1, 4), np.float32)
    assert_filtered(keep_top_p(even, 0.3), np.ones((1, 4), bool), even)


def test_top_p_of_one_keeps_all():
    assert_filtered(keep_top_p(LOGITS, 1.0), np.ones((B, V), bool))


@pytest.mark.parametrize("p", [1.0, 0.2, 0.01])
def test_min_p(p):
    probs = softmax64(LOGITS)
    assert_filtered(jax.jit(keep_min_p)(LOGITS, p), probs >= p * probs.max(-1, keepdims=True) * (1 - 1e-7))


def test_min_p_of_nothing_keeps_all():
    assert_filtered(keep_min_p(LOGITS, 0.0), np.ones((B, V), bool))


def test_filters_leave_out_what_is_ruled_out_already():
    logits = np.where(SEEN, -np.inf, LOGITS).astype(np.float32)
    for function, value in ((keep_top_k, V), (keep_min_p, 0.0), (scale_temperature, 2.0)):
        got = function(logits, value)
        assert not np.isnan(got).any()
        np.testing.assert_array_equal(kept(got), ~SEEN, err_msg=function.__name__)
    assert_filtered(keep_top_p(logits, 0.7), slow_top_p(softmax64(logits), 0.7), logits)


def test_temperature_penalty_and_bans():
    np.testing.assert_allclose(scale_temperature(LOGITS, 0.7), LOGITS / 0.7, rtol=1e-6)
    want = np.where(SEEN, np.where(LOGITS > 0, LOGITS / 1.3, LOGITS * 1.3), LOGITS)
    np.testing.assert_allclose(penalize_repetition(LOGITS, SEEN, 1.3), want, rtol=1e-6)
    assert_filtered(ban(LOGITS, SEEN), ~SEEN)
    assert_filtered(ban(LOGITS, SEEN[:1]), np.broadcast_to(~SEEN[:1], (B, V)))


@pytest.mark.parametrize(
    "function,values",
    [
        (keep_top_k, np.array([1, 3, 5, 7, 50, 97])),
        (keep_top_p, np.array([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])),
        (keep_min_p, np.array([0.0, 0.1, 0.2, 0.3, 0.9, 1.0])),
        (scale_temperature, np.array([0.1, 0.3, 0.5, 1.0, 1.5, 2.0])),
        (lambda x, p: penalize_repetition(x, SEEN[:1], p), np.array([0.5, 1.0, 1.1, 1.2, 2.0, 3.0])),
    ],
)
def test_a_parameter_for_each_row(function, values):
    together = function(LOGITS, jnp.asarray(values))
    for b, value in enumerate(values.tolist()):
        np.testing.assert_array_equal(together[b], function(LOGITS[b : b + 1], value)[0])


# Against transformers.


@pytest.fixture(scope="module")
def processors():
    """Ours and theirs, by name; theirs take (tokens so far, logits)."""
    torch = pytest.importorskip("torch")
    lp = pytest.importorskip("transformers").generation.logits_process
    seen = [torch.from_numpy(np.flatnonzero(row)) for row in SEEN]

    def penalty(scores, value):
        theirs = lp.RepetitionPenaltyLogitsProcessor(value)
        return torch.stack([theirs(ids[None], row[None])[0] for ids, row in zip(seen, scores)])

    return {
        "temperature": (scale_temperature, lambda x, v: lp.TemperatureLogitsWarper(v)(None, x)),
        "top_k": (keep_top_k, lambda x, v: lp.TopKLogitsWarper(v)(None, x)),
        "top_p": (keep_top_p, lambda x, v: lp.TopPLogitsWarper(v)(None, x)),
        "min_p": (keep_min_p, lambda x, v: lp.MinPLogitsWarper(v)(None, x)),
        "repetition_penalty": (lambda x, v: penalize_repetition(x, SEEN, v), penalty),
    }


@pytest.mark.parametrize(
    "name,value",
    [
        ("temperature", 0.7),
        ("temperature", 1.9),
        ("top_k", 1),
        ("top_k", 13),
        ("top_p", 0.2),
        ("top_p", 0.95),
        ("min_p", 0.05),
        ("min_p", 0.5),
        ("repetition_penalty", 1.2),
        ("repetition_penalty", 0.8),
    ],
)
def test_one_transform_equals_that_of_transformers(processors, name, value):
    torch = pytest.importorskip("torch")
    ours, theirs = processors[name]
    got, want = np.asarray(ours(LOGITS, value)), theirs(torch.from_numpy(LOGITS.copy()), value).numpy()
    np.testing.assert_array_equal(kept(got), kept(want))
    np.testing.assert_allclose(got, want, rtol=1e-6)


SETTINGS = [
    dict(temperature=0.6, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
    dict(temperature=1.7, top_k=50, top_p=0.9),
    dict(temperature=1.3, top_p=0.7, min_p=0.1),
    dict(temperature=0.9, repetition_penalty=1.5, top_k=5),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_all_in_order_equal_those_of_transformers(processors, settings):
    torch = pytest.importorskip("torch")
    rules = SamplingRules.of(SamplingParams(**settings), vocab_size=V)
    got = np.asarray(jax.jit(lambda rules, x: rules.filter(x, seen_BV=SEEN))(rules, LOGITS))
    want = torch.from_numpy(LOGITS.copy())
    for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p"):
        if name in settings:
            want = processors[name][1](want, settings[name])
    np.testing.assert_array_equal(kept(got), kept(want))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5)


# Rules.


def filtered(logits=LOGITS, **settings):
    given = {name: settings.pop(name) for name in ("seen_BV", "newline_run_B", "newlines") if name in settings}
    table = given.pop("newlines", None)
    return SamplingRules.of(SamplingParams(**settings), vocab_size=V, newlines=table).filter(logits, **given)


def test_defaults_change_nothing():
    np.testing.assert_array_equal(filtered(), LOGITS)


def test_bans_come_before_the_filters():
    """Were they behind, nothing would be left."""
    best = int(LOGITS[0].argmax())
    got = filtered(top_k=1, banned_tokens=(best,))
    second = int(np.argsort(-LOGITS[0])[1])
    np.testing.assert_array_equal(np.flatnonzero(kept(got)[0]), [second])


def test_top_p_sees_the_temperature():
    for temperature in (0.3, 1.8):
        want = slow_top_p(softmax64(LOGITS / temperature), 0.6)
        np.testing.assert_array_equal(kept(filtered(temperature=temperature, top_p=0.6)), want)


def test_greedy_takes_the_likeliest_whatever_the_filters():
    params = SamplingParams(temperature=0, top_k=3, top_p=0.1, min_p=0.9)
    rules = SamplingRules.of(params, vocab_size=V)
    keys = jax.random.split(jax.random.key(0), B)
    np.testing.assert_array_equal(rules.draw(rules.filter(LOGITS), keys), LOGITS.argmax(-1))


def test_greedy_obeys_penalty_and_bans_and_takes_the_first_of_equals():
    keys = jax.random.split(jax.random.key(0), 2)
    logits = np.array([[1, 3, 3, 3], [2, 2, 1, 2]], np.float32)
    plain = SamplingRules.of(SamplingParams(temperature=0), vocab_size=4)
    np.testing.assert_array_equal(plain.draw(plain.filter(logits), keys), [1, 0])
    banning = SamplingRules.of(SamplingParams(temperature=0, banned_tokens=(1,)), vocab_size=4)
    np.testing.assert_array_equal(banning.draw(banning.filter(logits), keys), [2, 0])
    penal = SamplingRules.of(SamplingParams(temperature=0, repetition_penalty=2.0), vocab_size=4)
    seen = np.array([[False, True, True, False], [True, False, False, False]])
    np.testing.assert_array_equal(penal.draw(penal.filter(logits, seen_BV=seen), keys), [3, 1])


def test_new_numbers_need_no_new_program():
    run = jax.jit(lambda rules, x: rules.filter(x))
    for temperature in (0.5, 0.7, 1.0):
        rules = SamplingRules.of(SamplingParams(temperature=temperature, top_k=int(10 * temperature)), vocab_size=V)
        run(rules, LOGITS)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "settings,words",
    [
        (dict(temperature=-0.1), "temperature.*-0.1"),
        (dict(temperature=float("inf")), "temperature.*inf"),
        (dict(temperature=float("nan")), "temperature.*nan"),
        (dict(top_k=0), "top_k.*0"),
        (dict(top_p=0.0), "top_p.*0.0"),
        (dict(top_p=1.1), "top_p.*1.1"),
        (dict(min_p=-0.1), "min_p.*-0.1"),
        (dict(min_p=1.1), "min_p.*1.1"),
        (dict(repetition_penalty=0.0), "repetition_penalty.*0.0"),
        (dict(repetition_penalty=float("inf")), "repetition_penalty.*inf"),
        (dict(max_consecutive_newlines=0), "max_consecutive_newlines.*0"),
    ],
)
def test_values_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**settings)


def test_rules_refuse_what_they_cannot_do():
    for token in (-1, V):
        with pytest.raises(ValueError, match=re.escape(f"[{token}]")):
            SamplingRules.of(SamplingParams(banned_tokens=(3, token)), vocab_size=V)
    with pytest.raises(ValueError, match="newline table"):
        SamplingRules.of(SamplingParams(max_consecutive_newlines=2), vocab_size=V)


def test_every_setting_is_read():
    """A new field of SamplingParams needs an entry here, under which the filtered logits change."""
    table = NewlineTable.of([b"\n" if token % 2 else b"a" for token in range(V)])
    given = dict(seen_BV=SEEN, newline_run_B=np.full(B, 1), newlines=table)
    changes = dict(temperature=0.5, top_k=3, top_p=0.5, min_p=0.5, repetition_penalty=2.0, banned_tokens=(1,)) | dict(
        max_consecutive_newlines=1
    )
    assert changes.keys() == {field.name for field in dataclasses.fields(SamplingParams)}
    for name, value in changes.items():
        assert not np.array_equal(filtered(**{name: value}, **given), LOGITS), name


def test_presets_are_within_range():
    assert PRESETS.keys() == {"standard", "creative", "conservative"}


# Draws.


def chi_square(counts, probs) -> float:
    """Pearson's statistic over its degrees of freedom, in standard deviations above 0 for a true distribution."""
    expected = probs * counts.sum()
    used = expected > 5
    degrees = used.sum() - 1
    return (((counts - expected)[used] ** 2 / expected[used]).sum() - degrees) / np.sqrt(2 * degrees)


def test_draws_follow_the_distribution():
    n, logits = 20_000, np.where(SEEN, -np.inf, LOGITS)[0].astype(np.float32)
    keys = jax.random.split(jax.random.key(7), n)
    tokens = np.asarray(jax.jit(draw)(jnp.broadcast_to(logits, (n, V)), keys))
    assert tokens.dtype == np.int32
    counts, probs = np.bincount(tokens, minlength=V), softmax64(logits)
    assert not counts[SEEN[0]].any()
    assert abs(chi_square(counts, probs)) < 4
    assert chi_square(counts, softmax64(logits * 0.9)) > 20, "the test could not tell another temperature"


def test_a_row_is_drawn_alike_alone_and_in_any_batch():
    keys = jax.random.split(jax.random.key(3), B)
    together = np.asarray(draw(LOGITS / 3, keys))
    alone = [int(draw(LOGITS[b : b + 1] / 3, keys[b : b + 1])[0]) for b in range(B)]
    np.testing.assert_array_equal(together, alone)
    order = np.array([4, 0, 5, 2])
    np.testing.assert_array_equal(draw(LOGITS[order] / 3, keys[order]), together[order])
    assert (np.asarray(draw(LOGITS / 3, jax.random.split(jax.random.key(4), B))) != together).any()


def test_log_probs_equal_numpy():
    tokens = np.arange(B, dtype=np.int32) * 7
    want = np.log(softmax64(LOGITS))[np.arange(B), tokens]
    got = jax.jit(log_probs)(LOGITS, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    half = log_probs(jnp.asarray(LOGITS, jnp.bfloat16), tokens)
    assert half.dtype == jnp.float32
    wanted = np.log(softmax64(np.asarray(jnp.asarray(LOGITS, jnp.bfloat16), np.float32)))[np.arange(B), tokens]
    np.testing.assert_allclose(half, wanted, rtol=1e-5)


def test_log_probs_of_what_was_drawn():
    rules = SamplingRules.of(SamplingParams(temperature=0.7, top_k=10), vocab_size=V)
    filtered_BV = rules.filter(LOGITS)
    tokens = np.asarray(rules.draw(filtered_BV, jax.random.split(jax.random.key(0), B)))
    drawn_from, plain = rules.log_probs(LOGITS, filtered_BV, tokens)
    rows = np.arange(B)
    np.testing.assert_allclose(plain, np.log(softmax64(LOGITS / 0.7))[rows, tokens], rtol=1e-5, atol=1e-6)
    top = np.where(kept(filtered_BV), LOGITS / 0.7, -np.inf)
    np.testing.assert_allclose(drawn_from, np.log(softmax64(top)[rows, tokens]), rtol=1e-5, atol=1e-6)


def test_log_probs_where_greedy():
    rules = SamplingRules.of(SamplingParams(temperature=0), vocab_size=V)
    tokens = LOGITS.argmax(-1)
    drawn_from, plain = rules.log_probs(LOGITS, rules.filter(LOGITS), tokens)
    np.testing.assert_array_equal(drawn_from, np.zeros(B))
    np.testing.assert_allclose(plain, np.log(softmax64(LOGITS))[np.arange(B), tokens], rtol=1e-5, atol=1e-6)


# Newlines.

PIECES = [
    b"",
    b"a",
    b"\n",
    b"\n\n",
    b"\n\n\n",
    b"a\n",
    b"\na",
    b"\na\n",
    b"\n\na\n",
    b"a\n\nb",
    b"a\n\n\nb\n",
    b" ",
    b"\r\n",
]


def longest_run(text: bytes) -> int:
    return max((len(run) for run in re.findall(rb"\n+", text)), default=0)


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_the_newline_cap_against_strings(cap):
    """Random texts, token by token: a token is ruled out exactly if it brings a run over the cap."""
    table, random = NewlineTable.of(PIECES), np.random.default_rng(cap)
    too_many, run_after = jax.jit(NewlineTable.too_many), jax.jit(NewlineTable.run_after)
    for _ in range(30):
        text, run = b"", np.zeros(1, np.int32)
        for _ in range(8):
            out = np.asarray(too_many(table, run, cap))[0]
            np.testing.assert_array_equal(out, [longest_run(text + piece) > cap for piece in PIECES], err_msg=str(text))
            token = random.choice(np.flatnonzero(~out))
            text, run = text + PIECES[token], np.asarray(run_after(table, run, np.array([token])))
            assert run[0] == len(text) - len(text.rstrip(b"\n")), text


def test_a_token_without_text_leaves_the_run_as_it_is():
    table = NewlineTable.of([b"", b"\n"])
    np.testing.assert_array_equal(table.run_after(np.array([2]), np.array([0])), [2])
    assert not np.asarray(table.too_many(np.array([2]), 2))[0, 0]


def test_a_text_that_is_over_the_cap_already_may_go_on():
    table = NewlineTable.of(PIECES)
    out = np.asarray(table.too_many(np.array([5]), 2))[0]
    np.testing.assert_array_equal(out, [piece.startswith(b"\n") or longest_run(piece) > 2 for piece in PIECES])


def test_the_newline_cap_in_the_rules():
    table = NewlineTable.of([b"\n" if token % 2 else b"a" for token in range(V)])
    runs = np.array([0, 1, 2, 3, 0, 2])
    got = filtered(max_consecutive_newlines=2, newlines=table, newline_run_B=runs)
    odd = np.arange(V) % 2 == 1
    assert_filtered(got, ~((runs >= 2)[:, None] & odd))
