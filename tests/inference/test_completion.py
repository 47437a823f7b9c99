"""Lists of prompts to completions: what a row may depend on, limits, seeds, compilations, and the trained model."""

import json
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import completion, text
from inference.completion import Completion, Request, generate, stream
from models.llama import LLaMa, load_pretrained, load_tokenizer
from sampling import SamplingParams
from tests.models.llama.checkpoints import TINY, random_model

GREEDY = SamplingParams(temperature=0.0)
HOT = SamplingParams(temperature=1.5, top_p=0.95)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [20, 30, 40] * 6, [11, 12], [13] * 17]


@pytest.fixture(scope="module")
def model() -> LLaMa:
    return random_model(TINY)


def ids_of(results) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in samples] for samples in results]


# What a completion may depend on


@pytest.fixture(scope="module")
def alone(model) -> list[Completion]:
    """The completion of each prompt in a batch of one."""
    request = Request(max_new_tokens=24, sampling=HOT, seed=5, logprobs=True)
    return [samples[0] for samples in generate(model, PROMPTS, request, batch_size=1)]


@pytest.mark.parametrize("batch_size", [2, 3, 5, 16])
def test_a_completion_does_not_depend_on_the_size_of_the_batch(model, alone, batch_size):
    request = Request(max_new_tokens=24, sampling=HOT, seed=5, logprobs=True)
    results = list(generate(model, PROMPTS, request, batch_size=batch_size))
    assert [len(samples) for samples in results] == [1] * len(PROMPTS)
    for [ours], theirs in zip(results, alone):
        assert ours.token_ids == theirs.token_ids and ours.finish_reason == theirs.finish_reason == "length"
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        np.testing.assert_allclose(ours.drawn_logprobs, theirs.drawn_logprobs, atol=1e-5)


def test_a_completion_does_not_depend_on_the_rows_beside_it(model, alone):
    request = Request(max_new_tokens=24, sampling=HOT, seed=5)
    others = [[1, 2, 3], PROMPTS[1], [9] * 30, PROMPTS[3]]
    results = ids_of(generate(model, others, request))
    assert results[1] == [alone[1].token_ids] and results[3] == [alone[3].token_ids]
    assert results[0] != [alone[0].token_ids]


def test_a_row_that_stops_early_leaves_the_others_alone(model, alone):
    stop = alone[0].token_ids[2]
    request = Request(max_new_tokens=24, sampling=HOT, seed=5, stop_ids=frozenset({stop}))
    for [ours], theirs in zip(generate(model, PROMPTS, request), alone):
        if stop in theirs.token_ids:
            end = theirs.token_ids.index(stop) + 1
            assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids[:end], "stop")
        else:
            assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, "length")


def test_a_stream_is_the_completion_of_that_number(model, alone):
    request = Request(max_new_tokens=24, sampling=HOT, seed=5)
    for number, prompt in enumerate(PROMPTS):
        pieces = list(stream(model, prompt, request, number=number))
        assert [token for piece in pieces for token in piece] == alone[number].token_ids
        assert len(pieces) > 1


def test_more_room_for_new_tokens_does_not_change_the_first_ones(model, alone):
    request = Request(max_new_tokens=40, sampling=HOT, seed=5)
    for [ours], theirs in zip(generate(model, PROMPTS, request), alone):
        assert ours.token_ids[:24] == theirs.token_ids


def test_seeds_prompt_numbers_and_samples_draw_differently_and_repeatably(model):
    def drawn(**changes) -> list[list[list[int]]]:
        request = Request(**{"max_new_tokens": 16, "sampling": HOT, "num_samples": 3, "seed": 1} | changes)
        return ids_of(generate(model, [PROMPTS[0]] * 2, request))

    first = drawn()
    assert len({tuple(ids) for samples in first for ids in samples}) == 6
    assert drawn() == first
    assert not {tuple(i) for s in drawn(seed=2) for i in s} & {tuple(i) for s in first for i in s}
    assert drawn(num_samples=1) == [samples[:1] for samples in first]
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed must be"):
            drawn(seed=seed)


def test_samples_do_not_depend_on_the_batch_either(model):
    request = Request(max_new_tokens=12, sampling=HOT, num_samples=3)
    whole = ids_of(generate(model, PROMPTS, request))
    for batch_size in (1, 4, 6):
        assert ids_of(generate(model, PROMPTS, request, batch_size=batch_size)) == whole


def test_each_prompt_is_prefilled_once_for_all_its_samples(model, monkeypatch):
    prefilled = []

    def counting(model, cache, prompts, **options):
        prefilled.append(prompts)
        return prefill(model, cache, prompts, **options)

    prefill = completion.prefill
    monkeypatch.setattr(completion, "prefill", counting)
    results = list(generate(model, PROMPTS, Request(max_new_tokens=4, sampling=HOT, num_samples=4), batch_size=8))
    assert [len(samples) for samples in results] == [4] * 5
    assert prefilled == [PROMPTS[:2], PROMPTS[2:4], [PROMPTS[4], [0]]]


# Limits


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 40])
def test_max_new_tokens_is_honoured_exactly(model, count):
    results = list(generate(model, PROMPTS[:2], Request(max_new_tokens=count, sampling=GREEDY)))
    assert [(len(c.token_ids), c.finish_reason) for [c] in results] == [(count, "length")] * 2


def test_a_completion_ends_where_the_context_does(model):
    context = TINY.max_position_embeddings
    prompts = [[5] * (context - 1), [6] * 50, [7]]
    free = random_model(replace(TINY, max_position_embeddings=4 * context))
    for sampling in (GREEDY, HOT):
        results = list(generate(model, prompts, Request(max_new_tokens=10**12, sampling=sampling)))
        assert [len(c.token_ids) for [c] in results] == [1, context - 50, context - 1]
        assert {c.finish_reason for [c] in results} == {"length"}
        longer = list(generate(free, prompts, Request(max_new_tokens=100, sampling=sampling)))
        assert [c.token_ids for [c] in results] == [c.token_ids[: context - len(p)] for p, [c] in zip(prompts, longer)]


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([], "prompt 1 is empty"),
        ([1] * TINY.max_position_embeddings, "prompt 1 has 64 tokens"),
        ([1, TINY.vocab_size], "prompt 1 has token ids outside"),
        ([-1], "prompt 1 has token ids outside"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_at_once(model, prompt, complaint):
    request = Request(max_new_tokens=3, sampling=GREEDY)
    with pytest.raises(ValueError, match=complaint):
        generate(model, [[1], prompt], request)
    with pytest.raises(ValueError, match=complaint.replace("1", "0", 1)):
        list(stream(model, prompt, request))


@pytest.mark.parametrize("changes", [{"max_new_tokens": 0}, {"num_samples": 0}, {"max_new_tokens": -1}])
def test_requests_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be at least 1"):
        Request(**{"max_new_tokens": 1, "sampling": GREEDY} | changes)


def test_banned_tokens_outside_the_vocabulary_are_refused(model):
    sampling = SamplingParams(banned_tokens=(TINY.vocab_size,))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        list(generate(model, [[1]], Request(max_new_tokens=1, sampling=sampling)))


def test_no_prompts_are_no_completions(model):
    assert list(generate(model, [], Request(max_new_tokens=3, sampling=GREEDY))) == []


# Ends that ids do not show


def test_ends_are_asked_with_the_number_of_the_prompt(model):
    request = Request(max_new_tokens=40, sampling=HOT, num_samples=2, logprobs=True)
    whole = list(generate(model, PROMPTS, request))
    asked = set()

    def ends(number: int, ids: list[int]) -> int | None:
        asked.add(number)
        assert any(ids == sample.token_ids[: len(ids)] for sample in whole[number])
        return None if number == 3 or len(ids) < 5 + number else 5 + number

    for batch_size in (1, 4, 16):
        cut = list(generate(model, PROMPTS, request, batch_size=batch_size, ends=ends))
        for number, (ours, theirs) in enumerate(zip(cut, whole)):
            for short, long in zip(ours, theirs):
                keep = 40 if number == 3 else 5 + number
                assert short.token_ids == long.token_ids[:keep]
                assert len(short.logprobs) == len(short.drawn_logprobs) == keep
                assert short.finish_reason == ("length" if number == 3 else "stop")
    assert asked == set(range(len(PROMPTS)))


def test_rows_that_have_their_end_are_run_no_further(model, monkeypatch):
    states = []

    def noting(*args, **options):
        states.append(decode(*args, **options))
        return states[-1]

    decode = completion.decode
    monkeypatch.setattr(completion, "decode", noting)
    request = Request(max_new_tokens=40, sampling=HOT)
    results = list(generate(model, PROMPTS, request, ends=lambda number, ids: 3 if len(ids) >= 3 else None))
    assert [len(c.token_ids) for [c] in results] == [3] * len(PROMPTS)
    assert len(states) == 1


# Compilations


def test_new_lengths_temperatures_and_seeds_compile_nothing(model, caplog):
    def compiled(prompts, *, batch_size=4, **changes) -> list[str]:
        values = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}
        values |= {name: value for name, value in changes.items() if name in values}
        other = {name: value for name, value in changes.items() if name not in values}
        request = Request(**{"max_new_tokens": 20, "sampling": SamplingParams(**values)} | other)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            list(generate(model, prompts, request, batch_size=batch_size))
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling")]

    jax.clear_caches()
    assert compiled([[1, 2, 3], [4]] * 2)
    assert not compiled([[5] * 16, [4], [1, 2], [7] * 9])  # other lengths in the same bucket
    assert not compiled([[1, 2]] * 11)  # a last batch that is not full is filled up
    assert not compiled([[1, 2, 3]] * 4, temperature=1.9, top_p=0.5, top_k=3, min_p=0.2, repetition_penalty=1.7)
    assert not compiled([[1, 2, 3]] * 4, seed=7, max_new_tokens=32)
    assert compiled([[1, 2, 3]] * 4, max_new_tokens=33)


# A trained model in five layouts, against what other libraries computed


LAYOUTS = ["hf", "hf-sharded", "meta", "meta-mp2", "llama2c"]


@pytest.fixture(scope="module")
def golden(assets_dir) -> dict:
    return json.loads((assets_dir / "stories260k" / "golden.json").read_text())


@pytest.fixture(scope="module", params=LAYOUTS)
def stories(request, assets_dir):
    """The model and the tokenizer of one layout; llama2.c's own tokenizer file is not among those we read."""
    folder = assets_dir / "stories260k"
    tokenizer = load_tokenizer(folder / ("hf" if request.param == "llama2c" else request.param))
    return load_pretrained(folder / request.param), tokenizer


def test_the_story_from_nothing_is_exact(stories, golden):
    model, tokenizer = stories
    wanted = golden["bos_greedy"]
    prompt = wanted["prompt_ids"]
    request = Request(max_new_tokens=wanted["steps"], sampling=GREEDY, stop_ids=tokenizer.stop_ids)
    [[done]] = text.complete(model, tokenizer, [prompt], request)
    assert prompt + done.completion.token_ids == wanted["ids"]
    assert done.text == wanted["text"]
    streamed = "".join(text.stream(model, tokenizer, prompt, request))
    assert streamed == wanted["text"]


def test_the_five_continuations_are_exact_in_one_batch(stories, golden):
    model, tokenizer = stories
    prompts = [tokenizer.encode(row["prompt"], add_bos=True) for row in golden["greedy"]]
    assert prompts == [row["prompt_ids"] for row in golden["greedy"]]
    steps = len(golden["greedy"][0]["continuation_ids"])
    results = text.complete(model, tokenizer, prompts, Request(max_new_tokens=steps, sampling=GREEDY))
    for row, [done] in zip(golden["greedy"], results):
        assert done.completion.token_ids == row["continuation_ids"]
        assert done.text == row["continuation_text"]
        assert row["prompt"] + done.text == row["text"]


def test_cross_entropies_of_three_stories(stories, golden):
    model, tokenizer = stories
    for row in golden["cross_entropy"]:
        assert tokenizer.encode(row["text"], add_bos=True) == row["ids"]
        logits_BTV, _ = model(jnp.array([row["ids"][:-1]]))
        logprobs_TV = jax.nn.log_softmax(logits_BTV[0])
        losses_T = -np.asarray(logprobs_TV)[np.arange(row["targets"]), row["ids"][1:]]
        assert losses_T.mean() == pytest.approx(row["mean_ce"], abs=1e-4)
        assert losses_T[1:].mean() == pytest.approx(row["mean_ce_excluding_first_target"], abs=1e-4)


def test_first_logits_behind_the_prompts(stories, golden):
    model, _ = stories
    for row in golden["greedy"]:
        logits_BTV, _ = model(jnp.array([row["prompt_ids"]]))
        last_V = logits_BTV[0, -1]
        best, ids = jax.lax.top_k(last_V, 5)
        assert ids.tolist() == [token for token, _ in row["first_step_top5"]]
        np.testing.assert_allclose(best, [logit for _, logit in row["first_step_top5"]], atol=1e-4)
        assert float(jax.nn.logsumexp(last_V)) == pytest.approx(row["first_step_logsumexp"], abs=1e-4)
