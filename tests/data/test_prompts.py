"""Prompts: what rows ask, what rewards get to know, and the same sequence of them from any place in it."""

import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from data.characters import write_character_tokenizer
from data.chat import choose_template, encode_chat
from data.datasets import SourceConfig
from data.examples import tokenize
from data.prompts import PromptConfig, gather_columns, open_prompts
from data.records import BadRow, PromptRecord, normalize, normalize_prompt
from data.row_loading import RowLoader
from data.row_sources import TooLong
from models.llama import load_tokenizer

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
LETTERS = "\n :abcdefghijklmnopqrstuvwxyz"
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}
OTHER = {"role": "assistant", "content": "hu"}
SYSTEM = {"role": "system", "content": "be brief"}
TOOL = {"type": "function", "function": {"name": "area", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_character_tokenizer([LETTERS], folder)
    return load_tokenizer(folder)


@pytest.fixture
def opened(tmp_path: Path, tokenizer):
    """open_prompts of rows written to a file each, in a folder of each call's own, with a character tokenizer."""
    calls = itertools.count()

    def call(*files, seed=0, template=CHAT, weights=None, **options):
        folder, paths = tmp_path / f"call{next(calls)}", []
        folder.mkdir()
        for number, rows in enumerate(files):
            paths.append(folder / f"{number}.jsonl")
            lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
            paths[-1].write_text("".join(line + "\n" for line in lines))
        shares = weights or [None] * len(files)
        sources = tuple(SourceConfig(path=str(path), weight=share) for path, share in zip(paths, shares))
        config = PromptConfig(**{"train": sources, "max_prompt_length": 64} | options)
        return open_prompts(config, tokenizer, template=template, seed=seed)

    return call


def open_asset(assets_dir, name, tokenizer, template, *, max_prompt_length=10_000, **options):
    path = str(assets_dir / "data" / name)
    config = PromptConfig(train=path, max_prompt_length=max_prompt_length, **options)
    return open_prompts(config, tokenizer, template=template, seed=0)


def rows_of(assets_dir, name):
    text = (assets_dir / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def words(count, first=0):
    """Rows told by their column."""
    return [{"prompt": "a" * (1 + number % 7), "n": first + number} for number in range(count)]


def numbers(prompts):
    return [prompt.columns["n"] for prompt in prompts]


def text(prompt):
    return "".join(LETTERS[token] for token in prompt.ids)


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "hi"}, "hi", None),
        ({"prompt": "hi", "text": "x", "question": "y", "answer": "z", "messages": [USER]}, "hi", None),
        ({"prompt": "hi", "completion": "ho"}, "hi", "ho"),
        ({"prompt": [USER], "completion": [ANSWER]}, (USER,), "ho"),
        ({"prompt": [USER], "system": "be brief"}, (SYSTEM, USER), None),
        ({"prompt": [USER, ANSWER]}, (USER, ANSWER), None),
        ({"question": "hi", "answer": "ho"}, (USER,), "ho"),
        ({"question": "hi", "solution": "ho"}, (USER,), None),
        ({"instruction": "hi", "input": "", "output": "ho"}, (USER,), "ho"),
        ({"instruction": "hi", "system": "be brief"}, (SYSTEM, USER), None),
        ({"messages": [SYSTEM, USER, ANSWER]}, (SYSTEM, USER), "ho"),
        ({"messages": [USER, ANSWER, USER]}, (USER, ANSWER, USER), None),
        ({"messages": [USER, ANSWER, USER, ANSWER, OTHER]}, (USER, ANSWER, USER), "hu"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, (USER,), "ho"),
        ({"prompt": "hi", "chosen": "ho", "rejected": "hu"}, "hi", None),
        ({"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, (USER,), None),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, (USER,), None),
    ],
)
def test_what_a_row_asks(row, prompt, answer):
    assert normalize_prompt(row) == PromptRecord(prompt=prompt, answer=answer)


def test_a_turn_of_tool_calls_ends_before_the_last_message():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "area", "arguments": {}}}]}
    result = {"role": "tool", "content": "4"}
    found = normalize_prompt({"messages": [USER, call, result, ANSWER], "tools": [TOOL]})
    assert [message["role"] for message in found.prompt] == ["user", "assistant", "tool"]
    assert (found.answer, found.tools) == ("ho", (TOOL,))
    found = normalize_prompt({"messages": [USER, call]})
    assert (found.prompt, found.answer) == ((USER,), None)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "no prompt"),
        ({"solution": "x"}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"text": "x"}, "a text has no prompt"),
        ({"prompt": 3}, "prompt must be a non-empty list of messages, got 3"),
        ({"prompt": []}, "prompt must be a non-empty list"),
        ({"prompt": "hi", "completion": 3}, "completion must be a non-empty list"),
        ({"prompt": "hi", "tools": [TOOL]}, "tools need a conversation"),
        ({"messages": [ANSWER]}, "the assistant speaks first"),
        ({"messages": [USER], "conversations": [USER]}, "fits the formats messages, conversations"),
        ({"question": 3}, "question must be a string"),
        ({"chosen": "ho", "rejected": "ho"}, "are equal"),
        ([], "a row must be an object, got list"),
    ],
)
def test_rows_that_ask_nothing(row, why):
    with pytest.raises(ValueError, match=why) as caught:
        normalize_prompt(row)
    assert "\n" not in str(caught.value)
    assert all(repr(key) in str(caught.value) for key in row)


def test_the_format_can_be_named():
    row = {"prompt": "hey", "messages": [USER, ANSWER]}
    assert normalize_prompt(row).prompt == "hey"
    assert normalize_prompt(row, format="messages").prompt == (USER,)
    row = {"prompt": [USER, ANSWER], "completion": [OTHER], "messages": [USER]}
    assert normalize_prompt(row, format="completion") == PromptRecord(prompt=(USER, ANSWER), answer="hu")
    with pytest.raises(ValueError, match="unknown format 'sharegpt'"):
        normalize_prompt(row, format="sharegpt")


def test_ids_and_columns(opened):
    rows = [
        {"prompt": "abc", "completion": "d", "completions": 1, "completion_ids": 2, "prompts": 3, "level": 5},
        {"question": "hi", "answer": "ho"},
        {"messages": [SYSTEM, USER, ANSWER], "answer": None},
        {"prompt": [USER, ANSWER], "tools": None},
        {"prompt": "ab", "chosen": "c", "rejected": "d"},
        {"instruction": "hi", "output": "ho", "answer": 7},
    ]
    source = opened(rows).train
    prompts = [source[index] for index in range(len(source))]
    assert [text(prompt) for prompt in prompts] == [
        "abc",
        "user: hi\na: ",
        "system: be brief\nuser: hi\na: ",
        "user: hi\nassistant: ho",  # goes on with what the assistant has begun
        "ab",
        "user: hi\na: ",
    ]
    assert [prompt.columns for prompt in prompts] == [
        {"level": 5, "answer": "d"},
        {"question": "hi", "answer": "ho"},
        {"messages": [SYSTEM, USER, ANSWER], "answer": "ho"},
        {"tools": None},
        {"chosen": "c", "rejected": "d"},
        {"instruction": "hi", "output": "ho", "answer": 7},
    ]
    assert prompts[0].prompt == "abc" and prompts[2].prompt == (SYSTEM, USER)
    assert [prompt.index for prompt in prompts] == [0, 1, 2, 3, 4, 5] and source.where(5).endswith("0.jsonl:6")
    assert gather_columns(prompts[:2]) == {"level": [5, None], "answer": ["d", "ho"], "question": [None, "hi"]}


def test_a_system_message_for_conversations_without_one(opened):
    rows = [{"question": "hi"}, {"messages": [{"role": "system", "content": "x"}, USER]}]
    source = opened(rows, system="be brief").train
    assert text(source[0]) == "system: be brief\nuser: hi\na: " and text(source[1]) == "system: x\nuser: hi\na: "
    assert source[0].prompt == (SYSTEM, USER)
    with pytest.raises(ValueError, match=r"0\.jsonl:1: system needs a conversation, and the prompt is plain text"):
        opened([{"prompt": "hi"}], system="be brief")


def test_tools_reach_the_template_or_are_refused(opened):
    row = {"messages": [USER], "tools": [TOOL]}
    with pytest.raises(ValueError, match=r"0\.jsonl:1: the chat template leaves out tools, here of 'area'"):
        opened([row])
    source = opened([row], template="{% for t in tools %}{{ t.function.name }}\n{% endfor %}" + CHAT).train
    assert text(source[0]) == "area\nuser: hi\na: "
    with pytest.raises(ValueError, match=r"0\.jsonl:1: .*no place for tools"):
        opened([row], template=choose_template(None, "qa"))


def test_every_epoch_has_every_prompt_once_in_a_new_order(opened):
    source = opened(words(30)).train
    flat = [n for batch in itertools.islice(RowLoader(source, batch_size=7), 13) for n in numbers(batch)]
    epochs = [flat[start : start + 30] for start in (0, 30, 60)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != sorted(epochs[0])
    again, other = (next(RowLoader(source, batch_size=30, seed=seed)) for seed in (0, 1))
    assert numbers(again) == epochs[0] != numbers(other)
    assert numbers(next(RowLoader(source, batch_size=30, shuffle=False))) == list(range(30))
    assert next(RowLoader(source, batch_size=1))[0] == source[epochs[0][0]]


def test_the_last_batch_is_a_short_one(opened):
    source = opened(words(10)).train
    loader = RowLoader(source, batch_size=4, num_epochs=2)
    assert [len(batch) for batch in loader] == [4, 4, 4, 4, 4]
    loader = RowLoader(source, batch_size=4, num_epochs=1)
    assert [len(batch) for batch in loader] == [4, 4, 2]
    assert list(loader) == [] and loader.take(3) == []
    loader.seek(9)
    assert len(loader.take(4)) == 1
    with pytest.raises(ValueError, match="cannot go to 11 of 10 prompts"):
        loader.seek(11)


def test_what_is_too_long_is_left_out_and_counted(opened):
    rows = words(20)
    for number in (3, 4, 19):
        rows[number]["prompt"] = "a" * 65
    rows[5]["prompt"] = "a" * 64
    source = opened(rows).train
    with pytest.raises(TooLong, match=r"0\.jsonl:4: 65 tokens are more than 64"):
        source[3]
    loader = RowLoader(source, batch_size=4, num_epochs=1)
    assert sorted(n for batch in loader for n in numbers(batch)) == sorted({*range(20)} - {3, 4, 19})
    assert loader.left_out == "3 prompts longer than 64 tokens left out"
    loader = RowLoader(source, batch_size=17)
    for _ in range(3):
        assert Counter(numbers(next(loader))).most_common(1)[0][1] == 1
    assert loader.left_out.startswith("3 prompts")  # the second epoch has the same ones
    loader.seek(0)
    assert loader.left_out == ""


BAD = [
    '{"n": 1}',
    "{",
    "[1]",
    '{"prompt": ""}',
    '{"prompt": 3}',
    '{"messages": [{"role": "x"}]}',
    '{"prompt": "a\\ud800"}',
]
BAD += [
    '{"prompt": [{"role": "user", "content": "a"}], "tools": '
    + '[{"name": "a", "x": '
    + "[" * 100_000
    + "]" * 100_000
    + "}]}"
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_in_the_middle(opened, bad):
    rows = [*words(3), bad, *words(3, first=3)]
    loader = RowLoader(opened(rows).train, batch_size=3, shuffle=False)
    next(loader)
    before = loader.state()
    with pytest.raises(BadRow, match=r"0\.jsonl:4: ") as caught:
        next(loader)
    assert "\n" not in str(caught.value) and loader.state() == before
    skipping = RowLoader(opened(rows, on_bad_row="skip").train, batch_size=3, shuffle=False)
    skipping.restore(before)  # a run that a bad row has ended goes on
    assert numbers(next(skipping)) == [3, 4, 5]
    assert skipping.left_out.startswith("1 bad prompts skipped, the first ") and "0.jsonl:4: " in skipping.left_out


def test_a_bad_first_row_is_found_at_once(opened):
    with pytest.raises(BadRow, match=r"1\.jsonl:1: .*no prompt.*'solution'"):
        opened(words(3), [{"solution": "x"}])
    assert len(opened(words(3), [{"solution": "x"}], on_bad_row="skip").train) == 4
    assert len(opened([{"prompt": "a" * 65}, {"prompt": "a"}]).train) == 2


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_epochs", [None, 1, 3])
def test_an_epoch_without_a_prompt_is_an_error(opened, shuffle, num_epochs):
    rows = [{"prompt": "a" * 70}] * 5 + [{"n": 1}]
    source = opened(rows, on_bad_row="skip").train
    with pytest.raises(ValueError, match=r"not one of 6 prompts can be used, the last: .*0\.jsonl:\d: "):
        next(RowLoader(source, batch_size=2, shuffle=shuffle, num_epochs=num_epochs))


def test_one_prompt_among_many_that_are_too_long(opened):
    source = opened([{"prompt": "a" * 70}] * 20 + words(1)).train
    assert [numbers(batch) for batch in itertools.islice(RowLoader(source, batch_size=3), 4)] == [[0] * 3] * 4


MIXED = {"weights": (3, 1)}


@pytest.mark.parametrize("mixture", [{}, MIXED])
def test_a_state_goes_on_bit_for_bit_in_any_number_of_processes(opened, mixture):
    first, second = words(23), words(9, first=100)
    for number in (0, 5, 22):
        first[number]["prompt"] = "a" * 70
    source = opened(first, second, **mixture).train
    whole = list(itertools.islice(RowLoader(source, batch_size=4), 30))
    for before in (0, 1, 4, 11):
        loaders = [RowLoader(source, batch_size=4, process_index=i, process_count=2) for i in range(2)]
        halves = [list(itertools.islice(loader, before)) for loader in loaders]
        assert [[*one, *two] for one, two in zip(*halves)] == whole[:before]
        state = json.loads(json.dumps(loaders[0].state()))
        assert loaders[1].state() == state
        loader = RowLoader(source, batch_size=4)
        next(loader)
        loader.restore(state)
        assert loader.left_out == loaders[0].left_out
        assert list(itertools.islice(loader, 30 - before)) == whole[before:]


def test_taking_some_counts_prompts(opened):
    source = opened(words(11)).train
    whole = numbers(RowLoader(source, batch_size=40).take(30))
    loader = RowLoader(source, batch_size=4)
    found = numbers([*next(loader), *loader.take(3), *loader.take(1)])
    again = RowLoader(source, batch_size=4)
    again.restore(loader.state())
    assert found + numbers([*next(again), *again.take(9)]) == whole[:21]
    again.seek(13)
    assert numbers(again.take(5)) == whole[13:18]
    sharded = RowLoader(source, batch_size=4, process_index=1, process_count=2)
    assert numbers(sharded.take(6)) == whole[3:6]
    with pytest.raises(ValueError, match="3 prompts cannot be shared evenly by 2 processes"):
        sharded.take(3)


def test_an_interrupt_anywhere_loses_nothing(opened):
    rows = words(9)
    rows[4]["prompt"] = "a" * 70
    source = opened(rows).train
    expected = [numbers(batch) for batch in itertools.islice(RowLoader(source, batch_size=3), 5)]
    interrupted = 0
    for moment in range(4000):
        loader, calls = RowLoader(source, batch_size=3), 0
        next(loader)

        def interrupt(frame, event, arg, moment=moment):
            nonlocal calls
            calls += "data/" in frame.f_code.co_filename
            if calls > moment:
                raise KeyboardInterrupt

        before = loader.state()
        sys.settrace(interrupt)
        try:
            batch = next(loader)
        except KeyboardInterrupt:
            sys.settrace(None)
            interrupted += 1
            assert loader.state() == before
            batch = next(loader)
        finally:
            sys.settrace(None)
        assert [numbers(batch), numbers(next(loader))] == expected[1:3]
        if calls <= moment:
            break
    assert interrupted > 50 and calls <= moment


def test_a_mixture_keeps_its_shares_of_usable_prompts(opened):
    first, second = words(40), words(5, first=100)
    for row in first[::2]:
        row["prompt"] = "a" * 70
    source = opened(first, second, weights=(3, 1)).train
    found = numbers(RowLoader(source, batch_size=80).take(80))
    for stop in range(4, 81, 4):
        assert sum(n >= 100 for n in found[:stop]) == stop // 4
    assert Counter(n for n in found if n >= 100) == dict.fromkeys(range(100, 105), 4)
    one = RowLoader(source, batch_size=100, num_epochs=1)
    assert len(one.take(100)) in range(18, 23)  # five of the second data set, and three times as many of the first
    with pytest.raises(ValueError, match="not one of 5 prompts can be used"):
        RowLoader(opened(words(9), [{"prompt": "a" * 70}] * 5, **MIXED).train, batch_size=8).take(8)


def test_the_held_out_part_is_never_trained_on(opened):
    data = opened(words(40), words(10, first=100), validation_fraction=0.2)
    held = [data.validation[index].columns["n"] for index in range(len(data.validation))]
    kept = [data.train[index].columns["n"] for index in range(len(data.train))]
    assert sorted(held + kept) == [*range(40), *range(100, 110)]
    assert len(held) == 10 and sum(n >= 100 for n in held) == 2
    for source in (data.train, data.validation):
        for index in range(len(source)):
            assert source[index].index == index
            assert source.where(index).endswith(f":{source[index].columns['n'] % 100 + 1}")
    again, other = (opened(words(40), words(10, first=100), validation_fraction=0.2, seed=seed) for seed in (0, 1))
    assert [again.validation[index].columns["n"] for index in range(10)] == held
    assert [other.validation[index].columns["n"] for index in range(10)] != held
    assert data.report[0].endswith("0.jsonl: 40 rows of prompts; 8 of them held out")
    with pytest.raises(ValueError, match=r"0\.jsonl: holding out 0\.5 of 1 rows leaves none"):
        opened(words(1), validation_fraction=0.5)


def test_a_validation_set_of_its_own(opened, tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"prompt": "abc"}))
    data = opened(words(3), validation=str(path))
    assert (len(data.train), len(data.validation), text(data.validation[0])) == (3, 1, "abc")
    assert data.report[1] == f"{path}: 1 rows of prompts to validate on"


def test_a_state_of_other_prompts_is_refused(opened):
    def loader(rows, batch_size=2, seed=0, **options):
        return RowLoader(opened(rows, **options).train, batch_size=batch_size, seed=seed)

    state = loader(words(5)).state()
    for same in (loader(words(5)), loader(words(5), on_bad_row="skip")):
        same.restore(state)
    others = [
        loader(words(5), **change) for change in ({"max_prompt_length": 9}, {"validation_fraction": 0.5}, {"seed": 1})
    ]
    others += [loader(words(5), weights=[1.0]), loader([{"prompt": "b", "n": 0}, *words(5)[1:]])]
    for other in others:
        with pytest.raises(ValueError, match="the saved place is in other prompts"):
            other.restore(state)
    changes = ({}, {"template": CHAT + " "}, {"system": "x"}, {"system": ""})
    assert len({opened([{"question": "hi"}], **change).train.fingerprint for change in changes}) == len(changes)
    assert len({opened(words(5), validation_fraction=0.5, seed=seed).train.fingerprint for seed in (0, 1)}) == 2
    with pytest.raises(ValueError, match="in batches of 2 prompts, these have 3"):
        loader(words(5), batch_size=3).restore(state)


def test_the_fingerprint_is_of_the_content_and_the_tokenizer(opened, tmp_path, tokenizer):
    before = opened(words(5)).train.fingerprint
    (tmp_path / "other").mkdir()
    (tmp_path / "call0" / "0.jsonl").rename(tmp_path / "other" / "moved.jsonl")
    config = PromptConfig(train=str(tmp_path / "other" / "moved.jsonl"), max_prompt_length=64)
    assert open_prompts(config, tokenizer, template=CHAT, seed=0).train.fingerprint == before
    write_character_tokenizer([LETTERS + "!"], tmp_path / "tokenizer")
    other = load_tokenizer(tmp_path / "tokenizer")
    assert open_prompts(config, other, template=CHAT, seed=0).train.fingerprint != before


def test_opening_tokenises_nothing_but_the_first_row(tmp_path, tokenizer):
    count = 200_000
    (tmp_path / "many.jsonl").write_text(
        "".join(f'{{"question": "{number}", "answer": "a"}}\n' for number in range(count))
    )
    read = []

    class Watched:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, **options):
            read.append(text)
            return tokenizer.encode(text, **options)

    config = PromptConfig(train=str(tmp_path / "many.jsonl"), max_prompt_length=64, validation_fraction=0.01)
    start = time.monotonic()
    data = open_prompts(config, Watched(), template=CHAT, seed=0)
    loader = RowLoader(data.train, batch_size=4)
    assert len(data.train) == count * 99 // 100 and time.monotonic() - start < 60
    read.clear()
    next(loader)
    assert 0 < len([text for text in read if "user" in text]) <= 4


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"train": ()}, "train names no data set"),
        ({"max_prompt_length": 0}, "max_prompt_length must be positive, not 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction 1\.0 must be at least 0 and below 1"),
        ({"validation": "b", "validation_fraction": 0.1}, "exclude each other"),
        ({"validation": (SourceConfig(path="b", weight=2.0),)}, r"the weight 2\.0 of b is for training"),
        (
            {"train": (SourceConfig(path="b", token_dtype="uint16"),)},
            "token_dtype 'uint16' of b: tokens are no prompts",
        ),
    ],
)
def test_settings_that_cannot_be(changes, error):
    with pytest.raises(ValueError, match=error):
        PromptConfig(**({"train": "a", "max_prompt_length": 4} | changes))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, "0 prompts cannot be shared evenly by 1 processes"),
        ({"batch_size": 3, "process_count": 2}, "3 prompts cannot be shared evenly by 2 processes"),
        ({"batch_size": 2, "process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"batch_size": 2, "num_epochs": 0}, "num_epochs must be at least 1"),
    ],
)
def test_loaders_that_cannot_be(opened, options, error):
    with pytest.raises(ValueError, match=error):
        RowLoader(opened(words(3)).train, **options)


def test_missing_and_empty_data(opened, tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="no such file, folder or data set: nowhere"):
        open_prompts(PromptConfig(train="nowhere", max_prompt_length=4), tokenizer, template=CHAT, seed=0)
    with pytest.raises(ValueError, match=r"0\.jsonl is empty"):
        opened([])


def test_real_questions(assets_dir):
    rows = rows_of(assets_dir, "gsm8k/train.jsonl")
    tokenizer = load_tokenizer(assets_dir / "stories260k" / "hf")
    template = choose_template(tokenizer, "qa")
    source = open_asset(assets_dir, "gsm8k/train.jsonl", tokenizer, template).train
    assert len(source) == len(rows)
    for index in (0, 17, len(rows) - 1):
        prompt = source[index]
        assert prompt.columns == rows[index]
        assert prompt.prompt == ({"role": "user", "content": rows[index]["question"]},)
        assert tokenizer.decode(prompt.ids, skip_special=True) == f"Question: {rows[index]['question']}\nAnswer:"
        assert prompt.ids[0] == tokenizer.bos_id and prompt.ids.count(tokenizer.bos_id) == 1
    source = open_asset(assets_dir, "gsm8k/train.jsonl", tokenizer, template, max_prompt_length=200).train
    loader = RowLoader(source, batch_size=16)
    assert max(len(prompt.ids) for prompt in loader.take(64)) <= 200 and "longer than 200 tokens" in loader.left_out


def test_plain_prompts_begin_as_the_same_rows_in_training(assets_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Once upon a time", "completion": ", there was"}))
    config = PromptConfig(train=str(tmp_path / "rows.jsonl"), max_prompt_length=99)
    for name in ("stories260k/hf", "tokenizers/llama3", "tokenizers/minimind"):
        tokenizer = load_tokenizer(assets_dir / name)
        prompt = open_prompts(config, tokenizer, template=None, seed=0).train[0]
        example = tokenize(normalize({"prompt": "Once upon a time", "completion": ", there was"}), tokenizer)
        assert list(prompt.ids) == example.tokens[~example.mask].tolist()
        assert (prompt.ids[0] == tokenizer.bos_id) == tokenizer.adds_bos


def test_real_preferences_and_tools_with_a_real_template(assets_dir):
    tokenizer = load_tokenizer(assets_dir / "tokenizers" / "minimind")
    template = choose_template(tokenizer)
    rows = rows_of(assets_dir, "llamafactory/dpo_en_demo.json")
    source = open_asset(assets_dir, "llamafactory/dpo_en_demo.json", tokenizer, template).train
    for index in range(0, 300, 29):
        prompt, record = source[index], normalize(rows[index])
        assert prompt.columns == rows[index] and prompt.prompt == record.prompt
        expected = encode_chat(tokenizer, record.prompt, template=template, add_generation_prompt=True)
        assert list(prompt.ids) == expected
    name = "llamafactory/glaive_toolcall_en_demo.json"
    rows, source, seen = rows_of(assets_dir, name), open_asset(assets_dir, name, tokenizer, template).train, 0
    for index in range(0, 300, 29):
        prompt, record = source[index], normalize(rows[index])
        assert prompt.prompt == record.messages[: len(prompt.prompt)] and prompt.prompt[-1]["role"] != "assistant"
        assert prompt.columns["answer"] == rows[index]["conversations"][-1]["value"]
        said = tokenizer.decode(prompt.ids)
        for tool in record.tools or ():
            seen += 1
            assert tool["function"]["name"] in said
    assert seen > 3
    with pytest.raises(
        ValueError, match=r"glaive_toolcall_en_demo\.json:\d+: .*no place for tools|takes plain text only"
    ):
        RowLoader(open_asset(assets_dir, name, tokenizer, choose_template(tokenizer, "qa")).train, batch_size=99).take(
            99
        )
