"""The program that continues prompts: what its flags do, what it reads and writes, and how it takes bad input."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

import generate
from data.chat import CHAT_TEMPLATES, encode_chat
from inference import setup, text
from inference.completion import Request
from models.llama import load_pretrained, load_tokenizer
from sampling import PRESETS, SamplingParams
from tests.inference.test_text import chain, following_model, write_chat_checkpoint, write_chat_tokenizer, written
from tests.models.llama.checkpoints import edit_json
from utils import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of random weights with a chat template and a context of 256 tokens."""
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_pretrained(folder), load_tokenizer(folder)


@pytest.fixture
def run(folder, capsys, monkeypatch) -> Callable[..., str]:
    """Call the program as its command line would; returns its standard output."""

    def call(*argv: str, stdin: str | bytes = "", ckpt_dir: Path | None = folder) -> str:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        monkeypatch.setattr(sys, "argv", ["generate.py"])
        place = [] if ckpt_dir is None else ["--ckpt_dir", str(ckpt_dir)]
        cli.run(generate.generate, [*place, *argv])
        out, call.stderr = capsys.readouterr()
        assert "tokens/s" in call.stderr.splitlines()[-1]
        return out

    return call


@pytest.fixture
def mistake(run, capsys) -> Callable[..., str]:
    """The one line on standard error that bad input is answered with."""

    def call(*argv: str, **options) -> str:
        with pytest.raises(SystemExit) as end:
            run(*argv, **options)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == "", (end.value.code, out)
        assert err.startswith("generate.py: ") and err.count("\n") == 1, err
        return err.removeprefix("generate.py: ").rstrip("\n")

    return call


def expected(loaded, prompt: str, *, sampling: SamplingParams = PRESETS["standard"], **changes) -> list[str]:
    """The texts that the library makes of one prompt."""
    model, tokenizer = loaded
    stop = changes.pop("stop", ())
    request = Request(
        **{"max_new_tokens": 20, "sampling": sampling, "stop_ids": tokenizer.stop_ids} | changes,
    )
    [samples] = text.complete(model, tokenizer, [tokenizer.encode(prompt)], request, stop=stop)
    return [sample.text for sample in samples]


SHORT = ("--max_new_tokens", "20")


# Output and flags


def test_standard_output_is_the_completion_alone(run, loaded):
    assert run("--prompt", "what is a rope", *SHORT) == expected(loaded, "what is a rope")[0] + "\n"


def test_greedy_and_presets(run, loaded):
    greedy = SamplingParams(temperature=0.0, top_p=0.95)
    assert run("--prompt", "rope", *SHORT, "--temperature", "0") == expected(loaded, "rope", sampling=greedy)[0] + "\n"
    for name, params in PRESETS.items():
        assert run("--prompt", "rope", *SHORT, "--preset", name) == expected(loaded, "rope", sampling=params)[0] + "\n"


@pytest.mark.parametrize(
    ("flags", "sampling", "changes"),
    [
        (["--temperature", "3.5"], {"temperature": 3.5}, {}),
        (["--top_p=0.3", "--temperature=3"], {"top_p": 0.3, "temperature": 3.0}, {}),
        (["--top_k", "2", "--temperature=3"], {"top_k": 2, "temperature": 3.0}, {}),
        (["--min_p", "0.4", "--temperature=3"], {"min_p": 0.4, "temperature": 3.0}, {}),
        (["--repetition_penalty", "4"], {"repetition_penalty": 4.0}, {}),
        (["--seed", "3"], {}, {"seed": 3}),
        (["--max_new_tokens", "7"], {}, {"max_new_tokens": 7}),
        (["--n", "3"], {}, {"num_samples": 3}),
    ],
)
def test_each_sampling_flag_reaches_the_loop(run, loaded, flags, sampling, changes):
    params = SamplingParams(**{"temperature": 0.8, "top_p": 0.95} | sampling)
    length = [] if "--max_new_tokens" in flags else SHORT
    out = run("--prompt", "what is", *length, *flags)
    assert out == "".join(f"{t}\n" for t in expected(loaded, "what is", sampling=params, **changes))
    assert out != run("--prompt", "what is", *SHORT)


def test_flags_overrule_the_preset(run, loaded):
    creative = PRESETS["creative"]
    params = SamplingParams(
        temperature=2.0, min_p=creative.min_p, repetition_penalty=creative.repetition_penalty, top_k=9
    )
    out = run("--prompt", "rope", *SHORT, "--preset=creative", "--temperature=2", "--top_k=9")
    assert out == expected(loaded, "rope", sampling=params)[0] + "\n"


def test_banned_tokens_by_id_by_text_and_by_name(run, tmp_path, loaded):
    _, tokenizer = loaded
    letter = tokenizer.encode("Q")[0]
    model = following_model({letter: letter}, tokenizer.vocab_size)
    folder = write_chat_checkpoint(tmp_path, model=model)
    flags = ("--prompt", "Q", "--max_new_tokens=4", "--temperature=0")
    assert run(*flags, ckpt_dir=folder) == "QQQQ\n"
    for banned in (str(letter), "Q", json.dumps([letter]), '["Q", "x"]'):
        assert "Q" not in run(*flags, "--banned_tokens", banned, ckpt_dir=folder)
    assert run.stderr.startswith("4 tokens")  # all of them the first id, which is <|im_start|>
    assert "Q" not in run(*flags, "--banned_tokens=Q", "--banned_tokens", "<|im_start|>", ckpt_dir=folder)
    assert run.stderr.startswith("1 tokens")  # the second, which ends it


def test_max_consecutive_newlines(run, tmp_path, loaded):
    _, tokenizer = loaded
    [newline], [letter] = tokenizer.encode("\n"), tokenizer.encode("Q")
    folder = write_chat_checkpoint(tmp_path, model=following_model({letter: newline}, tokenizer.vocab_size))
    flags = ("--prompt", "Q", "--max_new_tokens=9", "--temperature=0")
    assert run(*flags, ckpt_dir=folder) == "\n" * 10
    out = run(*flags, "--max_consecutive_newlines=2", ckpt_dir=folder).removesuffix("\n")
    assert "\n\n" in out and "\n\n\n" not in out


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_strings_alone_repeated_as_json_and_with_escapes(run, tmp_path, loaded, streamed):
    _, tokenizer = loaded
    ids = written(tokenizer, "Q", "uvwx\ny\tz")
    folder = write_chat_checkpoint(tmp_path, model=following_model(chain(*ids), tokenizer.vocab_size))
    flags = ["--prompt", "Q", "--max_new_tokens=8", "--temperature=0", *["--stream"] * streamed]
    assert run(*flags, ckpt_dir=folder) == "uvwx\ny\tz\n"
    for stops, shown in (
        (["--stop", "wx"], "uv"),
        (["--stop=zz", "--stop=vw"], "u"),
        (["--stop", '["zz", "x"]'], "uvw"),
        (["--stop", "x\\ny"], "uvw"),
        (["--stop", "\\t"], "uvwx\ny"),
        (["--stop=--x"], "uvwx\ny\tz"),
    ):
        assert run(*flags, *stops, ckpt_dir=folder) == shown + "\n", stops


def test_streaming_prints_what_a_batch_prints(run):
    lines = "what is a rope\nhow long\nwalk 🎈 ü\n"
    whole = run(*SHORT, "--temperature=1.5", stdin=lines)
    for flags in (["--stream"], ["--stream=True"], ["--stream", "yes"], ["--batch_size=1"], ["--batch_size", "2"]):
        assert run(*SHORT, "--temperature=1.5", *flags, stdin=lines) == whole
    for flags in (["--nostream"], ["--no-stream"], ["--stream=False"]):
        assert run(*SHORT, "--temperature=1.5", *flags, stdin=lines) == whole
    assert whole.count("\n") >= 3


def test_echo_puts_the_prompt_in_front(run):
    plain = run(*SHORT, stdin="what is\nhow")
    echoed = run(*SHORT, "--echo", stdin="what is\nhow")
    assert echoed == run(*SHORT, "--echo", "--stream", stdin="what is\nhow")
    assert echoed.startswith("what is") and "\nhow" in echoed and len(echoed) == len(plain) + len("what ishow")


def test_chat_and_system_go_through_the_template(run, loaded, tmp_path):
    model, tokenizer = loaded
    greedy = SamplingParams(temperature=0.0)
    request = Request(max_new_tokens=20, sampling=greedy, stop_ids=tokenizer.stop_ids)

    def answer(messages) -> str:
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True)
        [[done]] = text.complete(model, tokenizer, [ids], request)
        return done.text + "\n"

    user, system = {"role": "user", "content": "what is it"}, {"role": "system", "content": "a rope"}
    flags = ("--temperature=0", *SHORT)
    assert run("--prompt", "what is it", "--chat", *flags) == answer([user])
    assert run("--prompt", "what is it", "--chat", "--system", "a rope", *flags) == answer([system, user])
    assert run("--prompt", "what is it", "--chat", *flags) != run("--prompt", "what is it", *flags)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [system, user]}) + "\n" + json.dumps({"prompt": "what is it"}) + "\n")
    out = run("--prompts_file", str(rows), *flags)
    assert out == answer([system, user]) + run("--prompt", "what is it", *flags)
    assert run("--prompts_file", str(rows), "--echo", *flags).startswith("what is it\n" + answer([system, user]))


def test_tools_of_a_row_reach_the_template(run, tmp_path):
    template = "{{ tools[0].name if tools else 'none' }}: {{ messages[0].content }}"
    folder = write_chat_checkpoint(tmp_path / "tools", template=template)
    message = {"messages": [{"role": "user", "content": "what"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(message | {"tools": [{"name": "walk"}]}) + "\n" + json.dumps(message))
    flags = ("--temperature=0", *SHORT)
    plain = [run("--prompt", prompt, *flags, ckpt_dir=folder) for prompt in ("walk: what", "none: what")]
    assert run("--prompts_file", str(rows), *flags, ckpt_dir=folder) == "".join(plain)


def test_the_question_answer_format_ends_before_the_next_question(run, tmp_path, loaded):
    """Its turns are plain text, so a model goes on to ask the next one itself."""
    _, tokenizer = loaded
    [colon] = tokenizer.encode(":")
    successors = chain(colon, *written(tokenizer, "W", "\nQuestion")) | {tokenizer.encode("n")[0]: colon}
    folder = write_chat_checkpoint(tmp_path, model=following_model(successors, tokenizer.vocab_size))
    edit_json(folder / "tokenizer_config.json", chat_template=CHAT_TEMPLATES["qa"])
    flags = ("--max_new_tokens=60", "--temperature=0")
    assert run("--prompt", "a", "--chat", *flags, ckpt_dir=folder) == "W\n"
    assert "Question" in run("--prompt", "a:", *flags, ckpt_dir=folder)


def test_every_parameter_is_tried_above_or_below():
    """A new flag needs a test of its own."""
    tried = {
        *("ckpt_dir", "tokenizer_path", "prompt", "prompts_file", "output", "max_new_tokens", "preset", "temperature"),
        *("top_p", "top_k", "min_p", "repetition_penalty", "max_consecutive_newlines", "banned_tokens", "stop", "seed"),
        *("n", "logprobs", "stream", "chat", "system", "echo", "batch_size", "dtype", "device"),
    }
    assert set(signature(generate.generate).parameters) == tried


def test_dtype_and_device(run, mistake, tmp_path):
    path = tmp_path / "out.jsonl"

    def logprobs(*flags: str) -> list[float]:
        run("--prompt", "rope", "--temperature=0", "--max_new_tokens=1", "--logprobs", "--output", str(path), *flags)
        return json.loads(path.read_text())["logprobs"]

    assert logprobs() == logprobs("--device=cpu") == logprobs("--device", "auto", "--dtype", "float32")
    assert logprobs() != logprobs("--dtype", "bfloat16") == pytest.approx(logprobs(), abs=0.5)
    assert mistake("--prompt=a", "--dtype=int8") == "--dtype 'int8' is none of auto, float32, bfloat16, float16"
    assert mistake("--prompt=a", "--device=abacus") == "--device 'abacus' is none of auto, cpu, gpu, tpu"


def test_a_tokenizer_from_elsewhere(run, folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    write_chat_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer" / "tokenizer.json"):
        out = run("--prompt", "rope", "--tokenizer_path", str(path), *SHORT, ckpt_dir=bare)
        assert out == run("--prompt", "rope", *SHORT)
    assert run("--prompt", "rope", *SHORT, ckpt_dir=folder / "model.safetensors") == run("--prompt", "rope", *SHORT)


# Where prompts come from


def test_prompts_from_a_file_from_json_lines_and_from_standard_input(run, tmp_path):
    prompts = ["what is", "rope 🎈 日本", '{"not json', "  walk  "]
    one_by_line = "\n".join(prompts) + "\n"
    as_json = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    reference = run(*SHORT, stdin=one_by_line)
    assert run(*SHORT, stdin=as_json) == reference
    assert run(*SHORT, "--prompts_file", "-", stdin=one_by_line) == reference
    (tmp_path / "prompts.txt").write_text("\ufeff" + one_by_line.replace("\n", "\r\n\r\n"), newline="")
    (tmp_path / "prompts.jsonl").write_text("\n" + as_json.removesuffix("\n"))
    assert run(*SHORT, "--prompts_file", str(tmp_path / "prompts.txt")) == reference
    assert run(*SHORT, "--prompts_file", str(tmp_path / "prompts.jsonl")) == reference
    assert run(*SHORT, "--prompt", prompts[0]) == reference[: len(run(*SHORT, "--prompt", prompts[0]))]


@pytest.mark.parametrize("prompt", ["007", "1e5", "None", "True", "-", "--", "-x", "help", "[1]", " ", "ü🎈", "\\n"])
def test_a_prompt_is_text_whatever_it_looks_like(run, prompt):
    assert run(*SHORT, "--prompt", prompt) == run(*SHORT, f"--prompt={prompt}")
    assert run(*SHORT, "--prompt", prompt, "--echo", "--stream").startswith(prompt)
    if prompt.strip():
        assert run(*SHORT, "--prompt", prompt) == run(*SHORT, stdin=json.dumps({"prompt": prompt}))


def test_a_prompt_that_begins_with_dashes(run, mistake):
    assert run(*SHORT, "--prompt=--x", "--echo").startswith("--x")
    assert "--prompt=--x" in mistake(*SHORT, "--prompt", "--x")


# --output


def test_output_rows(run, tmp_path, loaded):
    model, tokenizer = loaded
    message = {"messages": [{"role": "user", "content": "how ü"}]}
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"prompt": "what is 🎈"}) + "\n" + json.dumps(message))
    path = tmp_path / "out.jsonl"
    flags = ("--prompts_file", str(rows), "--temperature=0", "--max_new_tokens=12", "--output", str(path))
    assert run(*flags, "--n", "2", "--logprobs") == ""
    written_rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(written_rows) == 4 and "🎈" in path.read_text(encoding="utf-8")
    ids = [tokenizer.encode("what is 🎈"), encode_chat(tokenizer, message["messages"], add_generation_prompt=True)]
    for number, row in enumerate(written_rows):
        prompt_ids = ids[number // 2]
        source = {"prompt": "what is 🎈"} if number < 2 else message
        assert row.keys() == source.keys() | {"completion", "token_ids", "finish_reason", "logprobs"}
        assert source.items() <= row.items()
        assert row["completion"] == tokenizer.decode(row["token_ids"], skip_special=True)
        logits_TV = np.array(model(np.array([prompt_ids + row["token_ids"]]))[0][0])[len(prompt_ids) - 1 : -1]
        assert logits_TV.argmax(-1).tolist() == row["token_ids"]
        logits_TV -= logits_TV.max(-1, keepdims=True)
        plain = logits_TV.max(-1) - np.log(np.exp(logits_TV).sum(-1))
        np.testing.assert_allclose(row["logprobs"], plain, atol=1e-4)
        ended = row["token_ids"][-1] in tokenizer.stop_ids
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert ended or len(row["token_ids"]) == 12
    run(*flags)
    assert all("logprobs" not in json.loads(line) for line in path.read_text().splitlines())


def test_output_tells_stop_from_length(run, tmp_path, loaded):
    _, tokenizer = loaded
    ids = written(tokenizer, "QWZ", tokenizer.special_tokens["<|im_end|>"])
    folder = write_chat_checkpoint(tmp_path / "m", model=following_model(chain(*ids), tokenizer.vocab_size))
    path = tmp_path / "out.jsonl"
    for flags, completion, count, reason in (
        ([], "WZ", 3, "stop"),
        (["--max_new_tokens=2"], "WZ", 2, "length"),
        (["--stop=Z"], "W", 2, "stop"),
    ):
        run("--prompt=Q", "--output", str(path), *flags, ckpt_dir=folder)
        row = json.loads(path.read_text())
        assert (row["completion"], len(row["token_ids"]), row["finish_reason"]) == (completion, count, reason)


def test_rows_are_in_the_file_as_soon_as_they_are_finished(run, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"

    def watched(*args, **options):
        for number, samples in enumerate(complete(*args, **options)):
            assert path.read_text().count("\n") == number
            yield samples

    complete = text.complete
    monkeypatch.setattr(text, "complete", watched)
    run("--output", str(path), "--max_new_tokens=3", stdin="what\nis\nit\n")
    assert path.read_text().count("\n") == 3


# Bad input


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--promt", "x"], "unknown flag --promt: did you mean --prompt?"),
        (["--prompt"], "--prompt needs a value"),
        (["--prompt="], "the prompt is empty"),
        (["--prompt", "a", "--prompt", "b"], "--prompt is given twice"),
        (["--prompt=a", "--max_new_tokens=abc"], "--max_new_tokens must be a whole number, not 'abc'"),
        (["--prompt=a", "--max_new_tokens=0"], "--max_new_tokens must be at least 1, not 0"),
        (["--prompt=a", "--n=-1"], "--n must be at least 1, not -1"),
        (["--prompt=a", "--batch_size=0"], "--batch_size must be at least 1, not 0"),
        (["--prompt=a", "--temperature=hot"], "--temperature must be a number, not 'hot'"),
        (["--prompt=a", "--temperature=-1"], "temperature must be 0 (greedy) or at least 1e-06, not -1.0"),
        (["--prompt=a", "--temperature=nan"], "temperature must be 0 (greedy) or at least 1e-06, not nan"),
        (["--prompt=a", "--top_p=1.5"], "top_p must be above 0 and at most 1, not 1.5"),
        (["--prompt=a", "--top_k=0"], "top_k must be at least 1, not 0"),
        (["--prompt=a", "--min_p=-0.1"], "min_p must be from 0 to 1, not -0.1"),
        (["--prompt=a", "--repetition_penalty=0"], "repetition_penalty must be above 0, not 0.0"),
        (["--prompt=a", "--max_consecutive_newlines=0"], "max_consecutive_newlines must be at least 1, not 0"),
        (["--prompt=a", "--preset=wild"], "--preset 'wild' is none of standard, creative, conservative"),
        (["--prompt=a", "--seed=x"], "--seed must be a whole number, not 'x'"),
        (["--prompt=a", "--stop="], "a stop string must not be empty"),
        (["--prompt=a", "--stream", "--stop="], "a stop string must not be empty"),
        (["--prompt=a", "--banned_tokens=99999"], "--banned_tokens 99999 is outside the vocabulary of 312"),
        (["--prompt=a", "--banned_tokens="], "--banned_tokens '' is 0 tokens"),
        (["--prompt=a", "--banned_tokens=QWZ"], "--banned_tokens 'QWZ' is 3 tokens"),
        (["--prompt=a", "--prompts_file=b"], "give --prompt or --prompts_file, not both"),
        (["--prompt=a", "--stream", "--n=2"], "--stream prints one completion of each prompt"),
        (["--prompt=a", "--stream", "--output=b"], "--stream prints one completion of each prompt"),
        (["--prompt=a", "--logprobs"], "--logprobs are written to --output"),
        (["--prompt=a", "--system=b"], "--system goes with --chat"),
        (["--prompt=a", "--output="], "--output must name a file, not ''"),
        (["--prompt=a", "--output=/not/there/out.jsonl"], "--output /not/there/out.jsonl: its folder does not exist"),
        (["--prompts_file=/not/there"], "/not/there: No such file or directory"),
        (["--prompt=a", "--tokenizer_path=/not/there"], "--tokenizer_path /not/there: no such folder or file"),
        (["--prompt", "rope " * 400], "the prompt has 800 tokens, but the model's context holds 256"),
        (["--prompt", os.fsdecode(b"a\xff")], "the prompt is not UTF-8 text"),
        ([], "standard input holds no prompt"),
        (["a prompt"], "unexpected argument 'a prompt'"),
    ],
)
def test_bad_flags_are_one_line(mistake, flags, complaint):
    if complaint.startswith("the prompt has"):
        assert mistake(*flags).startswith("the prompt has ") and "context holds 256" in mistake(*flags)
    else:
        assert mistake(*flags).startswith(complaint)


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("p.txt", b"", "{path} holds no prompt"),
        ("p.txt", b" \n\t\n", "{path} holds no prompt"),
        ("p.txt", b"ok\n\xff\xfe\n", "{path} is not UTF-8 text: byte 3 cannot be decoded"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{nope\n', "{path}:3: not JSON: "),
        ("p.jsonl", b'{"prompt": "a"}\n"b"\n', "{path}:2: a row must be an object with either"),
        ("p.jsonl", b'{"text": "a"}\n', "{path}:1: a row must be an object with either"),
        ("p.jsonl", b'{"prompt": "a", "messages": []}\n', "{path}:1: a row must be an object with either"),
        ("p.jsonl", b'{"prompt": 7}', "{path}:1: the prompt must be a text that is not empty"),
        ("p.jsonl", b'{"prompt": ""}', "{path}:1: the prompt must be a text that is not empty"),
        ("p.jsonl", b'{"prompt": "\\ud83c"}', "{path}:1: half of a surrogate pair is no text"),
        ("p.jsonl", b'{"messages": []}', "{path}:1: the messages must be a list that is not empty"),
        ("p.jsonl", b'{"messages": null}', "{path}:1: the messages must be a list that is not empty"),
        ("p.jsonl", b'{"messages": "hi"}', "{path}:1: the messages must be a list that is not empty"),
        ("p.jsonl", b'{"messages": [7]}', "{path}:1: messages[0] must be a mapping"),
        ("p.jsonl", b'{"messages": [{"content": "hi"}]}', "{path}:1: messages[0] must be a mapping"),
        ("p.jsonl", b'{"prompt": "ok"}\n{"prompt": "' + b"#" * 300 + b'"}', "{path}:2 has 300 tokens"),
    ],
)
def test_bad_files_are_named_with_their_line(mistake, tmp_path, name, data, complaint):
    path = tmp_path / name
    path.write_bytes(data)
    assert mistake("--prompts_file", str(path)).startswith(complaint.format(path=path))
    if name == "p.txt":
        assert mistake(stdin=data).startswith(complaint.format(path="standard input"))


def test_what_a_template_refuses_is_told_with_its_row(mistake, tmp_path):
    folder = write_chat_checkpoint(tmp_path / "m", template="{{ raise_exception('only of ropes') }}")
    assert mistake("--prompt=a", "--chat", ckpt_dir=folder) == "the prompt: only of ropes"


def test_nothing_is_written_where_the_input_is_bad(mistake, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    for flags in (["--prompt="], ["--prompt=a", "--top_p=7"], ["--prompt", "#" * 300], ["--prompt=a", "--stop="]):
        mistake(*flags, "--output", str(path))
        assert path.read_text() == "precious"
    assert mistake("--prompt=a", "--output", str(tmp_path)) == f"--output must name a file, not {str(tmp_path)!r}"


def damaged(folder: Path, copy: Path, damage: Callable[[Path], object]) -> Path:
    shutil.copytree(folder, copy)
    damage(copy)
    return copy


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: shutil.rmtree(f), "--ckpt_dir {f}: no such folder or file"),
        (lambda f: [p.unlink() for p in f.iterdir()], "{f}: no config.json, params.json or llama2.c file"),
        (lambda f: (f / "tokenizer.json").unlink(), "{f}: no tokenizer; looked for"),
        (lambda f: (f / "config.json").write_text("{nope"), "{f}/config.json: not valid JSON"),
        (lambda f: (f / "tokenizer.json").write_text("{nope"), "{f}/tokenizer.json"),
        (lambda f: os.truncate(f / "model.safetensors", 40_000), "{f}/model.safetensors: truncated"),
        (lambda f: os.truncate(f / "model.safetensors", 4), "{f}/model.safetensors: truncated"),
        (lambda f: (f / "model.safetensors").unlink(), "{f}: no weights in this folder"),
        (lambda f: edit_json(f / "config.json", vocab_size=300), "{f}"),
        (lambda f: edit_json(f / "config.json", architectures=["MambaForCausalLM"], model_type="mamba"), "{f}"),
    ],
)
def test_broken_checkpoints_are_one_line(mistake, folder, tmp_path, damage, complaint):
    copy = damaged(folder, tmp_path / "copy", damage)
    assert mistake("--prompt", "a", ckpt_dir=copy).startswith(complaint.format(f=copy))


def test_without_a_checkpoint_it_takes_that_of_the_quickstart(run, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / setup.QUICKSTART)
    monkeypatch.chdir(tmp_path)
    assert run("--prompt", "rope", *SHORT, ckpt_dir=None) == run("--prompt", "rope", *SHORT)


def test_a_tokenizer_of_another_network(mistake, tmp_path):
    folder = write_chat_checkpoint(tmp_path, model=following_model({}, 300))
    assert mistake("--prompt=a", ckpt_dir=folder).startswith("the tokenizer has 312 ids but the network only 300")


def test_no_checkpoint_at_all(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    complaint = mistake("--prompt=a", ckpt_dir=None)
    assert complaint.startswith("no --ckpt_dir, and no runs/quickstart/") and "`make quickstart`" in complaint
    (tmp_path / "note.txt").write_text("hello")
    assert mistake("--prompt=a", ckpt_dir=tmp_path / "note.txt").startswith(str(tmp_path / "note.txt"))


def test_more_tokens_than_the_context_holds_are_no_mistake(run):
    assert run("--prompt", "rope", "--max_new_tokens", str(10**15), "--temperature=0")


# As a process of its own


def start(repo_root: Path, *argv: str, **options) -> subprocess.Popen:
    program = [sys.executable, str(repo_root / "generate.py"), *argv]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, **pipes | options)


@pytest.mark.parametrize("program", ["generate", "chat"])
def test_help_loads_no_arrays_and_names_every_flag(repo_root, program):
    """Importing jax takes seconds, so that help would."""
    code = (
        "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_path(sys.argv[0], run_name='__main__');"
        "print({'jax', 'numpy', 'flax', 'tokenizers'} & set(sys.modules), file=sys.stderr)"
    )
    code = f"import sys; sys.argv[0] = {str(repo_root / program) + '.py'!r}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo_root)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    module = __import__(program)
    descriptions = getattr(module, program).__doc__.partition("Args:")[2]
    for name in signature(getattr(module, program)).parameters:
        assert f"--{name}=" in done.stdout
        [line] = [line for line in descriptions.splitlines() if line.startswith(f"        {name}: ")]
        assert line.partition(": ")[2].split(".")[0].split(" ", 3)[0] in done.stdout


def test_an_interrupted_batch_keeps_its_finished_rows(repo_root, folder, tmp_path):
    path = tmp_path / "out.jsonl"
    (tmp_path / "prompts.txt").write_text("what is a rope\n" * 3000)
    flags = ["--prompts_file", str(tmp_path / "prompts.txt"), "--batch_size=1", "--output", str(path)]
    process = start(repo_root, "--ckpt_dir", str(folder), *flags)
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "generate.py: interrupted\n")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert 0 < len(rows) < 3000 and path.read_text().endswith("\n")


def test_a_reader_that_leaves_is_no_error(repo_root, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("what is a rope\n" * 3000)
    flags = ["--prompts_file", str(tmp_path / "prompts.txt"), "--batch_size=2", "--max_new_tokens=3"]
    process = start(repo_root, "--ckpt_dir", str(folder), *flags)
    assert process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU here")
def test_a_device_that_is_not_there(repo_root, folder):
    process = start(repo_root, "--ckpt_dir", str(folder), "--prompt", "a", "--device", "gpu")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == "generate.py: --device gpu: jax finds none here\n"


def test_the_trained_model_from_the_command_line(repo_root, assets_dir):
    golden = json.loads((assets_dir / "stories260k" / "golden.json").read_text())["greedy"][0]
    flags = ["--max_new_tokens", str(len(golden["continuation_ids"])), "--temperature", "0", "--echo", "--stream"]
    place = ["--ckpt_dir", str(assets_dir / "stories260k" / "hf")]
    process = start(repo_root, *place, "--prompt", golden["prompt"], *flags)
    out, err = process.communicate()
    assert (process.returncode, out) == (0, golden["text"] + "\n")
    assert err.count("\n") == 1 and "tokens/s" in err


def test_other_columns_of_a_row_are_copied_to_the_output(run, tmp_path):
    rows, path = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"prompt": "what", "id": 7, "answer": "no"}))
    run("--prompts_file", str(rows), "--max_new_tokens=2", "--output", str(path))
    row = json.loads(path.read_text())
    assert (row["id"], row["answer"]) == (7, "no") and "where" not in row


def test_plain_prompts_may_begin_with_a_brace(run, tmp_path):
    rows = tmp_path / "in.txt"
    rows.write_text("{name} went\n{home}\n")
    assert len(run("--prompts_file", str(rows), "--max_new_tokens=2", "--echo").split("{")) == 3
