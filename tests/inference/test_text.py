"""Completions as text: stop strings, incremental decoding, newlines, and the tiny models that make it predictable."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import text
from inference.completion import Completion, Request
from inference.text import StopStrings, TextCompletion
from models.llama import LLaMa, load_tokenizer, save_pretrained
from models.llama.tokenizer import Tokenizer
from sampling import SamplingParams
from tests.models.llama.checkpoints import TINY, random_model

GREEDY = SamplingParams(temperature=0.0)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Answers lose what stands before </think> as soon as they are not the last message.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


@cache
def chat_tokenizer_json() -> str:
    """A byte-level BPE tokenizer with ChatML's special tokens and thinking marks, trained on a few words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = "user assistant system what is the colour of a rope walk and how long should it be then"
    tokenizer.train_from_iterator([words, words.upper(), words.title()], trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    return tokenizer.to_str()


def write_chat_tokenizer(folder: Path, *, template: str = CHATML) -> None:
    """The files of a chat-capable tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(chat_tokenizer_json())
    settings = {"eos_token": "<|im_end|>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_chat_checkpoint(folder: Path, *, model: LLaMa | None = None, template: str = CHATML) -> Path:
    """A whole checkpoint: a chat-capable tokenizer and, by default, random weights."""
    write_chat_tokenizer(folder, template=template)
    tokenizer = load_tokenizer(folder)
    save_pretrained(random_model(chat_config(tokenizer)) if model is None else model, folder)
    return folder


def chat_config(tokenizer: Tokenizer, *, context: int = 256):
    """The tiny network for a tokenizer."""
    return replace(TINY, vocab_size=tokenizer.vocab_size, max_position_embeddings=context)


def following_model(successors: dict[int, int], vocab_size: int, *, context: int = 256) -> LLaMa:
    """A network in which each token has one certain successor: itself, if `successors` has none for it."""
    config = replace(
        TINY, vocab_size=vocab_size, hidden_size=vocab_size, num_layers=1, layer_windows=(None,), intermediate_size=8
    )
    config = replace(config, max_position_embeddings=context)
    model = jax.tree.map(jnp.zeros_like, LLaMa(config, key=jax.random.key(0)))
    unembed_DV = np.zeros((vocab_size, vocab_size), np.float32)
    unembed_DV[np.arange(vocab_size), [successors.get(token, token) for token in range(vocab_size)]] = 2.0
    values = {"embed_VD": np.eye(vocab_size), "norm_D": np.ones(vocab_size), "unembed_DV": unembed_DV}

    def fill(path, leaf):
        own = str(path[0]).strip(".[]'")
        return jnp.asarray(values[own], leaf.dtype) if own in values else leaf

    return jax.tree_util.tree_map_with_path(fill, model)


def chain(*ids: int) -> dict[int, int]:
    """Successors that write out different ids one after another."""
    assert len(set(ids)) == len(ids), "a token cannot have two successors"
    return dict(itertools.pairwise(ids))


def drain(pieces: Iterator[str]) -> tuple[list[str], TextCompletion]:
    """What a stream yields, and what it returns."""
    shown = []
    while True:
        try:
            shown.append(next(pieces))
        except StopIteration as end:
            return shown, end.value


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_chat_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer) -> LLaMa:
    return random_model(chat_config(tokenizer))


def complete_one(model, tokenizer, ids: Sequence[int], request: Request, **options) -> TextCompletion:
    [[done]] = text.complete(model, tokenizer, [ids], request, **options)
    return done


# StopStrings by itself


def pushed(stops: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], bool]:
    watch = StopStrings(stops)
    shown = [watch.push(piece) for piece in pieces]
    return [*shown, "" if watch.found else watch.flush()], watch.found


def test_a_stop_string_is_found_across_pieces_and_never_shown_in_part():
    shown, found = pushed(["</end>"], ["some<", "/", "en", "d>", " more"])
    assert found and shown == ["some", "", "", "", "", ""]


def test_the_beginning_of_a_stop_string_that_does_not_come_is_shown_after_all():
    shown, found = pushed(["</end>"], ["a</en", "emy", "</"])
    assert not found and shown == ["a", "</enemy", "", "</"]


@pytest.mark.parametrize(
    ("stops", "whole", "expected"),
    [
        (["aab"], "aaaab!", "aa"),  # a false start inside a false start
        (["abc", "b"], "xabc", "x"),  # of those in what has arrived, the one that begins first
        (["xyz", "z"], "..xyz..", ".."),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["ÄÖ"], "äÄÄÖ", "äÄ"),
        ([], "all of it", "all of it"),
    ],
)
def test_pieces_of_any_size_cut_alike_up_to_a_stop_string(stops, whole, expected):
    assert "".join(pushed(stops, [whole])[0]) == expected
    for size in range(1, len(whole)):
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        shown = "".join(pushed(stops, pieces)[0])
        assert shown == expected or (len(stops) > 1 and shown.startswith(expected))
        assert not any(stop in shown for stop in stops)


def test_an_empty_stop_string_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
    with pytest.raises(ValueError, match="empty"):  # at once, not when the first result is asked for
        text.complete(model, tokenizer, [[1]], Request(max_new_tokens=1, sampling=GREEDY), stop=[""])


# Streams and whole texts of random models: every byte sequence, special token and stop string may come


@pytest.mark.parametrize("seed", range(6))
def test_streamed_text_is_the_whole_text(model, tokenizer, seed):
    prompt = tokenizer.encode("what is the colour")
    request = Request(
        max_new_tokens=40, sampling=SamplingParams(temperature=2.0), seed=seed, stop_ids=tokenizer.stop_ids
    )
    whole = complete_one(model, tokenizer, prompt, request)
    shown, streamed = drain(text.stream(model, tokenizer, prompt, request))
    assert streamed == whole
    assert "".join(shown) == whole.text and all(shown)
    assert whole.text == tokenizer.decode(whole.completion.token_ids, skip_special=True, continuation=True)


@pytest.mark.parametrize("seed", range(6))
def test_a_stop_string_from_the_middle_of_a_text_ends_it_there(model, tokenizer, seed):
    prompt = tokenizer.encode("how long")
    request = Request(max_new_tokens=60, sampling=SamplingParams(temperature=1.5), seed=seed)
    free = complete_one(model, tokenizer, prompt, request)
    middle = len(free.text) // 2
    stop = ["not in there", free.text[middle : middle + 3]]
    expected = free.text[: free.text.index(stop[1])]

    stopped = complete_one(model, tokenizer, prompt, request, stop=stop)
    assert stopped.text == expected
    assert stopped.completion.finish_reason == "stop"
    ids = stopped.completion.token_ids
    assert ids == free.completion.token_ids[: len(ids)]
    before, behind = (tokenizer.decode(ids[:end], skip_special=True, continuation=True) for end in (-1, None))
    assert stop[1] in behind and stop[1] not in before.rstrip("\N{REPLACEMENT CHARACTER}")

    shown, streamed = drain(text.stream(model, tokenizer, prompt, request, stop=stop))
    assert streamed == stopped
    for count in range(1, len(shown) + 1):
        assert expected.startswith("".join(shown[:count]))


def test_rows_of_a_batch_stop_each_at_its_own_string(model, tokenizer):
    prompts = [tokenizer.encode(words) for words in ("rope", "a walk and", "how")]
    request = Request(max_new_tokens=40, sampling=SamplingParams(temperature=1.5), num_samples=2, logprobs=True)
    free = [sample for samples in text.complete(model, tokenizer, prompts, request) for sample in samples]
    stop = [sample.text[9:12] for sample in free]
    stopped = [sample for samples in text.complete(model, tokenizer, prompts, request, stop=stop) for sample in samples]
    assert len(stopped) == len(free) == 6
    for short, long in zip(stopped, free):
        assert long.text.startswith(short.text) and len(short.text) <= 9
        count = len(short.completion.token_ids)
        assert short.completion.logprobs == long.completion.logprobs[:count]
        assert short.completion.drawn_logprobs == long.completion.drawn_logprobs[:count]


# Texts that are known beforehand


def written(tokenizer, *parts: str | int) -> list[int]:
    """Ids of texts and single tokens in a row."""
    return [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part))]


def test_an_emoji_is_streamed_whole_though_its_bytes_are_tokens(tokenizer):
    ids = written(tokenizer, "x🎈y")
    assert len(ids) == 6
    model = following_model(chain(*ids), tokenizer.vocab_size)
    request = Request(max_new_tokens=5, sampling=GREEDY)
    shown, done = drain(text.stream(model, tokenizer, ids[:1], request))
    assert done.text == "🎈y" and shown in (["🎈", "y"], ["🎈y"])
    assert complete_one(model, tokenizer, ids[:1], request) == done


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_an_emoji_cut_by_the_token_limit_is_one_replacement_character(tokenizer, tokens):
    ids = written(tokenizer, "x🎈y")
    model = following_model(chain(*ids), tokenizer.vocab_size)
    request = Request(max_new_tokens=tokens, sampling=GREEDY)
    shown, done = drain(text.stream(model, tokenizer, ids[:1], request))
    assert "".join(shown) == done.text == "\N{REPLACEMENT CHARACTER}"
    assert complete_one(model, tokenizer, ids[:1], request) == done


def test_a_stop_string_of_an_emoji_and_of_part_of_a_token(tokenizer):
    ids = written(tokenizer, "x🎈 walk")
    model = following_model(chain(*ids), tokenizer.vocab_size)
    request = Request(max_new_tokens=12, sampling=GREEDY)
    for stop, expected in (("🎈", ""), ("al", "🎈 w"), ("🎈 w", ""), ("k", "🎈 wal")):
        shown, done = drain(text.stream(model, tokenizer, ids[:1], request, stop=[stop]))
        assert "".join(shown) == done.text == expected, stop
        assert done.completion.finish_reason == "stop"
        assert complete_one(model, tokenizer, ids[:1], request, stop=[stop]) == done


@pytest.mark.parametrize("name", ["<|im_end|>", "Q"])
def test_the_stop_token_is_counted_but_not_shown_whether_special_or_not(tokenizer, name):
    end = tokenizer.special_tokens[name] if name in tokenizer.special_tokens else tokenizer.encode(name)[0]
    ids = written(tokenizer, "x", "y", end)
    model = following_model(chain(*ids), tokenizer.vocab_size)
    request = Request(max_new_tokens=9, sampling=GREEDY, stop_ids=frozenset({end}))
    done = complete_one(model, tokenizer, ids[:1], request)
    assert done == TextCompletion(text="y", completion=Completion(token_ids=ids[1:], finish_reason="stop"))
    assert drain(text.stream(model, tokenizer, ids[:1], request)) == (["y"], done)
    assert complete_one(model, tokenizer, ids[:1], request, stop=["Q"]) == done


def test_special_tokens_other_than_stop_tokens_are_left_out_of_the_text(tokenizer):
    ids = written(tokenizer, "x", "y", tokenizer.special_tokens["<|im_start|>"], "z")
    model = following_model(chain(*ids), tokenizer.vocab_size)
    request = Request(max_new_tokens=3, sampling=GREEDY)
    done = complete_one(model, tokenizer, ids[:1], request)
    assert done.text == "yz" and done.completion.token_ids == ids[1:]
    assert drain(text.stream(model, tokenizer, ids[:1], request))[1] == done


def test_the_newline_table_knows_ids_beyond_the_tokenizer(tokenizer):
    table = text.newline_table(tokenizer, tokenizer.vocab_size + 5)
    assert table.leading_V.shape == (tokenizer.vocab_size + 5,)
    [newline] = tokenizer.encode("\n")
    assert bool(table.only_V[newline]) and int(table.trailing_V[newline]) == 1
    assert not np.asarray(table.longest_V[tokenizer.vocab_size :]).any()
    assert np.asarray(table.longest_V).sum() == 1


def test_runs_of_newlines_are_capped_in_the_text(tokenizer):
    [newline], [letter] = tokenizer.encode("\n"), tokenizer.encode("x")
    model = following_model({letter: newline}, tokenizer.vocab_size)
    table = text.newline_table(tokenizer, tokenizer.vocab_size)
    for cap in (1, 3):
        sampling = SamplingParams(temperature=0.0, max_consecutive_newlines=cap)
        request = Request(max_new_tokens=12, sampling=sampling, newlines=table)
        done = complete_one(model, tokenizer, [letter], request)
        assert "\n" * cap in done.text and "\n" * (cap + 1) not in done.text
    free = complete_one(model, tokenizer, [letter], Request(max_new_tokens=12, sampling=GREEDY))
    assert free.text == "\n" * 12


def test_the_space_in_front_belongs_to_a_continuation_alone(assets_dir):
    """SentencePiece: a text behind BOS begins without its dummy space, one behind other text keeps it."""
    tokenizer = load_tokenizer(assets_dir / "stories260k" / "hf")
    [*_, piece] = tokenizer.encode("a the")
    model = following_model({}, tokenizer.vocab_size)
    request = Request(max_new_tokens=2, sampling=GREEDY)
    followed = tokenizer.token_bytes(piece).decode()
    assert followed.startswith(" ")
    assert complete_one(model, tokenizer, [tokenizer.bos_id, piece], request).text == followed * 2
    model = following_model({tokenizer.bos_id: piece}, tokenizer.vocab_size)
    done = complete_one(model, tokenizer, [tokenizer.bos_id], request)
    assert done.text == (followed * 2)[1:]
    assert drain(text.stream(model, tokenizer, [tokenizer.bos_id], request))[1] == done
    done = complete_one(model, tokenizer, [tokenizer.bos_id], request, stop=[followed])
    assert done.text == followed[1:] and len(done.completion.token_ids) == 2
    assert drain(text.stream(model, tokenizer, [tokenizer.bos_id], request, stop=[followed]))[1] == done
