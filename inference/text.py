"""Completions as text: stop strings, incremental decoding, newline tables."""

import itertools
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass

from inference import completion
from inference.completion import Completion, Request
from models.llama import LLaMa
from models.llama.tokenizer import Tokenizer
from sampling import NewlineTable


@dataclass(frozen=True, kw_only=True)
class TextCompletion:
    """A completion with its text, which holds neither special tokens nor the stop string that ended it."""

    text: str
    completion: Completion


class StopStrings:
    """Watches text that arrives in pieces for the first of some strings, and never lets a part of one through.

    `push` returns the text that is safe to show, `flush` the rest that no stop string came of. Once `found`, nothing
    more is returned.
    """

    def __init__(self, stops: Sequence[str]):
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def push(self, piece: str) -> str:
        if self.found:
            return ""
        text = self._held + piece
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest


def complete(
    model: LLaMa,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    request: Request,
    *,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> Iterator[list[TextCompletion]]:
    """`completion.generate` with text; a completion ends in front of the first of the stop strings too.

    Its token ids then end with the token that completed the stop string.
    """
    StopStrings(stop)
    ends = _stop_finder(tokenizer, prompts, stop, request.stop_ids) if stop else None
    results = completion.generate(model, prompts, request, batch_size=batch_size, ends=ends)

    def texts() -> Iterator[list[TextCompletion]]:
        for prompt, samples in zip(prompts, results):
            shown = [text_of(tokenizer, prompt, c, stop, stop_ids=request.stop_ids) for c in samples]
            yield [TextCompletion(text=text, completion=c) for text, c in zip(shown, samples)]

    return texts()


def stream(
    model: LLaMa,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    request: Request,
    *,
    stop: Sequence[str] = (),
    number: int = 0,
) -> Generator[str, None, TextCompletion]:
    """The text of one completion in pieces as it is drawn; returns the `TextCompletion` (of `yield from`).

    `number` is that of the prompt, for its seed.
    """
    watch, decoder = StopStrings(stop), tokenizer.decoder(skip_special=True, continuation=_has_text(tokenizer, prompt))
    ids: list[int] = []
    shown: list[str] = []
    for token in itertools.chain.from_iterable(completion.stream(model, prompt, request, number=number)):
        ids.append(token)
        shown.append(watch.push("" if token in request.stop_ids else decoder.push(token)))
        if shown[-1]:
            yield shown[-1]
        if watch.found:
            break
    shown.append(watch.push(decoder.flush()) + watch.flush())
    if shown[-1]:
        yield shown[-1]
    stopped = watch.found or ids[-1] in request.stop_ids
    done = Completion(token_ids=ids, finish_reason="stop" if stopped else "length")
    return TextCompletion(text="".join(shown), completion=done)


def text_of(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    done: Completion,
    stop: Sequence[str] = (),
    *,
    stop_ids: Collection[int] = (),
) -> str:
    """The text of a completion behind its prompt."""
    watch = StopStrings(stop)
    ids = [token for token in done.token_ids if token not in stop_ids]  # which need not be special tokens
    text = watch.push(tokenizer.decode(ids, skip_special=True, continuation=_has_text(tokenizer, prompt)))
    return text if watch.found else text + watch.flush()


def newline_table(tokenizer: Tokenizer, vocab_size: int) -> NewlineTable:
    """What each id of a vocabulary of that size holds of newlines; ids that the tokenizer lacks hold none."""
    known = [tokenizer.token_bytes(token) for token in range(min(tokenizer.vocab_size, vocab_size))]
    return NewlineTable.of(known + [b""] * (vocab_size - len(known)))


def _stop_finder(
    tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], stop: Sequence[str], stop_ids: Collection[int]
) -> Callable[[int, list[int]], int | None]:
    """Tells after how many tokens the text of a completion of a prompt holds a stop string, or None.

    Asked every `WATCH_STEPS` tokens, it looks only at so many and at as much text in front of them as a stop string is
    long: what came before has been looked at.
    """
    longest = max(len(string.encode()) for string in stop)
    hidden = {*tokenizer.special_tokens.values(), *stop_ids}

    def tokens_to_keep(number: int, ids: list[int]) -> int | None:
        first, text_bytes = max(0, len(ids) - completion.WATCH_STEPS), 0
        while first > 0 and text_bytes < longest:
            first -= 1
            if ids[first] not in hidden:
                text_bytes += len(tokenizer.token_bytes(ids[first]))
        continuation = first > 0 or _has_text(tokenizer, prompts[number])
        watch, decoder = StopStrings(stop), tokenizer.decoder(skip_special=True, continuation=continuation)
        for count, token in enumerate(ids[first:], first + 1):
            watch.push("" if token in stop_ids else decoder.push(token))
            if watch.found:
                return count
        return None

    return tokens_to_keep


def _has_text(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether anything but special tokens stands in the prompt, so that a completion continues a text."""
    return not set(prompt) <= set(tokenizer.special_tokens.values())
