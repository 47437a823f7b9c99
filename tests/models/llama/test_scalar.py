"""Networks with scores: what transformers makes of ours, ours of theirs, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from models.llama import (
    HeadParam,
    LoraConfig,
    ScalarLLaMa,
    add_lora,
    load_config,
    load_pretrained,
    load_scalar,
    load_tokenizer,
    merge_lora,
    random_scalar,
    save_pretrained,
    save_scalar,
)
from tests.models.llama.checkpoints import (
    FAMILIES,
    TINY,
    assert_same_weights,
    edit_json,
    random_model,
    write_safetensors,
)

NAMES = {"llama": "Llama", "mistral-window": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
CASES = [("llama", False), ("llama", True), ("mistral-window", False), ("qwen2", False), ("qwen3", True)]
PAD = 3  # no token of the texts
LENGTHS = (9, 4, 1, 7)


def tiny(family, tied=False):
    return replace(FAMILIES.get(family, TINY), tie_embeddings=tied)


def ours(config=TINY, seed=0):
    """None of its parameters are zero or one."""
    head = np.random.default_rng(seed + 100).normal(0, 0.2, config.hidden_size)
    return ScalarLLaMa(random_model(replace(config, tie_embeddings=True), seed=seed), jnp.asarray(head, jnp.float32))


def texts():
    """Rows of tokens filled up with PAD, and their lengths."""
    rng = np.random.default_rng(5)
    tokens_BT = np.full((len(LENGTHS), max(LENGTHS)), PAD)
    for row, length in enumerate(LENGTHS):
        tokens_BT[row, :length] = rng.integers(PAD + 1, TINY.vocab_size, length)
    return tokens_BT, np.array(LENGTHS)


def scores(model):
    tokens_BT, lengths_B = texts()
    x_BTD, _ = model.llama.hidden(jnp.asarray(tokens_BT), lengths_B=jnp.asarray(lengths_B))
    scores_BT = model.scores(x_BTD)
    assert scores_BT.dtype == jnp.float32 and scores_BT.shape == tokens_BT.shape
    return np.asarray(scores_BT)[np.arange(len(lengths_B)), lengths_B - 1]


def transformers_model(path):
    """Theirs, loaded without a tensor missing or left over."""
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    return model.eval()


def transformers_scores(model, rows=None):
    torch = pytest.importorskip("torch")
    tokens_BT, lengths_B = texts()
    tokens_BT, lengths_B = (tokens_BT, lengths_B) if rows is None else (tokens_BT[rows], lengths_B[rows])
    mask_BT = np.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    with torch.no_grad():
        out = model(torch.tensor(tokens_BT), attention_mask=torch.tensor(mask_BT.astype(int)))
    assert out.logits.shape == (len(lengths_B), 1)
    return out.logits.float().numpy()[:, 0]


@pytest.mark.parametrize("family, tied", CASES)
def test_transformers_networks_give_the_same_scores_here(tmp_path, family, tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    save_scalar(ours(tiny(family)), tmp_path / "shape")
    raw = json.loads((tmp_path / "shape" / "config.json").read_text())
    name = f"{NAMES[family]}ForSequenceClassification"
    assert raw["architectures"] == [name]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "shape")
    config.pad_token_id, config.tie_word_embeddings = PAD, tied
    theirs = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    expected = transformers_scores(theirs)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(scores(load_scalar(tmp_path / "theirs")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family, tied", CASES)
def test_transformers_gives_our_networks_the_same_scores(tmp_path, family, tied):
    model = ours(tiny(family))
    save_scalar(model, tmp_path / "ours", max_shard_bytes=20_000)
    edit_json(tmp_path / "ours" / "config.json", pad_token_id=PAD, tie_word_embeddings=tied)
    theirs = transformers_model(tmp_path / "ours")
    assert theirs.config.num_labels == 1 and theirs.config.id2label == {0: "LABEL_0"}
    found = transformers_scores(theirs)
    np.testing.assert_allclose(found, scores(model), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(transformers_scores(theirs, rows=[2, 3]), found[2:], rtol=1e-4, atol=1e-5)
    back = load_scalar(tmp_path / "ours")
    assert_same_weights(back, model)
    assert back.config == model.config == load_config(tmp_path / "ours")


def test_short_types_round_the_network_and_not_the_head(tmp_path):
    torch = pytest.importorskip("torch")
    model = random_scalar(TINY, key=jax.random.key(0), dtype=jnp.bfloat16)
    save_scalar(model, tmp_path)
    edit_json(tmp_path / "config.json", pad_token_id=PAD)
    back = load_scalar(tmp_path, dtype=None)
    assert_same_weights(back, model)
    assert back.llama.norm_D.dtype == jnp.bfloat16 and back.score_D.dtype == jnp.float32
    theirs = transformers_model(tmp_path)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    np.testing.assert_allclose(transformers_scores(theirs), scores(model), atol=0.02 * np.abs(scores(model)).max())
    save_scalar(model, tmp_path / "whole", dtype=jnp.bfloat16)
    assert {value.dtype.name for value in load_file(tmp_path / "whole" / "model.safetensors").values()} == {"bfloat16"}


# A language model without a head.


@pytest.mark.parametrize("layout", ["hf", "hf-sharded", "meta-mp2", "llama2c"])
def test_a_language_model_gets_a_head_of_zeros(assets_dir, layout):
    folder = assets_dir / "stories260k"
    model, whole = load_scalar(folder / layout), load_pretrained(folder / "hf")
    assert_same_weights(model.llama, whole)
    assert model.score_D.shape == (64,) and not np.asarray(model.score_D[...]).any()


def test_the_output_matrix_of_a_language_model_is_left_out(tmp_path):
    whole = random_model(TINY)
    save_pretrained(whole, tmp_path)
    model = load_scalar(tmp_path)
    assert whole.unembed_DV is not None and model.llama.unembed_DV is None and model.config.tie_embeddings
    np.testing.assert_array_equal(model.llama.hidden(jnp.arange(5)[None])[0], whole.hidden(jnp.arange(5)[None])[0])
    with pytest.raises(ValueError, match="no output matrix"):
        ScalarLLaMa(whole, jnp.zeros(TINY.hidden_size))


def test_an_output_matrix_beside_a_head_does_nothing(tmp_path):
    model = ours()
    save_scalar(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = np.ones((TINY.vocab_size, TINY.hidden_size), np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same_weights(load_scalar(tmp_path), model)


# What is refused.


def test_a_network_with_scores_is_no_language_model(tmp_path):
    save_scalar(ours(), tmp_path)
    with pytest.raises(ValueError, match=r"a reward model or critic, which gives texts a score"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, labels",
    [
        ({"num_labels": None, "id2label": None}, 2),  # transformers' default
        ({"num_labels": 3, "id2label": None}, 3),
        ({"num_labels": None, "id2label": {"0": "bad", "1": "good"}}, 2),
    ],
)
def test_other_numbers_of_labels_are_refused(tmp_path, changes, labels):
    save_scalar(ours(), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    for load in (load_scalar, load_config):
        with pytest.raises(ValueError, match=f"config.json: LlamaForSequenceClassification of {labels} labels is not"):
            load(tmp_path)


@pytest.mark.parametrize("changes", [{"num_labels": 1, "id2label": None}, {"num_labels": None}])
def test_one_label_may_be_stated_in_either_way(tmp_path, changes):
    save_scalar(ours(), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    assert_same_weights(load_scalar(tmp_path), ours())


def test_heads_of_other_shapes_and_missing_ones_are_refused(tmp_path):
    save_scalar(ours(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for value in (np.zeros((2, TINY.hidden_size)), np.zeros(TINY.hidden_size)):
        write_safetensors(tmp_path / "model.safetensors", tensors | {"score.weight": value.astype(np.float32)})
        with pytest.raises(ValueError, match=r"tensor 'score.weight' has shape .*, the config asks for \(1, 32\)"):
            load_scalar(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {k: v for k, v in tensors.items() if k != "score.weight"})
    with pytest.raises(ValueError, match=r"missing tensor 'score\.weight'"):
        load_scalar(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", tensors | {"score.bias": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"unexpected tensor 'score\.bias'"):
        load_scalar(tmp_path)


def test_truncated_files_are_refused(tmp_path):
    save_scalar(ours(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors") as caught:
        load_scalar(tmp_path)
    assert "\n" not in str(caught.value)


# Adapters, meshes, the tokens that fill up.


def test_adapters_are_merged_before_saving(tmp_path):
    model = ours()
    adapted = add_lora(model.llama, LoraConfig(rank=2, alpha=4), key=jax.random.key(1))
    adapted = jax.tree.map(lambda leaf: leaf + 0.1, adapted)
    with_lora = ScalarLLaMa(adapted, model.score_D[...])
    with pytest.raises(ValueError, match="has adapters"):
        save_scalar(with_lora, tmp_path)
    assert not any(tmp_path.iterdir())
    merged = ScalarLLaMa(merge_lora(adapted), model.score_D[...])
    save_scalar(merged, tmp_path)
    np.testing.assert_allclose(scores(load_scalar(tmp_path)), scores(with_lora), rtol=1e-4, atol=1e-4)

    trained = nnx.state(with_lora, nnx.Any(nnx.LoRAParam, HeadParam))
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    assert sum("score_D" in name for name in names) == 1 and len(names) == 1 + 2 * 7


def test_a_later_save_replaces_a_language_model(tmp_path):
    save_pretrained(random_model(TINY), tmp_path, max_shard_bytes=10_000)
    save_scalar(ours(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_scalar(ours(), tmp_path / "config.json")


MESHES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from models.llama import load_scalar, random_scalar, save_scalar
from models.llama.init import parameter_shardings
from tests.models.llama.checkpoints import TINY
from utils.sharding import make_mesh

folder, = sys.argv[1:]
mesh = make_mesh((1, 2, 2, 2))
found, whole = load_scalar(folder, mesh=mesh), load_scalar(folder)
assert found.score_D.sharding.shard_shape(found.score_D.shape) == (8,), found.score_D.sharding
assert jax.tree.leaves(parameter_shardings(whole, mesh)) == [leaf.sharding for leaf in jax.tree.leaves(found)]
jax.tree.map(np.testing.assert_array_equal, found, whole)
save_scalar(found, folder + "/again")
made = [random_scalar(TINY, key=jax.random.key(3), mesh=own) for own in (mesh, None)]
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *made)
assert len(made[0].score_D.sharding.device_set) == 8 and float(jnp.std(made[1].score_D[...])) > 0.01
"""


def test_eight_devices_hold_parts_of_one_network(tmp_path, repo_root):
    save_scalar(ours(), tmp_path)
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", MESHES, str(tmp_path)]
    done = subprocess.run(command, cwd=repo_root, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(load_scalar(tmp_path / "again"), ours())


@pytest.mark.parametrize(
    "folder, pad",
    [
        ("stories260k/hf", 0),  # <unk>, as there is no padding
        ("tokenizers/minimind", 0),  # its own, <|endoftext|>, which is not what ends its texts
        ("tokenizers/gpt2", None),  # all that it has is the end of texts
        ("tokenizers/llama3", 128004),
    ],
)
def test_padding_is_no_end_of_texts(tmp_path, assets_dir, folder, pad):
    tokenizer = load_tokenizer(assets_dir / folder)
    config = replace(TINY, hidden_size=4, intermediate_size=4, num_layers=1, layer_windows=(None,), head_dim=2)
    model = random_scalar(replace(config, vocab_size=tokenizer.vocab_size), key=jax.random.key(0))
    save_scalar(model, tmp_path, tokenizer_from=assets_dir / folder)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == pad
    saved = load_tokenizer(tmp_path)
    assert saved.pad_id == pad and saved.stop_ids == tokenizer.stop_ids
    if pad is not None and (tmp_path / "tokenizer_config.json").exists():
        transformers = pytest.importorskip("transformers")
        assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token_id == pad


def test_padding_that_ends_texts_is_replaced(tmp_path, assets_dir):
    """As of many language models, whose users set the padding to the end of texts."""
    source = tmp_path / "source"
    source.mkdir()
    for path in (assets_dir / "stories260k" / "hf").glob("tokenizer*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    edit_json(source / "tokenizer_config.json", pad_token="</s>")
    save_scalar(ours(replace(TINY, vocab_size=512)), tmp_path / "saved", tokenizer_from=source)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pad_token_id"] == 0
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["pad_token"] == "<unk>"
    assert json.loads((source / "tokenizer_config.json").read_text())["pad_token"] == "</s>"
    save_scalar(ours(), tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["pad_token_id"] is None
