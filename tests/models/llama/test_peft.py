"""Adapters that `peft` writes and reads: the same logits either way, exact round trips, and all that is refused."""

import json
import math
import os
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.llama import LoraConfig, add_lora, load_peft, load_pretrained, merge_lora, save_peft, save_pretrained
from models.llama.lora import adapters_of, with_adapters
from models.llama.model import Adapter
from tests.models.llama.checkpoints import FAMILIES, TINY, assert_same_weights, edit_json, random_model
from tests.models.llama.checkpoints import write_safetensors as write_by_library
from tests.models.llama.test_lora import RANK_4, UNGATED, adapted, forward, loss_of
from tests.models.llama.test_save import transformers_model

TOKENS = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 11))
Q_OF_LAYER_1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def logits_of(theirs) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return theirs.eval()(torch.tensor(TOKENS)).logits.float().numpy()


def assert_near(got, want, tolerance=1e-5):
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=tolerance * np.abs(want).max())


def read_back(folder, base):
    """What `peft` makes of a folder; nothing may be missing from it or left over."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base, folder)


def adapted_by_peft(base, **options):
    """Adapters whose two factors are random."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    return peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved random networks by family, made when they are asked for."""

    def folder(family: str):
        path = root / family
        if not path.exists():
            save_pretrained(random_model(FAMILIES[family]), path)
        return path

    root = tmp_path_factory.mktemp("bases")
    return folder


def tensors_in(folder) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


# Theirs to ours

WAYS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {},
    "pattern": {"target_modules": r".*\.(o_proj|k_proj|down_proj)"},
    "pattern-of-layers": {"target_modules": r"model\.layers\.[12]\.(mlp\..*_proj|self_attn\.q_proj)"},
    "stabilised": {"use_rslora": True},
    "ranks": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "up_proj": 2, r"layers\.[02]\.mlp\.down_proj": 1},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 5, "o_proj": 30, "layers.2.mlp.up_proj": 3},
    },
    "ranks-stabilised": {"rank_pattern": {"layers.0.self_attn.v_proj": 7}, "use_rslora": True},
    "layers": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    "one-layer": {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "excluded-pattern": {"exclude_modules": r".*layers\.2.*", "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_of_peft(folders, tmp_path, way):
    theirs = adapted_by_peft(transformers_model(folders("qwen2")), **WAYS[way])
    theirs.save_pretrained(tmp_path)
    base = load_pretrained(folders("qwen2"))
    ours = load_peft(base, tmp_path)
    expected = logits_of(theirs)
    assert_near(forward(ours, TOKENS), expected)
    assert np.abs(expected - np.asarray(forward(base, TOKENS))).max() > 0.02 * np.abs(expected).max()
    merged = merge_lora(ours)
    assert_near(forward(merged, TOKENS), expected)
    assert_near(forward(merged, TOKENS), logits_of(theirs.merge_and_unload()))
    assert_same_weights(load_pretrained(folders("qwen2")), base)

    save_peft(ours, tmp_path / "again")
    assert_near(logits_of(read_back(tmp_path / "again", transformers_model(folders("qwen2")))), expected)
    again = load_peft(base, tmp_path / "again")
    assert_same_weights(again, ours)
    assert jax.tree.structure(again) == jax.tree.structure(ours)


def test_layers_of_other_ranks_are_filled_with_zeros(folders, tmp_path):
    options = WAYS["ranks"] | {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 1]}
    adapted_by_peft(transformers_model(folders("qwen2")), **options).save_pretrained(tmp_path)
    ours = load_peft(load_pretrained(folders("qwen2")), tmp_path)
    q, up = ours.blocks.adapters.q_DNH, ours.blocks.adapters.up_DF
    assert (q.a.shape, q.b.shape, up.a.shape) == ((3, 32, 6), (3, 6, 4, 8), (3, 32, 2))
    empty = [not np.asarray(q.a[layer, :, 4:]).any() and not np.asarray(q.b[layer, 4:]).any() for layer in range(3)]
    assert empty == [True, False, True]
    assert not np.asarray(q.a[2]).any() and not np.asarray(q.b[2]).any()
    assert (q.scale, up.scale) == (3.0, 6.0)
    stored = tensors_in(tmp_path)["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    np.testing.assert_allclose(q.b[1].reshape(6, 32).T, stored * (5 / 6) / 3, rtol=1e-6)  # alpha 5 of rank 6
    # What is zero has no gradient, so training leaves it so.
    grads = jax.jit(jax.grad(loss_of))(ours, jnp.asarray(TOKENS)).blocks.adapters.q_DNH
    assert not np.asarray(grads.a[0, :, 4:]).any() and not np.asarray(grads.b[2]).any()
    assert np.asarray(grads.a[0, :, :4]).any() and np.asarray(grads.b[1, 4:]).any()


@pytest.mark.parametrize("family", ["mha", "gqa-tied", "mqa-wide-heads", "all-biases", "qwen3"])
def test_adapters_of_peft_on_other_networks(folders, tmp_path, family):
    theirs = adapted_by_peft(transformers_model(folders(family)))
    theirs.save_pretrained(tmp_path)
    ours = load_peft(load_pretrained(folders(family)), tmp_path)
    assert_near(forward(ours, TOKENS), logits_of(theirs))


def test_uniform_adapters_are_taken_as_they_are(folders, tmp_path):
    adapted_by_peft(transformers_model(folders("qwen2")), lora_dropout=0.25).save_pretrained(tmp_path)
    ours = load_peft(load_pretrained(folders("qwen2")), tmp_path)
    assert {(x.scale, x.dropout) for x in adapters_of(ours).values()} == {(3.0, 0.25)}
    save_peft(ours, tmp_path / "again")
    before, after = tensors_in(tmp_path), tensors_in(tmp_path / "again")
    assert before.keys() == after.keys() and len(before) == 2 * 7 * 3
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
        assert after[name].dtype == value.dtype


def test_older_files_and_bases_without_output_matrix(folders, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = adapted_by_peft(transformers_model(folders("qwen2")), rank_pattern={"layers.1.self_attn.q_proj": 2})
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    base = load_pretrained(folders("qwen2"))
    ours = load_peft(base, tmp_path)
    assert_near(forward(ours, TOKENS), logits_of(theirs))

    tensors = torch.load(tmp_path / "adapter_model.bin")
    shorter = {name.replace("model.model.model", "model.model"): value.numpy() for name, value in tensors.items()}
    write_by_library(tmp_path / "adapter_model.safetensors", shorter)
    edit_json(tmp_path / "adapter_config.json", target_modules="all-linear")
    assert_same_weights(load_peft(base, tmp_path), ours)


def test_stories(assets_dir, tmp_path):
    folder = assets_dir / "stories260k" / "hf"
    theirs = adapted_by_peft(transformers_model(folder), r=3, use_rslora=True)
    theirs.save_pretrained(tmp_path / "theirs")
    for layout in ("hf", "meta"):  # stored in another order of rows, the same network to us
        ours = load_peft(load_pretrained(folder.parent / layout), tmp_path / "theirs")
        assert_near(forward(ours, TOKENS), logits_of(theirs), 2e-5)
    save_peft(ours, tmp_path / "ours")
    assert_near(logits_of(read_back(tmp_path / "ours", transformers_model(folder))), logits_of(theirs), 1e-6)


# Ours to theirs

CONFIGS = {
    "all": RANK_4,
    "some": LoraConfig(rank=2, alpha=3.0, targets=("k_proj", "down_proj"), dropout=0.1),
    "stabilised": LoraConfig(rank=3, alpha=16.0, rslora=True),
    "uneven": LoraConfig(rank=3, alpha=0.7),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["gqa-tied", "qwen2"])
def test_peft_reads_ours(folders, tmp_path, family, config):
    base = load_pretrained(folders(family))
    ours = adapted(base, CONFIGS[config])
    save_peft(ours, tmp_path, base_model_name_or_path=str(folders(family)))
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (raw["base_model_name_or_path"], raw["lora_dropout"]) == (str(folders(family)), CONFIGS[config].dropout)
    assert (raw["use_rslora"], raw["r"]) == (CONFIGS[config].rslora, CONFIGS[config].rank)
    assert math.isclose(raw["lora_alpha"], CONFIGS[config].alpha)
    theirs = read_back(tmp_path, transformers_model(folders(family)))
    assert_near(forward(ours, TOKENS), logits_of(theirs))
    assert_near(forward(merge_lora(ours), TOKENS), logits_of(theirs))

    back = load_peft(base, tmp_path)
    assert_same_weights(back, ours)
    np.testing.assert_array_equal(forward(back, TOKENS), forward(ours, TOKENS))
    if config != "uneven":
        assert jax.tree.structure(back) == jax.tree.structure(ours)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_weights(load_peft(base, tmp_path / "theirs"), ours)


def test_adapters_of_several_ranks_and_scales(folders, tmp_path):
    base = load_pretrained(folders("qwen2"))
    every = [adapted(base, LoraConfig(rank=r, alpha=x), seed=r) for r, x in ((2, 4.0), (5, 5.0), (3, 6.0))]
    pick = zip(("up_DF", "q_DNH", "o_NHD"), every)
    ours = with_adapters(base, {name: getattr(model.blocks.adapters, name) for name, model in pick})
    save_peft(ours, tmp_path)
    assert_near(forward(ours, TOKENS), logits_of(read_back(tmp_path, transformers_model(folders("qwen2")))))
    assert_same_weights(load_peft(base, tmp_path), ours)


def test_short_types(folders, tmp_path):
    base = random_model(FAMILIES["qwen2"], dtype=jnp.bfloat16)
    ours = adapted(base, dtype=jnp.float32)
    save_peft(ours, tmp_path / "short", dtype=jnp.bfloat16)
    rounded = load_peft(base, tmp_path / "short", dtype=jnp.bfloat16)
    for linear, adapter in adapters_of(rounded).items():
        assert adapter.a.dtype == adapter.b.dtype == jnp.bfloat16
        exact = adapters_of(ours)[linear]
        np.testing.assert_array_equal(adapter.a[...], exact.a[...].astype(jnp.bfloat16))
    save_peft(rounded, tmp_path / "kept")
    names = ("short", "kept")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names)
    assert first == second
    assert load_peft(base, tmp_path / "kept").blocks.adapters.q_DNH.b.dtype == jnp.float32


def test_networks_that_transformers_does_not_have(tmp_path):
    base = random_model(UNGATED)
    ours = adapted(base)
    save_peft(ours, tmp_path)
    assert_same_weights(load_peft(base, tmp_path), ours)


@pytest.mark.parametrize("family", ["gqa-tied", "qwen2"])
def test_steps_of_training_are_those_of_peft(folders, tmp_path, family):
    """Plain gradient descent on the same tokens, from the same adapters."""
    torch = pytest.importorskip("torch")
    base = load_pretrained(folders(family))
    ours = adapted(base, LoraConfig(rank=4, alpha=4.0))
    save_peft(ours, tmp_path)
    theirs = read_back(tmp_path, transformers_model(folders(family)))
    factors = [value for name, value in theirs.named_parameters() if "lora_" in name]
    for parameter in theirs.parameters():
        parameter.requires_grad = any(parameter is factor for factor in factors)
    optimizer = torch.optim.SGD(factors, lr=0.02)
    graph, state, rest = nnx.split(ours, nnx.LoRAParam, ...)
    step = jax.jit(jax.value_and_grad(lambda state: loss_of(nnx.merge(graph, state, rest), jnp.asarray(TOKENS))))
    for _ in range(4):
        loss, grads = step(state)
        state = jax.tree.map(lambda x, g: x - 0.02 * g, state, grads)
        optimizer.zero_grad()
        their_loss = theirs(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss
        their_loss.backward()
        optimizer.step()
        np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-4)
    assert_near(forward(nnx.merge(graph, state, rest), TOKENS), logits_of(theirs), 1e-4)
    assert np.abs(logits_of(theirs) - np.asarray(forward(ours, TOKENS))).max() > 0.1


# Folders that are not to be had


@pytest.fixture
def saved(tmp_path):
    """A network and the folder of its adapters."""
    base = random_model(TINY)
    save_peft(adapted(base), tmp_path / "adapters")
    return base, tmp_path / "adapters"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is supported"),
        ({"bias": "lora_only"}, "bias is 'lora_only': trained biases are not supported"),
        ({"modules_to_save": ["embed_tokens"]}, r'modules_to_save is \["embed_tokens"\]: whole modules .* not supp'),
        ({"use_dora": True}, "use_dora is true: .*DoRA.* not supported"),
        ({"lora_bias": True}, "lora_bias is true: biases of adapters are not supported"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]: .* not supported"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication .* not supported"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens .* not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which may change the base"),
        ({"use_novelty": True}, "use_novelty is true: no such thing is known here"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head: only adapters of the blocks' linear layers"),
        ({"target_modules": r".*embed_tokens"}, "adapts model.embed_tokens: only adapters"),
        ({"target_modules": ["c_attn"]}, r"adapts \['c_attn'\], which is no linear layer of the network"),
        ({"target_modules": []}, r"target_modules is \[\]: no modules to adapt"),
        ({"target_modules": "("}, r"target_modules '\(' is no regular expression"),
        ({"target_modules": {"a": 1}}, 'target_modules must be a list of names or a pattern, not {"a": 1}'),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, "goes with a list of target_modules, not with"),
        ({"layers_to_transform": ["x"]}, 'layers_to_transform must be a whole number, not "x"'),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern '\(' is no regular expression"),
        ({"alpha_pattern": {"q_proj": "x"}}, 'alpha_pattern must be a number, not "x"'),
        ({"rank_pattern": [1]}, "a value of the wrong kind .*'list' object has no attribute 'items'"),
        ({"r": 0}, "r must be at least 1, not 0"),
        ({"r": 2.5}, "r must be a whole number, not 2.5"),
        ({"lora_alpha": True}, "lora_alpha must be a number, not true"),
        ({"lora_dropout": 1.0}, "lora_dropout must be from 0 to below 1, not 1.0"),
    ],
)
def test_configs_that_are_refused(saved, change, message):
    base, folder = saved
    edit_json(folder / "adapter_config.json", **change)
    with pytest.raises(ValueError, match=message) as caught:
        load_peft(base, folder)
    assert str(caught.value).startswith(str(folder / "adapter_config.json")) and "\n" not in str(caught.value)


def test_missing_and_broken_files(saved, tmp_path):
    base, folder = saved
    with pytest.raises(FileNotFoundError, match=r"elsewhere/adapter_config.json is not there"):
        load_peft(base, tmp_path / "elsewhere")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: truncated"):
        load_peft(base, folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is not there"):
        load_peft(base, folder)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not JSON"):
        load_peft(base, folder)


def test_tensors_that_do_not_fit(saved):
    base, folder = saved
    path, tensors = folder / "adapter_model.safetensors", tensors_in(folder)

    def refused(message, **changes):
        changed = tensors | changes
        write_by_library(path, {name: value for name, value in changed.items() if value is not None})
        with pytest.raises(ValueError, match=message) as caught:
            load_peft(base, folder)
        assert str(caught.value).startswith(str(path))

    refused(f"missing tensor '{Q_OF_LAYER_1}', which adapter_config.json asks for", **{Q_OF_LAYER_1: None})
    refused(
        rf"'{Q_OF_LAYER_1}' has shape \(4, 31\), the network and the rank 4 ask for \(4, 32\)",
        **{Q_OF_LAYER_1: tensors[Q_OF_LAYER_1][:, 1:]},
    )
    refused(r"has shape \(3, 32\), the network and the rank 4", **{Q_OF_LAYER_1: tensors[Q_OF_LAYER_1][1:]})
    refused("stored as I32, which is not supported", **{Q_OF_LAYER_1: tensors[Q_OF_LAYER_1].astype(np.int32)})
    deeper = Q_OF_LAYER_1.replace("layers.1", "layers.3")
    refused(f"unexpected tensor '{deeper}', one of 1", **{deeper: tensors[Q_OF_LAYER_1]})
    embedding = "base_model.model.model.embed_tokens.lora_embedding_A"
    refused(f"unexpected tensor '{embedding}'", **{embedding: np.ones((4, 48), np.float32)})
    path.unlink()
    write_by_library(path, tensors)
    load_peft(base, folder)
    with pytest.raises(ValueError, match=r"lora_A.weight' has shape \(4, 32\), .* ask for \(4, 16\)"):
        load_peft(random_model(replace(TINY, hidden_size=16)), folder)


def test_networks_that_cannot_be_saved_or_loaded_onto(saved, tmp_path):
    base, folder = saved
    with pytest.raises(ValueError, match="the network has adapters already, of q_proj"):
        load_peft(load_peft(base, folder), folder)
    with pytest.raises(ValueError, match="adapters cannot be int32"):
        load_peft(base, folder, dtype=jnp.int32)
    with pytest.raises(ValueError, match="the network has no adapters"):
        save_peft(base, tmp_path / "new")
    q = adapted(base).blocks.adapters.q_DNH
    v = adapted(base).blocks.adapters.v_DKH
    mixed = with_adapters(base, {"q_DNH": q, "v_DKH": Adapter(v.a, v.b, scale=1.0, dropout=0.5)})
    with pytest.raises(ValueError, match=r"dropout differs between adapters: \[0.0, 0.5\]"):
        save_peft(mixed, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        save_peft(adapted(base), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("earlier", [False, True])
def test_a_killed_save_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, earlier):
    """Whichever step fails, the folder holds the earlier adapters or none."""
    base = random_model(TINY)
    old, new = adapted(base, seed=1), adapted(base, replace(RANK_4, rank=2), seed=2)
    for steps in range(20):
        folder, count = tmp_path / str(steps), 0
        if earlier:
            save_peft(old, folder)

        def hook(original, limit=steps):
            def step(*args, **kwargs):
                nonlocal count
                count += 1
                if count > limit:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            return step

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "fsync"), (type(tmp_path), "unlink")):
                patch.setattr(owner, name, hook(getattr(owner, name)))
            try:
                save_peft(new, folder)
                break
            except KeyboardInterrupt:
                pass
        try:
            assert_same_weights(load_peft(base, folder), old)
            assert earlier
        except FileNotFoundError as error:
            assert "adapter_config.json" in str(error)
    assert steps == 5
    assert_same_weights(load_peft(base, folder), new)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    save_peft(add_lora(base, RANK_4, key=jax.random.key(0)), folder)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
