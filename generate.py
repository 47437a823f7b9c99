"""Continue prompts from the command line: python generate.py --ckpt_dir DIR --prompt "Once upon a time"."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from utils import cli
from utils.cli import UsageError


def generate(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    prompt: str | None = None,
    prompts_file: str | None = None,
    output: str | None = None,
    max_new_tokens: int = 256,
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
    n: int = 1,
    logprobs: bool = False,
    stream: bool = False,
    chat: bool = False,
    system: str | None = None,
    echo: bool = False,
    batch_size: int = 16,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Continue prompts with a LLaMA-family model.

    Prompts come from --prompt, from --prompts_file, or from standard input. Completions go to standard output and
    nothing else does; progress and speed go to standard error.

    Args:
        ckpt_dir: Folder (or llama2.c file) of a checkpoint: Hugging Face, Meta or llama2.c. By default the model that
            `make quickstart` has made.
        tokenizer_path: Tokenizer file or folder, where it is not in ckpt_dir.
        prompt: The text to continue.
        prompts_file: A prompt a line, or JSON lines with "prompt" or "messages" (and "tools") each; - is standard
            input.
        output: Write JSON lines to this file instead of text to standard output: prompt (or messages) and whatever
            else its row has, completion, token_ids, finish_reason (stop or length), and with --logprobs logprobs.
        max_new_tokens: Most tokens in a completion.
        preset: standard, creative or conservative: starting values for the sampling flags below.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_p: Draw from the likeliest tokens that together hold this probability.
        top_k: Draw from this many likeliest tokens.
        min_p: Draw from tokens at least this many times as likely as the likeliest one.
        repetition_penalty: Above 1 makes tokens that have occurred less likely.
        max_consecutive_newlines: No run of newlines grows longer than this.
        banned_tokens: A token id, or the text of a single token, that is never drawn; may be repeated, or a JSON list.
        stop: A string that ends a completion and is left out of it. Backslash-n is a newline. May be repeated, or a
            JSON list.
        seed: Seed of the random draws. A row's draws depend on the seed and its number, not on the batch.
        n: Completions for each prompt.
        logprobs: Add the natural-log probabilities of the tokens, under softmax(logits / temperature), to --output.
        stream: Print each completion as it is made, one prompt after the other.
        chat: Take each prompt as a user's message and put it through the model's chat template.
        system: System message in front of each prompt, with --chat.
        echo: Print the prompt in front of each completion.
        batch_size: Completions made at a time.
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, else bfloat16.
        device: cpu, gpu, tpu, or auto: the best that is there.
    """
    if prompt is not None and prompts_file is not None:
        raise UsageError("give --prompt or --prompts_file, not both")
    if stream and (output is not None or n > 1):
        raise UsageError("--stream prints one completion of each prompt: it goes with neither --output nor --n")
    if logprobs and output is None:
        raise UsageError("--logprobs are written to --output: give it a file")
    if system is not None and not chat:
        raise UsageError("--system goes with --chat")
    for flag, value in {"batch_size": batch_size, "n": n, "max_new_tokens": max_new_tokens}.items():
        if value < 1:
            raise UsageError(f"--{flag} must be at least 1, not {value}")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise UsageError(f"--output {output}: its folder does not exist")
    if output is not None and (not output or Path(output).is_dir()):
        raise UsageError(f"--output must name a file, not {output!r}")
    rows = _read_prompts(prompt, prompts_file)

    from inference import setup, text
    from inference.completion import Request

    values = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_consecutive_newlines": max_consecutive_newlines,
    }
    sampling = setup.sampling_params(preset, values)
    model, tokenizer = setup.load(ckpt_dir, tokenizer_path, dtype=dtype, device=device)
    prompt_ids = [_encode(row, tokenizer, chat, system) for row in rows]
    for row, ids in zip(rows, prompt_ids):
        _check_room(row, ids, model.config.max_text_length)
    newlines = text.newline_table(tokenizer, model.config.vocab_size) if max_consecutive_newlines else None
    request = Request(
        max_new_tokens=max_new_tokens,
        sampling=setup.with_banned(sampling, banned_tokens, tokenizer, model.config.vocab_size),
        stop_ids=tokenizer.stop_ids,
        num_samples=n,
        seed=seed,
        logprobs=logprobs,
        newlines=newlines,
    )
    stop = tuple(s.replace("\\n", "\n").replace("\\t", "\t") for s in stop)
    if any(_is_chat(row, chat) for row in rows):
        stop = _with_own_stops(stop, tokenizer)
    started = time.perf_counter()
    if stream:
        tokens = _stream(model, tokenizer, rows, prompt_ids, request, stop, echo)
    else:
        results = text.complete(model, tokenizer, prompt_ids, request, stop=stop, batch_size=batch_size)
        tokens = _write(rows, results, output, echo, logprobs, n)
    seconds = time.perf_counter() - started
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s with compilation", file=sys.stderr)


def _read_prompts(prompt: str | None, prompts_file: str | None) -> list[dict[str, Any]]:
    """Rows with "prompt" (text) or "messages" each, and "where" for error messages."""
    if prompt is not None:
        if not prompt:
            raise UsageError("the prompt is empty: give --prompt some text to continue")
        if not _is_unicode(prompt):
            raise UsageError("the prompt is not UTF-8 text")
        return [{"prompt": prompt, "where": "the prompt"}]
    if prompts_file in (None, "-"):
        if prompts_file is None and sys.stdin.isatty():
            raise UsageError("no prompt: give --prompt, --prompts_file, or text on standard input")
        name, data = "standard input", sys.stdin.buffer.read()
    else:
        name, data = prompts_file, Path(prompts_file).read_bytes()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    numbered = [(f"{name}:{i}", line.rstrip("\r")) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UsageError(f"{name} holds no prompt")
    if name.endswith((".jsonl", ".json")) or _is_json_object(numbered[0][1]):
        return [_read_json_row(line, where) for where, line in numbered]
    return [{"prompt": line, "where": where} for where, line in numbered]


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _read_json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise UsageError(f'{where}: a row must be an object with either "prompt" or "messages"')
    if not _is_unicode(json.dumps(row, ensure_ascii=False)):
        raise UsageError(f"{where}: half of a surrogate pair is no text")
    if "prompt" in row and not (isinstance(row["prompt"], str) and row["prompt"]):
        raise UsageError(f"{where}: the prompt must be a text that is not empty")
    if "messages" in row and not (isinstance(row["messages"], list) and row["messages"]):
        raise UsageError(f"{where}: the messages must be a list that is not empty")
    return row | {"where": where}


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold the text. Undecodable bytes of a command line and escapes of JSON may be beyond it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _encode(row: dict[str, Any], tokenizer, chat: bool, system: str | None) -> list[int]:
    if not _is_chat(row, chat):
        if row.get("tools"):
            raise UsageError(f"{row['where']}: tools go with messages, or with --chat")
        return tokenizer.encode(row["prompt"], add_bos=tokenizer.adds_bos)
    from data.chat import choose_template, encode_chat

    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    if system is not None:
        if isinstance(messages[0], dict) and messages[0].get("role") == "system":
            raise UsageError(f"{row['where']} has a system message of its own: leave out --system")
        messages = [{"role": "system", "content": system}, *messages]
    try:
        return encode_chat(
            tokenizer,
            messages,
            template=choose_template(tokenizer),
            tools=row.get("tools"),
            add_generation_prompt=True,
        )
    except ValueError as error:
        raise UsageError(f"{row['where']}: {error}") from None


def _is_chat(row: dict[str, Any], chat: bool) -> bool:
    return chat or "messages" in row


def _with_own_stops(stop: tuple[str, ...], tokenizer) -> tuple[str, ...]:
    """The stop strings with those of a chat format whose turns are plain text."""
    from data.chat import CHAT_TEMPLATES, choose_template

    return (*stop, "\nQuestion:") if choose_template(tokenizer) == CHAT_TEMPLATES["qa"] else stop


def _check_room(row: dict[str, Any], ids: list[int], context: int) -> None:
    if len(ids) >= context:
        raise UsageError(f"{row['where']} has {len(ids)} tokens, but the model's context holds {context}: shorten it")


def _stream(model, tokenizer, rows, prompt_ids, request, stop, echo: bool) -> int:
    """Print completions as they are made; returns the number of new tokens."""
    from inference import text

    tokens = 0
    for number, (row, ids) in enumerate(zip(rows, prompt_ids)):
        print(_echoed(row) if echo else "", end="", flush=True)
        pieces = text.stream(model, tokenizer, ids, request, stop=stop, number=number)
        while True:
            try:
                print(next(pieces), end="", flush=True)
            except StopIteration as end:
                tokens += len(end.value.completion.token_ids)
                break
        print(flush=True)
    return tokens


def _write(rows, results, output: str | None, echo: bool, logprobs: bool, n: int) -> int:
    """Print completions, or write them to a file, as their batches are finished; returns the number of new tokens."""
    tokens = 0
    with open(output, "w", encoding="utf-8") if output else nullcontext(sys.stdout) as file:
        for row, samples in zip(rows, _with_bar(results, len(rows))):
            for sample in samples:
                tokens += len(sample.completion.token_ids)
                if output:
                    print(json.dumps(_record(row, sample, logprobs), ensure_ascii=False), file=file)
                else:
                    print((_echoed(row) if echo else "") + sample.text, file=file)
            file.flush()
    return tokens


def _record(row: dict[str, Any], sample, logprobs: bool) -> dict[str, Any]:
    done = sample.completion
    record = {key: value for key, value in row.items() if key != "where"}
    record |= {"completion": sample.text, "token_ids": done.token_ids, "finish_reason": done.finish_reason}
    return record | ({"logprobs": [round(x, 6) for x in done.logprobs]} if logprobs else {})


def _echoed(row: dict[str, Any]) -> str:
    return row["prompt"] if "prompt" in row else f"{row['messages'][-1].get('content', '')}\n"


def _with_bar(results: Iterator, total: int) -> Iterator:
    """The results behind a progress bar on standard error, where there is more than one and a terminal to draw on."""
    if total < 2 or not sys.stderr.isatty():
        yield from results
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(results, description="prompts", total=total, console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    cli.run(generate)
