"""Rewards of completions: functions with the signature that TRL's have, found by name, and called on the host."""

import asyncio
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import operator
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from trainers.reward_functions import FUNCTIONS, Completions, text_of
from utils.settings import from_dict

_GIVEN = ("prompts", "completions", "completion_ids")

_Scalar = bool | int | float | str | None
_Plain = _Scalar | tuple[_Scalar, ...]
# Mappings that deep, which are schemas: settings have no types that refer to themselves.
_Deep1 = _Plain | dict[str, _Plain]
_Deep2 = _Plain | dict[str, _Deep1]
_Deep3 = _Plain | dict[str, _Deep2]
_Deep4 = _Plain | dict[str, _Deep3]
_Deep5 = _Plain | dict[str, _Deep4]


class RewardError(RuntimeError):
    """A reward function raised, or returned what is no reward; names the function and the sample, in one line."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward function, what it weighs, and under which name it is reported.

    `function` is one of `trainers.reward_functions.FUNCTIONS`, or `module:function`, or `path/to/file.py:function`.
    `options` are keyword arguments of it. The name is by default the function's.
    """

    function: str
    weight: float = 1.0
    name: str | None = None
    options: dict[str, _Deep5] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight of {self.function} must be finite, not {self.weight}")
        if self.name == "":
            raise ValueError(f"name of {self.function} is empty: give one, or null for the function's")


@dataclass(frozen=True)
class Reward:
    """`function(prompts=, completions=, completion_ids=, **columns)` returns a number or None for each completion."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0


def load_rewards(configs: Iterable[RewardConfig]) -> tuple[Reward, ...]:
    """Find the functions. The working directory is added to sys.path, behind what is there.

    A function gets its options as keyword arguments at every call, before columns of the same names. What takes none of
    prompts, completions, completion_ids and **kwargs, and every class, is called once with the options, and returns
    the function.

    Raises ValueError for a function that cannot be found or called, options that it does not take, and equal names.
    """
    rewards: dict[str, Reward] = {}
    for config in configs:
        name = config.name or config.function.rpartition(":")[2]
        if name in rewards:
            raise ValueError(f"two rewards are called {name!r}: give one of them another name")
        rewards[name] = Reward(name, _load(config), config.weight)
    return tuple(rewards.values())


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Completions,
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    """What each reward function gives for each completion, rewards_NF in float64, without weights; NaN for None.

    prompts and completions are texts, or lists of messages for conversations; the columns are lists of N values. A
    function gets the arguments that it names, or all of them if it takes any. Coroutines of async functions run
    together, in one event loop that lasts as long as the program.

    Raises RewardError where a function raises, does not return N values, or one that is no finite number or None. To
    find the sample, a function that raised is called again for one completion at a time.
    """
    samples = _Samples(prompts, completions, completion_ids, columns)
    outcomes = _call([reward.function for reward in rewards], samples)
    rewards_NF = np.empty((len(samples), len(rewards)), np.float64)
    for column, (reward, outcome) in enumerate(zip(rewards, outcomes)):
        if isinstance(outcome, _Raised):
            raise _blame(reward, samples, outcome.error) from outcome.error
        rewards_NF[:, column] = _values(reward, outcome, samples)
    return rewards_NF


class _Samples:
    """The arguments of a call, in lists that the functions do not share."""

    def __init__(self, prompts: Any, completions: Any, completion_ids: Any, columns: Mapping[str, Any]):
        self._arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for name, values in self._arguments.items():
            if len(values) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts, but {len(values)} values of {name}")

    def __len__(self) -> int:
        return len(self._arguments["prompts"])

    def only(self, index: int) -> "_Samples":
        columns = {name: [values[index]] for name, values in self._arguments.items()}
        return _Samples(*(columns.pop(name) for name in _GIVEN), columns)

    def describe(self, index: int) -> str:
        beginning = " ".join(text_of(self._arguments["prompts"][index]).split())
        return f"completion {index} of {len(self)}, of the prompt {_shown(beginning, 60)}"

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Those that a function takes; TypeError where it needs others."""
        arguments = {name: list(values) for name, values in self._arguments.items()}
        arguments["completion_ids"] = [np.asarray(ids).tolist() for ids in arguments["completion_ids"]]
        fixed = function.keywords if isinstance(function, functools.partial) else {}
        arguments = {name: values for name, values in arguments.items() if name not in fixed}
        parameters = _parameters(function)
        if parameters is None:
            return arguments
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
        if missing:
            raise TypeError(f"needs {', '.join(missing)}, and the data has {', '.join(sorted(arguments))}")
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            return arguments
        return {p.name: arguments[p.name] for p in named if p.name in arguments}


@dataclass(frozen=True)
class _Raised:
    error: BaseException


def _call(functions: Sequence[Callable[..., Any]], samples: _Samples) -> list[Any]:
    """What the functions return, or raise; what can be awaited is awaited, all of it together."""
    outcomes: list[Any] = []
    for function in functions:
        try:
            outcome = function(**samples.arguments(function))
            outcomes.append(list(outcome) if isinstance(outcome, Iterator) else outcome)
        except (Exception, SystemExit) as error:
            outcomes.append(_Raised(error))
    waiting = [place for place, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
    if waiting:
        done = asyncio.run_coroutine_threadsafe(_together([outcomes[place] for place in waiting]), _event_loop())
        try:
            results = done.result()
        except BaseException:  # such as the key that interrupts
            done.cancel()
            raise
        for place, result in zip(waiting, results):
            outcomes[place] = result
    return outcomes


async def _together(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    async def outcome(awaitable: Awaitable[Any]) -> Any:
        try:
            return await awaitable
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            return _Raised(error)

    return await asyncio.gather(*map(outcome, awaitables))


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all async rewards, in a thread of its own: connections that they keep open belong to it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _blame(reward: Reward, samples: _Samples, error: BaseException) -> RewardError:
    """The error that names the first sample for which the function raises when it is called for that one alone."""
    where = f"{len(samples)} completions together, though for none of them alone"
    for index in range(len(samples)):
        outcome = _call([reward.function], samples.only(index))[0]
        if isinstance(outcome, _Raised):
            where, error = samples.describe(index), outcome.error
            break
    return RewardError(f"reward {reward.name} raised {_shown(error, 300)} for {where}")


def _values(reward: Reward, outcome: Any, samples: _Samples) -> list[float]:
    """A function's rewards as floats, NaN for None."""
    try:
        values = None if isinstance(outcome, str | bytes | Mapping | Set) else list(outcome)
    except TypeError:
        values = None
    if values is None:
        raise RewardError(f"reward {reward.name} returned {_shown(outcome, 60)}, which is no list of rewards")
    if len(values) != len(samples):
        raise RewardError(f"reward {reward.name} returned {len(values)} values for {len(samples)} completions")
    numbers = [_number(value) for value in values]
    for index, (value, number) in enumerate(zip(values, numbers)):
        if value is not None and not math.isfinite(number):
            raise RewardError(
                f"reward {reward.name} returned {_shown(value, 60)}, which is neither a finite number nor None, "
                f"for {samples.describe(index)}"
            )
    return numbers


def _number(value: Any) -> float:
    """A number as float, also one of numpy or of torch; NaN for anything else."""
    if value is None or isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return math.nan


def _load(config: RewardConfig) -> Callable[..., Any]:
    options = {name: _plain(value) for name, value in config.options.items()}
    if ":" not in config.function:
        if config.function not in FUNCTIONS:
            raise ValueError(
                f"reward {config.function!r} is none of {', '.join(FUNCTIONS)}; one of your own is written "
                f"module:function or path/to/file.py:function"
            )
        # A schema has mappings of any depth, and settings do not.
        options = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in options.items()}
        return from_dict(FUNCTIONS[config.function], options, source=f"reward {config.function}")
    function = _import(config.function)
    if not callable(function):
        raise ValueError(f"reward {config.function}: {_shown(function, 60)} is no function")
    if isinstance(function, type) or _is_factory(function):
        try:
            function = function(**options)
        except Exception as error:
            raise ValueError(f"reward {config.function}: making it raised {_shown(error, 300)}") from error
        if not callable(function):
            raise ValueError(f"reward {config.function} takes none of {', '.join(_GIVEN)}, and makes no function")
        return function
    _check_options(config.function, function, options)
    return functools.partial(function, **options) if options else function


def _plain(value: Any) -> Any:
    """A value of settings as JSON would give it: lists for tuples."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _import(name: str) -> Any:
    """What `module:function` or `file.py:function` names."""
    source, _, attribute = name.rpartition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        module = _module_of_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise ValueError(f"reward {name}: importing {source} raised {_shown(error, 300)}") from error
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"reward {name}: {source} has no {attribute!r}{hint}") from None


def _module_of_file(path: Path) -> ModuleType:
    """The module of a file, one for all functions in it."""
    path = path.resolve()
    name = f"_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)  # before it runs, as for any other module
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """None where Python cannot tell."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _is_factory(function: Callable[..., Any]) -> bool:
    parameters = _parameters(function)
    return parameters is not None and not any(p.name in _GIVEN or p.kind == p.VAR_KEYWORD for p in parameters)


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = _parameters(function)
    if parameters is None or any(p.kind == p.VAR_KEYWORD for p in parameters):
        known = None
    else:
        known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in options:
        if option in _GIVEN or (known is not None and option not in known):
            others = ", ".join(p for p in known or () if p not in _GIVEN)
            raise ValueError(f"reward {name} has no option {option!r}; it has {others or 'none'}")


def _shown(value: Any, length: int) -> str:
    """A value or an error in one line."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
