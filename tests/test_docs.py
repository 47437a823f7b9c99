"""What the documents say about the code is held against it."""

import inspect
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from data.characters import write_character_tokenizer
from tests.trainers.runs import go, metrics, reinforcing, words
from trainers.experience import Experience
from trainers.policy_variants import IMPORTANCE, LOSSES
from trainers.reward_functions import FUNCTIONS
from trainers.rewards import RewardConfig, load_rewards, score
from trainers.settings import GRPORunConfig
from utils.settings import describe, from_dict


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
    named = set(
        re.findall(r"`((?:models|utils|data|trainers|inference|quickstart|configs|docs|benchmarks)/[\w/]+\.\w+)`", text)
    )
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


@pytest.fixture(scope="module")
def grpo_page(repo_root: Path) -> str:
    return (repo_root / "docs" / "grpo.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def quoted(page: str) -> set[str]:
    """What stands between backticks, outside of blocks."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL)))


def keys_of(tree: object, key: str = "") -> set[str]:
    """The dotted keys of some YAML, as `--help` has them; a mapping of options ends one."""
    if isinstance(tree, list):
        return set().union(*(keys_of(item, f"{key}.INDEX") for item in tree))
    if isinstance(tree, dict) and not key.endswith(".options"):
        return set().union(*(keys_of(value, f"{key}.{name}" if key else name) for name, value in tree.items()))
    return {key}


@pytest.fixture(scope="module")
def settings() -> set[str]:
    return set(re.findall(r"^--([\w.]+):", describe(GRPORunConfig), re.MULTILINE))


def test_settings_that_the_page_on_grpo_names_exist(grpo_page: str, settings: set[str]):
    sections = {key.partition(".")[0] for key in settings}
    named = {text.partition(":")[0] for text in quoted(grpo_page)}
    named = {text for text in named if re.fullmatch(r"\w+(\.\w+)+", text) and text.partition(".")[0] in sections}
    named |= set(re.findall(r"--([\w.]+)=", grpo_page))
    for block in blocks(grpo_page, "yaml"):
        named |= keys_of(yaml.safe_load(block))
    assert len(named) > 40 and not named - settings


@pytest.fixture(scope="module")
def metrics_written(tmp_path_factory) -> set[str]:
    """The names of all metrics of two small runs in which everything is on."""
    folder = tmp_path_factory.mktemp("metrics")
    everything = {
        "trainer.steps": "2",
        "trainer.eval_every": "2",
        "experience.dynamic_sampling": "1",
        "loss.beta": "0.1",
        "loss.importance_cap": "2",
    }
    names: set[str] = set()
    for loss in ("dapo", "cispo"):
        go("grpo", reinforcing(folder, **everything) | {"loss.name": loss, "output_dir": str(folder / loss)})
        names.update(*metrics(folder / loss))
    return {re.sub("rewards/a/", "rewards/NAME/", name) for name in names - {"step"}}


def test_metrics_of_the_page_on_grpo_are_those_that_are_written(grpo_page: str, metrics_written: set[str]):
    section = grpo_page.partition("## Reading the metrics")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    parts = {name.removeprefix("time/") for name in metrics_written if name.startswith("time/")}
    memory = {f"memory/{part}" for part in parts} | {"peak_memory_bytes"}  # not wherever memory can be told
    assert named - memory == metrics_written - memory and memory <= named


def test_words_of_the_page_on_grpo_are_those_of_the_code(grpo_page: str, settings: set[str], metrics_written: set[str]):
    """Those with an underscore: parts of settings, metrics, losses, reward functions, their options and arguments."""
    page = grpo_page.replace(grpo_page.partition("## Differences from TRL")[2].partition("\n## ")[0], "")
    known = {part for key in settings for part in key.split(".")} | metrics_written | {*LOSSES, *IMPORTANCE, *FUNCTIONS}
    options = {name: set(inspect.signature(function).parameters) for name, function in FUNCTIONS.items()}
    known |= set().union(*options.values()) | {"completion_ids", *inspect.signature(Experience).parameters}
    named = {word for word in quoted(page) if re.fullmatch(r"[a-z]+(_[a-z]+)+", word)}
    assert len(named) > 20 and not named - known
    table = {
        row[0]: set(re.findall(r"`(\w+)`", row[1])) for row in re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page, re.M)
    }
    assert {name: table.get(name) for name in FUNCTIONS} == options
    losses = set(re.findall(r"^\| `(\w+)`(?: \(default\))? \| .* \| (?:arXiv|TRL)", page, re.M))
    assert losses == set(LOSSES)


def test_rewards_of_the_page_on_grpo(grpo_page: str, tmp_path: Path, monkeypatch):
    [source] = [block for block in blocks(grpo_page, "python") if block.startswith('"""rewards.py"""')]
    [text] = blocks(grpo_page, "yaml")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "rewards.py", tmp_path / "my_package" / "rewards.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = load_rewards(
        from_dict(RewardConfig, own, source="docs/grpo.md") for own in yaml.safe_load(text)["rewards"]
    )
    assert [(own.name, own.weight) for own in rewards] == [("gsm8k_answer", 1), ("names_source", 0.5), ("manners", 0.1)]
    texts, columns = ["please see Gauss: 4", "5"], {"answer": ["#### 4"] * 2, "source": ["Gauss", None]}
    got = score(rewards, ["2+2?"] * 2, texts, [[1]] * 2, columns)
    np.testing.assert_array_equal(got, [[1, 2, 1], [0, np.nan, 0]])
    chats = [[{"role": "assistant", "content": own}] for own in texts]
    np.testing.assert_array_equal(score(rewards, ["2+2?"] * 2, chats, [[1]] * 2, columns), got)


def test_the_example_of_the_page_on_grpo_is_short_and_runs(grpo_page: str, tmp_path: Path, monkeypatch, capsys):
    from models.llama import PRESETS, LLaMa, save_pretrained

    [source] = [block for block in blocks(grpo_page, "python") if "GRPOTrainer" in block]
    assert len(source.splitlines()) < 40
    write_character_tokenizer([words(100)], tmp_path / "model")
    save_pretrained(LLaMa(PRESETS["tiny"], key=jax.random.key(0)), tmp_path / "model")
    rows = [json.dumps({"prompt": words(3, seed)}) + "\n" for seed in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(source, "docs/grpo.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(step) for step in range(1, 11)]
    assert all(0 <= float(line.split()[1]) <= 1 for line in lines) and int(names["state"].step) == 10
