"""Prompts for reinforcement learning, with what reward functions get to know of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.chat import encode_chat
from data.chat_guard import ChatTokenizer
from data.records import PromptRecord, normalize_prompt
from data.records_messages import Message
from data.row_sources import (
    Kind,
    Part,
    RowsConfig,
    RowSource,
    TooLong,
    check_first_rows,
    naming_row,
    open_parts,
    with_system,
)
from data.store import digest

__all__ = ["Prompt", "PromptConfig", "PromptSource", "Prompts", "gather_columns", "open_prompts"]

# Names of what reward functions get beside the columns.
_TAKEN = frozenset({"prompt", "prompts", "completion", "completions", "completion_ids"})


@dataclass(frozen=True, kw_only=True)
class PromptConfig(RowsConfig):
    """What is asked in training and in validation. `validation`, or a `validation_fraction` of each training set, held
    out.

    Prompts of more than `max_prompt_length` tokens are left out, never cut. `chat_template` is a built-in name or a
    file, by default the tokenizer's own. `system` is put in front of conversations without a system message.
    """


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


class PromptSource(RowSource):
    """Prompts by number; those that are too long raise TooLong."""

    unit = "prompts"

    def __init__(
        self,
        parts: Sequence[Part],
        tokenizer: ChatTokenizer,
        *,
        template: str | None,
        config: PromptConfig,
        weights: tuple[float, ...] | None = None,
    ):
        super().__init__(parts, config=config, weights=weights)
        self._tokenizer, self._template = tokenizer, template
        self.fingerprint = digest([*self._made_by(tokenizer, template), self.max_prompt_length, weights])

    def __getitem__(self, index: int) -> Prompt:
        part, row, _ = self._place(index)
        with naming_row(part.rows, row):
            values = part.rows[row]
            record = normalize_prompt(values, format=part.config.format)
            messages = with_system(record.prompt, self._system)
            ids = _encode(record, messages, self._tokenizer, self._template)
        if len(ids) > self.max_prompt_length:
            raise TooLong(f"{part.rows.where(row)}: {len(ids)} tokens are more than {self.max_prompt_length}")
        columns = {key: value for key, value in values.items() if key not in _TAKEN}
        if record.answer is not None and columns.get("answer") is None:
            columns["answer"] = record.answer
        return Prompt(ids=ids, prompt=messages, columns=columns, index=index)


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
    train, held, report = open_parts(config, seed=seed, kind=lambda rows, source: Kind("prompts"))
    prompts = Prompts(
        train=PromptSource(train, tokenizer, template=template, config=config, weights=config.weights),
        validation=PromptSource(held, tokenizer, template=template, config=config) if held else None,
        report=report,
    )
    if config.on_bad_row == "error":
        check_first_rows(prompts.train, prompts.validation)
    return prompts


def gather_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Return the columns of some prompts as lists with a value of each prompt, None where its row has no such key."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


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
