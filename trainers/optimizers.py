"""Optimizers and learning-rate schedules, from optax."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import optax
from optax import contrib

NAMES = ("adamw", "lion", "adafactor", "muon")
SCHEDULES = ("constant", "cosine", "linear", "wsd")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters follow their gradients. The peak learning rate and the number of steps are the run's.

    `warmup` is a number of steps, or as a float below 1 a fraction of all. Behind it the rate stays constant, or falls
    to `final_fraction` of its peak, by default a tenth: as a half cosine, linearly, or (wsd) constantly up to the last
    `decay_fraction` of the steps and linearly from there. `weight_decay` is decoupled and leaves norms and biases
    alone. `b1`, `b2` and `eps` are those of AdamW and of Muon's AdamW part, which has Nesterov's momentum; Lion has
    `b1` and `b2`, Adafactor none; Muon's `momentum` is its own. None takes the optimizer's usual value: b1 0.9, b2 0.95
    (Lion: 0.99), eps 1e-8, momentum 0.95.
    """

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup: int | float = 0
    final_fraction: float | None = None
    decay_fraction: float | None = None
    weight_decay: float = 0.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        for field, value, known in (("name", self.name, NAMES), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise ValueError(f"{field} {value!r} is none of {', '.join(known)}")
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup >= 1):
            raise ValueError(f"warmup {self.warmup} must be a number of steps, or a fraction of them below 1")
        if self.final_fraction is not None and self.schedule == "constant":
            raise ValueError(f"final_fraction {self.final_fraction} means nothing to a constant schedule")
        if self.final_fraction is not None and not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction {self.final_fraction} must be from 0 to 1")
        if (self.decay_fraction is not None) != (self.schedule == "wsd"):
            raise ValueError(f"decay_fraction {self.decay_fraction} belongs to the schedule wsd, not {self.schedule}")
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction {self.decay_fraction} must be above 0 and at most 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay {self.weight_decay} must be a number from 0")
        own = {
            "adamw": ("b1", "b2", "eps"),
            "lion": ("b1", "b2"),
            "adafactor": (),
            "muon": ("b1", "b2", "eps", "momentum"),
        }
        for field in ("b1", "b2", "eps", "momentum"):
            value = getattr(self, field)
            if value is not None and field not in own[self.name]:
                raise ValueError(f"{field} {value} means nothing to {self.name}")
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{field} {value} must be at least 0 and below 1")
        if self.eps == 0:
            raise ValueError(f"eps {self.eps} would divide by zero where a parameter has had no gradient yet")


class Optimizer(NamedTuple):
    """A gradient transformation, and the learning rate that it uses for its update of a number."""

    transformation: optax.GradientTransformation
    learning_rate: optax.Schedule


def make_optimizer(config: OptimizerConfig, *, learning_rate: float, num_steps: int) -> Optimizer:
    """The optimizer of a run of `num_steps` updates with that peak learning rate.

    Raises ValueError where warm-up and decay do not fit into the steps, or the learning rate is no positive number.
    """
    schedule = make_schedule(config, learning_rate=learning_rate, num_steps=num_steps)

    def value(field: str, usual: float) -> float:
        own = getattr(config, field)
        return usual if own is None else own

    decay = {"weight_decay": config.weight_decay, "mask": decayed}
    b1, b2, eps = value("b1", 0.9), value("b2", 0.99 if config.name == "lion" else 0.95), value("eps", 1e-8)
    match config.name:
        case "adamw":
            transformation = optax.adamw(schedule, b1, b2, eps, **decay)
        case "lion":
            transformation = optax.lion(schedule, b1, b2, **decay)
        case "adafactor":
            transformation = optax.chain(
                optax.scale_by_factored_rms(min_dim_size_to_factor=32),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(config.weight_decay, decayed),
                optax.scale_by_learning_rate(schedule),
            )
        case "muon":
            # Its own decay would not spare norms and biases. A rate of -1 leaves its result not yet turned downhill.
            transformation = optax.chain(
                contrib.muon(
                    -1.0,
                    beta=value("momentum", 0.95),
                    eps=eps,
                    adam_b1=b1,
                    adam_b2=b2,
                    muon_weight_dimension_numbers=_muon_dimensions,
                    consistent_rms=0.2,
                ),
                optax.add_decayed_weights(config.weight_decay, decayed),
                optax.scale_by_learning_rate(schedule),
            )
    return Optimizer(transformation, schedule)


def make_schedule(config: OptimizerConfig, *, learning_rate: float, num_steps: int) -> optax.Schedule:
    """The learning rate by the number of the update, counted from 0."""
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate {learning_rate} must be a positive number")
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be positive")
    warmup = config.warmup if isinstance(config.warmup, int) else round(config.warmup * num_steps)
    decay = round((config.decay_fraction or 0) * num_steps)
    if warmup + decay > num_steps:
        raise ValueError(f"warm-up of {warmup} steps and decay of {decay} do not fit into {num_steps} steps")
    final = 0.1 if config.final_fraction is None else config.final_fraction
    rest, end = num_steps - warmup, learning_rate * final
    match config.schedule:
        case "constant":
            main = optax.constant_schedule(learning_rate)
        case "cosine":
            main = optax.cosine_decay_schedule(learning_rate, max(1, rest), final)
        case "linear":
            main = optax.linear_schedule(learning_rate, end, max(1, rest))
        case "wsd":
            main = optax.linear_schedule(learning_rate, end, max(1, decay), rest - decay)
    if warmup == 0:
        return main
    # Update n has (n + 1) / warmup of the peak, so that the first one moves and the last of the warm-up has all.
    ramp = optax.linear_schedule(learning_rate / warmup, learning_rate, max(1, warmup - 1))
    return optax.join_schedules([ramp, main], [warmup])


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: matrices and embeddings, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path), params)


def _name(path: tuple) -> str:
    """The parameter's name in the path of its leaf, letters included."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return next((name for name in reversed(names) if name not in ("value", "raw_value")), "")


def _is_matrix(path: tuple) -> bool:
    name = _name(path)
    return "norm" not in name and "bias" not in name


def _muon_dimensions(params: Any) -> Any:
    """Muon's view of each matrix of the blocks, (contracted, resulting) dimensions behind the layer axis; else None."""

    def dimensions(path: tuple, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        inner = {"q_DNH": 1, "k_DKH": 1, "v_DKH": 1, "o_NHD": 2, "gate_DF": 1, "up_DF": 1, "down_FD": 1}.get(
            _name(path)
        )
        if inner is None:
            return None
        return contrib.MuonDimensionNumbers(tuple(range(1, 1 + inner)), tuple(range(1 + inner, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(dimensions, params)
