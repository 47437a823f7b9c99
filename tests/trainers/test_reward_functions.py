"""The reward functions that come with the library, beside TRL's where it has the same."""

import json

import numpy as np
import pytest

from trainers.reward_functions import (
    FUNCTIONS,
    CosineLength,
    ExactMatch,
    Gsm8kAnswer,
    JsonSchema,
    Overlong,
    Regex,
    ThinkFormat,
    text_of,
)

HOSTILE = (
    *("", "\x00", "9" * 5000, "1/0", "\u0661\u0668", "{" * 100_000, "[" * 100_000, "\\boxed{" * 1000, "\ud800"),
    *(
        "#### " + "9" * 5000,
        "<think>" * 1000,
        "```json\n" * 10_000,
        '{"a": 1e999}',
        "-" * 10_000,
        "NaN",
        "1" + " " * 9999,
    ),
)


def chat(text):
    return [{"role": "assistant", "content": text}]


def ids(*lengths):
    return [[1] * length for length in lengths]


def test_the_text_of_prompts_and_completions():
    assert text_of("a") == "a"
    assert text_of([{"role": "user", "content": "a"}, *chat("b")]) == "b"
    assert text_of(chat([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}])) == "ab"
    assert text_of(chat(None)) == text_of([]) == ""


def test_exact_match():
    given = ["4", " 4\n", "5", chat("4"), "4"]
    assert ExactMatch()(completions=given, answer=["4", "4", "4", 4, None]) == [1, 1, 0, 1, None]
    assert ExactMatch(strip=False)(completions=given[:2], answer=["4", "4"]) == [1, 0]
    assert ExactMatch(column="x")(completions=["Yes"], x=["yes"]) == [0]
    assert ExactMatch(column="x", ignore_case=True)(completions=["YES"], x=["yes"]) == [1]


def test_exact_match_behind_a_marker():
    reward = ExactMatch(after="</think>")
    given = ["<think>5</think> 4", "4", "</think>5</think>4", "<think>4</think>5"]
    assert reward(completions=given, answer=["4"] * 4) == [1, 0, 1, 0]


def test_references_of_gsm8k_answer_themselves(assets_dir):
    path = assets_dir / "data" / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 7473
    reward = Gsm8kAnswer()
    assert reward(completions=answers, answer=answers) == [1.0] * 7473
    numbers = [answer.partition("####")[2].strip() for answer in answers]
    assert reward(completions=[f"So it is ${n}.00 in all." for n in numbers], answer=answers) == [1.0] * 7473
    assert reward(completions=[f"\\boxed{{{n}}}" for n in numbers], answer=numbers) == [1.0] * 7473
    values = [int(n.replace(",", "")) for n in numbers]
    assert reward(completions=[f"#### {v + 1:,}" for v in values], answer=answers) == [0.0] * 7473
    assert reward(completions=[f"#### {-v:,}" for v in values], answer=values) == [float(v == 0) for v in values]


def test_gsm8k_references_and_markers():
    reward = Gsm8kAnswer(column="x", after="</think>")
    given = ["<think>4</think>5", "4", chat("</think> 4 eggs"), "</think>4", "</think>4", "</think>4"]
    assert reward(completions=given, x=["4", "4", "4", 4.0, "none", None]) == [0, 0, 1, 1, None, None]


def test_think_format():
    given = {
        "<think>a</think>b": 1,
        "<think>\na\n</think>\n\nb": 1,
        "<think></think>b": 1,
        "<think>a</think> \n": 0,
        "<think>a": 0,
        "a</think>b": 0,
        "x<think>a</think>b": 0,
        "</think>a<think>b": 0,
        "<think>a<think>b</think>c": 0,
        "<think>a</think>b</think>c": 0,
        "<think>a</think><think>b</think>c": 0,
        "": 0,
    }
    assert ThinkFormat()(completions=list(given)) == list(given.values())
    assert ThinkFormat()(completions=[chat(text) for text in given]) == list(given.values())
    opened = ["a</think>b", "<think>a</think>b", "a</think>", "a"]
    assert ThinkFormat(opened=True)(completions=opened) == [1, 0, 0, 0]


def test_think_format_is_that_of_trl_with_once_and_an_answer():
    trl = pytest.importorskip("trl.rewards")
    parts = ("<think>", "</think>", "a", "\n")
    texts = [a + b + c + d for a in parts for b in parts for c in parts for d in parts]
    ours = ThinkFormat()(completions=texts)
    theirs = trl.think_format_reward([chat(text) for text in texts])
    for text, one, other in zip(texts, ours, theirs):
        more = text.count("</think>") == 1 and text.partition("</think>")[2].strip()
        assert one == (other if more else 0), text
    assert 0 < sum(ours) < sum(theirs)


def test_cosine_length():
    reward = CosineLength(max_length=100)
    lengths = (0, 50, 100, 200)
    given = dict(completions=["#### 4"] * 4, completion_ids=ids(*lengths))
    assert reward(**given, answer=["4"] * 4) == pytest.approx([1, 0.75, 0.5, 0.5])
    assert reward(**given, answer=["5"] * 4) == pytest.approx([-1, -0.75, -0.5, -0.5])
    assert reward(**given, answer=["none"] * 4) == [None] * 4
    values = dict(correct_short=2.0, correct_long=1.0, wrong_short=-10.0, wrong_long=0.0, exceeded=-7.0)
    reward = CosineLength(max_length=100, correct="exact_match", column="x", after="#", **values)

    def expected(short, long, n):
        return long + (short - long) / 2 * (1 + np.cos(np.pi * n / 100))

    given = dict(completions=["#a", "#b", "#a", "a"], completion_ids=ids(25, 99, 100, 30))
    assert reward(**given, x=["a"] * 4) == pytest.approx(
        [expected(2, 1, 25), expected(-10, 0, 99), -7, expected(-10, 0, 30)]
    )


def test_overlong():
    reward = Overlong(max_length=100, buffer=20)
    assert reward(completion_ids=ids(0, 80, 81, 90, 100, 101)) == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    assert Overlong(max_length=100, buffer=0)(completion_ids=ids(100, 101)) == [0, -1]


def test_lengths_are_those_of_trl():
    trl = pytest.importorskip("trl.rewards")
    lengths = ids(*range(0, 130, 3))
    for buffer in (0, 1, 20, 100):
        theirs = trl.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=buffer)
        assert Overlong(max_length=100, buffer=buffer)(completion_ids=lengths) == pytest.approx(theirs(lengths))
    pytest.importorskip("math_verify")
    theirs = trl.get_cosine_scaled_reward(max_len=100)
    for answer in ("4", "5"):
        given = dict(completions=[chat("\\boxed{4}")] * len(lengths), completion_ids=lengths)
        ours = CosineLength(max_length=100)(**given, answer=[answer] * len(lengths))
        assert ours == pytest.approx(theirs(**given, solution=[answer] * len(lengths)))


def test_the_cosine_of_trl_without_its_judge(monkeypatch):
    trl = pytest.importorskip("trl.rewards.accuracy_rewards")
    lengths = ids(*range(0, 130, 3))
    given = dict(completions=["4"] * len(lengths), completion_ids=lengths)
    for answer in (4, 5):
        monkeypatch.setattr(trl, "accuracy_reward", lambda completions, solution: [s == 4 for s in solution])
        theirs = trl.get_cosine_scaled_reward(max_len=100)(**given, solution=[answer] * len(lengths))
        assert CosineLength(max_length=100)(**given, answer=[answer] * len(lengths)) == pytest.approx(theirs)


def test_regex():
    given = ["ab", "xaby", chat("ab"), "b", ""]
    assert Regex(pattern="a.")(completions=given) == [1, 1, 1, 0, 0]
    assert Regex(pattern="a.", match="full")(completions=given) == [1, 0, 1, 0, 0]
    assert Regex(pattern=r"^\s*\d+$", after="</think>")(completions=["</think> 4", "4", "4</think>a"]) == [1, 0, 0]
    assert Regex(pattern="(?i)A")(completions=["a"]) == [1]


@pytest.mark.parametrize("pattern", ["(", "*", "a{2,1}", "(?P<a>x)(?P=b)", "[z-a]"])
def test_patterns_that_are_none(pattern):
    with pytest.raises(ValueError, match="is no regular expression"):
        Regex(pattern=pattern)


def test_a_pattern_that_would_take_for_ever(monkeypatch):
    monkeypatch.setattr("trainers.reward_functions._SECONDS", 0.05)
    assert Regex(pattern=r"(?:x+x+)+y")(completions=["x" * 5000, "xxy"]) == [0, 1]
    schema = JsonSchema(schema=json.dumps({"pattern": r"(?:x+x+)+y"}))
    assert schema(completions=[json.dumps("x" * 5000), '"xxy"']) == [0, 1]


SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]})


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        *(('{"a": 1}', 1), (' \n{"a": 1, "b": []}\n', 1), ('{"a": 0}', 0), ('{"a": "1"}', 0), ("{}", 0), ("[]", 0)),
        *(('{"a": 1} ok', 0), ('{"a": 1,}', 0), ("{'a': 1}", 0), ('{"a": NaN}', 0), ('{"a": Infinity}', 0)),
        ('Here:\n```json\n{"a": 1}\n```\nDone.', 1),
        ('```\n{"a": 1}\n```', 1),
        ('```json\n{"a": 0}\n```\n```JSON\n{"a": 1}\n```', 1),
        ('```json\n{"a": 1}\n```\n```json\n{"a": 0}\n```', 0),
        ('```python\n{"a": 0}\n```\n  ```json\n{"a": 1}\n  ```\n```python\n{"a": 0}\n```', 1),
        ('```json\n{"a": 1}', 0),
    ],
)
def test_json_schema(text, reward):
    assert JsonSchema(schema=SCHEMA)(completions=[text, chat(text)]) == [reward] * 2
    assert JsonSchema(schema=SCHEMA, after="</think>")(completions=[text, "<think>{</think>" + text]) == [0, reward]


def test_json_schema_of_a_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(SCHEMA)
    assert JsonSchema(schema=str(path))(completions=['{"a": 1}', "1"]) == [1, 0]
    with pytest.raises(OSError, match=r"none\.json"):
        JsonSchema(schema=str(tmp_path / "none.json"))
    path.write_text("{")
    with pytest.raises(ValueError, match=r"schema .*schema.json is no JSON: Expecting"):
        JsonSchema(schema=str(path))


def test_schemas_that_are_none():
    with pytest.raises(ValueError, match=r"\$.properties.a.type: 'int' is not valid"):
        JsonSchema(schema='{"properties": {"a": {"type": "int"}}}')
    with pytest.raises(ValueError, match=r"is no JSON: Expecting property name"):
        JsonSchema(schema="{a: 1}")


def test_constants_that_only_python_reads():
    assert JsonSchema(schema="{}")(completions=["NaN", "-Infinity", "null"]) == [0, 0, 1]


def test_references_of_schemas_are_not_fetched(monkeypatch):
    fetched = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: fetched.append(args))
    inner = JsonSchema(schema='{"$defs": {"n": {"type": "number"}}, "items": {"$ref": "#/$defs/n"}}')
    assert inner(completions=["[1]", '["a"]']) == [1, 0]
    outer = JsonSchema(schema='{"$ref": "http://127.0.0.1:9/schema.json"}')
    with pytest.raises(Exception, match="Unresolvable"):
        outer(completions=["1"])
    assert not fetched


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_whatever_a_completion_says_it_is_only_wrong(text):
    options = {
        "cosine_length": {"max_length": 8},
        "overlong": {"max_length": 8, "buffer": 4},
        "regex": {"pattern": "^answer$"},
        "json_schema": {"schema": '{"type": "object", "properties": {"a": {"multipleOf": 0.5}}, "required": ["a"]}'},
    }
    for name in [name for name in FUNCTIONS if name != "reward_model"]:  # which has tests of its own
        given = dict(completions=[text, chat(text)], completion_ids=[[], []], answer=["18", "18"])
        values = FUNCTIONS[name](**options.get(name, {}))(**given)
        wrong = {"cosine_length": -1.0}.get(name, 0.0)
        assert values == [wrong, wrong], name
        assert all(type(value) is float for value in values), name


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Overlong(max_length=10, buffer=11), "from 0 to max_length 10, not 11"),
        (lambda: Overlong(max_length=10, buffer=-1), "not -1"),
        (lambda: CosineLength(max_length=0), "max_length must be at least 1, not 0"),
        (lambda: ExactMatch(after=""), "after is empty"),
        (lambda: Gsm8kAnswer(after=""), "after is empty"),
        (lambda: CosineLength(max_length=1, after=""), "after is empty"),
        (lambda: Regex(pattern="a", after=""), "after is empty"),
        (lambda: JsonSchema(schema="{}", after=""), "after is empty"),
        (lambda: ExactMatch()(completions=["a"], question=["b"]), "no column 'answer', only question"),
        (lambda: Gsm8kAnswer(column="x")(completions=["a"], b=[1], a=[1]), "no column 'x', only a, b"),
        (lambda: ExactMatch()(completions=["a"], prompts=["b"], completion_ids=[[1]]), "'answer', only prompts"),
    ],
)
def test_options_that_cannot_be(make, error):
    with pytest.raises(ValueError, match=error):
        make()
