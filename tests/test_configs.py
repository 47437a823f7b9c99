"""The recipes in configs/."""

import re
from pathlib import Path

import pytest

import train
from models.llama import PRESETS
from tests.trainers.runs import RECIPES as ALGORITHMS
from trainers.groups import count_pieces
from trainers.parts import CHARACTERS, hugging_face_config, network_config
from trainers.rewards import load_rewards
from trainers.settings import CommonConfig, GRPORunConfig
from utils.settings import dump_yaml, load_settings

ROOT = Path(train.__file__).parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


class OfSize:
    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def command(name: str) -> str:
    """The line above a recipe that says how to run it."""
    head = (ROOT / "configs" / f"{name}.yaml").read_text().split("\noutput_dir")[0]
    return next(line for line in head.splitlines() if "train.py" in line)


def kind(name: str) -> type[CommonConfig]:
    return ALGORITHMS[re.search(r"train\.py (\w+) ", command(name))[1]].config


def load(name: str, flags: tuple[str, ...] = ()) -> CommonConfig:
    return load_settings(kind(name), ROOT / "configs" / f"{name}.yaml", flags)


def test_all_recipes_are_there():
    assert {"shakespeare", "sft_small", "sft_lora", "pretrain_125m", "llama3_8b"} <= set(RECIPES)
    assert {"gsm8k_grpo", "llama3_1b_grpo"} <= set(RECIPES)
    assert {"dpo_small", "reward_small", "ppo_small", "distill_small"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_strictly_and_written_back(name: str, tmp_path: Path):
    config = load(name)
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_settings(kind(name), tmp_path / "again.yaml") == config
    assert config.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_a_network_that_can_be_written(name: str):
    config = load(name)
    if config.model.preset is None:
        assert config.model.checkpoint
        return
    assert config.model.preset in PRESETS
    llama = network_config(config.model, OfSize(65 if config.tokenizer == CHARACTERS else 50257))
    assert hugging_face_config(llama) is not None
    assert config.data.sequence_length <= llama.max_text_length


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_above_a_recipe_names_it(name: str):
    line = command(name)
    for named in set(name.split("_")) & set(ALGORITHMS):
        assert f"train.py {named} " in line
    assert f"--config configs/{name}.yaml" in line
    flags = line.split(f"--config configs/{name}.yaml")[1].replace("'", "").split()
    load(name, tuple(flags))


def test_the_recipe_of_shakespeare_is_of_nanogpts_size():
    config = load("shakespeare")
    llama = network_config(config.model, OfSize(66))
    assert (llama.num_layers, llama.num_heads, llama.hidden_size) == (4, 4, 128)
    assert (config.trainer.steps, config.trainer.batch_size, config.data.sequence_length) == (2000, 12, 64)


@pytest.mark.parametrize("name", [name for name in RECIPES if kind(name) is GRPORunConfig])
def test_the_rewards_of_a_recipe_are_there_and_its_updates_can_be_cut(name: str):
    config = load(name)
    assert [reward.name for reward in load_rewards(config.rewards)] == ["gsm8k_answer"]
    for devices in (1, 8):
        data, fsdp, *_ = config.mesh.shape(devices)
        rows = config.trainer.accumulation_steps * data * fsdp
        count_pieces(config.trainer.batch_size, config.rollout.completions, rows)
