"""Steps of every algorithm from settings alone, for the contract that all of them are held to.

    python -m tests.trainers.contract FOLDER '[[2, 2, 2, 1]]' '["dpo", "ppo"]' true

prints, as JSON, how two steps on these meshes differ from those on one device; in a process of its own, which is forced
to have eight devices. The last argument says whether with adapters.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from tests.trainers import runs
from trainers import parts
from trainers.run import Run, prepare
from utils.settings import load_settings
from utils.sharding import make_mesh

# Makers of flags, by the command that they are for.
MAKERS: Mapping[str, Callable[..., dict[str, str]]] = {
    "pretrain": runs.pretraining,
    "sft": runs.tuning,
    "dpo": runs.preferring,
    "reward": runs.preferring,
    "ppo": runs.ppo,
    "grpo": runs.reinforcing,
    "distill": runs.distilling,
}
LORA = {"lora.rank": "2", "lora.alpha": "4"}
# Sizes that meshes of eight devices divide; and an eps with which Adam does not blow rounding up.
_COMMON = {
    "trainer.batch_size": "8",
    "trainer.accumulation_steps": "1",
    "trainer.learning_rate": "1e-2",
    "optimizer.eps": "1e-3",
    "model.changes": "{num_layers: 2, hidden_size: 16, intermediate_size: 32, num_heads: 2, num_kv_heads: 2, "
    "head_dim: 8, max_position_embeddings: 32, initializer_range: 0.2, vocab_size: 64}",
}
Steps = tuple[list[dict[str, float]], list[np.ndarray]]


def flags_of(command: str, folder: Path, *, lora: bool = False, **changes: str) -> dict[str, str]:
    """The flags of a small run without dropout, whose noise would depend on how rows are cut."""
    flags = MAKERS[command](folder) | _COMMON | (LORA if lora else {})
    if "loss.dropout" in flags:
        flags["loss.dropout"] = "0"
    if "rewards" in flags:  # of what any completion has
        flags["rewards"] = "[{function: 'tests.trainers.contract:share_of_even', name: a}]"
    if command == "distill":  # the teacher's vocabulary is the tokenizer's
        flags["model.changes"] = flags["model.changes"].replace(", vocab_size: 64", "")
    return flags | changes


def share_of_even(completion_ids, **_) -> list[float]:
    """A reward."""
    return [sum(token % 2 == 0 for token in ids) / 6 for ids in completion_ids]


def opened(command: str, flags: Mapping[str, str]) -> Run:
    """The run, before its first step."""
    recipe = runs.RECIPES[command]
    config = load_settings(recipe.config, None, flags)
    return prepare(command, recipe, config, resume=False, cache_dir="not used")


def stepped(command: str, flags: Mapping[str, str], *, steps: int = 2) -> Steps:
    """The metrics of the first steps, and the parameters behind them."""
    run, found = opened(command, flags), []
    with jax.set_mesh(run.mesh):
        state = run.trainer.init(run.model, jax.random.key(0))
        state = run.trainer.fit(
            state,
            run.course.data,
            num_steps=steps,
            observers=[lambda step, state, metrics: found.append({k: float(v) for k, v in metrics.items()})],
        )
    run.course.data.close()
    return found, [np.asarray(leaf) for leaf in jax.tree.leaves(state.model)]


def difference(one: Steps, other: Steps) -> dict[str, float]:
    """The largest distances between losses, gradients' norms and parameters, and the smallest of those norms."""
    values = [[(row["loss"], row["grad_norm"]) for row in found] for found, _ in (one, other)]
    return {
        "metrics": float(np.max(np.abs(np.subtract(*values)))),
        "parameters": max(float(np.max(np.abs(a - b))) for a, b in zip(one[1], other[1], strict=True)),
        "grad_norm": min(row["grad_norm"] for row in one[0]),
    }


def on_meshes(
    folder: str, shapes: list[list[int]], commands: list[str], lora: bool
) -> dict[str, list[dict[str, float]]]:
    """For each command how its steps on each mesh differ from those on one device."""
    said = {}
    for command in commands:
        place = Path(folder) / command
        place.mkdir()
        flags, results = flags_of(command, place, lora=lora), []
        for shape in ([1, 1, 1, 1], *shapes):
            devices = jax.devices()[: int(np.prod(shape))]
            parts.make_mesh = lambda config, shape=shape, devices=devices: make_mesh(shape, devices)
            results.append(stepped(command, flags))
        said[command] = [difference(results[0], other) for other in results[1:]]
    return said


if __name__ == "__main__":
    print(json.dumps(on_meshes(sys.argv[1], *map(json.loads, sys.argv[2:]))))
