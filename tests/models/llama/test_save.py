"""Checkpoints that we write: what transformers makes of them, and what is left by saves that fail."""

import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models.llama.checkpoint import load_config
from models.llama.load import load_pretrained
from models.llama.save import save_pretrained
from tests.models.llama.checkpoints import FAMILIES, TINY, assert_same_weights, edit_json, random_model

TOKENS = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 11))


def transformers_model(path, dtype="float32"):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def transformers_logits(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_same_logits(tmp_path, family):
    model = random_model(FAMILIES[family])
    save_pretrained(model, tmp_path / "ours")
    theirs = transformers_model(tmp_path / "ours")
    expected = transformers_logits(theirs)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(np.asarray(model(jnp.asarray(TOKENS))[0]), expected, rtol=1e-3, atol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs")
    assert_same_weights(back, model)
    assert back.config == model.config
    save_pretrained(back, tmp_path / "again")
    np.testing.assert_array_equal(transformers_logits(transformers_model(tmp_path / "again")), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_types(tmp_path, dtype):
    model = random_model(FAMILIES["qwen2"], dtype=dtype)
    save_pretrained(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == dtype
    theirs = transformers_model(tmp_path / "ours", dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs", dtype=None)
    assert_same_weights(back, model)
    save_pretrained(back, tmp_path / "again")
    again = transformers_logits(transformers_model(tmp_path / "again", dtype))
    np.testing.assert_array_equal(again, transformers_logits(theirs))


def test_saving_in_another_type_rounds_once(tmp_path):
    model = random_model(TINY)
    save_pretrained(model, tmp_path, dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    assert_same_weights(load_pretrained(tmp_path, dtype=None), rounded)
    assert_same_weights(load_pretrained(tmp_path), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded))


def test_shards(tmp_path):
    model = random_model(FAMILIES["all-biases"])
    save_pretrained(model, tmp_path, max_shard_bytes=10_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*files, "config.json", "model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert all((tmp_path / file).stat().st_size < 10_000 + 3_000 for file in files)  # and a header
    assert_same_weights(load_pretrained(tmp_path), model)
    transformers_model(tmp_path)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    model = random_model(TINY)
    save_pretrained(model, tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3 * 9 + 3
    assert_same_weights(load_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, not 0"):
        save_pretrained(model, tmp_path, max_shard_bytes=0)


def test_a_later_save_replaces_an_earlier_one(tmp_path):
    save_pretrained(random_model(TINY), tmp_path, max_shard_bytes=1)
    (tmp_path / "model-00009-of-00009.safetensors.partial").write_text("of a save that was killed")
    for name in ("tokenizer.json", "config.json", "model.safetensors.index.json"):
        (tmp_path / f"{name}.partial").write_text("of a save that was killed")
    (tmp_path / "notes.txt").write_text("someone's")
    (tmp_path / "film.mkv.partial").write_text("someone's")
    (tmp_path / "model-card.safetensors").write_text("someone's")
    model = random_model(FAMILIES["qwen3"], seed=1)
    save_pretrained(model, tmp_path)
    names = {"config.json", "model.safetensors", "notes.txt", "film.mkv.partial", "model-card.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert_same_weights(load_pretrained(tmp_path), model)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10_000, 5 * 10**9])
def test_a_killed_save_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, earlier, max_shard_bytes):
    """Whichever step fails, the folder holds the earlier checkpoint or none."""
    old, new = random_model(TINY, seed=1), random_model(TINY, seed=2)
    steps = 0

    def interrupted(limit):
        count = 0

        def hook(original):
            def step(*args, **kwargs):
                nonlocal count
                count += 1
                if count > limit:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            return step

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", hook(os.replace))
            patch.setattr("pathlib.Path.unlink", hook(type(tmp_path).unlink))
            patch.setattr("models.llama.save.write_safetensors", hook(write_safetensors))
            save_pretrained(new, folder, max_shard_bytes=max_shard_bytes)

    from models.llama.files import write_safetensors

    while True:
        folder = tmp_path / str(steps)
        if earlier:
            save_pretrained(old, folder, max_shard_bytes=20_000)
        try:
            interrupted(steps)
        except KeyboardInterrupt:
            assert steps < 100
            steps += 1
            try:
                assert_same_weights(load_pretrained(folder), old)
                assert earlier
            except FileNotFoundError as error:
                assert "config.json" in str(error)
            continue
        break
    assert steps >= 3
    assert_same_weights(load_pretrained(folder), new)


def test_tokenizer_files_and_ids_come_along(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    model = random_model(TINY)
    save_pretrained(model, source)
    raw = json.loads((source / "config.json").read_text())
    assert [raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [None, None, None]
    edit_json(source / "config.json", bos_token_id=1, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "bos_token_id": None}))
    (source / "unrelated.txt").write_text("stays")

    save_pretrained(model, target, tokenizer_from=source)
    raw = json.loads((target / "config.json").read_text())
    assert [raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, [2, 3], None]
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    assert (target / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert not (target / "unrelated.txt").exists()
    save_pretrained(model, target, tokenizer_from=target)  # onto itself
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    assert json.loads((target / "config.json").read_text()) == raw
    with pytest.raises(FileNotFoundError, match="elsewhere: no such folder"):
        save_pretrained(model, target, tokenizer_from=tmp_path / "elsewhere")


def test_a_tokenizer_of_an_earlier_save_goes_when_another_comes(tmp_path):
    first, second, target = (tmp_path / name for name in ("first", "second", "target"))
    earlier = ("vocab.json", "merges.txt", "tokenizer_config.json")
    for folder, names in ((first, earlier), (second, ("tokenizer.json",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(f'{{"of": "{folder.name}"}}')
    model = random_model(TINY)
    save_pretrained(model, target, tokenizer_from=first)
    names = {path.name for path in target.iterdir()}
    assert names > set(earlier)
    save_pretrained(model, target)
    (tmp_path / "link").symlink_to(target)
    save_pretrained(model, target, tokenizer_from=tmp_path / "link")
    assert {path.name for path in target.iterdir()} == names, "without another tokenizer it stays"
    save_pretrained(model, target, tokenizer_from=second)
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "tokenizer.json").write_text("{}")
    target, flushed = tmp_path / "target", []
    fsync, rename = os.fsync, os.replace

    def flush(number):
        flushed.append(os.stat(number).st_ino)
        fsync(number)

    def replace_(old, new):
        assert {path.stat().st_ino for path in target.iterdir()} <= set(flushed)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", replace_)
    save_pretrained(random_model(TINY), target, tokenizer_from=tmp_path / "from", max_shard_bytes=10_000)
    assert len(set(flushed)) == len([*target.iterdir()]) > 4


def test_refused_targets_and_networks(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        save_pretrained(random_model(TINY), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    model = random_model(replace(TINY, gated=False))
    with pytest.raises(ValueError, match="gated=False"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_arrays_on_a_mesh_are_saved(tmp_path):
    model = random_model(TINY)
    save_pretrained(model, tmp_path / "a")
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    save_pretrained(load_pretrained(tmp_path / "a", mesh=mesh), tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert load_config(tmp_path / "b") == model.config
