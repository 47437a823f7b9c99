"""Checkpoints come back bit for bit, on any mesh; kill -9, a full disk or damage cost the newest at most."""

import contextlib
import os
import platform
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.llama.config import LlamaConfig
from models.llama.model import LLaMa
from trainers import snapshots
from trainers.checkpoints import CheckpointConfig, Checkpointer, CheckpointError
from trainers.snapshots import library_versions

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_embeddings=False,
    activation="silu",
    gated=True,
    qkv_bias=True,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    layer_windows=(None, None, None),
    initializer_range=0.02,
)
EVERY = CheckpointConfig(every_steps=1, keep_last=100)
DATA = {"next_index": 7, "parents": [{"seen": 1.5}, None]}
SETTINGS = {"model": {"preset": "tiny"}, "rate": 1e-3}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class State:
    step: Any
    model: Any
    adapter: Any
    opt_state: Any
    key: Any
    loss_scale: Any


def make_state(*, config=TINY, optimizer=None, seed=0) -> State:
    """A state without a zero or a one in it, so that no leaf can be mistaken for a fresh one."""
    rng = np.random.default_rng(seed)
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    model = LLaMa(config, key=jax.random.key(seed), dtype=jnp.bfloat16)
    adapter = {"a/b": jnp.ones((3, 5), jnp.float32), "rank": 8}

    def drawn(leaf):
        return jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype)

    model, opt_state = jax.tree.map(drawn, model), optimizer.init(jax.tree.map(drawn, model))
    opt_state = jax.tree.map(lambda x: drawn(x) if jnp.issubdtype(x.dtype, jnp.floating) else x + 3, opt_state)
    scale = (jnp.float16(2.5), np.float32(0.1), None)
    return State(
        step=jnp.int32(5), model=model, adapter=adapter, opt_state=opt_state, key=jax.random.key(seed), loss_scale=scale
    )


def bits(leaf: Any) -> tuple:
    if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        return str(leaf.dtype), bits(jax.random.key_data(leaf))
    return (
        type(leaf) if isinstance(leaf, int) else None,
        np.shape(leaf),
        np.asarray(leaf).dtype,
        np.asarray(leaf).tobytes(),
    )


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right)):
        assert bits(one) == bits(other), jax.tree_util.keystr(path)


def abstract(state: State) -> State:
    """Shapes alone, where there are any."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, state)


def save_steps(folder: Path, steps, config=EVERY, metrics=None) -> None:
    with Checkpointer(folder, config) as checkpointer:
        for step in steps:
            values = None if metrics is None or metrics[step] is None else {"loss": metrics[step]}
            checkpointer.save(step, {"x": jnp.full(4, step)}, data_state={"at": step}, settings={}, metrics=values)


def number(folder: Path, step: int | None = None) -> tuple[int, tuple[str, ...]]:
    """The step that is restored from what `save_steps` saved, and the warnings."""
    restored = Checkpointer(folder).restore({"x": jax.ShapeDtypeStruct((4,), jnp.int32)}, step)
    assert restored.data_state == {"at": restored.step} and (restored.state["x"] == restored.step).all()
    return restored.step, restored.warnings


@pytest.mark.parametrize("described_by", [abstract, lambda state: make_state(seed=9)])
def test_round_trip_is_exact(tmp_path, described_by):
    state = make_state()
    with Checkpointer(tmp_path / "deep" / "run", EVERY) as checkpointer:
        checkpointer.save(5, state, data_state=DATA, settings=SETTINGS, metrics={"loss": np.float32(0.25)})
    restored = Checkpointer(tmp_path / "deep" / "run").restore(described_by(state))
    assert_same(restored.state, state)
    assert isinstance(restored.state.loss_scale[1], np.float32)
    assert jax.random.normal(restored.state.key) == jax.random.normal(state.key)
    assert (restored.step, restored.data_state, restored.settings) == (5, DATA, SETTINGS)
    assert restored.metrics == {"loss": 0.25} and restored.warnings == ()
    assert restored.versions == library_versions() and restored.version_changes() == []


def test_leaves_without_a_place_stay_free_to_move(tmp_path):
    state = {"free": jnp.ones(3), "bound": jax.device_put(jnp.ones(3), jax.devices()[0]), "key": jax.random.key(1)}
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        checkpointer.save(1, state, data_state={}, settings={})
        back = checkpointer.restore(state).state
    assert {name: leaf.committed for name, leaf in back.items()} == {"free": False, "bound": True, "key": False}


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_key_arrays_keep_their_kind(tmp_path, impl):
    state = {"keys": jax.random.split(jax.random.key(3, impl=impl), 4)}
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        checkpointer.save(1, state, data_state={}, settings={})
        assert_same(checkpointer.restore(state).state, state)
        with pytest.raises(ValueError, match=r"keys is key<\w+> \[4\] there and key<\w+> \[4\] here"):
            checkpointer.restore({"keys": jax.random.split(jax.random.key(3, impl="unsafe_rbg"), 4)})


def test_training_on_while_saving_spoils_nothing(tmp_path):
    """The buffers are donated to the next steps at once, and what was saved is what was there."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    state, data_state = {name: jnp.full((2_000_000,), n, jnp.float32) for n, name in enumerate("abcd")}, {"at": 0}
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        for number_ in range(4):
            checkpointer.save(number_, state, data_state=data_state, settings={})
            data_state["at"] = 99
            for _ in range(5):
                state = step(state)
            data_state["at"] = number_ + 1
        shape = {name: jax.ShapeDtypeStruct((2_000_000,), jnp.float32) for name in "abcd"}
        for number_ in range(4):
            restored = checkpointer.restore(shape, number_)
            assert restored.data_state == {"at": number_}
            for n, name in enumerate("abcd"):
                want = np.float32((n + 1) * 2.0 ** (5 * number_) - 1)
                assert (np.asarray(restored.state[name]) == want).all(), (number_, name)


def test_the_newest_and_the_best_are_kept(tmp_path):
    metrics = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 3.0, 6: None, 7: 9.0}
    save_steps(tmp_path, metrics, CheckpointConfig(every_steps=1, keep_last=2, keep_best=2, metric="loss"), metrics)
    assert Checkpointer(tmp_path).steps() == [2, 4, 6, 7]
    assert Checkpointer(tmp_path).latest() == 7
    for mode, best in (("min", 2), ("max", 7)):
        config = CheckpointConfig(every_steps=1, keep_last=2, metric="loss", mode=mode)
        assert Checkpointer(tmp_path, config).best() == best
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "6", "7"]


def test_of_equals_the_newest_is_best(tmp_path):
    config = CheckpointConfig(every_steps=1, keep_last=1, keep_best=1, metric="loss")
    save_steps(tmp_path, [1, 2, 3], config, {1: 0.5, 2: 0.5, 3: 0.75})
    assert Checkpointer(tmp_path, config).best() == 2 and Checkpointer(tmp_path).steps() == [2, 3]


def test_nothing_is_deleted_before_the_next_is_complete(tmp_path):
    config = CheckpointConfig(every_steps=1, keep_last=1)
    state = {"x": jnp.ones(5_000_000)}
    with Checkpointer(tmp_path, config) as checkpointer:
        for step in range(1, 4):
            checkpointer.save(step, state, data_state={}, settings={})
            assert step == 1 or step - 1 in checkpointer.steps()
        checkpointer.wait()
        assert checkpointer.steps() == [3]


def test_due_once_and_at_the_end(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(every_steps=3, keep_last=2)) as checkpointer:
        assert [step for step in range(1, 8) if checkpointer.due(step)] == [3, 6]
        assert checkpointer.due(7, last=True)
        checkpointer.save(6, {"x": jnp.ones(1)}, data_state={}, settings={})
        assert not checkpointer.due(6, last=True)
        checkpointer.wait()
        assert not checkpointer.due(6)


def test_other_states_are_refused(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        checkpointer.save(1, state, data_state={}, settings={})
        wider = make_state(config=replace(TINY, intermediate_size=48))
        with pytest.raises(
            ValueError, match=r"down_FD\.value is bfloat16 \[3, 40, 32\] there and .*\[3, 48, 32\] here"
        ):
            checkpointer.restore(abstract(wider))
        with pytest.raises(ValueError, match=r"opt_state\.1\.0\.count is int32 \[\] there and absent here"):
            checkpointer.restore(abstract(make_state(optimizer=optax.sgd(0.1))))
        other = replace(state, step=jnp.float32(5))
        with pytest.raises(
            ValueError, match=r"/1: another state was saved: step is int32 \[\] there and float32 \[\] here"
        ):
            checkpointer.restore(other)


def damage_truncate(folder: Path) -> None:
    path = max((path for path in folder.rglob("state/**/d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def damage_remove_arrays(folder: Path) -> None:
    for path in folder.glob("state/**/d/*"):
        path.unlink()


def damage_truncate_info(folder: Path) -> None:
    os.truncate(folder / "info" / "data.json", 20)


def damage_remove_info(folder: Path) -> None:
    (folder / "info" / "data.json").unlink()


def damage_empty_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


def damage_flip_info(folder: Path) -> None:
    path = folder / "info" / "data.json"
    path.write_text(path.read_text().replace('"at": ', '"at": 1'))


DAMAGES = [
    damage_flip_info,
    damage_truncate,
    damage_remove_arrays,
    damage_truncate_info,
    damage_remove_info,
    damage_empty_all,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over(tmp_path, damage):
    save_steps(tmp_path, [1, 2, 3])
    damage(tmp_path / "3")
    step, lines = number(tmp_path)
    assert step == 2 and len(lines) == 1 and "\n" not in lines[0]
    assert re.search(r"/3: is damaged: .+; step 2 is restored instead", lines[0])
    with pytest.raises(CheckpointError, match="/3: is damaged"):
        number(tmp_path, 3)
    for other in (1, 2):
        damage(tmp_path / str(other))
    with pytest.raises(CheckpointError, match=r"no checkpoint can be restored: .*/3: is damaged") as caught:
        number(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_from_before_the_damage(tmp_path):
    """What is damaged makes way, and does not count among those that are kept."""
    save_steps(tmp_path, [1, 2, 3])
    damage_truncate(tmp_path / "3")
    with Checkpointer(tmp_path, CheckpointConfig(every_steps=1, keep_last=1)) as checkpointer:
        restored = checkpointer.restore({"x": jnp.zeros(4, jnp.int32)})
        assert restored.step == 2 and "will set aside 3" in restored.warnings[1]
        assert checkpointer.steps() == [1, 2, 3]
        checkpointer.save(3, {"x": jnp.full(4, 3)}, data_state={"at": 3}, settings={})
    assert number(tmp_path) == (3, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "3.aside"]


def test_histories_are_not_mixed(tmp_path):
    save_steps(tmp_path, [10, 20, 30])
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        with pytest.raises(ValueError, match="holds step 30 of a run: restore it, or use another folder"):
            checkpointer.save(40, {}, data_state={}, settings={})
        assert checkpointer.restore({"x": jnp.zeros(4, jnp.int32)}, 10).step == 10
        with pytest.raises(ValueError, match="step 10 cannot be saved after step 10"):
            checkpointer.save(10, {}, data_state={}, settings={})
        checkpointer.save(15, {"x": jnp.full(4, 15)}, data_state={"at": 15}, settings={})
    assert Checkpointer(tmp_path).steps() == [10, 15]
    assert (tmp_path / "20.aside").is_dir() and (tmp_path / "30.aside").is_dir()


def test_only_a_writer_touches_the_folder(tmp_path):
    save_steps(tmp_path, [1])
    leftovers = [tmp_path / "2.orbax-checkpoint-tmp", tmp_path / "0.deleted"]
    for folder in (*leftovers, tmp_path / "notes", tmp_path / "7"):
        folder.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert number(tmp_path) == (1, ())
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="only to be read"):
        Checkpointer(tmp_path).save(2, {}, data_state={}, settings={})
    Checkpointer(tmp_path, EVERY)
    assert sorted(tmp_path.rglob("*")) == [path for path in before if path not in leftovers]


def test_folders_that_will_not_do(tmp_path):
    with pytest.raises(CheckpointError, match="absent: No such file or directory"):
        Checkpointer(tmp_path / "absent")
    file = tmp_path / "file"
    file.write_text("")
    for config in (None, EVERY):
        with pytest.raises(CheckpointError, match=r"file: (Not a directory|File exists)"):
            Checkpointer(file, config)
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        Checkpointer(tmp_path).restore({})
    save_steps(tmp_path / "run", [3, 4])
    with pytest.raises(CheckpointError, match="/run: holds only 3, 4, not step 5"):
        Checkpointer(tmp_path / "run").restore({}, 5)
    with pytest.raises(CheckpointError, match="/run/3: is one checkpoint; give the folder that it is in"):
        Checkpointer(tmp_path / "run" / "3")
    with pytest.raises(CheckpointError, match=r"/sys/ropewalk: .*(permi|Permi|Read-only)"):
        Checkpointer("/sys/ropewalk", EVERY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_folders_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="may not be written to"):
        Checkpointer(tmp_path, EVERY)
    tmp_path.chmod(0o000)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpointer(tmp_path)
    tmp_path.chmod(0o700)


@contextlib.contextmanager
def only_small_files():
    """Let no file grow beyond 100 kB for a while, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path):
    def state(step):
        return {"x": jax.random.normal(jax.random.key(step), (400_000,))}

    config = CheckpointConfig(every_steps=1, keep_last=1, keep_best=1, metric="loss")
    with Checkpointer(tmp_path, config) as checkpointer:
        checkpointer.save(1, state(1), data_state={}, settings={}, metrics={"loss": 1.0})
        checkpointer.wait()
        with only_small_files():
            checkpointer.save(2, state(2), data_state={}, settings={}, metrics={"loss": 0.0})
            with pytest.raises(CheckpointError, match=r"/2: could not be saved: .*File too large") as caught:
                checkpointer.save(3, state(3), data_state={}, settings={})
        assert "\n" not in str(caught.value) and caught.value.path == tmp_path / "2"
        assert [path.name for path in tmp_path.iterdir()] == ["1"] and checkpointer.best() == 1
        assert_same(checkpointer.restore(state(0)).state, state(1))
        checkpointer.save(3, state(3), data_state={}, settings={}, metrics={"loss": 3.0})
    assert Checkpointer(tmp_path).steps() == [1, 3]


def test_a_failed_save_does_not_hide_the_error_under_way(tmp_path):
    state = {"x": jax.random.normal(jax.random.key(0), (400_000,))}
    warned, raised = pytest.warns(UserWarning, match="/1: could not be saved"), pytest.raises(ZeroDivisionError)
    with warned, raised, only_small_files(), Checkpointer(tmp_path, EVERY) as checkpointer:
        checkpointer.save(1, state, data_state={}, settings={})
        raise ZeroDivisionError


def fail(folder: Path) -> None:
    """A save onto a full disk, and a look at a damaged checkpoint."""
    checkpointer = Checkpointer(folder, EVERY)
    with only_small_files(), contextlib.suppress(CheckpointError):
        checkpointer.save(1, {"x": jax.random.normal(jax.random.key(0), (400_000,))}, data_state={}, settings={})
        checkpointer.wait()
    save_steps(folder, [1])
    damage_truncate(folder / "1")
    with contextlib.suppress(CheckpointError):
        number(folder)


def test_failures_are_silent_but_for_the_error(tmp_path, repo_root):
    process = run(repo_root, "fail", tmp_path)
    output, errors = process.communicate()
    assert (process.returncode, output, errors) == (0, "", "")


def test_what_cannot_be_stored_is_refused(tmp_path):
    config = CheckpointConfig(every_steps=1, keep_last=1, metric="loss")
    with Checkpointer(tmp_path, config) as checkpointer:

        def save(state=None, **changes):
            state = {"x": jnp.ones(1)} if state is None else state
            checkpointer.save(1, state, **{"data_state": {}, "settings": {}, **changes})

        with pytest.raises(ValueError, match=r"the settings cannot be written as JSON: .*set"):
            save(settings={"a": {1}})
        with pytest.raises(ValueError, match=r"the data state cannot be written as JSON: .*ndarray"):
            save(data_state={"a": np.ones(1)})
        with pytest.raises(ValueError, match="the metric 'loss' is not among accuracy"):
            save(metrics={"accuracy": 1.0})
        with pytest.raises(ValueError, match=r"two leaves of the state are called a\.b"):
            save({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
        assert checkpointer.latest() is None


@pytest.mark.parametrize(
    "values", [{"every_steps": 0}, {"keep_last": 0}, {"keep_best": -1}, {"keep_best": 1}, {"mode": "most"}]
)
def test_senseless_configs_are_refused(values):
    with pytest.raises(ValueError, match=str(next(iter(values.values())))):
        CheckpointConfig(**{"every_steps": 1, "keep_last": 1, **values})


def test_other_versions_are_told(tmp_path, monkeypatch):
    now = library_versions()
    assert now["python"] == platform.python_version() and now["jax"] == jax.__version__
    then = {name: version for name, version in now.items() if name != "numpy"} | {"jax": "0.1.2"}
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "library_versions", lambda: then)
        save_steps(tmp_path, [1])
    restored = Checkpointer(tmp_path).restore({"x": jnp.zeros(4, jnp.int32)})
    assert restored.versions == then
    assert restored.version_changes() == [
        f"jax was 0.1.2 and is {jax.__version__} now",
        f"numpy was absent and is {np.__version__} now",
    ]


def run(repo_root: Path, *arguments: Any, **env: str) -> subprocess.Popen:
    """This file as a program."""
    command = [sys.executable, __file__, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(repo_root), **env}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sharded(state: State) -> State:
    """Matrices cut over four meshes' worth of devices, the rest on all of them."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        cut = leaf.ndim > 1 and leaf.shape[-1] % 4 == 0 and leaf.shape[-2] % 2 == 0
        spec = jax.sharding.PartitionSpec(*(None,) * (leaf.ndim - 2), "fsdp", "tensor") if cut else ()
        spec = jax.sharding.PartitionSpec(*spec)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def reshard(folder: Path) -> None:
    """On eight devices: what one device saved is restored cut up, changed, and saved."""
    assert jax.device_count() == 8
    state = sharded(make_state(seed=4))
    with Checkpointer(folder, EVERY) as checkpointer:
        back = checkpointer.restore(state).state
        assert_same(back, make_state())
        places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(state)]
        assert [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(back)] == places
        assert sum(place is not None and not place.is_fully_replicated for place in places) > 10
        checkpointer.save(6, sharded(make_state(seed=2)), data_state=DATA, settings={})
        uneven = jax.sharding.NamedSharding(places[1].mesh, jax.sharding.PartitionSpec("fsdp"))
        wrong = replace(
            abstract(state),
            model=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=uneven), state.model),
        )
        with pytest.raises(ValueError, match=r"model\.blocks\.attn_norm_D\.value: .*\(3, 32\)"):
            checkpointer.restore(wrong)


def test_other_meshes(tmp_path, repo_root):
    with Checkpointer(tmp_path, EVERY) as checkpointer:
        checkpointer.save(5, make_state(), data_state=DATA, settings=SETTINGS)
    process = run(repo_root, "reshard", tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    restored = Checkpointer(tmp_path).restore(abstract(make_state()))
    assert_same(restored.state, make_state(seed=2))
    assert restored.step == 6 and restored.data_state == DATA


BIG = 1_000_000


def state_at(step: int) -> dict[str, jax.Array]:
    return {"step": jnp.int32(step), "x": jax.random.normal(jax.random.key(step), (BIG,)), "key": jax.random.key(step)}


def save_for_ever(folder: Path) -> None:
    """A run that saves each step, and goes on from where one before it was killed."""
    with Checkpointer(folder, CheckpointConfig(every_steps=1, keep_last=2)) as checkpointer:
        step = -1 if checkpointer.latest() is None else checkpointer.restore(state_at(0)).step
        while True:
            step += 1
            checkpointer.save(step, state_at(step), data_state={"at": step}, settings={})


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, repo_root):
    rng, caught, newest = random.Random(0), 0, -1
    for _ in range(5):
        process = run(repo_root, "save_for_ever", tmp_path)
        while not any(int(p.name) > newest + 1 for p in tmp_path.iterdir() if p.name.isdecimal()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        caught += any("tmp" in path.name for path in tmp_path.iterdir())
        restored = Checkpointer(tmp_path).restore(state_at(0))
        assert restored.step > newest + 1 and restored.step == restored.data_state["at"] and not restored.warnings
        assert_same(restored.state, state_at(restored.step))
        newest = restored.step
    assert caught, "no save was under way at any kill"
    Checkpointer(tmp_path, EVERY)
    assert all(path.name.isdecimal() for path in tmp_path.iterdir())


if __name__ == "__main__":
    {"reshard": reshard, "fail": fail, "save_for_ever": save_for_ever}[sys.argv[1]](Path(sys.argv[2]))
