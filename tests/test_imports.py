"""Who may import whom, held to by reading the import statements."""

import ast
from pathlib import Path

import pytest

# Package or entry point of ours -> what of ours it may import beside itself.
MAY_IMPORT = {
    "utils": set(),
    "models": {"utils"},
    "sampling": {"utils"},
    "data": {"utils"},
    "inference": {"utils", "models", "sampling"},
    "trainers": {"utils", "models", "data"},
    "quickstart": {"utils", "data", "trainers"},
}
ENTRIES = ("generate", "chat", "train", "evaluate", "serve")
EVERYTHING = set(MAY_IMPORT)

# In a model family: the model knows its config, loading knows the model, and not the other way round.
FAMILY_MAY_IMPORT = {"config": set(), "model": {"config"}, "presets": {"config"}}
ABOVE_LOADING = ("scalar", "__init__")  # the checkpoints of networks with scores, which name a token that fills up

# What the installed library may import from elsewhere, by module; tests and benchmarks may import anything.
TEST_ONLY = {"torch", "transformers", "pytest", "hypothesis", "scipy"}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it; names taken from a module count as modules too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; spell the package out"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.fixture(scope="session")
def runtime_files(repo_root: Path) -> dict[str, list[Path]]:
    """Python files of the library, by package or top-level module."""
    files = {name: sorted((repo_root / name).rglob("*.py")) for name in MAY_IMPORT if (repo_root / name).is_dir()}
    files |= {path.stem: [path] for path in sorted(repo_root.glob("*.py"))}
    assert {"utils", "models", "sampling"} <= files.keys()
    return files


def test_no_package_imports_what_it_may_not(runtime_files):
    wrong = [
        f"{path.name} of {owner} imports {other}"
        for owner, paths in runtime_files.items()
        for path in paths
        for other in sorted(tops(imported(path)) & (EVERYTHING | set(ENTRIES)))
        if other != owner and other not in MAY_IMPORT.get(owner, EVERYTHING)
    ]
    assert not wrong, "; ".join(wrong)


def test_top_level_files_are_known(runtime_files):
    unknown = runtime_files.keys() - MAY_IMPORT.keys() - set(ENTRIES)
    assert not unknown, f"no import rule for {sorted(unknown)}"


def test_library_needs_nothing_that_only_tests_have(runtime_files):
    wrong = [
        f"{path.name} of {owner} imports {', '.join(found)}"
        for owner, paths in runtime_files.items()
        for path in paths
        if (found := sorted(tops(imported(path)) & TEST_ONLY))
    ]
    assert not wrong, "; ".join(wrong)


def test_sibling_trainers_stand_alone(runtime_files):
    for path in runtime_files.get("trainers", []):
        others = {name for name in imported(path) if name.startswith("trainers.") and "_trainer" in name}
        assert not others, f"{path.name} imports {sorted(others)}"


@pytest.fixture(scope="session")
def families(repo_root: Path) -> list[Path]:
    found = [path for path in sorted((repo_root / "models").iterdir()) if (path / "config.py").exists()]
    assert found
    return found


def test_inside_a_family_config_model_load(families):
    for family in families:
        own = f"models.{family.name}."
        for path in sorted(family.glob("*.py")):
            used = {name.removeprefix(own).partition(".")[0] for name in imported(path) if name.startswith(own)}
            if path.stem in FAMILY_MAY_IMPORT:
                assert used <= FAMILY_MAY_IMPORT[path.stem], f"{path} imports {sorted(used)}"
            if path.stem.startswith("tokenizer"):
                assert all(name.startswith("tokenizer") for name in used), f"{path} imports {sorted(used)}"
            elif path.stem not in ABOVE_LOADING:
                assert not any(name.startswith("tokenizer") for name in used), f"{path} imports {sorted(used)}"
            if path.stem not in ("load", *ABOVE_LOADING):
                assert "load" not in used, f"{path} imports load, which stands above it"


def test_families_share_no_code_but_array_functions(families):
    for family in families:
        for path in sorted(family.glob("*.py")):
            foreign = {n for n in imported(path) if n.startswith("models.") and n != f"models.{family.name}"}
            foreign = {name for name in foreign if not name.startswith(f"models.{family.name}.")}
            assert not foreign, f"{path} imports {sorted(foreign)}"


def test_the_reader_of_imports_sees_them_all(tmp_path):
    path = tmp_path / "example.py"
    path.write_text("import a.b, c\nfrom d import e\n\ndef f():\n    from g.h import i\n")
    assert imported(path) == {"a.b", "c", "d", "d.e", "g.h", "g.h.i"}
