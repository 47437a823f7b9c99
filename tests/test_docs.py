"""What the documents say about the code is held against it."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest


def test_tests_that_the_documents_name_exist(repo_root: Path):
    documents = [repo_root / "README.md", repo_root / "CONTRIBUTING.md", *sorted((repo_root / "docs").glob("*.md"))]
    named = {name for path in documents for name in re.findall(r"`(tests/[\w/.]+\.py(?:::\w+)?)`", path.read_text())}
    assert len(named) > 15
    missing = []
    for name in sorted(named):
        path, _, function = name.partition("::")
        text = (repo_root / path).read_text() if (repo_root / path).is_file() else ""
        if not text or (function and not re.search(rf"^def {function}\b", text, re.MULTILINE)):
            missing.append(name)
    assert not missing


def test_paths_that_the_readme_names_exist(repo_root: Path):
    text = (repo_root / "README.md").read_text()
    named = set(re.findall(r"`((?:models|utils|data|trainers|inference|configs|docs|benchmarks)/[\w/]+\.\w+)`", text))
    assert named and not [name for name in sorted(named) if not (repo_root / name).exists()]


@pytest.fixture
def own_trainer(repo_root: Path) -> tuple[str, dict]:
    """The trainer that the README writes, as text and as what running it defines."""
    blocks = re.findall(r"```python\n(.*?)```", (repo_root / "README.md").read_text(), re.DOTALL)
    [source] = [block for block in blocks if "(Trainer)" in block]
    names: dict = {}
    exec(compile(source.partition("\ntrainer =")[0], "README.md", "exec"), names)
    return source, names


def test_the_trainer_of_the_readme_is_short_and_learns(own_trainer):
    from models.llama import PRESETS, LLaMa

    source, names = own_trainer
    assert len(source.splitlines()) < 30
    import optax

    rows = np.random.default_rng(0).integers(0, 512, (4, 33)).astype(np.int32)
    batch = {
        "tokens_BT": rows[:, :-1],
        "targets_BT": rows[:, 1:],
        "mask_BT": np.ones((4, 32), np.float32),
        "reward_B": np.array([1.0, 0.0, 0.5, 0.0], np.float32),
    }
    trainer = names["RewardWeightedTrainer"](optax.adamw(1e-2))
    state = trainer.init(LLaMa(PRESETS["tiny"], key=jax.random.key(0)), jax.random.key(1))
    losses = []
    trainer.fit(state, [batch] * 6, num_steps=6, observers=[lambda step, state, m: losses.append(float(m["loss"]))])
    assert losses[-1] < 0.9 * losses[0]
