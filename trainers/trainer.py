"""The state of training, the one step that changes it, and the loop around it. An algorithm is a subclass: a loss."""

import abc
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainers.metrics import Throughput
from utils.platforms import target_platform
from utils.shapes import Array
from utils.sharding import batch_spec, letters_at, mesh_of, named_sharding, on_mesh_of, process_rows

COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
# For XLA: in half precision every value is rounded as the program says, and not where it suits a fusion. Two programs
# that compute the same log-probabilities then get the same numbers, whatever else they compute.
AS_WRITTEN = {"xla_allow_excess_precision": False}
_GROWTH_INTERVAL = 2000  # updates without overflow after which the loss scale doubles
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 2.0**24  # below 1 too: gradients are sums, so a batch may be large


class Loss(NamedTuple):
    """Sums over a batch, not means: batches, micro-batches and devices are added up, and divided once.

    `sum` is what has the gradient, `weight` what it is divided by, such as the number of tokens that are learnt. Each
    of the `metrics` is a sum and the weight to divide it by. All are scalars.
    """

    sum: Array
    weight: Array
    metrics: dict[str, tuple[Array, Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WithShared:
    """A batch with something that all of its rows need, such as another network.

    `rows` are cut into micro-batches and laid over the devices as any batch is; `shared` goes along whole, to where it
    lies already, and the step leaves it as it is.
    """

    rows: Any
    shared: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossScale:
    """The factor that keeps float16 gradients from vanishing, and the updates since it last changed.

    Source: arXiv:1710.03740, sec. 3.2, with the factor found by trial.
    """

    value: Array
    good_updates: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a step changes.

    `step` counts steps, int32, `skipped` those whose update was left out because a gradient was not finite. `key` never
    changes: each step folds its number into it. `loss_scale` is None unless the computation is in float16.
    """

    step: Array
    model: nnx.Module
    opt_state: optax.OptState
    key: Array
    skipped: Array
    loss_scale: LossScale | None = None


class Observer(Protocol):
    """Called after each step with the number of steps done; a true return value ends training.

    State and metrics are still being computed: converting one of their values waits for the step to end. The state's
    buffers are used up by the next step.
    """

    def __call__(self, step: int, state: TrainState, metrics: Mapping[str, Array]) -> bool | None: ...


class Trainer(abc.ABC):
    """Steps of gradient descent. A subclass says what the `loss` of a batch is, and where need be how to `prepare` it.

    `trainable` is a filter of flax.nnx: only what it selects gets gradients and optimizer state. `compute_dtype` is
    what floating-point parameters are cast to for the loss, while the parameters themselves and their updates keep
    their dtype; "auto" is bfloat16 on accelerators and the parameters' own on CPU. A batch is a pytree of arrays whose
    leading axes are cut into `accumulation_steps` micro-batches, or a `WithShared`. Gradients longer than
    `max_grad_norm` are shortened to it. `learning_rate` is the schedule that the optimizer follows, to be reported.

    Raises ValueError for options outside their range.
    """

    compiler_options: ClassVar[Mapping[str, Any]] = {}  # of XLA, for the step and for evaluation

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        *,
        learning_rate: optax.Schedule | None = None,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = 1.0,
        compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        trainable: Any = nnx.Param,
    ):
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, not {accumulation_steps}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, not {max_grad_norm}")
        if compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype {compute_dtype!r} is none of {', '.join(COMPUTE_DTYPES)}")
        if compute_dtype == "auto":
            compute_dtype = None if target_platform() == "cpu" else "bfloat16"
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.accumulation_steps = accumulation_steps
        self.max_grad_norm = max_grad_norm
        self.compute_dtype = None if compute_dtype is None else jnp.dtype(compute_dtype)
        self.trainable = trainable
        self._shardings: tuple[Any, Any] | None = None  # of what is trained and of optimizer state, on a mesh

    @abc.abstractmethod
    def loss(self, model: Any, batch: Any, key: Array | None) -> Loss:
        """The loss of a batch, a pure function. `key` is for dropout and the like; None in evaluation."""

    def prepare(
        self, state: TrainState, batches: Iterator[Any], throughput: Throughput
    ) -> tuple[Any, Mapping[str, float]] | None:
        """The batch of the next step and metrics of its making, from as much of the data as it takes; None at its end.

        Outside of jit, so it may run the model. `throughput` is told what the time goes to.
        """
        with throughput.waiting():
            batch = next(batches, None)
        return None if batch is None else (batch, {})

    def init(self, model: nnx.Module, key: Array) -> TrainState:
        """The state at the beginning. Optimizer state lies on the mesh as the parameters that it belongs to.

        The arrays of `model` and `key` are the state's from now on: the first step uses them up.
        """
        trained, shardings = self._lay_out(model)
        scalars = self._scalars(key)
        if shardings is not None:  # where the first step leaves them, else the second one would be compiled anew
            everywhere = NamedSharding(mesh_of(trained), PartitionSpec())
            scalars = jax.jit(lambda x: x, out_shardings=everywhere)(scalars)
        opt_state = jax.jit(self.optimizer.init, out_shardings=shardings)(trained)
        return TrainState(model=model, opt_state=opt_state, **scalars)

    def abstract_init(self, model: nnx.Module) -> TrainState:
        """As `init`, of a model on a mesh with shapes and shardings in place of arrays, and so returned."""
        trained, shardings = self._lay_out(model)
        whole = NamedSharding(mesh_of(trained), PartitionSpec())
        scalars = jax.eval_shape(lambda: self._scalars(jax.random.key(0)))
        opt_state = jax.tree.map(abstract, jax.eval_shape(self.optimizer.init, trained), shardings)
        scalars = jax.tree.map(lambda x: abstract(x, whole), scalars)
        return TrainState(model=model, opt_state=opt_state, **scalars)

    def _lay_out(self, model: nnx.Module) -> tuple[nnx.State, Any]:
        """What is trained, and the shardings of its optimizer state, None without a mesh: the step keeps to them."""
        trained = nnx.state(model, self.trainable)
        if not jax.tree.leaves(trained):
            raise ValueError(f"the model has no parameter that {self.trainable} selects: there is nothing to train")
        shardings = shardings_like(jax.eval_shape(self.optimizer.init, trained), trained)
        if shardings is not None:
            self._shardings = jax.tree.map(lambda x: x.sharding, trained), shardings
        return trained, shardings

    def _scalars(self, key: Array) -> dict[str, Any]:
        scale = None
        if self.compute_dtype == jnp.float16:
            scale = LossScale(value=jnp.float32(2.0**16), good_updates=jnp.int32(0))
        return dict(step=jnp.int32(0), key=key, skipped=jnp.int32(0), loss_scale=scale)

    @functools.cached_property
    def step(self) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
        """step(state, batch) -> the next state and metrics, compiled. The state given is used up."""
        return jax.jit(self._step, donate_argnums=0, compiler_options=dict(self.compiler_options))

    @functools.cached_property
    def _sums(self) -> Callable[[nnx.Module, Any], Loss]:
        return jax.jit(
            lambda model, batch: self.loss(cast(model, self.compute_dtype), batch, None),
            compiler_options=dict(self.compiler_options),
        )

    def fit(
        self,
        state: TrainState,
        batches: Iterable[Any],
        *,
        num_steps: int,
        observers: Iterable[Observer] = (),
        throughput: Throughput | None = None,
    ) -> TrainState:
        """Train until `num_steps` steps are done in all, the batches end, or an observer returns true.

        Observers get the metrics of the step along with those of `prepare`.
        """
        batches = iter(batches)
        place = placement(state.model)
        throughput = throughput or Throughput()
        with on_mesh_of(state.model):
            for step in range(int(state.step) + 1, num_steps + 1):
                prepared = self.prepare(state, batches, throughput)
                if prepared is None:
                    break
                batch, own = prepared
                state, metrics = self.step(state, place(batch))
                wishes = [observe(step, state, {**metrics, **own}) for observe in observers]
                if any(wishes):
                    break
        return state

    def evaluate(self, model: nnx.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Means over all the batches together: `loss`, the metrics, and the `weight` that the loss was divided by."""
        place = placement(model)
        total: dict[str, np.ndarray] = {}
        for batch in batches:
            with on_mesh_of(model):
                loss = self._sums(model, place(batch))
            for name, pair in {"loss": (loss.sum, loss.weight), **loss.metrics}.items():
                total[name] = total.get(name, 0) + np.array(pair, np.float64)
        if not total or not total["loss"][1] > 0:
            raise ValueError("there is nothing to evaluate on: no batch has a token with a weight")
        means = {name: float(pair[0] / pair[1]) if pair[1] else math.nan for name, pair in total.items()}
        return means | {"weight": float(total["loss"][1])}

    def _step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        graph, trained, frozen = nnx.split(state.model, self.trainable, ...)
        scale = 1.0 if state.loss_scale is None else state.loss_scale.value

        def scaled_sum(trained: nnx.State, batch: Any, key: Array) -> tuple[Array, Loss]:
            loss = self.loss(cast(nnx.merge(graph, trained, frozen), self.compute_dtype), batch, key)
            return loss.sum * scale, loss

        key = jax.random.fold_in(state.key, state.step)
        gradients, loss = _accumulate(self._gradient(scaled_sum), trained, batch, key, self.accumulation_steps)
        weight = jnp.where(loss.weight > 0, loss.weight, 1)
        norm = optax.tree.norm(optax.tree.cast(gradients, jnp.float32)) / (weight * scale)
        good = jnp.isfinite(norm) & jnp.isfinite(loss.sum) & (loss.weight > 0)
        limit = jnp.inf if self.max_grad_norm is None else self.max_grad_norm
        factor = jnp.where(norm > limit, limit / norm, 1) / (weight * scale)
        gradients = jax.tree.map(lambda g, p: (g * factor).astype(p.dtype), gradients, trained)

        updates, opt_state = self.optimizer.update(gradients, state.opt_state, trained)
        updated = optax.apply_updates(trained, updates)
        updated, opt_state = (
            jax.tree.map(functools.partial(jnp.where, good), new, old)
            for new, old in ((updated, trained), (opt_state, state.opt_state))
        )
        if self._shardings is not None:  # else the compiler may choose others for the next step
            updated, opt_state = jax.lax.with_sharding_constraint((updated, opt_state), self._shardings)
        metrics = {name: _mean(*pair) for name, pair in loss.metrics.items()}
        metrics |= {"loss": _mean(loss.sum, loss.weight), "weight": loss.weight, "grad_norm": norm}
        if self.learning_rate is not None:
            metrics["learning_rate"] = self.learning_rate(state.step - state.skipped)
        if state.loss_scale is not None:
            metrics["loss_scale"] = state.loss_scale.value
        state = replace(
            state,
            step=state.step + 1,
            model=nnx.merge(graph, updated, frozen),
            opt_state=opt_state,
            skipped=state.skipped + jnp.where(good, 0, 1),
            loss_scale=_next_scale(state.loss_scale, good),
        )
        return state, metrics | {"skipped": state.skipped}

    def _gradient(self, scaled_sum: Callable[[Any, Any, Array], tuple[Array, Loss]]) -> Callable[..., tuple[Any, Loss]]:
        """The gradient of a micro-batch, on a mesh cut as the parameters are before it is added to others."""
        gradient = jax.grad(scaled_sum, has_aux=True)
        if self._shardings is None:
            return gradient

        def own(trained: nnx.State, batch: Any, key: Array) -> tuple[Any, Loss]:
            gradients, loss = gradient(trained, batch, key)
            gradients = jax.lax.with_sharding_constraint(gradients, self._shardings[0])
            return jax.lax.optimization_barrier((gradients, loss))  # libtpu fails at moving sums of sums out of a loop

        return own


def _accumulate(
    gradient: Callable[[Any, Any, Array], tuple[Any, Loss]], trained: Any, batch: Any, key: Array, num_steps: int
) -> tuple[Any, Loss]:
    """Gradients, and sums, of all micro-batches added up in float32; micro-batch i has rows i, i + num_steps, …"""
    if num_steps == 1:
        return gradient(trained, batch, key)
    rows, whole = _parted(batch)

    def own(rows: Any, key: Array) -> tuple[Any, Loss]:
        return gradient(trained, whole(rows), key)

    def add(sums: Any, inputs: tuple[Any, Array]) -> tuple[Any, None]:
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), sums, own(*inputs)), None

    inputs = (cut(rows, num_steps), jax.random.split(key, num_steps))
    first = jax.tree.map(lambda x: x[0], inputs)
    shapes = jax.eval_shape(own, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
    return jax.lax.scan(add, zeros, inputs)[0]


def _parted(batch: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The rows of a batch, and a function that puts what they share back to some of them."""
    if not isinstance(batch, WithShared):
        return batch, lambda rows: rows
    return batch.rows, lambda rows: replace(batch, rows=rows)


def cut(batch: Any, num_pieces: int) -> Any:
    """A batch as a stack of micro-batches; micro-batch i has rows i, i + num_pieces, …"""

    def own(x: Array) -> Array:
        if x.shape[0] % num_pieces:
            raise ValueError(f"a batch of {x.shape[0]} rows cannot be cut evenly into {num_pieces} micro-batches")
        return x.reshape(x.shape[0] // num_pieces, num_pieces, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(own, batch)


def joined(pieces: Any) -> Any:
    """The batch that `cut` was given."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), pieces)


def _mean(total: Array, weight: Array) -> Array:
    return total / weight


def cast(model: nnx.Module, dtype: np.dtype | None) -> nnx.Module:
    """The model with floating-point parameters in that dtype, None for as they are."""
    if dtype is None:
        return model
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, model)


def _next_scale(scale: LossScale | None, good: Array) -> LossScale | None:
    """Half of the scale after an overflow, the double after many updates without."""
    if scale is None:
        return None
    grown = good & (scale.good_updates + 1 >= _GROWTH_INTERVAL)
    value = jnp.where(
        good, jnp.where(grown, jnp.minimum(2 * scale.value, _LARGEST_SCALE), scale.value), scale.value / 2
    )
    return LossScale(
        value=jnp.maximum(value, _SMALLEST_SCALE),
        good_updates=jnp.where(good & ~grown, scale.good_updates + 1, 0).astype(jnp.int32),
    )


def abstract(x: Any, sharding: jax.sharding.Sharding, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """An array's shape, and its dtype unless another is given, with a sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype, sharding=sharding)


def shardings_like(opt_state: Any, trained: Any) -> Any:
    """Shardings of optimizer state: that of the parameter with the same path and shape, else whole on each device.

    None, which leaves it to jax, without a mesh.
    """
    mesh = mesh_of(trained)
    if mesh is None:
        return None
    parameters = [(_keys(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trained)]

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        keys = _keys(path)
        for own, parameter in parameters:
            if keys[-len(own) :] == own and parameter.shape == leaf.shape:
                return parameter.sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(str(key) for key in path)


def num_runs(model: nnx.Module) -> int:
    """How many equal runs of rows a batch is made of, of which this process has one."""
    mesh = mesh_of(model)
    return 1 if mesh is None else process_rows(mesh)[1]


def placement(model: nnx.Module) -> Callable[[Any], Any]:
    """How this process's rows of a batch become arrays: cut over the mesh of the model, if it lies on one.

    Arrays that lie on that mesh already are of all processes, and stay.
    """
    mesh = mesh_of(model)
    if mesh is None:
        return lambda batch: batch
    index, count = process_rows(mesh)

    def own(path: tuple, x: Any) -> Any:
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh:
            return x
        whole = jax.ShapeDtypeStruct((x.shape[0] * count, *x.shape[1:]), x.dtype)
        return _placed(index, x, whole, _rows_sharding(letters_at(path), whole.shape, mesh))

    def place(batch: Any) -> Any:
        rows, with_shared = _parted(batch)
        return with_shared(jax.tree_util.tree_map_with_path(own, rows))

    return place


def _rows_sharding(letters: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """As the letters of its name have it; of an array without, the leading axis is that of the rows."""
    return named_sharding(letters, shape, mesh) if letters else NamedSharding(mesh, batch_spec(mesh))


def _placed(index: int, x: Any, whole: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Array:
    """An array over all processes, of which this one has the rows x, run number `index`."""
    if isinstance(x, jax.Array) and x.shape == whole.shape:
        return jax.device_put(x, sharding)
    own, first = np.asarray(x), index * x.shape[0]

    def part(place: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = place[0].indices(whole.shape[0])
        return own[(slice(start - first, stop - first), *place[1:])]

    return jax.make_array_from_callback(whole.shape, sharding, part)
