"""Small runs for tests: settings, data of invented words, and what a run has left behind."""

import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.characters import write_character_tokenizer
from inference.rollout import sampler
from models.llama import PRESETS, load_tokenizer, save_pretrained
from models.llama.init import random_model
from trainers.distill_recipe import DistillRecipe
from trainers.distill_trainer import DistillTrainer
from trainers.dpo_trainer import DPOTrainer
from trainers.grpo_recipe import GRPORecipe
from trainers.grpo_trainer import GRPOTrainer
from trainers.language_model_recipe import LanguageModelRecipe
from trainers.ppo_recipe import PPORecipe
from trainers.ppo_trainer import PPOTrainer
from trainers.preference_recipe import DPORecipe, RewardRecipe
from trainers.pretrain_trainer import PretrainTrainer
from trainers.reward_trainer import RewardTrainer
from trainers.run import prepare, train
from trainers.sft_trainer import SFTTrainer
from trainers.trainer import TrainState
from utils.settings import load_settings

RECIPES = {
    "pretrain": LanguageModelRecipe(PretrainTrainer),
    "sft": LanguageModelRecipe(SFTTrainer),
    "dpo": DPORecipe(DPOTrainer),
    "reward": RewardRecipe(RewardTrainer),
    "ppo": PPORecipe(PPOTrainer, sampler),
    "grpo": GRPORecipe(GRPOTrainer, sampler),
    "distill": DistillRecipe(DistillTrainer, sampler),
}
# Never the same twice, and those that begin so.
CLOCK = ("tokens_per_second", "step_seconds", "data_wait", "peak_memory_bytes", "mfu", "rollout_tokens_per_second")
CLOCKS = ("time/", "memory/")
_WORDS = ("cat", "dog", "hill", "sun", "red", "blue", "sat", "ran", "on", "over", "the", "a", "to", "see", "and")


def words(count: int, seed: int = 0) -> str:
    """Some text of few characters."""
    return " ".join(random.Random(seed).choices(_WORDS, k=count))


def pretraining(folder: Path, **changes: str) -> dict[str, str]:
    """Flags of 14 steps over one text, more than an epoch: shuffled rows, dropout, accumulation, evaluation."""
    (folder / "text.txt").write_text(words(350))
    return _flags(folder, "text.txt", "concat", "characters") | changes


def tuning(folder: Path, **changes: str) -> dict[str, str]:
    """Flags of the like over prompts and completions."""
    rows = [{"prompt": words(2, 2 * i) + " ", "completion": words(2, 2 * i + 1)} for i in range(70)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_character_tokenizer([" ".join(_WORDS)], folder / "characters")
    return _flags(folder, "rows.jsonl", "best_fit", str(folder / "characters")) | changes


def reinforcing(folder: Path, **changes: str) -> dict[str, str]:
    """Flags of 9 steps of GRPO towards the letter a, with evaluation; 18 prompts: epochs end on the way."""
    rows = [{"prompt": words(2, i), "answer": words(1, i)} for i in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_character_tokenizer([" ".join(_WORDS)], folder / "characters")
    _give_an_end(folder / "characters")
    flags = _flags(folder, "prompts.jsonl", "", str(folder / "characters"))
    for key in ("data.sequence_length", "data.packing", "data.cache_dir", "loss.dropout"):
        del flags[key]
    return (
        flags
        | {
            "model.changes": "{num_layers: 1, hidden_size: 16, intermediate_size: 16, num_heads: 2, num_kv_heads: 1, "
            "head_dim: 8, max_position_embeddings: 32}",
            "data.max_prompt_length": "16",
            "rollout.max_completion_length": "6",
            "rollout.completions": "4",
            "rewards": "[{function: 'tests.trainers.runs:share_of_a', name: a}]",
            "trainer.steps": "9",
            "trainer.batch_size": "2",
            "trainer.accumulation_steps": "1",
            "trainer.learning_rate": "1e-2",
            "log.completions_every": "3",
        }
        | changes
    )


def ppo(folder: Path, **changes: str) -> dict[str, str]:
    """Flags of 9 steps of PPO on the same prompts: rollouts of 4 x 2 completions, each for 2 updates, twice."""
    own = {"rollout.completions": "2", "experience.mini_batches": "2", "experience.epochs": "2"}
    return reinforcing(folder, **own) | changes


def preferring(folder: Path, **changes: str) -> dict[str, str]:
    """Flags of 9 steps over pairs of which the chosen answer says cat; 18 pairs: epochs end on the way."""
    rows = [
        {"prompt": words(2 + i % 3, i), "chosen": f" cat {words(1 + i % 4, 2 * i)}", "rejected": " " + words(3, 3 * i)}
        for i in range(20)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_character_tokenizer([" ".join(_WORDS)], folder / "characters")
    _give_an_end(folder / "characters")
    flags = _flags(folder, "pairs.jsonl", "", str(folder / "characters"))
    for key in ("data.sequence_length", "data.packing", "data.cache_dir", "loss.dropout"):
        del flags[key]
    return (
        flags
        | {
            "data.max_prompt_length": "12",
            "data.max_completion_length": "20",
            "trainer.steps": "9",
            "trainer.batch_size": "4",
            "trainer.learning_rate": "1e-2",
        }
        | changes
    )


def _give_an_end(folder: Path) -> None:
    """Two tokens more, either of which ends a text."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    first = len(tokenizer["model"]["vocab"])
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    ends = [{"id": first + i, "content": name, **plain} for i, name in enumerate(("<end>", "<stop>"))]
    path.write_text(json.dumps(tokenizer | {"added_tokens": ends}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, first + 1]}))


def share_of_a(completions, **_) -> list[float]:
    """A reward."""
    return [text.count("a") / 6 for text in completions]


def _flags(folder: Path, data: str, packing: str, tokenizer: str) -> dict[str, str]:
    return {
        "output_dir": str(folder / "run"),
        "tokenizer": tokenizer,
        "model.preset": "tiny",
        "model.changes": "{num_layers: 2, hidden_size: 32, intermediate_size: 48, num_heads: 2, num_kv_heads: 1, "
        "head_dim: 16, max_position_embeddings: 32}",
        "data.train": str(folder / data),
        "data.validation_fraction": "0.1",
        "data.sequence_length": "32",
        "data.packing": packing,
        "data.cache_dir": str(folder / "tokens"),
        "loss.dropout": "0.1",
        "trainer.steps": "14",
        "trainer.batch_size": "4",
        "trainer.accumulation_steps": "2",
        "trainer.learning_rate": "1e-3",
        "trainer.log_every": "1",
        "trainer.eval_every": "2",
        "trainer.eval_batches": "2",
        "trainer.patience": "50",
        "checkpoint.every_steps": "4",
        "checkpoint.keep_last": "1",
        "checkpoint.keep_best": "1",
        "checkpoint.metric": "validation/loss",
        "log.progress": "silent",
    }


def argv(flags: Mapping[str, str]) -> list[str]:
    """The flags as arguments of a command line."""
    return [f"--{key}={value}" for key, value in flags.items()]


class Told:
    """An `interrupted` that says so once `step` steps are done; it is asked once after each."""

    def __init__(self, step: int, first: int = 0):
        self._left = step - first

    def __call__(self) -> bool:
        self._left -= 1
        return self._left <= 0


def go(
    command: str,
    flags: Mapping[str, str],
    *,
    resume: bool = False,
    stop_at: int | None = None,
    said: list | None = None,
) -> TrainState:
    """Run in this process, up to and with the step `stop_at` of those done here."""
    config = load_settings(RECIPES[command].config, None, flags)
    run = prepare(command, RECIPES[command], config, resume=resume, cache_dir="not used")
    interrupted = (lambda: False) if stop_at is None else Told(stop_at)
    return train(run, resume=resume, interrupted=interrupted, say=(said if said is not None else []).append)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, read strictly."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The records without what the clock and the memory say."""
    clock = [key for row in metrics(folder) for key in row if key in CLOCK or key.startswith(CLOCKS)]
    return [{key: value for key, value in row.items() if key not in clock} for row in metrics(folder)]


def completions(folder: Path) -> list[dict[str, Any]]:
    """The records of completions.jsonl."""
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal to the last bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(_bytes(x), _bytes(y)) for x, y in pairs)


def _bytes(x: Any) -> np.ndarray:
    x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.frombuffer(np.asarray(x).tobytes(), np.uint8)


ON_POLICY = {
    "on_policy.share": "0.5",
    "on_policy.rollout.max_completion_length": "6",
    "on_policy.rollout.completions": "2",
    "on_policy.prompts.max_prompt_length": "16",
}


def distilling(folder: Path, *, on_policy: bool = False, **changes: str) -> dict[str, str]:
    """Flags as those of `tuning`, with a teacher of random weights; half of the steps may be on-policy."""
    flags = tuning(folder)
    _give_an_end(folder / "characters")
    _make_teacher(folder / "teacher", folder / "characters")
    if on_policy:
        rows = [{"prompt": words(2, i)} for i in range(11)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags |= ON_POLICY | {"on_policy.prompts.train": str(folder / "prompts.jsonl")}
    return flags | {"teacher.checkpoint": str(folder / "teacher")} | changes


def _make_teacher(folder: Path, tokenizer: Path) -> None:
    """A network wider than the students, whose predictions are far from even."""
    config = dataclasses.replace(
        PRESETS["tiny"],
        vocab_size=load_tokenizer(tokenizer).vocab_size,
        hidden_size=48,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=32,
        layer_windows=(None,),
        initializer_range=0.4,
    )
    save_pretrained(random_model(config, key=jax.random.key(7)), folder, tokenizer_from=tokenizer)
