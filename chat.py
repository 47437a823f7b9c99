"""Talk to a model in the terminal: python chat.py --ckpt_dir DIR."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from utils import cli

HELP = """\
/help   this list          /clear  forget the conversation (so does Enter on an empty line)
/stats  tokens and speed   /quit   leave (so do the end of input, and the bare words)
think: QUESTION  asks the model to think before it answers; thoughts are shown dimmed
Ctrl-C  stops an answer and keeps the conversation"""


def chat(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    system: str | None = None,
    template: str | None = None,
    max_new_tokens: int = 512,
    preset: str = "standard",
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    max_consecutive_newlines: int | None = None,
    banned_tokens: tuple[str, ...] = (),
    stop: tuple[str, ...] = (),
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Talk to a LLaMA-family model in the terminal. /help lists the commands.

    Where standard input is not a terminal, each line is a message and each answer goes to standard output.
    When the context is full, the oldest questions and answers are dropped, and it is said so.

    Args:
        ckpt_dir: Folder (or llama2.c file) of a checkpoint: Hugging Face, Meta or llama2.c. By default the model that
            `make quickstart` has made.
        tokenizer_path: Tokenizer file or folder, where it is not in ckpt_dir.
        system: System message.
        template: Chat template, a file or one of llama2, llama3, chatml, qa; by default the checkpoint's own, else one
            that fits its special tokens.
        max_new_tokens: Most tokens in an answer.
        preset: standard, creative or conservative: starting values for the sampling flags below.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_p: Draw from the likeliest tokens that together hold this probability.
        top_k: Draw from this many likeliest tokens.
        min_p: Draw from tokens at least this many times as likely as the likeliest one.
        repetition_penalty: Above 1 makes tokens that have occurred less likely.
        max_consecutive_newlines: No run of newlines grows longer than this.
        banned_tokens: A token id, or the text of a single token, that is never drawn; may be repeated, or a JSON list.
        stop: A string that ends an answer and is left out of it. Backslash-n is a newline. May be repeated, or a JSON
            list.
        seed: Seed of the random draws.
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, else bfloat16.
        device: cpu, gpu, tpu, or auto: the best that is there.
    """
    from functools import partial

    from data.chat import CHAT_TEMPLATES, choose_template, encode_chat
    from inference import setup, text
    from inference.chat import ChatSession
    from inference.completion import Request

    flags = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_consecutive_newlines": max_consecutive_newlines,
    }
    sampling = setup.sampling_params(preset, flags)
    model, tokenizer = setup.load(ckpt_dir, tokenizer_path, dtype=dtype, device=device)
    source = choose_template(tokenizer, template)
    stop = tuple(s.replace("\\n", "\n").replace("\\t", "\t") for s in stop)
    if source == CHAT_TEMPLATES["qa"]:
        stop = (*stop, "\nQuestion:")
    vocab = model.config.vocab_size
    request = Request(
        max_new_tokens=max_new_tokens,
        sampling=setup.with_banned(sampling, banned_tokens, tokenizer, vocab),
        stop_ids=tokenizer.stop_ids,
        seed=seed,
        newlines=text.newline_table(tokenizer, vocab) if max_consecutive_newlines else None,
    )
    encode = partial(encode_chat, tokenizer, template=source, add_generation_prompt=True)
    opening = [] if system is None else [{"role": "system", "content": system}]
    session = ChatSession(
        model, tokenizer, lambda m, **variables: encode(m, variables=variables), request, opening=opening, stop=stop
    )
    _talk(session, switchable="enable_thinking" in source or "open_thinking" in source)


def _talk(session, *, switchable: bool) -> None:
    """Read lines and answer them until the end. `switchable`: the template itself can ask for thinking."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("/help lists the commands", file=sys.stderr)
    while True:
        line = _read_line(terminal)
        command = "quit" if line is None else line.strip().removeprefix("/").lower()
        if line is None or (command in ("quit", "exit") and line.strip().lower() in ("/quit", "quit", "/exit", "exit")):
            return
        if command == "help":
            print(HELP, file=sys.stderr)
        elif command == "clear" or not line.strip():
            session.clear()
            if terminal or line.strip():
                print("(new conversation)", file=sys.stderr)
        elif command == "stats":
            print(_stats(session), file=sys.stderr)
        elif line.startswith("/"):
            print(f"no such command: {line.strip()}; /help lists them", file=sys.stderr)
        else:
            _answer(session, line, switchable)


def _read_line(terminal: bool) -> str | None:
    """The next line without its end, or None at the end of input."""
    try:
        if terminal:
            return input("> ")
        line = sys.stdin.buffer.readline().decode()
        return line.rstrip("\r\n") if line else None
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error.reason}") from None


def _answer(session, line: str, switchable: bool) -> None:
    think = line.lower().startswith("think:")
    question = line[len("think:") :].strip() if think else line
    if not question:
        print("think: goes in front of a question", file=sys.stderr)
        return
    begin_with = "<think>\n" if think and not switchable else ""
    screen = _Screen(dim=sys.stdout.isatty())
    try:
        with _interruptible() as interrupted:
            answer = session.ask(question, begin_with=begin_with, enable_thinking=think, open_thinking=think)
            for piece in answer:
                screen.show(piece if screen.begun else session.opened_thought + piece)
                if interrupted():
                    answer.close()
                    break
    except ValueError as error:
        print(f"chat.py: {error}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        screen.end()
        raise
    screen.end()
    if interrupted():
        print("(stopped)", file=sys.stderr)
    elif session.stats.finish_reason == "length":
        print("(the answer reached its limit of tokens)", file=sys.stderr)
    if session.stats is not None and session.stats.dropped_turns:
        turns = "turn was" if session.stats.dropped_turns == 1 else f"{session.stats.dropped_turns} turns were"
        print(f"(the context is full: the oldest {turns} dropped)", file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator:
    """While inside, Ctrl-C only sets a flag; a second one interrupts for good."""
    pressed = []

    def note(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class _Screen:
    """Prints an answer as it comes, what is between <think> and </think> dimmed where `dim` is set."""

    def __init__(self, *, dim: bool):
        self.dim, self.begun, self._held, self._thinking = dim, False, "", False

    def show(self, piece: str) -> None:
        self.begun = True
        text, self._held = self._held + piece, ""
        while text:
            mark = "</think>" if self._thinking else "<think>"
            at = text.find(mark)
            if at < 0:
                held = next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
                self._print(text[: len(text) - held])
                self._held = text[len(text) - held :]
                return
            self._print(text[: at + (len(mark) if self._thinking else 0)])
            if not self._thinking:
                self._thinking = True
                self._print(mark)
            else:
                self._thinking = False
            text = text[at + len(mark) :]

    def _print(self, text: str) -> None:
        if text:
            print(f"\x1b[2m{text}\x1b[0m" if self.dim and self._thinking else text, end="", flush=True)

    def end(self) -> None:
        self._print(self._held)
        print(flush=True)


def _stats(session) -> str:
    if session.stats is None:
        return "nothing has been asked yet"
    s = session.stats
    rate = (s.generated - 1) / max(s.seconds - s.seconds_to_first_token, 1e-9)
    return (
        f"last answer: {s.generated} tokens, first after {s.seconds_to_first_token:.2f} s, then {rate:.1f} tokens/s; "
        f"{s.prefilled} tokens prefilled, {s.reused} reused from the cache"
    )


if __name__ == "__main__":
    cli.run(chat)
