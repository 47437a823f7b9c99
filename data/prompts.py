"""Prompts for reinforcement learning, with what reward functions get to know of each."""

from __future__ import annotations

import hashlib
import itertools
import string
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data.chat import encode_chat
from data.chat_guard import ChatTokenizer
from data.datasets import SourceConfig
from data.readers import Rows, data_files, open_rows
from data.records import BadRow, PromptRecord, normalize_prompt
from data.records_messages import Message
from data.store import digest

__all__ = ["Prompt", "PromptConfig", "PromptSource", "Prompts", "TooLong", "gather_columns", "open_prompts"]

# Names of what reward functions get beside the columns.
_TAKEN = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What is asked in training and in validation. `validation`, or a `validation_fraction` of each training set, held
    out.

    Prompts of more than `max_prompt_length` tokens are left out, never cut. `chat_template` is a built-in name or a
    file, by default the tokenizer's own. `system` is put in front of conversations without a system message.
    """

    train: str | tuple[str | SourceConfig, ...]
    max_prompt_length: int
    validation: str | tuple[str | SourceConfig, ...] = ()
    validation_fraction: float = 0.0
    chat_template: str | None = None
    system: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train names no data set")
        if self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be positive, not {self.max_prompt_length}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction {self.validation_fraction} must be at least 0 and below 1")
        if self.validation and self.validation_fraction:
            raise ValueError(f"validation {self.validation!r} and validation_fraction exclude each other")
        for source in self.validation_sources:
            if source.weight is not None:
                raise ValueError(f"the weight {source.weight} of {source.path} is for training, not for validation")
        for source in (*self.train_sources, *self.validation_sources):
            if source.token_dtype is not None:
                raise ValueError(f"token_dtype {source.token_dtype!r} of {source.path}: tokens are no prompts")

    @property
    def train_sources(self) -> tuple[SourceConfig, ...]:
        return _sources(self.train)

    @property
    def validation_sources(self) -> tuple[SourceConfig, ...]:
        return _sources(self.validation)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The shares of the training sets, None where none is given."""
        weights = [source.weight for source in self.train_sources]
        return None if all(w is None for w in weights) else tuple(1.0 if w is None else w for w in weights)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked: token ids, and the text or the messages that they were made of.

    `columns` are what TRL hands to reward functions: all that the row has but `prompt` and `completion`. `answer` is
    there also where a row has its answer under another key. `source[index]` gives the same prompt again.
    """

    ids: tuple[int, ...]
    prompt: str | tuple[Message, ...]
    columns: Mapping[str, Any]
    index: int


class TooLong(ValueError):  # noqa: N818
    """A prompt that is longer than it may be."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows of a data set: those of the indices, all where that is None."""

    rows: Rows
    config: SourceConfig
    indices: np.ndarray | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows) if self.indices is None else len(self.indices)

    def row(self, index: int) -> int:
        return index if self.indices is None else int(self.indices[index])


class PromptSource:
    """Prompts by number, one data set's after the other's; each is read and tokenised when it is asked for.

    sizes has the number of rows of each data set, weights their shares where they are mixed. The fingerprint changes
    with all that decides which prompts there are; to skip bad rows from now on changes none of those before.
    """

    def __init__(
        self,
        parts: Sequence[_Part],
        tokenizer: ChatTokenizer,
        *,
        template: str | None,
        config: PromptConfig,
        weights: tuple[float, ...] | None = None,
    ):
        self.sizes, self.weights = tuple(map(len, parts)), weights
        self.max_prompt_length, self.skip_bad = config.max_prompt_length, config.on_bad_row == "skip"
        self._parts, self._ends = tuple(parts), list(itertools.accumulate(self.sizes))
        self._tokenizer, self._template, self._system = tokenizer, template, config.system
        made_by = [
            tokenizer.encode(string.printable),
            sorted(tokenizer.special_tokens.items()),
            template,
            config.system,
        ]
        contents = [part.fingerprint for part in parts]
        self.fingerprint = digest([contents, made_by, self.max_prompt_length, weights])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Prompt:
        """Raises BadRow, "path:line: why", for a row without a prompt, TooLong for one that is to be left out."""
        part, row = self._place(index)
        try:
            values = part.rows[row]
            record = normalize_prompt(values, format=part.config.format)
            messages = _with_system(record.prompt, self._system)
            ids = _encode(record, messages, self._tokenizer, self._template)
        except BadRow:
            raise
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{part.rows.where(row)}: {' '.join(str(error).split())}") from error
        if len(ids) > self.max_prompt_length:
            raise TooLong(f"{part.rows.where(row)}: {len(ids)} tokens are more than {self.max_prompt_length}")
        columns = {key: value for key, value in values.items() if key not in _TAKEN}
        if record.answer is not None and columns.get("answer") is None:
            columns["answer"] = record.answer
        return Prompt(ids=ids, prompt=messages, columns=columns, index=index)

    def where(self, index: int) -> str:
        """Where a prompt's row is, as path:line."""
        part, row = self._place(index)
        return part.rows.where(row)

    def _place(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        part = self._parts[number]
        return part, part.row(index - self._ends[number] + len(part))


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to train and to validate on; `report` has a line on each data set."""

    train: PromptSource
    validation: PromptSource | None
    report: tuple[str, ...]


def open_prompts(config: PromptConfig, tokenizer: ChatTokenizer, *, template: str | None, seed: int) -> Prompts:
    """Index the data sets and hold out what is to be held out; only the first row of each is read yet.

    Raises FileNotFoundError and ValueError, in one line that names the data set, for what is missing, empty or bad.
    """
    train, held, report = [], [], []
    for number, source in enumerate(config.train_sources):
        part = _open(source)
        report.append(f"{source.path}: {len(part):,} rows of prompts")
        if config.validation_fraction:
            part, out = _split(part, config.validation_fraction, (seed, number))
            held.append(out)
            report[-1] += f"; {len(out):,} of them held out"
        train.append(part)
    for source in config.validation_sources:
        held.append(_open(source))
        report.append(f"{source.path}: {len(held[-1]):,} rows of prompts to validate on")
    prompts = Prompts(
        train=PromptSource(train, tokenizer, template=template, config=config, weights=config.weights),
        validation=PromptSource(held, tokenizer, template=template, config=config) if held else None,
        report=tuple(report),
    )
    if config.on_bad_row == "error":
        _check_first_rows(prompts)
    return prompts


def gather_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Return the columns of some prompts as lists with a value of each prompt, None where its row has no such key."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def _sources(sources: str | tuple[str | SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    sources = (sources,) if isinstance(sources, str) else sources
    return tuple(SourceConfig(path=source) if isinstance(source, str) else source for source in sources if source)


def _open(source: SourceConfig) -> _Part:
    rows = open_rows(source.path, split=source.split, unit=source.unit)
    contents = []
    for path in data_files(source.path):
        with path.open("rb") as file:
            contents.append(hashlib.file_digest(file, "blake2b").hexdigest())
    content = contents or rows.fingerprint  # that of a Hugging Face data set
    fingerprint = digest([content, source.unit, source.format])
    return _Part(rows=rows, config=source, indices=None, fingerprint=fingerprint)


def _split(part: _Part, fraction: float, seed: tuple[int, int]) -> tuple[_Part, _Part]:
    """Hold out a part of the rows, drawn at random and at least one: return the larger part and the one held out."""
    held = max(1, round(fraction * len(part)))
    if held >= len(part):
        raise ValueError(f"{part.config.path}: holding out {fraction} of {len(part)} rows leaves none")
    order = np.random.default_rng(seed).permutation(len(part))
    kept, out = (
        _Part(
            rows=part.rows,
            config=part.config,
            indices=np.sort(indices),
            fingerprint=digest([part.fingerprint, fraction, seed, name]),
        )
        for name, indices in (("kept", order[held:]), ("held out", order[:held]))
    )
    return kept, out


def _check_first_rows(prompts: Prompts) -> None:
    for source in filter(None, (prompts.train, prompts.validation)):
        for end, size in zip(itertools.accumulate(source.sizes), source.sizes):
            try:
                source[end - size]
            except TooLong:
                continue


def _with_system(prompt: str | tuple[Message, ...], system: str | None) -> str | tuple[Message, ...]:
    if system is None:
        return prompt
    if isinstance(prompt, str):
        raise ValueError("system needs a conversation, and the prompt is plain text")
    has_one = prompt[0]["role"] in ("system", "developer")
    return prompt if has_one else ({"role": "system", "content": system}, *prompt)


def _encode(
    record: PromptRecord, prompt: str | tuple[Message, ...], tokenizer: ChatTokenizer, template: str | None
) -> tuple[int, ...]:
    """Return the ids up to where the answer begins, or goes on where an assistant's message ends the prompt.

    Raises ValueError for a prompt without tokens, and for tools that the template leaves out.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_bos=tokenizer.adds_bos)
    else:
        begun = prompt[-1]["role"] == "assistant"
        ids = encode_chat(
            tokenizer,
            prompt,
            template=template,
            tools=record.tools,
            add_generation_prompt=not begun,
            continue_final_message=begun,
        )
    if not ids:
        raise ValueError("the prompt has no tokens")
    text = tokenizer.decode(ids) if record.tools else ""
    for tool in record.tools or ():
        name = tool["function"]["name"]
        if name not in text and name.isascii():  # others may be written in escapes
            raise ValueError(f"the chat template leaves out tools, here of {name!r}")
    return tuple(ids)
