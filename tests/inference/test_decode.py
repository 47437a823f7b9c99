"""The compiled loops against full forward passes without a cache."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import decode as loops
from inference.decode import DecodeState, begin, bucket, new_cache, prefill
from models.llama import LLaMa
from models.llama.lora import LoraConfig, add_lora
from sampling import NewlineTable, SamplingParams, SamplingRules
from tests.models.llama.checkpoints import FAMILIES, TINY, random_model
from utils import kvcache

GREEDY = SamplingParams(temperature=0.0)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [20, 30, 40] * 6]  # ragged; the last takes a second piece of 16
NONE = np.array([], np.int32)


@pytest.fixture(scope="module")
def model() -> LLaMa:
    return random_model(TINY)


@cache
def _forward():
    return jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


def full_logits(model: LLaMa, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of a text from a forward pass without a cache. What follows a token does not reach it, so the text
    is padded to one length."""
    padded = ids + [0] * (model.config.max_position_embeddings - len(ids))
    return np.asarray(_forward()(model, jnp.array([padded])))[0, : len(ids)]


def next_greedy(model: LLaMa, ids: list[int], *, penalty: float = 1.0, banned: tuple[int, ...] = ()) -> int:
    logits_V = full_logits(model, ids)[-1].copy()
    for token in set(ids):
        logits_V[token] *= penalty if logits_V[token] < 0 else 1 / penalty
    logits_V[list(banned)] = -np.inf
    return int(logits_V.argmax())


def naive_greedy(model: LLaMa, prompt: list[int], steps: int, **options) -> list[int]:
    """Greedy continuation by a full forward pass for every token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(next_greedy(model, ids, **options))
    return ids[len(prompt) :]


def keys(count: int, seed: int = 0):
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(count))


def started(
    model: LLaMa,
    prompts: list[list[int]],
    params: SamplingParams = GREEDY,
    *,
    limits: list[int] | None = None,
    stop_ids: np.ndarray = NONE,
    buffer: int = 32,
    newlines: NewlineTable | None = None,
    **options,
) -> tuple[DecodeState, SamplingRules]:
    """Prefilled rows with their first token drawn."""
    rules = SamplingRules.of(params, vocab_size=model.config.vocab_size, newlines=newlines)
    capacity = min(64 + buffer, model.config.max_position_embeddings)
    last_BD, cache = prefill(model, new_cache(model, len(prompts), capacity), prompts, from_empty=True)
    limit_B = np.array([buffer] * len(prompts) if limits is None else limits, np.int32)
    state = begin(
        model,
        cache,
        last_BD,
        rules,
        stop_ids,
        keys_B=keys(len(prompts)),
        limit_B=limit_B,
        max_new_tokens=buffer,
        **options,
    )
    return state, rules


def drawn(state: DecodeState) -> list[list[int]]:
    return [ids[:count].tolist() for ids, count in zip(np.asarray(state.tokens_BM), np.asarray(state.count_B))]


def run(model: LLaMa, prompts: list[list[int]], steps: int = 1000, **options) -> DecodeState:
    stop_ids = options.get("stop_ids", NONE)
    state, rules = started(model, prompts, **options)
    return loops.decode(model, state, rules, stop_ids, steps)


# Prefill


@pytest.mark.parametrize("chunk", [1, 5, 16, 512])
def test_prefill_in_pieces_leaves_what_a_forward_pass_computes(model, chunk):
    last_BD, held = prefill(model, new_cache(model, 3, 40), PROMPTS, from_empty=True, chunk=chunk)
    assert np.asarray(held.length_B).tolist() == [8, 1, 18]
    whole_BD, whole = prefill(model, new_cache(model, 3, 64), PROMPTS, from_empty=True)
    for row, prompt in enumerate(PROMPTS):
        x_BTD, _ = model.hidden(jnp.array([prompt]))
        np.testing.assert_allclose(last_BD[row], x_BTD[0, -1], atol=1e-5)
        n = len(prompt)
        for ours, theirs in ((held.k_LBKSH, whole.k_LBKSH), (held.v_LBKSH, whole.v_LBKSH)):
            np.testing.assert_allclose(ours[:, row, :, :n], theirs[:, row, :, :n], atol=1e-5)
    np.testing.assert_allclose(last_BD, whole_BD, atol=1e-5)


def test_prefill_behind_what_rows_hold_already(model):
    first, second = [PROMPTS[2][:10], [7], [1, 2]], [PROMPTS[2][10:], [8, 9], [3] * 20]
    _, held = prefill(model, new_cache(model, 3, 40), first, from_empty=True)
    last_BD, held = prefill(model, held, second, from_empty=False, chunk=6)
    for row in range(3):
        x_BTD, _ = model.hidden(jnp.array([first[row] + second[row]]))
        np.testing.assert_allclose(last_BD[row], x_BTD[0, -1], atol=1e-5)


def test_a_prompt_longer_than_the_default_piece():
    long = random_model(replace(TINY, max_position_embeddings=700, num_layers=1, layer_windows=(None,)))
    prompt = np.random.default_rng(0).integers(0, TINY.vocab_size, 600).tolist()
    assert len(prompt) > loops.PREFILL_CHUNK
    last_BD, held = prefill(long, new_cache(long, 2, 620), [prompt, [4, 5]], from_empty=True)
    assert np.asarray(held.length_B).tolist() == [600, 2]
    np.testing.assert_allclose(long.unembed(last_BD[:1, None])[0, 0], full_logits(long, prompt)[-1], atol=1e-4)
    np.testing.assert_allclose(long.unembed(last_BD[1:, None])[0, 0], full_logits(long, [4, 5])[-1], atol=1e-4)


def test_prefill_fills_a_cache_to_the_last_slot_and_refuses_more(model):
    full = [[5] * 37]
    last_BD, held = prefill(model, new_cache(model, 1, 37), full, from_empty=True)
    x_BTD, _ = model.hidden(jnp.array(full))
    np.testing.assert_allclose(last_BD[0], x_BTD[0, -1], atol=1e-5)
    with pytest.raises(ValueError, match="38 tokens do not fit a cache of 37"):
        prefill(model, held, [[1]], from_empty=False)
    with pytest.raises(ValueError, match="38 tokens do not fit a cache of 37"):
        prefill(model, new_cache(model, 1, 37), [[5] * 38], from_empty=True)


def test_prefill_refuses_an_empty_prompt(model):
    with pytest.raises(ValueError, match="empty"):
        prefill(model, new_cache(model, 2, 16), [[1], []], from_empty=True)


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 16, 17, 32, 33, 500, 512, 513)] == [16, 16, 32, 32, 64, 512, 512, 1024]


# The loop


def test_greedy_rows_of_different_lengths_are_the_naive_continuations(model):
    state = run(model, PROMPTS, limits=[20, 20, 20])
    assert drawn(state) == [naive_greedy(model, prompt, 20) for prompt in PROMPTS]
    # The last token drawn has not been through the network.
    assert np.asarray(state.cache.length_B).tolist() == [len(prompt) + 19 for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["mistral-window", "qwen3", "all-biases"])
def test_other_families_decode_as_they_run(name):
    family = random_model(FAMILIES[name])
    assert drawn(run(family, PROMPTS[1:], limits=[24, 24])) == [naive_greedy(family, p, 24) for p in PROMPTS[1:]]


def test_every_row_keeps_to_its_own_limit_and_idle_rows_draw_nothing(model):
    state = run(model, PROMPTS, limits=[5, 0, 1])
    expected = naive_greedy(model, PROMPTS[0], 5), [], naive_greedy(model, PROMPTS[2], 1)
    assert drawn(state) == list(expected)
    assert np.asarray(state.done_B).all()
    assert np.asarray(state.cache.length_B).tolist() == [8 + 4, 1, 18]
    assert not any(ids[count:].any() for ids, count in zip(np.asarray(state.tokens_BM), np.asarray(state.count_B)))


def test_stop_ids_end_rows_and_are_counted(model):
    free = drawn(run(model, PROMPTS, limits=[20] * 3))
    stop_ids = np.array(sorted({free[0][4], free[2][7]}), np.int32)
    state = run(model, PROMPTS, limits=[20] * 3, stop_ids=stop_ids)
    for ids, all_ids in zip(drawn(state), free):
        end = next((n for n, token in enumerate(all_ids, 1) if token in stop_ids), 20)
        assert ids == all_ids[:end]
    assert min(map(len, drawn(state))) < 20
    assert np.asarray(state.done_B).all()


def test_decoding_in_pieces_is_decoding_at_once(model):
    params = SamplingParams(temperature=1.3, top_p=0.9)
    whole = drawn(run(model, PROMPTS, params=params))
    state, rules = started(model, PROMPTS, params)
    for steps in (0, 1, 2, 7, 3, 100):
        before = np.asarray(state.count_B)
        state = loops.decode(model, state, rules, NONE, steps)
        assert np.asarray(state.count_B - before).tolist() == [min(steps, 32 - n) for n in before]
    assert drawn(state) == whole


MIXED = replace(TINY, num_layers=3, layer_windows=(None, 6, 11))


@pytest.mark.parametrize("name", ["plain", "mixed windows", "qwen3", "all-biases", "adapters"])
@pytest.mark.parametrize("pieces", [[(1000, None)], [(3, 32), (20, 64), (1000, None)]], ids=["at once", "in pieces"])
def test_layers_one_by_one_and_few_slots_are_the_scan_over_all(name, pieces):
    network = random_model({"plain": TINY, "mixed windows": MIXED, "adapters": TINY}.get(name) or FAMILIES[name])
    if name == "adapters":
        network = add_lora(network, LoraConfig(rank=2, alpha=2.0), key=jax.random.key(1))
        network = jax.tree.map(lambda leaf: leaf + 0.1, network)
    params = SamplingParams(temperature=0.9)
    ends = []
    for split in (False, True):
        state, rules = started(network, PROMPTS, params, limits=[30, 5, 32], logprobs=True)
        for steps, slots in pieces if split else [(1000, None)]:
            state = loops.decode(network, state, rules, NONE, steps, slots=slots, split=split)
        ends.append(state)
    scanned, split = ends
    assert drawn(split) == drawn(scanned) and [len(ids) for ids in drawn(split)] == [30, 5, 32]
    np.testing.assert_allclose(split.plain_logprobs_BM, scanned.plain_logprobs_BM, atol=1e-5)
    np.testing.assert_array_equal(split.cache.length_B, scanned.cache.length_B)
    for row, length in enumerate(np.asarray(split.cache.length_B)):
        for ours, theirs in zip(jax.tree.leaves(split.cache)[:2], jax.tree.leaves(scanned.cache)[:2]):
            np.testing.assert_allclose(ours[:, row, :, :length], theirs[:, row, :, :length], atol=1e-5)


def test_slots_are_enough_for_the_steps_and_no_more_than_there_are(model):
    state, _ = started(model, PROMPTS)  # of up to 18 tokens, in 64 slots
    assert loops.slots_for(state, 1) == loops.slots_for(state, 1000) == 64
    state = replace(state, cache=kvcache.resize(state.cache, 700))
    assert [loops.slots_for(state, steps) for steps in (1, 238, 239, 494, 495)] == [256, 256, 512, 512, 700]


def test_blocks_without_a_cache_are_refused(model):
    with pytest.raises(ValueError, match="blocks go with a cache"):
        model.hidden(jnp.array([[1, 2]]), blocks=model.split_blocks())


class Counted(LLaMa):
    """A network that notes every time it is run on something."""

    runs = 0

    def hidden(self, *args, **options):
        def note():
            Counted.runs += 1

        jax.debug.callback(note)
        return super().hidden(*args, **options)


def test_the_loop_ends_as_soon_as_all_rows_have():
    counted = Counted(TINY, key=jax.random.key(0))

    def runs(**options) -> int:
        state, rules = started(counted, PROMPTS, **options)
        jax.block_until_ready(state)
        jax.effects_barrier()
        Counted.runs = 0
        state = loops.decode(counted, state, rules, options.get("stop_ids", NONE), 1000)
        jax.block_until_ready(state)
        jax.effects_barrier()
        return Counted.runs

    assert runs(limits=[1, 1, 1]) == 0
    assert runs(limits=[2, 4, 1]) == 3
    assert runs(limits=[0, 0, 0]) == 0
    everything = np.arange(TINY.vocab_size, dtype=np.int32)
    assert runs(limits=[30] * 3, stop_ids=everything) == 0
    assert runs(limits=[30] * 3) == 29


def test_the_cache_is_donated_and_never_copied(model):
    held = new_cache(model, 2, 64)
    places = [leaf.unsafe_buffer_pointer() for leaf in (held.k_LBKSH, held.v_LBKSH)]
    last_BD, prefilled = prefill(model, held, [[1, 2], [3]], from_empty=True)
    assert held.k_LBKSH.is_deleted() and held.v_LBKSH.is_deleted()
    rules = SamplingRules.of(GREEDY, vocab_size=TINY.vocab_size)
    limit_B = np.array([9, 9], np.int32)
    state = begin(model, prefilled, last_BD, rules, NONE, keys_B=keys(2), limit_B=limit_B, max_new_tokens=32)
    assert prefilled.k_LBKSH.is_deleted()
    before = state
    state = loops.decode(model, state, rules, NONE, 5)
    assert before.cache.k_LBKSH.is_deleted() and before.tokens_BM.is_deleted()
    assert [leaf.unsafe_buffer_pointer() for leaf in (state.cache.k_LBKSH, state.cache.v_LBKSH)] == places


def test_forked_rows_go_on_as_their_prompt_does(model):
    last_BD, held = prefill(model, new_cache(model, 2, 64), PROMPTS[:2], from_empty=True)
    rules = SamplingRules.of(GREEDY, vocab_size=TINY.vocab_size)
    state = begin(
        model,
        kvcache.fork(held, 2),
        jnp.repeat(last_BD, 2, axis=0),
        rules,
        NONE,
        keys_B=keys(4),
        limit_B=np.array([6] * 4, np.int32),
        max_new_tokens=32,
    )
    expected = [naive_greedy(model, prompt, 6) for prompt in PROMPTS[:2]]
    assert drawn(loops.decode(model, state, rules, NONE, 100)) == [expected[0]] * 2 + [expected[1]] * 2


# Rules inside the loop


def test_repetition_penalty_sees_prompt_and_completion(model):
    seen_BV = np.zeros((3, TINY.vocab_size), bool)
    for row, prompt in enumerate(PROMPTS):
        seen_BV[row, prompt] = True
    params = SamplingParams(temperature=0.0, repetition_penalty=3.0)
    ours = drawn(run(model, PROMPTS, params=params, limits=[20] * 3, seen_BV=seen_BV))
    assert ours == [naive_greedy(model, prompt, 20, penalty=3.0) for prompt in PROMPTS]
    assert ours != drawn(run(model, PROMPTS, limits=[20] * 3))


def test_banned_tokens_are_never_drawn(model):
    banned = tuple(sorted({token for ids in drawn(run(model, PROMPTS)) for token in ids}))
    greedy = drawn(run(model, PROMPTS, params=SamplingParams(temperature=0.0, banned_tokens=banned), limits=[20] * 3))
    assert greedy == [naive_greedy(model, prompt, 20, banned=banned) for prompt in PROMPTS]
    hot = drawn(run(model, PROMPTS, params=SamplingParams(temperature=9.0, banned_tokens=banned)))
    assert not {token for ids in hot for token in ids} & set(banned)


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_runs_of_newlines_stay_under_their_cap(model, cap):
    pieces = [b"\n", b"\n\n", b"a\n", b"\nb", b"c\n\nd", b"e", b"\n\n\n\n", b" "] * 6
    table = NewlineTable.of(pieces)
    prompts, at_end = [[5, 0], [5], [2]], np.array([1, 0, 1], np.int32)

    def longest_run(params: SamplingParams, **options) -> int:
        rows = drawn(run(model, prompts, params=params, newlines=table, **options))
        texts = (b"".join(pieces[token] for token in prompt + ids) for prompt, ids in zip(prompts, rows))
        return max(len(run) for text in texts for run in re.findall(rb"\n+", text))

    hot = SamplingParams(temperature=5.0)
    assert longest_run(hot) > cap
    capped = replace(hot, max_consecutive_newlines=cap)
    assert longest_run(capped, newline_run_B=at_end) == cap


# Log-probabilities


def filtered_by_hand(logits_V: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Log-probabilities left by the filters, in this order, renormalised; in float64."""
    logits_V = logits_V.astype(np.float64) / temperature
    order = np.argsort(-logits_V)
    logits_V[order[top_k:]] = -np.inf
    probs = np.exp(logits_V - logits_V.max())
    probs /= probs.sum()
    beyond = np.cumsum(probs[order]) - probs[order] >= top_p
    logits_V[order[beyond]] = -np.inf
    logits_V[logits_V < logits_V.max() + np.log(min_p)] = -np.inf
    return log_softmax(logits_V)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_both_log_probabilities_of_drawn_tokens(model):
    filters = {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.1}
    state = run(model, PROMPTS, params=SamplingParams(**filters), limits=[30, 12, 30], logprobs=True)
    cut = 0
    for row, (prompt, ids) in enumerate(zip(PROMPTS, drawn(state))):
        logits_TV = full_logits(model, prompt + ids)[len(prompt) - 1 : -1]
        plain = log_softmax(logits_TV / filters["temperature"])
        kept = np.array([filtered_by_hand(logits_V, **filters) for logits_V in logits_TV])
        steps = np.arange(len(ids))
        np.testing.assert_allclose(state.plain_logprobs_BM[row, : len(ids)], plain[steps, ids], atol=1e-5)
        np.testing.assert_allclose(state.drawn_logprobs_BM[row, : len(ids)], kept[steps, ids], atol=1e-5)
        cut += np.isinf(kept).sum()
    assert cut > 100


def test_greedy_log_probabilities_are_those_of_temperature_one(model):
    state = run(model, PROMPTS, limits=[9] * 3, logprobs=True)
    for row, (prompt, ids) in enumerate(zip(PROMPTS, drawn(state))):
        plain = log_softmax(full_logits(model, prompt + ids)[len(prompt) - 1 : -1])
        np.testing.assert_allclose(state.plain_logprobs_BM[row, :9], plain[np.arange(9), ids], atol=1e-5)
    assert not np.asarray(state.drawn_logprobs_BM).any()


def test_tokens_are_drawn_as_often_as_their_probability_says(model):
    """400 rows of one prompt, each with a key of its own, against the filtered distribution."""
    filters = {"temperature": 2.0, "top_k": 6, "top_p": 0.95, "min_p": 0.01}
    last_BD, held = prefill(model, new_cache(model, 1, 16), [PROMPTS[0]], from_empty=True)
    rules = SamplingRules.of(SamplingParams(**filters), vocab_size=TINY.vocab_size)
    B = 400
    limit_B = np.ones(B, np.int32)
    held, last_BD = kvcache.fork(held, B), jnp.repeat(last_BD, B, axis=0)
    state = begin(model, held, last_BD, rules, NONE, keys_B=keys(B), limit_B=limit_B, max_new_tokens=1)
    probs = np.exp(filtered_by_hand(full_logits(model, PROMPTS[0])[-1], **filters))
    counts = np.bincount(np.asarray(state.tokens_BM)[:, 0], minlength=TINY.vocab_size)
    assert not counts[probs == 0].any()
    spread = np.sqrt(B * probs * (1 - probs))
    assert (np.abs(counts - B * probs) <= 4 * spread + 1e-9).all()
