"""Preferences: what rows prefer, as the tokens that TRL makes of them, cut, counted and resumed exactly."""

import itertools
import json
import re

import jax
import numpy as np
import pytest

from data.characters import write_character_tokenizer
from data.chat import choose_template, encode_chat, encode_chat_with_mask
from data.datasets import SourceConfig
from data.examples import tokenize
from data.preferences import PreferenceConfig, open_preferences
from data.records import BadRow, normalize, normalize_preference
from data.row_loading import RowLoader
from models.llama import load_tokenizer

# A turn ends with "." and a newline that nobody writes. THINKING opens an empty room for reasoning where it asks.
CHAT = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}."
    "{% endgeneration %}{% else %}{{ m.content }}.{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}t\n\n{{ m.content }}."
    "{% endgeneration %}{% else %}{{ m.content }}.{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: t\n\n{% endif %}"
)
LETTERS = "\n .:abcdefghijklmnopqrstuvwxyz"
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}
OTHER = {"role": "assistant", "content": "hu"}
SYSTEM = {"role": "system", "content": "be brief"}
PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}
LONE = {"prompt": [USER], "completion": [ANSWER], "label": True}
ASKED = "user: hi.\nassistant: "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_character_tokenizer([LETTERS], folder)
    characters = load_tokenizer(folder)

    class Ending:
        """With a token that ends texts, which characters alone do not have."""

        eos_id = len(LETTERS)

        def __getattr__(self, name):
            return getattr(characters, name)

        def decode(self, ids):
            return characters.decode([token for token in ids if token != self.eos_id])

    return Ending()


@pytest.fixture
def opened(tmp_path, tokenizer):
    """open_preferences of rows written to a file each, in a folder of each call's own, with a character tokenizer."""
    calls = itertools.count()

    def call(*files, paired=True, whole=False, seed=0, template=CHAT, weights=None, **options):
        folder, paths = tmp_path / f"call{next(calls)}", []
        folder.mkdir()
        for number, rows in enumerate(files):
            paths.append(folder / f"{number}.jsonl")
            paths[-1].write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        shares = weights or [None] * len(files)
        sources = tuple(SourceConfig(path=str(path), weight=share) for path, share in zip(paths, shares))
        lengths = {"max_prompt_length": 64, "max_completion_length": 64}
        config = PreferenceConfig(**{"train": sources} | lengths | options)
        return open_preferences(config, tokenizer, template=template, seed=seed, paired=paired, whole=whole)

    return call


def text(ids):
    return "".join(LETTERS[token] if token < len(LETTERS) else "|" for token in ids)  # "|" is the token that ends texts


def told(item):
    """What a preference asks, and its completions with what is learnt of them in capitals."""
    shown = []
    for ids, mask in zip(item.completions, item.masks, strict=True):
        assert len(ids) == len(mask) and all(isinstance(learnt, bool) for learnt in mask)
        shown.append("".join(one.upper() if learnt else one for one, learnt in zip(text(ids), mask)))
    return text(item.prompt_ids), shown


def pairs(count, first=0):
    """Rows told by their margin, with prompts and completions of many lengths."""
    return [
        {"prompt": "p" * (1 + n % 9), "chosen": "a" * (1 + n % 5), "rejected": "b" * (1 + n % 7), "margin": first + n}
        for n in range(count)
    ]


def margins(items):
    return [item.margin for item in items]


def collate(items):
    """Rows of a global batch padded to its longest completion; one that is short is filled up to a multiple of 2."""
    rows = len(items) + len(items) % 2
    longest = max(len(ids) for item in items for ids in item.completions)
    ids = np.full((rows, len(items[0].completions), longest), -1)
    for row, item in enumerate(items):
        for column, completion in enumerate(item.completions):
            ids[row, column, : len(completion)] = completion
    weights = np.arange(rows) < len(items)
    return {"ids": ids, "weights": weights, "margins": np.resize(margins(items), rows), "nothing": None}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": "ho", "rejected": "hu"},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": ANSWER, "rejected": OTHER},
        {"instruction": "hi", "input": "", "chosen": "ho", "rejected": "hu"},
        {"question": "hi", "chosen": "ho", "rejected": "hu"},
    ],
)
def test_pairs_of_messages(opened, row):
    item = opened([row]).train[0]
    assert told(item) == (ASKED, ["HO.", "HU."])
    assert (item.margin, item.desirable, item.index, item.cut) == (None, None, 0, (0, 0, 0))
    assert told(opened([row], whole=True).train[0]) == (ASKED, ["HO.\n", "HU.\n"])


def test_pairs_of_texts(opened):
    rows = [
        {"prompt": "a b", "chosen": " c", "rejected": " de"},
        {"chosen": "the sky is blue", "rejected": "the sky is black"},
        {"prompt": "a", "chosen": "b", "rejected": "", "margin": -1.5},
    ]
    source = opened(rows).train
    assert told(source[0]) == ("a b", [" C|", " DE|"])
    assert told(source[1]) == ("the sky is", [" BLUE|", " BLACK|"])
    assert told(source[2]) == ("a", ["B|", "|"]) and source[2].margin == -1.5
    assert told(opened(rows, whole=True).train[0]) == told(source[0])


def test_only_what_the_assistant_says_is_learnt_of_several_turns(opened):
    rows = [
        {"chosen": [SYSTEM, USER, ANSWER, USER, ANSWER], "rejected": [SYSTEM, USER, ANSWER, USER, OTHER, USER, ANSWER]},
        {"prompt": [USER, ANSWER], "chosen": [OTHER], "rejected": [ANSWER]},
    ]
    source = opened(rows).train
    before = "system: be brief.\nuser: hi.\nassistant: ho.\nuser: hi.\nassistant: "
    assert told(source[0]) == (before, ["HO.", "HU.\nuser: hi.\nassistant: HO."])
    assert told(source[1]) == ("user: hi.\nassistant: ho.\nassistant: ", ["HU.", "HO."])


def test_what_the_template_writes_where_the_assistant_is_asked_is_no_answer(opened):
    assert told(opened([PAIR], template=THINKING).train[0]) == (ASKED + "t\n\n", ["HO.", "HU."])
    lone = opened([LONE], template=THINKING, paired=False).train[0]
    assert told(lone) == (ASKED + "t\n\n", ["HO."])


def test_where_the_prompts_of_two_answers_differ_the_rest_goes_to_the_completions(opened):
    template = "{{ messages[-1].content[0] }} " + CHAT  # says in front what comes last
    row = {"prompt": [USER], "chosen": [{"role": "assistant", "content": "do"}], "rejected": [ANSWER]}
    prompt, completions = told(opened([row], template="x" + template).train[0])
    assert (prompt, completions) == ("x", ["d user: hi.\nassistant: DO.", "h user: hi.\nassistant: HO."])
    with pytest.raises(BadRow, match=r"0\.jsonl:1: the prompt has no tokens"):
        opened([row], template=template)
    with pytest.raises(BadRow, match=r"0\.jsonl:1: chosen has nothing to learn among its first 5 tokens"):
        opened([row], template="x" + template, max_completion_length=5)


def test_a_system_message_for_conversations_without_one(opened):
    source = opened([PAIR, {**PAIR, "system": "x"}], system="be brief").train
    assert told(source[0])[0] == "system: be brief.\n" + ASKED and told(source[1])[0] == "system: x.\n" + ASKED
    with pytest.raises(BadRow, match="system needs a conversation"):
        opened(pairs(1), system="be brief")


@pytest.mark.parametrize(
    "row",
    [
        LONE,
        {"messages": [USER, ANSWER], "kto_tag": True},
        {"conversations": [USER, ANSWER], "label": True},
        {"instruction": "hi", "output": "ho", "kto_tag": True},
    ],
)
def test_unpaired_rows(opened, row):
    key = "label" if "label" in row else "kto_tag"
    source = opened([row, row | {key: False}], paired=False).train
    assert [told(source[index]) for index in range(2)] == [(ASKED, ["HO."])] * 2
    assert [source[index].desirable for index in range(2)] == [True, False]
    assert source[0].margin is None and source[0].cut == (0, 0) and source.unit == "examples"
    with pytest.raises(BadRow, match=r"0\.jsonl:1: an answer with a label .*chosen and rejected are needed"):
        opened([row])


def test_pairs_become_two_examples_each_where_unpaired_data_are_asked_for(opened):
    data = opened(pairs(10), [{"prompt": "x", "completion": "y", "label": False}], paired=False, validation_fraction=0)
    items = [data.train[index] for index in range(len(data.train))]
    assert data.train.sizes == (20, 1) and [item.index for item in items] == list(range(21))
    assert [told(item) for item in items[4:6]] == [("ppp", ["AAA|"]), ("ppp", ["BBB|"])]
    assert [item.desirable for item in items] == [True, False] * 10 + [False]
    assert {item.margin for item in items} == {None}
    assert data.train.where(5).endswith("0.jsonl:3") and data.train.where(20).endswith("1.jsonl:1")
    assert data.report[0].endswith("0.jsonl: 10 rows of pairs, two examples each")
    assert data.report[1].endswith("1.jsonl: 1 rows of examples")


def test_both_examples_of_a_pair_are_held_out_together(opened):
    data = opened(pairs(10), paired=False, validation_fraction=0.3)
    assert (len(data.train), len(data.validation)) == (14, 6)
    assert data.report[0].endswith("10 rows of pairs, two examples each; 3 of them held out")
    for source in (data.train, data.validation):
        for index in range(0, len(source), 2):
            assert source.where(index) == source.where(index + 1)
    assert not {data.train.where(i) for i in range(14)} & {data.validation.where(i) for i in range(6)}


def test_a_data_set_has_one_kind(opened):
    for rows, why in (
        ([PAIR, LONE], r"0\.jsonl:2: an unpaired preference in a data set that begins with chosen and rejected"),
        ([LONE, PAIR], r"0\.jsonl:2: chosen and rejected in a data set that begins with an unpaired preference"),
    ):
        source = opened(rows, paired=False).train
        with pytest.raises(BadRow, match=why):
            source[len(source) - 1]
    source = opened(["{", {"text": "x"}, LONE], paired=False, on_bad_row="skip").train
    assert len(source) == 3 and source[2].desirable  # the first row that can be read tells
    with pytest.raises(ValueError, match=r"not one of 2 rows can be used, the last: .*0\.jsonl:2: "):
        opened(["{", {"text": "x"}], paired=False, on_bad_row="skip")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "JSON"),
        ({"text": "x"}, "chosen and rejected, or one of label and kto_tag"),
        ({"messages": [USER, ANSWER]}, "chosen and rejected, or one of label and kto_tag"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal"),
        ({**PAIR, "rejected": [ANSWER]}, "chosen and rejected are equal"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "is empty"),
        ({"chosen": [SYSTEM, USER, ANSWER], "rejected": [USER, OTHER]}, "no first message in common"),
        ({**PAIR, "margin": "much"}, "margin must be a number, got 'much'"),
        ({"chosen": "yes", "rejected": "no"}, "the prompt has no tokens"),
        ({**PAIR, "tools": [{"name": "area", "parameters": {}}]}, "leaves out tools, here of 'area'"),
    ],
)
def test_bad_rows(opened, row, why):
    with pytest.raises(BadRow, match=rf"call0/0\.jsonl:1: .*{why}") as caught:
        opened([row])
    assert "\n" not in str(caught.value)
    rows = [*pairs(3), row, *pairs(3, first=3)]
    loader = RowLoader(opened(rows).train, batch_size=3, shuffle=False)
    next(loader)
    before = loader.state()
    with pytest.raises(BadRow, match=rf"0\.jsonl:4: .*{why}"):
        next(loader)
    loader = RowLoader(opened(rows, on_bad_row="skip").train, batch_size=3, shuffle=False)
    loader.restore(before)
    assert margins(next(loader)) == [3, 4, 5]
    assert re.match(rf"1 bad pairs skipped, the first .*0\.jsonl:4: .*{why}", loader.left_out)
    assert loader.summary == (loader.left_out,)


def test_a_prompt_keeps_its_end_and_a_completion_its_beginning(opened):
    rows = [
        {"prompt": "abcdefgh", "chosen": "ijklmn", "rejected": "op"},
        {"prompt": "abc", "chosen": "ijklmnop", "rejected": "qrstuv"},
        {"prompt": "abcd", "chosen": "ijk", "rejected": "lmn"},
    ]
    source = opened(rows, max_prompt_length=4, max_completion_length=5).train
    items = [source[index] for index in range(3)]
    assert [told(item) for item in items] == [
        ("efgh", ["IJKLM", "OP|"]),
        ("abc", ["IJKLM", "QRSTU"]),
        ("abcd", ["IJK|", "LMN|"]),
    ]
    assert [item.cut for item in items] == [(4, 2, 0), (0, 4, 2), (0, 0, 0)]
    loader = RowLoader(source, batch_size=3, num_epochs=2)
    line = "pairs: 1 of 3 prompts cut by 4 tokens to their last 4, 3 of 6 completions cut by 8 tokens to their first 5"
    assert loader.summary == ()
    for _ in loader:
        assert loader.summary == (line,)  # of the first epoch
    assert loader.left_out == ""
    source = opened(rows[:2], paired=False, max_prompt_length=7).train
    loader = RowLoader(source, batch_size=4)
    next(loader)
    assert loader.summary == ("examples: 2 of 4 prompts cut by 2 tokens to their last 7",)


@pytest.mark.parametrize("options", [{}, {"weights": (3, 1)}, {"paired": False}])
def test_a_state_goes_on_exactly_with_its_counts_in_any_number_of_processes(opened, options):
    files = (pairs(13), pairs(5, first=100))
    source = opened(*files, max_prompt_length=5, max_completion_length=4, **options).train
    loader, lines = RowLoader(source, batch_size=4), []
    batches = []
    for _ in range(24):
        batches.append(next(loader))
        lines.append(loader.summary)
    assert lines[0] != lines[3] and lines[14:] == [lines[-1]] * 10
    for before in (1, 2, 4, 11):
        halves = [RowLoader(source, batch_size=4, process_index=i, process_count=2) for i in range(2)]
        for number in range(before):
            one, two = map(next, halves)
            assert [*one, *two] == batches[number]
        state = json.loads(json.dumps(halves[0].state()))
        assert halves[1].state() == state
        later = RowLoader(source, batch_size=4)
        later.restore(state)
        for number in range(before, 24):
            assert later.summary == lines[number - 1]
            assert next(later) == batches[number]
        later.seek(4 * before)
        assert later.summary == lines[before - 1] and next(later) == batches[before]


def test_a_state_of_other_preferences_is_refused(opened):
    def loader(rows=None, **options):
        return RowLoader(opened(rows or pairs(5), **options).train, batch_size=2)

    state = loader().state()
    loader(on_bad_row="skip").restore(state)
    for change in (
        {"max_completion_length": 9},
        {"max_prompt_length": 9},
        {"whole": True},
        {"template": CHAT + " "},
        {"rows": pairs(4)},
    ):
        with pytest.raises(ValueError, match="the saved place is in other pairs"):
            loader(**change).restore(state)
    with pytest.raises(ValueError, match="the saved place is in other examples"):
        loader(paired=False).restore(state)


def test_collated_batches_of_two_processes_are_the_rows_of_one(opened):
    source = opened(pairs(23)).train
    options = dict(batch_size=4, num_epochs=1, collate=collate)
    whole = list(RowLoader(source, **options))
    assert [len(batch["ids"]) for batch in whole] == [4] * 6 and sum(batch["weights"].sum() for batch in whole) == 23
    assert len({batch["ids"].shape for batch in whole}) > 1
    halves = [list(RowLoader(source, **options, process_index=i, process_count=2)) for i in range(2)]
    for one, two, both in zip(*halves, whole, strict=True):
        joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), one, two)
        jax.tree.map(np.testing.assert_array_equal, joined, both)
        assert len(one["ids"]) == 2
    loader = RowLoader(source, batch_size=4, collate=collate, process_index=1, process_count=2)
    assert loader.take(2)["margins"].tolist() == whole[0]["margins"][1:2].tolist()
    lists = RowLoader(source, batch_size=4)
    assert margins(next(lists)) == whole[0]["margins"].tolist()


def test_a_collated_batch_that_processes_cannot_share_is_refused(opened):
    source = opened(pairs(3)).train
    loader = RowLoader(source, batch_size=4, num_epochs=1, process_count=2, collate=lambda items: np.ones(len(items)))
    before = loader.state()
    with pytest.raises(ValueError, match="3 pairs cannot be shared evenly by 2 processes"):
        next(loader)
    assert loader.state() == before


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_completion_length": 0}, "max_completion_length must be positive, not 0"),
        ({"max_prompt_length": 0}, "max_prompt_length must be positive, not 0"),
        ({"train": ()}, "train names no data set"),
        ({"validation": "b", "validation_fraction": 0.1}, "exclude each other"),
    ],
)
def test_settings_that_cannot_be(changes, error):
    with pytest.raises(ValueError, match=error):
        PreferenceConfig(**({"train": "a", "max_prompt_length": 4, "max_completion_length": 4} | changes))


def english(assets_dir, name, *, paired=True, whole=False, template=None, length=100_000):
    path = str(assets_dir / "data" / "llamafactory" / "dpo_en_demo.json")
    tokenizer = load_tokenizer(assets_dir / name)
    config = PreferenceConfig(train=path, max_prompt_length=length, max_completion_length=length)
    template = choose_template(tokenizer, template)
    source = open_preferences(config, tokenizer, template=template, seed=0, paired=paired, whole=whole).train
    return source, tokenizer, template, json.loads((assets_dir / "data/llamafactory/dpo_en_demo.json").read_text())


def test_real_pairs_are_as_trl_and_transformers_read_them(assets_dir):
    trl = pytest.importorskip("trl.data_utils")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(assets_dir / "tokenizers" / "minimind")
    source, _, _, rows = english(assets_dir, "tokenizers/minimind", whole=True)
    trimmed, *_ = english(assets_dir, "tokenizers/minimind")
    newline = tuple(theirs("\n")["input_ids"])
    for index in range(0, 300, 23):
        record, item = normalize_preference(rows[index]), source[index]
        both = {"chosen": [*record.prompt, *record.chosen], "rejected": [*record.prompt, *record.rejected]}
        found = trl.maybe_extract_prompt(both)
        assert normalize(both) == record and found["prompt"] == list(record.prompt)
        found = trl.apply_chat_template(found, theirs)
        assert item.prompt_ids == tuple(theirs(found["prompt"])["input_ids"])
        for key, ids, mask, short in zip(("chosen", "rejected"), item.completions, item.masks, trimmed[index].masks):
            assert item.prompt_ids + ids == tuple(theirs(found["prompt"] + found[key])["input_ids"])
            assert ids[-1:] == newline and mask == (True,) * (len(ids) - 1) + (False,) and short == mask[:-1]
        assert trimmed[index].completions == tuple(ids[:-1] for ids in item.completions)


@pytest.mark.parametrize("name", ["stories260k/hf", "tokenizers/llama3", "tokenizers/minimind"])
def test_the_real_pairs_run_through(assets_dir, name):
    source, tokenizer, template, rows = english(assets_dir, name, whole=True)
    for index in range(0, 300, 37):
        item, record = source[index], normalize(rows[index])
        asked = encode_chat(tokenizer, record.prompt, template=template, add_generation_prompt=True)
        assert list(item.prompt_ids) == asked
        for answer, ids in zip((record.chosen, record.rejected), item.completions):
            whole = encode_chat_with_mask(tokenizer, (*record.prompt, *answer), template=template)
            assert [*item.prompt_ids, *ids] == whole.ids
    source, *_ = english(assets_dir, name, length=100)
    loader = RowLoader(source, batch_size=50, num_epochs=1)
    items = [item for batch in loader for item in batch]
    assert len(items) == 300 and max(len(item.prompt_ids) for item in items) == 100
    assert max(len(ids) for item in items for ids in item.completions) == 100
    cut = [sum(tokens) for tokens in zip(*(item.cut for item in items))]
    assert re.fullmatch(
        rf"pairs: \d+ of 300 prompts cut by {cut[0]:,} tokens to their last 100, "
        rf"\d+ of 600 completions cut by {cut[1] + cut[2]:,} tokens to their first 100",
        loader.summary[0],
    )
    unpaired, *_ = english(assets_dir, name, length=100, paired=False)
    for index in (0, 171, 299):
        halves = [unpaired[2 * index], unpaired[2 * index + 1]]
        assert tuple(half.completions[0] for half in halves) == source[index].completions
        assert [half.prompt_ids for half in halves] == [source[index].prompt_ids] * 2


def test_texts_are_tokens_as_in_supervised_training(assets_dir, tmp_path):
    row = {"prompt": "Once upon a time", "chosen": ", there was", "rejected": " there were two"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    config = PreferenceConfig(train=str(tmp_path / "rows.jsonl"), max_prompt_length=99, max_completion_length=99)
    for name in ("stories260k/hf", "tokenizers/llama3"):
        tokenizer = load_tokenizer(assets_dir / name)
        item = open_preferences(config, tokenizer, template=None, seed=0, paired=True).train[0]
        for key, ids, mask in zip(("chosen", "rejected"), item.completions, item.masks):
            example = tokenize(normalize({"prompt": row["prompt"], "completion": row[key]}), tokenizer)
            assert [*item.prompt_ids, *ids] == example.tokens.tolist() and all(mask)
            assert len(item.prompt_ids) == (~example.mask).sum() and ids[-1] == tokenizer.eos_id
