"""Tokenizers: published cases from the assets folder, and small tokenizers trained here."""

import base64
import json
import pickle
import random
import re
import time

import numpy as np
import pytest

from models.llama.tokenizer import load_tokenizer
from models.llama.tokenizer_meta import LLAMA3_SPECIAL_TOKENS, split_long_text

CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "a rope walk is a long lane where ropes are made",
    "  spaces   and\ttabs\nand lines, with 12345 numbers!",
    "Größe naïve 東京 🙂🙃 ## ## ## ## ##",
] * 8
TEXTS = [
    "",
    " ",
    "the cat",
    "  the  cat ",
    "line\n\nline\r\n\tend ",
    "東京 🙂 Größe \N{REPLACEMENT CHARACTER} x",
    "👨‍👩‍👧 e\u0301 \x00",
    "<s> </s> <unk> <|stop|> <0x0A> <|endoftext|> <|eot_id|>",
    "# the ## cat",
]
KINDS = ["tokenizer.json", "sentencepiece", "sentencepiece json", "vocab+merges", "tiktoken"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each kind of tokenizer, all trained on the same few lines."""
    root = tmp_path_factory.mktemp("tokenizers")
    paths = {kind: root / kind.replace(" ", "_") for kind in KINDS}
    for path in paths.values():
        path.mkdir()
    _train_byte_level(paths["tokenizer.json"], paths["vocab+merges"])
    _train_sentencepiece(paths["sentencepiece"])
    _sentencepiece_as_json(paths["sentencepiece"], paths["sentencepiece json"])
    _write_tiktoken(paths["tiktoken"] / "tokenizer.model")
    return paths


def _train_byte_level(as_json, as_merges):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|start|>", "<|stop|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    model.model.save(str(as_merges))
    model.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    model.enable_truncation(4)
    model.enable_padding(length=16)
    model.save(str(as_json / "tokenizer.json"))
    config = {"bos_token": {"content": "<|start|>"}, "eos_token": "<|stop|>", "pad_token": None, "add_bos_token": False}
    (as_json / "tokenizer_config.json").write_text(json.dumps(config))


def _train_sentencepiece(folder):
    import sentencepiece

    with open(folder / "renamed.bin", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            model_type="bpe",
            vocab_size=340,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    (folder / "renamed.bin").rename(folder / "tokenizer.model")


def _sentencepiece_as_json(source, target):
    """Write the tokenizer.json that has the same pieces, with the decoder that Llama 2 conversions have."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    model = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    ranked = [(-model.get_score(i), a, piece[len(a) :]) for piece, i in vocab.items() for a in _prefixes(piece)]
    merges = [(a, b) for _, a, b in sorted(ranked) if a in vocab and b in vocab and not model.is_byte(vocab[a + b])]
    result = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    result.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    result.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    result.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    result.save(str(target / "tokenizer.json"))


def _prefixes(piece):
    return [piece[:size] for size in range(1, len(piece))]


def _write_tiktoken(path):
    words = [b"th", b"the", b" c", b" the", b"\xe6\x9d", b"\xe6\x9d\xb1", b"\xf0\x9f", b"  ", b"\n\n"]
    tokens = [bytes([value]) for value in range(256)] + words
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))


def _cases(assets_dir, folder):
    name = "tokenizer_cases.json" if folder.startswith("stories260k") else "cases.json"
    parent = assets_dir / ("stories260k" if folder.startswith("stories260k") else folder)
    return json.loads((parent / name).read_text())


def _stream(tokenizer, ids, rng=None, **options):
    """Decode incrementally, id by id or in random chunks, and check that no part ends inside a character."""
    decoder, parts, position = tokenizer.decoder(**options), [], 0
    while position < len(ids):
        size = rng.randint(0, 4) if rng else 1
        parts.append(decoder.push(ids[position : position + size] if rng else ids[position]))
        position += size
    tail = decoder.flush()
    return parts, tail


PUBLISHED = [
    "tokenizers/llama3",
    "tokenizers/gpt2",
    "tokenizers/minimind",
    "stories260k/hf",
    "stories260k/meta",
    "stories260k/hf/tokenizer.model",
]


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_cases(assets_dir, folder):
    tokenizer = load_tokenizer(assets_dir / folder)
    published = _cases(assets_dir, folder)
    assert tokenizer.vocab_size == published["n_vocab"]
    assert len(published["cases"]) == 60
    for case in published["cases"]:
        text = case["text"]
        ids = tokenizer.encode(text)
        assert ids == case.get("ids_special_as_text", case["ids"]), case["name"]
        assert tokenizer.decode(ids) == (text.replace("▁", " ") if "stories" in folder else text), case["name"]
    if folder == "tokenizers/minimind":
        for case in published["cases"]:
            assert tokenizer.encode(case["text"], allow_special=True) == case["ids"], case["name"]
    for case in published.get("special_cases", []):
        assert tokenizer.encode(case["text"], allow_special=True) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_cases_stream(assets_dir, folder):
    tokenizer, rng = load_tokenizer(assets_dir / folder), random.Random(0)
    for case in _cases(assets_dir, folder)["cases"]:
        whole = tokenizer.decode(case["ids"])
        for source in (None, rng, rng):
            parts, tail = _stream(tokenizer, case["ids"], source)
            assert "".join(parts) + tail == whole, case["name"]
            assert tail == ""
            if "\N{REPLACEMENT CHARACTER}" not in case["text"]:
                assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts), case["name"]


def test_conventions_of_published_files(assets_dir):
    llama3 = load_tokenizer(assets_dir / "tokenizers/llama3/tokenizer.model")
    published = _cases(assets_dir, "tokenizers/llama3")
    assert dict(llama3.special_tokens) == published["special_tokens"]
    ends = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
    assert llama3.stop_ids == {published["special_tokens"][name] for name in ends}
    assert (llama3.bos_id, llama3.eos_id) == (
        llama3.special_tokens["<|begin_of_text|>"],
        llama3.special_tokens[ends[0]],
    )
    assert llama3.adds_bos and llama3.chat_template is None

    gpt2 = load_tokenizer(assets_dir / "tokenizers/gpt2")
    assert gpt2.bos_id == gpt2.eos_id == gpt2.special_tokens["<|endoftext|>"] and not gpt2.adds_bos

    minimind = load_tokenizer(assets_dir / "tokenizers/minimind")
    added = _cases(assets_dir, "tokenizers/minimind")["added_tokens"]
    assert dict(minimind.special_tokens) == {name: t["id"] for name, t in added.items() if t["special"]}
    assert minimind.decode([minimind.bos_id]) == "<|im_start|>" and not minimind.adds_bos
    assert minimind.stop_ids == {minimind.special_tokens["<|im_end|>"]}
    assert "add_generation_prompt" in minimind.chat_template

    for path in ("stories260k/hf", "stories260k/meta"):
        stories = load_tokenizer(assets_dir / path)
        assert (stories.bos_id, stories.eos_id, stories.pad_id, stories.adds_bos) == (1, 2, None, True)
        assert stories.encode("x", add_bos=True) == [1, *stories.encode("x")]


def test_both_files_of_one_checkpoint_agree_on_special_tokens(assets_dir):
    one, other = (
        load_tokenizer(assets_dir / "stories260k/hf" / name) for name in ("tokenizer.json", "tokenizer.model")
    )
    for text in ("<s>Once</s> upon", "a<unk>b", "<s> x", "<s></s>"):
        ids = one.encode(text, allow_special=True)
        assert ids == other.encode(text, allow_special=True)
        assert one.decode(ids) == other.decode(ids)
        assert one.decode(ids, skip_special=True) == other.decode(ids, skip_special=True)
    assert all(one.token_bytes(i) == other.token_bytes(i) for i in range(512))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values()), text
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_equals_whole(folders, kind):
    tokenizer, rng = load_tokenizer(folders[kind]), random.Random(1)
    sequences = [tokenizer.encode(text, allow_special=True) for text in TEXTS]
    sequences += [[rng.randrange(tokenizer.vocab_size) for _ in range(30)] for _ in range(50)]
    sequences += [ids[:cut] for ids in sequences[:9] for cut in range(len(ids))]
    for ids in sequences:
        for options in ({}, {"skip_special": True}, {"continuation": True}):
            whole = tokenizer.decode(ids, **options)
            for source in (None, rng):
                parts, tail = _stream(tokenizer, ids, source, **options)
                assert "".join(parts) + tail == whole
            seen = b"".join(tokenizer.token_bytes(i) for i in ids)
            if options == {"continuation": True}:
                assert whole == seen.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", KINDS)
def test_half_characters_are_held_back(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    ids = tokenizer.encode("𝔘")
    bytes_left = len("𝔘".encode())
    decoder = tokenizer.decoder()
    assert len(ids) > 2
    assert all("\N{REPLACEMENT CHARACTER}" not in decoder.push(i) for i in ids[:-1])
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.push(ids[-1:]) + decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert b"".join(map(tokenizer.token_bytes, ids)).lstrip(b" ") == "𝔘".encode() and bytes_left == 4


def test_genuine_replacement_character_is_not_held_back(folders):
    tokenizer = load_tokenizer(folders["tiktoken"])
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, tokenizer.encode("\N{REPLACEMENT CHARACTER}"))) == "\N{REPLACEMENT CHARACTER}"
    assert decoder.flush() == ""


def test_push_does_not_slow_down(folders):
    tokenizer = load_tokenizer(folders["tokenizer.json"])
    ids = tokenizer.encode("the cat sat ") * 20_000
    start = time.perf_counter()
    decoder = tokenizer.decoder()
    text = "".join([decoder.push(i) for i in ids])
    assert time.perf_counter() - start < 5
    assert text == "the cat sat " * 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_ids_without_a_token(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="-1 is negative"):
        tokenizer.decode([-1])


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_become_replacement_characters(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("kind", KINDS)
def test_survives_pickling(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    expected = [tokenizer.encode(text) for text in TEXTS]
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert [copy.encode(text) for text in TEXTS] == expected
    assert [copy.decode(ids) for ids in expected] == TEXTS


def test_decoding_takes_one_space_off_the_start_only(folders):
    for kind in ("sentencepiece", "sentencepiece json"):
        tokenizer = load_tokenizer(folders[kind])
        ids = tokenizer.encode("the cat")
        assert tokenizer.decode(ids) == "the cat"
        assert tokenizer.decode(ids, continuation=True) == " the cat"
        assert tokenizer.decode([tokenizer.bos_id, *ids], skip_special=True) == "the cat"
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == "<s> the cat"


@pytest.mark.parametrize("kind", ["tokenizer.json", "sentencepiece json"])
def test_decode_agrees_with_the_library(folders, kind):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    tokenizer = load_tokenizer(folders[kind])
    for text in TEXTS:
        ids = tokenizer.encode(text, allow_special=True)
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special=skip) == library.decode(ids, skip_special_tokens=skip)


def test_sentencepiece_and_its_json_agree(folders):
    one, other = load_tokenizer(folders["sentencepiece"]), load_tokenizer(folders["sentencepiece json"])
    assert (one.bos_id, one.adds_bos, one.eos_id) == (1, True, 2)
    assert (other.bos_id, other.adds_bos) == (1, True)
    for text in TEXTS:
        assert one.encode(text) == other.encode(text)
        assert one.encode(text, allow_special=True) == other.encode(text, allow_special=True)


def test_truncation_and_padding_of_the_file_are_ignored(folders):
    tokenizer = load_tokenizer(folders["tokenizer.json"])
    assert (
        tokenizer.decode(tokenizer.encode("the cat sat on the mat and the dog")) == "the cat sat on the mat and the dog"
    )


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab+merges", "sentencepiece", "tiktoken"])
def test_special_tokens_only_when_allowed(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    name, token_id = next(iter(tokenizer.special_tokens.items()))
    text = f"a{name}b"
    assert token_id not in tokenizer.encode(text)
    assert tokenizer.encode(text, allow_special=True).count(token_id) == 1
    assert token_id not in tokenizer.encode(text)  # one call leaves nothing behind for the next
    assert tokenizer.decode([token_id]) == name and tokenizer.decode([token_id], skip_special=True) == ""


def test_added_token_that_is_not_special_is_one_id_either_way(folders):
    tokenizer = load_tokenizer(folders["tokenizer.json"])
    (think,) = tokenizer.encode("<think>")
    assert think in tokenizer.encode("<think>", allow_special=True)
    assert tokenizer.decode([think], skip_special=True) == "<think>"


def test_added_tokens_beyond_ascii_read_as_they_are(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["tokenizer.json"] / "tokenizer.json").read_bytes())
    size = load_tokenizer(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<é>": size, "<東>": size + 1}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<é><東>") == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<é><東>"


def test_ids_may_be_numpy(folders):
    tokenizer = load_tokenizer(folders["tokenizer.json"])
    ids = np.array(tokenizer.encode("the 東京"), np.int32)
    decoder = tokenizer.decoder()
    assert tokenizer.decode(ids) == "the 東京" == "".join([decoder.push(i) for i in ids])


def test_add_bos_needs_a_bos(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["tokenizer.json"] / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and not tokenizer.adds_bos
    with pytest.raises(ValueError, match="no BOS"):
        tokenizer.encode("x", add_bos=True)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|start|>", "add_bos_token": true}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.adds_bos and tokenizer.encode("", add_bos=True) == [tokenizer.bos_id]


def test_stop_ids_come_from_all_files(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["tokenizer.json"] / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|stop|>"}, "pad_token": "<|start|>"}'
    )
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "bos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == tokenizer.special_tokens["<|stop|>"]
    assert tokenizer.pad_id == tokenizer.special_tokens["<|start|>"]
    assert tokenizer.bos_id == 1
    assert tokenizer.stop_ids == {tokenizer.eos_id, 7, 8, 9}


def test_a_token_that_is_denied_is_not_looked_up_elsewhere(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["tokenizer.json"] / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": null, "pad_token": null}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 2, None)


def test_named_tokens_of_the_vocabulary_become_special(folders, tmp_path):
    spec = json.loads((folders["tokenizer.json"] / "tokenizer.json").read_text())
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<|stop|>", "additional_special_tokens": ["<|start|>", "<|none|>"]}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert dict(tokenizer.special_tokens) == {"<|start|>": 1, "<|stop|>": 2}
    assert tokenizer.encode("<|start|>", allow_special=True) == [1] and len(tokenizer.encode("<|start|>")) > 1


_DEEP = '{"a": ' * 100_000


@pytest.mark.parametrize(
    "name,content",
    [
        ("added_tokens.json", {"<a>": "400"}),
        ("added_tokens.json", {"<a>": True}),
        ("added_tokens.json", {"<a>": -1}),
        ("added_tokens.json", {"<a>": None}),
        ("added_tokens.json", {"<a>": [400]}),
        ("added_tokens.json", ["<a>"]),
        ("added_tokens.json", _DEEP),
        ("tokenizer_config.json", {"added_tokens_decoder": [{"content": "<a>"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": 5}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": "<a>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"²": {"content": "<a>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "<a>"}}}),
        ("tokenizer_config.json", {"chat_template": ["x"]}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"bos_token": 5}),
        ("tokenizer_config.json", {"eos_token": {"content": 5}}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", {"additional_special_tokens": 5}),
        ("tokenizer_config.json", {"additional_special_tokens": [5]}),
        ("tokenizer_config.json", {"extra_special_tokens": "<a>"}),
        ("tokenizer_config.json", {"extra_special_tokens": {"a": ["<a>"]}}),
        ("tokenizer_config.json", _DEEP),
        ("special_tokens_map.json", {"pad_token": ["<a>"]}),
        ("special_tokens_map.json", 5),
        ("special_tokens_map.json", _DEEP),
        ("generation_config.json", _DEEP),
        ("config.json", _DEEP),
        ("params.json", [1]),
    ],
)
@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab+merges"])
def test_malformed_settings_are_refused_by_name(folders, tmp_path, kind, name, content):
    for file in folders[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / name))}: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("token_id", [True, -1, 2**40])
def test_vocabularies_with_senseless_ids_are_refused(folders, tmp_path, token_id):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folders["vocab+merges"] / name).read_bytes())
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"new": token_id}))
    with pytest.raises(ValueError, match=r"vocab\.json: expected a JSON object of token -> id"):
        load_tokenizer(tmp_path)


def test_chat_templates_by_name_and_in_no_encoding(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["tokenizer.json"] / "tokenizer.json").read_bytes())
    for template in ("x", {"default": "x"}, [{"name": "tool"}, {"name": "default", "template": "x"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert load_tokenizer(tmp_path).chat_template == "x"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8"):
        load_tokenizer(tmp_path)


def test_tokens_that_only_tokenizer_config_lists(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["tokenizer.json"] / "tokenizer.json").read_bytes())
    size = load_tokenizer(tmp_path).vocab_size
    added = {
        str(size): {"content": "<|call|>", "special": True},
        str(size + 1): {"content": "<note>", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 2 and tokenizer.special_tokens["<|call|>"] == size
    assert tokenizer.encode("<|call|><note>", allow_special=True) == [size, size + 1]
    assert size not in tokenizer.encode("<|call|><note>") and size + 1 in tokenizer.encode("<|call|><note>")

    added = {str(size + 7): {"content": "<|call|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*<\|call\|>.*{size + 7}"):
        load_tokenizer(tmp_path)


def test_sentencepiece_with_added_tokens(folders, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 340, "<note>": 341}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (342, 340)
    assert tokenizer.encode("<note>") == [341] and 340 not in tokenizer.encode("<pad>")
    assert tokenizer.encode("<pad>", allow_special=True) == [340]
    assert tokenizer.decode([340, 341], skip_special=True) == "<note>"


def test_chat_template_is_found(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folders["tokenizer.json"] / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "one"}')
    assert load_tokenizer(tmp_path).chat_template == "one"
    config.write_text(
        '{"chat_template": [{"name": "rag", "template": "two"}, {"name": "default", "template": "three"}]}'
    )
    assert load_tokenizer(tmp_path).chat_template == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert load_tokenizer(tmp_path).chat_template == "four"


def test_places_are_searched_in_order(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "original").mkdir()
    for kind, name in [("tiktoken", "original/tokenizer.model"), ("vocab+merges", "vocab.json")]:
        (tmp_path / name).write_bytes((folders[kind] / name.split("/")[-1]).read_bytes())
        if name == "vocab.json":
            with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
                load_tokenizer(tmp_path)
            (tmp_path / "merges.txt").write_bytes((folders[kind] / "merges.txt").read_bytes())
        assert load_tokenizer(tmp_path).vocab_size == load_tokenizer(folders[kind]).vocab_size
    (tmp_path / "tokenizer.model").write_bytes((folders["sentencepiece"] / "tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path).vocab_size == 340
    (tmp_path / "tokenizer.json").write_bytes((folders["tokenizer.json"] / "tokenizer.json").read_bytes())
    assert "<think>" in load_tokenizer(tmp_path).decode(range(500))


def test_formats_are_told_by_content(folders, tmp_path):
    for kind, name in [("tiktoken", "a.json"), ("sentencepiece", "b.json"), ("tokenizer.json", "tokenizer.model")]:
        source = folders[kind] / ("tokenizer.json" if kind == "tokenizer.json" else "tokenizer.model")
        (tmp_path / name).write_bytes(source.read_bytes())
        assert load_tokenizer(tmp_path / name).vocab_size == load_tokenizer(source).vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused(folders, kind, tmp_path):
    damaged = 0
    for source in folders[kind].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    load_tokenizer(tmp_path)
    for source in folders[kind].iterdir():
        data = source.read_bytes()
        for broken in (b"", data[: len(data) // 2], data[:-6], b"\x00\xff" + data[2:], b"not a tokenizer at all"):
            if source.name.startswith("merges") and broken == data[:-6]:
                continue  # a shorter list of merges is a list of merges
            (tmp_path / source.name).write_bytes(broken)
            with pytest.raises(ValueError, match=source.name.replace(".", r"\.")) as caught:
                load_tokenizer(tmp_path)
            assert type(caught.value) is ValueError and "\n" not in str(caught.value)
            damaged += 1
        (tmp_path / source.name).write_bytes(data)
    assert damaged


def test_sentencepiece_cut_between_pieces_is_refused(folders, tmp_path):
    data = (folders["sentencepiece"] / "tokenizer.model").read_bytes()
    path, kept = tmp_path / "tokenizer.model", 0
    for _ in range(300):
        kept += 2 + data[kept + 1]
    path.write_bytes(data[:kept])
    with pytest.raises(ValueError, match="truncated"):
        load_tokenizer(path)


def test_tiktoken_cut_between_lines_is_refused_where_params_tell(folders, tmp_path):
    path = tmp_path / "tokenizer.model"
    lines = (folders["tiktoken"] / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (tmp_path / "params.json").write_text(json.dumps({"vocab_size": len(lines) + 256}))
    path.write_bytes(b"".join(lines))
    load_tokenizer(path)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="vocab_size"):
        load_tokenizer(path)


@pytest.mark.parametrize("change", ["gap", "twice", "no byte"])
def test_tiktoken_ranks_are_checked(folders, tmp_path, change):
    tokens = [line.split()[0] for line in (folders["tiktoken"] / "tokenizer.model").read_bytes().splitlines()]
    ranks = list(range(len(tokens)))
    if change == "gap":
        ranks[100:] = [rank + 1 for rank in ranks[100:]]
    else:
        tokens[100] = tokens[99] if change == "twice" else base64.b64encode(b"ten")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(b"%s %d\n" % pair for pair in zip(tokens, ranks, strict=True)))
    with pytest.raises(ValueError, match="1 of the 256 single bytes" if change == "no byte" else "line 101"):
        load_tokenizer(path)


def test_lfs_pointer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="Git LFS"):
        load_tokenizer(tmp_path)


def test_unknown_decoder_is_refused(folders, tmp_path):
    spec = json.loads((folders["tokenizer.json"] / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="WordPiece"):
        load_tokenizer(tmp_path)


def test_vocab_of_another_class_is_refused(folders, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folders["vocab+merges"] / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ValueError, match="Qwen2Tokenizer"):
        load_tokenizer(tmp_path)


def test_merges_that_begin_with_a_hash_count(folders):
    lines = (folders["vocab+merges"] / "merges.txt").read_text().splitlines()
    assert lines[0].startswith("#version") and any(line.startswith("#") for line in lines[1:])
    one, other = load_tokenizer(folders["vocab+merges"]), load_tokenizer(folders["tokenizer.json"])
    assert [one.encode(text) for text in TEXTS] == [other.encode(text) for text in TEXTS]


@pytest.mark.parametrize("space", ["always", "first", "never"])
def test_metaspace(tmp_path, space):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space)
    model.decoder = decoders.Metaspace(prepend_scheme=space)
    model.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"
    if space == "never":
        assert tokenizer.decode(tokenizer.encode(" the cat")) == " the cat"


def test_tokens_without_a_decoder_are_joined_with_spaces(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the cat dog")) == model.decode([0, 1, 2]) == "the cat ?"


def test_llama3_special_tokens():
    assert len(LLAMA3_SPECIAL_TOKENS) == len(set(LLAMA3_SPECIAL_TOKENS)) == 256


def _meta_split(text, piece=400_000, run=25_000):
    """The cutting rule of llama-models, one character at a time."""
    for offset in range(0, len(text), piece):
        chunk, start, length = text[offset : offset + piece], 0, 0
        for i, character in enumerate(chunk):
            length = length + 1 if i and character.isspace() == chunk[i - 1].isspace() else 1
            if length > run:
                yield chunk[start:i]
                start, length = i, 1
        yield chunk[start:]


@pytest.mark.parametrize(
    "text",
    ["a" * 25_000, "a" * 25_001, "ab " * 9_000, "x" + " " * 60_000 + "y" * 30_000, "a b" * 140_000, "\n" * 800_001],
    ids=["run", "run+1", "words", "mixed", "two pieces", "spaces"],
)
def test_long_text_is_cut_by_metas_rule(text):
    assert list(split_long_text(text)) == list(_meta_split(text))


@pytest.mark.parametrize("kind", KINDS)
def test_pathological_text_is_quick(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    for text in ("a" * 200_000, " " * 200_000 + "x", "\n" * 200_000, "🙂" * 50_000):
        start = time.perf_counter()
        ids = tokenizer.encode(text)
        assert time.perf_counter() - start < 10
        assert tokenizer.decode(ids) == text


def test_no_special_token_is_cut_in_long_text(folders):
    tokenizer = load_tokenizer(folders["tiktoken"])
    stop = tokenizer.special_tokens["<|eot_id|>"]
    assert tokenizer.encode("a" * 399_995 + "<|eot_id|>" + "b" * 30_000, allow_special=True).count(stop) == 1
