"""Rollouts as batches of updates: prompts are drawn from, completions scored, and what is not learnt yet is kept.

Letters as in `trainers.policy`; P prompts.
"""

import abc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from data.prompts import Prompt
from models.llama import LLaMa
from trainers.advantages import has_spread
from trainers.groups import Group, first_of, grouped, length_metrics, reward_metrics
from trainers.metrics import Throughput
from trainers.rewards import Reward
from trainers.rollouts import RollOut
from trainers.stored_arrays import dump_arrays, load_arrays
from trainers.trainer import cast


class InFlight(abc.ABC):
    """Makes the batches that a model learns from; holds those of a rollout that have not been learnt yet.

    A subclass says what the `updates` of a rollout are, of class `batch`, and may say which network of the model is its
    `policy_of`, and what else is `observed`. `roll_out` draws completions, `decode` turns token ids to text for
    `rewards`. Groups without spread are replaced by new prompts in up to `resample` further rollouts.

    `state` and `restore` carry over what is in flight. `groups` are those of the rollout that the batch of the last
    `next` is the first of, and empty where it is a later one; `num_waiting` batches of the rollout are still to come.
    """

    batch: ClassVar[type]

    def __init__(
        self,
        roll_out: RollOut,
        rewards: Sequence[Reward],
        decode: Callable[[Sequence[int]], str],
        *,
        completions: int,
        compute_dtype: Any,
        resample: int = 0,
    ):
        if not rewards:
            raise ValueError("no reward function: there is nothing to learn from")
        self._roll_out, self._rewards, self._decode = roll_out, tuple(rewards), decode
        self._completions, self._resample = completions, resample
        self._cast = jax.jit(lambda model: cast(model, compute_dtype))
        self._waiting: list[Any] = []
        self._metrics: dict[str, float] = {}
        self._prompts = self._tokens = 0  # drawn so far
        self.groups: list[Group] = []

    @abc.abstractmethod
    def updates(self, model: nnx.Module, groups: list[Group], number: int) -> tuple[list[Any], dict[str, float]]:
        """The batches of all updates that a rollout is for, and metrics of their making.

        `model` is in the compute dtype, `number` the prompts drawn before.
        """

    def policy_of(self, model: nnx.Module) -> LLaMa:
        """The network that completions are drawn from."""
        return model

    def observed(self, groups: list[Group]) -> dict[str, float]:
        """Further metrics of all groups that were drawn."""
        return {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def next(
        self, model: nnx.Module, batches: Iterator[list[Prompt]], throughput: Throughput
    ) -> tuple[Any, Mapping[str, float]] | None:
        """The batch of the next update, and metrics of the rollout that it comes from; None where the prompts end.

        Where drawing or scoring fails, the prompts are given back to the data, if they come from a loader.
        """
        if self._waiting:
            self.groups = []
        else:
            jax.block_until_ready(nnx.state(model))  # else the last update would count as drawing
            place = batches.state() if hasattr(batches, "state") else None
            try:
                if not self._draw(model, batches, throughput):
                    return None
            except BaseException:
                if place is not None:
                    batches.restore(place)
                raise
        batch = self._waiting.pop(0)
        throughput.add_step(tokens=self._num_tokens(batch))
        return batch, dict(self._metrics)

    def evaluate(self, model: nnx.Module, batches: Iterator[list[Prompt]], roll_out: RollOut) -> dict[str, float]:
        """Mean rewards of the completions that `roll_out` draws; `loss` is the negative of `reward`.

        A shorter list of prompts is filled up to the length of the first, so that nothing is compiled anew.
        """
        policy, groups, size = self._cast(self.policy_of(model)), [], 0
        for prompts in batches:
            size = max(size, len(prompts))
            filled = [*prompts, *[prompts[-1]] * (size - len(prompts))]
            rollout = roll_out(policy, [prompt.ids for prompt in filled], [prompt.index for prompt in filled])
            groups += self._grouped(prompts, first_of(rollout, len(prompts), of=size))
        metrics = self._reward_metrics(groups)
        kept = {name: value for name, value in metrics.items() if name == "reward" or name.endswith("/mean")}
        lengths = np.concatenate([group.count_C for group in groups])
        return {"loss": 0.0 - metrics["reward"], **kept, "completions/mean_length": float(lengths.mean())}

    def state(self) -> dict[str, Any]:
        """What is in flight, as JSON values."""
        waiting = [dump_arrays(vars(batch)) for batch in self._waiting]
        return {"waiting": waiting, "metrics": self._metrics, "prompts": self._prompts, "tokens": self._tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        waiting = [self.batch(**load_arrays(batch)) for batch in state["waiting"]]
        for rows in (len(batch.prompts_BS) for batch in waiting):
            if rows % self._rows:
                raise ValueError(
                    f"the checkpoint is in the middle of a rollout whose updates have {rows} rows, which "
                    f"{self._rows} micro-batches and devices together cannot share evenly: go on with those it was "
                    "made with until the rollout is through"
                )
        self._waiting = waiting
        self._metrics, self._prompts, self._tokens = dict(state["metrics"]), state["prompts"], state["tokens"]

    def _draw(self, model: nnx.Module, batches: Iterator[list[Prompt]], throughput: Throughput) -> bool:
        """Fill what is waiting with the updates of one rollout; False where there are no prompts."""
        model, wanted, rounds = self._cast(model), 0, 0
        kept: list[Group] = []
        spare: list[Group] = []
        drawn: list[Group] = []
        count, seconds = self._prompts, 0.0
        while True:
            with throughput.waiting():
                prompts = next(batches, None)
            wanted = wanted or len(prompts or ())
            if not prompts or len(prompts) < wanted:
                if not rounds:
                    return False
                break
            start = time.perf_counter()
            with throughput.section("rollout"):
                numbers = range(count, count + wanted)
                rollout = self._roll_out(self.policy_of(model), [prompt.ids for prompt in prompts], numbers)
            seconds += time.perf_counter() - start
            with throughput.section("rewards"):
                groups = self._grouped(prompts, rollout)
            count, rounds = count + wanted, rounds + 1
            drawn += groups
            spread = has_spread(np.stack([group.total_C for group in groups]))
            keeps = spread if self._resample else np.ones(wanted, bool)
            kept += [group for group, keep in zip(groups, keeps) if keep]
            spare += [group for group, keep in zip(groups, keeps) if not keep]
            if len(kept) >= wanted or rounds > self._resample:
                break
        self.groups = (kept + spare)[:wanted]
        with throughput.section("scoring"):
            waiting, own = self.updates(model, self.groups, self._prompts)
        self._prompts, self._waiting = count, waiting
        if self._resample:
            own["dynamic_sampling/rollouts"] = float(rounds)
            own["dynamic_sampling/kept"] = min(len(kept), wanted) / wanted
        self._metrics = self._metrics_of(drawn, seconds) | own
        return True

    def _metrics_of(self, drawn: list[Group], seconds: float) -> dict[str, float]:
        """Of all that was drawn, in so many seconds; its tokens are added up."""
        tokens = int(sum(group.count_C.sum() for group in drawn))
        self._tokens += tokens + sum(len(group.prompt.ids) * self._completions for group in drawn)
        metrics = self._reward_metrics(drawn) | length_metrics(drawn) | self.observed(drawn)
        return metrics | {"num_tokens": float(self._tokens), "rollout_tokens_per_second": tokens / seconds}

    def _grouped(self, prompts: Sequence[Prompt], rollout: Any) -> list[Group]:
        return grouped(prompts, rollout, self._rewards, self._decode)

    def _reward_metrics(self, groups: list[Group]) -> dict[str, float]:
        return reward_metrics(groups, [reward.name for reward in self._rewards])

    def _num_tokens(self, batch: Any) -> int:
        """Tokens of a batch that count, with each prompt once."""
        # A run may have been resumed with fewer completions than the batch has.
        rows_of_a_prompt = max(1, self._completions // batch.completions_BCM.shape[1])
        return int(batch.prompt_lengths_B.sum()) // rows_of_a_prompt + int(batch.mask_BCM.sum())
