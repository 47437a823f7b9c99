"""Reward functions that come with the library: of a completion's text, of its length in tokens, or by a reward model.

Each is a dataclass of its options, and its instances are called as rewards are: with `completions`, texts or lists of
messages, `completion_ids`, and the columns of the data; they return a number for each completion, or None where they do
not apply. Whatever a completion says, it gets a number: what cannot be read is wrong.
"""

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jsonschema
import jsonschema_specifications
import regex

from trainers.answers import answered_number, behind, reference_number
from trainers.reward_model import RewardModel

_SECONDS = 1.0  # that a pattern may search a completion before it counts as not found

Completions = Sequence[str | Sequence[Mapping[str, Any]]]


def text_of(value: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt's or completion's text: itself, or the content of its last message, whose text parts are joined."""
    if isinstance(value, str):
        return value
    content = value[-1].get("content") if value else None
    if isinstance(content, list | tuple):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """1 where a completion is the text of a column, else 0; None where the column is null.

    With `after`, a marker such as `</think>`, only what follows its last occurrence in the completion counts, and
    without one the completion is wrong. `strip` leaves out white space around both, `ignore_case` the case.
    """

    column: str = "answer"
    strip: bool = True
    ignore_case: bool = False
    after: str | None = None

    def __post_init__(self) -> None:
        _check_marker(self.after)

    def __call__(self, *, completions: Completions, **columns: Any) -> list[float | None]:
        return _compare(completions, _column(columns, self.column), self._score)

    def _score(self, completion: str, reference: Any) -> float | None:
        if reference is None:
            return None
        answer = behind(completion, self.after)
        return float(answer is not None and self._normal(answer) == self._normal(str(reference)))

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True, kw_only=True)
class Gsm8kAnswer:
    """1 where a completion's number is that of a column, else 0; None where the column has no number.

    The column is an answer as in GSM8K (arXiv:2110.14168), which ends with `#### 1,234`, or has one number and no
    other. The completion's number is the first one behind its last `####`, on the line that follows; or that in its
    last `\\boxed{}`; or else the last one in it. Behind an equals sign counts more than before it. Commas between
    thousands, currency signs, units and `%` are left out; decimals and fractions, also of LaTeX, are compared exactly.
    `after` as for ExactMatch.
    """

    column: str = "answer"
    after: str | None = None

    def __post_init__(self) -> None:
        _check_marker(self.after)

    def __call__(self, *, completions: Completions, **columns: Any) -> list[float | None]:
        return _compare(completions, _column(columns, self.column), self._score)

    def _score(self, completion: str, reference: Any) -> float | None:
        expected = reference_number(str(reference))
        if expected is None:
            return None
        answer = behind(completion, self.after)
        return float(answer is not None and answered_number(answer) == expected)


@dataclass(frozen=True, kw_only=True)
class ThinkFormat:
    """1 where a completion is `<think>…</think>` with an answer behind, each tag there once, else 0.

    With `opened` the prompt ends with `<think>`, as some chat templates write it, and the completion begins behind it.
    """

    opened: bool = False

    def __call__(self, *, completions: Completions, **columns: Any) -> list[float]:
        return [float(self._fits(text_of(completion))) for completion in completions]

    def _fits(self, text: str) -> bool:
        text = "<think>" + text if self.opened else text
        once = text.count("<think>") == text.count("</think>") == 1
        return once and text.startswith("<think>") and bool(text.partition("</think>")[2].strip())


@dataclass(frozen=True, kw_only=True)
class CosineLength:
    """A reward for being correct that changes with the length, in tokens, along half a cosine.

    From `correct_short` or `wrong_short` at no tokens to `correct_long` or `wrong_long` at `max_length`: the reward of
    L tokens is long + (short - long) (1 + cos(pi L / max_length)) / 2. By default what is correct had better be short,
    and what is wrong long. `exceeded`, where it is given, is the reward of every completion of max_length tokens or
    more, which was cut short; otherwise it is that of max_length. `correct` says by which reward function a completion
    is correct, with its `column` and `after`; None where that one does not apply.

    Source: arXiv:2502.03373, appendix C.1. Deviation: default values as in Open-R1 and TRL, which have no `exceeded`.
    """

    max_length: int
    correct: Literal["gsm8k_answer", "exact_match"] = "gsm8k_answer"
    column: str = "answer"
    after: str | None = None
    correct_short: float = 1.0
    correct_long: float = 0.5
    wrong_short: float = -1.0
    wrong_long: float = -0.5
    exceeded: float | None = None

    def __post_init__(self) -> None:
        _check_marker(self.after)
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {self.max_length}")

    def __call__(self, *, completions: Completions, completion_ids: Sequence[Any], **columns: Any) -> list[Any]:
        judge = FUNCTIONS[self.correct](column=self.column, after=self.after)
        judged = judge(completions=completions, **columns)
        return [None if good is None else self._scale(good == 1, len(ids)) for good, ids in zip(judged, completion_ids)]

    def _scale(self, correct: bool, length: int) -> float:
        if self.exceeded is not None and length >= self.max_length:
            return self.exceeded
        short, long = (self.correct_short, self.correct_long) if correct else (self.wrong_short, self.wrong_long)
        return long + (short - long) * (1 + math.cos(math.pi * min(length / self.max_length, 1))) / 2


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """The soft punishment of completions that come near to a length, in tokens.

    0 up to max_length - buffer tokens, from there on a straight line down to -1 at `max_length`, and -1 beyond.
    Source: DAPO, arXiv:2503.14476, eq. 13, where `buffer` is L_cache.
    """

    max_length: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 <= self.buffer <= self.max_length:
            raise ValueError(f"buffer must be from 0 to max_length {self.max_length}, not {self.buffer}")

    def __call__(self, *, completion_ids: Sequence[Any], **columns: Any) -> list[float]:
        return [self._punish(len(ids)) for ids in completion_ids]

    def _punish(self, length: int) -> float:
        over = length - (self.max_length - self.buffer)
        return 0.0 if over <= 0 else -1.0 if over >= self.buffer else -over / self.buffer


@dataclass(frozen=True, kw_only=True)
class Regex:
    """1 where a pattern is found in a completion, or with `match: full` is all of it, else 0.

    Patterns are those of the `regex` library, which knows all of Python's `re`. A search that takes more than a second
    has found nothing. `after` as for ExactMatch.
    """

    pattern: str
    match: Literal["search", "full"] = "search"
    after: str | None = None

    def __post_init__(self) -> None:
        _check_marker(self.after)
        try:
            regex.compile(self.pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"pattern {_short(self.pattern)} is no regular expression: {error}") from error

    def __call__(self, *, completions: Completions, **columns: Any) -> list[float]:
        texts = (behind(text_of(completion), self.after) for completion in completions)
        return [float(text is not None and _found(self.pattern, text, self.match)) for text in texts]


@dataclass(frozen=True, kw_only=True)
class JsonSchema:
    """1 where a completion is JSON that a schema accepts, else 0.

    `schema` is a path, or the schema itself as JSON text. The JSON may stand in a fence of Markdown (```json), the last
    one counts, and then with other text around it. References lead within the schema and to the metaschemas, nothing is
    fetched. `after` as for ExactMatch. Raises ValueError for what is no schema, OSError where it cannot be read.
    """

    schema: str
    after: str | None = None
    _validator: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_marker(self.after)
        inline = self.schema.lstrip().startswith("{")
        name = _short(self.schema) if inline else self.schema
        try:
            schema = json.loads(self.schema if inline else Path(self.schema).read_text(encoding="utf-8"))
            known = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
            known.check_schema(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"schema {name} is no JSON: {error}") from error
        except jsonschema.SchemaError as error:
            raise ValueError(f"schema {name}: {error.json_path}: {_short(error.message)}") from error
        validator = jsonschema.validators.extend(known, {"pattern": _check_pattern})
        object.__setattr__(self, "_validator", validator(schema, registry=jsonschema_specifications.REGISTRY))

    def __call__(self, *, completions: Completions, **columns: Any) -> list[float]:
        return [float(self._accepts(behind(text_of(completion), self.after))) for completion in completions]

    def _accepts(self, text: str | None) -> bool:
        if text is None:
            return False
        fenced = _fenced(text)
        try:
            value = json.loads(text if fenced is None else fenced, parse_constant=_refuse_constant)
            return self._validator.is_valid(value)
        except (ValueError, ArithmeticError, RecursionError):  # too long, too large or too deep to be read or compared
            return False


FUNCTIONS: Mapping[str, Callable[..., Callable[..., list[Any]]]] = MappingProxyType(
    {
        "exact_match": ExactMatch,
        "gsm8k_answer": Gsm8kAnswer,
        "think_format": ThinkFormat,
        "cosine_length": CosineLength,
        "overlong": Overlong,
        "regex": Regex,
        "json_schema": JsonSchema,
        "reward_model": RewardModel,
    }
)


def _check_marker(after: str | None) -> None:
    if after == "":
        raise ValueError("after is empty: give a marker, or null for the whole completion")


def _column(columns: Mapping[str, Any], name: str) -> Sequence[Any]:
    if name not in columns:
        others = sorted(columns.keys() - {"prompts", "completion_ids"})
        raise ValueError(f"the data has no column {name!r}, only {', '.join(others) or 'prompts'}")
    return columns[name]


def _compare(completions: Completions, references: Sequence[Any], score: Callable[[str, Any], Any]) -> list[Any]:
    return [score(text_of(completion), reference) for completion, reference in zip(completions, references)]


def _short(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder="…")


def _found(pattern: str, text: str, match: str) -> bool:
    """Whether a pattern matches in time, anywhere or all of the text."""
    try:
        return (regex.fullmatch if match == "full" else regex.search)(pattern, text, timeout=_SECONDS) is not None
    except (TimeoutError, MemoryError):
        return False


def _fenced(text: str) -> str | None:
    """What the last fence with JSON, or of no language, holds; None where none is closed."""
    last, inside, language = None, None, ""
    for line in text.split("\n"):
        mark = line.strip()
        if inside is None and mark.startswith("```"):
            inside, language = [], mark[3:].strip().lower()
        elif inside is not None and mark == "```":
            last, inside = ("\n".join(inside) if language in ("", "json") else last), None
        elif inside is not None:
            inside.append(line)
    return last


def _check_pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Any:
    """The schema keyword `pattern`, within the time that patterns have."""
    if isinstance(value, str) and not _found(pattern, value, "search"):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
