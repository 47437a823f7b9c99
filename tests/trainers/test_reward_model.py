"""The score of a reward model as a reward, from settings, against transformers on the same tokens."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.chat import encode_chat
from data.chat_templates import CHAT_TEMPLATES
from models.llama import ScalarLLaMa, load_scalar, load_tokenizer, random_scalar, save_pretrained, save_scalar
from tests.models.llama.checkpoints import TINY, edit_json, random_model
from tests.trainers.test_reward_functions import HOSTILE
from trainers import reward_model
from trainers.reward_model import RewardModel
from trainers.rewards import RewardConfig, RewardError, load_rewards, score
from utils.settings import load_settings

SMALL = replace(TINY, num_layers=1, layer_windows=(None,), max_position_embeddings=512, initializer_range=0.3)


@pytest.fixture(scope="module")
def stories(tmp_path_factory, assets_dir):
    """A reward model on the trained network, with the tokenizer that has no chat template."""
    folder = tmp_path_factory.mktemp("stories")
    network = load_scalar(assets_dir / "stories260k" / "hf")
    head = np.random.default_rng(0).normal(size=network.config.hidden_size)
    save_scalar(ScalarLLaMa(network.llama, jnp.asarray(head)), folder, tokenizer_from=assets_dir / "stories260k" / "hf")
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory, assets_dir):
    """A random reward model with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("chats")
    model = random_scalar(replace(SMALL, vocab_size=6400), key=jax.random.key(0))
    save_scalar(model, folder, tokenizer_from=assets_dir / "tokenizers" / "minimind")
    return folder


def from_yaml(tmp_path, folder, **options):
    """The reward as the settings of a run have it."""
    lines = [f"  {name}: {json.dumps(value)}" for name, value in {"checkpoint": str(folder), **options}.items()]
    path = tmp_path / "reward.yaml"
    path.write_text("\n".join(["function: reward_model", "options:", *lines]))
    return load_rewards([load_settings(RewardConfig, path)])


def scored(rewards, prompts, completions, **columns):
    return score(rewards, prompts, completions, [[1]] * len(prompts), columns)[:, 0]


def transformers_scores(folder, rows):
    """Theirs, of all rows in one batch, filled up with what their config says."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens_BT = np.full((len(rows), max(map(len, rows))), model.config.pad_token_id)
    for row, ids in zip(tokens_BT, rows):
        row[: len(ids)] = ids
    mask_BT = np.arange(tokens_BT.shape[1]) < np.array([len(ids) for ids in rows])[:, None]
    with torch.no_grad():
        return model(torch.tensor(tokens_BT), attention_mask=torch.tensor(mask_BT.astype(int))).logits.numpy()[:, 0]


STORIES = [
    ("Once upon a time", ", there was a girl."),
    ("Once upon a time", ""),
    ("Lily", " went to the park with her mom. " * 12),
    ("The", " end"),
]


def test_texts_are_scored_as_transformers_scores_them(tmp_path, stories):
    prompts, completions = zip(*STORIES)
    tokenizer = load_tokenizer(stories)
    rows = [[1, *tokenizer.encode(prompt + completion), 2] for prompt, completion in STORIES]
    expected = transformers_scores(stories, rows)
    assert np.std(expected) > 1 and len(rows[2]) > 100
    found = scored(from_yaml(tmp_path, stories, batch_size=2), prompts, completions)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_conversations_are_rendered_whole(tmp_path, chats):
    tokenizer = load_tokenizer(chats)
    prompts = [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello <|im_end|>"}],
        [{"role": "user", "content": "1 + 1"}],
    ]
    completions = [[{"role": "assistant", "content": text}] for text in ("Hello!", "2")]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    columns = {"tools": [None, json.dumps([tool])]}
    rows = [
        encode_chat(tokenizer, prompt + completion, tools=tools)
        for prompt, completion, tools in zip(prompts, completions, (None, [tool]))
    ]
    text = tokenizer.decode(rows[0])
    assert text.startswith("<|im_start|>system\nBe kind.") and text.endswith("Hello!<|im_end|>\n")
    expected = transformers_scores(chats, rows)
    assert abs(expected[0] - expected[1]) > 0.01
    rewards = from_yaml(tmp_path, chats)
    np.testing.assert_allclose(scored(rewards, prompts, completions, **columns), expected, rtol=1e-4, atol=1e-5)
    assert scored(rewards, prompts, completions)[1] != pytest.approx(expected[1], abs=1e-4)

    plain = scored(from_yaml(tmp_path, chats, chat_template="chatml"), prompts, completions)
    rows = [encode_chat(tokenizer, p + c, template=CHAT_TEMPLATES["chatml"]) for p, c in zip(prompts, completions)]
    np.testing.assert_allclose(plain, transformers_scores(chats, rows), rtol=1e-4, atol=1e-5)
    with pytest.raises(RewardError, match="both be text or both be messages"):
        scored(rewards, prompts, ["a", "b"])


def test_scores_do_not_depend_on_the_texts_beside(stories):
    prompts, completions = zip(*STORIES)
    reward = RewardModel(checkpoint=str(stories), batch_size=3)
    together = reward(prompts=prompts, completions=completions)
    assert together[::-1] == reward(prompts=prompts[::-1], completions=completions[::-1])
    for place in range(len(prompts)):
        assert reward(prompts=[prompts[place]], completions=[completions[place]]) == [together[place]]


def test_programs_are_as_few_as_lengths(stories, monkeypatch):
    shapes = []
    monkeypatch.setattr(reward_model, "_scores", lambda model, tokens, lengths: shapes.append(tokens.shape) or lengths)
    reward = RewardModel(checkpoint=str(stories), batch_size=4, max_length=200)
    texts = ["a " * count for count in (1, 2, 3, 5, 8, 70, 75, 150, 300, 90, 20)]
    lengths = reward(prompts=[""] * len(texts), completions=texts)
    assert set(shapes) == {(4, 64), (4, 128), (4, 200)} and len(shapes) == 4
    assert lengths == [min(200, 1 + len(load_tokenizer(stories).encode(text)) + 1) for text in texts]
    assert reward(prompts=[], completions=[]) == []


def test_longer_texts_keep_their_end(tmp_path, stories):
    tokenizer = load_tokenizer(stories)
    ids = [*tokenizer.encode(STORIES[2][0] + STORIES[2][1]), 2][-20:]
    found = scored(from_yaml(tmp_path, stories, max_length=20), *([text] for text in STORIES[2]))
    np.testing.assert_allclose(found, transformers_scores(stories, [ids]), rtol=1e-4, atol=1e-4)


def test_whatever_a_completion_says_it_has_a_score(chats):
    reward = RewardModel(checkpoint=str(chats), max_length=64)
    prompts = [*["1 + 1"] * len(HOSTILE), *[[{"role": "user", "content": "1 + 1"}]] * len(HOSTILE)]
    found = reward(prompts=prompts, completions=[*HOSTILE, *([{"role": "assistant", "content": t}] for t in HOSTILE)])
    assert np.isfinite(found).all() and all(type(value) is float for value in found)


def test_weights_are_loaded_when_they_are_first_needed(stories, monkeypatch):
    calls = []
    real = reward_model.load_scalar
    monkeypatch.setattr(reward_model, "load_scalar", lambda *a, **k: calls.append(k["dtype"]) or real(*a, **k))
    reward = RewardModel(checkpoint=str(stories), dtype="bfloat16")
    assert not calls
    for _ in range(2):
        [found] = reward(prompts=["Lily"], completions=[" ran"])
    assert calls == [jnp.bfloat16]
    [whole] = RewardModel(checkpoint=str(stories))(prompts=["Lily"], completions=[" ran"])
    assert found != whole and found == pytest.approx(whole, abs=0.3)


def test_mistakes_are_found_before_the_run(tmp_path, stories, assets_dir):
    def refused(kind, match, folder=stories, **options):
        with pytest.raises(kind, match=match) as caught:
            from_yaml(tmp_path, folder, **options)
        assert "\n" not in str(caught.value)

    refused(FileNotFoundError, "nowhere: no such file", tmp_path / "nowhere")
    refused(ValueError, "a language model, which gives texts no score", assets_dir / "stories260k" / "hf")
    refused(ValueError, "batch_size must be at least 1, not 0", batch_size=0)
    refused(ValueError, "max_length must be from 1 to the network's 512 tokens, not 513", max_length=513)
    refused(ValueError, "max_length must be from 1", max_length=0)
    refused(ValueError, "chat template 'mine' is neither a file nor one of", chat_template="mine")
    refused(ValueError, "dtype: expected", dtype="int8")
    with pytest.raises(ValueError, match="checkpoint: required, but not given"):
        load_rewards([RewardConfig(function="reward_model")])

    small = random_scalar(replace(SMALL, vocab_size=40), key=jax.random.key(0))
    save_scalar(small, tmp_path / "small")
    refused(FileNotFoundError, "no tokenizer", tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").write_bytes((stories / "tokenizer.json").read_bytes())
    refused(ValueError, "the tokenizer has 512 ids but the network only 40", tmp_path / "small")
    edit_json(tmp_path / "small" / "config.json", id2label={"0": "a", "1": "b"})
    refused(ValueError, "of 2 labels is not supported", tmp_path / "small")
    save_pretrained(random_model(SMALL), tmp_path / "small")
    refused(ValueError, "a language model", tmp_path / "small")


MESHES = """
import sys
import jax, numpy as np
from trainers.reward_model import RewardModel
from utils.sharding import make_mesh

folder, = sys.argv[1:]
texts = dict(prompts=["Once upon a time", "Lily", "The"], completions=[" there was", " ran. " * 30, " end"])
alone = RewardModel(checkpoint=folder)(**texts)
with jax.set_mesh(make_mesh((2, 2, 2, 1))):
    reward = RewardModel(checkpoint=folder, batch_size=3)
    np.testing.assert_allclose(reward(**texts), alone, rtol=1e-5, atol=1e-5)
    assert len(reward._model.llama.embed_VD.sharding.device_set) == 8
np.testing.assert_allclose(reward(**texts), alone, rtol=1e-5, atol=1e-5)
"""


def test_in_a_run_on_a_mesh_the_weights_lie_on_it(repo_root, stories):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    command = [sys.executable, "-c", MESHES, str(stories)]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, cwd=repo_root, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
