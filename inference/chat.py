"""A conversation with a model whose cache is kept between turns, so that only new tokens are prefilled."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inference.completion import Request, begin_rows, buffer_size, cache_size, pieces, sample_keys
from inference.decode import new_cache, prefill
from inference.text import StopStrings
from models.llama import LLaMa
from models.llama.tokenizer import Tokenizer
from utils import kvcache
from utils.kvcache import KVCache

Message = Mapping[str, Any]
_THOUGHT_TOKENS = 16  # of a prompt's end that are searched for an open <think>

Encode = Callable[..., list[int]]  # encode(messages, **variables): ids up to where the answer begins


@dataclass(frozen=True, kw_only=True)
class TurnStats:
    """What one answer took. `prefilled` counts the tokens run through the network before the first new one,
    `reused` those that the cache already held; `dropped_turns` the old questions that had to go; seconds are wall time.
    """

    prefilled: int
    reused: int
    generated: int
    dropped_turns: int
    seconds_to_first_token: float
    seconds: float
    finish_reason: str


class ChatSession:
    """One conversation. `ask` streams an answer and takes it into `messages`; `clear` begins anew.

    `encode(messages, **variables)` gives the ids of a conversation up to where the answer begins, as
    `data.chat.encode_chat` with its template and add_generation_prompt does. `opening` messages (a system message) are
    never dropped. When the conversation outgrows the context, the oldest turns are, a question with its answers at a
    time, until it fills no more than half of it, so that the next turns can go on from the cache again.
    """

    def __init__(
        self,
        model: LLaMa,
        tokenizer: Tokenizer,
        encode: Encode,
        request: Request,
        *,
        opening: Sequence[Message] = (),
        stop: Sequence[str] = (),
    ):
        self.model, self.tokenizer, self.encode, self.request = model, tokenizer, encode, request
        self.opening, self.stop = list(opening), tuple(stop)
        StopStrings(self.stop)  # raises where one is empty
        self.turns = 0
        self.opened_thought = ""  # what the template itself wrote of a thought that the last answer goes on with
        self.stats: TurnStats | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all but the opening messages."""
        self.messages: list[Message] = list(self.opening)
        self._cache: KVCache | None = None
        self._ids: list[int] = []  # a beginning of them is in the cache
        # How `encode` wrote the last prompt, what was run for it, with answers as they were drawn, and its answer.
        self._plain: list[int] = []
        self._asked: list[int] = []
        self._said: list[int] = []

    def ask(self, question: str, *, begin_with: str = "", **variables: Any) -> Generator[str, None, TurnStats]:
        """Stream the answer to a question; closing the generator stops it and keeps what was said.

        `begin_with` is put into the model's mouth. `variables` go to the template.
        Raises ValueError, with the conversation unchanged, where the question does not fit the context by itself.
        """
        started = time.perf_counter()
        begin_ids = self.tokenizer.encode(begin_with)
        asked = [*self.messages, {"role": "user", "content": question}]
        kept, dropped, plain, ids = self._fit(asked, variables, begin_ids)
        last_BD, prefilled = self._prefill(ids)
        context = self.model.config.max_text_length
        state, rules, stop_E = begin_rows(
            self.model,
            self._cache,
            last_BD,
            [ids],
            self.request,
            keys_B=sample_keys(self.request.seed, [self.turns + 1], [0]),
            limit_B=np.array([min(self.request.max_new_tokens, context - len(ids))], np.int32),
            buffer=buffer_size(self.model, self.request),
        )
        self.messages, self._cache = kept, state.cache
        self._plain, self._asked, self._said = plain, ids[: len(ids) - len(begin_ids)], begin_ids
        prompt_end = self.tokenizer.decode(self._asked[-_THOUGHT_TOKENS:])
        opened = prompt_end.rfind("<think>")
        self.opened_thought = prompt_end[opened:] if opened > prompt_end.rfind("</think>") else ""
        self.turns += 1
        watch, decoder = StopStrings(self.stop), self.tokenizer.decoder(skip_special=True, continuation=True)
        said, answer = [begin_with], []
        first = time.perf_counter() - started
        try:
            if begin_with:
                yield begin_with
            for new, reached in pieces(self.model, state, rules, stop_E):
                answer += new
                self._cache, self._ids, self._said = reached.cache, ids + answer, begin_ids + answer
                shown = "".join(watch.push("" if t in self.request.stop_ids else decoder.push(t)) for t in new)
                said.append(shown)
                yield shown  # even where there is nothing to show, so that the caller may stop here
                if watch.found:
                    break
            said.append("" if watch.found else watch.push(decoder.flush()) + watch.flush())
            if said[-1]:
                yield said[-1]
        finally:  # also where the answer is stopped by closing the generator
            self.messages.append({"role": "assistant", "content": "".join(said)})
            ended = watch.found or (bool(answer) and answer[-1] in self.request.stop_ids)
            self.stats = TurnStats(
                prefilled=prefilled,
                reused=len(ids) - prefilled,
                generated=len(answer),
                dropped_turns=dropped,
                seconds_to_first_token=first,
                seconds=time.perf_counter() - started,
                finish_reason="stop" if ended else "length",
            )
        return self.stats

    def _fit(
        self, messages: list[Message], variables: Mapping, begin_ids: list[int]
    ) -> tuple[list[Message], int, list[int], list[int]]:
        """The messages that leave room for an answer, how many turns had to go for it, their ids as `encode` has them,
        and their ids as they are to be run, with `begin_ids` behind them.
        """
        context = self.model.config.max_text_length
        reserve = min(self.request.max_new_tokens, context // 4)
        dropped, first = 0, len(self.opening)
        while True:
            plain = self.encode(messages, **variables)
            ids = (plain if dropped else self._as_drawn(plain)) + begin_ids
            if len(ids) + reserve <= context and (not dropped or len(ids) <= context // 2):
                return messages, dropped, plain, ids
            questions = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"]
            if len(questions) < 2:
                if len(ids) < context:
                    return messages, dropped, plain, ids
                raise ValueError(f"{len(ids)} tokens do not fit the context of {context}: say it shorter")
            messages, dropped = messages[:first] + messages[questions[1] :], dropped + 1

    def _as_drawn(self, plain: list[int]) -> list[int]:
        """The ids of a conversation, with its answers in the tokens they were drawn in rather than in those that their
        text encodes to, wherever the template writes them out unchanged.
        """
        before, stops = len(self._plain), self.request.stop_ids
        if not self._plain or plain[:before] != self._plain:
            return plain
        end = next((i for i in range(before, len(plain)) if plain[i] in stops), before)
        said = self._said[:-1] if self._said and self._said[-1] in stops else self._said
        unchanged = self.tokenizer.decode(said) == self.tokenizer.decode(plain[before:end])
        return self._asked + (said + plain[end:] if unchanged else plain[before:])

    def _prefill(self, ids: list[int]):
        """Bring the cache to hold all of the ids; returns the last hidden state and how many tokens were run."""
        if self._cache is not None and self._cache.k_LBKSH.is_deleted():  # donated to a step that was interrupted
            self._cache = None
        held = 0 if self._cache is None else int(self._cache.length_B[0])
        limit = min(held, len(ids) - 1)
        same = next((i for i in range(limit) if ids[i] != self._ids[i]), limit)
        capacity = cache_size(self.model, len(ids), self.request)
        if self._cache is None:
            cache = new_cache(self.model, 1, capacity)
        else:
            cache = kvcache.reset(self._cache, length_B=same)
            if cache.capacity < capacity:
                cache = kvcache.resize(cache, capacity)
        self._cache = None  # donated below, or, where it was copied, no longer needed
        last_BD, self._cache = prefill(self.model, cache, [ids[same:]], from_empty=same == 0)
        self._ids = list(ids)
        return last_BD, len(ids) - same
