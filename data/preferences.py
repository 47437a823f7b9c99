"""Preferences: prompts with two answers, of which one is better, or with one that is wanted or is not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.chat import encode_chat
from data.chat_spans import SpanTokenizer
from data.datasets import SourceConfig
from data.examples import tokenize
from data.readers import Rows
from data.records import (
    ChatRecord,
    CompletionRecord,
    PreferenceRecord,
    UnpairedRecord,
    normalize_preference,
)
from data.records_messages import Message
from data.row_sources import (
    Kind,
    Part,
    RowsConfig,
    RowSource,
    check_first_rows,
    naming_row,
    open_parts,
    with_system,
)
from data.store import digest

__all__ = ["Preference", "PreferenceConfig", "PreferenceSource", "Preferences", "open_preferences"]

_Record = PreferenceRecord | UnpairedRecord

_PAIRS = Kind("pairs")
_EXAMPLES = Kind("examples")
_SPLIT_PAIRS = Kind("pairs, two examples each", per_row=2)

# The records of each kind, and what is wrong with a row that is another.
_EXPECTED = {
    _PAIRS: (PreferenceRecord, "an answer with a label is an unpaired preference; chosen and rejected are needed"),
    _EXAMPLES: (UnpairedRecord, "chosen and rejected in a data set that begins with an unpaired preference"),
    _SPLIT_PAIRS: (PreferenceRecord, "an unpaired preference in a data set that begins with chosen and rejected"),
}


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(RowsConfig):
    """What is preferred in training and in validation. `validation`, or a `validation_fraction` of each training set,
    held out.

    Of a prompt the last `max_prompt_length` tokens are kept, of a completion the first `max_completion_length`.
    `chat_template` is a built-in name or a file, by default the tokenizer's own. `system` is put in front of
    conversations without a system message.
    """

    max_completion_length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be positive, not {self.max_completion_length}")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A prompt and what followed it: the chosen completion and the rejected one, or a single one.

    The prompt is all tokens that the completions have in common before what is learnt begins, and those that the
    template itself writes where the assistant is to speak; so TRL has it. What is left of a prompt, where the rest of
    two differs, is in front of the completions.
    masks has True for what the assistant writes, the token that ends its turn included. margin says by how much the
    chosen completion is better, where the row does; desirable, of a single one, whether it is wanted. cut counts the
    tokens that were cut from the prompt and from each completion. `source[index]` gives the same preference again.
    """

    prompt_ids: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    masks: tuple[tuple[bool, ...], ...]
    margin: float | None
    desirable: bool | None
    index: int
    cut: tuple[int, ...]


class PreferenceSource(RowSource):
    """Preferences by number: pairs, or examples of single completions, two of each row that is a pair."""

    def __init__(
        self,
        parts: Sequence[Part],
        tokenizer: SpanTokenizer,
        *,
        template: str | None,
        config: PreferenceConfig,
        paired: bool,
        whole: bool = False,
        weights: tuple[float, ...] | None = None,
    ):
        super().__init__(parts, config=config, weights=weights)
        self.unit, self.max_completion_length = "pairs" if paired else "examples", config.max_completion_length
        self._tokenizer, self._template, self._paired, self._whole = tokenizer, template, paired, whole
        limits = [self.max_prompt_length, self.max_completion_length]
        kinds = [part.kind for part in parts]
        self.fingerprint = digest([*self._made_by(tokenizer, template), limits, kinds, whole, weights])

    def __getitem__(self, index: int) -> Preference:
        part, row, which = self._place(index)
        with naming_row(part.rows, row):
            record = normalize_preference(part.rows[row], format=part.config.format)
            _check(record, part.kind)
            prompt, answers = with_system(record.prompt, self._system), _answers(record)
            if not self._paired:
                answers = answers[which : which + 1]
            encoded = [self._encode(prompt, answer, record) for answer in answers]
            start = max(_common(each.ids[: each.start] for each in encoded), self._opened(prompt, record, encoded))
            margin = record.margin if isinstance(record, PreferenceRecord) and self._paired else None
            desirable = None if self._paired else answers[0].desirable
            return self._cut(encoded, start, margin=margin, desirable=desirable, index=index)

    def tally(self, item: Preference) -> tuple[int, ...]:
        """Items; prompts that were cut, and by how many tokens; completions that were, and by how many."""
        prompt, *completions = item.cut
        return 1, int(prompt > 0), prompt, sum(tokens > 0 for tokens in completions), sum(completions)

    def summary(self, tally: tuple[int, ...]) -> str:
        """A line on how much was cut."""
        items, prompts, prompt_tokens, completions, completion_tokens = tally or (0,) * 5
        parts = []
        if prompts:
            parts.append(
                f"{prompts:,} of {items:,} prompts cut by {prompt_tokens:,} tokens to their last "
                f"{self.max_prompt_length:,}"
            )
        if completions:
            parts.append(
                f"{completions:,} of {items * (1 + self._paired):,} completions cut by {completion_tokens:,} tokens to "
                f"their first {self.max_completion_length:,}"
            )
        return f"{self.unit}: {', '.join(parts)}" if parts else ""

    def _encode(self, prompt: tuple[Message, ...] | str, answer: _Answer, record: _Record) -> _Encoded:
        """Return the tokens of a prompt with one answer. Raises ValueError where nothing of them is to be learnt."""
        if isinstance(prompt, str):
            whole = CompletionRecord(prompt=prompt, completion=answer.said)
        else:
            whole = ChatRecord(messages=(*prompt, *answer.said), tools=record.tools, learn_from=len(prompt))
        example = tokenize(whole, self._tokenizer, template=self._template)
        ids, mask = tuple(example.tokens.tolist()), tuple(example.mask.tolist())
        if True not in mask:
            raise ValueError(f"{answer.name} has no tokens to learn")
        end = len(mask) if self._whole else len(mask) - mask[::-1].index(True)
        return _Encoded(answer.name, ids[:end], mask[:end], mask.index(True))

    def _opened(self, prompt: tuple[Message, ...] | str, record: _Record, encoded: list[_Encoded]) -> int:
        """Return how many tokens all begin with as the template would have the assistant go on from the prompt.

        An empty room for reasoning may be among them, which the assistant is then not asked to write.
        """
        if isinstance(prompt, str) or prompt[-1]["role"] == "assistant":
            return 0
        asked = encode_chat(
            self._tokenizer, prompt, template=self._template, tools=record.tools, add_generation_prompt=True
        )
        return _common([asked, *(each.ids for each in encoded)])

    def _cut(self, encoded: list[_Encoded], start: int, **other: Any) -> Preference:
        """Part the prompt, the tokens before the start, from the completions, and cut both to their lengths."""
        prompt, M = encoded[0].ids[:start], self.max_completion_length
        if not prompt:
            raise ValueError("the prompt has no tokens")
        for name, _, mask, _ in encoded:
            if True not in mask[start : start + M]:
                raise ValueError(f"{name} has nothing to learn among its first {M} tokens")
        if self._paired and len({each.ids[start : start + M] for each in encoded}) == 1:
            raise ValueError(f"chosen and rejected are equal in their first {M} tokens, so that nothing is preferred")
        cut = [len(prompt) - self.max_prompt_length, *(len(each.ids) - start - M for each in encoded)]
        return Preference(
            prompt_ids=prompt[-self.max_prompt_length :],
            completions=tuple(each.ids[start : start + M] for each in encoded),
            masks=tuple(each.mask[start : start + M] for each in encoded),
            cut=tuple(max(0, tokens) for tokens in cut),
            **other,
        )


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Preferences to train and to validate on; `report` has a line on each data set."""

    train: PreferenceSource
    validation: PreferenceSource | None
    report: tuple[str, ...]


def open_preferences(
    config: PreferenceConfig,
    tokenizer: SpanTokenizer,
    *,
    template: str | None,
    seed: int,
    paired: bool,
    whole: bool = False,
) -> Preferences:
    """Index the data sets and hold out what is to be held out; only the first row of each is read yet.

    Paired data have rows of two answers. Unpaired data have rows of one, or of two, which become two examples; the
    first row of a data set tells which of them it has. What a template writes behind the last answer is kept, not to
    be learnt, if `whole`. Raises FileNotFoundError and ValueError, in one line that names the data set, for what is
    missing, empty or bad.
    """

    def kind(rows: Rows, source: SourceConfig) -> Kind:
        return _PAIRS if paired else _unpaired_kind(rows, source, config.on_bad_row == "skip")

    train, held, report = open_parts(config, seed=seed, kind=kind)
    options = dict(template=template, config=config, paired=paired, whole=whole)
    preferences = Preferences(
        train=PreferenceSource(train, tokenizer, weights=config.weights, **options),
        validation=PreferenceSource(held, tokenizer, **options) if held else None,
        report=report,
    )
    if config.on_bad_row == "error":
        check_first_rows(preferences.train, preferences.validation)
    return preferences


class _Answer(NamedTuple):
    """An answer, and the key of its row that it is under."""

    name: str
    said: tuple[Message, ...] | str
    desirable: bool


class _Encoded(NamedTuple):
    """A prompt with an answer: ids, which are learnt, and the place of the first of these."""

    name: str
    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    start: int


def _unpaired_kind(rows: Rows, source: SourceConfig, skip_bad: bool) -> Kind:
    """Tell by its first row, or the first that is not bad, what a data set has."""
    for row in range(len(rows)):
        try:
            with naming_row(rows, row):
                record = normalize_preference(rows[row], format=source.format)
        except ValueError as error:
            if not skip_bad:
                raise
            last = error
            continue
        return _SPLIT_PAIRS if isinstance(record, PreferenceRecord) else _EXAMPLES
    raise ValueError(f"not one of {len(rows):,} rows can be used, the last: {last}")


def _check(record: _Record, kind: Kind) -> None:
    expected, why = _EXPECTED[kind]
    if not isinstance(record, expected):
        raise ValueError(why)
    if isinstance(record, PreferenceRecord) and record.chosen == record.rejected:
        raise ValueError("chosen and rejected are equal, so that nothing is preferred")


def _answers(record: _Record) -> tuple[_Answer, ...]:
    if isinstance(record, UnpairedRecord):
        return (_Answer("completion", record.completion, record.desirable),)
    return _Answer("chosen", record.chosen, True), _Answer("rejected", record.rejected, False)


def _common(sequences: Iterable[Sequence[int]]) -> int:
    """Return how many tokens all begin with."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*sequences)))
