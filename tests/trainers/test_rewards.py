"""Rewards found by name, called as TRL calls them, and what is said of those that fail."""

import asyncio
import json
import math
import sys
import threading
import time

import numpy as np
import pytest

from trainers.reward_functions import FUNCTIONS, Gsm8kAnswer
from trainers.rewards import Reward, RewardConfig, RewardError, load_rewards, score
from utils.settings import dump_yaml, from_dict, load_settings, to_dict

USERS = """
import asyncio
import functools

def plain(completions, **kwargs):
    return [float(len(c)) for c in completions]

def named(completions, level):
    return [len(c) * l for c, l in zip(completions, level)]

def with_options(prompts, completions, scale, offset=0, **kwargs):
    return [scale * len(c) + offset for c in completions]

def strict_options(completions, scale=1):
    return [scale * len(c) for c in completions]

async def later(completions, completion_ids, **kwargs):
    await asyncio.sleep(0)
    return [len(ids) for ids in completion_ids]

def factory(scale):
    def reward(completions, **kwargs):
        return [scale * len(c) for c in completions]
    return reward

class Object:
    def __init__(self, scale=1, **more):
        self.scale = scale
    def __call__(self, completions, **kwargs):
        return [self.scale * len(c) for c in completions]

instance = Object(3)
number = 3
loaded = []

def breaks():
    return [1.0]
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A file of rewards, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "users_rewards.py"
    path.write_text(USERS)
    yield path
    sys.modules.pop("users_rewards", None)


def load(*names, **options):
    return load_rewards(RewardConfig(function=name, options=options) for name in names)


def scored(function, completions=("a", "bb"), **columns):
    n = len(completions)
    return score([Reward("it", function)], ["p"] * n, completions, [[1]] * n, columns)[:, 0].tolist()


def failure(function, *args, **columns):
    with pytest.raises(RewardError) as caught:
        scored(function, *args, **columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What the functions get, and what they may return.


def test_a_column_for_each_function_in_float64():
    rewards = [Reward("one", lambda completions, **_: [0.1, None, True]), Reward("two", lambda prompts: (3, 4, 5))]
    rewards_NF = score(rewards, list("abc"), list("def"), [[1], [2], []], {})
    assert rewards_NF.dtype == np.float64
    np.testing.assert_array_equal(rewards_NF, [[0.1, 3], [math.nan, 4], [1, 5]])
    assert score([], ["a"], ["b"], [[1]], {}).shape == (1, 0)
    assert score([Reward("none", lambda completions: [])], [], [], [], {}).shape == (0, 1)


def test_arguments_are_those_of_trl():
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [0.0] * 2

    prompts = [[{"role": "user", "content": "a"}]] * 2
    completions = [[{"role": "assistant", "content": "b"}]] * 2
    score([Reward("r", reward)], prompts, completions, [np.array([1, 2]), (3,)], {"x": (1, 2), "prompts": [8, 9]})
    assert seen == dict(prompts=prompts, completions=completions, completion_ids=[[1, 2], [3]], x=[1, 2])
    assert all(type(value) is list for value in seen.values())
    assert type(seen["completion_ids"][0][0]) is int


def test_a_function_gets_what_it_names():
    assert scored(lambda completions: [len(c) for c in completions], level=[1, 2]) == [1, 2]
    assert scored(lambda level, *, completions: level, level=[1, 2], other=[3, 4]) == [1, 2]
    assert scored(lambda completions, missing=None: [missing is None] * 2) == [1, 1]


def test_a_function_that_needs_what_there_is_not():
    message = failure(lambda completions, solution: [], answer=[1, 2])
    assert message.startswith("reward it raised TypeError: needs solution, and the data has answer, completion_ids, ")


def test_what_a_function_does_to_its_arguments_is_its_own():
    def careless(completions, completion_ids, level, **kwargs):
        completions.clear(), completion_ids[0].clear(), level.reverse()
        return [0, 0]

    rewards = [Reward("a", careless), Reward("b", lambda completions, completion_ids, level: level)]
    ids, level = [[1], [2]], [5, 6]
    assert score(rewards, ["p", "p"], ["a", "b"], ids, {"level": level})[:, 1].tolist() == [5, 6]
    assert ids == [[1], [2]] and level == [5, 6]


@pytest.mark.parametrize(
    "returned",
    [
        *([1, 0], (1.0, 0.0), [True, False], [np.float32(1), np.int64(0)], np.array([1, 0]), np.array([True, False])),
        *(iter([1, 0]), map(float, (1, 0)), {"a": 1, "b": 0}.values(), [np.array(1), np.array([0])[0]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_many_kinds(returned):
    assert scored(lambda **_: returned) == [1, 0]


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    assert scored(lambda **_: torch.tensor([1.0, 0.5])) == [1, 0.5]
    assert scored(lambda **_: [torch.tensor(1), None])[0] == 1


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        *(([1, math.nan], "nan"), ([1, math.inf], "inf"), ([1, "1"], "'1'"), ([1, b"1"], "b'1'"), ([1, [1]], "[1]")),
        *(([1, 1j], "1j"), ([1, {}], "{}"), ([1, np.float32("nan")], "nan"), ([1, np.ones(2)], "array([1., 1.])")),
        ([1, 10**400], "1000"),
    ],
)
def test_values_that_are_no_numbers(returned, shown):
    message = failure(lambda **_: returned)
    assert message.startswith("reward it returned ") and shown in message
    assert message.endswith("neither a finite number nor None, for completion 1 of 2, of the prompt 'p'")


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        ([1], "returned 1 values for 2 completions"),
        ([1, 2, 3], "returned 3 values for 2 completions"),
        ([], "returned 0 values for 2 completions"),
        *((value, "which is no list of rewards") for value in (None, 1.0, "ab", {"a": 1, "b": 2}, {1, 2}, np.array(1))),
    ],
)
def test_what_is_no_list_of_as_many(returned, error):
    assert error in failure(lambda **_: returned)


def test_lists_of_unequal_lengths_are_the_callers_mistake():
    for sizes in ((2, 1, 2, 2), (2, 2, 1, 2), (2, 2, 2, 3)):
        prompts, completions, ids, column = (["a"] * size for size in sizes)
        with pytest.raises(ValueError, match=r"2 prompts, but [13] values of \w+"):
            score([], prompts, completions, ids, {"x": column})


# Functions that raise.


def test_the_sample_that_a_function_raises_for():
    def reward(completions, **kwargs):
        return [1 / int(c) for c in completions]

    prompts = ["first", "What\n is  it?" + "x" * 100, "third"]
    with pytest.raises(RewardError) as caught:
        score([Reward("inverse", reward)], prompts, ["1", "0", "0"], [[1]] * 3, {})
    start = (
        "reward inverse raised ZeroDivisionError: division by zero for completion 1 of 3, of the prompt 'What is it?xx"
    )
    assert str(caught.value).startswith(start) and str(caught.value).endswith("…")
    assert len(str(caught.value)) < 200
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_prompt_of_a_conversation_is_its_last_message():
    prompts = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]]
    with pytest.raises(RewardError, match=r"KeyError: 'x' for completion 0 of 1, of the prompt 'Why\?'"):
        score(
            [Reward("r", lambda **kwargs: kwargs["x"])], prompts, [[{"role": "assistant", "content": "b"}]], [[1]], {}
        )


def test_a_function_that_raises_for_all_together_only():
    def reward(completions):
        if len(completions) > 1:
            raise RuntimeError("two\nlines " + "x" * 1000)
        return [1]

    message = failure(reward)
    assert "RuntimeError: two lines xxx" in message and message.endswith(
        "2 completions together, though for none of them alone"
    )
    assert len(message) < 450


def test_generators_and_exits_are_caught_too():
    assert "ZeroDivisionError" in failure(lambda completions: (1 / 0 for _ in completions))
    assert "completion 1 of 2" in failure(lambda completions: (1 / (len(c) - 2) for c in completions))
    assert "SystemExit: 3" in failure(lambda completions: sys.exit(3))


def test_keys_that_interrupt_are_not():
    def reward(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(reward)


# Async functions.


def test_async_functions_wait_for_each_other_in_one_loop():
    met, loops = [], []

    def make(other):
        async def reward(completions, **kwargs):
            loops.append(asyncio.get_running_loop())
            met.append(other)
            for _ in range(1000):
                if {"a", "b"} <= set(met):
                    return [other == "a"] * len(completions)
                await asyncio.sleep(0.001)
            raise RuntimeError("alone")

        return reward

    rewards = [Reward("a", make("a")), Reward("sync", lambda **_: [7.0, None]), Reward("b", make("b"))]
    for _ in range(2):
        met.clear()
        got = score(rewards, ["p", "p"], ["a", "b"], [[1], [1]], {})
        np.testing.assert_array_equal(got, [[1, 7, 0], [1, math.nan, 0]])
    assert len(loops) == 4 and len(set(loops)) == 1  # what they keep open stays usable


def test_awaitables_of_any_function():
    class Object:
        async def __call__(self, completions, **kwargs):
            return [None, 2.0]

    async def inner(n):
        return [n] * 2

    assert scored(lambda **_: inner(4)) == [4, 4]
    got = scored(Object())
    assert math.isnan(got[0]) and got[1] == 2


def test_async_functions_that_raise():
    async def reward(completions):
        await asyncio.sleep(0)
        return [1 / (len(c) - 2) for c in completions]

    message = failure(reward)
    assert "ZeroDivisionError" in message and "completion 1 of 2" in message

    async def cancelled(completions):
        raise asyncio.CancelledError

    async def leaves(completions):
        raise SystemExit(2)

    assert "CancelledError" in failure(cancelled)
    assert "SystemExit: 2" in failure(leaves)
    assert scored(lambda completions: [1, 2]) == [1, 2]


def test_async_functions_below_a_running_loop():
    async def reward(completions):
        return [1, 2]

    async def main():
        return scored(reward)

    assert asyncio.run(main()) == [1, 2]


def test_an_interrupt_while_waiting_cancels_what_is_awaited(monkeypatch):
    cancelled = threading.Event()

    async def slow(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupt():
        raise KeyboardInterrupt

    def interrupted(*args, **kwargs):
        future = submit(*args, **kwargs)
        time.sleep(0.05)
        monkeypatch.setattr(future, "result", interrupt)
        return future

    submit = asyncio.run_coroutine_threadsafe
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scored(slow)
    assert cancelled.wait(5)


# Functions found by name.


def test_given_functions_take_their_options_strictly():
    (reward,) = load("gsm8k_answer", column="x")
    assert (reward.name, reward.weight, reward.function) == ("gsm8k_answer", 1.0, Gsm8kAnswer(column="x"))
    with pytest.raises(ValueError, match=r"reward gsm8k_answer: colum: unknown; did you mean column\?"):
        load("gsm8k_answer", colum="x")
    with pytest.raises(ValueError, match=r"reward overlong: buffer: expected a whole number, got"):
        load("overlong", max_length=10, buffer=1.5)
    with pytest.raises(ValueError, match=r"reward overlong: buffer: required, but not given"):
        load("overlong", max_length=10)
    with pytest.raises(ValueError, match=r"reward regex: pattern \( is no regular expression: .+"):
        load("regex", pattern="(")
    with pytest.raises(ValueError, match=r"reward 'gsm8k' is none of exact_match, gsm8k_answer, .*; one of your own"):
        load("gsm8k")


def test_names_and_weights():
    rewards = load_rewards(
        [
            RewardConfig(function="regex", weight=0.5, options={"pattern": "a"}),
            RewardConfig(function="regex", name="b", weight=-1.0, options={"pattern": "b"}),
        ]
    )
    assert [(r.name, r.weight) for r in rewards] == [("regex", 0.5), ("b", -1.0)]
    assert score(rewards, ["p"], ["b"], [[1]], {}).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="two rewards are called 'think_format'"):
        load("think_format", "think_format")
    with pytest.raises(ValueError, match="weight of regex must be finite, not nan"):
        RewardConfig(function="regex", weight=math.nan)
    with pytest.raises(ValueError, match="name of regex is empty"):
        RewardConfig(function="regex", name="")


def test_functions_of_modules_and_files(users):
    for source in ("users_rewards", "users_rewards.py", str(users)):
        rewards = load(f"{source}:plain", f"{source}:later", f"{source}:instance", f"{source}:named")
        assert [r.name for r in rewards] == ["plain", "later", "instance", "named"]
        got = score(rewards, ["p", "p"], ["a", "bb"], [[1, 2, 3], []], {"level": [10, 20]})
        assert got.tolist() == [[1, 3, 3, 10], [2, 0, 6, 40]]


def test_functions_of_one_file_share_a_module(users):
    users.write_text(
        "seen = []\ndef a(completions):\n    seen.append(1)\n    return seen\ndef b(completions):\n    return seen\n"
    )
    assert score(load(f"{users}:a", f"{users}:b"), ["p"], ["c"], [[1]], {}).tolist() == [[1, 1]]


def test_options_of_a_users_function(users):
    (reward,) = load("users_rewards:with_options", scale=2, offset=1)
    assert scored(reward.function) == [3, 5]
    assert scored(reward.function, scale=[8, 9]) == [3, 5]  # before a column of the same name
    (reward,) = load("users_rewards:strict_options", scale=4)
    assert scored(reward.function) == [4, 8]
    with pytest.raises(ValueError, match="users_rewards:strict_options has no option 'size'; it has scale"):
        load("users_rewards:strict_options", size=4)
    for name in ("strict_options", "with_options"):
        with pytest.raises(ValueError, match=f"users_rewards:{name} has no option 'prompts'"):
            load(f"users_rewards:{name}", prompts=4)


def test_factories_and_classes_are_called_once_with_their_options(users):
    for name in ("factory", "Object"):
        (reward,) = load(f"users_rewards:{name}", scale=5)
        assert scored(reward.function) == [5, 10]
    with pytest.raises(ValueError, match=r"users_rewards:factory: making it raised TypeError: .*scale"):
        load("users_rewards:factory")
    with pytest.raises(ValueError, match="takes none of prompts, completions, completion_ids, and makes no function"):
        load("users_rewards:breaks")


def test_options_arrive_as_json_has_them(users):
    users.write_text("def f(completions, a, b):\n    return [a == [1, [2]] and b == {'c': [3]}]\n")
    (reward,) = load(f"{users}:f", a=(1, (2,)), b={"c": (3,)})
    assert scored(reward.function, ["x"]) == [1]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("no_such_module:f", "importing no_such_module raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("none.py:f", "importing none.py raised FileNotFoundError"),
        ("broken.py:f", "importing broken.py raised SyntaxError"),
        ("users_rewards:plane", r"users_rewards has no 'plane'; did you mean plain\?"),
        ("users_rewards.py:zzz", r"users_rewards.py has no 'zzz'$"),
        ("users_rewards:", "users_rewards has no ''"),
        (":f", "importing  raised ValueError: Empty module name"),
        ("users_rewards:number", "reward users_rewards:number: 3 is no function"),
    ],
)
def test_functions_that_are_not_there(users, name, error):
    users.with_name("broken.py").write_text("def f(:\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=error) as caught:
            load(name)
        assert "\n" not in str(caught.value)


# Settings.


def test_configs_are_read_from_yaml_and_written_back(tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_text(
        "function: json_schema\nweight: 2\noptions:\n  schema:\n    type: object\n    required: [a]\n"
        "    properties: {a: {type: object, properties: {b: {type: [integer, 'null'], enum: [1, 2.5, null]}}}}\n"
    )
    config = load_settings(RewardConfig, path, ["--name=shape"])
    assert from_dict(RewardConfig, json.loads(json.dumps(to_dict(config)))) == config
    path.write_text(dump_yaml(config))
    assert load_settings(RewardConfig, path) == config
    (reward,) = load_rewards([config])
    assert (reward.name, reward.weight) == ("shape", 2.0)
    assert scored(reward.function, ['{"a": {"b": 1}}', '{"a": {"b": 3}}', "{}"]) == [1, 0, 0]


def test_options_on_the_command_line():
    config = load_settings(RewardConfig, None, ["--function=regex", "--options.pattern=a+", "--options.match", "full"])
    assert scored(load_rewards([config])[0].function, ["aa", "ab"]) == [1, 0]


def test_a_schema_of_any_depth_from_python():
    schema = {"anyOf": [{"type": "array", "items": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}]}
    assert scored(load("json_schema", schema=schema)[0].function, ["[[null]]", "[1]"]) == [1, 0]


# TRL's own.


def test_functions_of_trl_work_as_they_are():
    pytest.importorskip("trl")
    configs = [
        RewardConfig(function="trl.rewards:think_format_reward"),
        RewardConfig(
            function="trl.rewards:get_soft_overlong_punishment",
            options={"max_completion_len": 4, "soft_punish_cache": 2},
        ),
        RewardConfig(function="trl.rewards:get_repetition_penalty_reward", options={"ngram_size": 1}),
    ]
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b")]
    got = score(load_rewards(configs), [[]] * 2, completions, [[1, 2, 3], [5, 5, 5, 5]], {"answer": ["b", "b"]})
    assert got.tolist() == [[1, -0.5, 0], [0, -1, -0.75]]


def test_given_functions_are_called_as_others_are():
    options = {
        "cosine_length": {"max_length": 4},
        "overlong": {"max_length": 4, "buffer": 2},
        "regex": {"pattern": "4"},
        "json_schema": {"schema": '{"const": 4}'},
    }
    names = [name for name in FUNCTIONS if name != "reward_model"]  # which has tests of its own
    rewards = load_rewards([RewardConfig(function=name, options=options.get(name, {})) for name in names])
    completions = ["4", "<think>a</think>5"]
    got = score(rewards, ["p", "p"], completions, [[1, 2], [1, 2, 3]], {"answer": ["4", None], "other": [1, 2]})
    expected = dict(
        exact_match=1, gsm8k_answer=1, think_format=0, cosine_length=0.75, overlong=0, regex=1, json_schema=1
    )
    np.testing.assert_allclose(got[0], [expected[name] for name in names])
    np.testing.assert_allclose(got[1], [math.nan, math.nan, 1, math.nan, -0.5, 0, 0])
