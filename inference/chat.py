"""A conversation with a model whose cache is kept between turns, so that only new tokens are prefilled."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inference.completion import Request, begin_rows, pieces, sample_keys
from inference.decode import bucket, new_cache, prefill
from inference.text import StopStrings
from models.llama import LLaMa
from models.llama.tokenizer import Tokenizer
from utils import kvcache
from utils.kvcache import KVCache

Message = Mapping[str, Any]
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
    time.
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
        self.turns = 0
        self.stats: TurnStats | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all but the opening messages."""
        self.messages: list[Message] = list(self.opening)
        self._ids: list[int] = []  # of the conversation so far; the cache holds a beginning of them
        self._prompt_length = 0  # of the last prompt, behind which the last answer begins
        self._cache: KVCache | None = None

    def ask(self, question: str, *, begin_with: str = "", **variables: Any) -> Generator[str, None, TurnStats]:
        """Stream the answer to a question; closing the generator stops it and keeps what was said.

        `begin_with` is put into the model's mouth. `variables` go to the template.
        Raises ValueError, with the conversation unchanged, where the question does not fit the context by itself.
        """
        started = time.perf_counter()
        kept, dropped, ids = self._fit([*self.messages, {"role": "user", "content": question}], variables)
        if begin_with:
            ids = ids + self.tokenizer.encode(begin_with)
        last_BD, prefilled = self._prefill(ids)
        self.messages, self._prompt_length = kept, len(ids)
        self.turns += 1
        room = self.model.config.max_position_embeddings - len(ids)
        limit = min(self.request.max_new_tokens, room)
        state, rules, stop_E = begin_rows(
            self.model,
            self._cache,
            last_BD,
            [ids],
            self.request,
            keys_B=sample_keys(self.request.seed, [self.turns], 1),
            limit_B=np.array([limit], np.int32),
            buffer=-(-self.request.max_new_tokens // 32) * 32,
        )
        watch, decoder = StopStrings(self.stop), self.tokenizer.decoder(skip_special=True, continuation=True)
        said, answer = [begin_with], []
        first = time.perf_counter() - started
        if begin_with:
            yield begin_with
        try:
            for new, reached in pieces(self.model, state, rules, stop_E):
                self._cache, self._ids = reached.cache, ids + answer + new
                answer += new
                shown = "".join(watch.push("" if t in self.request.stop_ids else decoder.push(t)) for t in new)
                said.append(shown)
                if shown:
                    yield shown
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

    def _fit(self, messages: list[Message], variables: Mapping) -> tuple[list[Message], int, list[int]]:
        """The messages that leave room for an answer, how many turns had to go for it, and their ids."""
        context = self.model.config.max_position_embeddings
        reserve = min(self.request.max_new_tokens, context // 4)
        dropped, first = 0, len(self.opening)
        while True:
            ids = self._continue(messages, variables) if not dropped else self.encode(messages, **variables)
            if len(ids) + reserve <= context:
                return messages, dropped, ids
            questions = [i for i in range(first, len(messages)) if messages[i]["role"] == "user"]
            if len(questions) < 2:
                if len(ids) < context:
                    return messages, dropped, ids
                raise ValueError(f"{len(ids)} tokens do not fit the context of {context}: say it shorter")
            messages, dropped = messages[:first] + messages[questions[1] :], dropped + 1

    def _continue(self, messages: list[Message], variables: Mapping) -> list[int]:
        """The ids of the conversation, with the last answer in the tokens it was drawn in rather than in those that
        its text encodes to, wherever the template writes that answer out unchanged.
        """
        ids = self.encode(messages, **variables)
        answer_at, said = self._prompt_length, self._ids[self._prompt_length :]
        if not said or ids[:answer_at] != self._ids[:answer_at]:
            return ids
        stops = self.request.stop_ids
        end = next((i for i in range(answer_at, len(ids)) if ids[i] in stops), None)
        if end is None:
            return ids
        drawn = said[:-1] if said[-1] in stops else said
        if self.tokenizer.decode(drawn) != self.tokenizer.decode(ids[answer_at:end]):
            return ids
        return self._ids[:answer_at] + drawn + ids[end:]

    def _prefill(self, ids: list[int]):
        """Bring the cache to hold all of the ids; returns the last hidden state and how many tokens were run."""
        held = 0 if self._cache is None else int(self._cache.length_B[0])
        limit = min(held, len(ids) - 1)
        same = next((i for i in range(limit) if ids[i] != self._ids[i]), limit)
        capacity = -(-(bucket(len(ids)) + self.request.max_new_tokens) // 64) * 64
        capacity = max(len(ids), min(capacity, self.model.config.max_position_embeddings))
        if self._cache is None:
            cache = new_cache(self.model, 1, capacity)
        else:
            cache = kvcache.reset(self._cache, length_B=same)
            if cache.capacity < capacity:
                cache = kvcache.resize(cache, capacity)
        self._cache = None  # donated below; if this is interrupted, the next turn begins with an empty one
        last_BD, self._cache = prefill(self.model, cache, [ids[same:]], from_empty=same == 0)
        self._ids = list(ids)
        return last_BD, len(ids) - same
