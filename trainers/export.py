"""A trained model for others: written as it is, or restored from a checkpoint of its run for that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from models.llama import LlamaConfig, merge_lora, save_peft, save_pretrained
from models.llama.config import config_from_hf
from models.llama.scalar import ScalarLLaMa, save_scalar
from trainers import parts
from trainers.checkpoints import Checkpointer
from trainers.recipe import Recipe
from trainers.settings import CommonConfig, MeshConfig
from trainers.snapshots import CheckpointError, read_info
from utils.settings import from_dict, to_dict

CHECKPOINTS = "checkpoints"  # in a run's output folder


def export(
    networks: Mapping[str, nnx.Module], folder: str | Path, *, tokenizer_path: Path, base: str | None
) -> list[Path]:
    """Write networks for others in Hugging Face's format, each to the folder of its name, with its adapters merged.

    The adapters of a language model are also written in PEFT's format, to `adapter/`; `base` is what they were added
    to. Returns what has been written. Raises ValueError for a network that Hugging Face has no architecture for.
    """
    folder, written = Path(folder), []
    source = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    for name, network in networks.items():
        if isinstance(network, ScalarLLaMa):
            merged = ScalarLLaMa(merge_lora(network.llama), network.score_D[...])
            save_scalar(merged, folder / name, tokenizer_from=source)
            written.append(folder / name)
            continue
        written.append(folder / name)
        if network.blocks.adapters is not None:
            save_peft(network, folder / "adapter", base_model_name_or_path=base)
            written.append(folder / "adapter")
        save_pretrained(merge_lora(network), folder / name, tokenizer_from=source)
    return written


def last_step(folder: str | Path) -> int | None:
    """The newest step that a run's output folder holds a checkpoint of; None without any."""
    checkpoints = Path(folder) / CHECKPOINTS
    return Checkpointer(checkpoints).latest() if checkpoints.is_dir() else None


def last_command(folder: str | Path) -> str | None:
    """What the newest checkpoint in a run's output folder is a run of; None where it cannot be told."""
    try:
        return read_info(Path(folder) / CHECKPOINTS / str(last_step(folder)))["settings"]["command"]
    except CheckpointError:
        return None


def restore_model(
    recipes: Mapping[str, Recipe], folder: str | Path, step: int | None
) -> tuple[Mapping[str, nnx.Module], CommonConfig, Path]:
    """The networks of a run's checkpoint, by the folders that they are exported to, the run's settings and the path of
    its tokenizer; None is the newest step.

    `folder` is the run's output folder, wherever it lies now; `recipes` are those of all commands.
    Neither the run's data nor its base model are needed, and the devices may be others; a separate critic that began as
    another checkpoint is made by the config of that one, which has to be there.
    Raises OSError and ValueError for a folder without such a checkpoint.
    """
    checkpoints = Path(folder) / CHECKPOINTS
    with Checkpointer(checkpoints) as checkpointer:
        if step is None and (step := checkpointer.latest()) is None:
            raise ValueError(f"{checkpoints} has no checkpoint")
        if step not in (steps := checkpointer.steps()):
            raise ValueError(f"{checkpoints} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}")
        path = checkpoints / str(step)
        settings = read_info(path)["settings"]
        recipe = recipes[settings["command"]]
        config = from_dict(recipe.config, settings["config"], source=str(path))
        if settings["network"] is None:
            raise ValueError(f"{path}: Hugging Face has no architecture for this network")
        own = Path(folder) / "tokenizer"
        mesh = parts.make_mesh(MeshConfig(data=1, fsdp=-1))
        trainer = recipe.make_trainer(config, settings["num_steps"])
        model = recipe.make_model(config, config_from_hf(settings["network"]), mesh, random=True)
        restored = checkpointer.restore(trainer.init(model, jax.random.key(0)), step)
    networks = recipe.exports(restored.state.model)
    return networks, config, own if own.is_dir() else Path(settings["tokenizer"])


def restorable(
    command: str, *, config: CommonConfig, num_steps: int, llama: LlamaConfig, tokenizer_path: Path
) -> dict[str, Any]:
    """The settings that a checkpoint needs for `restore_model`."""
    return {
        "command": command,
        "config": to_dict(config),
        "num_steps": num_steps,
        "network": parts.hugging_face_config(llama),
        "tokenizer": str(tokenizer_path.absolute()),
    }
