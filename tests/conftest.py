"""What all tests share: the CPU backend, a cache of compiled programs, and where the test assets are."""

import importlib
import inspect
import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent

# Before jax is imported, and by way of the environment so that subprocesses of tests inherit it. Workers of
# pytest-xdist have a cache each, because jax writes its files in place.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_ROOT / ".cache" / "jax" / _WORKER)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return _ROOT


@pytest.fixture(scope="session")
def assets_dir(repo_root: Path) -> Path:
    """Folder of test assets: $ASSETS_DIR, else shared/assets beside the repository."""
    folder = Path(os.environ.get("ASSETS_DIR") or repo_root.parent / "shared" / "assets")
    if not folder.is_dir():
        pytest.skip(f"no test assets in {folder}; set ASSETS_DIR")
    return folder


def _check_shapes_at_every_call() -> None:
    """Hold the arguments and results of public array functions against their jaxtyping annotations.

    In the order of imports, so that a module imports its neighbours' functions checked.
    """
    try:
        from beartype import beartype
        from jaxtyping import jaxtyped
    except ImportError:
        return
    arrays = ("ops", "rope", "kvcache", "blockwise", "attention")
    for name in (
        *(f"utils.{own}" for own in arrays),
        "sampling",
        "utils.log_probs",
        "trainers.losses",
        "trainers.token_log_probs",
    ):
        module = importlib.import_module(name)
        for key, value in list(vars(module).items()):
            if inspect.isfunction(value) and value.__module__ == name and not key.startswith("_"):
                setattr(module, key, jaxtyped(value, typechecker=beartype))


_check_shapes_at_every_call()
