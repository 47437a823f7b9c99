"""Rows to records: every format, the real data sets, and rows that are none."""

import json

import pytest

from data.records import (
    FORMATS,
    ChatRecord,
    CompletionRecord,
    PreferenceRecord,
    TextRecord,
    UnpairedRecord,
    normalize,
    normalize_preference,
)

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}
OTHER = {"role": "assistant", "content": "Hu"}
SYSTEM = {"role": "system", "content": "Be brief."}
FUNCTION = {"name": "area", "description": "Area.", "parameters": {"type": "object", "properties": {}}}
TOOLS = ({"type": "function", "function": FUNCTION},)


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(speaker, value):
    return {"from": speaker, "value": value}


def rows_of(assets_dir, name):
    text = (assets_dir / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def chat(*messages, **other):
    return ChatRecord(messages=messages, **other)


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"text": " a {{name}}\n", "id": 3}, TextRecord(text=" a {{name}}\n")),
        ({"text": "a", "first": False, "last": True}, TextRecord(text="a", first=False)),
        ({"text": "a", "first": "Ann", "last": "Bee"}, TextRecord(text="a")),
        ({"text": "a", "messages": None}, TextRecord(text="a")),
        ({"messages": [USER, ANSWER]}, chat(USER, ANSWER)),
        ({"messages": [USER, ANSWER], "prompt": "Hi", "prompt_id": "x"}, chat(USER, ANSWER)),
        ({"messages": [USER, ANSWER], "system": "Be brief."}, chat(SYSTEM, USER, ANSWER)),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "Be brief."}, chat(SYSTEM, USER, ANSWER)),
        ({"conversations": [USER, ANSWER], "system": ""}, chat(USER, ANSWER)),
        (
            {"conversations": [said("system", "Be brief."), said("human", "Hi"), said("gpt", "Ho")]},
            chat(SYSTEM, USER, ANSWER),
        ),
        ({"prompt": "Hi", "completion": " there"}, CompletionRecord(prompt="Hi", completion=" there")),
        ({"prompt": "Hi", "completion": " there", "tools": "[]"}, CompletionRecord(prompt="Hi", completion=" there")),
        ({"prompt": [USER, OTHER, USER], "completion": [ANSWER]}, chat(USER, OTHER, USER, ANSWER, learn_from=3)),
        ({"prompt": [USER], "completion": [ANSWER], "system": "Be brief."}, chat(SYSTEM, USER, ANSWER, learn_from=2)),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, chat(USER, ANSWER)),
        ({"instruction": "Hi", "output": "Ho", "system": "Be brief."}, chat(SYSTEM, USER, ANSWER)),
        ({"instruction": "H", "input": "i", "output": "Ho"}, chat({"role": "user", "content": "H\ni"}, ANSWER)),
        ({"instruction": "", "input": "Hi", "output": "Ho"}, chat(USER, ANSWER)),
        (
            {"instruction": "Hi", "input": None, "output": "Ho", "history": [["Hi", "Hu"]], "system": "Be brief."},
            chat(SYSTEM, USER, OTHER, USER, ANSWER),
        ),
        ({"question": "Hi", "answer": "Ho"}, chat(USER, ANSWER)),
    ],
)
def test_learning_formats(row, record):
    assert normalize(row) == record


def pair(prompt, chosen, rejected, **other):
    return PreferenceRecord(prompt=prompt, chosen=chosen, rejected=rejected, **other)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Hi", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Hi", "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "Ho", "rejected": "Hu"},
        {"conversations": [said("human", "Hi")], "chosen": said("gpt", "Ho"), "rejected": said("gpt", "Hu")},
        {"messages": [USER], "chosen": ANSWER, "rejected": OTHER},
        {"instruction": "Hi", "input": "", "chosen": "Ho", "rejected": "Hu"},
        {"question": "Hi", "chosen": "Ho", "rejected": "Hu"},
    ],
)
def test_preferences_of_messages(row):
    assert normalize(row) == pair((USER,), (ANSWER,), (OTHER,))
    assert normalize(row | {"tools": list(TOOLS)}) == pair((USER,), (ANSWER,), (OTHER,), tools=TOOLS)
    assert normalize(row | {"system": "Be brief."}) == pair((SYSTEM, USER), (ANSWER,), (OTHER,))
    assert normalize_preference(row | {"margin": 2, "label": 3}) == pair((USER,), (ANSWER,), (OTHER,), margin=2.0)


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "Hi", "completion": " there"}, "Hi", " there"),
        ({"prompt": [USER], "completion": [ANSWER]}, (USER,), (ANSWER,)),
        ({"prompt": [USER, OTHER], "completion": [ANSWER, USER, OTHER]}, (USER, OTHER), (ANSWER, USER, OTHER)),
        ({"messages": [SYSTEM, USER, OTHER, USER, ANSWER]}, (SYSTEM, USER, OTHER, USER), (ANSWER,)),
        ({"conversations": [said("human", "Hi"), said("gpt", "Ho")], "system": "Be brief."}, (SYSTEM, USER), (ANSWER,)),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, (USER,), (ANSWER,)),
        ({"question": "Hi", "answer": "Ho"}, (USER,), (ANSWER,)),
    ],
)
@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_unpaired_preferences(row, prompt, completion, desirable, key):
    record = UnpairedRecord(prompt=prompt, completion=completion, desirable=desirable)
    assert normalize_preference(row | {key: desirable, "margin": 1}) == record


def test_tools_of_unpaired_preferences():
    row = {"messages": [USER, ANSWER], "tools": list(TOOLS), "label": True}
    assert normalize_preference(row).tools == TOOLS


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [USER, ANSWER]}, "a preference has chosen and rejected, or one of label and kto_tag"),
        ({"messages": [USER, ANSWER], "label": True, "kto_tag": True}, "or one of label and kto_tag"),
        ({"messages": [USER, ANSWER], "label": 1}, "label must be true or false, got 1"),
        ({"messages": [USER, ANSWER, USER], "label": True}, "does not end with an answer of the assistant"),
        ({"messages": [ANSWER], "label": True}, "the assistant speaks first"),
        ({"text": "a", "label": True}, "a text has no prompt"),
        ({"prompt": "a", "label": True}, "fits no format"),
        ({"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}, "formats completion, preference"),
        ({"prompt": "a", "chosen": "c", "rejected": "d", "margin": True}, "margin must be a number, got True"),
        ({"prompt": "a", "chosen": "c", "rejected": "d", "margin": float("nan")}, "margin must be a number, got nan"),
        ({"prompt": "a", "chosen": "c", "rejected": "d", "margin": 10**400}, "margin 1000.* is too large"),
        ({"prompt": "a", "chosen": "c"}, "rejected is missing"),
        ({"prompt": "a", "rejected": "c", "label": True}, "chosen is missing"),
    ],
)
def test_rows_that_prefer_nothing(row, why):
    with pytest.raises(ValueError, match=why) as caught:
        normalize_preference(row)
    assert "\n" not in str(caught.value) and all(repr(key) in str(caught.value) for key in row)


def test_an_implicit_prompt_is_all_that_is_common():
    row = {"chosen": [SYSTEM, USER, ANSWER, USER, ANSWER], "rejected": [SYSTEM, USER, ANSWER, USER, OTHER, USER]}
    assert normalize(row) == pair((SYSTEM, USER, ANSWER, USER), (ANSWER,), (OTHER, USER))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is", "The sky"),
        ("\n\nHuman: Hi\n\nAssistant: Ho!", "\n\nHuman: Hi\n\nAssistant: Hu!", "\n\nHuman: Hi\n\nAssistant:"),
        ("The cat sat", "The cats", "The"),
        ("The cat sat", "The cat\nsat", "The cat"),
        ("yes", "no", ""),
    ],
)
def test_preferences_of_texts(chosen, rejected, prompt):
    found = normalize({"chosen": chosen, "rejected": rejected})
    assert found == pair(prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))
    assert normalize({"prompt": "Q", "chosen": chosen, "rejected": rejected}) == pair("Q", chosen, rejected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "assistant", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "o"}]}, ANSWER),
        ({"role": "assistant", "content": "Ho", "tool_calls": None, "name": None, "id": 7, "weight": 1}, ANSWER),
        ({"role": "assistant", "content": "Ho", "tool_calls": []}, ANSWER),
        ({"role": "gpt", "content": "Ho"}, ANSWER),
        ({"role": "assistant", "content": "Ho", "thinking": "h"}, ANSWER | {"reasoning_content": "h"}),
        ({"role": "assistant", "content": "Ho", "reasoning_content": "h"}, ANSWER | {"reasoning_content": "h"}),
        (
            {"role": "assistant", "content": None, "reasoning": "h"},
            {"role": "assistant", "content": "", "reasoning_content": "h"},
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": [1]}'}}]},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1"} | call("f", a=[1])]},
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}, call("g", x=None)]},
            {"role": "assistant", "content": "", "tool_calls": [call("f"), call("g", x=None)]},
        ),
        (
            said("function_call", '{"name": "f", "arguments": {"a": 1}}'),
            {"role": "assistant", "content": "", "tool_calls": [call("f", a=1)]},
        ),
        (
            said("function_call", '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": ""}]'),
            {"role": "assistant", "content": "", "tool_calls": [call("f", a=1), call("g")]},
        ),
        (said("observation", "[1]"), {"role": "tool", "content": "[1]"}),
        (said("tool", "1"), {"role": "tool", "content": "1"}),
        (
            {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"},
            {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"},
        ),
        (said("user", "Hi"), USER),
        (said("assistant", "Ho"), ANSWER),
    ],
)
def test_messages(given, expected):
    assert normalize({"messages": [given]}).messages == (expected,)


@pytest.mark.parametrize("tools", [[FUNCTION], list(TOOLS), [{"type": "function"} | FUNCTION], [json.dumps(FUNCTION)]])
def test_tools_have_one_form(tools):
    for given in (tools, json.dumps(tools)):
        assert normalize({"messages": [USER, ANSWER], "tools": given}).tools == TOOLS


@pytest.mark.parametrize("tools", [None, "", "[]", "null", []])
def test_no_tools_are_none(tools):
    assert normalize({"messages": [USER, ANSWER], "tools": tools}).tools is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "fits no format"),
        ({"prompt": "Hi"}, "fits no format"),
        ({"text": None}, "fits no format"),
        ({"text": 3}, "text must be a string, got int"),
        ({"text": "a", "messages": [USER]}, "fits the formats text, messages"),
        ({"instruction": "a", "output": "b", "text": "c"}, "fits the formats text, alpaca"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired preferences"),
        ({"prompt": "a", "completion": [ANSWER]}, "both be text or both be messages"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "system needs a conversation"),
        ({"prompt": "a", "completion": "b", "tools": [FUNCTION]}, "tools need a conversation"),
        ({"prompt": [USER], "completion": [USER]}, "completion has no assistant message"),
        ({"chosen": "a", "rejected": "a"}, "are equal"),
        ({"chosen": "a", "rejected": [ANSWER]}, "both be text or both be messages"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected must go on .* but is empty"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, OTHER]}, "no first message in common"),
        ({"prompt": "x", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "prompt is none of the messages"),
        ({"prompt": [USER], "chosen": [SYSTEM, ANSWER], "rejected": [OTHER]}, "chosen must go on .* system message"),
        ({"prompt": "a", "question": "b", "chosen": "c", "rejected": "d"}, "prompt in each of prompt, question"),
        ({"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}, "formats completion, preference"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": {"role": ["user"], "content": ["a"]}}, "messages must be a non-empty list"),
        ({"messages": ["Hi"]}, r"messages\[0\] must be a message, got 'Hi'"),
        ({"messages": [{"role": "critic", "content": "a"}]}, r"messages\[0\] has role 'critic', expected one of"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] has role nothing"),
        ({"messages": [USER, {"role": "user"}]}, r"messages\[1\].content must be a string, got nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\] must be a text part"),
        ({"messages": [ANSWER | {"weight": 0}]}, "weight 0"),
        ({"messages": [ANSWER | {"train": False}]}, "train False"),
        ({"messages": [USER | {"tool_calls": [call("f")]}]}, "only an assistant"),
        ({"messages": [ANSWER | {"tool_calls": [{"arguments": {}}]}]}, "must be a call with a name"),
        ({"messages": [ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "no valid JSON"),
        ({"messages": [ANSWER | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "arguments must be an object"),
        ({"conversations": [said("function_call", "f(x)")]}, "no valid JSON"),
        ({"conversations": [said("function_call", "[]")]}, "must be a JSON object with name and arguments"),
        ({"conversations": [said("human", 3)]}, r"conversations\[0\].value must be a string, got 3"),
        ({"messages": [SYSTEM, USER], "system": "other"}, "beside another system message"),
        ({"messages": [USER], "system": 3}, "system must be a string"),
        ({"messages": [USER, ANSWER], "tools": "{}"}, "tools must be a list"),
        ({"messages": [USER, ANSWER], "tools": "[{"}, "tools is no valid JSON"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "object"}]}, r"tools\[0\] must be the JSON schema"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "images are not supported"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"history\[0\] must be a pair"),
        ({"instruction": "a", "output": "b", "history": "c"}, "history must be a list"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "input must be a string, got list"),
        ({"question": "a", "context": "b", "answer": "c"}, "context"),
    ],
)
def test_rows_that_are_no_record(row, why):
    with pytest.raises(ValueError, match=why) as caught:
        normalize(row)
    assert "\n" not in str(caught.value)
    for key in row:
        assert repr(key) in str(caught.value)


def test_a_row_must_be_an_object_and_a_list_of_keys_has_an_end():
    with pytest.raises(ValueError, match="must be an object, got list"):
        normalize(["text"])
    with pytest.raises(ValueError, match=r"'k11', \.\.\.\]"):
        normalize({f"k{number}": 0 for number in range(100)})


def test_the_format_can_be_named():
    row = {"instruction": "Hi", "input": "", "output": "Ho", "text": "rendered"}
    assert normalize(row, format="alpaca") == chat(USER, ANSWER)
    assert normalize(row, format="text") == TextRecord(text="rendered")
    with pytest.raises(ValueError, match="format messages needs messages"):
        normalize(row, format="messages")
    with pytest.raises(ValueError, match="unknown format 'sharegpt', expected one of"):
        normalize(row, format="sharegpt")
    assert "preference" in FORMATS


@pytest.mark.parametrize(("name", "count"), [("alpaca_en_demo", 999), ("identity", 91)])
def test_real_alpaca_rows(assets_dir, name, count):
    rows = rows_of(assets_dir, f"llamafactory/{name}.json")
    assert len(rows) == count
    for row in rows:
        record = normalize(row)
        question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        answer = {"role": "assistant", "content": row["output"]}
        assert record == chat({"role": "user", "content": question}, answer)
    if name == "identity":
        assert sum("{{name}}" in normalize(row).messages[-1]["content"] for row in rows) > 10


def test_real_preferences(assets_dir):
    rows = rows_of(assets_dir, "llamafactory/dpo_en_demo.json")
    records = [normalize(row) for row in rows]
    assert len(records) == 300
    assert sum(record.prompt[0]["role"] == "system" for record in records) == 80
    assert sum(len(record.prompt) > 2 for record in records) == 106
    for row, record in zip(rows, records):
        assert isinstance(record, PreferenceRecord)
        assert [message["content"] for message in record.prompt] == [turn["value"] for turn in row["conversations"]]
        assert record.prompt[-1]["role"] == "user"
        assert record.chosen == ({"role": "assistant", "content": row["chosen"]["value"]},)
        assert record.rejected == ({"role": "assistant", "content": row["rejected"]["value"]},)


def test_real_tool_calls(assets_dir):
    rows = rows_of(assets_dir, "llamafactory/glaive_toolcall_en_demo.json")
    records = [normalize(row) for row in rows]
    assert len(records) == 300
    assert sum(record.tools is None for record in records) == 109
    calls = [message["tool_calls"] for record in records for message in record.messages if "tool_calls" in message]
    assert len(calls) == sum(message["role"] == "tool" for record in records for message in record.messages) == 211
    for row, record in zip(rows, records):
        assert [tool["function"] for tool in record.tools or ()] == json.loads(row["tools"])
        for turn, message in zip(row["conversations"], record.messages, strict=True):
            if turn["from"] == "function_call":
                assert [call["function"] for call in message["tool_calls"]] == [json.loads(turn["value"])]
            else:
                assert message["content"] == turn["value"]


def test_real_questions(assets_dir):
    rows = rows_of(assets_dir, "gsm8k/train.jsonl")
    assert len(rows) == 7473
    for row in rows:
        texts = [message["content"] for message in normalize(row).messages]
        assert texts == [row["question"], row["answer"]]
